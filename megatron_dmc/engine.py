"""DMC in Megatron-Core's dynamic inference engine: all that had to be adapted. Checked against megatron-core 0.19.2.

The engine stays Megatron's: requests, scheduling, continuous batching, chunked prefill, sampling, stop words,
coordinator. Its context and its engine rest on assumptions that a compressed cache breaks, each answered here:

- *A request has one KV length in all layers and heads, kept in blocks of tokens.* `DMCInferenceContext` gives a request
  one block, longer than any sequence: the block's number is the request's slot in the `PagedCache`. Megatron's
  bookkeeping then hands out slots, moves requests between rows and gives slots back, unchanged.
- *Memory is counted in blocks, and a request's growth is known.* Here pages are counted, as they are on the device
  after each step (`PageAccount`): a request is admitted if the pages of its next chunk are free whatever is decided,
  and the pool is likely to last until all that are running have ended (`PageAccount.peak`).
- *Requests that outgrow memory are paused where they filled a block.* Here the youngest ones give their pages back and
  are computed again (Megatron's eviction), before a step that might not find its pages; so none ever does. The oldest
  request always stays, and none is taken that the pool could not hold alone: every request ends.
- *A prompt whose chunks are under way cannot be evicted* (`DMCInferenceEngine.schedule_waiting_requests`).
- *An evicted request begins anew*, and Megatron forgets its stop words (`DMCInferenceEngine.post_process_requests`,
  `_check_stop_words_for_request_post_append`, `_get_and_clear_stop_word_finished_ids`).
- *CUDA graphs are captured layer by layer, with keys and values at fixed addresses.* `WholeStepController` captures a
  whole step of decoding, one graph for each size of batch that Megatron's context names.
- *Logits cover the padded vocabulary.* Tokens that do not exist are never sampled (`DMCController`).
- *Requests are sound.* An empty prompt, a token that does not exist, or sampling parameters that contradict each other
  would end Megatron's engine; here the request fails with a message (`DMCInferenceEngine.add_request`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
from collections.abc import Collection, Container, Iterator
from dataclasses import dataclass

import torch
from megatron.core.inference.config import AsyncScheduleMode, InferenceConfig, KVCacheManagementMode
from megatron.core.inference.contexts.dynamic_context import (
    BlockOverflowError,
    ContextOverflowError,
    DynamicInferenceContext,
)
from megatron.core.inference.engines.dynamic_engine import DynamicInferenceEngine
from megatron.core.inference.inference_request import DynamicInferenceRequest, Status
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_pg_size, unwrap_model
from torch import Tensor

from megatron_dmc.cache import CacheShape, PagedCache
from megatron_dmc.config import DMCError
from megatron_dmc.context import HoldsPages, cache_shape
from megatron_dmc.megatron_hooks import dmc_layers
from megatron_dmc.token_text import beginning, tokenize_prompt

HEADROOM = 0.03
"""Share of the pool that is left for requests that merge less than those before them."""

DEFAULT_REQUESTS = 256
"""Requests that may run at once, where nothing else is said and their open segments leave most of the memory free."""


@dataclass
class PageAccount:
    """What the host knows of the pool: the state after the last step, and what has been decided since.

    Unit of all pages is one page for every head of this rank (fractions are pages of some heads), so that ranks with
    different layers agree; of several ranks it is the worst.

    Attributes:
        pages: of the pool.
        free: pages that nobody holds, at least.
        held, needs, tokens, entries: of each slot, pages it holds, pages that its next token may take, tokens it has
            seen, and entries of a head on average.
        promised: pages that the chunks of the coming step may take.
        expected: by slot, the tokens of the request there: of its prompt, and of its answer at most.
        rate: pages for a token, were they all full, as measured.
        next_token: pages that a request's next token may take, on average: one head in so many has filled its last one.
        ended, ended_tokens, ended_entries: how many requests have ended, their `tokens` and `entries` together; not
            those that gave way.
    """

    pages: float
    free: float
    held: list[float]
    needs: list[float]
    tokens: list[float]
    entries: list[float]
    rate: float
    next_token: float
    promised: float = 0.0
    expected: dict[int, tuple[int, int]] = dataclasses.field(default_factory=dict)
    ended: int = 0
    ended_tokens: float = 0.0
    ended_entries: float = 0.0

    @classmethod
    def empty(cls, pages: float, slots: int, page_entries: int) -> PageAccount:
        """Of a pool that nobody has used; nothing is known yet of how much merges."""
        of_slots = ([0.0] * slots for _ in range(4))
        return cls(pages, pages, *of_slots, rate=1 / page_entries, next_token=1 / page_entries)

    def update(self, free: float, of_slots: list[list[float]]) -> None:
        """The state after a step."""
        self.free, self.promised = free, 0.0
        self.held, self.needs, self.tokens, self.entries = of_slots
        if total := sum(self.tokens):
            self.rate = sum(self.entries) / total * self.next_token

    def free_without(self, slots: Collection[int]) -> float:
        """Pages that are free, at least, once `slots` have given theirs back.

        One rank has the fewest free pages and another one may hold the most for a slot: their sum may be more than any
        has. What all that stay hold is never underestimated.
        """
        return max(self.free, self.pages - (sum(self.held) - sum(self.held[slot] for slot in slots)))

    def release(self, slots: Collection[int], gave_way: Container[int]) -> None:
        """What the requests in `slots` hold is free again; some of them gave way, the others have ended."""
        self.free = self.free_without(slots)
        for slot in slots:
            if slot not in gave_way:
                self.ended += 1
                self.ended_tokens += self.tokens[slot]
                self.ended_entries += self.entries[slot]
            self.held[slot] = self.needs[slot] = self.tokens[slot] = self.entries[slot] = 0.0
            self.expected.pop(slot, None)

    @property
    def ratio(self) -> float:
        """Tokens per entry of all that is running or has ended; NaN before there was any."""
        entries = self.ended_entries + sum(self.entries)
        return (self.ended_tokens + sum(self.tokens)) / entries if entries else math.nan

    def has_room(self, chunk: float, slot: int | None = None, whole: float = 0.0) -> bool:
        """Whether the coming step finds `chunk` pages for certain beside what is spoken for.

        If a request goes on with them, in `slot`, what its next token may take is among them; and it will not come to
        hold more than `whole`, whatever each rank's part of it holds so far. (So a prompt that is alone always goes on
        in a pool that can hold it, however its chunks fall on pages.)
        """
        spoken_for = self.promised + sum(self.needs)
        if slot is None:
            return chunk <= self.free - spoken_for
        spoken_for -= self.needs[slot]
        return chunk <= self.free - spoken_for or whole <= self.pages - (sum(self.held) - self.held[slot]) - spoken_for

    def peak(self, prompt: int, answer: int) -> float:
        """Pages that are likely to be held at once, at most, from now on, with one more request of so many tokens.

        Every running request takes `rate` pages with each token until its answer is as long as it may be, and then
        gives all back. So most are held when one of them is about to end, and then by those with no less to come. Those
        that a next token may take, on average, count as held: the step would not begin without them. A request's last
        page is half full, on average.
        """
        coming = [(answer, 0.5 + prompt * self.rate)]
        for slot, (prompt_tokens, answer_tokens) in self.expected.items():
            seen = self.tokens[slot]
            left = min(prompt_tokens + answer_tokens - seen, answer_tokens)
            held = self.held[slot] or 0.5
            coming.append((left, held + max(prompt_tokens - seen, 0) * self.rate))
        together = most = 0.0
        for requests, (left, pages) in enumerate(sorted(coming, reverse=True), 1):
            together += pages
            most = max(most, together + requests * (left * self.rate + self.next_token))
        return most


class DMCInferenceContext(HoldsPages, DynamicInferenceContext):
    """Megatron's dynamic context over a `PagedCache`.

    Args:
        model: the model, or this pipeline stage of it.
        inference_config: `buffer_size_gb` is the memory of the whole cache, in GiB; `max_requests` its slots (default:
            256, fewer where their open segments would take more than a quarter of it), `max_sequence_length` the
            longest sequence, prompt and answer; the rest as Megatron has it, `block_size_tokens` aside, which has no
            meaning here.
        fp8: store entries in 8 bits (`CacheShape`).

    Raises:
        DMCError: for a model without DMC, settings of Megatron's cache that DMC has no counterpart for, and a cache
            that does not fit.
    """

    TOKEN_ROUNDER = 1  # steps without a CUDA graph need no padding
    account: PageAccount
    pages_by_head: float
    """Of the pool, in the account's unit."""

    def __init__(self, model: torch.nn.Module, inference_config: InferenceConfig, *, fp8: bool = False) -> None:
        _refuse_settings(inference_config)
        model = unwrap_model(model)
        dtype = next(model.parameters()).dtype
        groups = inference_config.pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        self._mp_groups = [group for group in (groups.tp, groups.pp) if get_pg_size(group) > 1]
        shape = self._cache_shape(model, inference_config, dtype, get_pg_size(groups.tp), fp8)
        pages = PagedCache.pages_in(shape, dtype, gib=inference_config.buffer_size_gb)
        self._new_cache = model, shape, pages, dtype
        block_tokens = shape.max_tokens + 2  # a request never comes to need a second block
        block_bytes = 2 * dtype.itemsize * shape.layers * shape.kv_heads * shape.channels * block_tokens
        super().__init__(
            model.config,
            dataclasses.replace(
                inference_config,
                block_size_tokens=block_tokens,
                buffer_size_gb=(shape.slots + 1.5) * block_bytes / 2**30,  # a block for each slot, one for nobody
                paused_buffer_size_gb=None,
                max_requests=shape.slots,
                use_cuda_graphs_for_non_decode_steps=False,
                use_flashinfer_fused_rope=False,
            ),
        )
        if self.kv_block_allocator.total_count != shape.slots + 1:
            raise DMCError(
                f"Megatron's context made {self.kv_block_allocator.total_count} blocks of {shape.slots + 1}: this "
                "version of megatron-core counts otherwise than the one that megatron-dmc was checked against"
            )

    def _cache_shape(
        self, model: torch.nn.Module, config: InferenceConfig, dtype: torch.dtype, tp: int, fp8: bool
    ) -> CacheShape:
        longest = config.max_sequence_length
        shape = cache_shape(model, slots=config.max_requests or 1, max_tokens=longest, fp8=fp8)
        if config.max_requests is None:
            quarter = int(config.buffer_size_gb * 2**30) // 4 // shape.fixed_bytes(dtype)
            unit = math.lcm(tp, self.REQUEST_ROUNDER)
            slots = min(DEFAULT_REQUESTS, quarter, config.max_tokens or self.DEFAULT_MAX_TOKENS)
            slots = int(self._least_of_ranks(slots))
            shape = dataclasses.replace(shape, slots=max(slots // unit, 1) * unit)
        return shape

    def _least_of_ranks(self, value: float) -> float:
        """Of the ranks that share the model: they must admit and evict alike, whatever memory each has."""
        least = torch.tensor(value, dtype=torch.float64, device=torch.cuda.current_device())
        for group in self._mp_groups:
            torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN, group=group)
        return float(least)

    def _allocate_memory_buffer(self) -> None:
        model, shape, pages, dtype = self._new_cache
        device = torch.cuda.current_device()
        device = device if isinstance(device, torch.device) else torch.device("cuda", device)
        self._hold(model, PagedCache(shape, pages, dtype=dtype, device=device))
        report = dict(size=(2 + 4 * shape.slots,), dtype=torch.float64)
        self._report = torch.zeros(**report, device=device)
        self._report_on_host = torch.zeros(**report, pin_memory=True)
        self._report_arrived = torch.cuda.Event()
        self.pages_by_head = self._least_of_ranks(pages / self._heads)

    @property
    def _heads(self) -> int:
        return self.cache.shape.layers * self.cache.shape.kv_heads

    @property
    def max_tokens_alone(self) -> int:
        """What the whole pool holds for certain, in tokens that do not merge."""
        return int(self.pages_by_head) * self.cache.shape.page_entries

    def pages_for(self, tokens: int) -> int:
        """Pages that so many tokens take in a head, at most."""
        return -(-tokens // self.cache.shape.page_entries)

    # A step on the device.

    def begin_step(self) -> None:
        """Begin the step that `initialize_attention_state` has laid out. Runs on the device alone."""
        slots = self.gpu_view.mha_block_table[:, 0].long()
        slots = slots.where(slots < self.cache.shape.slots, -1)  # those that stand in for others in a graph's capture
        if self.is_decode_only():
            self.step = self.cache.begin(slots[: self.padded_active_request_count])
            return
        decoding, rows = self.num_decode_requests, self.total_request_count - self.paused_request_count
        first = self.paused_request_count + decoding
        self.step = self.cache.begin(
            slots[:decoding],
            chunk_slots=slots[decoding:rows],
            chunk_lengths=self.request_query_lengths[first : self.total_request_count].tolist(),
        )

    def end_step(self) -> None:
        """Commit the step, and note the state after it. Runs on the device alone."""
        cache = self.cache
        cache.commit(self.step)
        held, needs = cache.usage()
        entries = cache.lengths[:, :-1].sum((0, 2))
        by_head = torch.cat([-cache.free_pages[None], held, needs, entries]) / self._heads
        n = cache.shape.slots
        free, held, needs, entries = by_head.split([1, n, n, n])
        self._report.copy_(torch.cat([free, ~self.step.ok[None], held, needs, cache.tokens[:-1], entries]))
        for group in self._mp_groups:
            torch.distributed.all_reduce(self._report, torch.distributed.ReduceOp.MAX, group=group)
        self.step = None

    def send_report(self) -> None:
        """Let the state after the step follow it to the host."""
        self._report_on_host.copy_(self._report, non_blocking=True)
        self._report_arrived.record()

    def _read_report(self) -> None:
        self._report_arrived.synchronize()  # the step's tokens came behind it: it has arrived
        free, dry, *slots = self._report_on_host.tolist()
        if dry:
            raise DMCError(
                "a step found too few pages, although as many were free as it could take: this is a defect of "
                "megatron-dmc, please report it. Nothing of the step was kept"
            )
        n = self.cache.shape.slots
        self.account.update(-free, [slots[i : i + n] for i in range(0, 4 * n, n)])

    # Requests come and go.

    def check_availability(self, req: DynamicInferenceRequest) -> tuple[bool, bool, bool]:
        row_free, tokens_fit, slot_free = super().check_availability(req)
        return row_free, tokens_fit, slot_free and self._has_pages(req)

    def _has_pages(self, req: DynamicInferenceRequest) -> bool:
        """Whether the request's next chunk finds its pages for certain, and all requests likely theirs to the end."""
        account, chunk = self.account, req.remaining_prompt_length
        if self.enable_chunked_prefill:
            chunk = min(chunk, self.max_tokens - self.active_token_count)
        if req.request_id == self.chunked_prefill_request_id:
            row = self.get_index_of_chunked_prefill_request(safe=False)
            slot, whole = int(self.request_to_kv_block_ids[row, 0]), req.finished_chunk_token_count + chunk
            return account.has_room(self.pages_for(chunk), slot, self.pages_for(whole))
        if not account.has_room(self.pages_for(chunk)):
            return False
        if not account.expected:
            return True
        peak = account.peak(req.remaining_prompt_length, req.sampling_params.num_tokens_to_generate)
        return peak <= (1 - HEADROOM) * self.pages_by_head

    def add_request(self, req: DynamicInferenceRequest, prefill_chunk_length: int | None = None) -> None:
        chunk = req.remaining_prompt_length if prefill_chunk_length is None else prefill_chunk_length
        prompt = req.finished_chunk_token_count + req.remaining_prompt_length
        super().add_request(req, prefill_chunk_length)
        self.account.promised += self.pages_for(chunk)
        slot = int(self.request_to_kv_block_ids[self.total_request_count - 1, 0])
        self.account.expected[slot] = prompt, req.sampling_params.num_tokens_to_generate

    def release_memory_blocks_from_request_indexes(self, request_indexes: Tensor) -> None:
        slots = self.request_to_kv_block_ids[request_indexes].flatten()
        slots = slots[slots >= 0].long()
        super().release_memory_blocks_from_request_indexes(request_indexes)
        if len(slots):
            self.account.release(slots.tolist(), self._giving_way)
            self.cache.release(self.cache.on_device(slots.tolist()))

    def update_requests(
        self, active_requests_mask: Tensor, new_tokens: Tensor, new_speculative_tokens: Tensor | None = None
    ) -> dict | None:
        """As Megatron's; besides, requests give way where the next step might find too few pages."""
        self._read_report()
        mask = active_requests_mask.cpu().clone()
        evicted = self._make_room(mask)
        mask[evicted] = 0  # released like those that have ended; the engine makes them wait
        evicted_ids = self.request_ids[self.paused_request_count :][evicted].clone()
        self._giving_way = self.request_to_kv_block_ids[self.paused_request_count :, 0][evicted].tolist()
        result = super().update_requests(mask, new_tokens, new_speculative_tokens)
        if evicted:
            result = {"newly_paused_request_ids": None, **(result or {}), "evict_request_ids": evicted_ids}
        return result

    def _make_room(self, mask: Tensor) -> list[int]:
        """Which active rows have to give way so that the others find pages for a token, the youngest row first.

        A prompt whose chunks are under way gives way as well, by the engine's hand: `chunk_gives_way`.
        """
        account, first, active = self.account, self.paused_request_count, mask.tolist()
        slots = self.request_to_kv_block_ids[first : self.total_request_count, 0].tolist()
        ids = self.request_ids[first : self.total_request_count].tolist()
        chunk, chunk_row = self.chunked_prefill_request_id, self.get_index_of_chunked_prefill_request(safe=False)
        rows = [row for row, request_id in enumerate(ids) if request_id != chunk]
        stays = [row for row in rows if active[row]]
        gone = [slots[row] for row in rows if not active[row]]
        needs = sum(account.needs[slots[row]] for row in stays)
        youngest_first = sorted(stays, key=lambda row: -ids[row])
        evicted = []
        while (
            needs > account.free_without(gone)
            and youngest_first
            and len(youngest_first) + (chunk >= 0 and not self.chunk_gives_way) > 1
        ):
            if chunk > ids[youngest_first[0]] and not self.chunk_gives_way:
                self.chunk_gives_way = True
                gone.append(int(self.request_to_kv_block_ids[chunk_row, 0]))
                continue
            row = youngest_first.pop(0)
            evicted.append(row)
            gone.append(slots[row])
            needs -= account.needs[slots[row]]
        return evicted

    def drop_chunk(self) -> None:
        """Give back what the prompt holds whose chunks are under way; it will enter from its beginning."""
        row = self.get_index_of_chunked_prefill_request(safe=False)
        self._giving_way = [int(self.request_to_kv_block_ids[row, 0])]
        self.release_memory_blocks_from_request_indexes(torch.tensor([row]))
        self.request_ids[row] = -1
        self.chunked_prefill_request_id = -1
        self.chunk_gives_way = False

    def reset_metadata(self, *args, **kwargs) -> None:
        super().reset_metadata(*args, **kwargs)
        shape = self.cache.shape
        self.cache.release(torch.arange(shape.slots, device=self.cache.tokens.device))
        self.cache.clear_dry()
        self.account = PageAccount.empty(self.pages_by_head, shape.slots, shape.page_entries)
        self.step = None
        self.chunk_gives_way = False
        self._giving_way: list[int] = []

    def get_kvcache_utilization_stats(self) -> dict:
        """Megatron's, with pages for blocks."""
        pages, free = len(self.cache.pages), round(self.account.free * self._heads)
        return super().get_kvcache_utilization_stats() | dict(
            total_blocks=pages,
            allocated_blocks=pages - free,
            active_unique_blocks=pages - free,
            block_count_avail=free,
            allocated_utilization=1 - free / pages,
            active_utilization=1 - free / pages,
        )


class WholeStepController(TextGenerationController):
    """Megatron's controller; a step of decoding is one CUDA graph, for each size of batch that the context names.

    Attributes:
        captures: whether it is. Not on the CPU, nor with pipeline stages, which wait for each other.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.captures = next(self._unwrapped_model.parameters()).is_cuda and not self.model_is_pipeline_parallel
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._graph_memory = torch.cuda.graph_pool_handle() if self.captures else None

    def _dynamic_step_forward_logits(self, input_ids: Tensor, position_ids: Tensor) -> None:
        context = self.inference_wrapped_model.inference_context
        with torch.inference_mode():
            if not (self.captures and context.using_cuda_graph_this_step()):
                self._run_step(input_ids, position_ids)
                return
            size = input_ids.shape[1]
            if size not in self._graphs:
                self._graphs[size] = self._capture(input_ids, position_ids)
            graph, self._all_logits_cuda = self._graphs[size]
            graph.replay()

    def _run_step(self, input_ids: Tensor, position_ids: Tensor) -> None:
        super()._dynamic_step_forward_logits(input_ids, position_ids)

    def _capture(self, input_ids: Tensor, position_ids: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """A step of decoding as a graph. It runs once before, for what is set up when first used."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._run_step(input_ids, position_ids)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with _no_garbage_collection(), torch.cuda.graph(graph, pool=self._graph_memory):
            self._run_step(input_ids, position_ids)
        return graph, self._all_logits_cuda


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """An engine that nobody uses any more has CUDA graphs, and to destroy one of them ends a capture under way."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class DMCController(WholeStepController):
    """The same over the paged cache, where steps begin and end."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        cache = self.inference_wrapped_model.inference_context.cache
        probe = torch.empty(0, 1, cache.shape.channels, dtype=cache.dtype, device=cache.tokens.device)
        layers = dmc_layers([self._unwrapped_model])
        # The reference waits for the device.
        self.captures &= {layer.core_attention.paged_kernel(probe, cache) for layer in layers} == {"fused"}

    def _dynamic_step_forward_logits(self, input_ids: Tensor, position_ids: Tensor) -> None:
        super()._dynamic_step_forward_logits(input_ids, position_ids)
        self.inference_wrapped_model.inference_context.send_report()

    def _run_step(self, input_ids: Tensor, position_ids: Tensor) -> None:
        context = self.inference_wrapped_model.inference_context
        context.begin_step()
        super()._run_step(input_ids, position_ids)
        context.end_step()
        self._all_logits_cuda[..., self.tokenizer.vocab_size :] = -math.inf

    def _capture(self, input_ids: Tensor, position_ids: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        table = self.inference_wrapped_model.inference_context.gpu_view.mha_block_table
        running = table.clone()
        table.fill_(-1)  # what runs before the graph takes no pages
        captured = super()._capture(input_ids, position_ids)
        table.copy_(running)
        return captured


class DMCInferenceEngine(DynamicInferenceEngine):
    """Megatron's engine; a request that cannot be served fails alone, and one that gives way loses nothing."""

    def reset(self) -> None:
        super().reset()
        self._refusals: dict[int, ContextOverflowError] = {}

    def create_cuda_graphs(self, reset_context: bool = True) -> None:
        """One graph of a whole step for each size of batch that the context names."""
        if not self.controller.captures:
            return
        for dimensions in self.context.cuda_graph_batch_dimensions_list:
            tokens, positions, _ = self.controller._dynamic_step_context_init(construct_graph_dimensions=dimensions)
            self.controller._dynamic_step_forward_logits(tokens, positions)
            self.context.reset()

    def add_request(self, request_id: int, prompt, sampling_params: SamplingParams | None = None):
        """As Megatron's. The record of a request that cannot be served has failed, and its event says why."""
        sampling_params = sampling_params or SamplingParams()
        if isinstance(prompt, str):
            # Not Megatron's `tokenize_prompt`: it removes the token with which texts begin, in training as well.
            prompt, first = tokenize_prompt(self.controller.tokenizer, prompt), beginning(self.controller.tokenizer)
            if sampling_params.add_BOS and first is not None and prompt[:1] != [first]:
                prompt = [first, *prompt]
        elif isinstance(prompt, Tensor):
            prompt = prompt.tolist()
        if (reason := self._unsound(prompt, sampling_params)) is not None:
            self._refusals[request_id] = ContextOverflowError(request_id, reason, is_transient=False)
            prompt, sampling_params = [], SamplingParams(num_tokens_to_generate=1)
        elif (reason := self._too_large(len(prompt), sampling_params)) is not None:
            self._refusals[request_id] = error = BlockOverflowError(request_id, reason)
            error.is_transient = False
        return super().add_request(request_id, prompt, sampling_params)

    def _add_request(self, request: DynamicInferenceRequest):
        if (error := self._refusals.pop(request.request_id, None)) is not None:
            request.status = Status.FAILED
            request.add_event_error_nontransient(error)
        return super()._add_request(request)

    def _unsound(self, prompt: list[int], params: SamplingParams) -> str | None:
        """What is wrong with a request, or `None`."""
        vocabulary = self.controller.tokenizer.vocab_size
        if params.add_BOS and beginning(self.controller.tokenizer) is None:
            return "add_BOS is set, and the tokenizer has no token that begins a text"
        if not prompt:
            return "the prompt has no tokens"
        if (wrong := next((t for t in prompt if type(t) is not int), None)) is not None:
            return f"a prompt is text or a list of token ids; it holds {wrong!r}"
        if (wrong := next((t for t in prompt if not 0 <= t < vocabulary), None)) is not None:
            return f"token {wrong} does not exist: the vocabulary has {vocabulary}"
        if len(prompt) >= self.context.max_sequence_length:
            return (
                f"the prompt's {len(prompt)} tokens leave no room for an answer: a sequence has at most "
                f"{self.context.max_sequence_length}"
            )
        if len(prompt) > self.context.max_tokens and not self.enable_chunked_prefill:
            return (
                f"the prompt's {len(prompt)} tokens are more than a step takes ({self.context.max_tokens}), and "
                "enable_chunked_prefill is off"
            )
        greedy = params.top_k == 1
        if not greedy and not (0 < params.temperature < math.inf):
            return f"temperature must be above 0 (top_k = 1 takes the most likely token); got {params.temperature}"
        if not 0 <= params.top_k < vocabulary:
            return f"top_k must be 0 (all tokens) to {vocabulary - 1}; got {params.top_k}"
        if not 0 <= params.top_p <= 1:
            return f"top_p must be between 0 (all tokens) and 1; got {params.top_p}"
        if params.top_k and params.top_p:
            return f"give either top_k or top_p; got {params.top_k} and {params.top_p}"
        if params.num_tokens_to_generate is not None and params.num_tokens_total is not None:
            return "give either num_tokens_to_generate or num_tokens_total"
        if params.num_tokens_to_generate is not None and params.num_tokens_to_generate < 0:
            return f"num_tokens_to_generate must be 0 or more; got {params.num_tokens_to_generate}"
        if params.num_tokens_total is not None and params.num_tokens_total < len(prompt):
            return f"num_tokens_total is {params.num_tokens_total}, the prompt alone has {len(prompt)} tokens"
        if params.top_n_logprobs and not params.return_log_probs:
            return "top_n_logprobs needs return_log_probs"
        if not 0 <= params.top_n_logprobs <= vocabulary:
            return f"top_n_logprobs must be 0 to {vocabulary}; got {params.top_n_logprobs}"
        if params.return_log_probs and not params.skip_prompt_log_probs and self.materialize_only_last_token_logits:
            return (
                "log-probabilities of the prompt need materialize_only_last_token_logits = False; set "
                "skip_prompt_log_probs for those of the answer alone"
            )
        if params.stop_words is not None and not all(params.stop_words):
            return "a stop word is empty"
        return None

    def _too_large(self, prompt: int, params: SamplingParams) -> str | None:
        """Why a request might not fit into the pool even alone, or `None`."""
        context, asked = self.context, params.num_tokens_to_generate
        total = params.num_tokens_total or (context.max_sequence_length if asked is None else prompt + asked)
        total = min(total, context.max_sequence_length)
        if total <= context.max_tokens_alone:
            return None
        cache = context.cache
        page = cache.shape.page_bytes(cache.dtype) * context._heads
        return (
            f"{prompt} tokens of prompt and {total - prompt} to generate may need "
            f"{context.pages_for(total) * page / 2**30:.2f} GiB of cache if nothing merges, and the pool has "
            f"{len(cache.pages) // context._heads * page / 2**30:.2f} GiB, enough for {context.max_tokens_alone} "
            "tokens; give the cache more memory, or ask for fewer tokens"
        )

    def generate(self, prompts, sampling_params: SamplingParams | None = None) -> list:
        """As Megatron's, which would not return requests that failed at once."""
        futures = [self.add_request(int(next(self.request_counter)), prompt, sampling_params) for prompt in prompts]
        while self.has_unfinished_requests():
            self.step_modern()
        self.forget_failed()
        return [future.result() for future in futures]

    def cancel(self, request_id: int) -> bool:
        """Give a request up, between steps; returns whether there was one.

        If it is running, it ends with the next step, and its record holds what was generated; else it fails.
        """
        if request_id not in self.requests or request_id in self.failed_request_ids:
            return False
        if request_id not in self.waiting_request_ids:
            self.stop_word_finished_request_ids.add(request_id)  # what Megatron ends requests by
            return True
        if request_id == self.context.chunked_prefill_request_id:
            self.context.drop_chunk()
        self.waiting_request_ids.remove(request_id)
        self.stop_word_finished_request_ids.discard(request_id)
        self.get_request(request_id).add_event_error_nontransient(
            ContextOverflowError(request_id, "cancelled", is_transient=False)
        )
        self._handle_failed_request(request_id)
        if not self.has_unfinished_requests():
            self.forget_failed()
        return True

    def forget_failed(self) -> None:
        """Their records have been answered; Megatron forgets them with the next step, if there is one."""
        for request_id in self.failed_request_ids:
            self.requests.pop(request_id)
        self.failed_request_ids.clear()

    def schedule_waiting_requests(self) -> None:
        if self.context.chunk_gives_way:
            request = self.get_request(self.context.chunked_prefill_request_id)
            self.context.drop_chunk()
            request.remaining_prompt_tokens = request.prompt_tokens
            request.finished_chunk_token_count = 0
            request.add_event_evict()
            self.evicted_request_count += 1
        super().schedule_waiting_requests()

    def post_process_requests(self, *args, **kwargs):
        evicted = kwargs.get("evict_request_ids", args[2] if len(args) > 2 else None)
        result = super().post_process_requests(*args, **kwargs)
        for request_id in () if evicted is None else evicted.tolist():
            *_, before, request = self.requests[request_id].record.requests
            request.stop_word_ids = before.stop_word_ids
        return result

    def _get_and_clear_stop_word_finished_ids(self, active_request_ids: list[int]) -> set[int]:
        """As Megatron's, but for a request that gave way just then: its chunks have to enter before it can end."""
        chunk = self.context.chunked_prefill_request_id
        return super()._get_and_clear_stop_word_finished_ids([i for i in active_request_ids if i != chunk])

    def _check_stop_words_for_request_post_append(self, request: DynamicInferenceRequest) -> tuple[bool, int]:
        """As Megatron's; a stop word may have begun before the request gave way."""
        pieces = self.requests[request.request_id].record.requests
        if len(pieces) == 1:
            return super()._check_stop_words_for_request_post_append(request)
        for word in request.stop_word_ids or ():
            tail: list[int] = []
            for piece in reversed(pieces):
                tail = piece.generated_tokens[-(len(word) - len(tail)) :] + tail
                if len(tail) == len(word):
                    break
            if tail == word:
                left = 0 if request.sampling_params.detokenize_stop_sequence else len(word)
                trimmed = min(left, len(request.generated_tokens))
                for piece in reversed(pieces):
                    dropped = min(left, len(piece.generated_tokens))
                    piece.generated_tokens = piece.generated_tokens[: len(piece.generated_tokens) - dropped]
                    left -= dropped
                return True, trimmed
        return False, 0


def failure(request: DynamicInferenceRequest) -> str:
    """Why a request failed."""
    errors = [event.payload.message for event in request.events if event.type.name.startswith("ERROR")]
    return "; ".join(filter(None, errors)) or "the engine cannot serve the request"


def _refuse_settings(config: InferenceConfig) -> None:
    refusals = [
        (config.enable_prefix_caching, "enable_prefix_caching", "what a token merges with depends on all before it"),
        (config.num_speculative_tokens, "num_speculative_tokens", "a merge cannot be taken back"),
        (config.unified_memory_level, "unified_memory_level", "pages live on the device alone"),
        (
            config.kv_cache_management_mode != KVCacheManagementMode.PERSIST,
            "kv_cache_management_mode",
            "pages stay where they are; use PERSIST",
        ),
        (
            config.async_sched_mode != AsyncScheduleMode.LEGACY,
            "async_sched_mode",
            "pages are counted after a step, before the next is prepared; use LEGACY",
        ),
        (
            config.mamba_inference_state_config is not None,
            "mamba_inference_state_config",
            "Mamba layers are not served",
        ),
    ]
    if found := [f"{name} = {getattr(config, name)!r} ({why})" for bad, name, why in refusals if bad]:
        raise DMCError("DMC cannot serve with " + "; ".join(found))
