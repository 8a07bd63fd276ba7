"""Megatron's arguments without its training loop: read where there is no GPU, and the model that they describe."""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from megatron_dmc.config import DMCError

_NOT_IN_SHAPES = (
    "normalization layernorm_epsilon swiglu position_embedding_type rotary_base rotary_percent rotary_interleaved "
    "rotary_seq_len_interpolation_factor use_rope_scaling rope_scaling_factor add_qkv_bias qk_layernorm "
    "untie_embeddings_and_output_weights"
).split()
"""Arguments of the model that weights of another one load under: no shape tells, or Megatron leaves tensors out."""


def other_model(saved: argparse.Namespace, args: argparse.Namespace) -> list[str]:
    """Where a checkpoint's arguments name another model than a run's, though its weights load: "name value, here value"
    for each. Arguments that the checkpoint does not hold are not compared."""
    return [
        f"{name} {getattr(saved, name)!r}, here {getattr(args, name, None)!r}"
        for name in _NOT_IN_SHAPES
        if hasattr(saved, name) and getattr(saved, name) != getattr(args, name, None)
    ]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise DMCError(f"Megatron has no such arguments: {message}. Its flags: megatron-dmc train --help")


@functools.cache
def _parser() -> argparse.ArgumentParser:
    from megatron.training.arguments import add_megatron_arguments

    from megatron_dmc.commands.train import _arguments

    return _arguments(add_megatron_arguments(_Parser(allow_abbrev=False)))


def parse(words: list[str], ranks: int, what: str) -> argparse.Namespace:
    """The arguments that a training run has after `words` on its command line, on the first of so many Hopper GPUs.

    Args:
        words: flags and values.
        ranks: processes of the run.
        what: the arguments, in a refusal.

    Raises:
        DMCError: for flags that Megatron does not have, or values that it refuses.
    """
    from megatron.training import arguments

    try:
        args = _parser().parse_args(words)
    except SystemExit as error:
        raise DMCError(f"{what} ask for help, not for training") from error
    args.rank, args.world_size = 0, ranks
    args._is_global_batch_size_explicitly_specified = args.global_batch_size is not None
    with as_on_hopper(what):
        arguments.validate_args(args)
    return args


@contextlib.contextmanager
def as_on_hopper(what: str) -> Iterator[None]:
    """Let Megatron check arguments as on a Hopper GPU, which need not be here; its refusals become a `DMCError`."""
    from megatron.training import arguments

    said = io.StringIO()
    try:
        with (
            contextlib.redirect_stdout(said),
            mock.patch.object(arguments, "get_device_arch_version", return_value=9),
            mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)),
            mock.patch.dict(os.environ, CUDA_DEVICE_MAX_CONNECTIONS="1"),  # as `train` has it
        ):
            yield
    except DMCError:
        raise
    except (AssertionError, ValueError, RuntimeError, TypeError) as error:
        raise DMCError(f"Megatron refuses {what}: {error}") from error
    except SystemExit as error:
        lines = said.getvalue().strip().splitlines() or [f"it ended with {error.code}"]
        raise DMCError(f"Megatron refuses {what}: {lines[-1]}") from error


def gpt_config(args: argparse.Namespace) -> Any:
    """Megatron's `GPTModelConfig` of a model that is trained with these arguments, or was."""
    from megatron.training.argument_utils import gpt_config_from_args

    config = gpt_config_from_args(args)
    config.rope_scaling_factor = getattr(args, "rope_scaling_factor", 8.0)  # Megatron 0.19.2 forgets it
    return config
