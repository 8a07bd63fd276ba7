"""`megatron-dmc generate`: continue prompts with a retrofitted model, from its compressed cache."""

from __future__ import annotations

import argparse
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
    parser.add_argument("--tokenizer-model", help="where the tokenizer is now, if it has moved since training")
    args = parser.parse_args()

    from megatron_dmc.generation import Sampling

    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    prompts = _prompts(args)
    emulate_cuda()
    from megatron_dmc.checkpoint import load

    loaded = load(args.checkpoint, tokenizer_model=args.tokenizer_model)
    options = dict(slots=args.batch_size, cache_gib=args.cache_gib, fp8=args.cache_fp8)
    _generate(loaded, prompts, args.max_new_tokens, sampling, **options)


def _prompts(args: argparse.Namespace) -> list[str]:
    prompts = list(args.prompt)
    if args.prompt_file is not None:
        try:
            prompts += [line for line in args.prompt_file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise DMCError(f"cannot read prompts from {args.prompt_file}: {error}") from error
    if not prompts and args.prompt_file is None:
        text = sys.stdin.read()
        prompts = [text[:-1] if text.endswith("\n") else text]
    if not prompts or not all(prompts):
        raise DMCError("there is no prompt: give --prompt, --prompt-file or text on standard input")
    return prompts


def _generate(loaded, prompts: list[str], max_new_tokens: int, sampling, **options) -> None:
    """Print prompts with what follows, in their order: each as it grows, once those before it have ended."""
    from megatron_dmc.generation import Generation

    tokens = [loaded.tokenizer.tokenize(prompt) for prompt in prompts]
    generation = Generation(loaded, tokens, max_new_tokens, sampling, **options)
    found: list[deque[int]] = [deque() for _ in prompts]
    events = iter(generation)

    def follow(index: int) -> Iterator[int]:
        """The tokens of one prompt; those of others are kept for later."""
        while True:
            if found[index]:
                yield found[index].popleft()
            elif index in generation.ended or (event := next(events, None)) is None:
                return
            else:
                found[event[0]].append(event[1])

    for index, prompt in enumerate(prompts):
        print(prompt, end="", flush=True)
        for piece in _text(follow(index), loaded.tokenizer):
            print(piece, end="", flush=True)
        print(flush=True)
    report = generation.report
    print(
        f"[{report.sequences} prompt{'s' * (report.sequences > 1)}, {report.tokens} tokens in; "
        f"{report.entries / report.heads / report.sequences:.1f} entries kept per head and prompt, "
        f"ratio {report.ratio:.2f}; "
        f"cache {report.entry_bytes:,} bytes instead of {report.vanilla_bytes:,}, "
        f"open segments {report.state_bytes:,} bytes a prompt]",
        file=sys.stderr,
        flush=True,
    )


def _text(tokens: Iterator[int], tokenizer) -> Iterator[str]:
    """The text of the tokens as it becomes certain: a character of several bytes waits for its last one."""
    so_far: list[int] = []
    printed = ""
    for token in tokens:
        so_far.append(token)
        text = tokenizer.detokenize(so_far)
        if not text.endswith("\ufffd") and text.startswith(printed):
            yield text[len(printed) :]
            printed = text
    rest = tokenizer.detokenize(so_far) if so_far else ""
    yield rest[len(printed) :]
