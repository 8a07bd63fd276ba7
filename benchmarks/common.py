"""What every benchmark here shares: timing on the device, and result files that say where their numbers come from."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def milliseconds(run: Callable[[], object], repeats: int = 30) -> float:
    """Median time of one call on the device, from replays of a CUDA graph, so that launching costs nothing.

    The graph holds several calls where one is short. Inputs should be larger than the L2 cache.
    """
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
        gpu=torch.cuda.get_device_name(),
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
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {path}")


def table(rows: list[dict], columns: list[str]) -> str:
    """Rows as Markdown; numbers with three significant digits."""

    def cell(x) -> str:
        return f"{x:.3g}" if isinstance(x, float) and abs(x) < 1000 else f"{x:.0f}" if isinstance(x, float) else str(x)

    lines = [columns, ["---"] * len(columns), *([cell(row.get(c, "")) for c in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
