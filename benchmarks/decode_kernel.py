"""Decoding from the paged cache: a layer's fused step, beside FlashInfer with heads as requests.

    python benchmarks/decode_kernel.py [--out benchmarks/results/decode-kernel-h100.json]

One run on one GPU measures everything. Caches are filled with random numbers, pages in random order; the heads' lengths
spread evenly over 0.25 to 1.75 times their mean, tokens over compression (at compression 1 a sequence's heads are
equally long, and sequences differ). New tokens merge with probability 1 - 1/compression. Times are medians of CUDA
graph replays; outputs for two sequences of each cache are first compared with the reference's. Bandwidths are bytes of
the entries that attention reads, over time, over copy bandwidth.
- dmc, dmc fp8: a layer's step without `begin` and `commit`: decisions, merging, rotation, writing, attention. Entries
  of 8 bits count with their scales.
- flashinfer: attention alone, over as many entries; every sequence's KV head is a request, in pages of 16. What it
  plans on the host, for each layer and step, is beside it (plan_ms), not in it.
- one sequence, at compression 8: so many layers in turn that their entries do not fit into the L2 cache.
- step: `begin`, 32 layers and `commit` of 256 sequences in one CUDA graph: what a replay takes the host to launch and
  the device to run, and `begin` and `commit` alone; and launched from Python, where waiting for the device is an error.
- cache_bytes_over_vanilla: all tensors of a cache at 4096 tokens a sequence (pages with what is unused of them, tables,
  open segments, the free list) over the keys and values of all tokens in 16 bits.
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.common import (
    attempt,
    circumstances,
    copy_bandwidth,
    decisions,
    fill_cache,
    milliseconds,
    projection,
    rotary_angles,
    save,
    table,
)
from megatron_dmc.cache import CacheShape, PagedCache
from megatron_dmc.ops.paged import paged_attention


class Shape(NamedTuple):
    sequences: int
    tokens: int  # of a sequence, on average
    heads: int
    kv_heads: int
    channels: int
    layers: int
    window: int = 12


SHAPES = {
    "llama2_7b_32x4096": Shape(32, 4096, 32, 32, 128, 32),
    "llama3_8b_64x8192": Shape(64, 8192, 32, 8, 128, 32),
}
COMPRESSIONS = (1, 2, 4, 8)
SINGLE = {f"llama3_8b_1x{tokens}": Shape(1, tokens, 32, 8, 128, 32) for tokens in (2**13, 2**15, 2**17, 2**19, 2**20)}
STEP = Shape(256, 512, 32, 8, 128, 32)
ACCOUNTED_TOKENS = 4096
OFFSET = 5.0
ROOM = 256  # steps that a cache has pages and positions for
ROTATED_BYTES = 2**28  # of entries in all layers together; larger than any L2 cache
TOLERANCE = 0.02
DEVICE = "cuda"


def spread(mean: float, *shape: int) -> Tensor:
    """Lengths spread evenly over 0.25 to 1.75 times `mean`, in random order."""
    n = math.prod(shape)
    return (torch.linspace(0.25, 1.75, n)[torch.randperm(n)] * mean).round().long().clamp(min=1).view(shape)


def lengths(shape: Shape, compression: int, layers: int = 1) -> tuple[Tensor, Tensor]:
    """Entries `[layers, sequences, kv_heads]` and tokens `[sequences]`."""
    if compression == 1:
        tokens = spread(shape.tokens, shape.sequences)
        return tokens[:, None].expand(layers, -1, shape.kv_heads).contiguous(), tokens
    entries = spread(shape.tokens / compression, layers, shape.sequences, shape.kv_heads)
    return entries, torch.full((shape.sequences,), shape.tokens)


def filled_cache(
    shape: Shape, entries: Tensor, tokens: Tensor, merging: float, *, fp8: bool = False, room: int = ROOM
) -> PagedCache:
    """A cache of random numbers, of sequences of so many `tokens` and `entries`, with pages for `room` steps more."""
    layers, sequences, kv_heads = entries.shape
    cache_shape = CacheShape(
        layers, sequences, shape.heads, kv_heads, shape.channels, int(tokens.max()) + room, shape.window, fp8
    )
    size = cache_shape.page_entries
    held = (-(-entries // size)).flatten()
    spare = held.numel() * -(-room // size)
    cache = PagedCache(cache_shape, int(held.sum()) + spare, dtype=torch.bfloat16, device=DEVICE)

    fill_cache(cache, entries, tokens)
    cache.recent.normal_()
    cache.recent[..., 0, -1] = decisions(cache.recent_weights.shape, merging, OFFSET, DEVICE).bfloat16()
    cache.recent_weights.uniform_(0.5, 1.0)
    torch.cuda.synchronize()  # what times kernels does so on a stream of its own
    return cache


def rotary_tables(cache: PagedCache) -> tuple[Tensor, Tensor]:
    angle = rotary_angles(cache.shape.max_tokens, cache.shape.channels, DEVICE)
    return angle.cos(), angle.sin()


def check(cache: PagedCache, shape: Shape, rotary: tuple[Tensor, Tensor], merging: float) -> float:
    """Relative error of the kernel's outputs for two sequences.

    Raises:
        RuntimeError: if it is too large.
    """
    step = cache.begin(torch.arange(min(2, shape.sequences), device=DEVICE))
    inputs = projection((step.tokens,), shape.heads, shape.kv_heads, shape.channels, merging, OFFSET, DEVICE)
    found, expected = (
        paged_attention(*inputs, rotary, cache, 0, step, kernel=kernel)[0].float() for kernel in ("fused", "reference")
    )
    error = ((found - expected).norm() / expected.norm()).item()
    if not (step.ok and error < TOLERANCE):
        raise RuntimeError(f"outputs differ from the reference's by {error:.2g}")
    return error


def rates(size: float, ms: float, bandwidth: float) -> dict[str, float]:
    """`size` bytes in `ms`. A time that no memory allows is that of a graph which does not hold the kernel."""
    if size > 2**27 and size / ms * 1e3 > 1.5 * bandwidth:
        raise RuntimeError(f"{size / 2**20:.0f} MiB in {ms:.3g} ms cannot be")
    return dict(kv_mib=size / 2**20, ms=ms, tb_per_s=size / ms / 1e9, bandwidth=size / ms * 1e3 / bandwidth)


def entry_bytes(shape: Shape, fp8: bool = False) -> int:
    return 2 * (shape.channels + 4 if fp8 else 2 * shape.channels)


def ours(
    shape: Shape, compression: int, bandwidth: float, entries: Tensor, tokens: Tensor, *, fp8: bool = False
) -> dict[str, float]:
    """All layers of `entries`, one after the other; times and bytes of one."""
    merging, layers = 1 - 1 / compression, len(entries)
    cache = filled_cache(shape, entries, tokens, merging, fp8=fp8)
    rotary = rotary_tables(cache)
    error = check(cache, shape, rotary, merging)
    inputs = projection((shape.sequences,), shape.heads, shape.kv_heads, shape.channels, merging, OFFSET, DEVICE)
    slots = torch.arange(shape.sequences, device=DEVICE)
    step = cache.begin(slots)

    def run() -> None:
        for layer in range(layers):
            paged_attention(*inputs, rotary, cache, layer, step)

    run()
    torch.cuda.synchronize()
    # An entry that the new token merges into is written and not read.
    merges = inputs[1][..., -1] > OFFSET
    if not (step.ok and (step.lengths.cpu() == entries + (~merges).cpu()).all()):
        raise RuntimeError("the step was not ok")
    read = (int(entries.sum()) - int(merges.sum()) * layers) / layers
    ms = milliseconds(run) / layers
    begin_commit_ms = milliseconds(lambda: cache.commit(cache.begin(slots)))
    return dict(
        layers=layers, **rates(read * entry_bytes(shape, fp8), ms, bandwidth), relative_error=error,
        begin_commit_ms=begin_commit_ms,
    )  # fmt: skip


def flashinfer_version() -> str:
    import flashinfer

    flashinfer.BatchDecodeWithPagedKVCacheWrapper  # noqa: B018
    return getattr(flashinfer, "__version__", "unknown")


def flashinfer(shape: Shape, bandwidth: float, entries: Tensor) -> dict[str, float]:
    """Attention over one layer's `entries`, a request for every head."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    page, group = 16, shape.heads // shape.kv_heads
    held = entries.flatten().int()
    pages = -(-held // page)
    starts = torch.nn.functional.pad(pages.cumsum(0), (1, 0)).int()
    indices = torch.randperm(int(starts[-1])).int()
    kv = torch.randn(len(indices), 2, page, 1, shape.channels, device=DEVICE, dtype=torch.bfloat16)
    query = torch.randn(len(held), group, shape.channels, device=DEVICE, dtype=torch.bfloat16)
    workspace = torch.zeros(256 << 20, dtype=torch.uint8, device=DEVICE)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=group > 1)
    plan_ms = []
    for _ in range(6):  # the first one compiles
        begun = time.perf_counter()
        wrapper.plan(
            starts, indices, (held - 1) % page + 1, group, 1, shape.channels, page, q_data_type=torch.bfloat16,
            kv_data_type=torch.bfloat16,
        )  # fmt: skip
        torch.cuda.synchronize()
        plan_ms.append((time.perf_counter() - begun) * 1e3)
    output = wrapper.run(query, kv)
    torch.cuda.synchronize()
    key, value = kv[indices[: pages[0]].long().to(DEVICE)].float().transpose(0, 1).flatten(1, 3)[:, : held[0]]
    expected = torch.softmax(query[0].float() @ key.T / math.sqrt(shape.channels), -1) @ value
    error = ((output[0].float() - expected).norm() / expected.norm()).item()
    if not error < TOLERANCE:
        raise RuntimeError(f"the first request's output is off by {error:.2g}")
    read = int(held.sum()) * entry_bytes(shape)

    def run() -> None:
        wrapper.run(query, kv)

    try:
        times = rates(read, milliseconds(run), bandwidth) | dict(in_graph=True)
    except RuntimeError as failure:
        print(f"flashinfer cannot be measured in a CUDA graph: {failure}"[:300])
        times = rates(read, in_a_row(run), bandwidth) | dict(in_graph=False)
    return dict(layers=1, **times, relative_error=error, plan_ms=statistics.median(plan_ms[1:]))


def in_a_row(run: Callable[[], object], calls: int = 50) -> float:
    """Milliseconds of one of many calls, launched one after the other."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        run()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / calls


def whole_step(shape: Shape, bandwidth: float, failures: dict[str, str]) -> dict[str, float]:
    """All layers of a step of many short sequences: what the host and the device take for it."""
    compression = 8
    merging = 1 - 1 / compression
    cache = filled_cache(shape, *lengths(shape, compression, shape.layers), merging)
    rotary = rotary_tables(cache)
    inputs = projection((shape.sequences,), shape.heads, shape.kv_heads, shape.channels, merging, OFFSET, DEVICE)
    slots = torch.arange(shape.sequences, device=DEVICE)

    def begin_and_commit() -> None:
        cache.commit(cache.begin(slots))

    def run() -> None:
        step = cache.begin(slots)
        for layer in range(shape.layers):
            paged_attention(*inputs, rotary, cache, layer, step)
        cache.commit(step)

    def without_waiting() -> bool:
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return True

    def launching(launch: Callable[[], object], times: int) -> tuple[float, float]:
        """Milliseconds on the host until `launch` returns, and on the device until all is done."""
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        host, device = [], []
        for _ in range(times):
            torch.cuda.synchronize()
            start.record()
            begun = time.perf_counter()
            launch()
            host.append((time.perf_counter() - begun) * 1e3)
            stop.record()
            torch.cuda.synchronize()
            device.append(start.elapsed_time(stop))
        return statistics.median(host), statistics.median(device)

    def entries() -> int:
        return int(cache.lengths[:, : shape.sequences].sum())

    run()
    torch.cuda.synchronize()
    waits_for_nothing = attempt("step without waiting for the device", without_waiting, failures) is not None
    python_ms, _ = launching(run, 5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    before = entries()
    replay_host_ms, replay_ms = launching(graph.replay, 30)
    size = (before + entries()) / 2 * entry_bytes(shape)  # heads that append grow by an entry with every replay
    begin_commit_ms = milliseconds(begin_and_commit)
    if cache.dry:
        raise RuntimeError("the pool ran dry")
    row = dict(
        sequences=shape.sequences, tokens=shape.tokens, layers=shape.layers, compression=compression,
        waits_for_nothing=waits_for_nothing, launch_us=replay_host_ms * 1e3, python_ms=python_ms,
        begin_commit_ms=begin_commit_ms, **rates(size, replay_ms, bandwidth),
    )  # fmt: skip
    print("step", row, flush=True)
    return row


def account(shape: Shape, compression: int) -> dict[str, float]:
    """All bytes of a cache of `ACCOUNTED_TOKENS` tokens in every slot; one layer is allocated, and stands for all."""
    tokens = torch.full((shape.sequences,), ACCOUNTED_TOKENS)
    at = shape._replace(tokens=ACCOUNTED_TOKENS)
    if compression == 1:
        entries = tokens[:, None].expand(1, -1, shape.kv_heads).contiguous()
    else:
        entries, _ = lengths(at, compression)
    cache = filled_cache(at, entries, tokens, 1 - 1 / compression, room=0)
    allocated = {name: x.nbytes for name, x in vars(cache).items() if isinstance(x, Tensor)}
    counts = sum(allocated[name] for name in ("tokens", "dry", "_free_count"))  # for all layers together
    found = cache.statistics()
    free_list = 4 * (len(cache.pages) + 1)
    if sum(allocated.values()) != found.page_bytes + found.fixed_bytes + free_list + counts:
        raise RuntimeError(
            f"the cache says it takes {found.page_bytes} + {found.fixed_bytes} bytes, beside {free_list} of the free "
            f"list and {counts} of counts; its tensors take {allocated}"
        )
    layers, vanilla = shape.layers, shape.sequences * ACCOUNTED_TOKENS * shape.kv_heads * entry_bytes(shape)
    total = layers * (found.page_bytes + found.fixed_bytes + free_list) + counts
    row = dict(
        compression=compression, cache_bytes_over_vanilla=total / (layers * vanilla), at_most=1.1 / compression,
        pages_over_vanilla=found.page_bytes / vanilla, fixed_over_vanilla=found.fixed_bytes / vanilla,
        free_list_over_vanilla=free_list / vanilla, unused_of_pages=found.fragmentation,
    )  # fmt: skip
    print({k: round(v, 5) for k, v in row.items()}, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="benchmarks/results/decode-kernel.json")
    parser.add_argument(
        "--shape", choices=[*SHAPES, *SINGLE, "step"], action="append", help="only these (default: all)"
    )
    parser.add_argument("--window", type=int, default=12, help="how many tokens back a merge reaches (12)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", help="to note where the checkout has no history")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    bandwidth = copy_bandwidth()
    failures: dict[str, str] = {}
    result = dict(
        circumstances(args.commit), seed=args.seed, window=args.window, copy_tb_per_s=bandwidth / 1e12, shapes={},
        step=None, ratios={}, flashinfer=attempt("flashinfer", flashinfer_version, failures), failures=failures,
    )  # fmt: skip
    print({k: v for k, v in result.items() if k not in ("shapes", "step", "ratios", "failures")})
    columns = ["way", "compression", "layers", "kv_mib", "ms", "tb_per_s", "bandwidth", "plan_ms", "relative_error"]
    text = []
    for name in args.shape or [*SHAPES, *SINGLE, "step"]:
        print(f"== {name}", flush=True)
        if name == "step":
            result["step"] = attempt(
                name, partial(whole_step, STEP._replace(window=args.window), bandwidth, failures), failures
            )
            if result["step"]:
                text += ["\nstep", table([result["step"]], list(result["step"]))]
            continue
        shape = (SHAPES | SINGLE)[name]._replace(window=args.window)
        rows, accounts, ratios = [], [], {}
        for compression in COMPRESSIONS if name in SHAPES else (8,):
            layers = 1
            if name in SINGLE:
                layers = math.ceil(ROTATED_BYTES / (shape.tokens / compression * shape.kv_heads * entry_bytes(shape)))
            entries, tokens = lengths(shape, compression, layers)
            ways = {"dmc": partial(ours, shape, compression, bandwidth, entries, tokens)}
            if name in SHAPES:
                ways["dmc fp8"] = partial(ours, shape, compression, bandwidth, entries, tokens, fp8=True)
                if result["flashinfer"]:
                    ways["flashinfer"] = partial(flashinfer, shape, bandwidth, entries)
            found = {}
            for way, run in ways.items():
                row = attempt(f"{name}, compression {compression}, {way}", run, failures)
                if row is not None:
                    rows.append(dict(way=way, compression=compression, **row))
                    found[way] = row["bandwidth"]
                    print(way, compression, {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
            keys = {"dmc": "decode_bandwidth", "dmc fp8": "decode_bandwidth_fp8", "flashinfer": "flashinfer_bandwidth"}
            ratios[str(compression)] = {keys[way]: value for way, value in found.items()}
            if name in SHAPES:
                counted = attempt(
                    f"{name}, compression {compression}, bytes", partial(account, shape, compression), failures
                )
                if counted is not None:
                    accounts.append(counted)
                    ratios[str(compression)]["cache_bytes_over_vanilla"] = counted["cache_bytes_over_vanilla"]
        result["shapes"][name] = dict(shape=shape._asdict(), ways=rows, accounts=accounts)
        result["ratios"][name] = ratios
        text += [f"\n{name}", table(rows, columns)]
        if accounts:
            text += ["", table(accounts, list(accounts[0]))]
        save(result, args.out)
    print("\n".join(text))
    for case, reason in failures.items():
        print(f"failed: {case}: {reason}")
    save(result, args.out)


if __name__ == "__main__":
    with torch.no_grad():
        main()
