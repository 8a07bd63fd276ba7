"""What every benchmark here shares: timing on the device, and result files that say where their numbers come from."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from megatron_dmc.cache import PagedCache

ROOT = Path(__file__).resolve().parent.parent


def milliseconds(run: Callable[[], object], repeats: int = 30) -> float:
    """Median time of one call on the device, from replays of a CUDA graph, so that launching costs nothing.

    The graph holds several calls where one is short. Inputs should be larger than the L2 cache.
    """
    torch.cuda.synchronize()  # inputs may still be in the making
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    torch.cuda.synchronize()
    calls = 1 if start.elapsed_time(stop) > 2 else 4
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    graph.replay()
    times = []
    for _ in range(repeats):
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / calls)
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a device-to-device copy of 4 GiB; launched one by one, since a copy
    inside a CUDA graph is slower."""
    source = torch.randint(0, 255, (1 << 32,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(25):
        start.record()
        target.copy_(source)
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return 2 * source.nbytes / statistics.median(times[5:]) * 1e3


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def circumstances(commit: str | None = None) -> dict:
    """GPU, driver, versions, commit and command of this run; `commit` where the checkout has no history."""
    import importlib.metadata

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    return dict(
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        driver=_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
        torch=torch.__version__,
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),
        transformer_engine=version("transformer-engine"),
        megatron_core=version("megatron-core"),
        commit=commit or _output("git", "rev-parse", "--short", "HEAD"),
        command=" ".join(["python", *sys.argv]),
    )


def save(result: dict, path: str | Path) -> None:
    """As JSON, lists of numbers in a line each."""
    path, text = Path(path), json.dumps(result, indent=1)
    text = re.sub(r"\[\n[^][{}\"]*\]", lambda numbers: " ".join(numbers[0].split()), text)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(text + "\n")
    partial.rename(path)
    print(f"written to {path}")


def table(rows: list[dict], columns: list[str]) -> str:
    """Rows as Markdown; numbers with three significant digits."""

    def cell(x) -> str:
        return f"{x:.3g}" if isinstance(x, float) and abs(x) < 1000 else f"{x:.0f}" if isinstance(x, float) else str(x)

    lines = [columns, ["---"] * len(columns), *([cell(row.get(c, "")) for c in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def attempt[T](case: str, run: Callable[[], T], failures: dict[str, str]) -> T | None:
    """What `run` returns; or `None`, with the reason noted, so that what fails does not hide the rest."""
    try:
        return run()
    except Exception as error:
        failures[case] = f"{type(error).__name__}: {error}"[:500]
        print(f"{case} failed: {failures[case]}", flush=True)
        return None


def decisions(shape: Sequence[int], merging: float, offset: float, device: str) -> torch.Tensor:
    """Last channels of keys, of which a share `merging` decides to merge."""
    return offset + 2.0 * (torch.rand(*shape, device=device) < merging) - 1.0


def projection(
    tokens: Sequence[int], heads: int, kv_heads: int, channels: int, merging: float, offset: float, device: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values `[*tokens, h|g, d]` in bfloat16, as the layer makes them of one fused projection."""
    group = heads // kv_heads
    qkv = torch.randn(*tokens, kv_heads, group + 2, channels, device=device, dtype=torch.bfloat16)
    qkv[..., group, -1] = decisions((*tokens, kv_heads), merging, offset, device).bfloat16()
    query = qkv[..., :group, :].flatten(-3, -2) if group > 1 else qkv[..., 0, :]
    return query, qkv[..., group, :], qkv[..., group + 1, :]


def rotary_angles(tokens: int, channels: int, device: str) -> torch.Tensor:
    """`[tokens, channels / 2]`, by position."""
    frequencies = 500000.0 ** (-torch.arange(0, channels, 2, device=device) / channels)
    return torch.arange(tokens, device=device)[:, None] * frequencies


def fill_cache(cache: PagedCache, entries: torch.Tensor, tokens: torch.Tensor) -> None:
    """Random numbers in the first slots, of sequences of so many `entries` `[layers, b, kv_heads]` and `tokens` `[b]`.

    Pages lie in random order; those that the entries leave are free.

    Raises:
        RuntimeError: if there are too few.
    """
    sequences, device = entries.shape[1], cache.pages.device
    held = (-(-entries // cache.shape.page_entries)).flatten()
    pages = torch.randperm(len(cache.pages)).int()
    spare = len(pages) - int(held.sum())
    if spare < 0:
        raise RuntimeError(f"{int(held.sum())} pages to fill, and the cache has {len(pages)}")
    in_use = torch.arange(cache.shape.max_pages) < held[:, None]
    rows = torch.full(in_use.shape, -1, dtype=torch.int32)
    rows[in_use] = pages[spare:]
    cache.table[:, :sequences] = rows.view(*entries.shape, -1).to(device)
    cache.lengths[:, :sequences] = entries.int().to(device)
    cache.tokens[:sequences] = tokens.to(device)
    cache._free[:spare] = pages[:spare].to(device)
    cache._free_count.fill_(spare)
    for part in cache.pages.split(1 << 14):
        part.copy_(torch.randn(part.shape, device=device, dtype=torch.bfloat16))
    if cache.scales is not None:
        cache.scales.uniform_(0.5, 1.5)
