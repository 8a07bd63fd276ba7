"""`megatron-dmc generate`: continue prompts with a retrofitted model, from its compressed cache."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from megatron_dmc.config import DMCError
from megatron_dmc.cpu import emulate_cuda

EXAMPLES = """\
examples:
  megatron-dmc generate checkpoints/dmc-4x --prompt "import os" --prompt "class Queue"
  megatron-dmc generate checkpoints/dmc-4x --prompt-file prompts.txt --temperature 0.8 --top-p 0.95 --seed 1
  echo "def main(" | megatron-dmc generate checkpoints/dmc-4x --max-new-tokens 200
  torchrun --nproc-per-node 2 -m megatron_dmc generate checkpoints/dmc-4x --tensor-model-parallel-size 2 --prompt "…"

CHECKPOINT is the folder that --save named in training (its latest iteration), or one iter_… folder in it. A prompt file
holds one prompt per line. The text goes to standard output; what the cache kept of it, to standard error."""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="megatron-dmc generate",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint of the stage retrofit or finetune")
    parser.add_argument("--prompt", action="append", default=[], help="a prompt; may be given more than once")
    parser.add_argument("--prompt-file", type=Path, help="a file with one prompt per line")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="tokens to generate (default: 128)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely token (default: 0)")
    parser.add_argument("--top-k", type=int, default=0, help="sample from the K most likely tokens")
    parser.add_argument(
        "--top-p", type=float, default=0.0, help="sample from the most likely tokens of total probability P"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random choices (default: 0)")
    parser.add_argument("--batch-size", type=int, default=64, help="prompts at once, at most (default: 64)")
    parser.add_argument(
        "--cache-gib",
        type=float,
        help="memory for the cache in GiB (default: what the prompts need; on a GPU at most 90%% of what is free)",
    )
    parser.add_argument("--cache-fp8", action="store_true", help="store the cache's entries in 8 bits")
    parser.add_argument(
        "--tensor-model-parallel-size", type=int, default=1, help="torchrun's ranks that share a layer (default: 1)"
    )
    parser.add_argument(
        "--pipeline-model-parallel-size", type=int, default=1, help="and that share out the layers (default: 1)"
    )
    parser.add_argument("--tokenizer-model", help="where the tokenizer is now, if it has moved since training")
    args = parser.parse_args()

    _check(args)
    prompts = _prompts(args)
    emulate_cuda()
    from megatron_dmc.checkpoint import load

    loaded = load(
        args.checkpoint,
        tokenizer_model=args.tokenizer_model,
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
    )
    with contextlib.ExitStack() as silence:
        if int(os.environ["RANK"]):  # it generates the same
            nowhere = silence.enter_context(open(os.devnull, "w"))
            silence.enter_context(contextlib.redirect_stdout(nowhere))
            silence.enter_context(contextlib.redirect_stderr(nowhere))
        _generate(loaded, prompts, args)


def _check(args: argparse.Namespace) -> None:
    if not 0 <= args.temperature < float("inf"):
        raise DMCError(f"temperature must be 0 (greedy) or more; got {args.temperature}")
    if args.top_k < 0:
        raise DMCError(f"top_k must be 0 (all tokens) or more; got {args.top_k}")
    if not 0 <= args.top_p <= 1:
        raise DMCError(f"top_p must be between 0 (all tokens) and 1; got {args.top_p}")
    if args.top_k and args.top_p:
        raise DMCError(f"give either top_k or top_p; got {args.top_k} and {args.top_p}")
    for name in ("max_new_tokens", "batch_size"):
        if getattr(args, name) < 1:
            raise DMCError(f"{name} must be at least 1; got {getattr(args, name)}")


def _prompts(args: argparse.Namespace) -> list[str]:
    prompts = list(args.prompt)
    if args.prompt_file is not None:
        try:
            prompts += [line for line in args.prompt_file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise DMCError(f"cannot read prompts from {args.prompt_file}: {error}") from error
    if not prompts and args.prompt_file is None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise DMCError("torchrun gives its standard input to no rank: give --prompt or --prompt-file")
        text = sys.stdin.read()
        prompts = [text[:-1] if text.endswith("\n") else text]
    if not prompts or not all(prompts):
        raise DMCError("there is no prompt: give --prompt, --prompt-file or text on standard input")
    return prompts


def _generate(loaded, prompts: list[str], args: argparse.Namespace) -> None:
    """Print prompts with what follows, in their order: each as it grows, once those before it have ended."""
    import torch
    from megatron.core.inference.sampling_params import SamplingParams

    from megatron_dmc.cache import PagedCache
    from megatron_dmc.context import cache_shape
    from megatron_dmc.llm import LLM
    from megatron_dmc.openai_answers import AnswerText, Tokens
    from megatron_dmc.token_text import tokenize_prompt

    tokenizer = loaded.tokenizer
    tokens = [tokenize_prompt(tokenizer, prompt) for prompt in prompts]
    if not all(tokens):
        raise DMCError("the prompt has no tokens")
    lengths = [len(t) + args.max_new_tokens for t in tokens]
    requests = min(args.batch_size, len(prompts))
    gib = args.cache_gib
    if gib is None:
        shape = cache_shape(loaded.model, slots=requests, max_tokens=max(lengths), fp8=args.cache_fp8)
        longest = sorted((-(-length // shape.page_entries) for length in lengths), reverse=True)[:requests]
        pages = sum(longest) * shape.layers * shape.kv_heads  # enough if nothing merges
        gib = PagedCache.gib_of(shape, next(loaded.model.parameters()).dtype, pages)
        if loaded.device.type == "cuda":
            gib = min(gib, 0.9 * torch.cuda.mem_get_info()[0] / 2**30)
    llm = LLM(
        loaded, seed=args.seed, cache_gib=gib, cache_fp8=args.cache_fp8, max_requests=requests,
        max_sequence_length=max(lengths),
    )  # fmt: skip
    params = SamplingParams(
        temperature=args.temperature or 1.0, top_k=args.top_k if args.temperature else 1,
        top_p=args.top_p if args.temperature else 0.0, num_tokens_to_generate=args.max_new_tokens,
    )  # fmt: skip
    steps = llm.stream(tokens, params)
    found: list[deque[int]] = [deque() for _ in prompts]
    ended: set[int] = set()

    def follow(index: int) -> Iterator[int]:
        """The tokens of one prompt; those of others are kept for later."""
        while True:
            if found[index]:
                yield found[index].popleft()
            elif index in ended:
                return
            else:
                other, new, last = next(steps)
                found[other].extend(t for t in new if t != tokenizer.eod)
                ended.update({other} if last else ())

    for index, prompt in enumerate(prompts):
        print(prompt, end="", flush=True)
        text = AnswerText(tokenizer.detokenize)
        for token in follow(index):
            print(text.add(Tokens([token]))[0], end="", flush=True)
        print(text.end()[0], flush=True)
    _report(llm)


def _report(llm) -> None:
    """What the cache kept of all prompts, to standard error."""
    account, shape, dtype = llm.context.account, llm.context.cache.shape, llm.context.cache.dtype
    model = llm.loaded.model.config  # the whole of it, where ranks share it
    heads, tokens, n = model.num_layers * model.num_query_groups, round(account.ended_tokens), account.ended
    entry_bytes = round(account.ended_entries * heads) * shape.page_bytes(dtype) // shape.page_entries
    vanilla_bytes = tokens * heads * 2 * shape.channels * dtype.itemsize
    print(
        f"[{n} prompt{'s' * (n > 1)}, {tokens} tokens in; {account.ended_entries / n:.1f} entries kept per head and "
        f"prompt, ratio {account.ratio:.2f}; cache {entry_bytes:,} bytes instead of {vanilla_bytes:,}, open segments "
        f"{heads * shape.state_bytes(dtype):,} bytes a prompt]",
        file=sys.stderr,
        flush=True,
    )
