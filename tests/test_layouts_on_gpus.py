"""Twenty retrofit steps and one step's gradients in each layout of two GPUs, over NCCL: Transformer Engine, bfloat16.

The float32 tests on CPUs (`test_layouts.py`, `test_context_layouts.py`) have tight bounds. Here ranks round partial
sums to 8 bits and decisions near their threshold fall the other way, so bounds are what bfloat16 leaves; a missing or
doubled term is far beyond them.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import GPUS
from runs import WITHOUT_DATA, launcher, paragraphs, python, write_documents

two_gpus = pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")

SHAPE = """--transformer-impl transformer_engine --bf16 --hidden-size 256 --num-attention-heads 4 --seq-length 512
    --max-position-embeddings 512 --micro-batch-size 1 --global-batch-size 4 --init-method-std 0.05""".split()
RETROFIT = """--dmc-stage retrofit --dmc-cr 4 --dmc-init-val 0.3 --dmc-temp 0.3
    --finetune --lr 2e-4 --train-iters 20""".split()
# At a higher rate, or for longer, what is rounded grows: Adam's first steps follow the signs of gradients.
PUBLISHED = ["--dmc-hard-steps", "0", "--dmc-no-moving-offset", "--dmc-noise-scale", "1"]
HELD = "held"
"""As by default, the offset holds the ratio, and every other step is on hard decisions; the others are as published.
Rounding turns hard decisions, so these make ten steps."""
QUIET = ["--dmc-no-noise"]
FP8 = ["--fp8-format", "hybrid"]
TENSOR = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
CONTEXT = ["--context-parallel-size", "2", "--cp-comm-type"]
PIPELINE = ["--pipeline-model-parallel-size", "2"]
SHARDED = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
PACKED = ["--dataloader-inter-document-masking"]
ZERO_OUT = ["--dmc-stage", "zero-out"]
BASE = "the model to begin from"
TAUGHT = ["--dmc-teacher", BASE, "--dmc-teacher-weight", "0.5"]

RUNS = {  # processes, flags
    "one GPU": (1, []),
    "one GPU without noise": (1, QUIET),
    "one GPU, fp8": (1, FP8),
    "TP-SP": (2, TENSOR),
    "TP-SP, fp8": (2, [*TENSOR, *FP8]),
    "PP": (2, PIPELINE),
    "CP-a2a": (2, [*CONTEXT, "a2a"]),
    "CP-all_gather": (2, [*CONTEXT, "all_gather"]),
    "DP without noise": (2, QUIET),  # data-parallel ranks draw different noise
    "DP sharded without noise": (2, [*QUIET, *SHARDED]),
    "one GPU, packed": (1, PACKED),
    "TP-SP, packed": (2, [*TENSOR, *PACKED]),
    "CP-a2a, packed": (2, [*CONTEXT, "a2a", *PACKED]),
    "CP-all_gather, packed": (2, [*CONTEXT, "all_gather", *PACKED]),
    "one GPU, taught": (1, TAUGHT),
    "TP-SP, taught": (2, [*TENSOR, *TAUGHT]),
    "CP-a2a, taught": (2, [*CONTEXT, "a2a", *TAUGHT]),
    "one GPU, zero-out": (1, ZERO_OUT),
    "TP-SP, zero-out": (2, [*TENSOR, *ZERO_OUT]),
    "CP-all_gather, zero-out": (2, [*CONTEXT, "all_gather", *ZERO_OUT]),
    "one GPU, held": (1, []),
    "TP-SP, held": (2, TENSOR),
    "PP, held": (2, PIPELINE),
    "CP-a2a, held": (2, [*CONTEXT, "a2a"]),
    "CP-all_gather, held": (2, [*CONTEXT, "all_gather"]),
}
ALIKE = {  # each with what it should equal, and whether gradients are compared
    "TP-SP": ("one GPU", True),
    "PP": ("one GPU", True),
    "CP-a2a": ("one GPU", True),
    "CP-all_gather": ("one GPU", True),
    "DP without noise": ("one GPU without noise", True),
    "DP sharded without noise": ("one GPU without noise", False),  # every rank has a shard of the sums
    "TP-SP, fp8": ("one GPU, fp8", False),  # scaling factors differ
    "TP-SP, packed": ("one GPU, packed", True),
    "CP-a2a, packed": ("one GPU, packed", True),
    "CP-all_gather, packed": ("one GPU, packed", True),
    "TP-SP, taught": ("one GPU, taught", True),
    "CP-a2a, taught": ("one GPU, taught", True),
    "TP-SP, zero-out": ("one GPU, zero-out", True),
    "CP-all_gather, zero-out": ("one GPU, zero-out", True),
    "TP-SP, held": ("one GPU, held", True),
    "PP, held": ("one GPU, held", True),
    "CP-a2a, held": ("one GPU, held", True),
    "CP-all_gather, held": ("one GPU, held", True),
}


@pytest.fixture(scope="module")
def runs(request, megatron, tmp_path_factory):
    """All that the selected tests need, side by side: most of their time is start-up."""
    tests = [item.callspec.params["name"] for item in request.session.items if item.path == request.path]
    needed = [name for name in RUNS if name in tests or name in {ALIKE[test][0] for test in tests}]
    folder = tmp_path_factory.mktemp("layouts")
    model = [*WITHOUT_DATA, *SHAPE, *write_documents(folder / "text", paragraphs())]
    base = python("-m", "megatron_dmc", "train", *model, "--train-iters", 1, "--save", folder / "base",
                  "--save-interval", 1)  # fmt: skip
    assert base.code == 0, base.output[-6000:]

    def run(name):
        processes, flags = RUNS[name]
        flags = [folder / "base" if flag is BASE else flag for flag in flags]
        flags += ["--exit-interval", "10"] if HELD in name else PUBLISHED
        return python(
            *launcher(processes), "tests/train_and_keep_gradients.py", folder / name, *model, *RETROFIT,
            "--data-cache-path", folder / f"{name} cache", "--load", folder / "base", *flags,
            CUDA_DEVICE_MAX_CONNECTIONS="1", NCCL_NVLS_ENABLE="0",
        )  # fmt: skip

    with ThreadPoolExecutor(len(needed)) as pool:
        return folder, dict(zip(needed, pool.map(run, needed), strict=True))


def gradients(folder):
    from megatron.core import dist_checkpointing

    found = dist_checkpointing.load_plain_tensors(str(folder))
    return {name: t.double() for name, t in found.items() if name.startswith(("decoder", "embedding", "output_layer"))}


@two_gpus
@pytest.mark.parametrize("name", ALIKE)
def test_layouts_on_gpus(runs, name):
    (folder, found), (other, with_gradients) = runs, ALIKE[name]
    run, expected = found[name], found[other]
    for one in (run, expected):
        assert one.code == 0, one.output[-6000:]
        assert len(one.steps) == (10 if HELD in name else 20)
    bounds = {"lm loss": 0.001, "compression ratio": 0.005, "grad norm": 0.01}
    if "zero-out" in name:  # nothing merges
        bounds.pop("compression ratio")
    else:
        assert max(expected.values("compression ratio")) > 1.3
    assert min(expected.values("grad norm")) > 0.01
    wide = 5 if "fp8" in name else 1  # 3 bits of a mantissa, and a scale for each rank's part
    largest = {}
    for value in bounds:
        pairs = zip(run.values(value), expected.values(value), strict=True)
        errors = [abs(a / b - 1) for a, b in pairs]
        largest[value] = max(errors)
        print(name, value, "differs by at most", max(errors), "by step:", [f"{error:.0e}" for error in errors])
    for value, bound in bounds.items():
        assert largest[value] < bound * wide, f"{value}: {run.values(value)} for {expected.values(value)}"
    if not with_gradients:
        return
    ours, theirs = gradients(folder / name), gradients(folder / other)
    assert ours.keys() == theirs.keys() and len(ours) > 5
    errors = {n: ((ours[n] - g).norm() / g.norm()).item() for n, g in theirs.items()}
    print(name, "gradients differ by", {n: round(e, 5) for n, e in errors.items()})
    assert all(g.norm() > 0 for g in theirs.values())
    assert all(error < 0.01 for error in errors.values()), errors
