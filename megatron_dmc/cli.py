"""The command line: one word chooses the command, the rest of the line is that command's."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings

from megatron_dmc import __version__
from megatron_dmc.config import DMCError

COMMANDS = {
    "prepare-data": "text, JSON lines or a folder of files into Megatron's indexed dataset",
    "convert": "a model of Hugging Face into a checkpoint of Megatron, and back",
    "train": "Megatron's training loop with DMC: every Megatron argument and --dmc-…",
    "generate": "continue prompts from a compressed cache",
    "serve": "an HTTP server with OpenAI's interface",
    "report": "what compression costs a checkpoint, and which heads compress how much, and where segments end",
    "evaluate": "perplexity, recall, and tasks of lm-evaluation-harness, with compression and without",
    "plan": "what a recipe takes on a number of GPUs: layout, memory, GPU-hours and its commands",
    "run": "carry a recipe out: the three stages, from wherever they were left",
}

USAGE = """\
megatron-dmc {version}: Dynamic Memory Compression for Megatron-LM

usage: megatron-dmc COMMAND …     (or: python -m megatron_dmc COMMAND …, torchrun … -m megatron_dmc COMMAND …)

{commands}

examples:
  megatron-dmc prepare-data --input corpus/ --output data/corpus --train-tokenizer 4096
  megatron-dmc convert models/Llama-3.1-8B checkpoints/llama-3.1-8b
  torchrun --nproc-per-node 8 -m megatron_dmc train --dmc-stage retrofit --dmc-cr 4 --load … --finetune …
  megatron-dmc generate checkpoints/dmc --prompt "def main("
  megatron-dmc serve checkpoints/dmc --port 8000
  megatron-dmc report checkpoints/dmc --text held-out.txt
  megatron-dmc plan examples/recipes/llama-2-7b.yaml --gpus 64

megatron-dmc COMMAND --help explains one command. On a machine without a GPU everything runs on the CPU."""


def quiet() -> None:
    """Without what Megatron and others say about their setup; nor do the processes that this one starts."""
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    warnings.filterwarnings("ignore")
    logging.getLogger("megatron").setLevel(logging.ERROR)


def main() -> None:
    """Run the command that the command line names."""
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in ("-h", "--help"):
        commands = "\n".join(f"  {name:14}{help}" for name, help in COMMANDS.items())
        print(USAGE.format(version=__version__, commands=commands))
        sys.exit(0 if len(sys.argv) > 1 else 2)
    if command == "--version":
        print(__version__)
        return
    if command not in COMMANDS:
        sys.exit(f"megatron-dmc: no command {command!r}; there are {', '.join(COMMANDS)}")
    sys.argv = [f"megatron-dmc {command}", *sys.argv[2:]]
    if command not in ("train", "run"):  # there, what Megatron has to say about its setup is worth reading
        quiet()
    try:
        importlib.import_module(f"megatron_dmc.commands.{command.replace('-', '_')}").main()
    except DMCError as error:
        sys.exit(f"megatron-dmc {command}: {error}")
