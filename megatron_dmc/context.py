"""What a generating model carries through its layers: the paged cache and the step that is under way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.inference.config import InferenceConfig
from megatron.core.inference.contexts import BaseInferenceContext
from megatron.core.utils import get_pg_size
from torch import Tensor

from megatron_dmc.cache import CacheShape, PagedCache, Step
from megatron_dmc.config import DMCError
from megatron_dmc.megatron_hooks import dmc_layers


def cache_shape(model: torch.nn.Module, *, slots: int, max_tokens: int, fp8: bool = False) -> CacheShape:
    """What a cache for `model`, or this rank's part of it, has to hold; the rest as for `CacheShape`.

    Raises:
        DMCError: for a model without DMC.
    """
    layers = dmc_layers([model])
    if not layers:
        raise DMCError("the model has no layers with DMC")
    return CacheShape(
        layers=len(layers),
        slots=slots,
        heads=layers[0].num_attention_heads_per_partition,
        kv_heads=layers[0].num_query_groups_per_partition,
        channels=layers[0].hidden_size_per_attention_head,
        max_tokens=max_tokens,
        window=layers[0].core_attention.compression.config.dmc_window_size,
        fp8=fp8,
    )


class HoldsPages:
    """What a DMC layer finds in a context: the cache, the layer's place in it, and the step under way.

    Attributes:
        cache: for this rank's layers and KV heads.
        layers: by Megatron's layer number, places in the cache.
        step: what `cache.begin` returned, `None` between steps.
        rotary_tables: what the layers made of the model's angles (`DMCSelfAttention._rotary_tables`).
    """

    cache: PagedCache
    layers: dict[int, int]
    step: Step | None = None
    rotary_tables: tuple | None = None

    def _hold(self, model: torch.nn.Module, cache: PagedCache) -> None:
        layers = dmc_layers([model])
        if len(layers) != cache.shape.layers:
            raise DMCError(f"the cache has {cache.shape.layers} layers, the model {len(layers)} with DMC")
        self.cache = cache
        self.layers = {layer.layer_number: i for i, layer in enumerate(layers)}


class PagedContext(HoldsPages, BaseInferenceContext):
    """Megatron's inference context over a `PagedCache`. A step of a model goes

        step = context.begin(slots, …)                              # as PagedCache.begin
        logits = model(tokens, context.positions(), None, inference_context=context, runtime_gather_output=True)
        context.commit()

    with `tokens` and positions `[1, step.tokens]`, in the step's order, and logits `[1, n, vocabulary]` of the last
    token of each sequence that decodes, then of each chunk.

    Args:
        model: the model, or this pipeline stage of it; its DMC layers find their places in the cache here.
        cache: a cache for this rank's layers and KV heads, of the shape that `cache_shape` says.
        groups: process groups over which the model is split. Their ranks hold different heads, whose pools may run dry
            at different times: a step counts only if all have pages for it.

    Raises:
        DMCError: for a cache that does not fit the model.
    """

    def __init__(self, model: torch.nn.Module, cache: PagedCache, groups: Sequence = ()) -> None:
        super().__init__(InferenceConfig(materialize_only_last_token_logits=True))
        self._hold(model, cache)
        self._kept: list[tuple[Tensor, tuple, Tensor]] | None = None
        self._groups = [group for group in groups if get_pg_size(group) > 1]

    def begin(
        self,
        slots: Tensor | None = None,
        new_tokens: int = 1,
        *,
        chunk_slots: Tensor | None = None,
        chunk_lengths: Sequence[int] = (),
    ) -> Step:
        self.step = self.cache.begin(slots, new_tokens, chunk_slots=chunk_slots, chunk_lengths=chunk_lengths)
        self._agree()
        self._kept = self._open_entries() if self._groups and chunk_lengths else None
        return self.step

    def positions(self) -> Tensor:
        """`[1, tokens]`, for models that embed positions."""
        return self.cache.positions(self.step)[None]

    def commit(self) -> None:
        if self.step.chunk_lengths:  # whose pages were taken by the layers
            self._agree()
        if self._kept is not None:
            for stored, at, kept in self._kept:
                stored[at] = torch.where(self.step.ok, stored[at], kept)
        self.cache.commit(self.step)
        self.step = self._kept = None

    def _agree(self) -> None:
        for group in self._groups:
            ok = self.step.ok.to(torch.int32)
            torch.distributed.all_reduce(ok, torch.distributed.ReduceOp.MIN, group=group)
            self.step.ok.copy_(ok > 0)
            self.cache.dry |= ~self.step.ok

    def _open_entries(self) -> list[tuple[Tensor, tuple, Tensor]]:
        """The last entries of the step's sequences: where they are stored, and they themselves.

        When a layer finds no pages for a chunk on one rank, the layers after it do not know that on the others. They
        go on from what it left undone, and may merge that into an open entry.
        """
        cache, slots = self.cache, torch.cat([self.step.slots, self.step.chunk_slots])
        rows = cache.rows_of(slots)
        last = cache.lengths[:, rows].long() - 1
        place = last.clamp(min=0)
        page = cache.table[:, rows].gather(-1, (place // cache.shape.page_entries)[..., None]).flatten()
        exists = (last >= 0).flatten()
        # A head without entries stands for the first one that has some: written twice, it stays what it is.
        heads = torch.where(exists, torch.arange(len(exists), device=exists.device), exists.int().argmax())
        at = page.clamp(min=0).long()[heads], slice(None), place.flatten()[heads] % cache.shape.page_entries
        stored = (cache.pages.view(torch.uint8), cache.scales)  # bytes: not every dtype can be chosen from
        return [(x, at, x[at]) for x in stored if x is not None]

    # What Megatron asks a context.

    use_flashinfer_fused_rope = False
    num_speculative_tokens = 0

    @property
    def max_sequence_length(self) -> int:
        return self.cache.shape.max_tokens

    @property
    def padding_slice(self) -> slice:
        return slice(0, 0)

    def is_static_batching(self) -> bool:
        return False

    def is_decode_only(self) -> bool:
        return not self.step.chunk_lengths

    def using_cuda_graph_this_step(self) -> bool:
        return False  # whoever drives the steps captures whole ones

    def last_token_logits(self, hidden_states: Tensor) -> Tensor:
        """Of hidden states `[1, tokens, hidden]`, those of every sequence's last token, `[n, hidden]`."""
        step = self.step
        decoding = hidden_states[0, : step.decoding_tokens][step.new_tokens - 1 :: step.new_tokens]
        if not step.chunk_lengths:
            return decoding
        chunks = hidden_states[0, step.decoding_tokens :].index_select(0, step.first_token[1:].long() - 1)
        return torch.cat([decoding, chunks])
