"""The same training in every parallel layout: weights, losses, compression. (test_context_layouts.py has more.)"""

import pytest
import torch
from conftest import HAVE_GPU
from runs import (
    DESCENT,
    HARD_STAGE,
    STAGE,
    STEPS,
    TOLERANCE,
    assert_same_training,
    saved_arguments,
    train,
    train_from,
    weights,
)

pytestmark = pytest.mark.usefixtures("megatron")

LAYOUTS = {
    "TP2": (2, "--tensor-model-parallel-size 2"),
    "PP2": (2, "--pipeline-model-parallel-size 2"),
    "interleaved PP2": (2, "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"),
    "TP2 PP2": (4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"),
    "DP2": (2, ""),
    "one micro-batch": (1, "--micro-batch-size 8"),
    "per-token loss": (1, "--calculate-per-token-loss"),
    "per-token loss DP2": (2, "--calculate-per-token-loss --micro-batch-size 4"),
    "full recomputation": (1, "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"),
    "empty stages": (2, "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Etttt|L"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_train_alike(base, alone, tmp_path, layout):
    processes, flags = LAYOUTS[layout]
    assert_same_training(*train_from(base, tmp_path, *STAGE, *flags.split(), processes=processes), alone)


@pytest.mark.skipif(HAVE_GPU, reason="on GPUs, rounding turns decisions")
def test_hard_decisions_and_their_offset_are_alike(base, tmp_path):
    expected = train_from(base, tmp_path / "alone", *HARD_STAGE)
    offset = saved_arguments(tmp_path / "alone").dmc_init_val
    assert abs(offset - 0.1) > 0.05 and all(1.2 < ratio < 20 for ratio in expected[0].values("compression ratio"))
    for name, layout in (
        ("pipeline", LAYOUTS["interleaved PP2"][1]),
        ("data, recomputed", LAYOUTS["full recomputation"][1]),
        ("context", "--context-parallel-size 2 --cp-comm-type a2a"),
    ):
        run = train_from(base, tmp_path / name, *HARD_STAGE, *layout.split(), processes=2)
        assert_same_training(*run, expected)
        assert saved_arguments(tmp_path / name).dmc_init_val == pytest.approx(offset, abs=1e-9)


def test_the_last_channel_fades_alike(base, tmp_path):
    """Stage zero-out, in which nothing merges, in one process and in layouts of several."""
    stage = ["--dmc-stage", "zero-out", "--finetune"]
    expected, saved = train_from(base, tmp_path / "alone", *stage)
    unfaded = train(*DESCENT, "--load", base, "--finetune")
    assert abs(expected.values("lm loss")[-1] / unfaded.values("lm loss")[-1] - 1) > 1e-3
    for processes, layout in (
        (4, "--tensor-model-parallel-size 2 --context-parallel-size 2 --cp-comm-type all_gather"),
        (2, "--pipeline-model-parallel-size 2"),
    ):
        run = train_from(base, tmp_path / f"{processes}", *stage, *layout.split(), processes=processes)
        assert_same_training(*run, (expected, saved))


def test_the_compared_runs_compress(base, alone, tmp_path):
    """The comparison sees the compression gradient: without it the weights are others."""
    run, saved = alone
    assert all(1.2 < ratio < 3.9 for ratio in run.values("compression ratio"))
    assert all(loss > 0.02 for loss in run.values("compression loss"))
    flags = [flag if flag != 4 else 1 for flag in STAGE]
    flags[flags.index("--dmc-cr") + 1] = 1
    train(*DESCENT, *flags, "--load", base, "--save", tmp_path, "--save-interval", STEPS)
    name = "decoder.layers.self_attention.linear_qkv.weight"
    other = weights(tmp_path)
    name = next(n for n in other if n.endswith("linear_qkv.weight"))
    assert not torch.allclose(other[name], saved[name], **TOLERANCE)


def test_distributed_optimizer(base, tmp_path):
    """Data parallel with the sharded Adam and overlapped communication: losses follow the single process."""
    flags = [*STAGE, "--load", base, "--train-iters", 4, "--lr", "1e-3"]
    single = train(*flags)
    sharded = train(
        *flags, "--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather", processes=2
    )
    for name in ("lm loss", "compression ratio"):
        # Adam divides by the gradient's size, which turns rounding of tiny gradients into steps.
        assert sharded.values(name) == pytest.approx(single.values(name), rel=1e-3)


def test_more_tokens_are_predicted_amid_the_pipeline(tmp_path):
    """A stage between first and last that holds the layers of multi-token prediction: it reads the data as well."""
    more = ["--mtp-num-layers", 1]
    train(*more, "--train-iters", 1, "--save", tmp_path, "--save-interval", 1)
    flags = [*DESCENT, *STAGE, *more, "--load", tmp_path]
    expected = train(*flags)
    layout = ["--pipeline-model-parallel-size", 3, "--pipeline-model-parallel-layout", "Et|tttm|L"]
    run = train(*flags, *layout, processes=3)
    for name in ("lm loss", "mtp_1 loss", "compression ratio"):
        # Of the first step: later ones differ from one process, with DMC and without.
        assert len(run.values(name)) == STEPS and run.values(name)[0] == pytest.approx(
            expected.values(name)[0], rel=2e-5
        )
