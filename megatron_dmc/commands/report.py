"""`megatron-dmc report`: what compression costs on held-out text, and which heads compress how much."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from megatron_dmc.config import DMCError
from megatron_dmc.cpu import emulate_cuda

EXAMPLES = """\
examples:
  megatron-dmc report checkpoints/dmc-4x --text held-out/ --output report/
  megatron-dmc report checkpoints/dmc-4x --data-path data/corpus-valid --max-tokens 200000

CHECKPOINT is the folder that --save named in training (its latest iteration), or one iter_… folder in it. Each window
of --seq-length tokens is read through an empty cache that hard decisions compress. --output receives report.json and
report.png: ratio per layer and head, and how many tokens an entry stands for."""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="megatron-dmc report",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint of the stage retrofit or finetune")
    parser.add_argument("--text", nargs="+", type=Path, help="held-out text: files, JSON lines, folders")
    parser.add_argument("--data-path", metavar="PREFIX", help="instead, an indexed dataset")
    parser.add_argument("--seq-length", type=int, help="tokens per window (default: as in training)")
    parser.add_argument(
        "--max-tokens", type=int, default=1_000_000, help="stop after about so many (default: 1,000,000)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("."), help="folder for report.json and report.png (default: .)"
    )
    parser.add_argument("--tokenizer-model", help="where the tokenizer is now, if it has moved since training")
    args = parser.parse_args()
    if (args.text is None) == (args.data_path is None):
        raise DMCError("give held-out text: either --text or --data-path")
    for name in ("seq_length", "max_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise DMCError(f"--{name.replace('_', '-')} must be at least 1; got {getattr(args, name)}")

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise DMCError("report runs in one process: start it without torchrun")
    emulate_cuda()
    from megatron_dmc.checkpoint import load
    from megatron_dmc.evaluation import read_windows

    loaded = load(args.checkpoint, tokenizer_model=args.tokenizer_model)
    length = args.seq_length or loaded.args.seq_length
    if loaded.args.position_embedding_type == "learned_absolute" and length > loaded.args.max_position_embeddings:
        raise DMCError(f"--seq-length {length} exceeds the model's {loaded.args.max_position_embeddings} positions")
    windows = read_windows(loaded, length, text=args.text, data=args.data_path, limit=args.max_tokens)
    args.output.mkdir(parents=True, exist_ok=True)
    report = measure(loaded, windows)
    print(table(report))
    (args.output / "report.json").write_text(json.dumps({"checkpoint": args.checkpoint, **report}, indent=2) + "\n")
    draw(report, args.output / "report.png")
    print(f"\nwrote {args.output / 'report.json'} and {args.output / 'report.png'}")


def measure(loaded, windows) -> dict:
    """What report.json holds: losses over `windows` `[n, s + 1]` with and without compression, and every ratio."""
    from megatron_dmc.evaluation import loss_compressed, loss_uncompressed, perplexity

    compressed = loss_compressed(loaded, windows)
    uncompressed = loss_uncompressed(loaded, windows)
    return {
        "target_ratio": loaded.dmc.dmc_cr,
        "compression_ratio": compressed.ratio,
        "loss_compressed": compressed.loss,
        "loss_uncompressed": uncompressed,
        "perplexity_compressed": perplexity(compressed.loss),
        "perplexity_uncompressed": perplexity(uncompressed),
        "tokens": compressed.tokens,
        "window": windows.shape[1] - 1,
        "cache_bytes": compressed.entry_bytes,
        "cache_bytes_uncompressed": round(compressed.entry_bytes * compressed.ratio),
        "ratio_by_layer_and_head": compressed.ratios.tolist(),
        "ratio_by_layer": (compressed.tokens / compressed.entries.mean(1)).tolist(),
        "segments_by_length": compressed.segment_lengths.tolist(),
    }


def table(report: dict) -> str:
    """The report as lines for a terminal."""
    ratios = report["ratio_by_layer_and_head"]
    lines = [
        f"{report['tokens']:,} held-out tokens in windows of {report['window']}",
        "",
        f"{'':22}{'loss':>8}{'perplexity':>12}{'ratio':>8}",
        f"{'compressed cache':22}{report['loss_compressed']:8.4f}{report['perplexity_compressed']:12.3f}"
        f"{report['compression_ratio']:8.2f}",
        f"{'without DMC':22}{report['loss_uncompressed']:8.4f}{report['perplexity_uncompressed']:12.3f}{1:8.2f}",
        f"{'target':50}"[:42] + f"{report['target_ratio']:8.2f}",
        "",
        "ratio by layer" + "".join(f"{f'head {h}':>9}" for h in range(len(ratios[0]))),
    ]
    for layer, (mean, row) in enumerate(zip(report["ratio_by_layer"], ratios, strict=True), 1):
        lines.append(f"{layer:5}{mean:9.2f}" + "".join(f"{ratio:9.2f}" for ratio in row))
    return "\n".join(lines)


def draw(report: dict, path: Path) -> None:
    """Picture of a report: a heat map of ratios over layers and heads, and the distribution of segment lengths."""
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot as plt
    from matplotlib.colors import LogNorm

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    ratios = np.array(report["ratio_by_layer_and_head"])
    layers, heads = ratios.shape
    image = left.imshow(ratios, cmap="viridis", aspect="auto", norm=LogNorm(1, max(2, ratios.max())))
    if layers * heads <= 128:
        for (layer, head), ratio in np.ndenumerate(ratios):
            dark = ratio < ratios.max() ** 0.6
            left.text(head, layer, f"{ratio:.3g}", ha="center", va="center", color="white" if dark else "black")
    left.set(xlabel="KV head", ylabel="layer", title=f"tokens per cache entry (all: {report['compression_ratio']:.2f})")
    left.set_xticks(range(0, heads, 1 if heads <= 32 else 8))
    rows = range(0, layers, 1 if layers <= 32 else 4)
    left.set_yticks(rows, [row + 1 for row in rows])
    figure.colorbar(image, ax=left)

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
    right.bar(place - 0.2, entries, 0.4, color="#3b528b", label="of entries")
    right.bar(place + 0.2, tokens, 0.4, color="#e07b00", label="of tokens")
    right.set_xticks(place, names, rotation=30)
    right.set(xlabel="tokens merged into one entry", ylabel="share", title="segment lengths")
    right.legend()
    cost = 100 * (report["loss_compressed"] / report["loss_uncompressed"] - 1)
    figure.suptitle(
        f"Dynamic Memory Compression: loss {report['loss_compressed']:.4f} ({cost:+.1f}% over the model uncompressed)"
    )
    figure.savefig(path, dpi=100)
    plt.close(figure)
