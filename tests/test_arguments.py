"""Megatron's arguments where there is no GPU, and the model that they describe."""

from types import SimpleNamespace

import pytest
from runs import MODEL

from megatron_dmc.arguments import as_on_hopper, gpt_config, parse
from megatron_dmc.commands import train
from megatron_dmc.config import DMCError


def test_the_model_of_arguments(megatron):
    """Megatron 0.19.2 leaves the scaling factor of rotary positions out."""
    args = parse([*MODEL, *"--use-rope-scaling --rope-scaling-factor 32 --no-rope-fusion".split()], 4, "these")
    assert (args.rank, args.world_size, args.data_parallel_size) == (0, 4, 4)
    args.padded_vocab_size = 64
    with as_on_hopper("these"):
        config = gpt_config(args)
        assert config.rope_scaling and config.rope_scaling_factor == 32
        del args.rope_scaling_factor  # of a checkpoint from before there was one
        assert gpt_config(args).rope_scaling_factor == 8


def test_refusals_tell_whose_arguments(megatron):
    for flags, ranks, message in (
        (["--rotary-bass", "1"], 1, "Megatron has no such arguments: unrecognized arguments: --rotary-bass 1"),
        (["--help"], 1, "these ask for help, not for training"),
        (["--pipeline-model-parallel-size", "2"], 3, r"Megatron refuses these: .*divisible"),
    ):
        with pytest.raises(DMCError, match=message):
            parse([*MODEL, *flags], ranks, "these")


def test_a_run_that_megatron_ends_is_refused(monkeypatch, megatron):
    """Some of its checks print what is wrong, and exit."""
    from megatron.training import arguments

    def ends(*_):
        print("something else")
        print("no such optimizer")
        raise SystemExit(3)

    monkeypatch.setattr(arguments, "validate_args", ends)
    with pytest.raises(DMCError, match="Megatron refuses these: no such optimizer"):
        parse(MODEL, 1, "these")


STAGE = ["--dmc-stage", "retrofit"]
GATHERED = ["--context-parallel-size", "2", "--cp-comm-type", "all_gather"]


@pytest.mark.parametrize(
    ("flags", "changes", "message"),
    [
        (["--sft"], {}, "--sft needs the data sets of Megatron's own"),
        ([], dict(overlap_moe_expert_parallel_comm=True), "--overlap-moe-expert-parallel-comm: Megatron then takes"),
        (STAGE, dict(overlap_moe_expert_parallel_comm=True), "--overlap-moe-expert-parallel-comm: Megatron then takes"),
        ([*STAGE, "--spec", "local"], {}, "--spec and --dmc-stage both name the layers"),
        (STAGE, dict(use_megatron_fsdp=True), "DMC cannot train with --use-megatron-fsdp: .* use --use-distributed"),
        (STAGE, dict(use_torch_fsdp2=True), "DMC cannot train with --use-torch-fsdp2: "),
        ([*STAGE, *GATHERED, "--dmc-window-size", "0"], {}, "--dmc-window-size 0: with --cp-comm-type all_gather, a "),
        ([*STAGE, *GATHERED, "--dmc-window-size", "7"], {}, "--dmc-window-size 7: .* at most the 6 tokens of a chunk"),
        ([*STAGE, "--dmc-window-size", "-1"], {}, "dmc_window_size must be a whole number"),
        (STAGE, dict(hybrid_context_parallel=True), "--hybrid-context-parallel"),
    ],
)  # fmt: skip
def test_what_training_refuses_by_its_arguments(megatron, flags, changes, message):
    args = parse([*MODEL, *flags], 2, "these")
    vars(args).update(changes)  # past Megatron's own checks, which ask for other flags beside them
    with pytest.raises(DMCError, match=message):
        train.check_arguments(args)


def test_what_training_takes(megatron):
    fsdp = dict(use_megatron_fsdp=True)  # of Megatron's own model
    for flags, changes in (
        ([], fsdp), ([*STAGE, *GATHERED, "--dmc-window-size", "6"], {}), (GATHERED, {}),
        ([*"--dmc-stage zero-out --dmc-window-size 0".split(), *GATHERED], {}),
    ):  # fmt: skip
        args = parse([*MODEL, *flags], 2, "these")
        vars(args).update(changes)
        train.check_arguments(args)


def test_without_apex_gradient_accumulation_is_not_fused(megatron, monkeypatch, capsys):
    from megatron.core.tensor_parallel import layers

    for apex, rank, fused, said in ((True, 0, True, ""), (False, 1, False, ""), (False, 0, False, "for want of Apex")):
        monkeypatch.setattr(layers, "_grad_accum_fusion_available", apex)
        args = SimpleNamespace(gradient_accumulation_fusion=True, rank=rank)
        train._without_apex(args)
        printed = capsys.readouterr().out
        assert args.gradient_accumulation_fusion == fused and said in printed and bool(printed) == bool(said)
