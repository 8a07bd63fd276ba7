"""Paged attention against the contiguous reference: sequences that come, grow at their own pace, move and go."""

import os
import shutil

import pytest
import torch
from emulation import build, cuda_headers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_dmc.cache import CacheShape, PagedCache
from megatron_dmc.ops import paged
from megatron_dmc.ops.reference import DMCCache, dmc_attention_cached

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
can_emulate = cuda_headers() is not None and shutil.which("g++") is not None


@pytest.fixture(scope="module")
def kernels(request):
    """The compiled kernels on a GPU, else the emulated ones."""
    if GPU:
        from megatron_dmc.ops.fused import load_extension

        assert load_extension() is None
        yield
        return
    emulated = request.getfixturevalue("emulated_kernels") if can_emulate else None
    real, paged._kernels = paged._kernels, emulated
    yield
    paged._kernels = real


def begin(cache, slots, new_tokens, chunks):
    slots, chunk_slots = (torch.tensor(list(x), dtype=torch.int64, device=DEVICE) for x in (slots, chunks))
    return cache.begin(slots, new_tokens, chunk_slots=chunk_slots, chunk_lengths=list(chunks.values()))


def compare(
    kernel, shape, dtype, plan, *, pairs, interleaved, merging, seed, pages=None, capability="9.0", workers=None
):
    """Run `plan`, a list of `(slots, new tokens, {slot: length of its chunk})`, and check every output and every entry.

    The contiguous caches see float64 copies of the same inputs. `capability` is what the emulated GPU says of itself,
    `workers` how many its decoding has.
    """
    os.environ["DMC_EMULATED_CAPABILITY"] = capability
    torch.manual_seed(seed)
    cache = PagedCache(shape, pages or 64 * shape.slots, dtype=dtype, device=DEVICE)
    cache._workers = workers or cache._workers
    cache.pages.fill_(float("nan"))  # whoever looks at an entry that nobody wrote, sees it
    for name in ("scales", "recent", "recent_weights", "mean", "total"):
        if getattr(cache, name, None) is not None:
            getattr(cache, name).fill_(float("nan"))
    angles = torch.rand(shape.max_tokens, pairs, device=DEVICE) * 6
    rotary = (angles.cos(), angles.sin()) if pairs else None
    exact = {}
    # 8-bit entries: relative errors of up to 2^-4, on average 2^-5.3, of which softmax and its sums leave this much.
    rounding = 2.0**-6 if shape.fp8 else {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    d, g, layer = shape.channels, shape.kv_heads, shape.layers - 1
    for slots, n, chunks in plan:
        total = len(slots) * n + sum(chunks.values())
        query = torch.randn(total, shape.heads, d, device=DEVICE).to(dtype)
        key, value = (torch.randn(total, g, d, device=DEVICE).to(dtype) for _ in range(2))
        key[..., -1] += 5 + 3 * (merging - 0.5)
        query[..., -1] -= 5
        step = begin(cache, slots, n, chunks)
        assert step.ok and step.tokens == total
        for other in range(shape.layers):
            if other != layer:
                step.lengths[other] = cache.lengths[other][torch.cat([step.slots, step.chunk_slots]).clamp(min=0)]
        positions = cache.positions(step)
        output, alpha = paged.paged_attention(
            query, key, value, rotary, cache, layer, step, interleaved=interleaved, kernel=kernel
        )
        assert step.ok and not step.arrived.any()
        cache.commit(step)
        first = 0
        for slot, n_own in [*((slot, n) for slot in slots), *chunks.items()]:
            new = slice(first, first + n_own)
            first += n_own
            if slot < 0:
                assert not output[new].any() and not alpha[new].any()
                continue
            own = exact.setdefault(slot, DMCCache.empty(1, g, d, dtype=torch.float64, device=DEVICE))
            span = slice(own.tokens, own.tokens + n_own)
            assert positions[new].tolist() == list(range(span.start, span.stop))
            want, decisions = dmc_attention_cached(
                *(x[new, None].double() for x in (query, key, value)),
                None if rotary is None else tuple(t[span] for t in rotary),
                own, window=shape.window, interleaved=interleaved,
            )  # fmt: skip
            assert (alpha[new] == decisions[:, 0]).all()
            assert (cache.lengths[layer, slot] == own.lengths[0]).all()
            error = (output[new].double() - want[:, 0]).norm() / want.norm()
            # One token or two may attend to few entries of 8 bits: what the largest of their errors leaves.
            limit = 2.0**-4 if shape.fp8 and n_own <= 2 else 3 * rounding
            assert error < limit, f"output is off by {error:.1e}"
    for slot, own in exact.items():
        entries = paged._gathered(cache, layer, slot, own.tokens, 5.0).entries
        n = int(own.lengths.max())
        used = torch.arange(n, device=DEVICE) < own.lengths[0][:, None]
        difference = (entries[:, :, :, :n].double() - own.entries[:, :, :, :n])[:, 0][:, used]
        assert difference.norm() <= 2 * rounding * own.entries.norm()
    held = (cache.table >= 0).sum()
    assert held + cache._free_count == len(cache.pages)


KERNELS = [
    "reference",
    pytest.param("fused", marks=pytest.mark.skipif(not (GPU or can_emulate), reason="needs a GPU, or g++ and CUDA")),
]


@st.composite
def plans(draw):
    """Steps: sequences that decode, empty places among them, and chunks of others."""
    steps = []
    for _ in range(draw(st.integers(1, 8))):
        slots = draw(st.permutations([0, 1, 2]))
        decoding, chunks = draw(st.integers(0, 3)), draw(st.integers(0, 3))
        batch = [*slots[:decoding], *[-1] * draw(st.integers(0, 1))]
        lengths = {slot: draw(st.sampled_from([1, 2, 7, 16, 21, 40])) for slot in slots[decoding : decoding + chunks]}
        if batch or lengths:
            steps.append((draw(st.permutations(batch)), draw(st.integers(1, 8)), lengths))
    return steps


@pytest.mark.parametrize("kernel", KERNELS)
@settings(
    max_examples=60 if GPU else 15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    heads=st.sampled_from([(4, 2), (3, 3), (4, 1), (20, 1)]),
    channels=st.sampled_from([64, 128, 96, 256]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    window=st.sampled_from([12, 0, 1, 2, 40]),
    turning=st.sampled_from(["all", "half", "odd", "none"]),
    interleaved=st.booleans(),
    merging=st.sampled_from([0.0, 0.5, 0.8, 1.0]),
    fp8=st.booleans(),
    capability=st.sampled_from(["9.0", "8.0"]),
    plan=plans(),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_paged_equals_contiguous(
    kernels, kernel, heads, channels, dtype, window, turning, interleaved, merging, fp8, capability, plan, seed
):
    shape = CacheShape(2, 3, *heads, channels, 330, window, fp8)
    options = dict(
        pairs={"all": channels // 2, "half": channels // 4, "odd": 5, "none": 0}[turning], interleaved=interleaved
    )
    compare(kernel, shape, dtype, plan, merging=merging, seed=seed, capability=capability, **options)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("capability", ["9.0", "8.0"])
@pytest.mark.parametrize("channels", [64, 128, 256])
def test_many_pages(kernels, kernel, channels, capability, fresh_seed):
    """Heads of several pages, dealt out to several workers each; chunks of several tiles of queries and of entries."""
    shape = CacheShape(1, 2, 4, 2, channels, 800, 12)
    plan = [([0], 8, {})] * 12 + [([0, 1], 5, {})] * 3 + [([], 1, {0: 90, 1: 470})] + [([1, -1, 0], 1, {})] * 4
    for merging in (0.3, 0.9):
        options = dict(pairs=channels // 2, interleaved=False, seed=fresh_seed, capability=capability)
        compare(kernel, shape, torch.bfloat16, plan, merging=merging, **options)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("channels", [64, 96, 128, 256])
def test_many_workers(kernels, kernel, channels, fresh_seed):
    """Heads that the workers of several thread blocks share; workers that only get new tokens' units."""
    shape = CacheShape(1, 2, 6, 1, channels, 800, 12)
    plan = [([], 1, {0: 330, 1: 70})] + [([1, 0], 1, {})] * 2 + [([0, -1, 1], 4, {})] * 2
    for workers in (19, 100):
        options = dict(pairs=channels // 2, interleaved=False, seed=fresh_seed, workers=workers)
        compare(kernel, shape, torch.bfloat16, plan, merging=0.2, **options)


@pytest.mark.parametrize("kernel", KERNELS)
def test_long_chunk(kernels, kernel, fresh_seed):
    """More tokens than a block decides on at once, beside a short chunk."""
    shape = CacheShape(1, 2, 1, 1, 64, 2200, 12)
    plan = [([], 1, {0: 30, 1: 2100}), ([1], 3, {0: 9})]
    options = dict(pairs=32, interleaved=False, merging=0.6, seed=fresh_seed, pages=150)
    compare(kernel, shape, torch.bfloat16, plan, **options)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("window", [12, 0, 1, 50])
@pytest.mark.parametrize("channels", [64, 256])
def test_chunks_continue_open_segments(kernels, kernel, window, channels, fresh_seed):
    shape = CacheShape(1, 2, 4, 2, channels, 200, window)
    plan = [([], 1, {0: 21}), ([], 1, {0: 53, 1: 3}), ([0], 3, {1: 18}), ([], 1, {0: 9, 1: 40}), ([1, 0], 2, {})]
    for merging, capability in ((0.9, "9.0"), (3.0, "9.0"), (0.9, "8.0"), (3.0, "8.0")):
        options = dict(pairs=32, interleaved=False, seed=fresh_seed, capability=capability)
        compare(kernel, shape, torch.bfloat16, plan, merging=merging, **options)


@pytest.mark.skipif(GPU or not can_emulate, reason="the extension has one page size")
@pytest.mark.parametrize(
    ("page_entries", "generation"), [(8, "hopper"), (16, "ampere"), (32, "ampere"), (64, "hopper")]
)
def test_page_sizes(page_entries, generation, tmp_path, monkeypatch, fresh_seed):
    flags = [
        "-O0",
        *(["-DMEGATRON_DMC_EMULATES_AMPERE"] if generation == "ampere" else []),
    ]  # compiling is what takes time
    monkeypatch.setattr(paged, "_kernels", build(tmp_path, page_entries, *flags))
    for fp8, d in ((False, 64), (True, 128), (False, 96), (True, 96), (False, 256)):
        shape = CacheShape(1, 2, 4, 2, d, 400, 12, fp8, page_entries)
        plan = [([], 1, {0: 90, 1: 15}), ([1, -1, 0], 7, {}), ([1], 1, {0: 50}), ([0, 1], 4, {})]
        options = dict(pairs=d // 2, interleaved=False, merging=0.3, seed=fresh_seed)
        compare("fused", shape, torch.bfloat16, plan, capability="9.0" if generation == "hopper" else "8.0", **options)


@pytest.mark.skipif(not (GPU or can_emulate), reason="needs a GPU, or g++ and CUDA")
def test_8_bit_entries_are_what_the_reference_stores(kernels, fresh_seed):
    """Closer to each other than 8 bits are to what they stand for.

    But for the outputs of a chunk: the kernel reads entries that the chunk itself completed from their pages.
    """
    shape = CacheShape(1, 1, 4, 2, 64, 200, 12, True)
    tokens = torch.randn(3, 100, 4, 64, device=DEVICE).bfloat16()
    outputs, caches = [], []
    for kernel in ("fused", "reference"):
        cache = PagedCache(shape, 20, dtype=torch.bfloat16, device=DEVICE)
        found = []
        for slots, n, chunks in [([], 1, {0: 60}), ([0], 8, {}), ([0], 1, {})]:
            step = begin(cache, slots, n, chunks)
            query, key, value = tokens[:, : step.tokens].clone()
            key, value = key[:, :2] * 1, value[:, 2:] * 30
            key[..., -1] = 5 + tokens[0, : step.tokens, :2, 0].float().bfloat16()
            found.append(paged.paged_attention(query, key, value, None, cache, 0, step, kernel=kernel)[0])
            cache.commit(step)
        outputs.append(torch.cat(found[1:]).double())
        caches.append(paged._gathered(cache, 0, 0, 69, 5.0).entries.double())
    assert (outputs[0] - outputs[1]).norm() < 2.0**-7 * outputs[1].norm()
    assert (caches[0] - caches[1]).norm() < 2.0**-7 * caches[1].norm()


@pytest.mark.skipif(not (GPU or can_emulate), reason="needs a GPU, or g++ and CUDA")
@pytest.mark.parametrize("window", [12, 0])
def test_opcheck(kernels, window, monkeypatch):
    """Schemas say what the operators change, and tracing knows what they return."""
    from torch.library import opcheck

    operators, checked = paged._kernels, []

    class Checked:
        def __getattr__(self, name):
            def call(*arguments):
                checked.append(name)
                # It cannot compare numbers of 8 bits.
                options = dict(test_utils=("test_faketensor",)) if cache.shape.fp8 else {}
                opcheck(getattr(operators, name).default, arguments, **options)
                return getattr(operators, name)(*arguments)

            return call

    monkeypatch.setattr(paged, "_kernels", Checked())
    for fp8 in (False, True):
        cache = PagedCache(CacheShape(1, 2, 4, 2, 64, 100, window, fp8), 50, dtype=torch.bfloat16, device=DEVICE)
        cache.pages.view(torch.uint8).zero_()  # compared bit by bit, NaN would differ from itself
        for name in ("scales", "recent", "recent_weights", "mean", "total"):
            if getattr(cache, name, None) is not None:
                getattr(cache, name).zero_()
        for slots, n, chunks in (([], 1, {0: 20, 1: 3}), ([0, 1], 2, {})):
            step = begin(cache, slots, n, chunks)
            for x in (step.last, step.last_weights):
                if x is not None:
                    x.zero_()
            query, key, value = (torch.randn(step.tokens, h, 64, device=DEVICE).bfloat16() for h in (4, 2, 2))
            paged.paged_attention(query, key, value, None, cache, 0, step)
            cache.commit(step)
    assert set(checked) == {"paged_attention_", "paged_chunks_"}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("window", [12, 0])
def test_a_pool_that_runs_dry_in_a_chunk(kernels, kernel, window, fresh_seed):
    """The step is without effect, and can be repeated once there are pages."""
    shape = CacheShape(2, 3, 2, 2, 64, 200, window)
    cache = PagedCache(shape, 20, dtype=torch.bfloat16, device=DEVICE)
    tokens = torch.randn(3, 140, 2, 64, device=DEVICE).bfloat16()
    tokens[..., -1] = -9.0  # all append

    def go(decode, chunks):
        step = begin(cache, decode, 3, chunks)
        outputs = [
            paged.paged_attention(*tokens[:, : step.tokens], None, cache, layer, step, kernel=kernel)[0]
            for layer in range(2)
        ]
        cache.commit(step)
        return torch.stack(outputs), bool(step.ok)

    assert go([], {0: 40})[1]
    before = {name: getattr(cache, name).clone() for name in ("lengths", "tokens", "table", "_free_count")}
    output, ok = go([0], {1: 60})  # 3 pages a head are there: not even the first layer's 4 a head
    assert not ok and cache.dry
    for name, x in before.items():
        if name == "table":  # a page for the token that decodes may stay
            assert ((x == cache.table) | (x < 0)).all() and (cache.table[:, 1] == -1).all()
        elif name != "_free_count":
            assert x.equal(getattr(cache, name)), name
    assert cache._free_count + (cache.table >= 0).sum() == 20
    output, ok = go([0], {1: 17})
    assert ok
    cache.release(torch.tensor([1], device=DEVICE))
    cache.clear_dry()
    output, ok = go([], {1: 17})
    other = PagedCache(shape, 20, dtype=torch.bfloat16, device=DEVICE)
    cache, want = other, output
    assert go([], {1: 17})[0].equal(want)


def test_mistakes_name_the_argument(kernels):
    shape = CacheShape(1, 2, 4, 2, 64, 50, 12)
    cache = PagedCache(shape, 20, dtype=torch.bfloat16, device=DEVICE)
    step = cache.begin(torch.tensor([0], device=DEVICE), 1)
    q, k = (torch.zeros(1, n, 64, dtype=torch.bfloat16, device=DEVICE) for n in (4, 2))
    angles = torch.zeros(50, 32, device=DEVICE)

    def run(query=q, key=k, value=k, rotary=(angles, angles), step=step, **options):
        paged.paged_attention(query, key, value, rotary, cache, 0, step, **options)

    def larger(*times):
        return {name: x.repeat(times) for name, x in {"query": q, "key": k, "value": k}.items()}

    cases = {
        "query must be .tokens, heads, channels. of the step's 1 tokens": larger(2, 1, 1),
        "rotary cos must hold all 50 positions": dict(rotary=(angles[:9], angles[:9])),
        "kernel must be fused or reference": dict(kernel="fastest"),
    }  # fmt: skip
    if GPU or can_emulate:
        cases |= {
            "key must be bfloat16; got float16": dict(key=k.half()),
            "pages must be .20, 2, 16, 128.; got": larger(1, 1, 2),
            "sin must be .50, 32.": dict(rotary=(angles, angles[:, :4])),
        }  # fmt: skip
    for message, arguments in cases.items():
        with pytest.raises(ValueError, match=message):
            run(**arguments)
    run()
