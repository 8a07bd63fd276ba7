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
    ways = shape["ways"]
    held = [way["held"] for way in ways.values()]
    bars = right.bar(
        ["vanilla" if compression == "1" else f"DMC {compression}×" for compression in ways], held, 0.5, color="C2",
        yerr=[[0] * len(held), [(way["not_held"] or way["held"]) - way["held"] for way in ways.values()]], capsize=6,
    )  # fmt: skip
    right.bar_label(bars, [f"{rate:.2f}" for rate in held], label_type="center")
    latency = serving["load"]["latency_ms"]
    right.set(ylabel="requests per second, held and not held")
    right.set_title(f"HTTP server, 95% within {latency:.0f} ms per token")
    figure.savefig(args.out, dpi=120)
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
