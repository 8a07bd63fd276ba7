"""DMC attention of ranks that share out a sequence's tokens and keep all its heads (`--cp-comm-type all_gather`).

A rank has two chunks of a sequence (`megatron_dmc.context_parallel`). It takes both, with as many tokens before each as
a merge reaches back and one after it, for two sequences of their own: decisions, merges, rotations and biases of its
own tokens come out as in the whole sequence. Then it gathers all ranks' merged keys and values, and its queries attend
to those before their chunk, and causally to their own. Memory that lives until the backward pass is linear in `s/cp`;
keys and values of all tokens live while one layer needs them, and are gathered again for the backward pass.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from megatron_dmc.context_parallel import gather, own_chunks, reduce_scatter, with_borders
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
    return _chunks_in_line(output), _chunks_in_line(alpha)


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
    return torch.cat(outputs, 1).to(value.dtype), alpha[own]


class _Fused(torch.autograd.Function):
    """The same by the kernels of `fused`: what they do for a whole sequence, with earlier chunks' keys in between."""

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
            one * chunk - window, (other - one) * chunk, query.shape[1] // 2,
        )  # fmt: skip
        query, own_key, own_value = (x[own] for x in rows)
        diagonal = diagonal[:, :, own].contiguous()
        rows = map(fused.heads_first, (query, own_key, own_value))
        output, lse = fused.attend(kernel, *rows, scale, True, *packing)
        lse = lse.contiguous()
        output = fused.tokens_first(output)
        past = _past(group, documents, output, lse, query, own_key, own_value)
        for own_output, own_lse, own_query, keys, values, _ in past:
            more, more_lse = fused.attend(kernel, own_query, keys, values, scale, causal=False)
            both = torch.logaddexp(own_lse, more_lse)
            share = torch.exp(more_lse - both)[..., None]
            own_output.copy_(torch.lerp(own_output.float(), more.float(), share))
            own_lse.copy_(both)
        fused._kernels.merge_diagonal_(output, lse, diagonal, own_key, own_value, scale * channel)
        ctx.save_for_backward(
            key, value, cos, sin, query, own_key, own_value, output, lse, diagonal, alpha, weight
        )  # fmt: skip
        ctx.settings = group, documents, packing, window, temperature, interleaved, scale, kernel
        ctx.set_materialize_grads(False)
        return output, alpha[own]

    @staticmethod
    def backward(ctx, grad_output: Tensor | None, grad_alpha: Tensor | None):
        key, value, cos, sin, query, own_key, own_value, output, lse, diagonal, alpha, weight = ctx.saved_tensors
        group, documents, packing, window, temperature, interleaved, scale, kernel = ctx.settings
        own, channel = slice(window, -1), fused.query_channel(key.dtype, scale)
        grad_output = torch.zeros_like(output) if grad_output is None else fused.readable(grad_output)
        heads_first = map(fused.heads_first, (grad_output, query, own_key, own_value, output))
        grads = fused.attend_backward(kernel, *heads_first, lse, scale, True, *packing)
        grad_query, grad_key, grad_value = map(fused.tokens_first, grads)

        # What this rank's queries have for every rank's keys and values.
        b, g = own_key.shape[1] // 2, own_key.shape[2]
        of_all = key.new_zeros(2 * group.size() * len(own_key), b, 2 * g, key.shape[-1])
        for own_grad, own_output, own_lse, own_query, to_query, keys, values, where in _past(
            group, documents, grad_output, output, lse, query, grad_query, own_key, own_value
        ):
            to_past = fused.attend_backward(
                kernel, own_grad, own_query, keys, values, own_output, own_lse, scale, causal=False
            )
            to_query.add_(to_past[0])
            of_all[where].add_(torch.cat([x.permute(2, 0, 1, 3) for x in to_past[1:]], 2))
        for mine, found in zip(
            (grad_key, grad_value), _chunks_side_by_side(reduce_scatter(of_all, group)).chunk(2, 2), strict=True
        ):
            mine.add_(found)

        here = [None if t is None else t[own].contiguous() for t in (cos, sin)]
        grad_bias = fused._kernels.merge_diagonal_backward_(
            grad_output, output, lse, diagonal, query, own_key, own_value, grad_query, grad_key, grad_value, *here,
            interleaved, scale, scale * channel,
        )  # fmt: skip

        def with_borders(x: Tensor | None) -> Tensor | None:
            return None if x is None else F.pad(x, (0, 0) * (x.dim() - 1) + (window, 1))

        grad_query, *grads = map(with_borders, (grad_query, grad_key, grad_value, grad_bias, grad_alpha))
        grad_key, grad_value = fused._kernels.prepare_backward_(
            grad_query, *grads, key, value, alpha, weight, window, temperature
        )
        return grad_query, grad_key, grad_value, *[None] * 12


def _past(group: Any, documents: Documents | None, *tensors: Tensor):
    """For each of this rank's chunks that has others before it: views of its part, and all keys and values before it.

    With documents, of each sequence the part that belongs to a document from before the chunk, and what that has there.

    Args:
        tensors: of two chunks as sequences, `[c, 2·b, …]` or log-sum-exps `[2·b, h, c]`; the last two are keys and
            values.

    Yields:
        As many tensors, heads first: `[b, h, c, d]`, `[b, h, c]`; keys and values `[b, g, n, d]`, gathered. And where
        these keys are among all, `[s, b, …]`.
    """
    *parts, key, value = tensors
    chunk, b = len(key), key.shape[1] // 2
    everything = gather(_chunks_in_line(torch.cat([key, value], 2)), group)
    keys, values = map(fused.heads_first, everything.chunk(2, 2))
    for place, i in enumerate(own_chunks(group)):
        begin = i * chunk
        pieces = [(0, b, chunk, 0)] if i else []
        if documents is not None:
            pieces = [(j, j + 1, *documents.across(j, begin, begin + chunk)) for j in range(b)]
        for j, until, tokens, since in pieces:
            if tokens == 0:
                continue
            of, past = slice(place * b + j, place * b + until), slice(since, begin)
            yield (
                *(x[of, :, :tokens] if x.dim() == 3 else fused.heads_first(x[:tokens, of]) for x in parts),
                keys[j:until, :, past], values[j:until, :, past], (past, slice(j, until)),
            )  # fmt: skip
