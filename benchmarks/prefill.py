"""Attention of whole prompts into the paged cache, beside plain causal attention and FlexAttention.

    python benchmarks/prefill.py [--out benchmarks/results/prefill-h100.json]

One run on one GPU measures everything; times are medians of CUDA graph replays. Tokens merge with probability
1 - 1/compression, each head's for itself.
- plain: rotation (the fastest of Transformer Engine's fused kernel and torch.compile) and cuDNN attention; nothing is
  written into a cache.
- dmc: a prompt as one chunk, from unrotated queries, keys and values on: decisions, merging, rotation, compaction into
  pages, attention. Nothing is committed, so that every call finds the cache as the first one did, but for the pages,
  which only the first one takes: one atomic operation and a few numbers of the block table for every head. `begin` and
  `commit` are beside it, as they take the host and the device together.
- flex: attention alone, over keys and values that are already merged and rotated, one for every token: a causal mask,
  and those keys hidden that the next token merges into, but from their own token. Every block of 128 keys holds visible
  ones, so none but the future's is skipped.

Up to 4096 tokens, some queries' outputs are compared with the reference's in float32.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.common import (
    attempt,
    circumstances,
    copy_bandwidth,
    milliseconds,
    projection,
    rotary_angles,
    save,
    table,
)
from benchmarks.training_attention import rotations
from megatron_dmc.cache import CacheShape, PagedCache
from megatron_dmc.ops import fused, reference
from megatron_dmc.ops.paged import paged_attention


class Shape(NamedTuple):
    tokens: int  # of a sequence
    sequences: int
    heads: int
    kv_heads: int
    channels: int
    window: int = 12


LENGTHS = (1024, 4096, 8192, 32768, 131072)
SHAPES = {
    f"{model}_{max(1, 4096 // tokens)}x{tokens}": Shape(tokens, max(1, 4096 // tokens), heads, kv_heads, 128)
    for model, heads, kv_heads, longest in (("llama2_7b", 32, 32, 32768), ("llama3_8b", 32, 8, 131072))
    for tokens in LENGTHS
    if tokens <= longest
}
COMPRESSIONS = (1, 2, 4, 8)
OFFSET = 5.0
BLOCK = 128  # tokens of FlexAttention's blocks
COMPARED_TOKENS, ROWS, TOLERANCE = 4096, 32, 0.02
SLOW_MS = 50.0
DEVICE = "cuda"


def timed(run: Callable[[], object]) -> float:
    """`milliseconds`, with few repetitions of what is slow."""
    run()
    torch.cuda.synchronize()
    begun = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return milliseconds(run, 5 if (time.perf_counter() - begun) * 1e3 > SLOW_MS else 30)


def plain(name: str, angle: Tensor, failures: dict[str, str]) -> dict:
    """Rotation by the fastest way, and causal attention.

    Raises:
        RuntimeError: if there is none that works.
    """
    shape = SHAPES[name]
    query, key, value = projection(shape[:2], *shape[2:5], 0.0, OFFSET, DEVICE)
    times = {}
    for way, rotate in rotations(angle).items():

        def run(rotate=rotate) -> Tensor:
            q, k, v = (x.permute(1, 2, 0, 3) for x in (rotate(query), rotate(key), value))
            with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
                return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shape.heads > shape.kv_heads)

        ms = attempt(f"{name}, plain, rotation by {way}", partial(timed, run), failures)
        if ms is not None:
            times[ms] = way
    if not times:
        raise RuntimeError("no rotation runs")
    ms = min(times)
    flops = 4 * shape.sequences * shape.heads * shape.tokens**2 * shape.channels / 2
    return dict(way="plain", rotation=times[ms], ms=ms, tflops=flops / ms / 1e9)


def compare(
    outputs: Tensor, inputs: tuple[Tensor, Tensor, Tensor], rotary: tuple[Tensor, Tensor], window: int
) -> float | None:
    """Relative error of some queries' `outputs` `[s, b, h, d]`, or `None` for prompts too long to compare.

    Raises:
        RuntimeError: if it is too large.
    """
    query, key, value = inputs
    tokens = len(query)
    if tokens > COMPARED_TOKENS:
        return None
    rows = torch.randperm(tokens, device=DEVICE)[:ROWS]
    alpha, _ = reference.decide(key, OFFSET, None)
    weight = reference.importance(query, key.shape[2], OFFSET)
    keys, values = reference.merge(key, value, weight, alpha, window)
    keys = reference.rotate_without_last(keys, rotary, False)
    queries = reference.rotate_without_last(query[rows], tuple(x[rows] for x in rotary), False)
    own, past = (op(torch.arange(tokens, device=DEVICE), rows[:, None]) for op in (torch.eq, torch.lt))
    seen = own | (past & surviving(alpha)[:, :, None])
    bias = torch.zeros(seen.shape, device=DEVICE).masked_fill(~seen, -math.inf)[:, :, None]
    expected = reference._attend(queries, keys, values, bias, None)
    error = ((outputs[rows].float() - expected).norm() / expected.norm()).item()
    if not error < TOLERANCE:
        raise RuntimeError(f"outputs differ from the reference's by {error:.2g}")
    return error


def surviving(alpha: Tensor) -> Tensor:
    """`[b, g, s]`: keys that later queries see, since the next token does not merge into them."""
    merges_next = torch.cat([alpha[1:], torch.zeros_like(alpha[:1])]) > 0
    return (~merges_next).permute(1, 2, 0).contiguous()


def dmc(shape: Shape, inputs: tuple[Tensor, Tensor, Tensor], rotary: tuple[Tensor, Tensor]) -> dict:
    """Whole prompts into a fresh cache; `inputs` are `[s, b, h|g, d]`."""
    tokens, sequences, heads, kv_heads, channels, window = shape
    cache_shape = CacheShape(1, sequences, heads, kv_heads, channels, tokens, window)
    pages = sequences * kv_heads * cache_shape.max_pages
    cache = PagedCache(cache_shape, pages, dtype=torch.bfloat16, device=DEVICE)
    packed = [x.transpose(0, 1).flatten(0, 1) for x in inputs]  # views: this is the projection's order, and the step's
    slots, chunk_lengths = torch.arange(sequences, device=DEVICE), [tokens] * sequences
    step = cache.begin(chunk_slots=slots, chunk_lengths=chunk_lengths)

    def run() -> Tensor:
        return paged_attention(*packed, rotary, cache, 0, step)[0]

    output = run()
    torch.cuda.synchronize()
    error = compare(output.unflatten(0, (sequences, tokens)).transpose(0, 1), inputs, rotary, window)
    ms = timed(run)
    if not step.ok:
        raise RuntimeError("the step was not ok")
    entries = int(step.lengths.sum())
    cache.commit(step)
    begin_commit_ms = []
    for _ in range(5):
        cache.release(slots)
        torch.cuda.synchronize()
        begun = time.perf_counter()
        cache.commit(cache.begin(chunk_slots=slots, chunk_lengths=chunk_lengths))
        torch.cuda.synchronize()
        begin_commit_ms.append((time.perf_counter() - begun) * 1e3)
    return dict(
        way="dmc", ms=ms, tokens_per_entry=tokens * sequences * kv_heads / entries, relative_error=error,
        begin_commit_ms=statistics.median(begin_commit_ms),
    )  # fmt: skip


class Flex:
    """FlexAttention over merged keys, compiled once for all decisions."""

    def __init__(self, shape: Shape) -> None:
        from torch.nn.attention.flex_attention import flex_attention

        self.shape = shape
        self.attention = torch.compile(flex_attention, dynamic=False)
        group = shape.heads // shape.kv_heads
        survives = torch.zeros(shape.sequences, shape.kv_heads, shape.tokens, dtype=torch.bool, device=DEVICE)

        def sees(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (i == j) | ((j < i) & survives[batch, head // group, j])

        self.survives, self.sees = survives, sees

    def blocks(self, all_survive: bool):
        """What `create_block_mask` finds, without a mask of all scores."""
        from torch.nn.attention.flex_attention import BlockMask

        n = -(-self.shape.tokens // BLOCK)
        whole = dict(dtype=torch.int32, device=DEVICE)
        row = torch.arange(n, **whole)
        counts, zeros = row.expand(1, 1, n).contiguous(), torch.zeros(1, 1, n, **whole)
        masked, full = (row.expand(1, 1, n, n).contiguous() for _ in range(2))  # one tensor for both compiles anew
        if all_survive:  # all blocks but the diagonal's are full
            masked[..., 0] = row
            blocks = zeros + 1, masked, counts, full
        else:
            blocks = counts + 1, masked, zeros, full
        return BlockMask.from_kv_blocks(
            *blocks, BLOCK_SIZE=BLOCK, mask_mod=self.sees, seq_lengths=(self.shape.tokens,) * 2
        )

    def measure(self, inputs: tuple[Tensor, Tensor, Tensor], rotary: tuple[Tensor, Tensor]) -> dict:
        scale = 1 / math.sqrt(self.shape.channels)
        query, key, value, _, alpha, _ = fused._kernels.prepare(
            *inputs, *rotary, None, None, 0, 0, self.shape.window, OFFSET, None, False, scale,
            fused.query_channel(torch.bfloat16, scale),
        )  # fmt: skip
        for x in (query, key):  # biases; the mask is in their place
            x[..., -1] = 0
        self.survives.copy_(surviving(alpha))
        mask = self.blocks(bool(self.survives.all()))
        q, k, v = (x.permute(1, 2, 0, 3).contiguous() for x in (query, key, value))

        def run() -> Tensor:
            return self.attention(q, k, v, block_mask=mask, enable_gqa=self.shape.heads > self.shape.kv_heads)

        error = compare(run().permute(2, 0, 1, 3), inputs, rotary, self.shape.window)
        return dict(way="flex", ms=timed(run), relative_error=error)


def prefill(name: str, shape: Shape, failures: dict[str, str]) -> tuple[list[dict], dict[str, dict[str, float]]]:
    """All ways and compressions of one shape, and their ratios."""
    torch._dynamo.reset()  # it gives up compiling after a few shapes
    angle = rotary_angles(shape.tokens, shape.channels, DEVICE)
    rotary = angle.cos(), angle.sin()
    rows, ratios = [], {}

    def measured(case: str, run: Callable[[], dict], **labels) -> float | None:
        row = attempt(f"{name}, {case}", run, failures)
        if row is None:
            return None
        rows.append(row | labels)
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
        return row["ms"]

    plain_ms = measured("plain", partial(plain, name, angle, failures))
    flex = attempt(f"{name}, flex", partial(Flex, shape), failures)
    for compression in COMPRESSIONS:
        made = projection((shape.sequences, shape.tokens), *shape[2:5], 1 - 1 / compression, OFFSET, DEVICE)
        inputs = tuple(x.transpose(0, 1) for x in made)
        case = f"compression {compression}"
        ours = measured(f"{case}, dmc", partial(dmc, shape, inputs, rotary), compression=compression)
        flex_ms = None
        if flex is not None:
            flex_ms = measured(f"{case}, flex", partial(flex.measure, inputs, rotary), compression=compression)
        ratio = ratios[str(compression)] = {}
        if ours and plain_ms:
            ratio["prefill_over_plain"] = ours / plain_ms
        if ours and flex_ms:
            ratio["flex_over_ours"] = flex_ms / ours
    return rows, ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="benchmarks/results/prefill.json")
    parser.add_argument("--shape", choices=SHAPES, action="append", help="only these (default: all)")
    parser.add_argument("--window", type=int, default=12, help="how many tokens back a merge reaches (12)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", help="to note where the checkout has no history")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    failures: dict[str, str] = {}
    result = dict(
        circumstances(args.commit), seed=args.seed, window=args.window, copy_tb_per_s=copy_bandwidth() / 1e12,
        shapes={}, ratios={}, failures=failures,
    )  # fmt: skip
    print({k: v for k, v in result.items() if k not in ("shapes", "ratios", "failures")})
    text = []
    for name in args.shape or SHAPES:
        print(f"== {name}", flush=True)
        shape = SHAPES[name]._replace(window=args.window)
        found = attempt(name, partial(prefill, name, shape, failures), failures)
        torch.cuda.empty_cache()
        if found is None:
            continue
        rows, ratios = found
        result["shapes"][name] = dict(shape=shape._asdict(), ways=rows)
        result["ratios"][name] = ratios
        columns = ["way", "compression", "ms", "tflops", "tokens_per_entry", "relative_error", "begin_commit_ms"]
        text += [f"\n{name}", table(rows, columns), ""]
        text += [
            table(
                [dict(compression=c, **r) for c, r in ratios.items()],
                ["compression", "prefill_over_plain", "flex_over_ours"],
            )
        ]
        save(result, args.out)
    print("\n".join(text))
    for case, reason in failures.items():
        print(f"failed: {case}: {reason}")
    save(result, args.out)


if __name__ == "__main__":
    with torch.no_grad():
        main()
