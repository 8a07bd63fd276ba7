"""Tokens per second per GPU over the number of GPUs and the parallel layout, with DMC and without.

    python benchmarks/scaling.py [--gpus 1 --gpus 2] [--layout CP-a2a] [--out benchmarks/results/scaling-2xh100.json]

Each case is a run of Megatron's own training loop under torchrun, as in `benchmarks/training_step.py`, whose shapes
and settings these are: vanilla, and DMC on soft decisions, which begin at the offset that lets random weights merge
about three tokens of four. A step has four micro-batches for each GPU in every layout, so tokens per step grow with the
GPUs and compare between layouts. Per layout:

- step_over_vanilla: DMC's time of a step over vanilla's.
- scaling: tokens per second per GPU over those of one GPU, each against its own.
- sent_mib: what rank 0 hands to collectives and to its neighbours in a step, by operation; and how many bytes of it DMC
  adds (`added_bytes`). Counted where torch.distributed is called.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import training_step  # noqa: E402
from benchmarks.training_step import DMC, SHAPES  # noqa: E402

MICRO_BATCHES = 4
"""For each GPU in a step."""
TINY = """--hidden-size 32 --num-attention-heads 4 --group-query-attention --num-query-groups 2 --seq-length 64
    --max-position-embeddings 64 --micro-batch-size 1 --vocab-size 63 --transformer-impl local --no-persist-layer-norm
    --no-masked-softmax-fusion --ffn-hidden-size 64 --attention-backend auto""".split()
SENT = re.compile(r"sent bytes: (\{.*\})")


def layouts(gpus: int) -> dict[str, list[str]]:
    """Megatron's flags of each layout of so many GPUs."""
    if gpus == 1:
        return {"one GPU": []}
    context = ["--context-parallel-size", str(gpus), "--cp-comm-type"]
    return {
        "DP": ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"],
        "TP-SP": ["--tensor-model-parallel-size", str(gpus), "--sequence-parallel"],
        "PP": ["--pipeline-model-parallel-size", str(gpus)],
        "CP-a2a": [*context, "a2a"],
        "CP-all_gather": [*context, "all_gather"],
    }


def count_bytes() -> Counter:
    """From now on, bytes that this rank sends, by operation; before Megatron is imported, which keeps the functions."""
    import torch.distributed as distributed

    sent: Counter = Counter()
    given = {  # the tensor that is sent
        "all_reduce": ("tensor", 0), "all_gather_into_tensor": ("input_tensor", 1),
        "reduce_scatter_tensor": ("input", 1), "all_to_all_single": ("input", 1), "isend": ("tensor", 0),
        "send": ("tensor", 0),
    }  # fmt: skip

    def counted(name: str, argument: str, place: int):
        original = getattr(distributed, name)

        @functools.wraps(original)
        def call(*args, **kwargs):
            tensor = args[place] if len(args) > place else kwargs[argument]
            sent[name] += tensor.nbytes
            return original(*args, **kwargs)

        return call

    for name, (argument, place) in given.items():
        call = counted(name, argument, place)
        setattr(distributed, name, call)
        setattr(distributed.distributed_c10d, name, call)  # where batches of isend and irecv look
    return sent


def worker(flags: list[str]) -> None:
    """One rank of a run, in this process."""
    sent = count_bytes()
    try:
        training_step.worker(flags)
    finally:
        if os.environ.get("RANK", "0") == "0":
            print(f"sent bytes: {json.dumps(sent)}", flush=True)


def run(gpus: int, shape: list[str], flags: list[str], iterations: int) -> dict:
    batch = ["--global-batch-size", MICRO_BATCHES * gpus]
    found, output = training_step.run(__file__, [*shape, *batch, *flags], iterations, gpus)
    length = int(shape[shape.index("--seq-length") + 1])
    micro_batch = int(shape[shape.index("--micro-batch-size") + 1])
    return dict(
        found,
        tokens_per_s_per_gpu=length * micro_batch * MICRO_BATCHES / found["ms"] * 1e3,
        sent_mib={
            name: count / iterations / 2**20 for name, count in json.loads(SENT.search(output)[1]).items() if count
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="benchmarks/results/scaling.json")
    parser.add_argument("--shape", choices=[*SHAPES, "tiny"], default="llama3_8b_1x8192")
    parser.add_argument("--gpus", type=int, action="append", help="(default: 1, 2, 4, … and as many as there are)")
    parser.add_argument("--layout", action="append", help="only these (default: all)")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--iterations", type=int, default=14)
    parser.add_argument("--commit", help="to note where the checkout has no history")
    args = parser.parse_args()

    import torch

    from benchmarks.common import attempt, circumstances, save, table
    from megatron_dmc.cpu import emulate_cuda

    there = torch.cuda.device_count()
    if args.shape == "tiny" and not there:
        emulate_cuda()
        there = 2
    counts = args.gpus or sorted({n for n in (1, 2, 4, 8, 16, there) if 0 < n <= there})
    if not counts or max(counts) > there:
        parser.error(f"--gpus asks for {max(counts, default=1)} GPUs; {there} are visible")
    shape = TINY if args.shape == "tiny" else SHAPES[args.shape]
    if "--global-batch-size" in shape:  # a step's batch depends on the GPUs here
        place = shape.index("--global-batch-size")
        shape = shape[:place] + shape[place + 2 :]
    shape = [*shape, "--num-layers", str(args.layers)]
    cases: dict[str, dict] = {}
    ratios: dict[str, dict] = {}
    failures: dict[str, str] = {}
    result = dict(
        circumstances(args.commit), layers=args.layers, iterations=args.iterations, micro_batches=MICRO_BATCHES,
        shapes={args.shape: cases}, ratios={args.shape: ratios}, failures=failures,
    )  # fmt: skip
    alone: dict[str, float] = {}
    for gpus in counts:
        for name, flags in layouts(gpus).items():
            if args.layout and name not in args.layout and gpus > 1:
                continue
            case = name if gpus == 1 else f"{name} {gpus}"
            ways = {}
            for way, more in (("vanilla", []), ("dmc", DMC)):
                found = attempt(
                    f"{case} {way}",
                    functools.partial(run, gpus, shape, [*flags, *more], args.iterations),
                    failures,
                )
                if found is not None:
                    ways[way] = found
                    print(case, way, found, flush=True)
                    if gpus == 1:
                        alone[way] = found["tokens_per_s_per_gpu"]
            cases[case] = ways
            if len(ways) == 2:
                sent = {way: sum(found["sent_mib"].values()) * 2**20 for way, found in ways.items()}
                ratios[case] = dict(
                    step_over_vanilla=ways["dmc"]["ms"] / ways["vanilla"]["ms"],
                    scaling={
                        way: found["tokens_per_s_per_gpu"] / alone[way] for way, found in ways.items() if way in alone
                    },
                    added_bytes=round(sent["dmc"] - sent["vanilla"]),
                )
            save(result, args.out)
    rows = [
        dict(layout=case, run=way, **found, **ratios.get(case, {})) for case, ways in cases.items()
        for way, found in ways.items()
    ]  # fmt: skip
    print(table(rows, ["layout", "run", "ms", "tokens_per_s_per_gpu", "peak_gib", "ratio", "kernel", "added_bytes"]))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2:])
    else:
        main()
