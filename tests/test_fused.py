"""The fused training kernels against the reference in float64; and what they refuse.

Most of it needs a GPU. Tolerances: an operation on bfloat16 inputs may differ from float64 by a small multiple of what
the reference operations differ that run on the same inputs and round once, at the end.
"""

import math
import shutil
import warnings
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_dmc.ops import fused, reference
from megatron_dmc.ops.documents import Documents
from megatron_dmc.ops.noise import LogisticNoise, _philox

sdpa = F.scaled_dot_product_attention
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 1e-5}
NAMES = ("output", "alpha", "grad query", "grad key", "grad value")


def rotary_tables(tokens, width, sequences=None, device="cuda"):
    start = torch.randint(0, 1000, (1, sequences or 1))
    position = torch.arange(tokens)[:, None] + start
    angles = position[..., None] * 10000.0 ** (-torch.arange(0, width, 2) / width)
    angles = angles if sequences else angles[:, 0]
    return angles.cos().float().to(device), angles.sin().float().to(device)


def inputs(tokens, sequences, heads, kv_heads, channels, dtype, *, fused_view=False, merging=0.7, device="cuda"):
    """Queries, keys and values whose decisions merge with probability about `merging`."""
    group = heads // kv_heads
    qkv = torch.randn(tokens, sequences, kv_heads, group + 2, channels, device=device)
    qkv[..., group, -1] = 5 + 0.3 * (torch.randn_like(qkv[..., 0, 0]) + 3 * (merging - 0.5))
    qkv[..., :group, -1] -= 5  # importance across the whole range of the sigmoid
    qkv = qkv.to(dtype)
    q, k, v = qkv[..., :group, :].flatten(2, 3), qkv[..., group, :], qkv[..., group + 1, :]
    if not fused_view:
        return q.contiguous(), k.contiguous(), v.contiguous()
    return (qkv[..., 0, :] if group == 1 else q), k, v


def some_documents(tokens, sequences, device="cuda"):
    """Of each sequence others, documents of one token among them."""
    first = torch.rand(tokens, sequences) < torch.rand(sequences) ** 3
    first[0] = True
    return Documents.from_first(first.to(device))


def run(attention, qkv, rotary, grads, dtype=None, **options):
    """Output, decisions and gradients; `grads` are those of output and decisions."""
    qkv = [x.detach().to(dtype or x.dtype).requires_grad_() for x in qkv]
    if dtype is not None:
        rotary = rotary and tuple(t.to(dtype) for t in rotary)
    output, alpha = attention(*qkv, rotary, **options)
    targets = [(x, g) for x, g in zip((output, alpha), grads, strict=True) if x.requires_grad]
    gradients = torch.autograd.grad(
        [x for x, _ in targets], qkv, [g.to(x.dtype) for x, g in targets], allow_unused=True
    )
    return [output, alpha, *(torch.zeros_like(x) if g is None else g for x, g in zip(qkv, gradients, strict=True))]


def error(x, exact, floor=1e-30):
    """Relative to the exact result, or to `floor` where that vanishes."""
    return ((x.double() - exact).norm() / exact.norm().clamp(min=floor)).item()


def compare(qkv, rotary, kernel, *, noise=None, **options):
    """Fused, reference and float64 on the same inputs; asserts that the fused error is of the reference's size."""
    grads = torch.randn_like(qkv[0]), torch.randn(qkv[1].shape[:3], device="cuda") * 0.1
    sample = noise.sample(*qkv[1].shape[:3]) if isinstance(noise, LogisticNoise) else noise
    exact = run(reference.dmc_attention, qkv, rotary, grads, torch.float64, noise=sample, **options)
    ours = run(fused.dmc_attention, qkv, rotary, grads, kernel=kernel, noise=noise, **options)
    plain = run(reference.dmc_attention, qkv, rotary, grads, noise=sample, **options)
    compare_results(ours, plain, exact, grads, **options)


def compare_results(ours, plain, exact, grads, temperature=None, **_):
    """Assert that errors against `exact` are like those of `plain`, or of a few roundings."""
    rounding, report = ROUNDING[ours[0].dtype], {}
    # What gradients are about. A lone token has none, a few tokens that agree hardly any, and rounding remains.
    floor = (0.05 + 1 / len(grads[0])) * grads[0].norm().item()
    for name, x, y, z in zip(NAMES, ours, plain, exact, strict=True):
        assert x.isfinite().all(), f"{name} is not finite"
        assert x.dtype == y.dtype and x.shape == y.shape
        if name == "alpha":
            report[name] = error(x, z), error(y, z), 1e-5
            continue
        parts = {name: (slice(None), floor)}
        if name.startswith("grad"):  # the last channel carries other gradients than the rest
            last = floor * x.shape[-1] ** -0.5
            if name == "grad key":  # a decision's gradient is that of the scores over the temperature
                last /= temperature or 1
            parts = {name: (slice(-1), floor), name + ", last channel": (slice(-1, None), last)}
        for part, (channels, share) in parts.items():
            report[part] = *(error(t[..., channels], z[..., channels], share) for t in (x, y)), rounding
    bad = {
        name: f"{ours:.2e} (reference {plain:.2e})"
        for name, (ours, plain, rounding) in report.items()
        if not ours <= max(3 * plain, 5 * rounding)
    }
    assert not bad, f"{bad} of {report}"


def documents_one_by_one(
    query, key, value, borders, key_borders, longest, longest_key, dropout, causal, debug, *, scale=None
):
    """What `_flash_attention_forward` computes of documents, the output alone: their last query sees their last key."""
    assert causal and not dropout and borders.dtype == key_borders.dtype == torch.int32
    queries, keys = ([b - a for a, b in pairwise(x.tolist())] for x in (borders, key_borders))
    assert max(queries) == longest and max(keys) == longest_key
    outputs = []
    for q, k, v in zip(query.split(queries), key.split(keys), value.split(keys), strict=True):
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril(k.shape[1] - q.shape[1])
        outputs.append(sdpa(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True).transpose(0, 1))
    return torch.cat(outputs), None, None, None, None


def test_philox_gives_its_published_vectors():
    """Known answers of Philox4x32-10 from the authors' Random123 library."""

    def first(key, counter):
        counter = tuple(torch.tensor([c]) for c in counter)
        return _philox(torch.tensor([key]), counter).item()

    assert first(0, (0, 0, 0, 0)) == 0x6627E8D5
    ones = 0xFFFFFFFF
    assert first(-1, (ones, ones, ones, ones)) == 0x408F276D
    assert first(0x299F31D0A4093822, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)) == 0xD16CFE09


def test_noise_is_logistic_and_the_same_in_every_layout():
    whole = LogisticNoise.draw(torch.device("cpu"))
    sample = whole.sample(4000, 3, 8)
    part = LogisticNoise(whole.key, first_head=6).sample(4000, 3, 2)
    assert torch.equal(part, sample[:, :, 6:])
    assert torch.equal(LogisticNoise(whole.key, scale=0.25).sample(4000, 3, 8), 0.25 * sample)
    other = LogisticNoise(whole.key, stream=1).sample(4000, 3, 8)
    assert abs(torch.corrcoef(torch.stack([sample.flatten(), other.flatten()]))[0, 1]) < 0.02
    assert abs(sample.mean()) < 0.03 and abs(sample.var() - math.pi**2 / 3) < 0.08
    probability = torch.sigmoid(sample).flatten().sort().values  # uniform
    assert (probability - torch.linspace(0, 1, len(probability))).abs().max() < 0.01


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_the_reference_runs_where_there_is_no_gpu():
    q, k, v = (torch.randn(6, 1, 2, 64) for _ in range(3))
    noise = LogisticNoise.draw(q.device)
    ours = fused.dmc_attention(q, k, v, None, temperature=0.1, noise=noise)
    expected = reference.dmc_attention(q, k, v, None, temperature=0.1, noise=noise.sample(6, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    with pytest.raises(ValueError, match=r"kernel 'cudnn' cannot run: .*CUDA device.*use kernel='reference'"):
        fused.dmc_attention(q, k, v, None, kernel="cudnn")
    with pytest.raises(ValueError, match="kernel must be auto or one of"):
        fused.dmc_attention(q, k, v, None, kernel="triton")


def a_query(channels, dtype=torch.bfloat16):
    return SimpleNamespace(shape=(10, 2, 4, channels), is_cuda=True, dtype=dtype, device=torch.device("cuda", 0))


def test_documents_run_on_what_is_chosen(monkeypatch):
    for name in ("_unsupported", "_no_cudnn"):
        monkeypatch.setattr(fused, name, lambda _: None)
    query, documents = a_query(64), some_documents(10, 2, "cpu")
    assert fused.choose_kernel(query) == fused.choose_kernel(query, None, "cudnn") == "cudnn"
    for kernel, chosen in dict(auto="flash", cudnn="flash", flash="flash", dense="dense").items():
        assert fused.choose_kernel(query, documents, kernel) == chosen
    assert fused.choose_kernel(a_query(64, torch.float32), documents) == "reference"
    with pytest.raises(ValueError, match=r"kernel must be auto or one of cudnn, .*; got 'triton'"):
        fused.choose_kernel(query, documents, "triton")


@pytest.mark.parametrize(
    ("channels", "capability", "takes"),
    [(64, (8, 0), True), (256, (9, 0), True), (72, (10, 0), True), (100, (9, 0), False), (264, (9, 0), False),
     (64, (7, 5), False)],
)  # fmt: skip
def test_zero_out_runs_on_what_takes_it(monkeypatch, channels, capability, takes):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(reference, "zero_out_attention", lambda *_, **__: "reference")
    monkeypatch.setattr(reference, "_check", lambda *_: None)
    monkeypatch.setattr(reference, "fade_last_channel", lambda *_: torch.zeros(10, 2, 4, channels))
    monkeypatch.setattr(fused, "attend", lambda kernel, query, *_: (query, kernel))
    rows, documents = [a_query(channels)] * 2 + [torch.zeros(10, 2, 4, channels)], some_documents(10, 2, "cpu")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = fused.zero_out_attention(*rows, None, last_channel=0.5, documents=documents)
    assert isinstance(found, torch.Tensor) == takes and (takes or found == "reference")
    assert len(caught) == (not takes)
    if not takes:
        assert f"there are {channels}, on {capability[0]}.{capability[1]}" in str(caught[0].message)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc when the package is installed")
def test_the_extension_is_built_where_nvcc_is():
    """It loads without a GPU, and its operators can be traced."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    assert fused.load_extension() is None
    with FakeTensorMode():
        query = torch.empty(10, 2, 4, 64, device="cuda", dtype=torch.bfloat16)
        key, scalars = query[:, :, :2], torch.empty(10, 2, 2, device="cuda")
        scores = torch.empty(2, 4, 10, device="cuda")
        settings = (12, 5.0, 0.1, False, 0.125)
        results = torch.ops.megatron_dmc.prepare(query, key, key, None, None, None, None, 0, 0, *settings, 8.0)
        for x, like in zip(results, (query, key, key, scores, scalars, scalars), strict=True):
            assert (x.shape, x.dtype, x.device) == (like.shape, like.dtype, like.device)
            assert x.is_contiguous()
        output, alpha, *_ = torch.ops.megatron_dmc.attention(
            query, key, key, None, None, None, None, 0, 0, 1.0, None, 0, *settings, "flash"
        )
        assert (output.shape, output.dtype, alpha.shape) == (query.shape, query.dtype, scalars.shape)


shapes = st.tuples(
    st.integers(1, 300), st.integers(1, 3), st.sampled_from([(1, 1), (2, 2), (4, 1), (6, 3), (8, 2)]),
    st.sampled_from(fused.HEAD_SIZES),
)  # fmt: skip


@gpu
@settings(max_examples=60, deadline=None, print_blob=True, suppress_health_check=list(HealthCheck))
@given(
    shape=shapes,
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    window=st.sampled_from([1, 2, 7, 12, 16, 17, 24, 33]),
    turning=st.sampled_from(["all", "half", "quarter", "odd", "none"]),
    interleaved=st.booleans(),
    by_sequence=st.booleans(),
    soft=st.sampled_from([0.1, 0.5, None]),
    noisy=st.sampled_from([None, "tensor", "key"]),
    merging=st.sampled_from([0.2, 0.7, 1.0]),
    fused_view=st.booleans(),
    scale=st.sampled_from([None, 0.2]),
    seed=st.integers(0, 2**31),
)
def test_fused_attention_equals_the_reference(
    shape, dtype, window, turning, interleaved, by_sequence, soft, noisy, merging, fused_view, scale, seed
):
    torch.manual_seed(seed)
    tokens, sequences, (heads, kv_heads), channels = shape
    qkv = inputs(tokens, sequences, heads, kv_heads, channels, dtype, fused_view=fused_view, merging=merging)
    width = {"all": channels, "half": channels // 2, "quarter": channels // 4, "odd": 10, "none": 0}[turning]
    rotary = rotary_tables(tokens, width, sequences if by_sequence else None) if width else None
    noise = None
    if soft is not None and noisy == "tensor":
        noise = torch.logit(torch.rand(tokens, sequences, kv_heads, device="cuda"), eps=1e-6)
    elif soft is not None and noisy == "key":
        noise = LogisticNoise.draw(torch.device("cuda"), stream=3, first_head=5, scale=0.3)
    kernel = "dense" if dtype == torch.float32 else "auto"
    compare(
        qkv, rotary, kernel, window=window, temperature=soft, noise=noise, interleaved=interleaved, scale=scale
    )  # fmt: skip


@gpu
@pytest.mark.parametrize("kernel", ["cudnn", "flash", "dense"])
@pytest.mark.parametrize("channels", fused.HEAD_SIZES)
def test_every_kernel(kernel, channels):
    if kernel == "cudnn" and channels > 128:
        pytest.skip("cuDNN attention takes at most 128 channels here")
    for heads, kv_heads in ((4, 4), (8, 2)):
        qkv = inputs(333, 2, heads, kv_heads, channels, torch.bfloat16)
        compare(qkv, rotary_tables(333, channels), kernel, temperature=0.3)


@gpu
@pytest.mark.parametrize("kernel", ["auto", "flash", "dense"])
@pytest.mark.parametrize("window", [0, 12, 24])
@pytest.mark.parametrize("channels", fused.HEAD_SIZES)
def test_documents(fresh_seed, kernel, window, channels):
    for sequences, temperature in ((1, None), (3, 0.3)):
        qkv = inputs(517, sequences, 8, 2, channels, torch.bfloat16)
        documents = some_documents(517, sequences)
        compare(
            qkv, rotary_tables(517, channels), kernel, window=window, temperature=temperature, documents=documents
        )  # fmt: skip
        want, got = (
            f(*qkv, rotary_tables(517, 0), last_channel=0.4, documents=documents)
            for f in (reference.zero_out_attention, fused.zero_out_attention)
        )
        assert error(got, want.double()) < 4 * ROUNDING[torch.bfloat16]


@gpu
@pytest.mark.parametrize("channels", [72, 100, 264])
def test_zero_out_of_other_heads(fresh_seed, channels):
    """The flash kernel takes the first of them."""
    rows, documents = inputs(333, 2, 4, 2, channels, torch.bfloat16), some_documents(333, 2)
    grad, results = torch.randn_like(rows[0]), []
    for attend, dtype in ((fused.zero_out_attention, torch.bfloat16), (reference.zero_out_attention, torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in rows]
        output = attend(*leaves, None, last_channel=0.4, documents=documents)
        results.append([output, *torch.autograd.grad(output, leaves, grad.to(dtype))])
    for got, want in zip(*results, strict=True):
        assert error(got, want) < 4 * ROUNDING[torch.bfloat16]


@gpu
@pytest.mark.parametrize("longest", [1, 2, 700])
@pytest.mark.parametrize("channels", fused.HEAD_SIZES)
def test_documents_of_more_keys_than_queries(fresh_seed, channels, longest):
    queries = torch.randint(1, longest + 1, (9,))
    before = torch.randint(0, 400, (9,)) * (torch.rand(9) < 0.5)
    (n, of_queries), (m, of_keys) = (
        (lengths.sum().item(), (F.pad(lengths.cumsum(0), (1, 0)).int().cuda(), lengths.max().item()))
        for lengths in (queries, queries + before)
    )
    rows = [
        torch.randn(tokens, heads, channels, device="cuda").bfloat16() for tokens, heads in ((n, 8), (m, 2), (m, 2))
    ]

    def one_by_one(query, key, value, scale, of_queries, of_keys):
        (borders, most), (key_borders, most_keys) = of_queries, of_keys
        return documents_one_by_one(
            query, key, value, borders, key_borders, most, most_keys, 0.0, True, False, scale=scale
        )

    grad, results = torch.randn(n, 8, channels, device="cuda"), []
    for attend, dtype in ((fused.attend_documents, torch.bfloat16), (one_by_one, torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in rows]
        output, *_ = attend(*leaves, 0.2, of_queries, of_keys)
        results.append([output, *torch.autograd.grad(output, leaves, grad.to(dtype))])
    for got, want in zip(*results, strict=True):
        assert error(got, want.double()) < 4 * ROUNDING[torch.bfloat16]


@gpu
@pytest.mark.parametrize("window", [0, 33, 97, 500])
@pytest.mark.parametrize("temperature", [None, 0.3])
def test_any_window(window, temperature):
    """33 and 97 fit some tiles; 500 merges by the reference's operations, 0 tile by tile."""
    qkv = inputs(600, 2, 4, 2, 64, torch.bfloat16, merging=1.2)
    compare(qkv, rotary_tables(600, 64), "auto", window=window, temperature=temperature)


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("case", ["append", "merge", "extreme"])
@pytest.mark.parametrize("temperature", [0.1, None])
def test_extreme_decisions(dtype, case, temperature):
    q, k, v = inputs(200, 1, 4, 2, 128, dtype)
    if case == "extreme":
        k[..., -1] = torch.where(torch.rand_like(k[..., -1].float()) > 0.5, 1e4, -1e4)
        q[..., -1] = torch.where(torch.rand_like(q[..., -1].float()) > 0.5, 1e4, -1e4)
    else:
        k[..., -1] = 1e4 if case == "merge" else -1e4
    options = dict(window=12, temperature=temperature, offset=5.0)
    rotary, grads = rotary_tables(200, 128), (torch.randn_like(q), torch.randn(k.shape[:3], device="cuda"))
    exact = run(reference.dmc_attention, (q, k, v), rotary, grads, torch.float64, **options)
    kernel = "dense" if dtype == torch.float32 else "auto"
    for name, x, z in zip(
        NAMES, run(fused.dmc_attention, (q, k, v), rotary, grads, kernel=kernel, **options), exact, strict=True
    ):
        assert x.isfinite().all(), name
        assert error(x[..., :-1], z[..., :-1], 0.05 * grads[0].norm().item()) < 3 * ROUNDING[dtype], name


@gpu
def test_every_element_is_written():
    """Poison what the allocator will hand out, then look for what stayed."""
    qkv = inputs(197, 2, 8, 2, 128, torch.bfloat16)
    rotary, grads = rotary_tables(197, 128), (torch.randn_like(qkv[0]), torch.randn(qkv[1].shape[:3], device="cuda"))
    expected = run(fused.dmc_attention, qkv, rotary, grads, temperature=0.2)
    torch.cuda.synchronize()
    for poison in (float("nan"), 1e30):
        blocks = [torch.full((n,), poison, device="cuda") for n in (1 << 9, 1 << 13, 1 << 17, 1 << 19, 1 << 21) * 8]
        torch.cuda.synchronize()
        del blocks
        for a, b in zip(run(fused.dmc_attention, qkv, rotary, grads, temperature=0.2), expected, strict=True):
            assert a.isfinite().all()
            assert error(a, b.double()) < 2e-3


@gpu
def test_prepare_and_merge_alone_write_what_they_should():
    """The operators one by one, in float32, against the reference's pieces."""
    assert fused.load_extension() is None
    q, k, v = inputs(77, 2, 6, 3, 64, torch.float32)
    cos, sin = rotary_tables(77, 64)
    aq, ak, av, diagonal, alpha, weight = torch.ops.megatron_dmc.prepare(
        q, k, v, cos, sin, None, None, 0, 0, 12, 5.0, 0.3, False, 0.125, 8.0
    )
    decisions, keep = reference.decide(k, 5.0, 0.3)
    importance = reference.importance(q, 3, 5.0)
    merged = reference.merge(k, v, importance, decisions, 12)
    query, key = (reference.rotate_without_last(x, (cos, sin), False) for x in (q, merged[0]))
    close = lambda a, b: torch.testing.assert_close(a, b, atol=3e-5, rtol=1e-5)  # noqa: E731
    close(alpha, decisions)
    close(weight, importance)
    close(av, merged[1])
    close(ak[..., :-1], key[..., :-1])
    close(ak[..., -1], reference.key_bias(keep))
    close(aq[..., :-1], query[..., :-1])
    assert (aq[..., -1] == 8).all()
    scores = (query.unflatten(2, (3, 2)) * key[:, :, :, None]).sum(-1).flatten(2) / 8
    close(diagonal, scores.permute(1, 2, 0))


@gpu
def test_deterministic_mode_is_bitwise_repeatable():
    qkv = inputs(700, 2, 8, 2, 128, torch.bfloat16)
    rotary, grads = rotary_tables(700, 128), (torch.randn_like(qkv[0]), torch.randn(qkv[1].shape[:3], device="cuda"))
    torch.use_deterministic_algorithms(True)
    try:
        assert fused.choose_kernel(qkv[0]) == "flash"
        first = run(fused.dmc_attention, qkv, rotary, grads, temperature=0.2)
        for _ in range(5):
            again = run(fused.dmc_attention, qkv, rotary, grads, temperature=0.2)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        with pytest.raises(ValueError, match="backward pass is not deterministic; use 'flash'"):
            fused.dmc_attention(*qkv, rotary, kernel="cudnn")
    finally:
        torch.use_deterministic_algorithms(False)


@gpu
def test_cuda_graph_compile_and_recomputation():
    qkv = [x.requires_grad_() for x in inputs(256, 1, 8, 2, 128, torch.bfloat16)]
    rotary, grad = rotary_tables(256, 128), torch.randn(256, 1, 8, 128, device="cuda", dtype=torch.bfloat16)
    key = torch.randint(2**63 - 1, (1,), device="cuda")

    def attention(q, k, v):
        return fused.dmc_attention(q, k, v, rotary, temperature=0.2, noise=LogisticNoise(key))[0]

    def step(f):
        return torch.autograd.grad((f(*qkv) * 2).mul(0.5), qkv, grad)

    expected = step(attention)
    close = lambda a: all(error(x, y.double()) < 4e-3 for x, y in zip(a, expected, strict=True))  # noqa: E731
    assert close(step(torch.compile(attention, fullgraph=True)))
    assert close(step(lambda *x: torch.utils.checkpoint.checkpoint(attention, *x, use_reentrant=False)))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(attention)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(attention)
    for x in captured:
        x.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert close(captured)


@gpu
def test_memory_is_linear_and_little():
    """What stays for the backward pass: prepared tensors, output and a few numbers per token and head."""

    def held(tokens):
        q, k, v = (x.requires_grad_() for x in inputs(tokens, 1, 8, 2, 128, torch.bfloat16))
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        output, _ = fused.dmc_attention(q, k, v, rotary_tables(tokens, 128), temperature=0.1)
        kept = torch.cuda.memory_allocated() - before
        torch.autograd.grad(output, (q, k, v), torch.randn_like(output))
        return kept, torch.cuda.max_memory_allocated() - before, q.nbytes

    held(512)
    (kept, peak, query), (kept2, peak2, _) = held(4096), held(8192)
    assert kept2 < 2.1 * kept and peak2 < 2.1 * peak
    assert kept < 4.5 * query  # query, output, 2 * (key, value) / 4, two tables of float32


@gpu
def test_opcheck():
    from torch.library import opcheck

    assert fused.load_extension() is None
    for dtype in (torch.bfloat16, torch.float32):
        q, k, v = inputs(40, 2, 4, 2, 64, dtype)
        cos, sin = rotary_tables(40, 64)
        ops = torch.ops.megatron_dmc
        prepared = (q, k, v, cos, sin, None, None, 0, 0, 12, 5.0, 0.3, False, 0.125, 8.0)
        opcheck(ops.prepare, prepared)
        aq, ak, av, diagonal, alpha, weight = ops.prepare(*prepared)
        lse = torch.randn_like(diagonal)
        opcheck(ops.merge_past_, (q.clone(), lse.clone(), torch.randn_like(q), torch.randn_like(lse)))
        opcheck(ops.merge_diagonal_, (q.clone(), lse, diagonal, ak, av, 1.0))
        grads = torch.randn_like(q), torch.randn_like(k), torch.randn_like(v)
        opcheck(
            ops.merge_diagonal_backward_,
            (torch.randn_like(q), q, lse, diagonal, aq, ak, av, *grads, cos, sin, False, 0.125, 1.0),
        )
        opcheck(
            ops.prepare_backward_,
            (
                grads[0],
                grads[1],
                grads[2],
                torch.randn_like(alpha),
                torch.randn_like(alpha),
                k,
                v,
                alpha,
                weight,
                12,
                0.3,
            ),
        )
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        kernel = "dense" if dtype == torch.float32 else "flash"
        opcheck(
            ops.attention, (q, k, v, cos, sin, None, None, 0, 0, 1.0, None, 0, 12, 5.0, 0.3, False, 0.125, kernel),
            atol=2e-2, rtol=2e-2,
        )  # fmt: skip
        documents = some_documents(40, 2)
        packing = documents.borders, documents.longest
        opcheck(
            ops.attention, (q, k, v, cos, sin, None, None, 0, 0, 1.0, *packing, 12, 5.0, 0.3, False, 0.125, kernel),
            atol=2e-2, rtol=2e-2,
        )  # fmt: skip


@gpu
def test_mistakes_name_the_argument():
    q, k, v = inputs(16, 1, 4, 2, 64, torch.bfloat16)
    cos, sin = rotary_tables(16, 64)
    cases = {
        "value must have key's shape": (q, k, v[:8], None),
        "value must have query's dtype and device": (q, k, v.half(), None),
        "key must have query's dtype and device": (q, k.cpu(), v, None),
        "query must have stride 1 in its last dimension": (q.transpose(2, 3).contiguous().transpose(2, 3), k, v, None),
        "cos must be on query's device": (q, k, v, (cos.cpu(), sin)),
        "rotary sin must be": (q, k, v, (cos, sin[:4])),
    }
    for message, arguments in cases.items():
        with pytest.raises(ValueError, match=message):
            fused.dmc_attention(*arguments, kernel="flash")
    with pytest.raises(ValueError, match="query is float32; use 'dense' or 'reference'"):
        fused.dmc_attention(q.float(), k.float(), v.float(), None, kernel="cudnn")

    def prepare(query=q, key=k, value=v, cos=cos, sin=sin, noise=None, noise_key=None, window=12, temperature=0.1):
        return torch.ops.megatron_dmc.prepare(
            query, key, value, cos, sin, noise, noise_key, 0, 0, window, 5.0, temperature, False, 0.125, 8.0
        )

    wide = torch.randn(16, 1, 2, 130, device="cuda").bfloat16()
    wrong = {
        "query must be bfloat16, float16 or float32; got float64": dict(query=q.double()),
        "key must be bfloat16; got float16": dict(key=k.half()),
        "value must be .16, 1, 2, 64.; got .8, 1, 2, 64.": dict(value=v[:8]),
        "query has 4 heads, key 3 KV heads": dict(key=q[:, :, :3]),
        "query has 32 channels": dict(query=q[..., :32]),
        "key must have stride 1 in its last dimension": dict(key=wide[..., :128:2]),
        "key must have rows that begin at multiples of 16 bytes": dict(key=wide[..., :64]),
        "cos must be float32; got bfloat16": dict(cos=cos.bfloat16()),
        "cos must be .16, 32.": dict(cos=cos[:3]),
        "cos and sin must be given together": dict(sin=None),
        "noise must be .16, 1, 2.": dict(noise=torch.zeros(16, 1, 4, device="cuda")),
        "noise_key must be on the CUDA device": dict(noise_key=torch.zeros(1, dtype=torch.int64)),
        "noise_key must be int64": dict(noise_key=torch.zeros(1, device="cuda")),
        "window must be 1 to": dict(window=0),
        "temperature must be positive": dict(temperature=0.0),
        "noise belongs to soft decisions": dict(temperature=None, noise=torch.zeros(16, 1, 2, device="cuda")),
    }
    for message, arguments in wrong.items():
        with pytest.raises(ValueError, match=message):
            prepare(**arguments)
    with pytest.raises(NotImplementedError):
        prepare(query=q.cpu(), key=k.cpu(), value=v.cpu(), cos=None, sin=None)
