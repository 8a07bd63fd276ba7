"""The fused kernels where there is no GPU: csrc/ compiled for the CPU (tests/emulation), against the reference.

The heavy part in between is attention written out. Emulation is slow, so shapes are small; `test_fused.py` tests the
real thing, on a GPU.
"""

import functools
import shutil

import pytest
import torch
from emulation import cuda_headers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_fused import compare_results, inputs, rotary_tables, run, some_documents

from megatron_dmc.ops import fused, reference
from megatron_dmc.ops.noise import LogisticNoise

pytestmark = pytest.mark.skipif(
    cuda_headers() is None or shutil.which("g++") is None, reason="needs g++ and the CUDA toolkit's headers"
)


@pytest.fixture(scope="module", autouse=True)
def emulated(emulated_kernels):
    """The module under test calls the emulated operators, in this process alone."""
    kernels, fused._kernels = fused._kernels, emulated_kernels
    yield
    fused._kernels = kernels


class Attention(torch.autograd.Function):
    """What `torch.ops.megatron_dmc.attention` does, without a dispatcher that insists on CUDA."""

    @staticmethod
    def forward(ctx, query, key, value, *options):
        results = fused._forward(query, key, value, *options)
        fused._save(ctx, (query, key, value, *options), results)
        return results[:2]

    @staticmethod
    def backward(ctx, *grads):
        return *fused._backward(*grads, *ctx.saved_tensors, *ctx.settings), *[None] * 15


@pytest.fixture(autouse=True)
def without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.ops.megatron_dmc, "attention", Attention.apply, raising=False)
    monkeypatch.setattr(fused, "check_fused", lambda *_: None)


attention = functools.partial(fused.dmc_attention, kernel="dense")


def compare(qkv, rotary, noise=None, **options):
    grads = torch.randn_like(qkv[0]), torch.randn(qkv[1].shape[:3]) * 0.1
    sample = noise.sample(*qkv[1].shape[:3]) if isinstance(noise, LogisticNoise) else noise
    exact = run(reference.dmc_attention, qkv, rotary, grads, torch.float64, noise=sample, **options)
    plain = run(reference.dmc_attention, qkv, rotary, grads, noise=sample, **options)
    compare_results(run(attention, qkv, rotary, grads, noise=noise, **options), plain, exact, grads, **options)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
@given(
    shape=st.tuples(
        st.integers(1, 150), st.integers(1, 2), st.sampled_from([(1, 1), (2, 1), (6, 2)]),
        st.sampled_from(fused.HEAD_SIZES),
    ),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    window=st.sampled_from([0, 1, 2, 12, 17, 18, 40]),
    turning=st.sampled_from(["all", "half", "odd", "none"]),
    interleaved=st.booleans(),
    by_sequence=st.booleans(),
    soft=st.sampled_from([0.1, 0.5, None]),
    noisy=st.sampled_from([None, "tensor", "key"]),
    merging=st.sampled_from([0.2, 0.7, 1.0]),
    fused_view=st.booleans(),
    packed=st.booleans(),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_kernels_equal_the_reference(
    shape, dtype, window, turning, interleaved, by_sequence, soft, noisy, merging, fused_view, packed, seed
):
    torch.manual_seed(seed)
    tokens, sequences, (heads, kv_heads), channels = shape
    qkv = inputs(
        tokens, sequences, heads, kv_heads, channels, dtype, fused_view=fused_view, merging=merging, device="cpu"
    )
    width = {"all": channels, "half": channels // 2, "odd": 10, "none": 0}[turning]
    rotary = rotary_tables(tokens, width, sequences if by_sequence else None, "cpu") if width else None
    noise = None
    if soft is not None and noisy == "tensor":
        noise = torch.logit(torch.rand(tokens, sequences, kv_heads), eps=1e-6)
    elif soft is not None and noisy == "key":
        noise = LogisticNoise.draw(torch.device("cpu"), stream=3, first_head=5, scale=0.3)
    documents = some_documents(tokens, sequences, "cpu") if packed else None
    compare(qkv, rotary, noise, window=window, temperature=soft, interleaved=interleaved, documents=documents)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("temperature", [0.3, None])
def test_without_a_window(fresh_seed, dtype, temperature):
    """Segments reach over many tiles, of documents as well."""
    for documents in (None, some_documents(150, 1, "cpu")):
        qkv = inputs(150, 1, 2, 1, 64, dtype, merging=1.2, device="cpu")
        compare(qkv, rotary_tables(150, 64, device="cpu"), window=0, temperature=temperature, documents=documents)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("case", [1e4, -1e4, "both"])
def test_extreme_decisions(fresh_seed, dtype, case):
    q, k, v = inputs(70, 1, 2, 1, 64, dtype, device="cpu")
    for x in (k, q) if case == "both" else (k,):
        x[..., -1] = torch.where(torch.rand(x.shape[:3]) > 0.5, 1e4, -1e4) if case == "both" else case
    for temperature in (0.1, None):
        compare((q, k, v), rotary_tables(70, 64, device="cpu"), temperature=temperature)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("channels", [64, 96, 128, 256])
def test_past_is_merged(fresh_seed, dtype, channels):
    """Every number as near as its format allows, wherever the rows lie; what is far smaller disappears."""
    sizes = [torch.randint(1, 12, ()).item() for _ in range(3)]
    output, past = (torch.randn(*sizes, channels).to(dtype) for _ in range(2))
    sums, past_sums = (torch.randn(sizes[1], sizes[2], sizes[0]) * scale for scale in (1, 300))
    exact = [torch.softmax(torch.stack([sums, past_sums]).double(), 0)[i].permute(2, 0, 1)[..., None] for i in (0, 1)]
    exact = exact[0] * output + exact[1] * past
    exact_sums = torch.logaddexp(sums.double(), past_sums.double())
    strided = past.transpose(0, 1).contiguous().transpose(0, 1), past_sums.transpose(0, 2).contiguous().transpose(0, 2)
    fused._kernels.merge_past_(output, sums, *strided)
    step = torch.finfo(dtype).eps
    assert ((output - exact).abs() <= step * exact.abs() / 2 + 2e-6).all()
    assert ((sums - exact_sums).abs() <= 3e-7 * exact_sums.abs() + 3e-7).all()


def test_past_is_refused():
    output, sums = torch.zeros(3, 2, 4, 64), torch.zeros(2, 4, 3)
    for arguments, message in (
        ((output[:2], sums), r"past must be \[3, 2, 4, 64\]; got \[2, 2, 4, 64\]"),
        ((output, sums[..., :2]), r"past_logsumexp must be \[2, 4, 3\]; got \[2, 4, 2\]"),
        ((output.half(), sums), "past must be float32; got float16"),
        ((output, sums.double()), "past_logsumexp must be float32; got float64"),
    ):
        with pytest.raises(ValueError, match=message):
            fused._kernels.merge_past_(output.clone(), sums.clone(), *arguments)
