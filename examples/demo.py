"""Retrofit a small model to 4x cache compression, beside a control that trains on without it, and generate from it.

    python examples/demo.py [--output runs/demo]

The text is the source of Python's standard library, the tokens a byte-level BPE trained on it. Every step is a command
that is printed before it runs; a user's own run consists of the same ones. On a machine without a GPU it takes ten
minutes on two cores.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

SKIPPED = {"test", "tests", "idlelib", "turtledemo", "lib2to3", "ensurepip", "pydoc_data", "encodings", "__pycache__"}
PROMPTS = ["import os\n\ndef ", "class Queue:\n    def __init__(self"]
PROGRESS = re.compile(r" iteration +(\d+)/ *(\d+) .*?\| (lm loss: .*?) \| loss scale")


@dataclass(frozen=True)
class Size:
    """The model and its training; the control trains in three runs as long as the stages, with their learning rates."""

    layers: int = 4
    hidden: int = 128
    heads: int = 4
    seq_length: int = 256
    batch: int = 8
    learning_rate: float = 2e-3
    base: int = 400
    zero_out: int = 40
    retrofit: int = 340
    finetune: int = 220
    held_out_tokens: int = 150_000
    flags: tuple[str, ...] = ()


CPU = Size()
GPU = replace(
    CPU, layers=6, hidden=384, heads=6, batch=32, learning_rate=1e-3, base=600, zero_out=60, retrofit=700, finetune=400,
    flags=("--bf16",),
)  # fmt: skip
RATIO = 4.0
VOCABULARY = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=Path("runs/demo"), help="folder that is made anew (default: runs/demo)"
    )
    output = parser.parse_args().output

    import torch

    started = time.monotonic()
    size = GPU if torch.cuda.is_available() else CPU
    if output.exists():
        shutil.rmtree(output)
    copy_standard_library(output / "text")
    data = f"{output}/data"
    dmc(
        "prepare-data", "--input", f"{output}/text", "--holdout", "0.06", "--output", data,
        "--train-tokenizer", str(VOCABULARY),
    )  # fmt: skip

    high, low = size.learning_rate, size.learning_rate / 20
    train(size, output, "base", size.base, lr=high, min_lr=low)
    for control in (True, False):
        start = "base"
        for stage, steps, lr, min_lr in (
            ("zero-out", size.zero_out, high / 2, high / 2),
            ("retrofit", size.retrofit, high, high),
            ("finetune", size.finetune, high, low),
        ):
            name = f"control-{stage}" if control else stage
            train(size, output, name, steps, lr=lr, min_lr=min_lr, start=start, stage="" if control else stage)
            start = name

    evaluate(size, output, data)
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    dmc("generate", f"{output}/finetune", *prompts, "--max-new-tokens", "120")
    print(f"\n{time.monotonic() - started:.0f} seconds; {output}/report.json, {output}/report.png")


def copy_standard_library(folder: Path) -> None:
    """The standard library's own modules, without tests and tables."""
    library = Path(sysconfig.get_path("stdlib"))
    for source in sorted(library.rglob("*.py")):
        parts = source.relative_to(library).parts
        if not SKIPPED.intersection(parts[:-1]) and not any(part.endswith("-packages") for part in parts):
            target = folder.joinpath(*parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


def train(
    size: Size, output: Path, name: str, steps: int, *, lr: float, min_lr: float, start: str = "", stage: str = ""
) -> None:
    """One training run into `output/name`, from the weights in `output/start`, in a stage of DMC or without."""
    command = f"""
        train --num-layers {size.layers} --hidden-size {size.hidden} --num-attention-heads {size.heads}
        --seq-length {size.seq_length} --max-position-embeddings {size.seq_length} --position-embedding-type rope
        --normalization RMSNorm --swiglu --disable-bias-linear --attention-dropout 0 --hidden-dropout 0
        --micro-batch-size {size.batch} --global-batch-size {size.batch} --train-iters {steps}
        --lr {lr} --min-lr {min_lr} --lr-warmup-iters 20 --lr-decay-style cosine
        --weight-decay 0.1 --clip-grad 1.0 --adam-beta2 0.95
        --train-data-path {output}/data-train --valid-data-path {output}/data-valid --test-data-path {output}/data-valid
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model {output}/data-tokenizer
        --make-vocab-size-divisible-by 1 --num-workers 0 --no-create-attention-mask-in-dataloader
        --save {output}/{name} --save-interval 100000 --ckpt-format torch_dist --no-save-optim
        --log-interval 20 --eval-interval 100000 --eval-iters 1
        --transformer-impl {"transformer_engine" if has("transformer_engine") else "local --no-persist-layer-norm"}
        """.split()
    command += size.flags
    if start:
        command += ["--load", f"{output}/{start}", "--finetune"]
    if stage:
        command += ["--dmc-stage", stage, "--dmc-cr", f"{RATIO:g}"]
    dmc(*command, log=output / f"{name}.log", label=name)


def has(module: str) -> bool:
    """Whether there is a GPU and this module that makes use of it."""
    import torch

    return torch.cuda.is_available() and importlib.util.find_spec(module) is not None


def dmc(*arguments: str, log: Path | None = None, label: str = "") -> None:
    """Run one megatron-dmc command; with a log, keep its output there and show only how training goes."""
    command = [sys.executable, "-m", "megatron_dmc", *arguments]
    print(f"\n$ python -m megatron_dmc {shlex.join(arguments)}", flush=True)
    if log is None:
        subprocess.run(command, check=True)
        return
    with (
        open(log, "w") as file,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run,
    ):
        for line in run.stdout:
            file.write(line)
            if found := PROGRESS.search(line):
                step, steps, losses = found.groups()
                losses = re.sub(r"(\d\.\d+)E([+-]\d+)", lambda m: f"{float(m[0]):.3f}", losses)
                print(f"\r  {label} {step}/{steps}: {losses}".ljust(130), end="", flush=True)
    print()
    if run.returncode:
        print("".join(log.read_text().splitlines(keepends=True)[-25:]), file=sys.stderr)
        sys.exit(f"{label} failed; its whole output is in {log}")


def evaluate(size: Size, output: Path, data: str) -> None:
    """Losses on held-out text, the DMC model's through truly compressed caches: a table, report.json, report.png."""
    warnings.filterwarnings("ignore")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    from megatron_dmc.cpu import emulate_cuda

    emulate_cuda()
    from megatron_dmc.checkpoint import load
    from megatron_dmc.commands.report import closings, summary, table
    from megatron_dmc.evaluation import loss_compressed, loss_uncompressed, read_windows
    from megatron_dmc.report_picture import draw
    from megatron_dmc.token_text import TokenText

    losses = {}
    for name, folder in (("base", "base"), ("control", "control-finetune")):
        loaded = load(output / folder, need_dmc=False)
        windows = read_windows(loaded, size.seq_length, data=f"{data}-valid", limit=size.held_out_tokens)
        losses[name] = loss_uncompressed(loaded, windows)
    loaded = load(output / "finetune")
    compressed = loss_compressed(loaded, windows)
    report = summary(loaded, windows, compressed)
    report["closings"] = closings(compressed, TokenText(loaded.tokenizer))
    cost = report["loss_compressed"] / losses["control"] - 1
    print(f"\n{table(report)}\n")
    print(f"{'held-out loss, nats per token':44}{'loss':>8}{'ratio':>8}{'against control':>18}")
    print(f"{'base':44}{losses['base']:8.4f}{1:8.2f}")
    print(f"{'control: trained on without compression':44}{losses['control']:8.4f}{1:8.2f}")
    label = "DMC: hard decisions, truly merged caches"
    print(f"{label:44}{report['loss_compressed']:8.4f}{report['compression_ratio']:8.2f}{cost:>+17.1%}\n")
    results = dict(
        base_loss=losses["base"],
        control_loss=losses["control"],
        dmc_loss=report["loss_compressed"],
        compression_ratio=report["compression_ratio"],
        target_ratio=RATIO,
        steps=dict(base=size.base, zero_out=size.zero_out, retrofit=size.retrofit, finetune=size.finetune),
    )
    (output / "report.json").write_text(json.dumps({**results, **report}, indent=2) + "\n")
    draw(report, output / "report.png")


if __name__ == "__main__":
    os.chdir(Path(__file__).resolve().parent.parent)
    main()
