"""Loss on held-out text, with the cache truly compressed, and what the heads did to it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from megatron_dmc.checkpoint import LoadedModel
from megatron_dmc.config import DMCError
from megatron_dmc.megatron_hooks import dmc_layers
from megatron_dmc.text import find_files, read_documents

CHUNK = 16
"""Tokens that enter the cache at once: few, so that nearly all that a token attends to is read from entries."""


@dataclass
class Compressed:
    """Held-out text read through compressed caches.

    Attributes:
        loss: mean negative log-likelihood per token, in nats.
        entries: `[layers, KV heads]`, entries kept, over all windows.
        tokens: tokens that entered each head's caches.
        segment_lengths: `segment_lengths[n]` entries stand for `n` tokens each.
        entry_bytes: bytes of the entries of all heads and layers.
    """

    loss: float
    entries: np.ndarray
    tokens: int
    segment_lengths: np.ndarray = field(repr=False)
    entry_bytes: int

    @property
    def ratios(self) -> np.ndarray:
        """`[layers, KV heads]`: tokens per entry."""
        return self.tokens / self.entries

    @property
    def ratio(self) -> float:
        """Tokens per entry over all heads."""
        return float(self.tokens * self.entries.size / self.entries.sum())


def read_windows(
    loaded: LoadedModel,
    length: int,
    *,
    text: list[Path] | None = None,
    data: str | None = None,
    limit: int | None = None,
) -> torch.Tensor:
    """Held-out tokens as windows `[n, length + 1]`, each the inputs and, one further, the targets.

    Args:
        text: text files, JSON lines or folders, tokenized with the model's tokenizer.
        data: instead, the prefix of an indexed dataset.
        limit: at most about so many tokens, from evenly spread windows.

    Raises:
        DMCError: where that makes no window, or tokens that the model does not know.
    """
    if (text is None) == (data is None):
        raise DMCError("give held-out text either as text or as an indexed dataset")
    if text is not None:
        documents = read_documents(find_files(text))
        tokens = np.concatenate([[*loaded.tokenizer.tokenize(d), loaded.tokenizer.eod] for d in documents] or [[]])
    else:
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        if not Path(f"{data}.idx").is_file():
            raise DMCError(f"no indexed dataset at {data} ({data}.idx and {data}.bin)")
        dataset = IndexedDataset(data)  # its documents are views of a file that it keeps open
        tokens = np.concatenate([dataset[i] for i in range(len(dataset))] or [[]])
    tokens = torch.from_numpy(tokens.astype(np.int64))
    count = (len(tokens) - 1) // length
    if count < 1:
        raise DMCError(f"the held-out text has {len(tokens)} tokens; at least {length + 1} are needed")
    if int(tokens.max()) >= loaded.args.padded_vocab_size:
        raise DMCError(
            f"the held-out data has token {int(tokens.max())}, the model only {loaded.args.padded_vocab_size} tokens: "
            "it was prepared with another tokenizer"
        )
    starts = torch.arange(count) * length
    if limit is not None:
        wanted = max(1, limit // length)
        starts = starts[torch.linspace(0, count - 1, min(wanted, count)).long()]
    return torch.stack([tokens[i : i + length + 1] for i in starts.tolist()])


@torch.no_grad()
def loss_compressed(loaded: LoadedModel, windows: torch.Tensor) -> Compressed:
    """Read windows `[n, s + 1]` through compressed caches, hard decisions, each window from an empty cache."""
    from megatron.core.inference.contexts import StaticInferenceContext

    layers = dmc_layers([loaded.model])
    total, entries, entry_bytes = 0.0, 0, 0
    lengths = np.zeros(windows.shape[1], dtype=np.int64)
    for rows in _batches(windows):
        context = StaticInferenceContext(len(rows), windows.shape[1] - 1)
        decisions: dict[int, list] = {layer.layer_number: [] for layer in layers}
        for layer in layers:
            layer.core_attention.observer = decisions[layer.layer_number].append
        try:
            for start in range(0, windows.shape[1] - 1, CHUNK):
                stop = min(start + CHUNK, windows.shape[1] - 1)
                total += _loss(loaded, rows, start, stop, context)
                context.sequence_len_offset = stop
        finally:
            for layer in layers:
                layer.core_attention.observer = None
        caches = [context.key_value_memory_dict[layer.layer_number] for layer in layers]
        entries = entries + np.stack([c.lengths.sum(0).cpu().numpy() for c in caches])
        entry_bytes += sum(c.entry_bytes for c in caches)
        for alphas in decisions.values():
            lengths += _segment_lengths(torch.cat(alphas), len(lengths))
    tokens = windows[:, 1:].numel()
    return Compressed(total / tokens, entries, tokens, lengths, entry_bytes)


@torch.no_grad()
def loss_uncompressed(loaded: LoadedModel, windows: torch.Tensor) -> float:
    """Mean loss per token over windows `[n, s + 1]` without DMC.

    For a model without DMC this is its loss; a DMC model appends every token instead of merging any.
    """
    layers = dmc_layers([loaded.model])
    for layer in layers:
        layer.core_attention.merging = False
    try:
        total = sum(_loss(loaded, rows, 0, windows.shape[1] - 1, None) for rows in _batches(windows))
    finally:
        for layer in layers:
            layer.core_attention.merging = True
    return total / windows[:, 1:].numel()


def _batches(windows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """So many windows at a time that the scores of one head stay within 32 MB: attention here is written out."""
    return windows.split(max(1, min(32, 2**23 // windows.shape[1] ** 2)))


def _loss(loaded: LoadedModel, rows: torch.Tensor, start: int, stop: int, context) -> float:
    """Summed loss of predicting tokens `start + 1 … stop` of each row."""
    rows = rows.to(loaded.device)
    positions = torch.arange(start, stop, device=loaded.device).expand(len(rows), -1)
    logits = loaded.model(rows[:, start:stop], positions, None, inference_context=context)
    return float(
        F.cross_entropy(logits.float().flatten(0, 1), rows[:, start + 1 : stop + 1].flatten(), reduction="sum")
    )


def _segment_lengths(alpha: torch.Tensor, size: int) -> np.ndarray:
    """How many segments have each length: decisions `[s, b, g]` cut every head's tokens where they are 0."""
    appended = (alpha == 0).flatten(1).T  # a token that appends begins a segment
    begin = torch.cat([appended, torch.ones_like(appended[:, :1])], 1).flatten().nonzero()[:, 0]
    # One mark past each row's end closes its last segment and, having length 1 to the next row's first, must not count.
    gaps = begin.diff()
    row_end = (begin[:-1] + 1) % (appended.shape[1] + 1) == 0
    return np.bincount(gaps[~row_end].cpu().numpy(), minlength=size)[:size]


def perplexity(loss: float) -> float:
    """`exp(loss)`."""
    return math.exp(loss)
