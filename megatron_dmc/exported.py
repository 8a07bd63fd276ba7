"""DMC models in folders of Hugging Face: their `config.json`, the code that opens them, and the model card."""

from __future__ import annotations

import argparse
import shutil
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from megatron_dmc import remote_code
from megatron_dmc.config import DMCConfig, DMCError
from megatron_dmc.families import FAMILIES, Architecture
from megatron_dmc.hugging_face import read_json

PREFIX = "dmc_"
"""Of `model_type`, before the family's."""

MEASURED = ("tokens", "window", "compression_ratio", "loss_compressed", "loss_uncompressed")
"""What a model card takes from a report."""

CODE = ("configuration_dmc.py", "modeling_dmc.py")
CARD = "README.md"


def with_dmc(config: dict[str, Any], dmc: DMCConfig) -> dict[str, Any]:
    """The content of a DMC model's `config.json`, from that of a plain model of its family."""
    plain = FAMILIES[config["model_type"]][0]
    classes = dict(
        AutoConfig=f"configuration_dmc.DMC{plain.replace('ForCausalLM', 'Config')}",
        AutoModelForCausalLM=f"modeling_dmc.DMC{plain}",
    )
    return config | asdict(dmc) | dict(
        model_type=PREFIX + config["model_type"], architectures=[f"DMC{plain}"], auto_map=classes
    )  # fmt: skip


def without_dmc(config: dict[str, Any], where: str) -> tuple[dict[str, Any], DMCConfig]:
    """The content of a `config.json` as that of a plain model, and DMC's settings, `dmc_stage` `None` without DMC.

    Raises:
        DMCError: for settings that are not allowed; `where` they stand.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type.startswith(PREFIX):
        return config, DMCConfig()
    names = {f.name for f in fields(DMCConfig)}
    try:
        dmc = DMCConfig.from_saved(config)
    except DMCError as error:
        raise DMCError(f"{where}: {error}") from error
    if not dmc.merges:
        raise DMCError(f"{where}: dmc_stage is {dmc.dmc_stage!r}; a {model_type} has been through retrofit or finetune")
    plain = {name: value for name, value in config.items() if name not in names | {"auto_map", "architectures"}}
    plain["model_type"] = model_type.removeprefix(PREFIX)
    if plain["model_type"] in FAMILIES:
        plain["architectures"] = [FAMILIES[plain["model_type"]][0]]
    return plain, dmc


def write_code(folder: Path) -> None:
    """The files that `trust_remote_code=True` runs."""
    for name in CODE:
        shutil.copyfile(Path(remote_code.__file__).parent / name, folder / name)


def read_report(path: Path) -> dict[str, Any]:
    """What `megatron-dmc report` measured.

    Raises:
        DMCError: for another file.
    """
    report = read_json(path)
    if missing := [name for name in MEASURED if not isinstance(report.get(name), (int, float))]:
        raise DMCError(f"{path} has no {', '.join(missing)}: give the report.json of megatron-dmc report")
    return report


def model_card(
    model: Architecture, dmc: DMCConfig, common: dict[str, Any], report: dict[str, Any] | None = None
) -> str:
    """What a checkpoint says of its model and training, in Markdown, and how to use the folder.

    Args:
        common: what the checkpoint holds beside tensors (`dist_checkpointing.load_common_state_dict`).
        report: see `read_report`.
    """
    from megatron_dmc.megatron_hooks import MERGE_RATE
    from megatron_dmc.remote_code.configuration_dmc import MINIMUM

    args: argparse.Namespace = common["args"]
    rate = getattr(args, MERGE_RATE, None)
    window = f"{dmc.dmc_window_size} tokens" if dmc.dmc_window_size else "no limit"
    rows = {
        "Model": f"{model.model_type}, {model.layers} layers, {model.heads} query heads, {model.groups} KV heads of "
        f"{model.head_dim} channels",
        "Compression ratio, target": f"{dmc.dmc_cr:g} tokens per cache entry",
        "Compression ratio, last training step": "unknown" if not rate else f"{1 / (1 - rate):.2f}",
        "Window of a merge": window,
        "Decision offset": f"{dmc.dmc_init_val:g}",
        **_training(dmc, args, common.get("iteration") or 0),
        "Stages before": "unknown: a checkpoint holds the settings of its own stage",
        **_losses(report),
        "Original model, data, licence": "unknown",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return _CARD.format(table=table, minimum=MINIMUM)


def _losses(report: dict[str, Any] | None) -> dict[str, str]:
    """Rows of the card: losses on held-out text."""
    if report is None:
        return {
            "Losses": "unknown: a checkpoint holds none (`megatron-dmc report CHECKPOINT --text HELD_OUT` measures "
            "them, with compression and without, and `megatron-dmc convert --report` writes them here)"
        }
    about = f"{report['tokens']:,} held-out tokens in windows of {report['window']:,}, nats per token"
    compressed = f"{report['loss_compressed']:.4f}, at {report['compression_ratio']:.2f} tokens per entry"
    return {
        f"Loss with the compressed cache ({about})": compressed,
        "Loss of the same model where every token is appended": f"{report['loss_uncompressed']:.4f}",
    }


def _training(dmc: DMCConfig, args: argparse.Namespace, iteration: int) -> dict[str, str]:
    """Rows of the card: the stage and how far it came."""
    total = getattr(args, "train_iters", None)
    if not iteration:
        return {"Stage": dmc.dmc_stage, "Iterations, tokens trained": "unknown: the checkpoint comes from a conversion"}
    stage = dmc.dmc_stage
    if total and iteration < total:
        stage += ", not finished"
        if dmc.dmc_stage == "retrofit":  # as Compression.begin_step has it
            stage += f": it asked for a ratio of {1 + (dmc.dmc_cr - 1) * (iteration - 1) / total:.2f} so far"
    samples, length = getattr(args, "consumed_train_samples", None), getattr(args, "seq_length", None)
    tokens = f"{samples * length:,} ({samples:,} samples of {length:,})" if samples and length else "unknown"
    return {
        "Stage": stage,
        "Iterations of this stage": f"{iteration:,} of {total:,}" if total else f"{iteration:,}",
        "Tokens trained in this stage": tokens,
    }


_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- dynamic-memory-compression
- kv-cache
---

# A model with Dynamic Memory Compression

For every token, each KV head of this model decides whether its key and value are appended to the KV cache or merged
into the entry before (Nawrot et al., *Dynamic Memory Compression: Retrofitting LLMs for Accelerated Inference*, ICML
2024, arXiv 2403.09636). Written by `megatron-dmc convert`, from what the checkpoint holds:

| | |
|---|---|
{table}

## Use

It runs the Python files of this folder, in plain PyTorch, on transformers {minimum} or later:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."
tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=True)
cache = model.new_cache()
inputs = tokenizer("The KV cache", return_tensors="pt")
tokens = model.generate(**inputs, past_key_values=cache, max_new_tokens=100)
print(tokenizer.decode(tokens[0]))
print(cache.ratio, "tokens per entry,", cache.entry_bytes, "bytes of entries,", cache.allocated_bytes, "in all")
```

Without `past_key_values`, `generate` makes such a cache by itself. Greedy search, sampling, beam search, padding
on the left, chunked prefill and continuing from a cache work. Refused are training (decisions are hard), padding
elsewhere, assisted decoding, other caches, and attention weights as an output. A prompt's attention is computed a block
of queries at a time.

`megatron-dmc convert` turns the folder into a checkpoint of Megatron again, which trains and serves it.
"""
