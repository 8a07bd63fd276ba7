"""NVIDIA's published DMC checkpoints (`nvidia/Llama-2-{7B,13B}-DMC-{4x,8x}`) as checkpoints of Megatron's format today.

They are files of Megatron-LM at the end of 2024: `mp_rank_00/model_optim_rng.pt`, a pickle of the model's tensors, the
arguments of the run, and states of optimizer and random numbers. A pickle can name any code for loading to run; here it
is given tensors and plain containers, and a husk for everything else, which holds its parts and does nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_dmc.config import DMCConfig, DMCError
from megatron_dmc.families import Architecture, Chunk

FILE = "model_optim_rng.pt"

RENAMED = dict(norm_epsilon="layernorm_epsilon", apply_layernorm_1p="layernorm_zero_centered_gamma")
"""Arguments of these checkpoints that Megatron saves under other names today."""


class _Husk:
    """In place of an object of a class that is none of a checkpoint's business."""

    def __init__(self, *parts: Any, **named: Any) -> None:
        self.parts = parts

    def __setstate__(self, state: Any) -> None:
        self.state = state


def find(source: Path) -> Path | None:
    """The file of such a checkpoint: `source` is its folder, one above it, or the one that `--save` named."""
    folders = [source, *sorted(source.glob("iter_*"), reverse=True), source / "release"]
    for folder in folders:
        for file in (folder / FILE, folder / "mp_rank_00" / FILE):
            if file.is_file():
                return file
    return None


class Legacy:
    """What is in the file.

    Args:
        file: see `find`.

    Attributes:
        args: the arguments of the run.
        dmc: its settings.

    Raises:
        DMCError: for a file that cannot be read, is not whole, or is one of several that make up a model.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        others = [path.name for path in file.parent.parent.glob("mp_rank_*") if path.name != file.parent.name]
        if file.parent.name.startswith("mp_rank_") and others:
            raise DMCError(
                f"{file.parent.parent} is a model in {len(others) + 1} parts ({file.parent.name}, {', '.join(others)});"
                " convert knows whole ones (tensor_model_parallel_size = pipeline_model_parallel_size = 1)"
            )
        content = _load(file)
        if missing := {"args", "model"} - content.keys():
            raise DMCError(f"{file} has no {' and no '.join(sorted(missing))}; it has {', '.join(map(str, content))}")
        self.args: argparse.Namespace = content["args"]
        if not isinstance(self.args, argparse.Namespace) or not isinstance(content["model"], dict):
            raise DMCError(f"{file}: args and model must be a namespace and a dictionary")
        self._tensors = {name: t for name, t in content["model"].items() if isinstance(t, Tensor) and t.numel()}
        self.dmc = self._settings()

    def _settings(self) -> DMCConfig:
        """NVIDIA's `--dmc-is-stage-one` and `--dmc-finetune` name the first and the last stage."""
        names = ("dmc_cr", "dmc_init_val", "dmc_window_size", "dmc_temp")
        given = {name: getattr(self.args, name) for name in names if hasattr(self.args, name)}
        if not given:
            return DMCConfig()
        stage = "retrofit"
        if getattr(self.args, "dmc_is_stage_one", False):
            stage = "zero-out"
        elif getattr(self.args, "dmc_finetune", False):
            stage = "finetune"
        return DMCConfig.from_saved(dict(given, dmc_stage=stage))

    def architecture(self) -> Architecture:
        """The model that the arguments describe.

        Raises:
            DMCError: for one that is not of Llama's kind.
        """
        args = argparse.Namespace(**vars(self.args))
        args.rotary_percent = 1.0
        for then, now in RENAMED.items():
            if hasattr(args, then) and not hasattr(args, now):
                setattr(args, now, getattr(args, then))
        for name, value in dict(use_rope_scaling=False, rotary_base=10000).items():
            if not hasattr(args, name):
                setattr(args, name, value)
        return Architecture.from_args(args, len(self._tensor("embedding.word_embeddings.weight")), str(self.file))

    def finish(self, args: argparse.Namespace) -> None:
        """Add to a new checkpoint's arguments what this one's say of DMC and of rotation."""
        vars(args).update(asdict(self.dmc), rotary_percent=getattr(self.args, "rotary_percent", 1.0))

    def check(self, chunks: Iterable[Chunk]) -> dict[str, torch.dtype]:
        """The dtype of each of Megatron's tensors, by key.

        Raises:
            DMCError: for tensors that are missing, unknown, or of another shape or dtype than they should be.
        """
        dtypes: dict[str, torch.dtype] = {}
        used = set()
        for chunk in chunks:
            tensor = self._tensor(name := self._name(chunk))
            used.add(name)
            layered = chunk.key.startswith("decoder.layers.")
            expected = chunk.shape[1:] if layered else chunk.shape
            if tuple(tensor.shape) != expected:
                raise DMCError(
                    f"{self.file}: {name} has shape {tuple(tensor.shape)}; by its arguments it has {expected}"
                )
            if dtypes.setdefault(chunk.key, tensor.dtype) != tensor.dtype:
                raise DMCError(f"{self.file}: {name} is {tensor.dtype}, in other layers it is {dtypes[chunk.key]}")
        unknown = sorted(n for n in self._tensors.keys() - used if not n.endswith(("_extra_state", "inv_freq")))
        if unknown:
            raise DMCError(f"{self.file} has tensors that are no part of the model: {', '.join(unknown[:6])}")
        return dtypes

    def read(self, chunk: Chunk) -> Tensor:
        """A chunk's tensor, of its `size`."""
        tensor = self._tensor(self._name(chunk))
        if chunk.key.startswith("decoder.layers."):
            tensor = tensor[None, chunk.offset[1] : chunk.offset[1] + chunk.size[1]]
        return tensor.contiguous()

    def _tensor(self, name: str) -> Tensor:
        """By the names of Transformer Engine's layers, which fuse norms into linear layers, or of Megatron's own."""
        for found in (name, name.replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.")
                      .replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")):  # fmt: skip
            if found in self._tensors:
                return self._tensors[found]
        raise DMCError(f"{self.file} lacks {name}, which the model has by its arguments")

    @staticmethod
    def _name(chunk: Chunk) -> str:
        prefix = "decoder.layers."
        if not chunk.key.startswith(prefix):
            return chunk.key
        return f"{prefix}{chunk.offset[0]}.{chunk.key.removeprefix(prefix)}"


def _load(file: Path) -> dict[str, Any]:
    """The pickle's content, tensors left in the file until they are used."""
    try:
        foreign = set(torch.serialization.get_unsafe_globals_in_checkpoint(str(file)))
        allowed = [(_husk(name), name) for name in foreign - {"argparse.Namespace"}]
        with torch.serialization.safe_globals([argparse.Namespace, *allowed]):
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever a broken file makes of the reader
        lines = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "weights_only" not in line]
        reason = next((line for line in lines if line), type(error).__name__)
        raise DMCError(f"cannot read {file}: {reason}") from error
    if not isinstance(content, dict):
        raise DMCError(f"{file} must hold a dictionary; it holds a {type(content).__name__}")
    return content


def _husk(name: str) -> type:
    """One for each foreign class: the reader goes by the class of an object."""
    return type(name.rsplit(".", 1)[-1], (_Husk,), {})
