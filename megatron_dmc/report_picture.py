"""`report.png`: which heads compress how much, how long segments are, and what closes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

BARS = 16
"""Characters shown at most, the most frequent ones."""


def draw(report: dict, path: Path) -> None:
    """Picture of what report.json holds, as PNG: ratios over layers and heads, the distribution of segment lengths, and
    how often tokens close a segment, by their last character, where that is known."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    closings = report["closings"]
    panels = 3 if closings and closings["characters"] else 2
    figure, axes = plt.subplots(1, panels, figsize=(5.5 * panels, 4.5), layout="constrained")
    _ratios(figure, axes[0], report)
    _lengths(axes[1], report)
    if panels == 3:
        _closings(figure, axes[2], closings)
    cost = 100 * (report["loss_compressed"] / report["loss_uncompressed"] - 1)
    figure.suptitle(
        f"Dynamic Memory Compression: loss {report['loss_compressed']:.4f} "
        f"({cost:+.1f}% over the same weights with nothing merged)"
    )
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _ratios(figure, axes, report: dict) -> None:
    from matplotlib.colors import LogNorm

    ratios = np.array(report["ratio_by_layer_and_head"])
    layers, heads = ratios.shape
    image = axes.imshow(ratios, cmap="viridis", aspect="auto", norm=LogNorm(1, max(2, ratios.max())))
    if layers * heads <= 128:
        for (layer, head), ratio in np.ndenumerate(ratios):
            dark = ratio < ratios.max() ** 0.6
            text = f"{ratio:.1f}" if ratio < 9.95 else f"{ratio:.0f}"
            color, size = "white" if dark else "black", 10 if heads <= 8 else 7
            axes.text(head, layer, text, ha="center", va="center", color=color, size=size)
    axes.set(xlabel="KV head", ylabel="layer", title=f"tokens per cache entry (all: {report['compression_ratio']:.2f})")
    axes.set_xticks(range(0, heads, 1 if heads <= 32 else 8))
    rows = range(0, layers, 1 if layers <= 32 else 4)
    axes.set_yticks(rows, [row + 1 for row in rows])
    figure.colorbar(image, ax=axes)


def _lengths(axes, report: dict) -> None:
    counts = np.array(report["segments_by_length"])
    lengths = np.arange(len(counts))
    names, entries, tokens = [], [], []
    first = 1
    while first < len(counts):  # 1, 2, 3-4, 5-8, …
        last = min(1 if first == 1 else 2 * (first - 1), len(counts) - 1)
        names.append(f"{first}" if first == last else f"{first}-{last}")
        entries.append(counts[first : last + 1].sum() / counts.sum())
        tokens.append((counts * lengths)[first : last + 1].sum() / (counts * lengths).sum())
        first = last + 1
    place = np.arange(len(names))
    axes.bar(place - 0.2, entries, 0.4, color="#3b528b", label="of entries")
    axes.bar(place + 0.2, tokens, 0.4, color="#e07b00", label="of tokens")
    axes.set_xticks(place, names, rotation=30)
    axes.set(xlabel="tokens merged into one entry", ylabel="share", title="segment lengths")
    axes.legend()


def _closings(figure, axes, closings: dict) -> None:
    """A bar for each of the most frequent characters, and on it a dot for each layer."""
    from matplotlib.ticker import MaxNLocator

    rows = closings["characters"][:BARS]
    place = np.arange(len(rows))
    axes.barh(place, [row["rate"] for row in rows], color="#c9d3ea")
    axes.axvline(closings["rate"], color="black", linestyle="--", linewidth=1)
    by_layer = np.array([row["rate_by_layer"] for row in rows])
    layers = by_layer.shape[1]
    colors = np.tile(np.arange(1, layers + 1), len(rows))
    dots = axes.scatter(by_layer.ravel(), place.repeat(layers), 12, colors, cmap="viridis", vmin=1, vmax=max(2, layers))
    # Fonts lack glyphs, and a pair of dollars would begin a formula.
    names = [row["ends_with"].encode("ascii", "backslashreplace").decode().replace("$", r"\$") for row in rows]
    axes.set_yticks(place, names)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set(xlabel="share that closes a segment", title=f"tokens that end with … (all: {closings['rate']:.2f})")
    figure.colorbar(dots, ax=axes, label="layer", ticks=MaxNLocator(integer=True))
