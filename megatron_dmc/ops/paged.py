"""Attention of new tokens against the paged cache, one layer of one step.

Two kinds of tokens come in a step (`megatron_dmc.cache.Step`). Those of decoding, few to a sequence, take one launch:
decisions, merging, rotation, the write into pages, attention (`csrc/paged_attention.cu`). Chunks of prompts take three,
with attention over entries instead of tokens (`csrc/paged_chunks.cu`). The reference here does both through
`reference.dmc_attention_cached`, sequence by sequence; it is the specification.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from megatron_dmc.cache import PagedCache, Step
from megatron_dmc.ops import reference
from megatron_dmc.ops.fused import _unsupported, readable
from megatron_dmc.ops.reference import Rotary

_kernels = torch.ops.megatron_dmc  # csrc/bindings.cpp; tests put the emulated ones here


@torch.no_grad()
def paged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotary: Rotary | None,
    cache: PagedCache,
    layer: int,
    step: Step,
    *,
    offset: float = 5.0,
    interleaved: bool = False,
    scale: float | None = None,
    kernel: str = "fused",
) -> tuple[Tensor, Tensor]:
    """A step's tokens attend to the cache and to themselves, and enter it when the step is committed.

    Args:
        query, key, value: `[tokens, h|g, d]`, unrotated, in the step's order.
        rotary: `(cos, sin)` by position, `[positions, pairs]`, or `None`.
        cache, layer, step: where the sequences are; `step` is what `cache.begin` returned.
        kernel: "fused", or "reference" (which waits for the device).
        Others as for `reference.dmc_attention_cached`.

    Returns:
        `output` `[tokens, h, d]`, zeros for empty places, and the decisions `alpha` `[tokens, g]`. Undefined if the
        step is not `ok`: nothing is computed then.

    Raises:
        ValueError: for arguments that do not fit; the message names the argument.
    """
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() != 3 or len(x) != step.tokens:
            raise ValueError(
                f"{name} must be [tokens, heads, channels] of the step's {step.tokens} tokens; got {tuple(x.shape)}"
            )
    reference._check(query[:, None], key[:, None], value[:, None], None, cache.shape.window, None, None)
    if rotary is not None and rotary[0].shape[0] < cache.shape.max_tokens:
        raise ValueError(
            f"rotary cos must hold all {cache.shape.max_tokens} positions of the cache; got {tuple(rotary[0].shape)}"
        )
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    alpha = torch.empty(key.shape[:2], dtype=torch.float32, device=key.device)
    if kernel == "reference":
        output.zero_()
        alpha.zero_()
        _reference(query, key, value, rotary, cache, layer, step, output, alpha, offset, interleaved, scale)
        return output, alpha
    if kernel != "fused":
        raise ValueError(f"kernel must be fused or reference; got {kernel!r}")

    b, n, c = len(step.slots), step.decoding_tokens, len(step.chunk_slots)
    cos, sin = (None, None) if rotary is None else (t.float().contiguous() for t in rotary)
    query, key, value = (readable(x) for x in (query, key, value))
    settings = cache.shape.window, offset, interleaved, scale
    state = (getattr(cache, name, None) for name in ("recent", "recent_weights", "mean", "total"))
    recent, recent_weights, mean, total = (None if x is None else x[layer] for x in state)
    held = (
        cache.pages, cache.scales, cache.table[layer], cache.lengths[layer], cache.tokens,
        recent, recent_weights, mean, total, getattr(cache, "steps", None),
    )  # fmt: skip
    if n:
        by_token = [_by_sequence(x, n, step.new_tokens) for x in (query, key, value, output, alpha)]
        _kernels.paged_attention_(
            *by_token[:3], cos, sin, step.slots, step.ok, step.lengths[layer, :b], *by_token[3:], *settings, *held,
            step.first_unit[layer], step.first_head[layer], step.arrived,
        )  # fmt: skip
    if c:
        chunks = [x[n:, None] for x in (query, key, value, output, alpha)]
        _kernels.paged_chunks_(
            *chunks[:3], cos, sin, step.chunk_slots, step.ok, step.lengths[layer, b:], *chunks[3:], *settings, *held,
            step.first_token, max(step.chunk_lengths), cache._free, cache._free_count,
            None if step.last is None else step.last[layer],
            None if step.last is None else step.last_weights[layer],
        )  # fmt: skip
    return output, alpha


def choose_paged_kernel(query: Tensor, cache: PagedCache) -> str:
    """ "fused" on a GPU of Ampere's generation or later, for caches in bfloat16 and float16; else "reference"."""
    if not query.is_cuda:
        return "reference"
    reason = _unsupported(query)
    if reason is None and cache.dtype not in (torch.bfloat16, torch.float16):
        reason = f"the cache holds {cache.dtype}, and the kernels take bfloat16 and float16"
    if reason is None:
        return "fused"
    warnings.warn(f"paged attention runs on the slow reference operations: {reason}", stacklevel=2)
    return "reference"


def _by_sequence(x: Tensor, tokens: int, new_tokens: int) -> Tensor:
    """The tokens of decoding, `[new tokens, b, …]`."""
    return x[:tokens].unflatten(0, (-1, new_tokens)).transpose(0, 1)


def _reference(query, key, value, rotary, cache, layer, step, output, alpha, offset, interleaved, scale) -> None:
    b, n, page = len(step.slots), step.new_tokens, cache.shape.page_entries
    runs = [(slot, i * n, n) for i, slot in enumerate(step.slots.tolist())]
    begins = step.first_token.tolist()
    for i, slot in enumerate(step.chunk_slots.tolist()):
        runs.append((slot, step.decoding_tokens + begins[i], step.chunk_lengths[i]))
    for i, (slot, first, n) in enumerate(runs):
        if slot < 0 or not step.ok:
            continue
        tokens, lengths = int(cache.tokens[slot]), cache.lengths[layer, slot].tolist()
        new = slice(first, first + n)
        contiguous = _gathered(cache, layer, slot, tokens, offset)
        output[new, None], alpha[new, None] = reference.dmc_attention_cached(
            *(x[new, None] for x in (query, key, value)),
            None if rotary is None else tuple(t[tokens : tokens + n] for t in rotary),
            contiguous, window=cache.shape.window, offset=offset, interleaved=interleaved, scale=scale,
        )  # fmt: skip
        new_lengths = contiguous.lengths[0].tolist()
        if i >= b and not cache._take_for_chunk(layer, slot, new_lengths):
            step.ok.fill_(False)
            return
        for head, (old, now) in enumerate(zip(lengths, new_lengths, strict=True)):
            index = torch.arange(max(old - 1, 0), now, device=query.device)
            pages, places = cache.table[layer, slot, head, index // page], index % page
            entries = contiguous.entries[:, 0, head, index].transpose(0, 1)  # [entries, 2, d]
            if cache.scales is not None:
                scales = entries.abs().amax(-1) / torch.finfo(cache.pages.dtype).max
                cache.scales[pages, :, places] = scales
                entries = entries / scales[..., None].clamp(min=1e-38)
            permuted = _permuted(entries, places[:, None], cache.pages.element_size())
            cache.pages[pages, :, places] = permuted.to(cache.pages.dtype)
        step.lengths[layer, i] = contiguous.lengths[0].int()
        pairs = torch.stack([key, value], 2)[new].transpose(0, 1)  # [g, n, 2, d]
        weights = reference.importance(query[new, None], key.shape[1], offset)[:, 0].T
        if not cache.shape.window:
            next_state = 1 - int(cache.steps[slot]) % 2
            mean_key, mean_value, total, _ = contiguous.tail
            cache.mean[layer, next_state, slot] = torch.stack([mean_key[0, 0], mean_value[0, 0]], 1)
            cache.total[layer, next_state, slot] = total[0, 0]
        elif i < b:
            ring = torch.arange(tokens, tokens + n, device=query.device) % cache.shape.recent_tokens
            cache.recent[layer, slot, :, ring] = pairs
            cache.recent_weights[layer, slot, :, ring] = weights
        elif step.last is not None:
            kept = min(n, cache.shape.window - 1)
            step.last[layer, i - b, :, -kept:] = pairs[:, -kept:]
            step.last_weights[layer, i - b, :, -kept:] = weights[:, -kept:]


def _permuted(entries: Tensor, rows: Tensor, element_size: int) -> Tensor:
    """Entries `[…, d]` as pages of so many bytes a channel hold them in their rows `[…]`, or back from there.

    Pieces of 16 bytes change places as in `Rows` in csrc/tensor_core.cuh.
    """
    d, size = entries.shape[-1], 16 // element_size
    if d % (4 * size):
        return entries
    piece = rows % 8 if d % (8 * size) == 0 else rows % 8 // 2
    channels = torch.arange(d, device=entries.device) ^ (piece * size)[..., None]
    return entries.gather(-1, channels.expand_as(entries))


def _gathered(cache: PagedCache, layer: int, slot: int, tokens: int, offset: float) -> reference.DMCCache:
    """One sequence of one layer as the reference holds it."""
    lengths = cache.lengths[layer, slot].long()
    pages = cache.table[layer, slot, :, : -(-int(lengths.max()) // cache.shape.page_entries)].clamp(min=0).long()
    entries = cache.pages[pages]  # [g, pages, 2, page_entries, d]
    rows, size = torch.arange(cache.shape.page_entries, device=pages.device), entries.element_size()
    if cache.scales is not None:
        entries = entries.float() * cache.scales[pages][..., None]
    entries = _permuted(entries, rows, size)
    entries = entries.permute(2, 0, 1, 3, 4).flatten(2, 3)  # [2, g, entries, d]
    unused = torch.arange(entries.shape[2], device=entries.device) >= lengths[:, None]
    entries = entries.masked_fill(unused[None, ..., None], 0)[:, None]
    tail = None
    if cache.shape.window and tokens:
        last = range(max(0, tokens - cache.shape.window + 1), tokens)
        ring = torch.tensor([t % cache.shape.recent_tokens for t in last], dtype=torch.int64, device=entries.device)
        key, value = cache.recent[layer, slot][:, ring].transpose(0, 1)[:, None].float().unbind(3)  # [n, 1, g, d]
        alpha = (reference.decision_logits(key, offset) > 0).float()
        if last and last[0] == 0:
            alpha[0] = 0
        tail = key, value, cache.recent_weights[layer, slot][:, ring].T[:, None], alpha
    elif tokens:
        state = int(cache.steps[slot]) % 2
        key, value = cache.mean[layer, state, slot].unbind(1)
        total = cache.total[layer, state, slot][None, None]
        tail = key[None, None], value[None, None], total, torch.zeros_like(total)
    return reference.DMCCache(entries, lengths[None], tokens, tail)
