"""Checkpoints of Hugging Face and Megatron, tensor by tensor: `to_megatron`, `to_hugging_face`, `nvidia_to_megatron`.

No more than a layer's largest tensor, or the embedding, is in memory at a time, whatever the model's size. Tensors keep
their dtype, and going there and back gives every one of them back bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from megatron_dmc import nvidia
from megatron_dmc.arguments import parse
from megatron_dmc.config import DMCConfig, DMCError
from megatron_dmc.distributed_checkpoint import Reader, write
from megatron_dmc.exported import CARD, CODE, model_card, read_report, with_dmc, without_dmc, write_code
from megatron_dmc.families import Architecture, Chunk, size_in_bytes
from megatron_dmc.hugging_face import CONFIG, DTYPES, INDEX, HuggingFaceFolder, read_json, write_safetensors
from megatron_dmc.resume import TRACKER

SHARD_BYTES = 5_000_000_000
"""Size of Hugging Face's files, as transformers has it."""

KEPT_CONFIG = "hf_config.json"
"""A copy of the `config.json` that a Megatron checkpoint came from, beside its tensors."""

RELEASE = "release"
"""Folder, and content of the tracker file, of a checkpoint that begins a training: Megatron's own name for it."""

MADE = (TRACKER, RELEASE, "model.yaml")
"""What a conversion to Megatron leaves in a folder."""

COMPANIONS = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template.*")
COMPANIONS += ("generation_config.json",)
"""Files that go with a model, besides its configuration and weights."""


def to_megatron(source: Path, target: Path, overwrite: bool = False) -> Architecture:
    """Convert a folder of Hugging Face (`config.json`, `*.safetensors`) to a checkpoint of Megatron.

    From an exported DMC model, DMC's settings become the checkpoint's.

    Args:
        source: the folder; it is also where the checkpoint's arguments look for the tokenizer.
        target: gets the checkpoint as `release`, the tracker file, and the model's flags as `model.yaml`.
        overwrite: replace what an earlier conversion left in `target`.

    Raises:
        DMCError: for a model that cannot be converted, files that lack tensors or do not fit, or a target in use.
    """
    source = Path(source).resolve()
    with ExitStack() as stack:
        files = HuggingFaceFolder(source, stack)
        config, dmc = without_dmc(files.config, str(source / CONFIG))
        model = Architecture.from_config(config, str(source / CONFIG))
        chunks = list(model.chunks())
        dtypes = files.check(model, chunks)
        args = _arguments(model, source, dtypes)
        if dmc.merges:
            vars(args).update(asdict(dmc))
        _prepare(target, source, overwrite, MADE)
        _write_megatron(target, model, chunks, dtypes, args, lambda c: c.join([files.read(name) for name in c.sources]))
    shutil.copyfile(source / CONFIG, target / RELEASE / KEPT_CONFIG)
    _name_megatron(target, model, source / CONFIG)
    return model


def nvidia_to_megatron(source: Path, target: Path, tokenizer: Path, overwrite: bool = False) -> Architecture:
    """Convert a DMC checkpoint of NVIDIA's (`megatron_dmc.nvidia`) to one that this project opens.

    Args:
        source: the checkpoint's folder.
        target, overwrite: as for `to_megatron`.
        tokenizer: a folder of Hugging Face with the model's tokenizer, which the checkpoint does not hold.

    Raises:
        DMCError: for a file that is none of these, a model that is not of Llama's kind, or a target in use.
    """
    file = nvidia.find(Path(source).resolve())
    if file is None:
        raise DMCError(f"{source} has no {nvidia.FILE}, nor a folder mp_rank_00 with one")
    legacy = nvidia.Legacy(file)
    model = legacy.architecture()
    chunks = list(model.chunks())
    dtypes = legacy.check(chunks)
    args = _arguments(model, Path(tokenizer).resolve(), dtypes)
    legacy.finish(args)
    _prepare(target, file.parent, overwrite, MADE)
    _write_megatron(target, model, chunks, dtypes, args, legacy.read)
    _name_megatron(target, model, file)
    return model


def _write_megatron(
    target: Path,
    model: Architecture,
    chunks: list[Chunk],
    dtypes: dict[str, torch.dtype],
    args: argparse.Namespace,
    read: Callable[[Chunk], Tensor],
) -> None:
    """Write the checkpoint `release`; `read` gives the chunks' tensors."""
    objects: dict[tuple[str, tuple[int, ...], tuple[int, ...]], Any] = {}
    of_layers, of_model = model.stateful()
    for name in of_layers:
        objects |= {(name, (model.layers,), (layer,)): None for layer in range(model.layers)}
    objects |= {(name, (1,), (0,)): None for name in of_model}
    common = dict(
        args=args, checkpoint_version=3.0, iteration=0, content_metadata={"singleton_local_shards": False}
    )  # fmt: skip
    folder = target / RELEASE
    folder.mkdir()
    with _progress(chunks, dtypes) as advance:

        def read_and_tell(chunk: Chunk) -> Tensor:
            tensor = read(chunk)
            advance(tensor.nbytes)
            return tensor

        write(folder, [(chunk, dtypes[chunk.key]) for chunk in chunks], read_and_tell, objects, common)


def _name_megatron(target: Path, model: Architecture, origin: Path) -> None:
    flags = yaml.safe_dump(model.flags(), sort_keys=False)
    (target / "model.yaml").write_text(f"# The part `model` of a recipe, by {origin}\n{flags}")
    (target / TRACKER).write_text(RELEASE)  # last: a conversion that was cut short has no name


def to_hugging_face(
    source: Path,
    target: Path,
    like: Path | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    report: Path | None = None,
) -> tuple[Architecture, str]:
    """Convert a checkpoint of Megatron, of any parallel layout, to a folder for transformers.

    A checkpoint of the stage retrofit, finished or not, or finetune becomes a model with a compressed cache: the folder
    gets its code (`megatron_dmc.remote_code`) and a model card. One of zero-out is refused, as generation does.

    `config.json` is that of the original model where there is one of the same architecture (`like`, the copy that
    `to_megatron` kept, or the folder that the checkpoint has its tokenizer from); otherwise it says what the
    checkpoint's arguments say. Tokenizer files come from the same folder.

    Args:
        source: see `megatron_dmc.checkpoint.find_checkpoint`.
        target: gets `config.json` and the files.
        like: a folder with the original `config.json`.
        overwrite: replace what an earlier conversion left in `target`.
        shard_bytes: the size up to which tensors share a file.
        report: of a DMC model, the report.json with the losses for the model card.

    Returns:
        The model, and what was done about its configuration and tokenizer.

    Raises:
        DMCError: for a checkpoint that transformers' classes cannot hold, or a target in use.
    """
    from huggingface_hub import split_state_dict_into_shards_factory
    from megatron.core import dist_checkpointing

    from megatron_dmc.checkpoint import find_checkpoint

    source = find_checkpoint(source)
    common = dist_checkpointing.load_common_state_dict(str(source))
    args = common.get("args")
    if args is None:
        raise DMCError(f"{source} holds no arguments that say what model it is")
    dmc = DMCConfig.from_args(args)
    if dmc.dmc_stage is not None and not dmc.merges:
        raise DMCError(
            f"{source} has been trained with dmc_stage = {dmc.dmc_stage}: it is no longer a plain model, and its cache "
            "does not compress before the stage retrofit. Convert a checkpoint of that stage, or of finetune"
        )
    if report is not None and not dmc.merges:
        raise DMCError(f"a report is for the model card of a DMC model, and {source} has been trained without DMC")
    measured = None if report is None else read_report(report)
    reader = Reader(source)
    rows = reader.shape("embedding.word_embeddings.weight")[0]
    model = Architecture.from_args(args, rows, str(source))
    model, config, notes = _configuration(model, args, source, like)
    chunks = list(model.chunks())
    dtypes = {chunk.key: reader.dtype(chunk) for chunk in chunks}
    expected = {reader.place(chunk)[0] for chunk in chunks}
    if unknown := sorted(reader.weights() - expected):
        raise DMCError(f"{source} has tensors that are no part of the model by its arguments: {', '.join(unknown)}")
    kinds = sorted({str(dtype).removeprefix("torch.") for dtype in dtypes.values()})
    if not set(dtypes.values()) <= set(DTYPES.values()):
        raise DMCError(f"{source} has tensors of {', '.join(kinds)}; convert knows float32, bfloat16 and float16")
    # A card is replaced with the code that it belongs to: another README.md is the user's.
    card = (CARD,) if any((target / name).exists() for name in CODE) else ()
    _prepare(target, source, overwrite, (CONFIG, INDEX, "*.safetensors", *card, *CODE))

    tensors = {name: (chunk, i) for chunk in chunks for i, name in enumerate(chunk.sources)}
    split = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda t: size_in_bytes(t[0].source_shapes[t[1]], dtypes[t[0].key]),
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    with _progress(chunks, dtypes) as advance:
        parts: tuple[Chunk | None, list[Tensor]] = (None, [])

        def read(name: str) -> Tensor:
            nonlocal parts
            chunk, index = tensors[name]
            if parts[0] is not chunk:  # queries, keys and values come from one
                parts = (None, [])  # frees the ones before
                parts = (chunk, chunk.split(reader.read(chunk)))
            advance(parts[1][index].nbytes)
            return parts[1][index]

        for file, names in split.filename_to_tensors.items():
            shapes = {n: (tensors[n][0].source_shapes[tensors[n][1]], dtypes[tensors[n][0].key]) for n in names}
            write_safetensors(target / file, shapes, read)
    if split.is_sharded:
        index = dict(metadata=split.metadata, weight_map=split.tensor_to_filename)
        (target / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    if len(kinds) == 1:
        config["dtype" if "dtype" in config else "torch_dtype"] = kinds[0]
    notes += _copy_tokenizer([like, Path(args.tokenizer_model) if args.tokenizer_model else None], target)
    if dmc.merges:
        config = with_dmc(config, dmc)
        write_code(target)
        notes += "; with a compressed cache, for trust_remote_code=True"
        if (target / CARD).exists():
            notes += f"; no model card, since there is a {CARD} of another origin"
        else:
            (target / CARD).write_text(model_card(model, dmc, common, measured))
    (target / CONFIG).write_text(json.dumps(config, indent=2) + "\n")  # last: it makes a folder a model
    return model, notes


def _arguments(model: Architecture, tokenizer: Path, dtypes: dict[str, torch.dtype]) -> argparse.Namespace:
    """What a training run of this model would save as its arguments, by Megatron's own parser."""
    flags = model.flags() | {
        # What Megatron's parser cannot do without; a training run gives its own.
        "seq-length": model.positions,
        "micro-batch-size": 1,
        "ckpt-format": "torch_dist",
        "tokenizer-type": "HuggingFaceTokenizer",
        "tokenizer-model": tokenizer,
        # The tokenizer may have any number of tokens, up to the rows.
        "make-vocab-size-divisible-by": model.vocabulary,
    }
    kinds = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    if (kind := kinds.get(dtypes["decoder.layers.mlp.linear_fc2.weight"])) is not None:
        flags[kind] = True
    words = [word for flag, value in flags.items() for word in (f"--{flag}", *([] if value is True else [str(value)]))]
    return parse(words, 1, "the model's arguments")


def _configuration(
    model: Architecture, args: argparse.Namespace, source: Path, like: Path | None
) -> tuple[Architecture, dict[str, Any], str]:
    """The model with its own vocabulary, the content of its `config.json`, and where that is from."""
    if like is not None:
        candidates = [like / CONFIG]
    else:
        candidates = [source / KEPT_CONFIG]
        if args.tokenizer_model:
            candidates.append(Path(args.tokenizer_model) / CONFIG)
    for path in candidates:
        if like is None and not path.is_file():
            continue
        config = read_json(path)
        try:
            config, _ = without_dmc(config, str(path))
            original = Architecture.from_config(config, str(path))
        except DMCError:
            if like is not None:
                raise
            continue
        # A run may train on shorter sequences, and with more rows, or fewer, than the model came with.
        vocabulary = min(model.vocabulary, original.vocabulary)
        fitted = replace(
            model, model_type=original.model_type, vocabulary=vocabulary, positions=original.positions
        )  # fmt: skip
        same = replace(original, vocabulary=vocabulary) == fitted
        same = same and (original.qkv_bias, original.qk_norm) == (model.qkv_bias, model.qk_norm)
        if same:
            note = f"{CONFIG} is that of {path}"
            if vocabulary < original.vocabulary:
                config["vocab_size"] = vocabulary
                note += f", but for vocab_size: the checkpoint has {vocabulary} rows of {original.vocabulary}"
            if vocabulary < model.vocabulary:
                note += f"; {model.vocabulary - vocabulary} rows of padding left out"
            return fitted, config, note
        if like is not None:
            given, have = vars(original), vars(model)
            differ = [f"{k} {given[k]} for {have[k]}" for k in given if given[k] != have[k] and k != "positions"]
            raise DMCError(f"{path} is of another model than {source}: {', '.join(differ)}")
    return model, model.config(), f"{CONFIG} follows from the checkpoint's arguments"


def _copy_tokenizer(folders: list[Path | None], target: Path) -> str:
    """Copy what goes with a model from the first folder that has some of it; what came of it."""
    for folder in folders:
        if folder is None or not folder.is_dir() or folder.resolve() == target.resolve():
            continue
        files = sorted({path for pattern in COMPANIONS for path in folder.glob(pattern) if path.is_file()})
        for path in files:
            shutil.copyfile(path, target / path.name)
        if files:
            lacking = "" if any(path.match("tokenizer*") for path in files) else "; there is no tokenizer"
            return f"; copied from {folder}: {', '.join(path.name for path in files)}{lacking}"
    return "; no tokenizer was found to copy"


def _prepare(target: Path, source: Path, overwrite: bool, replaced: tuple[str, ...]) -> None:
    """Make the target a folder without what a conversion writes: `replaced`, in this order, what names it first."""
    if target.resolve() == source.resolve() or source.resolve().is_relative_to(target.resolve()):
        raise DMCError(f"the target {target} must be another folder than the source {source}, and not hold it")
    if target.exists() and not target.is_dir():
        raise DMCError(f"the target {target} is not a folder")
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise DMCError(
                f"{target} is not empty: name another folder, or replace a conversion in it with --overwrite"
            )
        for path in [path for pattern in replaced for path in target.glob(pattern)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    target.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def _progress(chunks: list[Chunk], dtypes: dict[str, torch.dtype]) -> Iterator[Any]:
    """A bar over the model's bytes; what is yielded advances it."""
    from tqdm import tqdm

    total = sum(size_in_bytes(chunk.size, dtypes[chunk.key]) for chunk in chunks)
    with tqdm(total=total, unit="B", unit_scale=True, desc="converting") as bar:
        yield bar.update
