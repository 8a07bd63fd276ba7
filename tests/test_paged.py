"""Paged attention against the contiguous reference: sequences that come, grow at their own pace, move and go."""

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
def kernels(tmp_path_factory):
    """The compiled kernels on a GPU, else the emulated ones."""
    if GPU:
        from megatron_dmc.ops.fused import load_extension

        assert load_extension() is None
        yield
        return
    build(tmp_path_factory.mktemp("emulation"))
    real, paged._kernels = paged._kernels, torch.ops.megatron_dmc_emulated
    yield
    paged._kernels = real


def compare(kernel, shape, dtype, plan, *, pairs, interleaved, merging, seed, pages=None):
    """Run `plan`, a list of `(slots, new tokens)`, and check every output and, at the end, every entry.

    The contiguous caches see float64 copies of the same inputs.
    """
    torch.manual_seed(seed)
    cache = PagedCache(shape, pages or 64 * shape.slots, dtype=dtype, device=DEVICE)
    cache.pages.fill_(float("nan"))  # whoever looks at an entry that nobody wrote, sees it
    for name in ("recent", "recent_weights", "mean", "total"):
        if hasattr(cache, name):
            getattr(cache, name).fill_(float("nan"))
    angles = torch.rand(shape.max_tokens, pairs, device=DEVICE) * 6
    rotary = (angles.cos(), angles.sin()) if pairs else None
    exact = {}
    rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    d, g, layer = shape.channels, shape.kv_heads, shape.layers - 1
    for slots, n in plan:
        b = len(slots)
        query = torch.randn(n, b, shape.heads, d, device=DEVICE).to(dtype)
        key, value = (torch.randn(n, b, g, d, device=DEVICE).to(dtype) for _ in range(2))
        key[..., -1] += 5 + 3 * (merging - 0.5)
        query[..., -1] -= 5
        step = cache.begin(torch.tensor(slots, device=DEVICE), n)
        assert step.ok
        for other in range(shape.layers):
            if other != layer:
                step.lengths[other] = cache.lengths[other][step.slots.clamp(min=0)] + n
        output, alpha = paged.paged_attention(
            query, key, value, rotary, cache, layer, step, interleaved=interleaved, kernel=kernel
        )
        assert not step.arrived.any()
        cache.commit(step)
        for i, slot in enumerate(slots):
            if slot < 0:
                assert not output[:, i].any() and not alpha[:, i].any()
                continue
            own = exact.setdefault(slot, DMCCache.empty(1, g, d, dtype=torch.float64, device=DEVICE))
            positions = slice(own.tokens, own.tokens + n)
            want, decisions = dmc_attention_cached(
                *(x[:, i : i + 1].double() for x in (query, key, value)),
                None if rotary is None else tuple(t[positions] for t in rotary),
                own, window=shape.window, interleaved=interleaved,
            )  # fmt: skip
            assert (alpha[:, i] == decisions[:, 0]).all()
            assert (cache.lengths[layer, slot] == own.lengths[0]).all()
            error = (output[:, i].double() - want[:, 0]).norm() / want.norm()
            assert error < 3 * rounding, f"output is off by {error:.1e}"
    for slot, own in exact.items():
        entries = paged._gathered(cache, layer, slot, own.tokens, 5.0).entries
        n = int(own.lengths.max())
        used = torch.arange(n, device=DEVICE) < own.lengths[0][:, None]
        difference = (entries[:, :, :, :n].double() - own.entries[:, :, :, :n])[:, 0][:, used]
        assert difference.norm() <= 2 * rounding * own.entries.norm()


KERNELS = [
    "reference",
    pytest.param("fused", marks=pytest.mark.skipif(not (GPU or can_emulate), reason="needs a GPU, or g++ and CUDA")),
]


@pytest.mark.parametrize("kernel", KERNELS)
@settings(
    max_examples=40 if GPU else 12,
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
    steps=st.lists(
        st.tuples(st.lists(st.sampled_from([0, 1, 2, -1]), min_size=1, max_size=3), st.integers(1, 8)),
        min_size=1, max_size=9,
    ),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_paged_equals_contiguous(
    kernels, kernel, heads, channels, dtype, window, turning, interleaved, merging, steps, seed
):
    shape = CacheShape(2, 3, *heads, channels, 120, window)
    pairs = {"all": channels // 2, "half": channels // 4, "odd": 5, "none": 0}[turning]
    plan = [(list(dict.fromkeys(s for s in slots if s >= 0)) + [s for s in slots if s < 0], n) for slots, n in steps]
    compare(kernel, shape, dtype, plan, pairs=pairs, interleaved=interleaved, merging=merging, seed=seed)


@pytest.mark.parametrize("kernel", KERNELS)
def test_many_pages(kernels, kernel, fresh_seed):
    """Heads of several pages, dealt out to several workers each."""
    shape = CacheShape(1, 2, 4, 2, 64, 200, 12)
    plan = [([0], 8)] * 12 + [([0, 1], 5)] * 3 + [([1, -1, 0], 1)] * 4
    compare(kernel, shape, torch.bfloat16, plan, pairs=32, interleaved=False, merging=0.3, seed=fresh_seed)


def test_mistakes_name_the_argument(kernels):
    shape = CacheShape(1, 2, 4, 2, 64, 50, 12)
    cache = PagedCache(shape, 20, dtype=torch.bfloat16, device=DEVICE)
    step = cache.begin(torch.tensor([0], device=DEVICE), 1)
    q, k = (torch.zeros(1, 1, n, 64, dtype=torch.bfloat16, device=DEVICE) for n in (4, 2))
    angles = torch.zeros(50, 32, device=DEVICE)

    def run(query=q, key=k, value=k, rotary=(angles, angles), step=step, **options):
        paged.paged_attention(query, key, value, rotary, cache, 0, step, **options)

    def larger(*times):
        return {name: x.repeat(times) for name, x in {"query": q, "key": k, "value": k}.items()}

    cases = {
        "query must hold the step's 1 tokens of 1 sequences": larger(2, 1, 1, 1),
        "rotary cos must hold all 50 positions": dict(rotary=(angles[:9], angles[:9])),
        "kernel must be fused or reference": dict(kernel="fastest"),
    }  # fmt: skip
    if GPU or can_emulate:
        cases |= {
            "key must be bfloat16; got float16": dict(key=k.half()),
            "pages must be .20, 2, 16, 128.; got": larger(1, 1, 1, 2),
            "sin must be .50, 32.": dict(rotary=(angles, angles[:, :4])),
        }  # fmt: skip
    for message, arguments in cases.items():
        with pytest.raises(ValueError, match=message):
            run(**arguments)
    run()
