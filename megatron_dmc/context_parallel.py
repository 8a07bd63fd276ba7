"""Context parallelism: how ranks that share out a sequence's tokens exchange what attention needs.

Outside of attention each of `cp` ranks has `s/cp` tokens. Megatron cuts a sequence into `2·cp` chunks and gives rank
`r` the chunks `r` and `2·cp - 1 - r`. A merge reaches back over the chunks' borders; nothing of DMC crosses KV heads.

- `--cp-comm-type a2a` (Jacobs et al., DeepSpeed-Ulysses, 2023): queries, keys and values are exchanged, tokens for
  heads, before decisions are made, and outputs after attention. Each way is one all-to-all, as is its gradient, of
  `1/cp` of what a rank has to every other one. Every rank has all tokens of its share of the KV heads.
- `--cp-comm-type all_gather`: heads stay where they are, however few. Chunks exchange their borders, as far as a merge
  reaches, then every rank gathers the merged keys and values (`megatron_dmc.ops.chunks`).
"""

from __future__ import annotations

from collections.abc import Callable
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


def gather(x: Tensor, group: Any) -> Tensor:
    """What every rank has of its tokens `[s/cp, …]`, for all tokens in their order `[s, …]`; gradients are summed."""
    return _Gather.apply(x, group)


def reduce_scatter(x: Tensor, group: Any) -> Tensor:
    """The sum over the ranks' `[s, …]`, of which this rank keeps its tokens `[s/cp, …]`; without gradients."""
    cp = group.size()
    chunks = x.chunk(2 * cp)
    found = x.new_empty(len(x) // cp, *x.shape[1:])
    torch.distributed.reduce_scatter_tensor(found, torch.cat([chunks[i] for i in balanced(cp)]), group=group)
    return found


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        found = x.new_empty(group.size() * len(x), *x.shape[1:])
        torch.distributed.all_gather_into_tensor(found, x.contiguous(), group=group)
        return in_order(found, group.size())

    @staticmethod
    def backward(ctx, grad: Tensor):
        return reduce_scatter(grad, ctx.group), None


def copy_rows(to: Tensor, rows: Tensor) -> None:
    """`to.copy_(rows)`, where strides allow it in elements of 16 bytes: torch moves transposed tensors element by
    element, which takes twice as long with 16 bits."""

    def wide(x: Tensor) -> Tensor | None:
        whole = 16 // x.element_size()
        counts = (x.shape[-1], x.storage_offset(), *x.stride()[:-1])
        return None if x.stride(-1) != 1 or any(n % whole for n in counts) else x.view(torch.complex128)

    wide_to, wide_rows = wide(to), wide(rows)
    if wide_to is None or wide_rows is None:
        to.copy_(rows)
    else:
        wide_to.copy_(wide_rows)


def contiguous_rows(x: Tensor) -> Tensor:
    """A contiguous copy, by `copy_rows`."""
    found = x.new_empty(x.shape)
    copy_rows(found, x)
    return found


def own_chunks(group: Any) -> tuple[int, int]:
    """Which of the `2·cp` chunks this rank has, in the order in which it has them."""
    return group.rank(), 2 * group.size() - 1 - group.rank()


def with_borders(tensors: tuple[Tensor, ...], before: int, group: Any) -> tuple[Tensor, ...]:
    """This rank's two chunks with what lies before and after them, as two sequences.

    Args:
        tensors: each `[2·c, b, heads, d]`: two chunks of `c` tokens, one after the other.
        before: how many tokens of the chunk before are wanted, 1 to `c`. After a chunk it is one.

    Returns:
        Each `[before + c + 1, 2, b, heads, d]`; zeros where the sequence has nothing.
    """
    return _WithBorders.apply(before, group, *tensors)


class _WithBorders(torch.autograd.Function):
    """Everything is copied once each way, which slicing and joining do not come to."""

    @staticmethod
    def forward(ctx, before: int, group: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.before, ctx.group, cp = before, group, group.size()
        chunks = [x.unflatten(0, (2, -1)) for x in tensors]
        ctx.sizes = sizes = [x.shape[3] for x in chunks]
        edges = torch.cat([torch.cat([x[:, :1], x[:, -before:]], 1) for x in chunks], 3)  # [2, 1 + before, b, heads, d]
        edges = gather(edges.flatten(0, 1), group).unflatten(0, (2 * cp, -1))
        nothing = torch.zeros_like(edges[:1])
        edges = torch.cat([nothing, edges, nothing])  # of chunk i at i + 1
        earlier = torch.stack([edges[i][1:] for i in own_chunks(group)], 1).split(sizes, 3)
        later = torch.stack([edges[i + 2][0] for i in own_chunks(group)]).split(sizes, 2)
        found = []
        for x, first, last in zip(chunks, earlier, later, strict=True):
            bordered = x.new_empty(before + x.shape[1] + 1, 2, *x.shape[2:])
            bordered[:before].copy_(first)
            copy_rows(bordered[before:-1], x.transpose(0, 1))
            bordered[-1].copy_(last)
            found.append(bordered)
        return tuple(found)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        before, group, cp = ctx.before, ctx.group, ctx.group.size()
        earlier = torch.cat([x[:before] for x in grads], 3)
        later = torch.cat([x[-1] for x in grads], 2)
        edges = earlier.new_zeros(2 * cp, 1 + before, *earlier.shape[2:])
        for place, i in enumerate(own_chunks(group)):
            if i > 0:
                edges[i - 1, 1:].copy_(earlier[:, place])
            if i + 1 < 2 * cp:
                edges[i + 1, 0].copy_(later[place])
        edges = reduce_scatter(edges.flatten(0, 1), group).unflatten(0, (2, -1)).split(ctx.sizes, 3)
        found = []
        for x, edge in zip(grads, edges, strict=True):
            grad = contiguous_rows(x[before:-1].transpose(0, 1))
            grad[:, :1].add_(edge[:, :1])
            grad[:, -before:].add_(edge[:, 1:])
            found.append(grad.flatten(0, 1))
        return None, None, *found


def gather_halves(first: Tensor, second: Tensor, group: Any) -> tuple[Tensor, Callable[[], None]]:
    """Begin to gather what every rank has of its first and of its second chunk, `[c, …]` each.

    Returns:
        `[2·cp, c, …]`, to be read once the function that comes with it was called: the ranks' second chunks, then their
        first ones. Nothing has to be put in order for what lies before a chunk to lie side by side (`places_before`).
    """
    found = first.new_empty(2, group.size(), *first.shape)
    works = [
        torch.distributed.all_gather_into_tensor(half.flatten(0, 1), x.contiguous(), group=group, async_op=True)
        for half, x in zip(found, (second, first), strict=True)
    ]

    def wait() -> None:
        for work in works:
            work.wait()

    return found.flatten(0, 1), wait


def reduce_scatter_half(half: Tensor, group: Any) -> Callable[[], Tensor]:
    """Begin to sum one half of `[2·cp, c, …]` over the ranks; the function that comes back yields this rank's chunk."""
    found = half.new_empty(half.shape[1:])
    work = torch.distributed.reduce_scatter_tensor(found, half.flatten(0, 1), group=group, async_op=True)

    def wait() -> Tensor:
        work.wait()
        return found

    return wait


def chunks_of_halves(cp: int) -> list[int]:
    """The chunks of a sequence in the order of `gather_halves`."""
    return [*reversed(range(cp, 2 * cp)), *range(cp)]


def places_before(chunk: int, cp: int) -> slice:
    """Where all chunks before this one lie in the order of `gather_halves`."""
    return slice(cp, cp + chunk) if chunk <= cp else slice(2 * cp - chunk, 2 * cp)


def balanced(cp: int) -> list[int]:
    """The chunks of a sequence as ranks have them, one rank after the other."""
    return [chunk for rank in range(cp) for chunk in (rank, 2 * cp - 1 - rank)]


def in_order(x: Tensor, cp: int) -> Tensor:
    """Along the first dimension, from what ranks have, one after the other, to the order of the sequence."""
    chunks, places = x.chunk(2 * cp), balanced(cp)
    return torch.cat([chunks[places.index(i)] for i in range(2 * cp)])
