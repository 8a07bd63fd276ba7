"""Megatron training steps with DMC and without, the same everything else, Transformer Engine spec, one GPU.

    python benchmarks/training_step.py [--out benchmarks/results/training-step-h200.json]

Each case is a run of Megatron's own training loop on mock data in a process of its own (`megatron-dmc train`): vanilla,
then DMC on soft decisions, which begin at the offset that lets random weights merge about three tokens of four. Times
are medians over the last iterations of what Megatron logs; memory is the allocator's peak. Vanilla runs twice, before
and after: the spread says what a difference means.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

COMMON = """
    --position-embedding-type rope --swiglu --normalization RMSNorm --disable-bias-linear
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 --bf16
    --mock-data --tokenizer-type NullTokenizer --num-workers 0 --lr 1e-5 --lr-decay-style constant --clip-grad 1
    --init-method-std 0.02 --log-interval 1 --eval-interval 1000 --eval-iters 0
    --transformer-impl transformer_engine --attention-backend fused --no-gradient-accumulation-fusion
    --no-create-attention-mask-in-dataloader
    """.split()
SHAPES = {
    "llama2_7b_2x4096": """--hidden-size 4096 --ffn-hidden-size 11008 --num-attention-heads 32 --seq-length 4096
        --max-position-embeddings 4096 --micro-batch-size 2 --global-batch-size 2 --vocab-size 31999""".split(),
    "llama3_8b_1x8192": """--hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32
        --group-query-attention --num-query-groups 8 --seq-length 8192 --max-position-embeddings 8192
        --rotary-base 500000 --micro-batch-size 1 --global-batch-size 1 --vocab-size 128255""".split(),
}
# Soft decisions in every step, as in the steps of retrofit that take longest, with the ratio held from the first on.
DMC = "--dmc-stage finetune --dmc-no-hard-finetune --dmc-cr 4 --dmc-init-val -0.86".split()
STEP = re.compile(r" iteration +(\d+)/.*?elapsed time per iteration \(ms\): ([0-9.]+)(.*)")
PEAK = re.compile(r"peak bytes: (\d+)")


def worker(flags: list[str]) -> None:
    """One rank of a run, in this process."""
    import torch

    from megatron_dmc.commands import train

    sys.argv = ["megatron-dmc train", *flags]
    try:
        train.main()
    finally:
        peak = torch.cuda.max_memory_allocated() if torch.cuda.device_count() else 0
        print(f"peak bytes: {peak}", flush=True)


def run(script: str, flags: list, iterations: int, gpus: int = 1) -> tuple[dict, str]:
    """Train with these flags more, in processes of its own that `script --worker` runs.

    Returns:
        Times of a step in ms (median and range of the last two thirds), peak memory in GiB, what DMC reports, if it
        runs; and the output.
    """
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", gpus] if gpus > 1 else []
    command = [sys.executable, *launch, script, "--worker", *COMMON, *flags, "--train-iters", iterations]
    environment = os.environ | dict(PYTHONWARNINGS="ignore", CUDA_DEVICE_MAX_CONNECTIONS="1", PYTHONUNBUFFERED="1")
    done = subprocess.run(list(map(str, command)), env=environment, cwd=ROOT, capture_output=True, text=True)
    steps = {int(n): (float(ms), rest) for n, ms, rest in STEP.findall(done.stdout)}
    if done.returncode or len(steps) < iterations:
        print(done.stdout[-2000:], done.stderr[-4000:], sep="\n", file=sys.stderr)
        raise RuntimeError(f"exit code {done.returncode} after {len(steps)} steps; its output was printed")
    times = [steps[n][0] for n in sorted(steps)][max(4, iterations // 3) :]
    ratio = re.search(r"\| compression ratio: ([0-9.E+-]+)", steps[max(steps)][1])
    kernel = re.search(r"DMC attention runs on: (\w+)", done.stdout)
    return dict(
        ms=statistics.median(times),
        spread=[min(times), max(times)],
        peak_gib=max(map(int, PEAK.findall(done.stdout))) / 2**30,
        ratio=float(ratio[1]) if ratio else None,
        kernel=kernel[1] if kernel else None,
    ), done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="benchmarks/results/training-step.json")
    parser.add_argument("--shape", choices=SHAPES, action="append", help="only these (default: all)")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--iterations", type=int, default=24)
    parser.add_argument("--commit", help="to note where the checkout has no history")
    args = parser.parse_args()

    from benchmarks.common import circumstances, save, table

    result = dict(circumstances(args.commit), layers=args.layers, iterations=args.iterations, shapes={}, ratios={})
    for shape in args.shape or SHAPES:
        cases = {}
        for name, flags in (("vanilla", []), ("dmc", DMC), ("vanilla again", [])):
            model = [*SHAPES[shape], "--num-layers", args.layers]
            cases[name], _ = run(__file__, [*model, *flags], args.iterations)
            print(shape, name, cases[name], flush=True)
        vanilla = statistics.mean(cases[name]["ms"] for name in ("vanilla", "vanilla again"))
        result["shapes"][shape] = cases
        result["ratios"][shape] = dict(
            step_over_vanilla=cases["dmc"]["ms"] / vanilla,
            step_memory_over_vanilla=cases["dmc"]["peak_gib"] / cases["vanilla"]["peak_gib"],
            vanilla_over_itself=cases["vanilla again"]["ms"] / cases["vanilla"]["ms"],
        )
        rows = [dict(run=name, **case) for name, case in cases.items()]
        print(table(rows, ["run", "ms", "peak_gib", "ratio", "kernel"]))
        print(result["ratios"][shape], flush=True)
        save(result, args.out)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2:])
    else:
        main()
