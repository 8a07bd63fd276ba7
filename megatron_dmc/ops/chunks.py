"""DMC attention of ranks that share out a sequence's tokens and keep all its heads (`--cp-comm-type all_gather`).

A rank has two chunks of a sequence (`megatron_dmc.context_parallel`). It takes both, with as many tokens before each as
a merge reaches back and one after it, for two sequences of their own: decisions, merges, rotations and biases of its
own tokens come out as in the whole sequence. Then it gathers all ranks' merged keys and values, and its queries attend
to those before their chunk, and causally to their own. Memory that lives until the backward pass is linear in `s/cp`;
keys and values of all tokens live while one layer needs them, and are gathered again for the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from megatron_dmc.context_parallel import (
    chunks_of_halves,
    contiguous_rows,
    copy_rows,
    gather,
    gather_halves,
    own_chunks,
    places_before,
    reduce_scatter_half,
    with_borders,
)
from megatron_dmc.ops import fused, reference
from megatron_dmc.ops.documents import NEVER, Documents, separate
from megatron_dmc.ops.noise import LogisticNoise
from megatron_dmc.ops.reference import Rotary


def dmc_attention_of_chunks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotary: Rotary | None,
    *,
    group: Any,
    window: int = 12,
    offset: float = 5.0,
    temperature: float | None = None,
    noise: Tensor | LogisticNoise | None = None,
    documents: Documents | None = None,
    interleaved: bool = False,
    scale: float | None = None,
    kernel: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`fused.dmc_attention` of this rank's tokens in the whole sequence of `s`.

    Args:
        query, key, value: `[s/cp, b, h | g, d]`, this rank's two chunks one after the other.
        rotary: `(cos, sin)` of all `s` tokens.
        group: the context-parallel process group; all its ranks make this call.
        noise, documents: of all `s` tokens.
        window: 1 or more, at most as long as a chunk.
        Others as for `fused.dmc_attention`.

    Returns:
        `output` `[s/cp, b, h, d]` and `alpha` `[s/cp, b, g]` of this rank's tokens.

    Raises:
        ValueError: for arguments that do not fit; the message names them.
    """
    tokens, b = query.shape[:2]
    chunk = tokens // 2
    if not 1 <= window <= chunk or tokens % 2:
        raise ValueError(
            f"with all_gather, window must be at least 1 (there is no unlimited one) and at most the {chunk} tokens of "
            f"a chunk; got {window}: choose another window, longer sequences or a2a"
        )
    kernel = fused.choose_kernel(query, documents, kernel)
    chunks = own_chunks(group)
    within = None
    if documents is not None:
        if documents.first.shape != (tokens * group.size(), b):
            raise ValueError(
                f"documents must be of all tokens and sequences, {(tokens * group.size(), b)}; got "
                f"{tuple(documents.first.shape)}"
            )
        within = documents.within(chunks, chunk)
        firsts = documents.first.unflatten(0, (-1, chunk))
        key = separate(key, torch.cat([firsts[i] for i in chunks]))
    query, key, value = with_borders((query, key, value), window, group)
    if chunks[0] == 0:  # the sequence's first token has nothing to merge into
        key[window, 0, :, :, -1] = NEVER
    positions = torch.stack([torch.arange(-window, chunk + 1, device=query.device) + i * chunk for i in chunks], 1)
    positions = positions.clamp(0, tokens * group.size() - 1)  # beyond the ends anything will do

    def here(x: Tensor) -> Tensor:
        """Of all tokens `[s, b, …]`, those of the two chunks with borders `[window + chunk + 1, 2·b, …]`."""
        return x[positions].flatten(1, 2)

    if rotary is not None:
        rotary = tuple(here(t[:, None].expand(-1, b, -1) if t.dim() == 2 else t) for t in rotary)
    if isinstance(noise, LogisticNoise) and kernel == "reference":
        noise = noise.sample(tokens * group.size(), b, key.shape[3])
    noise = here(noise) if isinstance(noise, Tensor) else noise
    query, key, value = (x.flatten(1, 2) for x in (query, key, value))
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    if kernel == "reference":
        reference._check(query, key, value, rotary, window, temperature, noise)
        output, alpha = _reference(
            query, key, value, rotary, group, window, offset, temperature, noise, documents, interleaved, scale
        )
    else:
        fused.check_fused(query, key, value, rotary, noise, kernel)
        if window > fused.max_window(query.dtype, query.shape[-1]):
            most = fused.max_window(query.dtype, query.shape[-1])
            raise ValueError(f"with all_gather, window must be at most {most} for the fused kernels; got {window}")
        cos, sin = (None, None) if rotary is None else (t.float().contiguous() for t in rotary)
        noise = noise.float().contiguous() if isinstance(noise, Tensor) else noise
        output, alpha = _Fused.apply(
            query, key, value, cos, sin, noise, group, documents, within, window, offset, temperature, interleaved,
            scale, kernel,
        )  # fmt: skip
    return output, alpha


def zero_out_attention_of_chunks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotary: Rotary | None,
    *,
    group: Any,
    last_channel: float,
    documents: Documents | None = None,
    interleaved: bool = False,
    scale: float | None = None,
) -> Tensor:
    """`reference.zero_out_attention` of this rank's tokens; arguments as above.

    With documents, in memory linear in the length where flash runs. Keys and values of all tokens live until the
    backward pass.
    """
    chunk = len(query) // 2
    if rotary is not None:
        rotary = tuple(torch.cat([t[i * chunk : (i + 1) * chunk] for i in own_chunks(group)]) for t in rotary)
    query, key = (reference.fade_last_channel(x, rotary, last_channel, interleaved) for x in (query, key))
    everything = gather(torch.cat([key, value], 2), group)
    if documents is not None and fused.flash_takes(query):
        return _unmerged_documents(query, everything, documents, own_chunks(group), scale)
    keys, values = everything.chunk(2, 2)
    outputs = []
    for i, own in zip(own_chunks(group), query.split(chunk), strict=True):
        seen = (i + 1) * chunk
        heads_first = (fused.heads_first(x) for x in (own, keys[:seen], values[:seen]))
        mask = causal_lower_right(chunk, seen)
        if documents is not None:
            mask = (~documents.apart(slice(seen - chunk, seen), seen)).tril(seen - chunk)[:, None]
        outputs.append(F.scaled_dot_product_attention(*heads_first, attn_mask=mask, scale=scale, enable_gqa=True))
    return torch.cat(outputs, 2).permute(2, 0, 1, 3)


def _unmerged_documents(
    query: Tensor, everything: Tensor, documents: Documents, chunks: tuple[int, int], scale: float | None
) -> Tensor:
    """Causal attention within documents by the flash kernel, of the two chunks' queries `[2·c, b, h, d]`, to keys and
    values of all tokens `[s, b, 2·g, d]`: of each chunk's first document also those before the chunk."""
    chunk = len(query) // 2
    within = documents.within(chunks, chunk)
    sequences = everything.unbind(1)  # a slice's gradient has the size of what it is a slice of
    ends = ((sequences[j], (i + 1) * chunk) for i in chunks for j in range(len(sequences)))
    seen = torch.cat([x[end - chunk - before : end] for (x, end), before in zip(ends, within.before, strict=True)])
    rows = _chunks_side_by_side(query).transpose(0, 1).flatten(0, 1)
    output, _ = fused.attend_documents(
        rows, *seen.chunk(2, 1), scale, (within.borders, within.longest), within.with_before
    )
    return _chunks_in_line(output.unflatten(0, (-1, chunk)).transpose(0, 1))


def _chunks_in_line(x: Tensor) -> Tensor:
    """From two chunks as sequences `[c, 2·b, …]` to one after the other `[2·c, b, …]`."""
    return x.unflatten(1, (2, -1)).transpose(0, 1).flatten(0, 1)


def _chunks_side_by_side(x: Tensor) -> Tensor:
    """From one after the other `[2·c, b, …]` to two chunks as sequences `[c, 2·b, …]`."""
    return x.unflatten(0, (2, -1)).transpose(0, 1).flatten(1, 2)


def _reference(
    query, key, value, rotary, group, window, offset, temperature, noise, documents, interleaved, scale
) -> tuple[Tensor, Tensor]:
    """As `reference.dmc_attention`, of chunks with borders."""
    alpha, keep = reference.decide(key, offset, temperature, noise)
    weight = reference.importance(query, key.shape[2], offset)
    merged_key, merged_value = reference.merge(key, value, weight, alpha, window)
    rotated, merged_key = (reference.rotate_without_last(x, rotary, interleaved) for x in (query, merged_key))
    own = slice(window, -1)
    everything = torch.cat([merged_key, merged_value, reference.key_bias(keep)[..., None]], -1)[own]
    everything = gather(_chunks_in_line(everything), group)
    keys, values, bias = everything.split([key.shape[-1], value.shape[-1], 1], -1)
    chunk = len(query) - window - 1
    outputs = []
    for i, own_query in zip(own_chunks(group), rotated[own].unflatten(1, (2, -1)).unbind(1), strict=True):
        seen = (i + 1) * chunk
        apart = None if documents is None else documents.apart(slice(seen - chunk, seen), seen)
        rows = (x[:seen] for x in (keys, values, bias[..., 0]))
        outputs.append(reference.attend_causally(own_query, *rows, scale, apart))
    return _chunks_in_line(torch.cat(outputs, 1).to(value.dtype)), _chunks_in_line(alpha[own])


class _Fused(torch.autograd.Function):
    """The same by the kernels of `fused`: what they do for a whole sequence, with earlier chunks' keys in between.

    From chunks with borders to this rank's tokens in their order.
    """

    @staticmethod
    def forward(
        ctx, query, key, value, cos, sin, noise, group, documents, within, window, offset, temperature, interleaved,
        scale, kernel,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        packing = (None, 0) if within is None else (within.borders, within.longest)
        channel = fused.query_channel(query.dtype, scale)
        key, value = map(fused.readable, (key, value))
        own = slice(window, -1)
        drawn = noise if isinstance(noise, LogisticNoise) else LogisticNoise(None)
        chunk, (one, other) = len(query) - window - 1, own_chunks(group)
        *rows, diagonal, alpha, weight = fused._kernels.prepare(
            fused.readable(query), key, value, cos, sin, None if drawn is noise else noise, drawn.key, drawn.stream,
            drawn.first_head, window, offset, temperature, interleaved, scale, channel,
            one * chunk - window, (other - one) * chunk, query.shape[1] // 2, drawn.scale,
        )  # fmt: skip
        query, own_key, own_value = (x[own] for x in rows)
        diagonal = diagonal[:, :, own].contiguous()
        everything = _Everything(own_key, own_value, group, documents)
        rows = map(fused.heads_first, (query, own_key, own_value))
        output, lse = fused.attend(kernel, *rows, scale, True, *packing)
        lse = lse.contiguous()
        output = fused.tokens_first(output)
        for place in (1, 0):
            for own_output, own_lse, own_query, keys, values, _ in everything.before(place, output, lse, query):
                more, more_lse = fused.attend(kernel, own_query, keys, values, scale, causal=False)
                fused._kernels.merge_past_(own_output.permute(2, 0, 1, 3), own_lse, more.permute(2, 0, 1, 3), more_lse)
        fused._kernels.merge_diagonal_(output, lse, diagonal, own_key, own_value, scale * channel)
        ctx.save_for_backward(
            key, value, cos, sin, query, own_key, own_value, output, lse, diagonal, alpha, weight
        )  # fmt: skip
        ctx.settings = group, documents, packing, window, temperature, interleaved, scale, kernel
        ctx.set_materialize_grads(False)
        in_line = contiguous_rows(output.unflatten(1, (2, -1)).transpose(0, 1)).flatten(0, 1)
        return in_line, _chunks_in_line(alpha[own])

    @staticmethod
    def backward(ctx, grad_output: Tensor | None, grad_alpha: Tensor | None):
        key, value, cos, sin, query, own_key, own_value, output, lse, diagonal, alpha, weight = ctx.saved_tensors
        group, documents, packing, window, temperature, interleaved, scale, kernel = ctx.settings
        own, channel = slice(window, -1), fused.query_channel(key.dtype, scale)
        grad_output, grad_alpha = (None if x is None else _chunks_side_by_side(x) for x in (grad_output, grad_alpha))
        grad_output = torch.zeros_like(output) if grad_output is None else fused.readable(grad_output)
        everything = _Everything(own_key, own_value, group, documents)
        heads_first = map(fused.heads_first, (grad_output, query, own_key, own_value, output))
        grads = fused.attend_backward(kernel, *heads_first, lse, scale, True, *packing)

        def with_room(x: Tensor) -> Tensor:
            """Tokens first, with borders of zeros."""
            tokens_first = x.permute(2, 0, 1, 3)
            found = x.new_empty(window + len(tokens_first) + 1, *tokens_first.shape[1:])
            found[:window].zero_()
            found[own].copy_(tokens_first)
            found[-1].zero_()
            return found

        bordered = [with_room(x) for x in grads]
        grad_query, grad_key, grad_value = (x[own] for x in bordered)
        for place in (1, 0):
            for own_grad, own_output, own_lse, own_query, to_query, keys, values, add in everything.before(
                place, grad_output, output, lse, query, grad_query
            ):
                to_past = fused.attend_backward(
                    kernel, own_grad, own_query, keys, values, own_output, own_lse, scale, causal=False
                )
                to_query.add_(to_past[0])
                add(*to_past[1:])
            everything.send(place)
        everything.add_sums(grad_key, grad_value)

        here = [None if t is None else t[own].contiguous() for t in (cos, sin)]
        grad_bias = fused._kernels.merge_diagonal_backward_(
            grad_output, output, lse, diagonal, query, own_key, own_value, grad_query, grad_key, grad_value, *here,
            interleaved, scale, scale * channel,
        )  # fmt: skip

        grad_bias, grad_alpha = (
            None if x is None else F.pad(x, (0, 0) * (x.dim() - 1) + (window, 1)) for x in (grad_bias, grad_alpha)
        )
        grad_key, grad_value = fused._kernels.prepare_backward_(
            *bordered, grad_bias, grad_alpha, key, value, alpha, weight, window, temperature
        )
        return bordered[0], grad_key, grad_value, *[None] * 12


class _Everything:
    """All ranks' merged keys and values, gathered while this rank attends to its own, and their gradients.

    Without documents they stay as they come (`gather_halves`); with them, whose parts lie across chunks, they are put
    in the sequence's order.

    Args:
        key, value: `[c, 2·b, g, d]`, this rank's two chunks as sequences.
    """

    def __init__(self, key: Tensor, value: Tensor, group: Any, documents: Documents | None) -> None:
        self._group, self._documents, self._chunks = group, documents, own_chunks(group)
        self._chunk, self._b = len(key), key.shape[1] // 2
        halves = key.new_empty(2, self._chunk, self._b, 2 * key.shape[2], key.shape[3])
        for to, x in zip(halves.chunk(2, 3), (key, value), strict=True):
            copy_rows(to, x.unflatten(1, (2, -1)).transpose(0, 1))
        self._gathered, self._wait = gather_halves(*halves, group)
        self._all: Tensor | None = None
        self._grad: Tensor | None = None
        self._sums: dict[int, Callable[[], Tensor]] = {}

    def before(self, place: int, *tensors: Tensor) -> Iterator[tuple]:
        """For one of this rank's chunks, views of its part, and the keys and values before it, if any.

        With documents, of each sequence the part that belongs to a document from before the chunk, and what that has
        there.

        Args:
            place: 0 or 1, of the chunk.
            tensors: of two chunks as sequences, `[c, 2·b, …]` or log-sum-exps `[2·b, h, c]`.

        Yields:
            As many tensors, heads first: `[b, h, c, d]`, `[b, h, c]`; keys and values `[b, g, n, d]`. And a function
            that takes the gradients of these.
        """
        if self._all is None:
            self._wait()
            gathered, places = self._gathered, chunks_of_halves(self._group.size())
            if self._documents is not None:
                gathered = torch.stack([gathered[places.index(i)] for i in range(len(places))])
            self._all = gathered.flatten(0, 1)
        chunk, b, i = self._chunk, self._b, self._chunks[place]
        begin, cp = i * chunk, self._group.size()
        if self._documents is None:
            where = places_before(i, cp)
            pieces = [(0, b, chunk, slice(where.start * chunk, where.stop * chunk))] if i else []
        else:
            across = (self._documents.across(j, begin, begin + chunk) for j in range(b))
            pieces = [(j, j + 1, tokens, slice(since, begin)) for j, (tokens, since) in enumerate(across) if tokens]
        for j, until, tokens, past in pieces:
            of = slice(place * b + j, place * b + until)
            yield (
                *(x[of, :, :tokens] if x.dim() == 3 else fused.heads_first(x[:tokens, of]) for x in tensors),
                *map(fused.heads_first, self._all[past, j:until].chunk(2, 2)),
                partial(self._add, (past, slice(j, until))),
            )  # fmt: skip

    def _add(self, where: tuple[slice, slice], grad_key: Tensor, grad_value: Tensor) -> None:
        if self._grad is None:
            self._grad = torch.zeros_like(self._all)
        for to, x in zip(self._grad[where].chunk(2, 2), (grad_key, grad_value), strict=True):
            to.add_(x.permute(2, 0, 1, 3))

    def send(self, place: int) -> None:
        """Begin to sum over the ranks what all that was `before` this place, and before place 1, has added.

        What lies before the first chunk is in the ranks' first chunks: the sum over the second ones can begin earlier.
        """
        if self._grad is None:
            self._grad = torch.zeros_like(self._all)
        if self._documents is None:
            halves = self._grad.unflatten(0, (2, self._group.size(), -1))
            self._sums[place] = reduce_scatter_half(halves[1 - place], self._group)
        elif place == 0:
            in_order = self._grad.unflatten(0, (-1, self._chunk))
            halves = torch.stack([in_order[i] for i in chunks_of_halves(self._group.size())]).unflatten(0, (2, -1))
            self._sums = {place: reduce_scatter_half(halves[1 - place], self._group) for place in (1, 0)}

    def add_sums(self, grad_key: Tensor, grad_value: Tensor) -> None:
        """To this rank's `[c, 2·b, g, d]`, what all ranks' queries have for its keys and values."""
        for place, wait in self._sums.items():
            of = slice(place * self._b, (place + 1) * self._b)
            for mine, found in zip((grad_key, grad_value), wait().chunk(2, 2), strict=True):
                mine[:, of].add_(found)
