"""The same training with context parallelism: weights, losses, compression and noise; and experts."""

import pytest
from runs import DESCENT, MODEL, STAGE, STEPS, assert_same_training, launcher, python, train, train_from, weights

pytestmark = pytest.mark.usefixtures("megatron")

NOISY = [flag for flag in STAGE if flag != "--dmc-no-noise"]


def test_noise_does_not_depend_on_the_layout(base, alone, tmp_path):
    """Nor on recomputation: the same random decisions for every head."""
    without, _ = alone

    def trained(folder, *flags, processes=1):
        saved = ["--load", base, "--save", tmp_path / folder, "--save-interval", STEPS]
        return train(*DESCENT, *NOISY, *saved, *flags, processes=processes), weights(tmp_path / folder)

    noisy = trained("alone")
    assert noisy[0].values("compression ratio") != without.values("compression ratio")
    recomputed = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1".split()
    context = "--context-parallel-size 2 --cp-comm-type a2a".split()
    stages = "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1".split()
    for flags in (["--tensor-model-parallel-size", 2], [*context, *recomputed], stages):
        assert_same_training(*trained(f"{flags[0]}", *flags, processes=2), noisy)


LAYOUTS = {
    "CP2": (2, "--context-parallel-size 2 --cp-comm-type a2a"),
    "CP2 PP2": (4, "--context-parallel-size 2 --cp-comm-type a2a --pipeline-model-parallel-size 2"),
    "CP2 DP2 per-token loss": (4, "--context-parallel-size 2 --cp-comm-type a2a --calculate-per-token-loss"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_train_alike(base, alone, tmp_path, layout):
    processes, flags = LAYOUTS[layout]
    assert_same_training(*train_from(base, tmp_path, *STAGE, *flags.split(), processes=processes), alone)


GATHERED = "--context-parallel-size 2 --cp-comm-type all_gather".split()


def test_gathered_context(base, tmp_path):
    """Also with fewer KV heads on a rank than ranks that share out tokens, which all-to-all has no use for."""

    def trained(folder, *flags, processes=1):
        saved = ["--load", base, "--save", tmp_path / folder, "--save-interval", STEPS, "--dmc-window-size", 5]
        return train(*DESCENT, *NOISY, *saved, *flags, processes=processes), weights(tmp_path / folder)

    alone = trained("alone")
    recomputed = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1".split()
    assert_same_training(*trained("CP2", *GATHERED, *recomputed, processes=2), alone)
    shared = ["--tensor-model-parallel-size", 2, "--calculate-per-token-loss"]
    assert_same_training(*trained("TP2 CP2", *GATHERED, *shared, processes=4), alone)


def test_gathered_context_has_no_room_for_unlimited_windows(base):
    run = python(*launcher(2), "-m", "megatron_dmc", "train", *MODEL, *STAGE, *GATHERED, "--dmc-window-size", 0)
    assert run.code != 0 and "--dmc-window-size 0: with --cp-comm-type all_gather, a window is at least 1" in run.output


def test_experts_train_alike(tmp_path):
    """A mixture of experts, its experts shared out, and the tokens of sequences as well."""
    experts = "--num-experts 4 --moe-router-topk 2 --moe-router-load-balancing-type none".split()
    train(*experts, "--train-iters", 1, "--save", tmp_path / "base", "--save-interval", 1)

    def trained(folder, *flags, processes=1):
        saved = ["--load", tmp_path / "base", "--save", tmp_path / folder, "--save-interval", STEPS]
        return train(*DESCENT, *STAGE, *experts, *saved, *flags, processes=processes), weights(tmp_path / folder)

    alone = trained("alone")
    shared = "--expert-model-parallel-size 2 --context-parallel-size 2 --cp-comm-type a2a".split()
    assert_same_training(*trained("EP2 CP2", *shared, processes=2), alone)
