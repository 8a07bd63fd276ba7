"""Folders of Hugging Face: `config.json` and tensors in `*.safetensors`, read and written one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_dmc.config import DMCError
from megatron_dmc.families import Architecture, Chunk, size_in_bytes

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""By their names in safetensors."""

UNUSED = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")
"""Tensors that older files hold, and that follow from the configuration."""


class HuggingFaceFolder:
    """The configuration and the tensors of a folder, opened one tensor at a time.

    Args:
        stack: closes the files.
    """

    def __init__(self, folder: Path, stack: ExitStack):
        from safetensors import SafetensorError, safe_open

        self.folder = folder
        self.config = read_json(folder / CONFIG)
        names = {path.name for path in folder.glob("*.safetensors")}
        if (folder / INDEX).is_file():
            names = set(read_json(folder / INDEX).get("weight_map", {}).values())
        if not names:
            raise DMCError(
                f"{folder} has no *.safetensors; convert reads no other files (*.bin: load the model in transformers "
                "and save_pretrained it)"
            )
        self._files: dict[str, Any] = {}
        for name in sorted(names):
            try:
                file = stack.enter_context(safe_open(folder / name, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise DMCError(f"cannot read {folder / name}: {error}") from error
            self._files |= dict.fromkeys(file.keys(), file)

    def read(self, name: str) -> Tensor:
        """A whole tensor."""
        return self._files[name].get_tensor(name)

    def check(self, model: Architecture, chunks: list[Chunk]) -> dict[str, torch.dtype]:
        """The dtype of each of Megatron's tensors, by key.

        Raises:
            DMCError: for tensors that are missing, unknown, or of another shape or dtype than they should be.
        """
        shapes = {name: shape for c in chunks for name, shape in zip(c.sources, c.source_shapes, strict=True)}
        if missing := sorted(shapes.keys() - self._files.keys()):
            raise DMCError(f"{self.folder} lacks {len(missing)} tensors of a {model.model_type}: {_some(missing)}")
        ignored = {"lm_head.weight"} if model.tied else set()
        unknown = sorted(
            name for name in self._files.keys() - shapes.keys() - ignored if not name.endswith(UNUSED)
        )  # fmt: skip
        if unknown:
            raise DMCError(
                f"{self.folder} has {len(unknown)} tensors that a {model.model_type} does not have: {_some(unknown)}"
            )
        dtypes: dict[str, torch.dtype] = {}
        for chunk in chunks:
            for name in chunk.sources:
                header = self._files[name].get_slice(name)
                if tuple(header.get_shape()) != shapes[name]:
                    raise DMCError(
                        f"{self.folder}: {name} has shape {tuple(header.get_shape())}; by {CONFIG} it has "
                        f"{shapes[name]}"
                    )
                if (kind := header.get_dtype()) not in DTYPES:
                    raise DMCError(
                        f"{self.folder}: {name} is {kind}; convert knows {', '.join(DTYPES)}: convert the weights "
                        "before quantization"
                    )
                if dtypes.setdefault(chunk.key, DTYPES[kind]) != DTYPES[kind]:
                    raise DMCError(
                        f"{self.folder}: {name} is {kind}, and other layers or parts of Megatron's {chunk.key} are "
                        f"{dtypes[chunk.key]}: save the model in one dtype"
                    )
        return dtypes


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        DMCError: where there is none.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DMCError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise DMCError(f"{path} must hold a JSON object; it holds a {type(content).__name__}")
    return content


def write_safetensors(
    path: Path, tensors: dict[str, tuple[tuple[int, ...], torch.dtype]], read: Callable[[str], Tensor]
) -> None:
    """A safetensors file, holding one tensor at a time; the library's own writer takes them all at once.

    The format: length of the header (8 bytes, little-endian), the header in JSON, the tensors' bytes one after another.

    Args:
        tensors: shape and dtype by name.
        read: gives the tensor of a name.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in tensors.items():
        begin, end = end, end + size_in_bytes(shape, dtype)
        header[name] = dict(dtype=names[dtype], shape=shape, data_offsets=[begin, end])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that tensors are aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in tensors:
            file.write(read(name).contiguous().flatten().view(torch.uint8).numpy())


def _some(names: list[str]) -> str:
    return ", ".join(names[:6]) + (", …" if len(names) > 6 else "")
