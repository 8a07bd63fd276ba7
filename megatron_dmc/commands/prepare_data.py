"""`megatron-dmc prepare-data`: text into Megatron's indexed dataset (`PREFIX.bin`, `PREFIX.idx`)."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path

from megatron_dmc.config import DMCError
from megatron_dmc.text import find_files, read_documents

EXAMPLES = """\
examples:
  megatron-dmc prepare-data --input book.txt --output data/book \\
      --tokenizer-type HuggingFaceTokenizer --tokenizer-model path/to/Llama-2-7b
  megatron-dmc prepare-data --input corpus.jsonl more.jsonl --json-key text --output data/corpus --train-tokenizer 32000
  megatron-dmc prepare-data --input src/ --pattern '*.py' --holdout 0.02 --output data/code --train-tokenizer 257

A file is one document, a JSON line is one document; each ends with the tokenizer's end-of-document token.
--holdout F puts a share F of the documents, chosen by content, into PREFIX-valid and the others into PREFIX-train.
--train-tokenizer N trains a byte-level BPE of N tokens on the input (257: the bytes and end-of-document) and leaves it
in PREFIX-tokenizer, for --tokenizer-type HuggingFaceTokenizer --tokenizer-model PREFIX-tokenizer."""

END_OF_DOCUMENT = "<|endoftext|>"
BYTES_PER_WORKER = 8 << 20  # below this, starting a process costs more than it saves
SMALLEST_VOCABULARY = 257  # 256 bytes and the end of a document


def main() -> None:
    from megatron.training.arguments import _add_tokenizer_args

    parser = argparse.ArgumentParser(
        prog="megatron-dmc prepare-data",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--input", nargs="+", required=True, type=Path, help="text files, .jsonl files, folders of either"
    )
    parser.add_argument("--output", required=True, metavar="PREFIX", help="where the dataset goes")
    parser.add_argument("--json-key", default="text", help="the key of a JSON line that holds its text (default: text)")
    parser.add_argument("--pattern", default="*", help="which files of a folder to take (default: all)")
    parser.add_argument("--holdout", type=float, default=0.0, help="share of documents to hold out (default: 0)")
    parser.add_argument("--train-tokenizer", type=int, metavar="N", help="train a byte-level BPE tokenizer of N tokens")
    parser.add_argument(
        "--workers", type=int, help="processes that tokenize (default: by the input, at most all cores)"
    )
    args = _add_tokenizer_args(parser).parse_args()
    args.rank = 0
    prepare(args)


def prepare(args: argparse.Namespace) -> None:
    """Build the dataset that the parsed arguments describe, and print what it holds.

    Raises:
        DMCError: for input that is not there or has no text, or a tokenizer that cannot be had.
    """
    if not 0 <= args.holdout < 1:
        raise DMCError(f"--holdout must be a share of at least 0 and below 1; got {args.holdout}")
    if args.workers is not None and args.workers < 1:
        raise DMCError(f"--workers must be at least 1; got {args.workers}")
    if not args.json_key:
        raise DMCError("--json-key must not be empty")
    files = find_files(args.input, args.pattern)
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    if args.train_tokenizer is not None:
        if args.tokenizer_model is not None:
            raise DMCError("give either --train-tokenizer or --tokenizer-model")
        args.tokenizer_type, args.tokenizer_model = "HuggingFaceTokenizer", f"{args.output}-tokenizer"
        train_tokenizer(read_documents(files, args.json_key), args.train_tokenizer, args.tokenizer_model)
    if args.tokenizer_type is None:
        raise DMCError("name a tokenizer (--tokenizer-type, --tokenizer-model) or train one (--train-tokenizer N)")
    tokenizer = _tokenizer(args)
    splits = {"-train": [0, 0], "-valid": [0, 0]} if args.holdout else {"": [0, 0]}
    _write(files, args, tokenizer, splits)
    for split, (documents, tokens) in splits.items():
        note = dict(
            vocab_size=tokenizer.vocab_size,
            tokenizer_type=args.tokenizer_type,
            tokenizer_model=args.tokenizer_model,
            documents=documents,
            tokens=tokens,
        )
        Path(f"{args.output}{split}.json").write_text(json.dumps(note, indent=2) + "\n")
        print(f"{args.output}{split}: {documents:,} documents, {tokens:,} tokens (vocabulary {tokenizer.vocab_size:,})")
        if not documents:
            raise DMCError(f"{args.output}{split} has no documents: give more text, or another --holdout")


def train_tokenizer(documents: Iterable[str], vocabulary: int, folder: str) -> None:
    """Train a byte-level BPE of `vocabulary` tokens and save it as Hugging Face has it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocabulary < SMALLEST_VOCABULARY:
        raise DMCError(f"--train-tokenizer needs at least {SMALLEST_VOCABULARY} tokens (all bytes); got {vocabulary}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_DOCUMENT, clean_up_tokenization_spaces=False
    )
    wrapped.save_pretrained(folder)


def _tokenizer(args: argparse.Namespace):
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    args.pad_vocab_size = False
    try:
        return build_tokenizer(args)
    except (ValueError, OSError, TypeError, AttributeError) as error:
        model = args.tokenizer_model or "(no --tokenizer-model)"
        raise DMCError(f"cannot build {args.tokenizer_type} from {model}: {error}") from error


def _write(files: list[Path], args: argparse.Namespace, tokenizer, splits: dict[str, list[int]]) -> None:
    """Tokenize the documents into one dataset per split, and count documents and tokens."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    from tqdm import tqdm

    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    with ExitStack() as stack:
        builders = {split: IndexedDatasetBuilder(f"{args.output}{split}.bin", dtype=dtype) for split in splits}
        progress = stack.enter_context(tqdm(unit="B", unit_scale=True, total=_bytes(files), desc="tokenizing"))
        documents = read_documents(files, args.json_key)
        workers = args.workers or min(os.cpu_count(), 1 + _bytes(files) // BYTES_PER_WORKER)
        if workers > 1:
            pool = stack.enter_context(get_context("spawn").Pool(workers, _start_worker, (args,)))
            encoded = pool.imap(_encode, documents, chunksize=16)
        else:
            _start_worker(args, tokenizer)
            encoded = map(_encode, documents)
        for tokens, size, share in encoded:
            split = next(iter(splits)) if len(splits) == 1 else ("-valid" if share < args.holdout else "-train")
            builders[split].add_document(tokens, [len(tokens)])
            splits[split][0] += 1
            splits[split][1] += len(tokens)
            progress.update(size)
        for split, builder in builders.items():
            builder.finalize(f"{args.output}{split}.idx")


def _bytes(files: list[Path]) -> int:
    return sum(f.stat().st_size for f in files)


_worker: dict = {}  # a worker process's tokenizer


def _start_worker(args: argparse.Namespace, tokenizer=None) -> None:
    _worker["tokenizer"] = tokenizer or _tokenizer(args)


def _encode(document: str) -> tuple[list[int], int, float]:
    """A document's tokens, its size in bytes, and a number in [0, 1) that depends on its content alone."""
    tokenizer = _worker["tokenizer"]
    encoded = document.encode()
    share = int.from_bytes(hashlib.blake2b(encoded, digest_size=6).digest(), "big") / 2**48
    return [*tokenizer.tokenize(document), tokenizer.eod], len(encoded), share
