"""`megatron-dmc convert`: a model of Hugging Face into a checkpoint of Megatron, and back.

Llama-2, Llama-3.x, Mistral, Qwen2.5 and Qwen3 (dense), and NVIDIA's DMC checkpoints of Llama-2. What SOURCE is decides
the direction.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_dmc.config import DMCError

EXAMPLES = """\
examples:
  megatron-dmc convert models/Llama-3.1-8B checkpoints/llama-3.1-8b   # for --load, or a recipe's checkpoints.original
  megatron-dmc convert checkpoints/trained models/trained             # for transformers' from_pretrained
  megatron-dmc convert checkpoints/dmc-4x models/dmc-4x               # the same, with trust_remote_code=True
  megatron-dmc convert nvidia/Llama-2-7B-DMC-4x checkpoints/dmc-4x --tokenizer models/Llama-2-7b-hf

To Megatron: any parallel layout, with Transformer Engine or without, loads the checkpoint (--ckpt-format torch_dist).
The model's flags, which a run must be given, are left beside it as the part `model` of a recipe (model.yaml).
Training looks for the tokenizer in HF_FOLDER.
Back: the latest checkpoint under SOURCE, or one iter_… folder, of any layout. config.json and the tokenizer are those
of the folder that the model came from, where it is still there.
A checkpoint of the stage retrofit (finished or not) or finetune becomes a model with a compressed cache, whose code and
model card (README.md) are in the folder; converted to Megatron again it keeps DMC's settings. zero-out is refused.
Tensors keep their dtype. Memory holds one of them at a time."""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="megatron-dmc convert",
        usage="megatron-dmc convert HF_FOLDER MEGATRON_FOLDER\n       megatron-dmc convert MEGATRON_FOLDER HF_FOLDER",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SOURCE", type=Path, help="config.json with *.safetensors, or a checkpoint")
    parser.add_argument("target", metavar="TARGET", type=Path, help="a new folder")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier conversion in TARGET")
    parser.add_argument(
        "--like", metavar="HF_FOLDER", type=Path, help="back: the folder to take config.json and the tokenizer from"
    )
    parser.add_argument(
        "--tokenizer", metavar="HF_FOLDER", type=Path, help="from NVIDIA's DMC checkpoints: where the tokenizer is"
    )
    parser.add_argument(
        "--report", metavar="JSON", type=Path, help="of a DMC model: what megatron-dmc report found, for the model card"
    )
    convert(parser.parse_args())


def convert(options: argparse.Namespace) -> None:
    """Convert as the parsed options say, and print what was made.

    Raises:
        DMCError: for a source that is neither, or what `megatron_dmc.convert` refuses.
    """
    from megatron_dmc import nvidia
    from megatron_dmc.convert import CONFIG, RELEASE, nvidia_to_megatron, to_hugging_face, to_megatron

    source, target = options.source, options.target
    if not source.is_dir():
        raise DMCError(f"no folder {source}: give one of Hugging Face (config.json, *.safetensors) or a checkpoint")
    from_nvidia = nvidia.find(source) is not None
    if options.tokenizer is not None and not from_nvidia:
        raise DMCError(f"--tokenizer is for NVIDIA's DMC checkpoints; {source} has no {nvidia.FILE}")
    to_megatrons = from_nvidia or (source / CONFIG).is_file()
    if options.report is not None and to_megatrons:
        raise DMCError("--report is for the model card of a DMC model that becomes Hugging Face's")
    if from_nvidia:
        if options.tokenizer is None:
            raise DMCError(
                "NVIDIA's checkpoints hold no tokenizer: give --tokenizer, a folder of Hugging Face with Llama-2's"
            )
        model = nvidia_to_megatron(source, target, options.tokenizer, options.overwrite)
        made = f"{target / RELEASE}; the model's flags: {target / 'model.yaml'}"
    elif to_megatrons:
        if options.like is not None:
            raise DMCError("--like is for the way back; to Megatron, config.json is the source's")
        model = to_megatron(source, target, options.overwrite)
        made = f"{target / RELEASE}; the model's flags: {target / 'model.yaml'}"
    else:
        model, notes = to_hugging_face(source, target, options.like, options.overwrite, report=options.report)
        made = f"{target}; {notes}"
    print(f"{model.model_type}, {model.layers} layers, {model.vocabulary:,} rows in the embedding: {made}")
