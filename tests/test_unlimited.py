"""The merge without a window against the reference's, in float64 and float32, with gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dmc.ops import reference, unlimited

TILE = unlimited.TILE


def results(merge, key, value, weight, alpha, grads, dtype):
    """Merged keys and values and the gradients of all four inputs, of decisions where they are not 0."""
    leaves = [x.to(dtype).requires_grad_() for x in (key, value, weight, alpha)]
    merged = merge(*leaves)
    found = torch.autograd.grad(merged, leaves, [x.to(dtype) for x in grads], materialize_grads=True)
    return *merged, *found[:-1], found[-1] * (alpha >= torch.finfo(torch.float64).tiny)


def specified(key, value, weight, alpha):
    return reference.merge(key, value, weight, alpha, 0)


def inputs(s, b, g, d, decisions):
    """With about as many appending as merging tokens; `long`: segments of hundreds of tokens; `hard`: 0 and 1."""
    logits = 4 * torch.randn(s, b, g, dtype=torch.float64)
    logits += {"soft": 0.0, "long": 14.0, "hard": 6.0, "extreme": 0.0}[decisions]
    alpha = {"hard": (logits > 0).double(), "extreme": torch.sigmoid(60 * logits)}.get(decisions, torch.sigmoid(logits))
    alpha[0] = 0
    weight = torch.sigmoid(3 * torch.randn(s, b, g, dtype=torch.float64)) + 2**-7
    key, value, *grads = (torch.randn(s, b, g, d, dtype=torch.float64) for _ in range(4))
    return key, value, weight, alpha, grads


@settings(deadline=None)
@given(
    s=st.one_of(st.integers(1, 5), st.sampled_from([TILE - 1, TILE, TILE + 1, 3 * TILE, 317])),
    b=st.integers(1, 2),
    g=st.integers(1, 3),
    decisions=st.sampled_from(["soft", "long", "hard", "extreme"]),
    seed=st.integers(0, 2**32),
)
def test_it_is_the_reference(s, b, g, decisions, seed):
    torch.manual_seed(seed)
    given = inputs(s, b, g, 8, decisions)
    want = results(specified, *given, torch.float64)
    for got, expected in zip(results(unlimited.merge, *given, torch.float64), want, strict=True):
        assert torch.allclose(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("decisions", ["soft", "long", "hard"])
def test_in_float32_it_errs_no_more_than_the_reference(fresh_seed, decisions):
    given = inputs(5 * TILE + 3, 2, 2, 16, decisions)
    want = results(specified, *given, torch.float64)
    theirs, ours = (results(merge, *given, torch.float32) for merge in (specified, unlimited.merge))
    for got, other, expected in zip(ours, theirs, want, strict=True):
        error, allowed = ((x.double() - expected).norm() / expected.norm() for x in (got, other))
        assert error < 2 * allowed + 1e-6, (error, allowed)


def test_a_segment_reaches_over_many_tiles(fresh_seed):
    """And nothing of what was before it gets into it."""
    key, value, weight, alpha, _ = inputs(8 * TILE, 1, 1, 4, "hard")
    alpha[:], begin = 1, TILE + 7
    alpha[0] = alpha[begin] = 0
    key[:begin] = 1e36
    merged, _ = unlimited.merge(key.float(), value.float(), weight.float(), alpha.float())
    share = weight[begin:, 0, 0, None]
    expected = (share * key[begin:, 0, 0]).cumsum(0) / share.cumsum(0)
    assert torch.allclose(merged[begin:, 0, 0].double(), expected, atol=1e-5)
