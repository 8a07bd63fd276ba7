"""The README's pictures, from benchmarks/results: `python benchmarks/plots.py` writes docs/serving.png, quality.png."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.quality import error_of, over  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
NAMES = {"llama2_7b_4096": "Llama-2-7B, 4,096 tokens", "llama3_8b_32768": "Llama-3-8B, 32,768 tokens"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--throughput", default=RESULTS / "throughput-h100.json")
    parser.add_argument("--serving", default=RESULTS / "serving-h100.json")
    parser.add_argument("--quality", default=RESULTS / "quality.json", help="left out where it does not exist")
    parser.add_argument("--folder", type=Path, default=ROOT / "docs", help="where the pictures go (default: docs)")
    args = parser.parse_args()
    throughput, serving = (json.loads(Path(path).read_text()) for path in (args.throughput, args.serving))

    import matplotlib

    matplotlib.use("Agg")
    draw_serving(throughput, serving, args.folder / "serving.png")
    if Path(args.quality).exists():
        draw_quality(json.loads(Path(args.quality).read_text()), args.folder / "quality.png")


LABELS = {"dmc": "DMC", "distilled": "DMC with a teacher", "gqa": "GQA, up-trained"}


def draw_quality(found: dict, path: Path) -> None:
    """What compression costs by `benchmarks/quality.py`: loss and recall by ratio, and loss by position at 4x."""
    from matplotlib import pyplot as plt

    results = found["results"]
    lowest, colors = 0.0, {}
    kinds: dict[str, list[str]] = {}  # methods, and the names of their results
    for name in sorted(results, key=lambda name: results[name].get("ratio", 0)):  # none where the base is not measured
        kind, _, ratio = name.rpartition("-")
        if ratio.endswith("x") and not kind.endswith("-base") and over(found, name, "continuation_loss") is not None:
            kinds.setdefault(kind.removesuffix("-control"), []).append(name)
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    for kind, names in kinds.items():
        ours = kind in ("dmc", "distilled")
        style = dict(
            marker="o", lw=2.2 if ours else 1.2, ls="-" if ours or kind == "gqa" else "--", label=LABELS.get(kind, kind)
        )
        ratios = [results[name]["ratio"] for name in names]
        costs = [100 * over(found, name, "continuation_loss") for name in names]
        errors = [100 * error_of(found, name, "continuation_loss") for name in names]
        lowest = min(lowest, *costs)
        line, *_ = left.errorbar(ratios, costs, yerr=errors, **style)
        colors[kind] = line.get_color()
        right.plot(ratios, [100 * results[name]["recall"] for name in names], **style)
        for name in (f"{name}-seed2" for name in names if f"{name}-seed2" in results):
            point = dict(marker="x", color=colors[kind], ls="none")
            if (cost := over(found, name, "continuation_loss")) is not None:
                left.plot(results[name]["ratio"], 100 * cost, **point)
            right.plot(results[name]["ratio"], 100 * results[name]["recall"], **point)
    left.axhline(0, color="black", lw=0.8)
    left.set(
        xlabel="cache compression",
        ylabel="loss over the control's, %",
        title="continuations of contexts (crosses: second seed)",
    )
    left.set_yscale("symlog", linthresh=1)
    left.set_ylim(bottom=lowest - 0.1)
    if "control" in results:
        right.axhline(100 * results["control"]["recall"], color="black", lw=0.8)
    right.set(xlabel="cache compression", ylabel="answers recalled, %", title="recall (line: the control)")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks([2, 4, 8], ["2×", "4×", "8×"])
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=len(kinds) or 1, fontsize=8)
    control = results.get("control", {}).get("loss_by_position", {})
    for kind, color in colors.items():
        if (losses := results.get(f"{kind}-4x", {}).get("loss_by_position")) and control:
            costs = [100 * (loss / control[position] - 1) for position, loss in losses.items()]
            middle.plot([int(position) for position in losses], costs, color=color, label=LABELS[kind])
    middle.axhline(0, color="black", lw=0.8)
    middle.set(
        xlabel="position in the window", ylabel="loss over the control's, %", title="windows of held-out text, 4×"
    )
    middle.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"written to {path}")


def draw_serving(throughput: dict, serving: dict, path: Path) -> None:
    """Throughput and requests per second held, by compression."""
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
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
