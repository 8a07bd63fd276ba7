"""Dynamic Memory Compression in plain PyTorch: the specification.

Read it beside the paper (Nawrot et al., *Dynamic Memory Compression: Retrofitting LLMs for Accelerated Inference*,
ICML 2024, arXiv 2403.09636). Two forms of the same attention:

- `dmc_attention`: all tokens of a sequence at once, soft decisions in training, hard ones in evaluation;
- `dmc_attention_cached`: new tokens against a `DMCCache` whose entries are appended or merged.

Token by token and with hard decisions the two agree exactly. Shapes: `s` tokens, `b` sequences, `h` query heads,
`g` KV heads (query head `i` reads KV head `i // (h/g)`), `d` channels. Arithmetic runs in float32, or in float64 for
float64 inputs; outputs have the inputs' dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dmc.ops.documents import Documents

Rotary = tuple[Tensor, Tensor]
"""`(cos, sin)` of the angle of each of the `d_rot/2` pairs of channels: `[s, d_rot/2]`, or `[s, b, d_rot/2]` where
positions differ between sequences."""


def dmc_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotary: Rotary | None,
    *,
    window: int = 12,
    offset: float = 5.0,
    temperature: float | None = None,
    noise: Tensor | None = None,
    documents: Documents | None = None,
    interleaved: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention over keys and values that merge into their predecessors (paper, section 3).

    Args:
        query: `[s, b, h, d]`, after any QK-norm and before rotation.
        key, value: `[s, b, g, d]`, likewise.
        rotary: `(cos, sin)` of `[s, d_rot/2]` with `d_rot <= d` (the remaining channels are not rotated), or `None`.
        window: how many tokens a merge reaches back; 0 sets no limit.
        offset: the constant `c` that makes an untrained model append every token.
        temperature: of the Gumbel-sigmoid in training; `None` takes hard decisions.
        noise: `[s, b, g]` logistic noise added to the decision logits; needs a temperature.
        documents: packed into the sequences, each merging and attending as if it were alone; or `None`.
        interleaved: rotary channels pair up as `(0, 1), (2, 3), …` instead of `(i, i + d_rot/2)`.
        scale: of the scores, `1/sqrt(d)` unless given.

    Returns:
        `output` `[s, b, h, d]`, and the decisions `alpha` `[s, b, g]` in float32 (or float64): the degree to which
        each token merged into the entry before it.

    Raises:
        ValueError: for shapes, windows or temperatures that do not fit; the message names the argument.
    """
    _check(query, key, value, rotary, window, temperature, noise, documents)
    alpha, keep = decide(key, offset, temperature, noise, documents)
    merged_key, merged_value = merge(key, value, importance(query, key.shape[2], offset), alpha, window)
    query, merged_key = (rotate_without_last(x, rotary, interleaved) for x in (query, merged_key))
    apart = None if documents is None else documents.apart()
    output = attend_causally(query, merged_key, merged_value, key_bias(keep), scale, apart)
    return output.to(value.dtype), alpha


def decide(
    key: Tensor,
    offset: float,
    temperature: float | None,
    noise: Tensor | None = None,
    documents: Documents | None = None,
) -> tuple[Tensor, Tensor]:
    """The decisions `α_t` and `log(1 - α_t)`, each `[s, b, g]`; hard ones without a temperature."""
    logits = decision_logits(key, offset)
    if temperature is None:
        alpha = (logits > 0).to(logits.dtype)
        keep = torch.where(logits > 0, -math.inf, 0.0).to(logits.dtype)
    else:
        logits = logits if noise is None else logits + noise.to(logits.dtype)
        alpha = torch.sigmoid(logits / temperature)
        keep = F.logsigmoid(-logits / temperature)
    # The first token, of each document, has nothing to merge into.
    if documents is not None:
        alpha, keep = (x.masked_fill(documents.first[..., None], 0.0) for x in (alpha, keep))
    return torch.cat([torch.zeros_like(alpha[:1]), alpha[1:]]), keep


def key_bias(keep: Tensor) -> Tensor:
    """Of key `j`, for later queries: `log(1 - α_{j+1})`, from `log(1 - α)` `[s, b, g]`; the last has no successor."""
    return torch.cat([keep[1:], torch.zeros_like(keep[:1])])


def attend_causally(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float | None, apart: Tensor | None = None
) -> Tensor:
    """A query sees its own entry as it stands, and earlier ones with their `key_bias`, but none that is `apart`.

    `key, value` `[n, b, g, d]` and `bias` `[n, b, g]` are of `n` tokens, `query` `[s, b, h, d]` of the last `s`;
    `apart` is bool `[b, s, n]`.
    """
    n, s = key.shape[0], query.shape[0]
    ones = torch.ones(s, n, dtype=torch.bool, device=query.device)
    own, future = ones.triu(n - s) & ones.tril(n - s), ones.triu(n - s + 1)
    unseen = future if apart is None else future | apart[:, None, None]
    return _attend(query, key, value, _per_query(bias).masked_fill(own, 0.0).masked_fill(unseen, -math.inf), scale)


def decision_logits(key: Tensor, offset: float) -> Tensor:
    """`a_t = k_t[d-1] - c`, `[s, b, g]`: positive means "merge into the entry before"."""
    return key[..., -1].to(accumulator(key)) - offset


def importance(query: Tensor, kv_heads: int, offset: float) -> Tensor:
    """`w_t = sigmoid(mean of q_t[d-1] over the group + c) + 2^-7`, `[s, b, g]`: a token's weight in a merge."""
    last = query[..., -1].to(accumulator(query))
    return torch.sigmoid(last.unflatten(2, (kv_heads, -1)).mean(-1) + offset) + 2**-7


def merge(key: Tensor, value: Tensor, weight: Tensor, alpha: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Weighted means of keys and values over each token's open segment, at most `window` tokens long.

    `k̄_t = Σ_j m(t, t-j) k_{t-j} / Σ_j m(t, t-j)` with `m(t, t-j) = w_{t-j} · α_{t-j+1} ⋯ α_t`, `0 <= j < window`.
    Keys and values `[s, b, g, d]`, weights and decisions `[s, b, g]`; the results are in the accumulator's dtype.
    """
    dtype = accumulator(key)
    terms = torch.cat([key.to(dtype), value.to(dtype), torch.ones_like(weight)[..., None]], -1) * weight[..., None]
    sums = segment_sums(terms, alpha[..., None], window or key.shape[0])
    merged_key, merged_value, total = sums.split([key.shape[-1], value.shape[-1], 1], -1)
    return merged_key / total, merged_value / total


def segment_sums(terms: Tensor, alpha: Tensor, window: int) -> Tensor:
    """`S_n(t) = Σ_{j<n} (Π_{i<j} α_{t-i}) terms_{t-j}` for `n = window`, along the first dimension.

    In O(log n) steps by doubling: with `P_n(t) = Π_{i<n} α_{t-i}`,
    `S_{m+n}(t) = S_m(t) + P_m(t) S_n(t-m)` and `P_{m+n}(t) = P_m(t) P_n(t-m)`.
    """

    def extend(first: tuple[Tensor, Tensor, int], second: tuple[Tensor, Tensor, int]) -> tuple[Tensor, Tensor, int]:
        (sum_m, product_m, m), (sum_n, product_n, n) = first, second
        return sum_m + product_m * delay(sum_n, m), product_m * delay(product_n, m), m + n

    window = min(window, terms.shape[0])
    power, result = (terms, alpha, 1), None  # S and P of length 1, 2, 4, …
    while window:
        if window & 1:
            result = power if result is None else extend(result, power)
        window >>= 1
        if window:
            power = extend(power, power)
    return result[0]


def delay(x: Tensor, steps: int) -> Tensor:
    """`x_{t-steps}`, zero before the sequence begins."""
    return torch.cat([torch.zeros_like(x[:steps]), x[:-steps]]) if steps < x.shape[0] else torch.zeros_like(x)


def rotate(x: Tensor, rotary: Rotary | None, interleaved: bool = False) -> Tensor:
    """Rotary position embedding of `x` `[s, b, heads, d]`, in the accumulator's dtype."""
    x = x.to(accumulator(x))
    if rotary is None:
        return x
    cos, sin = (t.to(x.dtype)[:, None, None] if t.dim() == 2 else t.to(x.dtype)[:, :, None] for t in rotary)
    turning, rest = x[..., : 2 * cos.shape[-1]], x[..., 2 * cos.shape[-1] :]
    first, second = (turning[..., ::2], turning[..., 1::2]) if interleaved else turning.chunk(2, -1)
    turned = first * cos - second * sin, second * cos + first * sin
    turned = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return torch.cat([turned, rest], -1)


def rotate_without_last(x: Tensor, rotary: Rotary | None, interleaved: bool) -> Tensor:
    """The last channel is DMC's own: zero before the rotation and, since that mixes channels, zero again after it."""

    def clear(x: Tensor) -> Tensor:
        return torch.cat([x[..., :-1], torch.zeros_like(x[..., -1:])], -1)

    return clear(rotate(clear(x), rotary, interleaved))


def _per_query(bias: Tensor) -> Tensor:
    """`[keys, b, g]` to `[b, g, 1, 1, keys]`: one row for every head of the group and every query."""
    return bias.permute(1, 2, 0)[:, :, None, None]


def _attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float | None) -> Tensor:
    """Softmax attention of `query` `[s, b, h, d]` over `key, value` `[n, b, g, d]` with `bias` `[b, g, 1, s|1, n]`."""
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    grouped = query.unflatten(2, (key.shape[2], -1))
    scores = torch.einsum("sbgrd,nbgd->bgrsn", grouped * scale, key)
    weights = torch.softmax(scores + bias, -1)
    return torch.einsum("bgrsn,nbgd->sbgrd", weights, value).flatten(2, 3)


@dataclass
class DMCCache:
    """The compressed KV cache of one layer: for every sequence and KV head as many entries as it chose to keep.

    Attributes:
        entries: `[2, b, g, capacity, d]`, rotated merged keys and merged values, in `dtype`.
        lengths: `[b, g]` int64, entries in use; the last of them is the open one.
        tokens: tokens seen so far, the same for every sequence and head.
        tail: what a merge of the next token may still need, in float32 (or float64): keys and values `[n, b, g, d]`,
            weights and decisions `[n, b, g]` of the last `window - 1` tokens; without a window the one running
            weighted mean of the open segment.
    """

    entries: Tensor
    lengths: Tensor
    tokens: int = 0
    tail: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    @classmethod
    def empty(cls, sequences: int, kv_heads: int, channels: int, *, dtype: torch.dtype, device) -> DMCCache:
        """A cache with no entries; it grows by itself."""
        return cls(
            torch.zeros(2, sequences, kv_heads, 0, channels, dtype=dtype, device=device),
            torch.zeros(sequences, kv_heads, dtype=torch.int64, device=device),
        )

    @property
    def entry_bytes(self) -> int:
        """Bytes of the keys and values of all entries in use."""
        return int(self.lengths.sum()) * 2 * self.entries.shape[-1] * self.entries.element_size()

    @property
    def state_bytes(self) -> int:
        """Bytes of the open segments' state, the same however long the sequence is."""
        return 0 if self.tail is None else sum(t.numel() * t.element_size() for t in self.tail)

    def _reserve(self, capacity: int) -> None:
        have = self.entries.shape[3]
        if capacity > have:
            more = max(capacity, 2 * have) - have
            self.entries = torch.cat(
                [self.entries, self.entries.new_zeros(*self.entries.shape[:3], more, self.entries.shape[4])], 3
            )


@torch.no_grad()
def dmc_attention_cached(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotary: Rotary | None,
    cache: DMCCache,
    *,
    window: int = 12,
    offset: float = 5.0,
    interleaved: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The incremental form: `s` new tokens, one or many, attend to the cache and to themselves, then enter it.

    Arguments as for `dmc_attention`, with `rotary` for the positions of the new tokens; decisions are hard. The
    result does not depend on how a sequence is cut into calls. `cache` is changed in place.

    Returns:
        `output` `[s, b, h, d]` and the decisions `alpha` `[s, b, g]`, 0 (appended) or 1 (merged).
    """
    _check(query, key, value, rotary, window, None, None)
    b, g = key.shape[1:3]
    if cache.lengths.shape != (b, g) or cache.entries.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"the cache holds {tuple(cache.lengths.shape)} sequences x KV heads of {cache.entries.shape[-1]} channels; "
            f"key has {(b, g)} of {key.shape[-1]}"
        )
    alpha = (decision_logits(key, offset) > 0).to(accumulator(key))
    if cache.tokens == 0:
        alpha[0] = 0

    # Merge the new tokens with what the open segment may still give them.
    new = (key.to(alpha.dtype), value.to(alpha.dtype), importance(query, g, offset), alpha)
    run = new if cache.tail is None else tuple(torch.cat(pair) for pair in zip(cache.tail, new, strict=True))
    merged_key, merged_value = (t[-len(key) :] for t in merge(*run, window))
    if window:
        cache.tail = tuple(t[max(0, len(t) - (window - 1)) :] for t in run)
    else:
        total = segment_sums(run[2], run[3], len(run[2]))[-1:]
        cache.tail = (merged_key[-1:], merged_value[-1:], total, torch.zeros_like(total))

    query, merged_key = (rotate_without_last(x, rotary, interleaved) for x in (query, merged_key))

    # Old entries are visible, but for an open one that the first new token merges into; a new token is visible to
    # itself, and to later ones unless its successor merged into it.
    slot = torch.arange(cache.entries.shape[3], device=key.device)
    closed = cache.lengths - alpha[0].long()
    old_bias = torch.where(slot < closed[..., None], 0.0, -math.inf).to(alpha.dtype)[:, :, None, None]
    old_bias = old_bias.expand(-1, -1, -1, len(key), -1)
    survives = torch.cat([alpha[1:] == 0, torch.ones_like(alpha[:1], dtype=torch.bool)])
    diagonal = torch.eye(len(key), dtype=torch.bool, device=key.device)
    past = torch.ones(len(key), len(key), dtype=torch.bool, device=key.device).tril(-1)
    seen = (_per_query(survives) & past) | diagonal
    new_bias = torch.where(seen, 0.0, -math.inf).to(alpha.dtype)
    old_key, old_value = cache.entries.permute(0, 3, 1, 2, 4).to(alpha.dtype)
    output = _attend(
        query,
        torch.cat([old_key, merged_key]),
        torch.cat([old_value, merged_value]),
        torch.cat([old_bias, new_bias], -1),
        scale,
    )

    # Write the last token of every segment into the segment's slot.
    slots = cache.lengths - 1 + (1 - alpha).long().cumsum(0)
    cache.lengths = slots[-1] + 1
    cache._reserve(int(cache.lengths.max()))
    t, i, j = survives.nonzero(as_tuple=True)
    cache.entries[:, i, j, slots[t, i, j]] = torch.stack([merged_key, merged_value])[:, t, i, j].to(cache.entries.dtype)
    cache.tokens += len(key)
    return output.to(value.dtype), alpha


def zero_out_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotary: Rotary | None,
    *,
    last_channel: float,
    documents: Documents | None = None,
    interleaved: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Plain causal attention in which the last channel of queries and keys fades out (the stage before retrofitting).

    The channel is multiplied by `last_channel` before and again after the rotation, which mixes it with its partner.
    Shapes as for `dmc_attention`; at 1 this is the original model's attention.
    """
    _check(query, key, value, rotary, 0, None, None, documents)
    query, key = (fade_last_channel(x, rotary, last_channel, interleaved) for x in (query, key))
    query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    mask = None if documents is None else (~documents.apart()).tril()[:, None]
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
    )
    return output.permute(2, 0, 1, 3)


def fade_last_channel(x: Tensor, rotary: Rotary | None, last_channel: float, interleaved: bool) -> Tensor:
    """`x` `[s, b, heads, d]` rotated, its last channel multiplied by `last_channel` before and after."""
    fade = torch.ones(x.shape[-1], device=x.device, dtype=x.dtype)
    fade[-1] = last_channel
    return (rotate(x * fade, rotary, interleaved) * fade).to(x.dtype)


def accumulator(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _check(query, key, value, rotary, window, temperature, noise, documents=None) -> None:
    if query.dim() != 4 or key.dim() != 4:
        raise ValueError(
            f"query and key must be [tokens, sequences, heads, channels]; got {tuple(query.shape)}, {tuple(key.shape)}"
        )
    if value.shape != key.shape:
        raise ValueError(f"value must have key's shape {tuple(key.shape)}; got {tuple(value.shape)}")
    if query.shape[:2] != key.shape[:2] or query.shape[3] != key.shape[3] or query.shape[2] % key.shape[2]:
        raise ValueError(
            f"query {tuple(query.shape)} does not fit key {tuple(key.shape)}: tokens, sequences and channels must be "
            "equal, and the query heads a multiple of the KV heads"
        )
    if query.shape[0] == 0:
        raise ValueError("query has no tokens")
    if window < 0:
        raise ValueError(f"window must be 0 (no limit) or a number of tokens; got {window}")
    if temperature is not None and not temperature > 0:
        raise ValueError(f"temperature must be positive, or None for hard decisions; got {temperature}")
    if noise is not None and temperature is None:
        raise ValueError("noise belongs to soft decisions: give a temperature as well")
    if noise is not None and noise.shape != key.shape[:3]:
        raise ValueError(
            f"noise must be [tokens, sequences, KV heads] = {tuple(key.shape[:3])}; got {tuple(noise.shape)}"
        )
    if documents is not None and documents.first.shape != key.shape[:2]:
        raise ValueError(
            f"documents must be of [tokens, sequences] = {tuple(key.shape[:2])}; got {tuple(documents.first.shape)}"
        )
    if rotary is not None:
        for name, table in zip(("cos", "sin"), rotary, strict=True):
            if table.shape[:-1] not in (query.shape[:1], query.shape[:2]) or 2 * table.shape[-1] > query.shape[-1]:
                raise ValueError(
                    f"rotary {name} must be [tokens, pairs] or [tokens, sequences, pairs] with {query.shape[0]} tokens "
                    f"and at most {query.shape[-1] // 2} pairs of channels; got {tuple(table.shape)}"
                )
