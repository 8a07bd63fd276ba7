"""DMC in Megatron's own training loop: stages, resumption, the stock-script route, and what the log shows."""

import math
import os
import shutil
import warnings
from argparse import ArgumentParser
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from conftest import HAVE_GPU
from runs import (
    DESCENT,
    HARD_STAGE,
    MODEL,
    STAGE,
    STEPS,
    UNDECIDED,
    WITHOUT_DATA,
    dmc,
    paragraphs,
    python,
    saved_arguments,
    train,
    train_until_killed,
    weights,
    write_documents,
)

from megatron_dmc.compression import GAIN
from megatron_dmc.config import AS_PUBLISHED, STAGES, DMCConfig, DMCError, add_flags
from megatron_dmc.resume import damage, superseded

pytestmark = pytest.mark.usefixtures("megatron")

MOVE = GAIN * DMCConfig().dmc_noise_scale


def test_stages_follow_one_another(base, tmp_path):
    """Zero-out leaves zeroed rows; retrofit follows the schedule; finetune holds the target."""
    short = ["--train-iters", 4, "--save-interval", 4]
    zero_out = [*short, "--dmc-stage", "zero-out", "--load", base, "--finetune", "--save"]
    run = train(*zero_out, tmp_path / "published", "--dmc-no-zero-decisions")
    assert run.steps[4]["last channel"] == pytest.approx(1 - 3 / 4 / 0.8, abs=1e-6)
    train(*zero_out, tmp_path / "zero")
    heads = range(2)  # KV heads of (2 queries, key, value) of 8
    queries, keys = [g * 32 + h * 8 + 7 for g in heads for h in range(2)], [g * 32 + 23 for g in heads]
    for when, zeros in ((base, []), (tmp_path / "zero", queries + keys), (tmp_path / "published", queries)):
        qkv = {n: w for n, w in weights(when).items() if n.endswith("linear_qkv.weight")}
        assert qkv
        for weight in qkv.values():
            for layer in weight.flatten(0, -3) if weight.dim() > 2 else weight[None]:
                assert layer.shape[0] == 64
                assert sorted(zeros) == (layer == 0).all(1).nonzero().flatten().tolist()
                assert (layer == 0).sum() == len(zeros) * layer.shape[1]

    run = train(
        *short, *["--dmc-stage", "retrofit", "--dmc-cr", "4"], *UNDECIDED, "--load", tmp_path / "zero",
        "--finetune", "--save", tmp_path / "retrofit", "--tensorboard-dir", tmp_path / "tensorboard",
        "--tensorboard-log-interval", 1,
    )  # fmt: skip
    assert "run the stage zero-out first" not in run.output
    # Megatron's log averages since the last line, and its first line's values count again in the second.
    assert run.steps[1]["target compression ratio"] == 1 and run.steps[4]["target compression ratio"] == 3.25
    ratio, target = run.steps[4]["compression ratio"], run.steps[4]["target compression ratio"]
    assert run.steps[4]["compression loss"] == pytest.approx(max(0, 1 / ratio - 1 / target), abs=1e-5)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for name in ("compression loss", "compression ratio", "target compression ratio"):
        assert [e.step for e in events.Scalars(name)] == [1, 2, 3, 4]
    layers = [events.Scalars(f"compression ratio by layer/{i:03d}")[-1].value for i in range(1, 5)]
    assert 1 / (sum(1 / r for r in layers) / 4) == pytest.approx(
        ratio, rel=1e-5
    )  # heads and tokens are equal in number

    run = train(
        *short, *["--dmc-stage", "finetune", "--dmc-cr", "4"], *UNDECIDED, "--load", tmp_path / "retrofit", "--finetune"
    )
    assert set(run.values("target compression ratio")) == {4.0}


def test_retrofit_warns_of_a_model_that_skipped_zero_out(base, tmp_path):
    warnings = ["run the stage zero-out first", "stage zero-out with dmc_zero_decisions"]

    def found(begin, *flags):
        command = ["-m", "megatron_dmc", "train", *MODEL, "--train-iters", 1, "--dmc-stage", "retrofit", "--finetune"]
        run = python("-W", "default", *command, "--load", begin, *flags, PYTHONWARNINGS="default")
        assert run.code == 0
        return [text for text in warnings if text in run.output]

    assert found(base) == warnings[:1]
    zero_out = ["--dmc-stage", "zero-out", "--train-iters", 1, "--save-interval", 1, "--load", base, "--finetune"]
    train(*zero_out, "--save", tmp_path / "published", "--dmc-no-zero-decisions")
    train(*zero_out, "--save", tmp_path / "zero")
    assert found(tmp_path / "published") == warnings[1:]
    assert found(tmp_path / "published", "--dmc-no-zero-decisions") == found(tmp_path / "zero") == []


@pytest.mark.parametrize(
    ("stage", "moment"),
    [
        ("retrofit", "successfully saved checkpoint from iteration       2"),
        ("retrofit", "saving checkpoint at iteration       4"),
        ("finetune", "successfully saved checkpoint from iteration       4"),
    ],
)
def test_killed_and_resumed_is_never_stopped(base, tmp_path, stage, moment):
    """With noise, or an offset that moves, across `kill -9`, also within a save: every later step's values, the weights
    and the offset, bit for bit."""
    flags = ["--dmc-stage", stage, "--dmc-cr", 4, *UNDECIDED]
    flags += ["--train-iters", 8, "--save-interval", 2, "--lr", "1e-2"]
    whole = train(*flags, "--load", base, "--finetune", "--save", tmp_path / "whole")
    train_until_killed(*flags, "--load", base, "--finetune", "--save", tmp_path / "cut", after=moment)
    rest = train(*flags, "--load", tmp_path / "cut", "--save", tmp_path / "cut")
    # From the last checkpoint that was whole: the run may have come further before the signal did.
    assert sorted(rest.steps) in (list(range(first, 9)) for first in (3, 5, 7))
    # A GPU adds the gradients of an embedding in any order.
    allowed = dict(rtol=1e-3, atol=1e-4) if HAVE_GPU else dict(rtol=0, atol=0)
    for name in ("lm loss", "compression ratio", "compression loss"):
        # Megatron counts the first step of a run again in its second line, so the last line is always one to compare.
        assert rest.steps[8][name] == pytest.approx(whole.steps[8][name], rel=allowed["rtol"], abs=0), name
    later = whole.values("grad norm")[-len(rest.steps) :]
    assert rest.values("grad norm") == pytest.approx(later, rel=allowed["rtol"], abs=0)
    expected = weights(tmp_path / "whole")
    for name, weight in weights(tmp_path / "cut").items():
        torch.testing.assert_close(weight, expected[name], **allowed)
    offsets = [saved_arguments(tmp_path / name).dmc_init_val for name in ("whole", "cut")]
    assert offsets[0] != 0.1
    assert offsets[0] == pytest.approx(offsets[1], rel=allowed["rtol"], abs=0)


def test_offset_of_the_finetune_stage(base, tmp_path):
    """It moves by what the share of merged tokens is off, what is saved has it, and another stage begins with it."""
    flags = ["--dmc-cr", 4, *UNDECIDED, "--finetune"]
    first, second = tmp_path / "first", tmp_path / "second"
    run = train(
        "--dmc-stage", "finetune", *flags, "--train-iters", 1, "--load", base, "--save", first, "--save-interval", 1
    )
    found = saved_arguments(first).dmc_init_val
    assert found == pytest.approx(0.1 + MOVE * (1 - 1 / run.steps[1]["compression ratio"] - 0.75), abs=1e-6)
    assert abs(found - 0.1) > 0.01
    for more in ([], STAGE[-2:]):
        run = train(
            "--dmc-stage", "finetune", *flags, *more, "--train-iters", 1, "--lr", 0, "--load", first, "--save", second,
            "--save-interval", 1,
        )  # fmt: skip
        assert f"> DMC's offset is the checkpoint's, {found}, not 0.1" in run.output
        moved = MOVE * (1 - 1 / run.steps[1]["compression ratio"] - 0.75)
        assert saved_arguments(second).dmc_init_val == pytest.approx(found + (0 if more else moved), abs=1e-6)
        shutil.rmtree(second)


def test_checkpoints_cut_off_are_passed_over(base, tmp_path):
    """A run goes on from the one before, and says so; a stage does not begin from another than the one named."""
    flags = ["--dmc-stage", "retrofit", "--dmc-cr", 4, *UNDECIDED, "--train-iters", 6, "--save-interval", 2]
    whole = train(*flags, "--load", base, "--finetune", "--save", tmp_path)
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    tracker.write_text("4")
    shutil.rmtree(tmp_path / "iter_0000006")
    assert damage(tmp_path / "iter_0000004") is None
    largest = max((tmp_path / "iter_0000004").glob("*.distcp"), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)

    command = ["-m", "megatron_dmc", "train", *MODEL, *flags, "--load", tmp_path]
    run = python(*command, "--finetune")
    assert run.code != 0 and f"{largest.name} has" in run.output and "add --ckpt-step 2" in run.output
    saving = ["--save", tmp_path, "--save-retain-interval", 4]  # with that, Megatron reads the tracker as it saves
    for text, about, more in (("4", f"{largest.name} has", []), ("", "_iteration.txt holds ''", saving)):
        tracker.write_text(text)
        run = python(*command, *more)
        assert run.code == 0 and sorted(run.steps) == [3, 4, 5, 6], run.output[-6000:]
        assert "WARNING: going on from iteration 2, the latest checkpoint that is whole" in run.output
        assert about in run.output
        assert run.steps[6]["lm loss"] == pytest.approx(whole.steps[6]["lm loss"], rel=1e-3 if HAVE_GPU else 0, abs=0)
    assert tracker.read_text() == "6" and damage(tmp_path / "iter_0000006") is None

    for folder in tmp_path.glob("iter_*"):
        (folder / "common.pt").write_bytes(b"PK")
        assert damage(folder) == "common.pt is cut off"
        (folder / "common.pt").unlink()
        kept = (folder / "metadata.json").read_bytes()
        (folder / "metadata.json").write_bytes(kept[: len(kept) // 2])
        assert damage(folder) is not None
        (folder / "metadata.json").write_bytes(kept)
        assert damage(folder) is None
        os.truncate(folder / ".metadata", 100)
        assert damage(folder) is not None
    run = python(*command)
    assert run.code != 0 and f"no checkpoint in {tmp_path} is whole" in run.output


def test_checkpoints_of_the_old_format_are_loaded(tmp_path):
    """Megatron sees by itself what a checkpoint is; what it says of its own lengths is no business of theirs."""
    train("--train-iters", 1, "--ckpt-format", "torch", "--save", tmp_path, "--save-interval", 1)
    run = train("--train-iters", 2, "--dmc-stage", "zero-out", "--load", tmp_path, "--finetune")
    assert len(run.steps) == 2


def test_resuming_takes_up_the_merge_rate(base, tmp_path):
    """The first step after resuming feels the loss as the step before left it, not as a new stage does."""
    run = train(*DESCENT, *STAGE, "--load", base, "--save", tmp_path, "--save-interval", STEPS)
    args = saved_arguments(tmp_path)
    assert args.dmc_merge_rate == pytest.approx(1 - 1 / run.steps[STEPS]["compression ratio"], rel=1e-5)
    assert (args.dmc_stage, args.dmc_cr) == ("finetune", 4.0)


def test_a_stage_goes_on_with_its_own_settings_alone(monkeypatch):
    from megatron.training import global_vars

    from megatron_dmc.megatron_hooks import _check_checkpoint_args

    finetune, retrofit, zero_out = (
        vars(add_flags(ArgumentParser()).parse_args(["--dmc-stage", x])) for x in STAGES[::-1]
    )
    soft = finetune | dict(dmc_hard_finetune=False)
    for ours, saved, message in (
        (finetune, dict(dmc_window_size=8), "dmc_window_size 8; got 12"),
        (finetune, dict(dmc_hard_finetune=False), "dmc_hard_finetune False; got True"),
        (finetune, AS_PUBLISHED, "dmc_hard_finetune False, dmc_noise_scale 1.0; got True, 0.5: go on with "
                                 "--dmc-no-hard-finetune --dmc-noise-scale 1.0$"),
        (soft, AS_PUBLISHED, "dmc_moving_offset False, dmc_temp 0.1, dmc_noise_scale 1.0; got True, 0.15, 0.5"),
        (retrofit, AS_PUBLISHED, "dmc_moving_offset False, dmc_temp 0.1, dmc_hard_steps 0.0, dmc_noise_scale 1.0; "
                                 "got True, 0.15, 0.5, 0.5"),
        (retrofit | dict(dmc_moving_offset=False), dict(dmc_moving_offset=True, dmc_temp=0.1),
         "dmc_moving_offset True, dmc_temp 0.1; got False, 0.15: go on with --dmc-temp 0.1, without "
         "--dmc-no-moving-offset$"),
        (retrofit, dict(dmc_hard_steps=0.25), "dmc_hard_steps 0.25; got 0.5"),
        (retrofit, dict(dmc_temp=0.1), "dmc_temp 0.1; got 0.15"),
        (retrofit, dict(dmc_noise_scale=1.0), "dmc_noise_scale 1.0; got 0.5"),
        (finetune, dict(dmc_noise_scale=1.0), "dmc_noise_scale 1.0; got 0.5"),
        (zero_out, dict(dmc_zero_decisions=False), "dmc_zero_decisions False; got True"),
    ):  # fmt: skip
        monkeypatch.setattr(global_vars, "get_args", lambda ours=ours: SimpleNamespace(**ours))
        with pytest.raises(DMCError, match=f"the checkpoint was trained with {message}"):
            _check_checkpoint_args(lambda *_: None, SimpleNamespace(**ours | saved))
    for ours, others in (
        (finetune, dict(dmc_moving_offset=False, dmc_hard_steps=0.25, dmc_temp=0.1, dmc_zero_decisions=False)),
        (zero_out, dict(AS_PUBLISHED, dmc_zero_decisions=True)),
    ):  # none is of this stage
        monkeypatch.setattr(global_vars, "get_args", lambda ours=ours: SimpleNamespace(**ours))
        _check_checkpoint_args(lambda *_: None, SimpleNamespace(**ours | others))


def test_a_stage_is_warned_of_settings_that_its_checkpoint_did_not_learn_for(monkeypatch):
    """An offset is taken up that was learned with them."""
    from megatron.training import global_vars

    from megatron_dmc.megatron_hooks import _load_base_checkpoint

    retrofit, finetune = (
        vars(add_flags(ArgumentParser()).parse_args(["--dmc-stage", x])) for x in ("retrofit", "finetune")
    )

    def warned(saved: dict, ours: dict) -> list[str]:
        monkeypatch.setattr(global_vars, "get_args", lambda: SimpleNamespace(**ours))
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            _load_base_checkpoint(lambda: (dict(args=SimpleNamespace(**saved)),))
        return [str(warning.message) for warning in found if issubclass(warning.category, UserWarning)]

    learned = "the decisions of the checkpoint were learned with"
    assert warned(retrofit, finetune) == []
    assert warned(retrofit | AS_PUBLISHED, finetune) == [
        f"{learned} --dmc-noise-scale 1.0, this run is with --dmc-noise-scale 0.5"
    ]
    assert warned(retrofit, finetune | dict(dmc_window_size=24)) == [
        f"{learned} --dmc-window-size 12, this run is with --dmc-window-size 24"
    ]
    assert warned(retrofit | dict(dmc_temp=0.1), finetune) == []  # hard decisions have none
    assert warned(retrofit | dict(dmc_temp=0.1), finetune | dict(dmc_hard_finetune=False)) == [
        f"{learned} --dmc-temp 0.1, this run is with --dmc-temp 0.15"
    ]
    assert warned(retrofit | dict(dmc_stage="zero-out", dmc_noise_scale=1.0), retrofit) == []  # which has learned none


def test_what_a_checkpoint_brings_holds_before_training_begins(monkeypatch):
    """In a run that only evaluates, and in one that saves without a step."""
    from megatron.core import utils
    from megatron.training import global_vars

    from megatron_dmc import megatron_hooks
    from megatron_dmc.compression import Compression

    args = SimpleNamespace(dmc_init_val=4.2, dmc_merge_rate=0.7, iteration=5, train_iters=8, save=None)
    monkeypatch.setattr(global_vars, "get_args", lambda: args)
    for wrapper in (megatron_hooks._evaluate, megatron_hooks._save_checkpoint):
        compression = Compression(DMCConfig(dmc_stage="finetune"), 1, 1)
        monkeypatch.setattr(utils, "get_model_config", lambda _, c=compression: SimpleNamespace(dmc_compression=c))
        seen = []

        def look(*_, seen=seen, compression=compression, **__):
            seen.append((compression.offset, compression.merge_rate, args.dmc_init_val, args.dmc_merge_rate))

        if wrapper is megatron_hooks._evaluate:
            wrapper(look, None, None, [None])
        else:
            wrapper(look, 5, [None])
        assert seen == [(4.2, 0.7, 4.2, 0.7)]


def test_a_step_that_megatron_will_repeat_leaves_no_trace(monkeypatch):
    from megatron.core import utils
    from megatron.training import global_vars

    from megatron_dmc import megatron_hooks
    from megatron_dmc.compression import Compression

    args = SimpleNamespace(dmc_init_val=4.2, dmc_merge_rate=0.7, curr_iteration=5, train_iters=8)
    monkeypatch.setattr(global_vars, "get_args", lambda: args)
    compression = Compression(DMCConfig(dmc_stage="finetune"), 1, 1)
    monkeypatch.setattr(utils, "get_model_config", lambda _: SimpleNamespace(dmc_compression=compression))
    model = [torch.nn.Module()]

    def step(exits):
        compression._add(0, torch.device("cpu"), merged=1.0, tokens=10)
        megatron_hooks._finalize_model_grads(lambda _: None, model)
        assert compression._counts is None  # reduced before the optimizer
        return {}, exits, True, exits, 16 if exits else None, None, None, 0

    for exits in (True, False):
        megatron_hooks._train_step(lambda *_, exits=exits, **__: step(exits), None, None, model, None)
        expected = (4.2, 0.7) if exits else (4.2 + MOVE * (0.1 - 0.75), 0.1)
        assert (compression.offset, float(compression.merge_rate)) == pytest.approx(expected)


def test_finetune_warns_of_a_model_that_has_learned_no_decisions(base):
    command = ["-m", "megatron_dmc", "train", *MODEL, "--train-iters", 1, "--dmc-stage", "finetune", "--load", base]
    run = python("-W", "default", *command, "--finetune", PYTHONWARNINGS="default")
    assert run.code == 0 and "the checkpoint that it begins from has learned none" in run.output


def test_megatron_without_its_compiled_helpers(monkeypatch):
    from megatron_dmc import megatron_hooks

    monkeypatch.setattr(megatron_hooks.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(DMCError, match="has neither compiled dataset helpers nor their Makefile; reinstall it"):
        megatron_hooks.keep_compiled_helpers()


def test_the_last_two_whole_checkpoints_are_kept(base, tmp_path):
    """With those to retain; one that was cut off is none of the two."""
    flags = ["--dmc-stage", "retrofit", *UNDECIDED, "--save-interval", 1, "--save-retain-interval", 3]
    flags += ["--load", base, "--finetune", "--save", tmp_path]
    run = train(*flags, "--train-iters", 6)
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == [f"iter_{i:07d}" for i in (3, 5, 6)]
    assert run.output.count("two later checkpoints are whole") == 3
    for i in (7, 8, 9, 10, 12):
        shutil.copytree(tmp_path / "iter_0000005", tmp_path / f"iter_{i:07d}")
    (tmp_path / "iter_0000004").symlink_to(tmp_path / "iter_0000003")
    for cut_off, tracker, expected in (
        (None, "10", 8), (None, "8", None), (None, "7", 5), (None, "6", None), (None, "", None),
        (None, "release", None), (10, "10", 7), (9, "12", 7), (6, "7", None),
    ):  # fmt: skip
        for file in (tmp_path / f"iter_{cut_off or 0:07d}").glob("*.distcp"):
            os.truncate(file, 10)
        (tmp_path / "latest_checkpointed_iteration.txt").write_text(tracker)
        found = superseded(tmp_path, 3)
        assert (found and int(found.name[5:])) == expected, (cut_off, tracker)


def test_a_retrofitted_model_is_a_model_of_megatron(base, tmp_path):
    """DMC's checkpoint opens in a run without DMC, every weight, and trains on there."""
    train(*DESCENT, *STAGE, "--load", base, "--save", tmp_path / "dmc", "--save-interval", STEPS)
    vanilla = ["--load", tmp_path / "dmc", "--finetune", "--save", tmp_path / "vanilla", "--save-interval", 1]
    run = train("--train-iters", 1, "--lr", "0", "--optimizer", "sgd", *vanilla)
    assert math.isfinite(run.steps[1]["lm loss"]) and "compression ratio" not in run.steps[1]
    expected, found = weights(tmp_path / "dmc"), weights(tmp_path / "vanilla")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_stock_script(base, tmp_path):
    """A script that knows nothing of DMC trains with it by `--spec`, settings from YAML, as our command does."""
    settings = tmp_path / "dmc.yaml"
    settings.write_text("dmc_stage: finetune\ndmc_cr: 4\ndmc_init_val: 0.1\n")
    launch = "torch.distributed.run --nproc-per-node 1" if HAVE_GPU else "megatron_dmc.cpu"
    script = ["-m", *launch.split(), "tests/stock_pretrain.py"]
    flags = [*DESCENT, "--finetune", "--load", base, "--spec", "megatron_dmc.spec", "dmc_layer_spec"]
    run = python(
        *script, *MODEL, *flags, "--save", tmp_path / "stock", "--save-interval", STEPS, DMC_CONFIG=str(settings)
    )
    assert run.code == 0, run.output[-6000:]
    save = ["--save", tmp_path / "ours", "--save-interval", STEPS]
    ours = train(*DESCENT, *HARD_STAGE, "--load", base, "--split", "90,5,5", *save)
    for name in ("lm loss", "compression ratio", "compression loss"):
        assert run.values(name) == pytest.approx(ours.values(name), rel=1e-6), name
    offsets = [saved_arguments(tmp_path / name).dmc_init_val for name in ("stock", "ours")]
    assert offsets[0] == pytest.approx(offsets[1], rel=1e-6) and offsets[0] != 0.1

    settings.write_text("dmc_stage: finetune\ndmc_ratio: 4\n")
    run = python(*script, *MODEL, *flags, DMC_CONFIG=str(settings))
    assert run.code != 0 and "unknown keys: dmc_ratio" in run.output
    run = python(*script, *MODEL, *flags)
    assert run.code != 0 and "set DMC_CONFIG to a YAML file" in run.output


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--dmc-stage retrofit --dmc-cr 0.5", "dmc_cr must be a compression ratio of at least 1; got 0.5"),
        ("--dmc-stage retrofit --load /nowhere --finetune", "no checkpoint in --load /nowhere"),
        ("--dmc-stage retrofit --attention-dropout 0.1", "attention_dropout = 0.1 (set it to 0"),
        (
            "--dmc-stage retrofit --reset-attention-mask --no-create-attention-mask-in-dataloader",
            "--reset-attention-mask needs the data loader's masks",
        ),
        ("--dmc-stage retrofit --sft", "--sft needs the data sets of Megatron's own pretrain_gpt.py"),
        ("--dmc-stage retrofit --spec local local", "leave one of them out"),
        ("--dmc-stage compress", "one of zero-out, retrofit, finetune"),
    ],
)
def test_mistakes_are_named(flags, message):
    run = dmc("train", *MODEL, "--train-iters", 1, *flags.split())
    assert run.code != 0
    assert message in run.output, run.output[-3000:]
    assert "Traceback" not in run.output.split("megatron-dmc train:")[-1]


def test_documents_of_a_plain_model_under_context_parallelism_are_refused():
    flags = "--dataloader-inter-document-masking --context-parallel-size 2 --transformer-impl transformer_engine"
    run = dmc("train", *MODEL, "--train-iters", 1, *flags.split(), WORLD_SIZE="2")
    assert run.code != 0
    assert "own attention expects every document shared out by itself" in run.output, run.output[-3000:]


def test_a_stage_begins_with_finetune(base):
    run = dmc("train", *MODEL, "--train-iters", 2, "--dmc-stage", "zero-out", "--load", base)
    assert run.code != 0 and "add --finetune to begin the stage from its weights" in run.output


def test_flags_of_another_model_are_warned_of(base):
    """Its weights load, and Megatron says nothing."""
    flags = ["--train-iters", 1, "--dmc-stage", "zero-out", "--load", base, "--finetune"]
    warning = "WARNING: the checkpoint is of another model than this run's: "
    assert warning not in train(*flags).output
    other = train(*flags, "--rotary-base", 500000, "--norm-epsilon", 1e-6)
    assert f"{warning}layernorm_epsilon 1e-05, here 1e-06; rotary_base 10000, here 500000. Unless" in other.output


@pytest.mark.gpu
def test_transformer_engine_stages(tmp_path):
    """The three stages with the Transformer Engine spec in bf16."""
    pytest.importorskip("transformer_engine")
    flags = [f for f in MODEL if f != "--no-persist-layer-norm"]
    flags[flags.index("local")] = "transformer_engine"
    flags[flags.index("--hidden-size") + 1] = "128"
    run = dmc("train", *flags, "--bf16", "--train-iters", 2, "--save", tmp_path / "base", "--save-interval", 2)
    assert run.code == 0, run.output[-6000:]
    start = "base"
    for stage in ("zero-out", "retrofit", "finetune"):
        run = dmc(
            "train", *flags, "--bf16", *UNDECIDED, "--train-iters", 4, "--dmc-stage", stage,
            "--load", tmp_path / start, "--finetune", "--save", tmp_path / stage, "--save-interval", 4,
        )  # fmt: skip
        assert run.code == 0, run.output[-6000:]
        assert all(math.isfinite(loss) for loss in run.values("lm loss"))
        start = stage
    assert os.path.isdir(tmp_path / "finetune" / "iter_0000004")


@pytest.mark.gpu
def test_training_on_the_kernels_follows_the_reference(megatron, tmp_path):
    """The same noise, data and weights: losses and ratios of a retrofit stay together in bfloat16.

    For 30 steps on soft decisions; as by default for ten, after which hard ones that rounding turns add up.
    """
    flags = """--num-layers 2 --hidden-size 256 --num-attention-heads 4 --num-query-groups 2 --seq-length 512
        --max-position-embeddings 512 --transformer-impl transformer_engine --bf16 --init-method-std 0.05 --lr 2e-4
        --train-iters 30 --dmc-stage retrofit --dmc-cr 4 --dmc-init-val 0.3 --dmc-temp 0.3""".split()
    flags += write_documents(tmp_path / "text", paragraphs())
    recomputed = ["--recompute-granularity", "selective", "--recompute-modules", "core_attn"]
    kernels = {kernel: ["--dmc-kernel", kernel] for kernel in ("reference", "auto", "flash")}
    settings = {
        "soft": ["--dmc-hard-steps", "0", "--dmc-no-moving-offset"],
        "default": ["--exit-interval", "10"],
    }
    asked = {
        (setting, name): [*more, *settings[setting]]
        for setting in settings
        for name, more in (kernels | {"selective recomputation": recomputed}).items()
    }

    def run(names):
        cache = ["--data-cache-path", tmp_path / " ".join(names)]
        return train(*flags, *cache, *asked[names], model=WITHOUT_DATA)

    with ThreadPoolExecutor(len(asked)) as pool:  # most of their time is start-up
        runs = dict(zip(asked, pool.map(run, asked), strict=True))
    assert "DMC attention runs on: cudnn" in runs["soft", "auto"].output
    for setting, steps in (("soft", 30), ("default", 10)):
        expected = runs[setting, "reference"]
        assert len(expected.steps) == steps
        assert max(expected.values("compression ratio")) > 1.5
        for name in ("auto", "flash", "selective recomputation"):
            for value, tolerance in (("lm loss", 0.002), ("compression ratio", 0.01)):
                ours, theirs = runs[setting, name].values(value), expected.values(value)
                errors = [abs(a / b - 1) for a, b in zip(ours, theirs, strict=True)]
                print(setting, name, value, "differs by step:", [f"{error:.0e}" for error in errors])
                assert max(errors) < tolerance, f"{setting}, {name}, {value}: {ours} for {theirs}"
