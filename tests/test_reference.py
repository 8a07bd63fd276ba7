"""The reference operations against the definition written out token by token, and against each other."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dmc.ops.reference import DMCCache, dmc_attention, dmc_attention_cached, rotate, zero_out_attention

DOUBLE = torch.float64


def tables(s, d_rot, dtype=DOUBLE):
    angles = torch.outer(torch.arange(s, dtype=dtype), 100.0 ** -torch.linspace(0, 1, d_rot // 2, dtype=dtype))
    return angles.cos(), angles.sin()


def inputs(seed, s, b, g, r, d, dtype=DOUBLE, merge_rate=0.6):
    """Random projections whose last key channel decides to merge at about `merge_rate`."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(s, b, n, d, generator=generator, dtype=dtype) for n in (g * r, g, g))
    key[..., -1] += 5 + 2.5 * (merge_rate - 0.5)
    query[..., -1] -= 5
    return query, key, value


def by_definition(query, key, value, rotary, window, offset=5.0, temperature=None, noise=None, interleaved=False):
    """Decision, merge, rotation and attention as the definition states them, one number at a time."""
    s, b, h, d = query.shape
    g = key.shape[2]
    output = torch.zeros_like(query)
    alphas = torch.zeros(s, b, g, dtype=query.dtype)
    for i, j in itertools.product(range(b), range(g)):
        a = key[:, i, j, -1] - offset
        if temperature is not None:
            a = a + (0 if noise is None else noise[:, i, j])
        alpha = torch.sigmoid(a / temperature) if temperature is not None else (a > 0).to(a.dtype)
        alpha[0] = 0
        alphas[:, i, j] = alpha
        heads = range(j * h // g, (j + 1) * h // g)
        w = [torch.sigmoid(query[t, i, list(heads), -1].mean() + offset) + 2**-7 for t in range(s)]
        keys, values = [], []
        for t in range(s):
            m = {
                u: w[u] * math.prod(alpha[u + 1 : t + 1].tolist())
                for u in range(s)
                if u <= t and (not window or u > t - window)
            }
            total = sum(m.values())
            keys.append(sum(m[u] * key[u, i, j] for u in m) / total)
            values.append(sum(m[u] * value[u, i, j] for u in m) / total)
        clear = torch.ones(d, dtype=query.dtype)
        clear[-1] = 0

        def turn(x, clear=clear):
            return rotate((x * clear)[:, None, None], rotary, interleaved)[:, 0, 0] * clear

        keys = turn(torch.stack(keys))
        for head in heads:
            scores = turn(query[:, i, head]) @ keys.T / math.sqrt(d)
            for q, k in itertools.product(range(s), range(s)):
                if k > q:
                    scores[q, k] = -math.inf
                elif k < q:
                    scores[q, k] += torch.log1p(-alpha[k + 1])
            output[:, i, head] = scores.softmax(-1) @ torch.stack(values)
    return output, alphas


@pytest.mark.parametrize("temperature", [None, 0.7])
@pytest.mark.parametrize("window", [0, 1, 2, 5, 12])
@pytest.mark.parametrize("r", [1, 2, 8])
def test_parallel_form_is_the_definition(fresh_seed, window, r, temperature):
    query, key, value = inputs(fresh_seed, 17, 2, 2, r, 6)
    noise = None if temperature is None else torch.randn(17, 2, 2, dtype=DOUBLE)
    rotary = tables(17, 6)
    got = dmc_attention(query, key, value, rotary, window=window, temperature=temperature, noise=noise)
    want = by_definition(query, key, value, rotary, window, temperature=temperature, noise=noise)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    assert 0.2 < want[1].mean() < 0.95  # the inputs do merge, and do append


def cached(query, key, value, rotary, cuts, dtype=None, **settings):
    cache = DMCCache.empty(key.shape[1], key.shape[2], key.shape[3], dtype=dtype or value.dtype, device=key.device)
    outputs, alphas = [], []
    for start, stop in itertools.pairwise([0, *cuts, len(query)]):
        if start == stop:
            continue
        here = None if rotary is None else tuple(t[start:stop] for t in rotary)
        output, alpha = dmc_attention_cached(*(x[start:stop] for x in (query, key, value)), here, cache, **settings)
        outputs.append(output)
        alphas.append(alpha)
    return torch.cat(outputs), torch.cat(alphas), cache


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_incremental_form_is_the_parallel_form(data):
    s = data.draw(st.integers(1, 41), label="tokens")
    b, g, r = (data.draw(st.sampled_from(c), label=n) for n, c in (("b", [1, 3]), ("g", [1, 2]), ("group", [1, 2, 8])))
    d = data.draw(st.sampled_from([4, 6, 10]), label="d")
    window = data.draw(st.sampled_from([0, 1, 2, 3, 12, 64]), label="window")
    interleaved = data.draw(st.booleans(), label="interleaved")
    d_rot = data.draw(st.sampled_from([0, 2, 4, d]), label="d_rot")
    token_by_token = data.draw(st.booleans(), label="token by token")
    cuts = range(1, s) if token_by_token else sorted(data.draw(st.lists(st.integers(0, s), max_size=4), label="cuts"))
    rate = data.draw(st.sampled_from([-9.0, 0.5, 0.8, 9.0]), label="merge rate")
    query, key, value = inputs(data.draw(st.integers(0, 2**32), label="seed"), s, b, g, r, d, merge_rate=rate)
    rotary = tables(s, d_rot) if d_rot else None
    settings = dict(window=window, interleaved=interleaved)
    output, alpha = dmc_attention(query, key, value, rotary, **settings)
    step_output, step_alpha, cache = cached(query, key, value, rotary, cuts, **settings)
    torch.testing.assert_close(step_output, output, rtol=0, atol=1e-10)
    assert torch.equal(step_alpha, alpha)
    assert torch.equal(cache.lengths, (1 - alpha).sum(0).long())
    assert cache.tokens == s
    assert cache.entry_bytes == int((1 - alpha).sum()) * 2 * d * 8


def test_cache_holds_the_merged_entries(fresh_seed):
    """Every kept entry is the merged, rotated key of its segment's last token, and nothing else is stored."""
    query, key, value = inputs(fresh_seed, 30, 1, 1, 1, 4)
    _, alpha, cache = cached(query, key, value, None, range(1, 30), window=0)
    ends = [t for t in range(30) if t == 29 or alpha[t + 1, 0, 0] == 0]
    w = torch.sigmoid(query[:, 0, 0, -1] + 5) + 2**-7
    start = 0
    for slot, end in enumerate(ends):
        span = slice(start, end + 1)
        mean = (w[span, None] * value[span, 0, 0]).sum(0) / w[span].sum()
        torch.testing.assert_close(cache.entries[1, 0, 0, slot], mean, rtol=0, atol=1e-12)
        start = end + 1
    assert cache.lengths.item() == len(ends)


@pytest.mark.parametrize("window", [0, 1, 3])
@pytest.mark.parametrize("r", [1, 2])
@pytest.mark.parametrize("interleaved", [False, True])
def test_gradients(fresh_seed, window, r, interleaved):
    s, b, g, d = 5, 1, 2, 4
    query, key, value = (x.requires_grad_() for x in inputs(fresh_seed, s, b, g, r, d))
    noise = torch.randn(s, b, g, dtype=DOUBLE)
    rotary = tables(s, d)

    def attention(q, k, v):
        return dmc_attention(q, k, v, rotary, window=window, temperature=0.5, noise=noise, interleaved=interleaved)

    assert torch.autograd.gradcheck(attention, (query, key, value))


def test_all_appended_is_plain_attention(fresh_seed):
    query, key, value = inputs(fresh_seed, 19, 2, 2, 2, 8)
    rotary = tables(19, 8)
    key[..., -1] = -10  # never merges; and with the last channels at zero there is nothing else to DMC
    output, alpha = dmc_attention(query, key, value, rotary)
    zero = zero_out_attention(query, key, value, rotary, last_channel=0.0)
    assert not alpha.any()
    torch.testing.assert_close(output, zero, rtol=0, atol=1e-12)


def test_zero_out_begins_as_the_original_attention(fresh_seed):
    query, key, value = inputs(fresh_seed, 13, 2, 2, 2, 8)
    rotary = tables(13, 8)
    q, k, v = (x.permute(1, 2, 0, 3) for x in (rotate(query, rotary), rotate(key, rotary), value))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).permute(
        2, 0, 1, 3
    )
    torch.testing.assert_close(zero_out_attention(query, key, value, rotary, last_channel=1.0), want)
    half = zero_out_attention(query, key, value, rotary, last_channel=0.5)
    assert not torch.allclose(half, want)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_matches_megatron(fresh_seed, interleaved):
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    x = torch.randn(7, 2, 3, 8, dtype=DOUBLE, generator=torch.Generator().manual_seed(fresh_seed))
    angles = torch.rand(7, 1, 1, 3, dtype=DOUBLE)
    both = torch.cat([angles, angles], -1) if not interleaved else angles.repeat_interleave(2, -1)
    want = _apply_rotary_pos_emb_bshd(x, both, rotary_interleaved=interleaved)
    got = rotate(x, (angles.cos()[:, 0, 0], angles.sin()[:, 0, 0]), interleaved)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_positions_per_sequence(fresh_seed):
    query, key, value = inputs(fresh_seed, 11, 2, 1, 2, 4)
    cos, sin = tables(22, 4)
    both = tuple(torch.stack([t[:11], t[11:]], 1) for t in (cos, sin))
    output, _ = dmc_attention(query, key, value, both)
    for i, span in enumerate((slice(0, 11), slice(11, 22))):
        alone, _ = dmc_attention(*(x[:, i : i + 1] for x in (query, key, value)), (cos[span], sin[span]))
        torch.testing.assert_close(output[:, i : i + 1], alone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision(fresh_seed, dtype):
    exact = inputs(fresh_seed, 33, 2, 2, 2, 8)
    query, key, value = (x.to(dtype) for x in exact)
    rotary = tables(33, 8)
    output, alpha = dmc_attention(query, key, value, rotary)
    want, _ = dmc_attention(*(x.double() for x in (query, key, value)), rotary)
    assert output.dtype == dtype and alpha.dtype == torch.float32
    tolerance = max(2 * torch.finfo(dtype).eps, 1e-5)  # float32 arithmetic, one rounding at the end
    torch.testing.assert_close(output.double(), want, rtol=tolerance, atol=tolerance)


def test_extreme_logits_stay_finite(fresh_seed):
    query, key, value = inputs(fresh_seed, 20, 1, 1, 1, 4, dtype=torch.float32)
    for last in (1e4, -1e4):
        key[..., -1] = last
        key.requires_grad_()
        output, alpha = dmc_attention(query, key, value, None, temperature=0.1)
        (output.sum() + alpha.sum()).backward()
        assert output.isfinite().all() and key.grad.isfinite().all()
        key = key.detach()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(value=torch.zeros(5, 1, 2, 6)), "value must have key's shape"),
        (dict(query=torch.zeros(5, 1, 3, 4)), "multiple of the KV heads"),
        (dict(query=torch.zeros(4, 1, 4, 4)), "tokens, sequences and channels"),
        (dict(query=torch.zeros(5, 4, 4)), "must be \\[tokens, sequences, heads, channels\\]"),
        (dict(window=-1), "window must be 0"),
        (dict(temperature=0.0), "temperature must be positive"),
        (dict(noise=torch.zeros(5, 1, 2)), "give a temperature"),
        (dict(temperature=1.0, noise=torch.zeros(5, 1, 4)), "noise must be"),
        (dict(rotary=(torch.zeros(5, 3), torch.zeros(5, 3))), "at most 2 pairs"),
        (dict(rotary=(torch.zeros(6, 2), torch.zeros(6, 2))), "rotary cos"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = dict(
        query=torch.zeros(5, 1, 4, 4), key=torch.zeros(5, 1, 2, 4), value=torch.zeros(5, 1, 2, 4), rotary=None
    )
    with pytest.raises(ValueError, match=message):
        dmc_attention(**{**arguments, **change})
