"""Megatron's arguments where there is no GPU, and the model that they describe."""

import pytest
from runs import MODEL

from megatron_dmc.arguments import as_on_hopper, gpt_config, parse
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
