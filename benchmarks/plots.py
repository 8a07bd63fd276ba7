"""The README's picture of serving, from benchmarks/results: `python benchmarks/plots.py` writes docs/serving.png."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
NAMES = {"llama2_7b_4096": "Llama-2-7B, 4,096 tokens", "llama3_8b_32768": "Llama-3-8B, 32,768 tokens"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--throughput", default=RESULTS / "throughput-h100.json")
    parser.add_argument("--serving", default=RESULTS / "serving-h100.json")
    parser.add_argument("--out", default=ROOT / "docs" / "serving.png")
    args = parser.parse_args()
    throughput, serving = (json.loads(Path(path).read_text()) for path in (args.throughput, args.serving))

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    for place, (name, shape) in enumerate(throughput["shapes"].items()):
        rows = [row for row in shape["ways"] if row["label"] == "most"]
        bars = left.bar(
            [at + 0.4 * place for at in range(len(rows))], [row["tokens_per_s"] for row in rows], 0.38,
            label=NAMES.get(name, name),
        )  # fmt: skip
        left.bar_label(bars, [f"{row['requests']}" for row in rows], fontsize=8)
    ticks = ["vanilla" if row["compression"] == 1 else f"{row['compression']}×" for row in rows]
    left.set_xticks([at + 0.2 for at in range(len(ticks))], ticks)
    left.set(ylabel="tokens per second", title="as many requests (numbers) as fit in the same memory")
    left.legend()
    (shape,) = serving["shapes"].values()
    for compression, way in shape["ways"].items():
        points = sorted((p for p in way["points"] if not p["unfinished"]), key=lambda point: point["rate"])
        name = "vanilla" if compression == "1" else f"DMC {compression}×"
        for share, style in (("p95", "o-"), ("p50", "o:")):
            right.plot(
                [point["rate"] for point in points], [point[f"latency_{share}_ms"] for point in points], style,
                color="C7" if compression == "1" else "C2", label=f"{name}, {share}",
            )  # fmt: skip
    right.set(
        xlabel="requests per second", ylabel="milliseconds per token, waiting included", xlim=(0, None), ylim=(0, None)
    )
    right.set_title(f"HTTP server, Llama-2-7B, {shape['shape']['cache_gib']:.0f} GiB of cache")
    right.legend()
    figure.savefig(args.out, dpi=120)
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
