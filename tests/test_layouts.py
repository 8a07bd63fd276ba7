"""The same training in every parallel layout: weights, losses, compression and noise."""

import pytest
import torch
from runs import DESCENT, STAGE, STEPS, UNDECIDED, train, weights

pytestmark = pytest.mark.usefixtures("megatron")
# One step of plain gradient descent moves every weight by its gradient, so equal weights mean equal gradients. Ranks
# add float32 numbers in another order (tensor-parallel sums, micro-batches, stages): 24 bits, a few steps deep.
TOLERANCE = dict(rtol=2e-4, atol=2e-6)


@pytest.fixture(scope="module")
def alone(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    run = train(*DESCENT, *STAGE, "--load", base, "--save", folder, "--save-interval", STEPS)
    return run, weights(folder)


def assert_same_training(run, saved, alone):
    expected, expected_weights = alone
    for name in ("lm loss", "compression ratio", "target compression ratio", "compression loss"):
        assert run.values(name) == pytest.approx(expected.values(name), rel=2e-5), name
    assert saved.keys() == expected_weights.keys()
    for name, weight in expected_weights.items():
        torch.testing.assert_close(saved[name], weight, **TOLERANCE, msg=lambda m, name=name: f"{name}: {m}")


NOISY = [flag for flag in STAGE if flag != "--dmc-no-noise"]


def test_noise_does_not_depend_on_the_layout(base, tmp_path):
    """Nor on recomputation: the same random decisions for every head."""

    def trained(folder, *flags, processes=1):
        saved = ["--load", base, "--save", tmp_path / folder, "--save-interval", STEPS]
        return train(*DESCENT, *NOISY, *saved, *flags, processes=processes), weights(tmp_path / folder)

    alone, without = trained("alone"), train(*DESCENT, *STAGE, "--load", base)
    assert alone[0].values("compression ratio") != without.values("compression ratio")
    recomputed = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1".split()
    context = "--context-parallel-size 2 --cp-comm-type a2a".split()
    stages = "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1".split()
    for flags in (["--tensor-model-parallel-size", 2], [*context, *recomputed], stages):
        assert_same_training(*trained(f"{flags[0]}", *flags, processes=2), alone)


LAYOUTS = {
    "TP2": (2, "--tensor-model-parallel-size 2"),
    "PP2": (2, "--pipeline-model-parallel-size 2"),
    "interleaved PP2": (2, "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"),
    "CP2": (2, "--context-parallel-size 2 --cp-comm-type a2a"),
    "CP2 PP2": (4, "--context-parallel-size 2 --cp-comm-type a2a --pipeline-model-parallel-size 2"),
    "CP2 DP2 per-token loss": (4, "--context-parallel-size 2 --cp-comm-type a2a --calculate-per-token-loss"),
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
    run = train(
        *DESCENT,
        *STAGE,
        "--load",
        base,
        "--save",
        tmp_path,
        "--save-interval",
        STEPS,
        *flags.split(),
        processes=processes,
    )
    assert_same_training(run, weights(tmp_path), alone)


def test_a_retrofit_follows_the_single_process(base):
    """Twenty steps of the schedule with Adam and noise: rounding grows, and stays below these bounds."""
    flags = ["--dmc-stage", "retrofit", "--dmc-cr", 4, *UNDECIDED, "--load", base, "--finetune", "--train-iters", 20]
    expected = train(*flags, "--lr", "1e-3")
    assert len(expected.steps) == 20 and max(expected.values("compression loss")) > 0.01
    context = "--context-parallel-size 2 --cp-comm-type a2a"
    for layout in ("--tensor-model-parallel-size 2", context):
        run = train(*flags, "--lr", "1e-3", *layout.split(), "--pipeline-model-parallel-size", 2, processes=4)
        assert run.values("lm loss") == pytest.approx(expected.values("lm loss"), rel=2e-4), layout
        assert run.values("compression ratio") == pytest.approx(expected.values("compression ratio"), rel=2e-3), layout


def test_experts_train_alike(tmp_path):
    """A mixture of experts, its experts shared out, with and without context parallelism."""
    experts = "--num-experts 4 --moe-router-topk 2 --moe-router-load-balancing-type none".split()
    train(*experts, "--train-iters", 1, "--save", tmp_path / "base", "--save-interval", 1)

    def trained(folder, *flags, processes=1):
        saved = ["--load", tmp_path / "base", "--save", tmp_path / folder, "--save-interval", STEPS]
        return train(*DESCENT, *STAGE, *experts, *saved, *flags, processes=processes), weights(tmp_path / folder)

    alone = trained("alone")
    shared = ["--expert-model-parallel-size", 2]
    assert_same_training(*trained("EP2", *shared, processes=2), alone)
    context = "--context-parallel-size 2 --cp-comm-type a2a".split()
    assert_same_training(*trained("EP2 CP2", *shared, *context, processes=2), alone)


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


def test_another_layout_goes_on(base, tmp_path):
    """With noise and Adam: begun in one layout, gone on with in others, and as if in one process throughout."""
    flags = ["--dmc-stage", "retrofit", "--dmc-cr", 4, *UNDECIDED, "--train-iters", 9, "--lr", "1e-3"]
    whole = train(*flags, "--load", base, "--finetune")
    saved = ["--save", tmp_path, "--save-interval", 3]
    layouts = (
        ["--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2],
        ["--context-parallel-size", 2, "--cp-comm-type", "a2a"],
        [],
    )
    for part, (layout, processes) in enumerate(zip(layouts, (4, 2, 1), strict=True)):
        begin = ["--load", tmp_path] if part else ["--load", base, "--finetune"]
        run = train(*flags, *begin, *saved, *layout, "--exit-interval", 3 * part + 3, processes=processes)
        assert sorted(run.steps) == [3 * part + 1, 3 * part + 2, 3 * part + 3]
        last = 3 * part + 3  # Megatron counts the first step of a run again in its second line
        for name, tolerance in (("lm loss", 2e-4), ("compression ratio", 2e-3)):
            assert run.steps[last][name] == pytest.approx(whole.steps[last][name], rel=tolerance), (layout, name)
