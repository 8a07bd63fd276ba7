"""Megatron's distributed checkpoints (`--ckpt-format torch_dist`) tensor by tensor, without Megatron's model.

Checked against megatron-core 0.19.2. It is the format of `torch.distributed.checkpoint`: `.metadata` says which part
of which tensor lies where in the `.distcp` files. Megatron's own are: a `common_state` (arguments, iteration), objects
named `KEY/shard_OFFSET_SHAPE`, and `metadata.json`.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from megatron_dmc.config import DMCError
from megatron_dmc.families import Chunk

LAYERS = "decoder.layers."


def write(
    folder: Path,
    chunks: Iterable[tuple[Chunk, torch.dtype]],
    read: Callable[[Chunk], Tensor],
    objects: dict[tuple[str, tuple[int, ...], tuple[int, ...]], Any],
    common: dict[str, Any],
) -> None:
    """Write the checkpoint of one iteration, holding one chunk at a time.

    Args:
        folder: an empty one.
        read: gives a chunk's tensor, of its `size`.
        objects: what is no tensor, by key, shape and offset among the objects of that key.
        common: what `dist_checkpointing.load_common_state_dict` is to return.
    """
    from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    objects = {ShardedObject(key, None, shape, offset).unique_key: x for (key, shape, offset), x in objects.items()}
    objects[ShardedObject("common_state", None, (1,), (0,)).unique_key] = common
    writer = checkpoint.FileSystemWriter(folder)
    checkpoint.save({}, storage_writer=writer, planner=_Stream(chunks, read, objects), no_dist=True)
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))


class _Stream(checkpoint.DefaultSavePlanner):
    """Plans the chunks, and reads each when its turn to be written comes."""

    def __init__(self, chunks: Iterable[tuple[Chunk, torch.dtype]], read: Callable, objects: dict[str, Any]):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._chunks = {MetadataIndex(c.key, torch.Size(c.offset)): (c, dtype) for c, dtype in chunks}
        self._read = read
        self._objects = objects

    def create_local_plan(self) -> SavePlan:
        items = [
            WriteItem(
                index=index,
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(offsets=index.offset, sizes=torch.Size(chunk.size)),
                    properties=TensorProperties(dtype=dtype),
                    size=torch.Size(chunk.shape),
                ),
            )
            for index, (chunk, dtype) in self._chunks.items()
        ]
        items += [WriteItem(index=MetadataIndex(name), type=WriteItemType.BYTE_IO) for name in self._objects]
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            data = io.BytesIO()
            torch.save([self._objects[write_item.index.fqn]], data)
            return data
        return self._read(self._chunks[write_item.index][0])


class _Reader(checkpoint.FileSystemReader):
    """Reads `.metadata` once: there is one `checkpoint.load` for each tensor."""

    @cached_property
    def _metadata(self) -> Metadata:
        return super().read_metadata()

    def read_metadata(self, *args, **kwargs) -> Metadata:
        return self._metadata


class Reader:
    """Parts of a checkpoint's tensors, whatever parallel layout wrote it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._reader = _Reader(folder)
        self._tensors = {
            name: entry
            for name, entry in self._reader.read_metadata().state_dict_metadata.items()
            if isinstance(entry, checkpoint.TensorStorageMetadata)
        }

    def shape(self, key: str) -> tuple[int, ...]:
        """Of a whole tensor.

        Raises:
            DMCError: where there is none of the name.
        """
        if key not in self._tensors:
            raise DMCError(f"{self.folder} has no tensor {key}; it has {', '.join(sorted(self.weights()))}")
        return tuple(self._tensors[key].size)

    def weights(self) -> set[str]:
        """Names of the model's tensors, without those of the optimizer."""
        return {name for name in self._tensors if not name.startswith(("optimizer", "chained_"))}

    def dtype(self, chunk: Chunk) -> torch.dtype:
        """Of a chunk.

        Raises:
            DMCError: where the checkpoint's tensor is missing or of another shape than the chunk's.
        """
        key, offset, _ = self.place(chunk)
        have = self.shape(key)
        # Megatron pads the vocabulary, so an embedding may have more rows than the model.
        padded = key in ("embedding.word_embeddings.weight", "output_layer.weight")
        expected = chunk.shape if offset == chunk.offset else chunk.shape[1:]
        if have[1:] != expected[1:] or have[0] < expected[0] or (have[0] != expected[0] and not padded):
            raise DMCError(f"{self.folder}: {key} has shape {have}; by the arguments it has {expected}")
        return self._tensors[key].properties.dtype

    def place(self, chunk: Chunk) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
        """Key, offset and size of a chunk here: layers may be stacked, or each under a key of its own."""
        if chunk.key in self._tensors or not chunk.key.startswith(LAYERS):
            return chunk.key, chunk.offset, chunk.size
        return f"{LAYERS}{chunk.offset[0]}.{chunk.key.removeprefix(LAYERS)}", chunk.offset[1:], chunk.size[1:]

    def read(self, chunk: Chunk) -> Tensor:
        """A chunk's tensor."""
        from megatron.core.dist_checkpointing.mapping import ShardedTensor
        from megatron.core.dist_checkpointing.strategies.checkpointable import CheckpointableShardedTensor

        key, offset, size = self.place(chunk)
        entry = self._tensors[key]
        part = torch.empty(size, dtype=entry.properties.dtype)
        wanted = ShardedTensor(key, part, part.dtype, size, tuple(entry.size), offset, axis_fragmentations=None)
        planner = checkpoint.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        state = {key: CheckpointableShardedTensor.from_sh_ten(wanted)}
        checkpoint.load(state, storage_reader=self._reader, planner=planner, no_dist=True)
        return part.reshape(chunk.size)
