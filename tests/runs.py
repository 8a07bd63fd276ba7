"""Megatron runs as a user makes them: a command in processes of its own, and what its log says."""

import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from conftest import GPUS, HAVE_GPU
from warm import Warm

ROOT = Path(__file__).resolve().parent.parent

MODEL = """
    --num-layers 4 --hidden-size 32 --num-attention-heads 4 --group-query-attention --num-query-groups 2
    --seq-length 24 --max-position-embeddings 24 --position-embedding-type rope --swiglu --normalization RMSNorm
    --disable-bias-linear --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
    --mock-data --tokenizer-type NullTokenizer --vocab-size 63 --make-vocab-size-divisible-by 4 --num-workers 0
    --micro-batch-size 2 --global-batch-size 8 --lr 1e-2 --lr-decay-style constant --clip-grad 0 --weight-decay 0
    --init-method-std 0.3 --log-interval 1 --eval-interval 1000 --eval-iters 0 --ckpt-format torch_dist
    --transformer-impl local --no-persist-layer-norm --no-gradient-accumulation-fusion --no-masked-softmax-fusion
    """.split()
WITHOUT_DATA = [flag for flag in MODEL if flag != "--mock-data"]
# Decisions that hang around their threshold, so that a step merges and appends: the defaults would do neither here.
UNDECIDED = ["--dmc-init-val", "0.1", "--dmc-temp", "0.5"]
# Runs to compare with others, of a few steps of plain gradient descent.
STEPS = 3
DESCENT = [*["--optimizer", "sgd", "--sgd-momentum", "0", "--train-iters"], STEPS]
# At a target that stays, on soft decisions: rounding moves them a little, and turns none around.
HARD_STAGE = "--dmc-stage finetune --dmc-cr 4 --dmc-no-noise --finetune".split() + UNDECIDED
STAGE = [*HARD_STAGE, "--dmc-no-hard-finetune", "--dmc-no-moving-offset"]

# One step of plain gradient descent moves every weight by its gradient, so equal weights mean equal gradients. Ranks
# add float32 numbers in another order (tensor-parallel sums, micro-batches, stages): 24 bits, a few steps deep.
TOLERANCE = dict(rtol=2e-4, atol=2e-6)

ITERATION = re.compile(r" iteration +(\d+)/ *\d+ \|(.*)")
VALUE = re.compile(r"([a-z_0-9 ]+): ([-+0-9.E]+|nan|inf) \|")


@dataclass
class Run:
    """A finished run: exit code, output, and per iteration the values that its log line shows."""

    code: int
    output: str
    steps: dict[int, dict[str, float]] = field(default_factory=dict)

    def __post_init__(self):
        for found in ITERATION.finditer(self.output):
            self.steps[int(found[1])] = {name.strip(): float(value) for name, value in VALUE.findall(found[2])}

    def values(self, name):
        return [step[name] for _, step in sorted(self.steps.items())]


def _started_with():
    others = ("DMC_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "PYTEST_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(others)}
    path = os.pathsep.join(filter(None, [f"{ROOT}/tests/without", str(ROOT), os.environ.get("PYTHONPATH")]))
    return kept | dict(PYTHONPATH=path, PYTHONWARNINGS="ignore", OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1")


_STARTED_WITH = _started_with()  # later, Megatron has left variables of its own in this process


def environment(**changes):
    return _STARTED_WITH | changes


LAUNCHER = ["-m", "torch.distributed.run", "--standalone"]
WARM = Warm(environment())
"""For `python -m megatron_dmc` on CPUs, of one rank or several; what gets other variables has a process of its own."""


def python(*arguments, input=None, **variables) -> Run:
    """Run `python ARGUMENTS` with environment variables changed."""
    words = [str(word) for word in arguments]
    ranks = 1
    if words[:3] == LAUNCHER:
        ranks, words = int(words[4]), words[5:]
    if words[:2] == ["-m", "megatron_dmc"] and input is None and not variables and not HAVE_GPU:
        return Run(*WARM.run(words[2:], ranks, timeout=600))
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], env=environment(**variables), cwd=ROOT, text=True, timeout=600,
        input=input, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return Run(done.returncode, done.stdout)


def dmc(*arguments, **options) -> Run:
    """Run `python -m megatron_dmc ARGUMENTS`."""
    return python("-m", "megatron_dmc", *arguments, **options)


def launcher(processes):
    if processes == 1:
        return []
    if HAVE_GPU and processes > GPUS:
        pytest.skip(f"needs {processes} GPUs, there is {GPUS}")
    return [*LAUNCHER, "--nproc-per-node", processes]


TRAIN = ("-m", "megatron_dmc", "train")


def train(*flags, processes=1, program=TRAIN, model=MODEL) -> Run:
    """Train the small model with these flags more; fails the test unless the run succeeds."""
    run = python(*launcher(processes), *program, *model, *flags)
    assert run.code == 0, run.output[-6000:]
    return run


def write_documents(prefix, documents) -> list:
    """Flags for data of these documents, lists of the tokens 0 to 61. 62 ends a document. Needs Megatron."""
    import numpy
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.int32)
    for tokens in documents:
        builder.add_document(torch.tensor([*tokens, 62], dtype=torch.int32), [len(tokens) + 1])
    builder.finalize(f"{prefix}.idx")
    return ["--data-path", prefix, "--split", "100,0,0", "--data-cache-path", f"{prefix}-cache"]


def paragraphs() -> list[list[int]]:
    """This project's text, a paragraph a document, a byte a token.

    For runs in bfloat16, which must not learn their data by heart as they do Megatron's mock documents, which all count
    from 1: there the logits of the many tokens that are alike pass the threshold together, and runs part that round
    differently.
    """
    texts = [path.read_text() for path in [ROOT / "README.md", *sorted(ROOT.glob("megatron_dmc/*.py"))]]
    return [[byte % 62 for byte in part.encode()] for text in texts for part in text.split("\n\n") if part]


def saved_arguments(folder):
    from megatron.core import dist_checkpointing

    from megatron_dmc.checkpoint import find_checkpoint

    return dist_checkpointing.load_common_state_dict(str(find_checkpoint(folder)))["args"]


def train_until_killed(*flags, after: str) -> None:
    """Train, and `kill -9` the process when it has printed `after`."""
    command = [sys.executable, "-m", "megatron_dmc", "train", *MODEL, *map(str, flags)]
    with subprocess.Popen(
        command, env=environment(), cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as run:
        seen = []
        for line in run.stdout:
            seen.append(line)
            if after in line:
                run.send_signal(signal.SIGKILL)
                break
        else:
            raise AssertionError("".join(seen)[-6000:])


def weights(checkpoint) -> dict:
    """All tensors of the latest checkpoint under a folder, whatever layout wrote it."""
    from megatron.core import dist_checkpointing

    from megatron_dmc.checkpoint import find_checkpoint

    tensors = dist_checkpointing.load_plain_tensors(str(find_checkpoint(checkpoint)))
    return {name: t for name, t in tensors.items() if name.startswith(("decoder", "embedding", "output_layer"))}


def train_from(base, folder, *flags, processes=1):
    """A few steps of gradient descent from the checkpoint `base`, saved in `folder`: the run and its weights."""
    saved = ["--load", base, "--save", folder, "--save-interval", STEPS]
    return train(*DESCENT, *flags, *saved, processes=processes), weights(folder)


def assert_same_training(run, saved, alone):
    """Of a run and its weights, and of the run and weights that they should equal."""
    expected, expected_weights = alone
    merging = ("compression ratio", "target compression ratio", "compression loss")
    for name in ("lm loss", *(merging if "compression ratio" in expected.steps[1] else ())):
        assert run.values(name) == pytest.approx(expected.values(name), rel=2e-5), name
    assert saved.keys() == expected_weights.keys()
    for name, weight in expected_weights.items():
        torch.testing.assert_close(saved[name], weight, **TOLERANCE, msg=lambda m, name=name: f"{name}: {m}")
