"""The merge without a window, in time and memory linear in the length; `reference.merge` specifies it.

A token's open segment may reach back to the first token. Tokens come in tiles of `TILE`: within a tile the coefficients
of the merge are a triangular matrix, and of all tiles before, one sum per channel is enough, which a segment carries
along:

    Σ_j m(t, j) x_j = Σ_{j in t's tile} m(t, j) x_j + α_first ⋯ α_t · carried,  m(t, j) = w_j · α_{j+1} ⋯ α_t

Products of α are sums of logarithms, each summed from its own token on, so that nothing cancels and nothing is divided
by α.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dmc.ops.reference import accumulator, delay, segment_sums

TILE = 64


def merge(key: Tensor, value: Tensor, weight: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.merge` with window 0, differentiable in all its arguments; where a decision is 0, its gradient is left
    out (a hard one has none, and a soft one would pass on 0 times it).

    Args:
        key, value: `[s, b, g, d]`.
        weight, alpha: importance and decisions, `[s, b, g]`, in the accumulator's dtype.

    Returns:
        merged keys and values, `[s, b, g, d]` in the accumulator's dtype.
    """
    tokens, dtype = len(key), accumulator(key)
    missing = -tokens % TILE  # tokens that append themselves, so that no total is 0
    alpha, weight = F.pad(alpha, (0, 0, 0, 0, 0, missing)), F.pad(weight, (0, 0, 0, 0, 0, missing), value=1.0)
    log_alpha = torch.where(alpha > 0, alpha.clamp_min(torch.finfo(dtype).tiny).log(), -math.inf)
    log_alpha, weight = _tiles(log_alpha), _tiles(weight)

    key, value = (_tiles(F.pad(x.to(dtype), (0, 0, 0, 0, 0, 0, 0, missing))) for x in (key, value))

    row = torch.arange(TILE, device=key.device)
    after, seen = row[:, None] > row, row[:, None] >= row
    products = torch.where(after, log_alpha[..., None], 0.0).cumsum(-2).exp()
    coefficients = torch.where(seen, products * weight[..., None, :], 0.0)  # [n, b, g, t, j]
    leading = log_alpha.cumsum(-1).exp()[..., None]  # of what is carried into the tile
    total = coefficients.sum(-1, keepdim=True)

    # Every tile's own sums at its end, of keys, values and weights; from them what enters the next.
    last = coefficients[..., -1:, :]
    sums = torch.cat([last @ key, last @ value, total[..., -1:, :]], -1)  # [n, b, g, 1, 2 · d + 1]
    carried = delay(segment_sums(sums, leading[..., -1:, :], len(sums)), 1)
    carried_key, carried_value, carried_total = carried.split([key.shape[-1], value.shape[-1], 1], -1)

    total = total + leading * carried_total
    shares, leading = coefficients / total, leading / total
    merged_key, merged_value = shares @ key + leading * carried_key, shares @ value + leading * carried_value
    return _tokens(merged_key)[:tokens], _tokens(merged_value)[:tokens]


def _tiles(x: Tensor) -> Tensor:
    """From `[n · TILE, b, g, …]` to `[n, b, g, TILE, …]`."""
    return x.unflatten(0, (-1, TILE)).movedim(1, 3).contiguous()


def _tokens(x: Tensor) -> Tensor:
    """Back again."""
    return x.movedim(3, 1).flatten(0, 1)
