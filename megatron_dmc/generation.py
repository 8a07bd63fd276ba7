"""Text from a compressed cache: batches of prompts, one token of each at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dmc.cache import PagedCache
from megatron_dmc.checkpoint import LoadedModel
from megatron_dmc.config import DMCError
from megatron_dmc.context import PagedContext, cache_shape
from megatron_dmc.megatron_hooks import dmc_layers

MAX_CHUNK = 8192
"""Tokens of prompts that enter the cache at once."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the most likely token.
        top_k: sample from so many most likely tokens; 0 from all.
        top_p: sample from the most likely tokens that together have this probability; 0 from all.
        seed: of the random choices.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise DMCError(f"temperature must be 0 (greedy) or more; got {self.temperature}")
        if self.top_k < 0:
            raise DMCError(f"top_k must be 0 (all tokens) or more; got {self.top_k}")
        if not 0 <= self.top_p <= 1:
            raise DMCError(f"top_p must be between 0 (all tokens) and 1; got {self.top_p}")
        if self.top_k and self.top_p:
            raise DMCError(f"give either top_k or top_p; got {self.top_k} and {self.top_p}")


@dataclass(frozen=True)
class CacheReport:
    """What the cache held of all sequences that have ended.

    Attributes:
        sequences: so many.
        tokens: their tokens that entered the cache (the last one of each has not).
        heads: caches of each sequence, layers times KV heads.
        entries: entries kept, summed over sequences and heads.
        entry_bytes: bytes of those entries' keys and values.
        vanilla_bytes: bytes of all tokens' keys and values, in the model's dtype.
        state_bytes: bytes of one sequence's open segments, which do not grow with it.
    """

    sequences: int
    tokens: int
    heads: int
    entries: int
    entry_bytes: int
    vanilla_bytes: int
    state_bytes: int

    @property
    def ratio(self) -> float:
        """Tokens per entry."""
        return self.tokens * self.heads / self.entries


@dataclass
class _Sequence:
    index: int
    tokens: list[int]  # the prompt, then what was generated
    remaining: int
    entered: int = 0  # tokens in the cache, while the prompt enters it


@dataclass
class _Results:
    """What a step of decoding found, on its way to the host."""

    owners: dict[int, _Sequence]  # by slot, when it was launched
    chosen: Tensor  # -1 where there is no token
    ok: Tensor
    crowding: int  # how often there had come to be more room before it was launched
    arrived: torch.cuda.Event | None = None


class Generation:
    """Continue prompts: iterate for `(prompt's index, token)`, then read `report`.

    As many sequences as there are slots run at once; the others wait for one. On a GPU a step of decoding is one CUDA
    graph, and the host reads a step's tokens while the next one runs. Where the pool of pages runs dry, the sequence
    that came last gives its pages back and is computed again, prompt and generated tokens, once there is room.

    Args:
        loaded: the model.
        prompts: their tokens, at least one each.
        max_new_tokens: stop a sequence after so many.
        sampling: how tokens are chosen.
        stop_at_end: stop at the tokenizer's end-of-document token, which is not returned.
        slots: sequences at once, at most.
        cache_gib: memory for the cache in GiB. By default as much as all sequences may need; on a GPU at most 90% of
            what is free.
        fp8: store entries in 8 bits (`CacheShape`).
    """

    def __init__(
        self,
        loaded: LoadedModel,
        prompts: list[list[int]],
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop_at_end: bool = True,
        *,
        slots: int = 64,
        cache_gib: float | None = None,
        fp8: bool = False,
    ) -> None:
        if not prompts or not all(prompts):
            raise DMCError("the prompt has no tokens" if prompts else "there is no prompt")
        if max_new_tokens < 1:
            raise DMCError(f"max_new_tokens must be at least 1; got {max_new_tokens}")
        if slots < 1:
            raise DMCError(f"slots must be at least 1; got {slots}")
        longest, limit = max(map(len, prompts)), loaded.args.max_position_embeddings
        if loaded.args.position_embedding_type == "learned_absolute" and longest + max_new_tokens > limit:
            raise DMCError(
                f"{longest} prompt tokens and {max_new_tokens} new ones exceed the model's {limit} positions"
            )
        self.sampling, self._stop_at_end = sampling or Sampling(), stop_at_end
        if self.sampling.top_k >= loaded.tokenizer.vocab_size:
            raise DMCError(
                f"top_k must be below the vocabulary's {loaded.tokenizer.vocab_size}; got {self.sampling.top_k}"
            )
        self._loaded, self._on_gpu = loaded, loaded.device.type == "cuda"
        slots = min(slots, len(prompts))
        self._context = self._make_context(slots, prompts, max_new_tokens, cache_gib, fp8)
        self._cache = self._context.cache
        self._waiting = deque(_Sequence(i, list(p), max_new_tokens) for i, p in enumerate(prompts))
        self._running: dict[int, _Sequence] = {}  # by slot, in the order of arrival
        self.ended: set[int] = set()
        """Prompts that nothing more will follow."""
        self._crowding, self._crowded = 0, False  # how often pages came back; whether the waiting have to wait

        where = dict(dtype=torch.int64, device=loaded.device)
        self._every_slot = torch.arange(slots, **where)
        self._slots = torch.full((slots,), -1, **where)  # what runs, as the device knows it
        self._tokens = torch.zeros(slots, **where)  # each one's last token, which has not entered the cache
        self._remaining = torch.zeros(slots, **where)
        self._kept = torch.zeros(2, **where)  # tokens and entries of what has ended
        self._random = torch.Generator(loaded.device).manual_seed(self.sampling.seed)
        probe = torch.empty(0, 1, self._cache.shape.channels, dtype=self._cache.dtype, device=loaded.device)
        kernels = {layer.core_attention.paged_kernel(probe, self._cache) for layer in dmc_layers([loaded.model])}
        self._captures = self._on_gpu and kernels == {"fused"}  # others wait for the device
        self._graph: torch.cuda.CUDAGraph | None = None

    def _make_context(
        self, slots: int, prompts: list, max_new_tokens: int, gib: float | None, fp8: bool
    ) -> PagedContext:
        model, device = self._loaded.model, self._loaded.device
        dtype = next(model.parameters()).dtype
        shape = cache_shape(model, slots=slots, max_tokens=max(map(len, prompts)) + max_new_tokens, fp8=fp8)
        if gib is not None:
            pages = PagedCache.pages_in(shape, dtype, gib=gib)
        else:
            most = sorted((-(-(len(p) + max_new_tokens) // shape.page_entries) for p in prompts), reverse=True)
            pages = sum(most[:slots]) * shape.layers * shape.kv_heads
            if self._on_gpu:
                pages = min(pages, PagedCache.pages_in(shape, dtype, memory_share=0.9, device=device))
        return PagedContext(model, PagedCache(shape, pages, dtype=dtype, device=device))

    @torch.no_grad()
    def __iter__(self) -> Iterator[tuple[int, int]]:
        from megatron.core.inference.utils import InferenceMode

        under_way: _Results | None = None
        while self._waiting or self._running or under_way is not None:
            results, first = None, []
            admits = self._waiting and len(self._running) < len(self._slots) and not self._crowded
            with InferenceMode.active():
                if not admits and self._running:
                    results = self._decode()
                elif admits and under_way is None:
                    first = list(self._admit())
            yield from first
            if under_way is not None:  # while the next step runs
                yield from self._read(under_way)
            under_way = results

    @property
    def report(self) -> CacheReport:
        """The cache of what has ended so far. Waits for the device."""
        tokens, entries = self._kept.tolist()
        shape = self._cache.shape
        return CacheReport(
            sequences=len(self.ended),
            tokens=tokens,
            heads=shape.layers * shape.kv_heads,
            entries=entries,
            entry_bytes=entries * shape.page_bytes(self._cache.dtype) // shape.page_entries,
            vanilla_bytes=tokens * shape.layers * shape.kv_heads * 2 * shape.channels * self._cache.dtype.itemsize,
            state_bytes=shape.layers * shape.kv_heads * shape.state_bytes(self._cache.dtype),
        )

    # Prompts.

    def _admit(self) -> Iterator[tuple[int, int]]:
        """Let waiting sequences in, as many as there are slots and pages for; their first tokens."""
        free = [slot for slot in range(len(self._slots)) if slot not in self._running]
        while free and self._waiting:
            room, batch = MAX_CHUNK, []
            for slot, sequence in zip(free, self._waiting, strict=False):
                chunk = min(room, len(sequence.tokens) - sequence.entered)
                if chunk:
                    batch.append((slot, sequence, chunk))
                    room -= chunk
            while (chosen := self._enter(batch)) is None and len(batch) > 1:
                batch = batch[: len(batch) // 2]
            if chosen is None:
                slot, sequence, _ = batch[0]
                self._release(slot)
                sequence.entered, self._crowded = 0, True
                if not self._running:
                    raise self._too_small(sequence)
                return
            for (slot, sequence, chunk), token in zip(batch, chosen, strict=True):
                sequence.entered += chunk
                if sequence.entered == len(sequence.tokens):  # all but perhaps the last one of a batch
                    self._waiting.remove(sequence)
                    free.remove(slot)
                    self._running[slot] = sequence
                    self._slots[slot], self._tokens[slot], self._remaining[slot] = slot, token, sequence.remaining - 1
                    yield from self._take(slot, token)

    def _enter(self, batch: list[tuple[int, _Sequence, int]]) -> list[int] | None:
        """A chunk of each prompt enters the cache; what may follow each, or `None` if there were too few pages."""
        device, context = self._loaded.device, self._context
        tokens = [t for _, sequence, n in batch for t in sequence.tokens[sequence.entered : sequence.entered + n]]
        step = context.begin(
            chunk_slots=torch.tensor([slot for slot, *_ in batch], device=device),
            chunk_lengths=[n for *_, n in batch],
        )
        logits = self._logits(torch.tensor([tokens], device=device))
        context.commit()
        chosen = self._choose(logits)
        if not step.ok:
            self._cache.clear_dry()
            return None
        return chosen.tolist()

    # Decoding.

    def _decode(self) -> _Results:
        """Launch a step of all that run."""
        if not self._captures:
            self._step()
            return _Results(dict(self._running), self._chosen, self._ok, self._crowding)
        if self._graph is None:
            self._capture()
        self._graph.replay()
        chosen, ok = (
            torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, non_blocking=True)
            for x in (self._chosen, self._ok)
        )
        arrived = torch.cuda.Event()
        arrived.record()
        return _Results(dict(self._running), chosen, ok, self._crowding, arrived)

    def _capture(self) -> None:
        """The step as a CUDA graph, after it has run once, on empty places, for what is set up when first used."""
        running = self._slots.clone()
        self._slots.fill_(-1)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        self._graph.register_generator_state(self._random)
        with torch.cuda.graph(self._graph):
            self._step()
        self._slots.copy_(running)

    def _step(self) -> None:
        """One more token of all that run, on the device alone. Without pages nothing changes but `_ok`."""
        step = self._context.begin(self._slots)
        logits = self._logits(self._tokens[None])
        self._context.commit()
        counts = step.ok & (self._slots >= 0)
        self._tokens.copy_(self._choose(logits).where(counts, self._tokens))
        self._remaining -= counts.long()
        ended = self._remaining == 0
        if self._stop_at_end:
            ended |= self._tokens == self._loaded.tokenizer.eod
        self._slots.masked_fill_(counts & ended, -1)
        self._chosen, self._ok = self._tokens.where(counts, -1), step.ok.clone()

    def _read(self, results: _Results) -> Iterator[tuple[int, int]]:
        if results.arrived is not None:
            results.arrived.synchronize()
        if not results.ok:
            self._cache.clear_dry()
            if results.crowding == self._crowding:  # else there is more room than when it was launched
                self._make_room()
            return
        for slot, token in enumerate(results.chosen.tolist()):
            sequence = results.owners.get(slot)
            if token >= 0 and sequence is not None and self._running.get(slot) is sequence:
                yield from self._take(slot, token)

    def _make_room(self) -> None:
        """The sequence that came last waits once more, with what it has generated."""
        slot, sequence = next(reversed(self._running.items()))
        if len(self._running) == 1:
            raise self._too_small(sequence)
        self._release(slot)
        del self._running[slot]
        sequence.entered = 0
        self._waiting.appendleft(sequence)
        self._crowding += 1
        self._crowded = True

    # Both.

    def _logits(self, tokens: Tensor) -> Tensor:
        """`[n, vocabulary]` behind each sequence's last one of `tokens` `[1, n]`."""
        positions = self._context.positions()
        logits = self._loaded.model(
            tokens, positions, None, inference_context=self._context, runtime_gather_output=True
        )
        return logits[0, :, : self._loaded.tokenizer.vocab_size].float()

    def _choose(self, logits: Tensor) -> Tensor:
        from megatron.core.inference.sampling.torch_sampling import TorchSampling

        sampling, greedy = self.sampling, self.sampling.temperature == 0
        return TorchSampling.sample_from_logits(
            logits,
            temperature=1.0 if greedy else sampling.temperature,
            top_k=1 if greedy else sampling.top_k,
            top_p=0.0 if greedy else float(sampling.top_p),
            generator=self._random,
        )

    def _take(self, slot: int, token: int) -> Iterator[tuple[int, int]]:
        """A token that the sequence in `slot` goes on with, unless it ends there."""
        sequence = self._running[slot]
        sequence.remaining -= 1
        at_end = self._stop_at_end and token == self._loaded.tokenizer.eod
        if at_end or not sequence.remaining:
            self._kept += torch.stack([self._cache.tokens[slot], self._cache.lengths[:, slot].sum()])
            self._release(slot)
            del self._running[slot]
            self.ended.add(sequence.index)
            self._crowding += 1
            self._crowded = False
        if not at_end:
            sequence.tokens.append(token)
            yield sequence.index, token

    def _release(self, slot: int) -> None:
        self._cache.release(self._every_slot[slot : slot + 1])
        self._slots[slot] = -1

    def _too_small(self, sequence: _Sequence) -> DMCError:
        statistics, page = self._cache.statistics(), self._cache.shape.page_bytes(self._cache.dtype)
        return DMCError(
            f"the cache's {statistics.pages} pages ({statistics.pages * page / 2**30:.2f} GiB) are too few for prompt "
            f"{sequence.index} alone, at {len(sequence.tokens)} tokens; give the cache more memory"
        )
