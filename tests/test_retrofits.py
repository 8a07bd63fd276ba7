"""Longer runs with Adam and noise: in other layouts, and from one layout to another."""

import pytest
from runs import UNDECIDED, saved_arguments, train

pytestmark = pytest.mark.usefixtures("megatron")


def test_a_retrofit_follows_the_single_process(base, tmp_path):
    """Twelve steps of the schedule with Adam and noise: rounding grows, and stays below these bounds."""
    flags = ["--dmc-stage", "retrofit", "--dmc-cr", 4, *UNDECIDED, "--load", base, "--finetune", "--train-iters", 12]
    flags += ["--dmc-window-size", 5]  # a chunk of all_gather has 6 tokens
    flags += ["--lr", "1e-3", "--save-interval", 12, "--save"]
    expected = train(*flags, tmp_path / "alone")
    multiplier = saved_arguments(tmp_path / "alone").dmc_multiplier
    assert len(expected.steps) == 12 and max(expected.values("compression loss")) > 0.01
    grid = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"
    context = "--context-parallel-size 2 --cp-comm-type"
    for layout, processes in ((grid, 4), (f"{context} a2a", 2), (f"{context} all_gather", 2)):
        folder = tmp_path / layout.replace(" ", "")
        run = train(*flags, folder, *layout.split(), processes=processes)
        assert run.values("lm loss") == pytest.approx(expected.values("lm loss"), rel=2e-4), layout
        assert run.values("compression ratio") == pytest.approx(expected.values("compression ratio"), rel=2e-3), layout
        assert saved_arguments(folder).dmc_multiplier == pytest.approx(multiplier, rel=0.02), layout


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
