"""`megatron-dmc report`: what compression costs on held-out text, which heads compress how much, and where they cut."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import numpy as np

from megatron_dmc.config import DMCError
from megatron_dmc.cpu import emulate_cuda

EXAMPLES = """\
examples:
  megatron-dmc report checkpoints/dmc-4x --text held-out/ --output report/
  megatron-dmc report checkpoints/dmc-4x --data-path data/corpus-valid --max-tokens 200000

CHECKPOINT is the folder that --save named in training (its latest iteration), or one iter_… folder in it. Each window
of --seq-length tokens is read through an empty cache that hard decisions compress, and by the same model where every
token is appended (nothing merged) and with training's decisions. Those of the stage finetune are the cache's own; of
retrofit they are soft and have noise: a lower loss than through the cache says that decisions are not settled. Hard
ones with the same noise tell why: if they cost more than soft ones, the model reads entries that count as merged; if
the cache costs more than they do, it relies on noise.
--output receives report.json and report.png: ratio per layer and head, how many tokens an entry stands for, and which
characters end these segments; and report.html: the beginning of the text with the segments that every layer and head
made of it."""

LEAST_TOKENS = 100
"""Fewer tokens give a character no rate. The standard error of a rate of so many independent tokens is at most 0.05,
even where all heads decide alike: so it is tokens that count here, not tokens of each head."""

ROWS = 20
"""Characters in the table at most, the most frequent ones."""


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
        "--output", type=Path, default=Path("."), help="folder for report.json, report.png and report.html (default: .)"
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
    from megatron_dmc.evaluation import check_positions, loss_compressed, read_windows
    from megatron_dmc.report_page import page
    from megatron_dmc.report_picture import draw
    from megatron_dmc.token_text import TokenText

    loaded = load(args.checkpoint, tokenizer_model=args.tokenizer_model)
    length = args.seq_length or loaded.args.seq_length
    check_positions(loaded, "--seq-length", length)
    windows = read_windows(loaded, length, text=args.text, data=args.data_path, limit=args.max_tokens)
    args.output.mkdir(parents=True, exist_ok=True)
    compressed = loss_compressed(loaded, windows)
    report = {"checkpoint": args.checkpoint} | summary(loaded, windows, compressed)
    written = [args.output / name for name in ("report.json", "report.png", "report.html")]
    try:
        text = TokenText(loaded.tokenizer)
        report["closings"] = closings(compressed, text)
        pieces = text.pieces(windows[0, : len(compressed.sample)].tolist())
        written[2].write_text(page(pieces, compressed.sample, typical_head(compressed), report), encoding="utf-8")
    except DMCError as error:
        report["closings"] = None
        written.pop().unlink(missing_ok=True)  # it would be of an earlier report
        print(f"without characters and report.html: {error}\n")
    print(table(report))
    written[0].write_text(json.dumps(report, indent=2) + "\n")
    draw(report, written[1])
    print(f"\nwrote {', '.join(map(str, written[:-1]))} and {written[-1]}")


def summary(loaded, windows, compressed) -> dict:
    """What report.json holds of the text as a whole: losses in nats, with merging and without, and every ratio.

    Args:
        loaded: the model, a `LoadedModel`.
        windows: `[n, s + 1]` tokens.
        compressed: what they are through compressed caches (`loss_compressed`).
    """
    from megatron_dmc.evaluation import loss_as_trained, loss_uncompressed, perplexity

    unmerged, as_trained = loss_uncompressed(loaded, windows), loss_as_trained(loaded, windows)
    soft = loaded.dmc.soft  # else the decisions of training are hard, without noise
    hard_with_noise = loss_as_trained(loaded, windows, hard=True) if soft else (None, None)
    return {
        "target_ratio": loaded.dmc.dmc_cr,
        "compression_ratio": compressed.ratio,
        "loss_compressed": compressed.loss,
        "loss_uncompressed": unmerged,
        "loss_as_trained": as_trained[0],
        "compression_ratio_as_trained": as_trained[1],
        "loss_hard_with_noise": hard_with_noise[0],
        "compression_ratio_hard_with_noise": hard_with_noise[1],
        "perplexity_compressed": perplexity(compressed.loss),
        "perplexity_uncompressed": perplexity(unmerged),
        "perplexity_as_trained": perplexity(as_trained[0]),
        "perplexity_hard_with_noise": perplexity(hard_with_noise[0]) if soft else None,
        "tokens": compressed.tokens,
        "window": windows.shape[1] - 1,
        "cache_bytes": compressed.entry_bytes,
        "cache_bytes_uncompressed": round(compressed.entry_bytes * compressed.ratio),
        "ratio_by_layer_and_head": compressed.ratios.tolist(),
        "ratio_by_layer": (compressed.tokens / compressed.entries.mean(1)).tolist(),
        "segments_by_length": compressed.segment_lengths.tolist(),
    }


def closings(compressed, text) -> dict:
    """How often a token is the last of its segment, by the last character of its text.

    That is where the next token appends an entry of its own; the last token of a window has no next one and is left
    out. A rate is a share of tokens and KV heads, over all layers or of one. That of all tokens is the reciprocal of
    the compression ratio, but for the windows' ends.

    Args:
        compressed: a `Compressed`.
        text: the `TokenText` of the model's tokenizer.

    Returns:
        Counts and rates of all tokens, and as `characters` those of each character that at least `LEAST_TOKENS` tokens
        end with, the most frequent first. `closings` counts KV heads of all layers, `tokens` does not. `rarer` counts
        the other characters' tokens.
    """
    layers, heads = compressed.entries.shape
    ids = compressed.followed.nonzero()[0]
    names, which = np.unique([text.last_character(int(token)) for token in ids], return_inverse=True)
    tokens = np.bincount(which, compressed.followed[ids], len(names)).astype(int)
    closed = np.stack([np.bincount(which, row[ids], len(names)).astype(int) for row in compressed.closings], 1)

    def counts(tokens: int, closed: np.ndarray) -> dict:
        rates = closed / (tokens * heads) if tokens else np.zeros(layers)
        return {
            "tokens": int(tokens),
            "closings": int(closed.sum()),
            "rate": float(rates.mean()),
            "rate_by_layer": rates.tolist(),
        }

    frequent = [i for i in np.argsort(-tokens, kind="stable") if tokens[i] >= LEAST_TOKENS]
    return {
        "least_tokens": LEAST_TOKENS,
        **counts(tokens.sum(), closed.sum(0)),
        "characters": [{"ends_with": str(names[i]), **counts(tokens[i], closed[i])} for i in frequent],
        "rarer": int(tokens.sum() - tokens[frequent].sum()),
    }


def typical_head(compressed) -> tuple[int, int]:
    """The layer and KV head, both from 0, whose ratio is nearest to that of all."""
    distance = np.abs(np.log(compressed.ratios / compressed.ratio))
    return tuple(map(int, np.unravel_index(distance.argmin(), distance.shape)))


def table(report: dict) -> str:
    """The report as lines for a terminal."""
    ratios = report["ratio_by_layer_and_head"]
    losses = (
        ("compressed cache", "compressed", report["compression_ratio"]),
        ("same, nothing merged", "uncompressed", 1),
        ("decisions of training", "as_trained", report["compression_ratio_as_trained"]),
        ("same, but hard", "hard_with_noise", report["compression_ratio_hard_with_noise"]),
    )
    lines = [
        f"{report['tokens']:,} held-out tokens in windows of {report['window']}",
        "",
        f"{'':22}{'loss':>8}{'perplexity':>12}{'ratio':>8}",
        *(
            f"{label:22}{report[f'loss_{name}']:8.4f}{report[f'perplexity_{name}']:12.3f}{ratio:8.2f}"
            for label, name, ratio in losses
            if report[f"loss_{name}"] is not None
        ),
        f"{'target':42}{report['target_ratio']:8.2f}",
        "",
        "ratio by layer" + "".join(f"{f'head {h}':>9}" for h in range(len(ratios[0]))),
    ]
    for layer, (mean, row) in enumerate(zip(report["ratio_by_layer"], ratios, strict=True), 1):
        lines.append(f"{layer:5}{mean:9.2f}" + "".join(f"{ratio:9.2f}" for ratio in row))
    if report["closings"] is not None:
        lines += ["", *_table_of_closings(report["closings"])]
    return "\n".join(lines)


def _table_of_closings(closings: dict) -> list[str]:
    rows = [*closings["characters"][:ROWS], {"ends_with": "any character", **closings}]
    width = max(20, *(len(row["ends_with"]) for row in rows))
    lines = [f"{'tokens that end with':{width}}{'tokens':>12}{'close a segment':>17}{'to average':>12}"]
    for row in rows:
        share = f"×{row['rate'] / closings['rate']:.2f}" if closings["rate"] else ""
        lines.append(f"{row['ends_with']:{width}}{row['tokens']:12,}{row['rate']:17.1%}{share:>12}")
    more = len(closings["characters"]) - ROWS
    return [
        *lines,
        f"The most frequent characters, of at least {closings['least_tokens']} tokens each"
        + (f" ({more} more in report.json)" if more > 0 else "")
        + ". A token closes a segment in a head where the next one",
        "appends an entry; a window's last token counts nowhere. By layer: report.json.",
    ]
