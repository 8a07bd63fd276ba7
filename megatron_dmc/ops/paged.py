"""Attention of new tokens against the paged cache, one layer of one step.

`csrc/paged_attention.cu` does it in one launch: decisions, merging, rotation, the write into pages, attention. The
reference here does the same through `reference.dmc_attention_cached`, sequence by sequence; it is the specification.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_dmc.cache import PAGE_ENTRIES, PagedCache, Step
from megatron_dmc.ops import reference
from megatron_dmc.ops.fused import _readable
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
    """New tokens of every sequence attend to the cache and to themselves, and enter it when the step is committed.

    Args:
        query, key, value: `[n, b, h|g, d]`, unrotated, the `n` new tokens of the step's sequences.
        rotary: `(cos, sin)` by position, `[positions, pairs]`, or `None`.
        cache, layer, step: where the sequences are; `step` is what `cache.begin` returned.
        kernel: "fused", or "reference" (which waits for the device).
        Others as for `reference.dmc_attention_cached`.

    Returns:
        `output` `[n, b, h, d]`, zeros for empty places, and the decisions `alpha` `[n, b, g]`. Undefined if the step
        is not `ok`: nothing is computed then.

    Raises:
        ValueError: for arguments that do not fit; the message names the argument.
    """
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    reference._check(query, key, value, None, cache.shape.window, None, None)
    if query.shape[:2] != (step.new_tokens, len(step.slots)):
        raise ValueError(
            f"query must hold the step's {step.new_tokens} tokens of {len(step.slots)} sequences; got "
            f"{tuple(query.shape)}"
        )
    if rotary is not None and rotary[0].shape[0] < cache.shape.max_tokens:
        raise ValueError(
            f"rotary cos must hold all {cache.shape.max_tokens} positions of the cache; got {tuple(rotary[0].shape)}"
        )
    if kernel == "reference":
        return _reference(query, key, value, rotary, cache, layer, step, offset, interleaved, scale)
    if kernel != "fused":
        raise ValueError(f"kernel must be fused or reference; got {kernel!r}")
    cos, sin = (None, None) if rotary is None else (t.float().contiguous() for t in rotary)
    state = (getattr(cache, name, None) for name in ("recent", "recent_weights", "mean", "total"))
    recent, recent_weights, mean, total = (None if x is None else x[layer] for x in state)
    return _kernels.paged_attention_(
        _readable(query), _readable(key), _readable(value), cos, sin, cache.pages, cache.table[layer],
        cache.lengths[layer], cache.tokens, recent, recent_weights, mean, total, getattr(cache, "steps", None),
        step.slots, step.ok, step.lengths[layer], step.first_unit[layer], step.first_head[layer], step.arrived,
        cache.shape.window, offset, interleaved, scale,
    )  # fmt: skip


def _reference(query, key, value, rotary, cache, layer, step, offset, interleaved, scale) -> tuple[Tensor, Tensor]:
    output = torch.zeros_like(query)
    alpha = torch.zeros(key.shape[:3], dtype=torch.float32, device=key.device)
    if not step.ok:
        return output, alpha
    weights = reference.importance(query, key.shape[2], offset)
    for i, slot in enumerate(step.slots.tolist()):
        if slot < 0:
            continue
        tokens, lengths = int(cache.tokens[slot]), cache.lengths[layer, slot].long()
        positions = slice(tokens, tokens + step.new_tokens)
        contiguous = _gathered(cache, layer, slot, tokens, offset)
        output[:, i : i + 1], alpha[:, i : i + 1] = reference.dmc_attention_cached(
            query[:, i : i + 1], key[:, i : i + 1], value[:, i : i + 1],
            None if rotary is None else tuple(t[positions] for t in rotary),
            contiguous, window=cache.shape.window, offset=offset, interleaved=interleaved, scale=scale,
        )  # fmt: skip
        for head, (old, new) in enumerate(zip(lengths.tolist(), contiguous.lengths[0].tolist(), strict=True)):
            for entry in range(max(old - 1, 0), new):
                page = cache.table[layer, slot, head, entry // PAGE_ENTRIES]
                cache.pages[page, :, entry % PAGE_ENTRIES] = contiguous.entries[:, 0, head, entry]
        step.lengths[layer, i] = contiguous.lengths[0].int()
        if cache.shape.window:
            ring = torch.arange(tokens, tokens + step.new_tokens) % cache.shape.recent_tokens
            cache.recent[layer, slot, :, ring] = torch.stack([key, value], 3)[:, i].transpose(0, 1)
            cache.recent_weights[layer, slot, :, ring] = weights[:, i].T
        else:
            next_state = 1 - int(cache.steps[slot]) % 2
            mean_key, mean_value, total, _ = contiguous.tail
            cache.mean[layer, next_state, slot] = torch.stack([mean_key[0, 0], mean_value[0, 0]], 1)
            cache.total[layer, next_state, slot] = total[0, 0]
    return output, alpha


def _gathered(cache: PagedCache, layer: int, slot: int, tokens: int, offset: float) -> reference.DMCCache:
    """One sequence of one layer as the reference holds it."""
    lengths = cache.lengths[layer, slot].long()
    pages = cache.table[layer, slot, :, : -(-int(lengths.max()) // PAGE_ENTRIES)].clamp(min=0)
    entries = cache.pages[pages].permute(2, 0, 1, 3, 4).flatten(2, 3)  # [2, g, entries, d]
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
