"""Loss on held-out text, with the cache truly compressed, and what the heads did to it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from megatron_dmc.checkpoint import LoadedModel
from megatron_dmc.config import DMCError
from megatron_dmc.megatron_hooks import dmc_layers
from megatron_dmc.ops.reference import decision_logits
from megatron_dmc.text import find_files, read_documents

CHUNK = 16
"""Tokens that enter the cache at once: few, so that nearly all that a token attends to is read from entries."""

SAMPLE = 500
"""Tokens at most, from the beginning of the first window, whose decisions are kept one by one."""


@dataclass
class Compressed:
    """Held-out text read through compressed caches.

    Attributes:
        loss: mean negative log-likelihood per token, in nats.
        entries: `[layers, KV heads]`, entries kept, over all windows.
        tokens: tokens that entered each head's caches.
        segment_lengths: `segment_lengths[n]` entries stand for `n` tokens each.
        entry_bytes: bytes of the entries of all heads and layers.
        followed: `[vocabulary]` int64, how often each token stands in the windows with another one behind it.
        closings: `[layers, vocabulary]` int64, how often it was then the last of its segment, in any KV head.
        sample: bool `[n, layers, KV heads]`, which of the first window's first `n = min(s, SAMPLE)` tokens merged into
            the entry before them.
    """

    loss: float
    entries: np.ndarray
    tokens: int
    segment_lengths: np.ndarray = field(repr=False)
    entry_bytes: int
    followed: np.ndarray = field(repr=False)
    closings: np.ndarray = field(repr=False)
    sample: np.ndarray = field(repr=False)

    @property
    def ratios(self) -> np.ndarray:
        """`[layers, KV heads]`: tokens per entry."""
        return self.tokens / self.entries

    @property
    def ratio(self) -> float:
        """Tokens per entry over all heads."""
        return float(self.tokens * self.entries.size / self.entries.sum())


def check_positions(loaded: LoadedModel, flag: str, length: int) -> None:
    """Refuse texts of more tokens than a model has positions, where these are learned.

    Args:
        flag: that gave `length`, for the message.

    Raises:
        DMCError: for such a length.
    """
    if loaded.args.position_embedding_type != "learned_absolute":
        return
    if length > (limit := loaded.args.max_position_embeddings):
        raise DMCError(f"{flag} {length} exceeds the model's {limit} learned positions: give {limit} at most")


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
        raise DMCError(
            f"the held-out text has {len(tokens)} tokens; a window of --seq-length {length} needs {length + 1}: give "
            "more text, or a smaller --seq-length"
        )
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
    vocabulary, sample = loaded.args.padded_vocab_size, []
    closings = torch.zeros(len(layers), vocabulary, dtype=torch.int64, device=loaded.device)
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
        for layer, alphas in enumerate(decisions.values()):
            alpha = torch.cat(alphas)
            lengths += _segment_lengths(alpha, len(lengths))
            # The last token that entered has no successor to close its segment, and behind it stands the last target.
            followed = rows[:, :-2].T.flatten().to(alpha.device)
            closings[layer].index_add_(0, followed, (alpha[1:] == 0).sum(-1).flatten())
            if len(sample) < len(layers):
                sample.append(alpha[:SAMPLE, 0].bool().cpu())
    tokens = windows[:, 1:].numel()
    return Compressed(
        loss=total / tokens,
        entries=entries,
        tokens=tokens,
        segment_lengths=lengths,
        entry_bytes=entry_bytes,
        followed=windows[:, :-2].flatten().bincount(minlength=vocabulary).cpu().numpy(),
        closings=closings.cpu().numpy(),
        sample=torch.stack(sample, 1).numpy(),
    )


@torch.no_grad()
def loss_uncompressed(loaded: LoadedModel, windows: torch.Tensor) -> float:
    """Mean loss per token over windows `[n, s + 1]` with nothing merged.

    For a model without DMC this is its loss; a DMC model appends every token instead of merging any.
    """
    with appending_all(loaded):
        total = sum(_loss(loaded, rows, 0, windows.shape[1] - 1, None) for rows in _batches(windows))
    return total / windows[:, 1:].numel()


@torch.no_grad()
def loss_as_trained(loaded: LoadedModel, windows: torch.Tensor, *, hard: bool = False) -> tuple[float, float]:
    """Mean loss per token over windows `[n, s + 1]` with training's decisions, and their ratio.

    Those of the stage finetune are a compressed cache's, unless it was to be soft; others are soft and have noise.
    Where compressed caches have a higher loss, the model has not learned decisions that hard ones can stand for: it
    reads entries that count as merged while a soft decision leaves something of them, or it relies on the noise.
    `hard` decisions of the same noise tell the two apart: what they cost over soft ones is due to the first, what
    compressed caches cost over them to the second.
    """
    layers = dmc_layers([loaded.model])
    compression = layers[0].core_attention.compression
    config = compression.config
    merged = torch.zeros((), dtype=torch.int64, device=loaded.device)

    def count(alpha: torch.Tensor) -> None:
        nonlocal merged
        merged = merged + (alpha > 0.5).sum()

    training = [layer.core_attention.training for layer in layers]
    try:
        if hard:
            compression.config = replace(config, dmc_temp=1e-6)  # soft ones only where a logit is as good as 0
        for layer in layers:
            layer.core_attention.train()
            layer.core_attention.observer = count
        compression.begin_step(0, 1)  # with noise that is the same whenever this is called
        total = sum(_loss(loaded, rows, 0, windows.shape[1] - 1, None) for rows in _batches(windows))
    finally:
        compression.config = config
        for layer, before in zip(layers, training, strict=True):
            layer.core_attention.train(before)
            layer.core_attention.observer = None
    tokens = windows[:, 1:].numel()
    decisions = tokens * len(layers) * compression.kv_heads
    return total / tokens, 1 / (1 - int(merged) / decisions)


@contextlib.contextmanager
def appending_all(loaded: LoadedModel) -> Iterator[None]:
    """While this is open, a DMC model appends every token instead of merging any."""
    layers = dmc_layers([loaded.model])
    for layer in layers:
        layer.core_attention.merging = False
    try:
        yield
    finally:
        for layer in layers:
            layer.core_attention.merging = True


@dataclass(frozen=True)
class Score:
    """What a model makes of a continuation of a text.

    Attributes:
        log_prob: of the continuation given the text, in nats.
        greedy: whether every token is the most likely one, so that greedy decoding would give the continuation.
        ratio: tokens per entry of the caches, over all heads, when both are read; 1 where nothing merges.
    """

    log_prob: float
    greedy: bool
    ratio: float


@torch.no_grad()
def score(
    loaded: LoadedModel, rows: list[tuple[list[int], list[int]]], *, batch_tokens: int = 8192, progress: bool = False
) -> list[Score]:
    """Log-probabilities of continuations, each `(text, continuation)` of one token or more, with hard decisions.

    All tokens are read at once, which gives what a compressed cache gives token by token, in exact arithmetic.

    Args:
        batch_tokens: tokens of a forward pass, padding included; a longer row has one to itself.
        progress: show a bar.

    Raises:
        DMCError: for a row with an empty part, or with tokens that the model does not know.
    """
    known = loaded.tokenizer.vocab_size
    for text, continuation in rows:
        if not text or not continuation:
            raise DMCError("a text and its continuation must have a token each, at least")
        if not 0 <= min(*text, *continuation) <= max(*text, *continuation) < known:
            raise DMCError(f"tokens must be 0 to {known - 1}, the model's vocabulary")
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]) - len(rows[i][1]))
    found: list[Score | None] = [None] * len(rows)
    bar = tqdm(total=len(rows), disable=not progress, unit="text")
    while order:
        longest = sum(map(len, rows[order[0]])) - 1
        batch, order = _split(order, max(1, batch_tokens // longest))
        tokens = torch.zeros(len(batch), longest, dtype=torch.int64)
        for row, i in enumerate(batch):
            inputs = (rows[i][0] + rows[i][1])[:-1]
            tokens[row, : len(inputs)] = torch.tensor(inputs)
        tokens = tokens.to(loaded.device)
        positions = torch.arange(longest, device=loaded.device).expand_as(tokens)
        with _decisions(loaded) as decisions:
            # An engine in this process leaves Megatron in inference, where logits must be asked for whole.
            logits = loaded.model(tokens, positions, None, runtime_gather_output=True)
        for row, i in enumerate(batch):
            text, continuation = rows[i]
            end = len(text) + len(continuation) - 1
            own = logits[row, len(text) - 1 : end, :known].float()
            targets = torch.tensor(continuation, device=own.device)
            kept = [(~merged[1:end, row]).sum(0) + 1 for merged in decisions]  # the first token is always an entry
            found[i] = Score(
                log_prob=-float(F.cross_entropy(own, targets, reduction="sum")),
                greedy=bool((own.argmax(-1) == targets).all()),
                ratio=end * sum(map(len, kept)) / int(sum(map(torch.sum, kept))) if kept else 1.0,
            )
        bar.update(len(batch))
    bar.close()
    return found


def _split(order: list[int], count: int) -> tuple[list[int], list[int]]:
    return order[:count], order[count:]


@contextlib.contextmanager
def _decisions(loaded: LoadedModel) -> Iterator[list[torch.Tensor]]:
    """What every DMC layer decides in a pass without a cache: bool `[s, b, g]`, merged or not."""
    found: list[torch.Tensor] = []

    def look(core, arguments) -> None:
        key = arguments[1]
        offset = core.compression.offset if core.merging else math.inf
        found.append(decision_logits(key, offset) > 0)

    handles = [
        layer.core_attention.register_forward_pre_hook(look)
        for layer in dmc_layers([loaded.model])
        if layer.core_attention.compression.config.merges
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


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
