"""Context parallelism: in attention, every rank has all tokens of its share of the KV heads.

Outside of attention each of `cp` ranks has `s/cp` tokens. Megatron cuts a sequence into `2·cp` chunks and gives rank
`r` the chunks `r` and `2·cp - 1 - r`. A merge reaches back over the chunks' borders, and nothing else of DMC crosses
KV heads; so queries, keys and values are exchanged, tokens for heads, before decisions are made, and outputs after
attention (`--cp-comm-type a2a`; Jacobs et al., DeepSpeed-Ulysses, 2023). Each way is one all-to-all, as is its
gradient, of `1/cp` of what a rank has to every other one.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import all_to_all
from torch import Tensor


def all_tokens(query: Tensor, key: Tensor, value: Tensor, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """From this rank's tokens, of all heads, to all tokens, in their order, of this rank's heads.

    Args:
        query: `[s/cp, b, h, d]`, the heads that share a KV head next to each other.
        key, value: `[s/cp, b, g, d]`, with `g` a multiple of `cp`.
        group: the context-parallel process group.

    Returns:
        `[s, b, h/cp, d]` and twice `[s, b, g/cp, d]`; rank `r` has the `r`-th share of the heads.
    """
    cp = group.size()
    shares = [x.unflatten(2, (cp, -1)) for x in (query, key, value)]
    sizes = [x.shape[3] for x in shares]
    arrived = all_to_all(group, torch.cat(shares, 3).movedim(2, 0))  # [cp, s/cp, b, heads, d]
    return in_order(arrived.flatten(0, 1), cp).split(sizes, 2)


def own_tokens(output: Tensor, group: Any) -> Tensor:
    """Back from all tokens of this rank's heads `[s, b, h/cp, d]` to its tokens of all heads `[s/cp, b, h, d]`."""
    cp = group.size()
    chunks = output.chunk(2 * cp)
    shares = torch.cat([chunks[i] for i in balanced(cp)]).unflatten(0, (cp, -1))
    return all_to_all(group, shares).movedim(0, 2).flatten(2, 3)


def gathered(x: Tensor, group: Any) -> Tensor:
    """What every rank has of its tokens `[s/cp, …]`, for all tokens in their order `[s, …]`; without gradients."""
    found = x.new_empty(group.size() * len(x), *x.shape[1:])
    torch.distributed.all_gather_into_tensor(found, x.detach().contiguous(), group=group)
    return in_order(found, group.size())


def balanced(cp: int) -> list[int]:
    """The chunks of a sequence as ranks have them, one rank after the other."""
    return [chunk for rank in range(cp) for chunk in (rank, 2 * cp - 1 - rank)]


def in_order(x: Tensor, cp: int) -> Tensor:
    """Along the first dimension, from what ranks have, one after the other, to the order of the sequence."""
    chunks, places = x.chunk(2 * cp), balanced(cp)
    return torch.cat([chunks[places.index(i)] for i in range(2 * cp)])
