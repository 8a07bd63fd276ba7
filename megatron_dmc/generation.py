"""Text from a compressed cache, one token at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_dmc.checkpoint import LoadedModel
from megatron_dmc.config import DMCError
from megatron_dmc.ops.reference import DMCCache


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the most likely token.
        top_k: sample from so many most likely tokens; 0 from all.
        top_p: sample from the most likely tokens that together have this probability; 0 from all.
        seed: of the random choices.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise DMCError(f"temperature must be 0 (greedy) or more; got {self.temperature}")
        if self.top_k < 0:
            raise DMCError(f"top_k must be 0 (all tokens) or more; got {self.top_k}")
        if not 0 <= self.top_p <= 1:
            raise DMCError(f"top_p must be between 0 (all tokens) and 1; got {self.top_p}")
        if self.top_k and self.top_p:
            raise DMCError(f"give either top_k or top_p; got {self.top_k} and {self.top_p}")


@dataclass(frozen=True)
class CacheReport:
    """What the cache of one sequence holds after generation.

    Attributes:
        tokens: tokens that have entered it.
        entries: entries kept, summed over `heads` caches (layers times KV heads).
        entry_bytes: bytes of those entries' keys and values.
        state_bytes: bytes of the open segments, which do not grow with the sequence.
    """

    tokens: int
    heads: int
    entries: int
    entry_bytes: int
    state_bytes: int

    @property
    def ratio(self) -> float:
        """Tokens per entry."""
        return self.tokens * self.heads / self.entries

    @classmethod
    def of(cls, caches: list[DMCCache]) -> CacheReport:
        return cls(
            tokens=caches[0].tokens,
            heads=sum(c.lengths.numel() for c in caches),
            entries=sum(int(c.lengths.sum()) for c in caches),
            entry_bytes=sum(c.entry_bytes for c in caches),
            state_bytes=sum(c.state_bytes for c in caches),
        )


class Generation:
    """One sequence: iterate for the new tokens, then read `report`.

    Args:
        loaded: the model.
        prompt: its tokens, at least one.
        max_new_tokens: stop after so many.
        sampling: how tokens are chosen.
        stop_at_end: stop at the tokenizer's end-of-document token, which is not returned.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        prompt: list[int],
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop_at_end: bool = True,
    ) -> None:
        from megatron.core.inference.contexts import StaticInferenceContext

        if not prompt:
            raise DMCError("the prompt has no tokens")
        if max_new_tokens < 1:
            raise DMCError(f"max_new_tokens must be at least 1; got {max_new_tokens}")
        length, limit = len(prompt) + max_new_tokens, loaded.args.max_position_embeddings
        if loaded.args.position_embedding_type == "learned_absolute" and length > limit:
            raise DMCError(
                f"{len(prompt)} prompt tokens and {max_new_tokens} new ones exceed the model's {limit} positions"
            )
        self.loaded, self.prompt, self.max_new_tokens = loaded, prompt, max_new_tokens
        self.sampling, self.stop_at_end = sampling or Sampling(), stop_at_end
        if self.sampling.top_k >= loaded.tokenizer.vocab_size:
            raise DMCError(
                f"top_k must be below the vocabulary's {loaded.tokenizer.vocab_size}; got {self.sampling.top_k}"
            )
        self._context = StaticInferenceContext(1, length)

    @torch.no_grad()
    def __iter__(self) -> Iterator[int]:
        from megatron.core.inference.sampling.torch_sampling import TorchSampling
        from megatron.core.inference.utils import InferenceMode

        device, sampling = self.loaded.device, self.sampling
        generator = torch.Generator(device).manual_seed(sampling.seed)
        tokens = torch.tensor([self.prompt], device=device)
        for _ in range(self.max_new_tokens):
            start = self._context.sequence_len_offset
            positions = torch.arange(start, start + tokens.shape[1], device=device)[None]
            with InferenceMode.active():
                logits = self.loaded.model(
                    tokens, positions, None, inference_context=self._context, runtime_gather_output=True
                )
            self._context.sequence_len_offset += tokens.shape[1]
            logits = logits[:, -1, : self.loaded.tokenizer.vocab_size].float()
            greedy = sampling.temperature == 0
            choice = TorchSampling.sample_from_logits(
                logits,
                temperature=1.0 if greedy else sampling.temperature,
                top_k=1 if greedy else sampling.top_k,
                top_p=0.0 if greedy else float(sampling.top_p),
                generator=generator,
            )
            token = int(choice)
            if self.stop_at_end and token == self.loaded.tokenizer.eod:
                return
            yield token
            tokens = choice[None]

    @property
    def report(self) -> CacheReport:
        """The cache so far (the last token returned has not entered it)."""
        return CacheReport.of(list(self._context.key_value_memory_dict.values()))
