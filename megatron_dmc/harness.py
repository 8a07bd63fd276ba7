"""DMC models in EleutherAI's lm-evaluation-harness, as `--model megatron_dmc`.

    python -m megatron_dmc.harness --model megatron_dmc --model_args checkpoint=checkpoints/dmc-4x --tasks hellaswag

takes every argument of `lm_eval` (the harness finds models that have been imported, so its own command cannot know this
one). `megatron-dmc evaluate --tasks …` runs the same. Log-probabilities are those of hard decisions; answers are
generated from the compressed cache.
"""

from __future__ import annotations

from typing import Any

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from megatron_dmc.checkpoint import LoadedModel, load
from megatron_dmc.config import DMCError
from megatron_dmc.cpu import emulate_cuda
from megatron_dmc.evaluation import appending_all, score
from megatron_dmc.token_text import beginning, tokenize_prompt


@register_model("megatron_dmc")
class HarnessModel(TemplateLM):
    """A checkpoint as a model of the harness.

    Args:
        checkpoint: see `megatron_dmc.checkpoint.load`, or what that returned.
        tokenizer_model: where the tokenizer is now, if it has moved since training.
        max_length: of text and answer, in tokens; what the model was trained for unless given. Longer texts lose their
            beginning.
        max_gen_toks: tokens of an answer, where a task does not say.
        batch_size: answers that are generated at once.
        cache_gib: memory for their cache; 90% of what is free unless given.
        compress: `False` appends every token, of a model without DMC as well; then answers are not generated.
        device, max_batch_size: the harness passes them on; they have no meaning here.

    Raises:
        DMCError: for a checkpoint that cannot be evaluated.
    """

    def __init__(
        self,
        checkpoint: str | LoadedModel,
        tokenizer_model: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        batch_size: int | str = 64,
        cache_gib: float | None = None,
        compress: bool = True,
        device: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(checkpoint, LoadedModel):
            emulate_cuda()
            checkpoint = load(checkpoint, tokenizer_model=tokenizer_model, need_dmc=compress)
        self.loaded = checkpoint
        self.tokenizer = getattr(checkpoint.tokenizer, "_tokenizer", None)
        self.max_length = max_length or checkpoint.args.max_position_embeddings
        self.max_gen_toks = max_gen_toks
        self._batch_size = 64 if batch_size == "auto" else int(batch_size)
        self._cache_gib, self._compress = cache_gib, compress
        self._llm: Any = None
        self._beginning = beginning(checkpoint.tokenizer)
        self._begins_texts = self._beginning is not None and checkpoint.tokenizer.tokenize("0")[0] == self._beginning

    @property
    def eot_token_id(self) -> int:
        return self.loaded.tokenizer.eod

    @property
    def prefix_token_id(self) -> int:
        """Before texts that have nothing before them: the token that begins a text, or else the one that ends it."""
        return self.eot_token_id if self._beginning is None else self._beginning

    @property
    def batch_size(self) -> int:
        return self._batch_size

    @property
    def tokenizer_name(self) -> str:
        return str(self.loaded.args.tokenizer_model)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """As the tokenizer begins a text, but once; with `add_special_tokens=False`, without what it puts before it."""
        if add_special_tokens is None:
            return tokenize_prompt(self.loaded.tokenizer, string)
        tokens = list(self.loaded.tokenizer.tokenize(string))
        return tokens if add_special_tokens or not self._begins_texts else tokens[1:]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        tokenizer, options = self.loaded.tokenizer, dict(tokenize=False, add_generation_prompt=add_generation_prompt)
        if tokenizer.library == "huggingface":  # others cannot leave an answer open that is begun
            options["continue_final_message"] = not add_generation_prompt
        return tokenizer.apply_chat_template(chat_history, **options)

    def _score(self, rows: list[tuple[list[int], list[int]]], progress: bool):
        if self._compress:
            return score(self.loaded, rows, progress=progress)
        with appending_all(self.loaded):
            return score(self.loaded, rows, progress=progress)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        rows = []
        for _, text, continuation in requests:
            if len(continuation) > self.max_length:
                raise DMCError(
                    f"a continuation has {len(continuation)} tokens, more than max_length = {self.max_length}"
                )
            keep = self.max_length + 1 - len(continuation)
            rows.append((list(text)[-keep:], list(continuation)))
        return [(found.log_prob, found.greedy) for found in self._score(rows, not disable_tqdm)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        windows, owner = [], []
        for index, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            if tokens[:1] == [self.prefix_token_id]:  # which the first window has before it
                del tokens[0]
            for pair in utils.get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                windows.append(tuple(map(list, utils.make_disjoint_window(pair))))
                owner.append(index)
        total = [0.0] * len(requests)
        for index, found in zip(owner, self._score(windows, not disable_tqdm), strict=True):
            total[index] += found.log_prob
        return total

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        from megatron.core.inference.sampling_params import SamplingParams

        answers: list[str] = [""] * len(requests)
        by_options: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            by_options.setdefault(repr(request.args[1]), []).append(index)
        bar = tqdm(total=len(requests), disable=disable_tqdm, unit="answer")
        for indices in by_options.values():
            options = dict(requests[indices[0]].args[1])
            until = options.pop("until", None) or []
            until = [until] if isinstance(until, str) else list(until)
            length = int(options.pop("max_gen_toks", self.max_gen_toks))
            temperature, top_p = float(options.pop("temperature", 0.0)), float(options.pop("top_p", 0.0))
            # As the harness has it: where a task does not say, a temperature decides; greedily it has no meaning.
            sample = options.pop("do_sample", True) and temperature > 0
            params = SamplingParams(
                temperature=temperature if sample else 1.0, top_k=0 if sample else 1, top_p=top_p if sample else 0.0,
                num_tokens_to_generate=length, stop_words=until or None,
            )  # fmt: skip
            if options:
                raise DMCError(f"generation options that DMC cannot follow: {', '.join(options)}")
            keep = self.max_length - length
            if keep < 1:
                raise DMCError(f"max_gen_toks = {length} leaves no room for a text in max_length = {self.max_length}")
            for start in range(0, len(indices), self._batch_size):
                some = indices[start : start + self._batch_size]
                prompts = [self.tok_encode(requests[i].args[0])[-keep:] or [self.prefix_token_id] for i in some]
                with_texts = zip(some, self._engine().generate(prompts, params), strict=True)
                for index, answer in with_texts:
                    answers[index] = _before(self.loaded.tokenizer, answer.generated_tokens, until)
                bar.update(len(some))
        bar.close()
        return answers

    def _engine(self) -> Any:
        """Built for the first answer: log-probabilities need no cache."""
        from megatron_dmc.llm import LLM

        if not self._compress:
            raise DMCError(
                "answers are generated from the compressed cache, compress=False is for log-probabilities: for answers "
                "of the original model, `megatron-dmc convert` it and run `lm_eval --model hf`"
            )
        if self._llm is None:
            self._llm = LLM(
                self.loaded, max_sequence_length=self.max_length, max_requests=self._batch_size,
                cache_gib=self._cache_gib,
            )  # fmt: skip
        return self._llm


def _before(tokenizer: Any, tokens: list[int], until: list[str]) -> str:
    """An answer's text up to the first of some words, or to the end-of-text token."""
    text = tokenizer.detokenize([t for t in tokens if t != tokenizer.eod])
    ends = [at for word in until if (at := text.find(word)) >= 0]
    return text[: min(ends)] if ends else text


def main() -> None:
    """`lm_eval`'s own command line, which now knows the model."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
