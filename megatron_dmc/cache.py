"""The paged KV cache: one pool of small pages for all layers, heads and sequences, kept by the device alone.

Every KV head of every layer and sequence has as many entries as its decisions left, so every one of them takes pages
of its own, of 16 entries of one head (unless built otherwise). A *slot* is a place for one sequence. A step brings a
few new tokens to each of many sequences (decoding), chunks of any length to others (their prompts), or both, and goes

    step = cache.begin(slots, new_tokens, chunk_slots=…, chunk_lengths=…)
    ...                 # each layer takes pages, writes entries, and lengths into `step.lengths`
    cache.commit(step)  # lengths and tokens become valid, unless the pool ran dry

Nothing here waits for the device: no length, page or flag comes to the host, and a step of decoding can be captured in
a CUDA graph. What has not been committed has not happened: a step that found the pool dry can be repeated once pages
are free. Pages for decoding are taken when a step begins, one at most for every head; a chunk's are taken layer by
layer, once its decisions are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_dmc.config import DMCError

UNIT_ENTRIES = 16
"""Entries that decoding reads at once: the unit in which its work is dealt out."""

NEW_UNITS = 5
"""Units that a head's new tokens are counted as: most of their time is waiting."""

MAX_NEW_TOKENS = 8
"""New tokens that a step of decoding may bring to a sequence."""


FREE_LIST_BYTES = 4
"""A page's place in the free list."""


def built_page_entries() -> int:
    """Entries of a page: what the extension was built with (`MEGATRON_DMC_PAGE_ENTRIES`, 8 to 64), without it 16."""
    from megatron_dmc.ops.fused import load_extension

    return torch.ops.megatron_dmc.page_entries() if load_extension() is None else 16


@dataclass(frozen=True)
class CacheShape:
    """What a cache is for.

    Attributes:
        layers, heads, kv_heads, channels: of the model, on this rank.
        slots: sequences that can be in it at once.
        max_tokens: the longest sequence.
        window: how many tokens a merge reaches back; 0 sets no limit.
        fp8: whether entries are stored in 8 bits (e4m3), with a float32 scale for every key and every value.
        page_entries: entries of a page; kernels take those that they were built with.
    """

    layers: int
    slots: int
    heads: int
    kv_heads: int
    channels: int
    max_tokens: int
    window: int
    fp8: bool = False
    page_entries: int = field(default_factory=built_page_entries)

    def __post_init__(self) -> None:
        for name in ("layers", "slots", "heads", "kv_heads", "channels", "max_tokens"):
            if getattr(self, name) < 1:
                raise DMCError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise DMCError(f"heads must be a multiple of kv_heads; got {self.heads} and {self.kv_heads}")
        if self.window < 0:
            raise DMCError(f"window must be 0 (no limit) or a number of tokens; got {self.window}")
        if self.page_entries not in (8, 16, 32, 64):
            raise DMCError(f"page_entries must be 8, 16, 32 or 64; got {self.page_entries}")

    @property
    def max_pages(self) -> int:
        """Pages of one head of the longest sequence, none of whose tokens merge."""
        return -(-self.max_tokens // self.page_entries)

    @property
    def recent_tokens(self) -> int:
        """Tokens that stay at hand to merge with: what a window reaches back, and a step's, which may be repeated.

        A multiple of 4, so that their weights can be copied 16 bytes at a time.
        """
        return -(-(self.window - 1 + MAX_NEW_TOKENS) // 4) * 4 if self.window else 0

    def page_bytes(self, dtype: torch.dtype) -> int:
        return 2 * self.page_entries * (self.channels + 4 if self.fp8 else self.channels * dtype.itemsize)

    def fixed_bytes(self, dtype: torch.dtype) -> int:
        """Block tables, lengths, and the state of open segments."""
        per_head = 4 * self.max_pages + 4 + self.state_bytes(dtype)
        return self.layers * (self.slots + 1) * self.kv_heads * per_head

    def state_bytes(self, dtype: torch.dtype) -> int:
        """Of one head's open segment."""
        if self.window:
            return self.recent_tokens * (2 * self.channels * dtype.itemsize + 4)
        return 2 * (2 * self.channels + 1) * 4


@dataclass(frozen=True)
class CacheStatistics:
    """What a cache holds; reading it waits for the device.

    Attributes:
        tokens: `[slots]` tokens of each sequence.
        entries: `[layers, slots, kv_heads]` entries of each head.
        pages: in the pool.
        pages_free: of them not taken.
        entry_bytes, page_bytes, fixed_bytes: of the entries, of the pages taken, and of block tables, lengths and open
            segments (the free list has 4 more for every page).
    """

    tokens: Tensor
    entries: Tensor
    pages: int
    pages_free: int
    entry_bytes: int
    page_bytes: int
    fixed_bytes: int

    @property
    def ratio(self) -> Tensor:
        """`[layers, kv_heads]` tokens per entry; NaN while there are none."""
        return self.tokens.sum() / self.entries.sum(1)

    @property
    def fragmentation(self) -> float:
        """Share of the taken pages' entries that is not used."""
        return 1 - self.entry_bytes / self.page_bytes if self.page_bytes else 0.0


@dataclass
class Step:
    """New tokens on their way into the cache: first those of decoding, sequence by sequence, then chunk by chunk.

    Attributes:
        slots: `[b]` int64, sequences that decode; -1 for places of a batch that hold no sequence.
        new_tokens: of each of them.
        chunk_slots: `[c]` int64, sequences that chunks belong to.
        chunk_lengths: tokens of each chunk.
        first_token: `[c + 1]` int32 on the device, where each chunk begins, behind the tokens of decoding.
        ok: `[]` bool on the device: whether there are pages for the step. Without them, layers must write nothing.
        lengths: `[layers, b + c, kv_heads]` int32: the layers write here how many entries there are after the step.

        With a window, what layers leave for the rings until the step is committed, each chunk's last tokens:

        last: `[layers, c, kv_heads, window - 1, 2, channels]`, unrotated keys and values.
        last_weights: `[layers, c, kv_heads, window - 1]` float32.

        How a layer's decoding is dealt out (`csrc/paged_attention.cu`):

        first_unit: `[layers, b * kv_heads + 1]` int32, units of work before each head.
        first_head: `[layers, workers]` int32, the head that each worker begins with.
        arrived: int32, how many thread blocks have finished a head that they share; 0 between layers.
    """

    slots: Tensor
    new_tokens: int
    chunk_slots: Tensor
    chunk_lengths: tuple[int, ...]
    first_token: Tensor
    ok: Tensor
    lengths: Tensor
    last: Tensor | None
    last_weights: Tensor | None
    first_unit: Tensor
    first_head: Tensor
    arrived: Tensor

    @property
    def decoding_tokens(self) -> int:
        return len(self.slots) * self.new_tokens

    @property
    def tokens(self) -> int:
        """All new tokens."""
        return self.decoding_tokens + sum(self.chunk_lengths)


class PagedCache:
    """Pages, block tables, lengths and the state of open segments.

    Args:
        shape: what the cache is for.
        pages: how many pages the pool has; `pages_in` says how many fit into memory.
        dtype: of the model's keys and values, and of entries unless those are stored in 8 bits.
        device: where all of it lives.

    Attributes:
        pages: `[pages, 2, page_entries, channels]`, rotated merged keys and merged values. Channels lie in the order in
            which kernels read them: pieces of 16 bytes change places (`_permuted` in `ops/paged.py`).
        scales: `[pages, 2, page_entries]` float32, what 8-bit entries are multiplied by, else `None`.
        table: `[layers, slots + 1, kv_heads, max_pages]` int32, pages in the order of their entries, -1 where there is
            none. The last slot is nobody's: what a batch's empty places write goes there.
        lengths: `[layers, slots + 1, kv_heads]` int32, entries in use, the open one included.
        tokens: `[slots + 1]` int64, tokens seen.
        dry: `[]` bool: whether a step has found too few pages since `clear_dry`.

        With a window, the last tokens as they came, token `t` at `t % recent_tokens`:

        recent: `[layers, slots + 1, kv_heads, recent_tokens, 2, channels]`, unrotated keys and values.
        recent_weights: `[layers, slots + 1, kv_heads, recent_tokens]` float32, their importance.

        Without one, the open segment so far, twice, after an even and an odd number of committed steps:

        mean: `[layers, 2, slots + 1, kv_heads, 2, channels]` float32, unrotated merged key and merged value.
        total: `[layers, 2, slots + 1, kv_heads]` float32, their weight.
        steps: `[slots + 1]` int64, committed steps.

    Raises:
        DMCError: for a pool that could not hold a single token in every head of one sequence.
    """

    def __init__(self, shape: CacheShape, pages: int, *, dtype: torch.dtype, device: torch.device | str) -> None:
        least = shape.layers * shape.kv_heads
        if pages < least:
            raise DMCError(
                f"{pages} pages are too few: one token of one sequence needs {least}, one for each of {shape.layers} "
                f"layers and {shape.kv_heads} KV heads; give the cache more memory"
            )
        self.shape, self.dtype = shape, dtype
        on_gpu = torch.device(device).type == "cuda"
        self._workers = self._count_workers() if on_gpu else 6
        layers, slots, heads, channels = shape.layers, shape.slots + 1, shape.kv_heads, shape.channels
        whole = dict(dtype=torch.int32, device=device)
        stored = torch.float8_e4m3fn if shape.fp8 else dtype
        self.pages = torch.empty(pages, 2, shape.page_entries, channels, dtype=stored, device=device)
        self.scales = None
        if shape.fp8:
            self.scales = torch.empty(pages, 2, shape.page_entries, dtype=torch.float32, device=device)
        self.table = torch.full((layers, slots, heads, shape.max_pages), -1, **whole)
        self.lengths = torch.zeros(layers, slots, heads, **whole)
        self.tokens = torch.zeros(slots, dtype=torch.int64, device=device)
        self.dry = torch.zeros((), dtype=torch.bool, device=device)
        self._free = torch.arange(pages + 1, **whole)  # a stack; what is not given back is written behind its end
        self._free_count = torch.full((), pages, dtype=torch.int64, device=device)
        if shape.window:
            recent = (layers, slots, heads, shape.recent_tokens)
            self.recent = torch.zeros(*recent, 2, channels, dtype=dtype, device=device)
            self.recent_weights = torch.zeros(recent, dtype=torch.float32, device=device)
        else:
            self.mean = torch.zeros(layers, 2, slots, heads, 2, channels, dtype=torch.float32, device=device)
            self.total = torch.zeros(layers, 2, slots, heads, dtype=torch.float32, device=device)
            self.steps = torch.zeros(slots, dtype=torch.int64, device=device)

    def _count_workers(self) -> int:
        """Warps that decode at once on the current device; where the kernels do not run, any number will do."""
        from megatron_dmc.ops.fused import _unsupported

        probe = torch.empty(0, self.shape.channels, dtype=self.dtype, device="cuda")
        if self.dtype == torch.float32 or _unsupported(probe) is not None:
            return 1
        workers = torch.ops.megatron_dmc.paged_workers(self.dtype, self.shape.channels, self.shape.fp8)
        if not workers:
            entries = "8 bits" if self.shape.fp8 else "16 bits"
            raise DMCError(
                f"the decoding kernel cannot be launched on {torch.cuda.get_device_name()} for heads of "
                f"{self.shape.channels} channels and entries of {entries}: it needs more shared memory than a block "
                "has there; set --dmc-kernel reference, or store entries in 16 bits"
            )
        return workers

    @staticmethod
    def pages_in(
        shape: CacheShape,
        dtype: torch.dtype,
        *,
        gib: float | None = None,
        memory_share: float | None = None,
        device: torch.device | str | None = None,
    ) -> int:
        """How many pages fit beside everything else of the cache.

        Args:
            gib: memory for the whole cache, in GiB; or
            memory_share: the same as a share of what is free on `device` now, above 0 and at most 1.

        Raises:
            DMCError: unless exactly one is given, and for memory that is not enough.
        """
        if (gib is None) == (memory_share is None):
            raise DMCError(f"give either gib or memory_share; got {gib} and {memory_share}")
        if memory_share is not None:
            if not 0 < memory_share <= 1:
                raise DMCError(f"memory_share must be above 0 and at most 1; got {memory_share}")
            total = int(torch.cuda.mem_get_info(device)[0] * memory_share)
        else:
            total = int(gib * 2**30)
        fixed, page = shape.fixed_bytes(dtype), shape.page_bytes(dtype) + FREE_LIST_BYTES
        pages = (total - fixed) // page
        if pages < shape.layers * shape.kv_heads:
            raise DMCError(
                f"{total / 2**30:.2f} GiB are too little: block tables and open segments of {shape.slots} slots of "
                f"{shape.max_tokens} tokens take {fixed / 2**30:.2f} GiB, and one sequence at least "
                f"{shape.layers * shape.kv_heads * page / 2**30:.2f} GiB; give more memory or fewer slots"
            )
        return pages

    @staticmethod
    def gib_of(shape: CacheShape, dtype: torch.dtype, pages: int) -> float:
        """GiB of a whole cache of so many pages: the least for which `pages_in` finds them."""
        return (shape.fixed_bytes(dtype) + pages * (shape.page_bytes(dtype) + FREE_LIST_BYTES) + 1) / 2**30

    @torch.no_grad()
    def begin(
        self,
        slots: Tensor | None = None,
        new_tokens: int = 1,
        *,
        chunk_slots: Tensor | None = None,
        chunk_lengths: Sequence[int] = (),
    ) -> Step:
        """Begin a step, and take the pages that its decoding may need, one at most for every head.

        Args:
            slots: `[b]` int64 on the cache's device, the sequences that decode; -1 for empty places.
            new_tokens: how many tokens each of them brings, at most `MAX_NEW_TOKENS`.
            chunk_slots: `[c]` int64 on the cache's device, sequences whose next tokens come as a chunk.
            chunk_lengths: how many tokens each chunk has.

        A slot twice, a chunk for no slot, or a sequence that becomes too long makes the whole step not `ok`; so does a
        slot that there is not on a GPU, whose numbers are not waited for.

        Raises:
            DMCError: for arguments that do not fit.
        """
        nobody = torch.zeros(0, dtype=torch.int64, device=self.lengths.device)
        slots, chunk_slots = (nobody if x is None else x for x in (slots, chunk_slots))
        every_slot = torch.cat([slots, chunk_slots])
        for x in (slots, chunk_slots, every_slot):
            self._check_slots(x, may_be_empty=x is not every_slot)
        if not 1 <= new_tokens <= MAX_NEW_TOKENS:
            raise DMCError(f"new_tokens must be 1 to {MAX_NEW_TOKENS}; got {new_tokens}")
        if len(chunk_lengths) != len(chunk_slots) or any(n < 1 for n in chunk_lengths):
            raise DMCError(f"chunk_lengths must be {len(chunk_slots)} lengths of 1 or more; got {list(chunk_lengths)}")
        lengths = self.lengths[:, self.rows_of(every_slot)]
        more = self.on_device([new_tokens] * len(slots) + list(chunk_lengths)) if chunk_lengths else new_tokens
        fits = (self.tokens[self.rows_of(every_slot)] + more <= self.shape.max_tokens) | (every_slot < 0)
        ok = (fits & (every_slot < self.shape.slots)).all() & (chunk_slots >= 0).all() & ~_repeated(every_slot).any()
        decoding = lengths[:, : len(slots)]
        if len(slots):
            ok = self._take(slots, decoding, new_tokens, ok)
        self.dry |= ~ok
        shape, c = self.shape, len(chunk_slots)
        last = last_weights = None
        if c and shape.window > 1:
            last = self.recent.new_zeros(shape.layers, c, shape.kv_heads, shape.window - 1, 2, shape.channels)
            last_weights = last.new_zeros(last.shape[:4], dtype=torch.float32)
        first_token = [sum(chunk_lengths[:i]) for i in range(c + 1)]
        first_token = self.on_device(first_token).int() if c else nobody.int()
        return Step(
            slots, new_tokens, chunk_slots, tuple(chunk_lengths), first_token, ok, lengths.clone(), last, last_weights,
            *self._plan(slots, decoding, new_tokens),
        )  # fmt: skip

    def _take(self, slots: Tensor, lengths: Tensor, new_tokens: int, ok: Tensor) -> Tensor:
        """A page for every head of `slots` whose next entries may need one; returns whether there were enough."""
        rows = self.rows_of(slots)
        last = (lengths.long() + new_tokens - 1).div(self.shape.page_entries, rounding_mode="floor")
        place = last.clamp(max=self.shape.max_pages - 1)[..., None]
        have = self.table[:, rows].gather(-1, place)[..., 0]
        needs = (have < 0) & (slots >= 0)[:, None]
        rank = needs.flatten().cumsum(0).view_as(needs)
        needed = rank[-1, -1, -1]
        ok = ok & (needed <= self._free_count)
        taken = self._free[(self._free_count - rank).clamp(min=0)]
        flat = torch.arange(self.shape.layers, device=slots.device)[:, None] * self.table.shape[1] + rows
        flat = (flat[..., None] * self.shape.kv_heads + torch.arange(self.shape.kv_heads, device=slots.device))[
            ..., None
        ] * self.shape.max_pages + place
        self.table.view(-1)[flat[..., 0]] = torch.where(needs & ok, taken, have)
        self._free_count -= torch.where(ok, needed, 0)
        return ok

    def _plan(self, slots: Tensor, lengths: Tensor, new_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Equal shares of each layer's entries for every worker, from lengths `[layers, b, kv_heads]`."""
        units = (lengths + UNIT_ENTRIES - 1).div(UNIT_ENTRIES, rounding_mode="floor")
        units = torch.where((slots >= 0)[:, None], units + NEW_UNITS, 1).flatten(1)
        first_unit = torch.nn.functional.pad(units.cumsum(1), (1, 0))
        share = (first_unit[:, -1:] + self._workers - 1).div(self._workers, rounding_mode="floor")
        begins = share * torch.arange(self._workers, device=slots.device)
        first_head = torch.searchsorted(first_unit, begins, right=True) - 1
        tiles = -(-new_tokens * self.shape.heads // self.shape.kv_heads // 16)
        arrived = torch.zeros(units.shape[1] * tiles, dtype=torch.int32, device=slots.device)
        return first_unit.int(), first_head.int(), arrived

    @torch.no_grad()
    def commit(self, step: Step) -> None:
        """Make a step's entries valid; without effect if there were no pages for it."""
        slots = torch.cat([step.slots, step.chunk_slots])
        rows, active = self.rows_of(slots), (slots >= 0) & step.ok
        self.lengths[:, rows] = torch.where(active[:, None], step.lengths, self.lengths[:, rows])
        if step.chunk_lengths:
            self._keep_last_tokens(step)
            more = self.on_device([step.new_tokens] * len(step.slots) + list(step.chunk_lengths))
        else:
            more = step.new_tokens
        self.tokens[rows] += torch.where(active, more, 0)
        if not self.shape.window:
            self.steps[rows] += active.long()
        if step.chunk_lengths:
            self.dry |= ~step.ok
            rows = self.rows_of(step.chunk_slots)
            needed = (self.lengths[:, rows] + self.shape.page_entries - 1).div(
                self.shape.page_entries, rounding_mode="floor"
            )
            beyond = torch.arange(self.shape.max_pages, device=rows.device) >= needed[..., None]
            self._give_back(rows, beyond & (step.chunk_slots >= 0)[:, None, None])

    def _keep_last_tokens(self, step: Step) -> None:
        """Chunks' last tokens go into the rings."""
        if step.last is None:
            return
        lengths, n = self.on_device(step.chunk_lengths)[:, None], self.shape.window - 1
        place = lengths - n + torch.arange(n, device=lengths.device)  # in the chunk
        ring = (self.tokens[self.rows_of(step.chunk_slots)][:, None] + place) % self.shape.recent_tokens
        rows = self.rows_of(step.chunk_slots[:, None].where((place >= 0) & step.ok, -1))
        self.recent[:, rows, :, ring] = step.last.permute(1, 3, 0, 2, 4, 5)
        self.recent_weights[:, rows, :, ring] = step.last_weights.permute(1, 3, 0, 2)

    @torch.no_grad()
    def release(self, slots: Tensor) -> None:
        """Give back all that the sequences in `slots` `[b]` hold; -1, repetitions and empty slots are passed over."""
        self._check_slots(slots)
        slots = slots.masked_fill(_repeated(slots), -1)
        rows = self.rows_of(slots)
        self._give_back(rows, (slots >= 0)[:, None, None])
        self.lengths[:, rows] = 0
        self.tokens[rows] = 0

    def _give_back(self, rows: Tensor, which: Tensor) -> None:
        """Pages of the slots `rows` `[b]`, those that `which` `[layers, b, kv_heads, max_pages]` (or less) names."""
        table = self.table[:, rows]
        gives = (table >= 0) & which
        rank = gives.flatten().cumsum(0).view_as(gives)
        self._free[torch.where(gives, self._free_count + rank - 1, len(self.pages))] = table
        self._free_count += rank[-1, -1, -1, -1]
        self.table[:, rows] = table.masked_fill(gives, -1)

    def _take_for_chunk(self, layer: int, slot: int, lengths: Sequence[int]) -> bool:
        """Pages for the heads of a slot to become `lengths` long, if there are enough; the kernels do it themselves."""
        table = self.table[layer, slot]
        held = (table >= 0).sum(-1).tolist()
        needs = [max(0, -(-n // self.shape.page_entries) - have) for n, have in zip(lengths, held, strict=True)]
        if sum(needs) > self._free_count:
            return False
        for row, have, n in zip(table, held, needs, strict=True):
            self._free_count -= n
            row[have : have + n] = self._free[self._free_count : self._free_count + n]
        return True

    def positions(self, step: Step) -> Tensor:
        """`[tokens]` int64: where in its sequence each of a step's tokens stands, before the step is committed."""
        decoding = self.tokens[self.rows_of(step.slots)][:, None] + torch.arange(step.new_tokens, device=step.ok.device)
        if not step.chunk_lengths:
            return decoding.flatten()
        begins = self.tokens[self.rows_of(step.chunk_slots)] - step.first_token[:-1]
        lengths = self.on_device(step.chunk_lengths)
        total = sum(step.chunk_lengths)
        chunks = begins.repeat_interleave(lengths, output_size=total) + torch.arange(total, device=step.ok.device)
        return torch.cat([decoding.flatten(), chunks])

    @torch.no_grad()
    def move(self, source: Tensor, target: Tensor) -> None:
        """Move sequences from the slots `source` `[b]` to the empty slots `target` `[b]`; -1 in both is passed over.

        A slot may be source and target at once, so that sequences can change places. If a target holds a
        sequence that does not move itself, or a slot is named twice or does not exist, nothing moves.
        """
        self._check_slots(source)
        self._check_slots(target)
        if source.shape != target.shape:
            raise DMCError(f"source and target must be equally many; got {tuple(source.shape)}, {tuple(target.shape)}")
        leaves = (target[:, None] == source).any(1)
        # By pages, not by tokens: a step that was begun and not committed leaves pages, too.
        taken = (self.table[:, self.rows_of(target), :, 0] >= 0).any(0).any(-1) & ~leaves
        moves = (source >= 0) & (target >= 0)
        exist = (source < self.shape.slots) & (target < self.shape.slots)
        # All or nothing: a move that is left out would leave another without its place.
        moves &= ~(moves & (taken | ~exist | _repeated(source) | _repeated(target))).any()
        here, there = (self.rows_of(x.masked_fill(~moves, -1)) for x in (source, target))
        empty = dict(table=-1, lengths=0, tokens=0)
        for name in ("table", "lengths", "tokens", "recent", "recent_weights", "mean", "total", "steps"):
            x = getattr(self, name, None)
            if x is None:
                continue
            dim = {"tokens": 0, "steps": 0, "mean": 2, "total": 2}.get(name, 1)
            moved = x.index_select(dim, here)
            if name in empty:
                x.index_fill_(dim, here, empty[name])
            x.index_copy_(dim, there, moved)

    def clear_dry(self) -> None:
        self.dry.zero_()

    @property
    def free_pages(self) -> Tensor:
        """`[]` int64 on the device: pages that nobody holds."""
        return self._free_count

    @torch.no_grad()
    def usage(self) -> tuple[Tensor, Tensor]:
        """Pages that each slot holds, and those that one more token would take, both `[slots]` int64 on the device."""
        slots = self.shape.slots
        place = self.lengths[:, :slots].long().div(self.shape.page_entries, rounding_mode="floor")
        last = place.clamp(max=self.shape.max_pages - 1)[..., None]
        ready = (self.table[:, :slots].gather(-1, last)[..., 0] >= 0) & (place < self.shape.max_pages)
        needs = ~ready & (self.tokens[:slots] > 0)[:, None]
        return (place + ready).sum((0, 2)), needs.sum((0, 2))

    def statistics(self) -> CacheStatistics:
        """What the cache holds now. Waits for the device."""
        slots = self.shape.slots
        entries, tokens = self.lengths[:, :slots].cpu(), self.tokens[:slots].cpu()
        free = int(self._free_count)
        page = self.shape.page_bytes(self.dtype)
        return CacheStatistics(
            tokens=tokens,
            entries=entries,
            pages=len(self.pages),
            pages_free=free,
            entry_bytes=int(entries.sum()) * page // self.shape.page_entries,
            page_bytes=(len(self.pages) - free) * page,
            fixed_bytes=self.shape.fixed_bytes(self.dtype),
        )

    def on_device(self, numbers: Sequence[int]) -> Tensor:
        """int64, without waiting for what the device has been given to do."""
        x = torch.tensor(numbers, dtype=torch.int64)
        return x.pin_memory().to(self.lengths.device, non_blocking=True) if self.lengths.is_cuda else x

    def rows_of(self, slots: Tensor) -> Tensor:
        """Where slots lie in the tensors here: nobody's place for what is no slot."""
        return torch.where((slots >= 0) & (slots < self.shape.slots), slots, self.shape.slots)

    def _check_slots(self, slots: Tensor, may_be_empty: bool = False) -> None:
        if may_be_empty and not slots.numel():
            return
        if slots.dim() != 1 or not len(slots) or slots.dtype != torch.int64 or slots.device != self.lengths.device:
            raise DMCError(
                f"slots must be [b] int64 on {self.lengths.device}; got {tuple(slots.shape)} {slots.dtype} on "
                f"{slots.device}"
            )
        if not slots.is_cuda and not (slots.min() >= -1 and slots.max() < self.shape.slots):  # a GPU we do not wait for
            raise DMCError(f"slots must be -1 to {self.shape.slots - 1}; got {slots.tolist()}")


def _repeated(slots: Tensor) -> Tensor:
    """`[b]` bool: which slots occurred before in the list."""
    return ((slots[:, None] == slots) & (slots >= 0)).tril(-1).any(1)
