"""What models of Hugging Face make of held-out text through their caches; `benchmarks/quality.py` runs it.

    python benchmarks/quality_measure.py --work runs/quality --jobs jobs.json

Each job is `{"name", "model", "press", "budgets"}`: a folder under `WORK/models`, and for a method of kvpress its name
("none": nothing is evicted) and how many bytes it may keep: `budgets["text"]` by length of the context, and
`budgets["recall"]` by number of keys, for the contexts of the recall test. One way of reading serves all methods: a
context is read at once into an empty cache, which a press then compresses (as kvpress is meant to be used: what the
context's own tokens attended to was not compressed), and the tokens after it are predicted from that cache. DMC
compresses those tokens, too; presses keep them all.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
import traceback
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_dmc.config import DMCError
from megatron_dmc.retrieval import multi_key

CONTEXTS = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 31 / 32)
"""Lengths of the context, as shares of a window."""
CONTINUATION = 1 / 32
"""Tokens after a context that are predicted, as a share of a window."""
KEYS, ASKED = (4, 16), 4
"""Of the recall test: keys in a context, and for how many of them it is asked."""
CHUNK = 64
"""Tokens that enter the cache at once where whole windows are read."""


class Reader:
    """A model, and a press or none."""

    def __init__(self, folder: Path, press: str | None):
        from transformers import AutoModelForCausalLM

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=True, dtype=torch.bfloat16 if self.device == "cuda" else torch.float32,
            attn_implementation="eager" if press else "sdpa",
        ).to(self.device).eval()  # fmt: skip
        self.press = press

    def new_cache(self) -> Any:
        from transformers import DynamicCache

        return self.model.new_cache() if hasattr(self.model, "new_cache") else DynamicCache()

    def kept(self, context: int, budget: float) -> int:
        """How many tokens of a context a press keeps, of a budget in bytes."""
        config = self.model.config
        entry = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * self.model.dtype.itemsize
        return max(1, min(context, int(budget / entry)))

    def compressing(self, context: int, budget: float | None) -> Any:
        """While this is open, the press evicts from the context that is read."""
        if self.press in (None, "none"):
            return nullcontext()
        import kvpress

        kept = self.kept(context, budget)
        press = getattr(kvpress, f"{self.press}Press")(compression_ratio=max(0, 1 - (kept + 0.5) / context))
        if hasattr(press, "window_size"):  # its last tokens, which stay: not all that may
            press.window_size = min(press.window_size, max(1, kept // 2))
        return press(self.model)

    @torch.no_grad()
    def read(self, tokens: Tensor, start: int, cache: Any) -> Tensor:
        """Logits `[b, s, vocabulary]` of tokens `[b, s]` at positions from `start` on; they enter the cache."""
        positions = torch.arange(start, start + tokens.shape[1], device=self.device).expand_as(tokens)
        return self.model(tokens.to(self.device), past_key_values=cache, position_ids=positions).logits

    def read_context(self, tokens: Tensor, budget: float | None) -> Any:
        """The cache of contexts `[b, s]`, compressed; a press keeps `budget` bytes of each."""
        cache = self.new_cache()
        with self.compressing(tokens.shape[1], budget):
            self.read(tokens, 0, cache)
        return cache


def size_of(cache: Any) -> tuple[float, int]:
    """Entries of a KV head, averaged over all sequences and heads, and the bytes that the cache needs.

    For DMC that is the entries, and what merging the next token may need of the last ones (as many tokens whatever the
    length); not the padding behind shorter heads' entries, which a paged cache does without.
    """
    if hasattr(cache, "entry_bytes"):
        state = sum(x.nbytes for layer in cache.layers for x in layer.tail)
        return cache.get_seq_length() / cache.ratio, cache.entry_bytes + state
    layers = [(layer.keys, layer.values) for layer in cache.layers]
    kept = sum(key.shape[2] for key, _ in layers) / len(layers)
    return kept, sum(key.nbytes + value.nbytes for key, value in layers)


def losses(logits: Tensor, targets: Tensor) -> Tensor:
    """`[b, s]`, in nats."""
    return F.cross_entropy(logits.float().transpose(1, 2), targets.to(logits.device), reduction="none").cpu()


def continuations(reader: Reader, windows: Tensor, batch: int, budgets: dict[str, float] | None) -> dict[str, Any]:
    """Loss of the tokens after contexts, over windows `[n, s + 1]`; entries and bytes of the caches of the contexts."""
    length = windows.shape[1] - 1
    count, found, tokens, kept, size = round(CONTINUATION * length), {}, 0, 0.0, {}
    for share in CONTEXTS:
        context = round(share * length)
        total, held = [], 0
        for rows in windows.split(batch):
            cache = reader.read_context(rows[:, :context], budgets and budgets[str(context)])
            mean, held_now = size_of(cache)
            tokens, kept, held = tokens + context * len(rows), kept + mean * len(rows), held + held_now
            logits = reader.read(rows[:, context : context + count], context, cache)
            total.append(losses(logits, rows[:, context + 1 : context + count + 1]))
        found[context] = torch.cat(total).mean(1)
        size[context] = held / len(windows)
    by_window = torch.stack(list(found.values())).mean(0)
    return dict(
        continuation_loss=float(by_window.mean()),
        continuation_loss_by_context={context: float(losses.mean()) for context, losses in found.items()},
        continuation_loss_by_window=by_window.tolist(),
        tokens_per_entry=tokens / kept, cache_bytes=size[max(size)], cache_bytes_by_context=size,
    )  # fmt: skip


def whole_windows(reader: Reader, windows: Tensor, batch: int) -> dict[str, Any]:
    """Loss of windows `[n, s + 1]` that enter the cache piece by piece, and by position: of the tokens up to each."""
    length, total = windows.shape[1] - 1, []
    for rows in windows.split(batch):
        cache, parts = reader.new_cache(), []
        for start in range(0, length, CHUNK):
            stop = min(length, start + CHUNK)
            parts.append(losses(reader.read(rows[:, start:stop], start, cache), rows[:, start + 1 : stop + 1]))
        total.append(torch.cat(parts, 1))
    total = torch.cat(total)
    by_position = total.mean(0)
    parts = {min(length, start + CHUNK): float(by_position[start : start + CHUNK].mean())
             for start in range(0, length, CHUNK)}  # fmt: skip
    return dict(loss=float(total.mean()), loss_by_position=parts, loss_by_window=total.mean(1).tolist())


def recall(
    reader: Reader, tokenizer: Any, length: int, contexts: int, budgets: dict[str, float] | None
) -> dict[str, Any]:
    """Shares of questions whose answers greedy decoding gives; the context is compressed before questions come.

    For each number of keys `contexts` texts are read, and of each `ASKED` keys are asked for, from copies of its cache.
    """

    def tokenize(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    found, answers, size, tokens, kept = {}, {}, {}, 0, 0.0
    for keys in KEYS:
        right, held = [], 0
        for seed in range(contexts):
            try:
                asked = [i * keys // ASKED for i in range(ASKED)]
                questions = [multi_key(tokenize, length, keys, 1_000_000 + seed, asked=i) for i in asked]
            except DMCError:  # the text is too short for so many
                break
            context = questions[0].context
            cache = reader.read_context(torch.tensor([context]), budgets and budgets[str(keys)])
            mean, held_now = size_of(cache)
            tokens, kept, held = tokens + len(context), kept + mean, held + held_now
            for question in questions:
                rest = torch.tensor([question.question + question.answer])
                logits = reader.read(rest[:, :-1], len(context), copy.deepcopy(cache))
                given = logits[0, -len(question.answer) :].argmax(-1).tolist()
                right.append(given == question.answer)
        else:
            found[keys], answers[keys], size[keys] = sum(right) / len(right), right, held / contexts
    return dict(
        recall=float(np.mean(list(found.values() or [0.0]))), recall_by_keys=found, recall_answers=answers,
        recall_cache_bytes=size, recall_tokens_per_entry=tokens / kept if kept else 1.0,
    )  # fmt: skip


def held_out(work: Path, length: int, count: int) -> Tensor:
    """Evenly spread windows `[count, length + 1]` of the held-out text."""
    tokens = np.fromfile(
        work / "held-out.bin", dtype=np.uint16
    )  # what Megatron's data sets have for small vocabularies
    starts = np.linspace(0, len(tokens) - length - 1, count).astype(int)
    return torch.from_numpy(np.stack([tokens[i : i + length + 1] for i in starts]).astype(np.int64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--jobs", type=Path, required=True)
    parser.add_argument("--windows", type=int, required=True)
    parser.add_argument("--contexts", type=int, required=True, help="of the recall test, for each number of keys")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--minutes", type=float, default=25, help="begin no job later than that")
    parser.add_argument("--commit", help="to note in the results")
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.work / "tokenizer")
    (options.work / "results").mkdir(exist_ok=True)
    failed = False
    for job in json.loads(options.jobs.read_text()):
        if time.monotonic() > end:
            break
        try:
            result = measure(options, job, tokenizer)
        except Exception:  # the others can still be measured
            failed = True
            print(f"{job['name']} failed", file=sys.stderr, flush=True)
            traceback.print_exc()
            continue
        path = options.work / "results" / f"{job['name']}.json"
        path.with_suffix(".partial").write_text(json.dumps(result, indent=1) + "\n")
        path.with_suffix(".partial").rename(path)
        print(f"{job['name']}: {result['continuation_loss']:.4f}", flush=True)
    sys.exit(int(failed))


def measure(options: argparse.Namespace, job: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    started = time.monotonic()
    reader = Reader(options.work / "models" / job["model"], job["press"])
    budgets = job["budgets"] or {"text": None, "recall": None}
    length = reader.model.config.max_position_embeddings
    windows = held_out(options.work, length, options.windows)
    result = dict(job, commit=options.commit, parameters=sum(p.numel() for p in reader.model.parameters()))
    result |= continuations(reader, windows, options.batch, budgets["text"])
    result |= recall(reader, tokenizer, length, options.contexts, budgets["recall"])
    if reader.press is None:
        result |= whole_windows(reader, windows, options.batch)
    return dict(result, seconds=time.monotonic() - started)


if __name__ == "__main__":
    main()
