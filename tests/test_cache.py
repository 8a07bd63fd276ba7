"""The paged cache's book-keeping: no page is lost, shared or freed twice, whatever happens in whatever order."""

import pytest
import torch

from megatron_dmc.cache import MAX_NEW_TOKENS, CacheShape, PagedCache
from megatron_dmc.config import DMCError

SHAPE = CacheShape(layers=2, slots=5, heads=4, kv_heads=2, channels=4, max_tokens=150, window=12)


def make(pages=60, shape=SHAPE):
    return PagedCache(shape, pages, dtype=torch.float32, device="cuda" if torch.cuda.is_available() else "cpu")


def slots_of(cache, *slots):
    return torch.tensor(slots, device=cache.lengths.device)


def advance(cache, step, generator):
    """What layers do in a step: every head keeps an entry for some of the new tokens, the first token's always."""
    first = step.lengths == 0
    kept = torch.randint(0, step.new_tokens + 1, step.lengths.shape, generator=generator).to(step.lengths.device)
    step.lengths += torch.where(first, kept.clamp(min=1), kept).int()


def check(cache):
    """Every page is in exactly one place, and heads have the pages that their entries need."""
    free = cache._free[: int(cache._free_count)].tolist()
    table = cache.table.cpu()
    taken = table[table >= 0].tolist()
    assert sorted(free + taken) == list(range(len(cache.pages)))
    held = (table >= 0).sum(-1)
    assert ((table >= 0) == (torch.arange(table.shape[-1]) < held[..., None])).all(), "a gap in a block table"
    needed = -(-cache.lengths.cpu() // SHAPE.page_entries)
    assert ((held >= needed) & (held <= needed + 1)).all()
    assert (held[:, cache.shape.slots] == 0).all(), "the slot that is nobody's has pages"


def test_ten_thousand_random_operations(fresh_seed):
    generator = torch.Generator().manual_seed(fresh_seed)
    draw = lambda n: int(torch.randint(0, n, (), generator=generator))  # noqa: E731
    cache = make()
    tokens, holds, dry_steps = [0] * SHAPE.slots, [False] * SHAPE.slots, 0
    for i in range(10_000):
        order = torch.randperm(SHAPE.slots, generator=generator)
        some = order[: 1 + draw(SHAPE.slots)]
        operation = draw(20)
        if operation < 17:
            batch = torch.where(torch.rand(len(some), generator=generator) < 0.2, -1, some)
            new = 1 + draw(MAX_NEW_TOKENS)
            before = cache.lengths.clone(), cache.tokens.clone(), cache.table.clone(), int(cache._free_count)
            step = cache.begin(batch.to(cache.lengths.device), new)
            if step.ok:
                advance(cache, step, generator)
                for slot in batch[batch >= 0].tolist():
                    holds[slot] = True
                if draw(10):  # the step is given up now and then
                    cache.commit(step)
                    for slot in batch.tolist():
                        if slot >= 0:
                            tokens[slot] += new
            else:
                dry_steps += 1
                step.lengths += 100  # whatever a layer may have written
                cache.commit(step)
                after = cache.lengths, cache.tokens, cache.table, int(cache._free_count)
                assert all((torch.as_tensor(a) == torch.as_tensor(b)).all() for a, b in zip(before, after, strict=True))
                cache.release(some[:2].to(cache.lengths.device))
                for slot in some[:2].tolist():
                    tokens[slot], holds[slot] = 0, False
        elif operation == 17:
            cache.release(torch.cat([some, some[:1]]).to(cache.lengths.device))  # one of them twice
            for slot in some.tolist():
                tokens[slot], holds[slot] = 0, False
        else:
            target = order.roll(1)[: len(some)]
            allowed = all(not holds[t] or t in some.tolist() for t in target.tolist())
            cache.move(some.to(cache.lengths.device), target.to(cache.lengths.device))
            if allowed:
                moved = {t: (tokens[s], holds[s]) for s, t in zip(some.tolist(), target.tolist(), strict=True)}
                for s in some.tolist():
                    tokens[s], holds[s] = 0, False
                for t, had in moved.items():
                    tokens[t], holds[t] = had
        assert cache.tokens[: SHAPE.slots].tolist() == tokens
        if i % 20 == 0:
            check(cache)
    check(cache)
    assert dry_steps > 100, "the pool never ran dry: nothing was tested"
    assert cache.dry
    cache.release(torch.arange(SHAPE.slots, device=cache.lengths.device))
    assert cache._free_count == len(cache.pages)


def test_moving_takes_everything_along(fresh_seed):
    generator = torch.Generator().manual_seed(fresh_seed)
    for window in (12, 0):
        cache = make(shape=CacheShape(2, 4, 2, 2, 4, 100, window))
        step = cache.begin(slots_of(cache, 0, 1), 8)
        advance(cache, step, generator)
        cache.commit(step)
        names = ("recent", "recent_weights") if window else ("mean", "total")
        for name in names:
            getattr(cache, name).normal_()
        dim = 1 if window else 2
        state = {name: getattr(cache, name).clone() for name in names}
        table, lengths = cache.table.clone(), cache.lengths.clone()
        cache.move(slots_of(cache, 0, 1, -1), slots_of(cache, 1, 3, -1))
        for source, target in ((0, 1), (1, 3)):
            for name in names:
                x = getattr(cache, name)
                assert x.select(dim, target).equal(state[name].select(dim, source)), name
            assert cache.table[:, target].equal(table[:, source])
            assert cache.lengths[:, target].equal(lengths[:, source])
        assert (cache.table[:, 0] == -1).all() and cache.tokens.tolist() == [0, 8, 0, 8, 0]
        check(cache)


def test_slots_that_do_not_exist_change_nothing(fresh_seed, monkeypatch):
    """Where nobody waits for the device to look at their numbers, as on a GPU."""
    monkeypatch.setattr(PagedCache, "_check_slots", lambda *_, **__: None)
    cache, generator = make(), torch.Generator().manual_seed(fresh_seed)
    step = cache.begin(slots_of(cache, 0, 1), 8)
    advance(cache, step, generator)
    cache.commit(step)
    names = ("table", "lengths", "tokens", "_free_count")
    before = {name: getattr(cache, name).clone() for name in names}
    beyond = slots_of(cache, 1, SHAPE.slots), slots_of(cache, SHAPE.slots + 1000, 0)
    for slots in beyond:
        for step in (
            cache.begin(slots, 3),
            cache.begin(chunk_slots=slots, chunk_lengths=[4, 2]),
            cache.begin(slots[:1], 1, chunk_slots=slots[1:], chunk_lengths=[4]),
        ):
            assert not step.ok and cache.positions(step).shape == (step.tokens,)
            cache.commit(step)
        cache.move(slots, slots_of(cache, 3, 4))
        cache.move(slots_of(cache, 0, 1), slots)
    cache.release(slots_of(cache, SHAPE.slots, SHAPE.slots + 1000))
    for name, x in before.items():
        assert x.equal(getattr(cache, name)), name
    check(cache)


def test_statistics():
    cache = make()
    step = cache.begin(slots_of(cache, 2, 0), 4)
    step.lengths[:] = torch.tensor([[1, 4], [2, 3]], device=cache.lengths.device)[:, None]
    cache.commit(step)
    stats = cache.statistics()
    assert stats.tokens.tolist() == [4, 0, 4, 0, 0]
    assert stats.ratio.tolist() == [[4.0, 1.0], [2.0, pytest.approx(8 / 6)]]
    assert stats.pages - stats.pages_free == 8
    assert stats.page_bytes == 8 * SHAPE.page_entries * 2 * 4 * 4 and stats.entry_bytes == 20 * 2 * 4 * 4
    assert stats.fragmentation == pytest.approx(1 - 20 / (8 * SHAPE.page_entries))
    tensors = [x for x in vars(cache).values() if isinstance(x, torch.Tensor)]
    tensors = [x for x in tensors if x is not cache.pages and x is not cache._free and x.dim() > 1]
    assert stats.fixed_bytes == sum(x.nbytes for x in tensors)


def test_sizes():
    shape = CacheShape(layers=2, slots=3, heads=2, kv_heads=2, channels=64, max_tokens=4096, window=12)
    pages = PagedCache.pages_in(shape, torch.bfloat16, gib=0.01)
    cache = PagedCache(shape, pages, dtype=torch.bfloat16, device="cpu")
    total = sum(x.nbytes for x in vars(cache).values() if isinstance(x, torch.Tensor))
    assert 0.995 * 0.01 * 2**30 < total <= 0.01 * 2**30 + 256
    with pytest.raises(DMCError, match="GiB are too little"):
        PagedCache.pages_in(shape, torch.bfloat16, gib=0.0001)
    with pytest.raises(DMCError, match="either gib or memory_share"):
        PagedCache.pages_in(shape, torch.bfloat16)
    with pytest.raises(DMCError, match="memory_share must be above 0"):
        PagedCache.pages_in(shape, torch.bfloat16, memory_share=1.5)


def test_mistakes_name_the_argument():
    cache = make()
    with pytest.raises(DMCError, match="3 pages are too few"):
        make(pages=3)
    with pytest.raises(DMCError, match="slots must be at least 1; got 0"):
        CacheShape(1, 0, 1, 1, 4, 10, 12)
    with pytest.raises(DMCError, match="window must be 0"):
        CacheShape(1, 1, 1, 1, 4, 10, -1)
    with pytest.raises(DMCError, match="new_tokens must be 1 to 8; got 9"):
        cache.begin(slots_of(cache, 0), 9)
    with pytest.raises(DMCError, match="int64"):
        cache.begin(slots_of(cache, 0).int(), 1)
    with pytest.raises(DMCError, match="equally many"):
        cache.move(slots_of(cache, 0), slots_of(cache, 1, 2))
    if not cache.lengths.is_cuda:
        with pytest.raises(DMCError, match=r"-1 to 4; got \[5\]"):
            cache.release(slots_of(cache, 5))
    assert not cache.begin(slots_of(cache, 1, 1), 1).ok
    cache.tokens[0] = SHAPE.max_tokens
    assert not cache.begin(slots_of(cache, 0), 1).ok
