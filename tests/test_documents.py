"""Packed documents: where they begin, and that each is merged and attended to as if it were alone."""

import pytest
import torch
from test_reference import DOUBLE, inputs, tables

from megatron_dmc.ops.documents import Documents
from megatron_dmc.ops.reference import dmc_attention, zero_out_attention

STARTS = [[0, 1, 2, 9], [0], [0, 5, 16]]
TOKENS = 17


def documents():
    return Documents(STARTS, TOKENS, "cpu")


def test_what_it_tells():
    packed = documents()
    assert packed.borders.tolist() == [0, 1, 2, 9, 17, 34, 39, 50, 51]
    assert packed.borders.dtype == torch.int32 and packed.longest == 17
    index = [[max(start for start in of_one if start <= t) for t in range(TOKENS)] for of_one in STARTS]
    index = torch.tensor(index)
    assert torch.equal(packed.positions, (torch.arange(TOKENS) - index).T)
    assert torch.equal(packed.first, packed.positions == 0)
    assert torch.equal(packed.apart(), index[:, :, None] != index[:, None])
    assert torch.equal(packed.apart(slice(4, 9), 8), (index[:, :, None] != index[:, None])[:, 4:9, :8])
    assert Documents.from_first(packed.first).starts == STARTS


def test_parts_of_sequences():
    packed = documents()
    chunks = packed.within((3, 1), 4)
    assert chunks.starts == [[0], [0], [0], [0], [0], [0, 1]]
    assert chunks.first.shape == (4, 6)
    assert chunks.before == [3, 12, 7, 2, 4, 4] and chunks.longest == 4
    borders, longest = chunks.with_before
    assert borders.tolist() == [0, 7, 23, 34, 40, 48, 53, 56] and borders.dtype == torch.int32 and longest == 16
    assert packed.with_before[0].tolist() == packed.borders.tolist() and packed.with_before[1] == packed.longest
    for sequence, of_one in enumerate(STARTS):
        for begin in range(1, TOKENS):
            for end in range(begin + 1, TOKENS + 1):
                document = [sum(start <= t for start in of_one) for t in range(TOKENS)]
                own = [t for t in range(begin, end) if document[t] == document[begin - 1]]
                tokens, since = packed.across(sequence, begin, end)
                assert tokens == len(own)
                if own:
                    assert since == document.index(document[begin])
    assert packed.across(0, 0, 4) == (0, 0)


def test_from_cumulative_lengths():
    """Megatron pads them with copies of the last, and may leave tokens over."""
    found = Documents.from_borders(torch.tensor([0, 3, 3, 8, 8, 8], dtype=torch.int32), 10)
    assert found.starts == [[0, 3, 8]] and found.borders.tolist() == [0, 3, 8, 10]
    assert Documents.from_borders(torch.tensor([0, 10, 10]), 10).starts == [[0]]


@pytest.mark.parametrize("borders", [[], [1, 10], [0, 5, 4, 10], [0, 11]])
def test_bad_cumulative_lengths(borders):
    with pytest.raises(ValueError, match=r"cu_seqlens must ascend from 0 and end within the 10 tokens; they are \["):
        Documents.from_borders(torch.tensor(borders, dtype=torch.int32), 10)


@pytest.mark.parametrize("starts", [[], [1], [0, 2, 2], [0, 3, 2], [0, 10]])
def test_bad_starts(starts):
    with pytest.raises(
        ValueError, match=r"documents must begin with token 0 and then ever later, before the end at 10"
    ):
        Documents([[0], starts], 10, "cpu")


@pytest.mark.parametrize("window", [0, 1, 3, 12])
@pytest.mark.parametrize("temperature", [None, 0.7])
def test_each_is_as_if_alone(fresh_seed, window, temperature):
    """Outputs, decisions and gradients of what is packed, and of every document by itself."""
    packed = documents()
    rows = [x.requires_grad_() for x in inputs(fresh_seed, TOKENS, len(STARTS), 2, 3, 6)]
    noise = None if temperature is None else torch.randn(TOKENS, len(STARTS), 2, dtype=DOUBLE)
    rotary = tuple(t[packed.positions] for t in tables(TOKENS, 6))
    grads = torch.randn(TOKENS, len(STARTS), 6, 6, dtype=DOUBLE), torch.randn(TOKENS, len(STARTS), 2, dtype=DOUBLE)

    def results(attend, *arguments, rows=rows, grads=grads, **options):
        found = attend(*rows, *arguments, **options)
        found = found if isinstance(found, tuple) else (found,)
        pairs = [(x, g) for x, g in zip(found, grads, strict=False) if x.requires_grad]
        return *found, *torch.autograd.grad([x for x, _ in pairs], rows, [g for _, g in pairs])

    for attend, options in (
        (dmc_attention, dict(window=window, temperature=temperature, noise=noise)),
        (zero_out_attention, dict(last_channel=0.3)),
    ):
        together = results(attend, rotary, documents=packed, **options)
        for sequence, starts in enumerate(STARTS):
            for begin, end in zip(starts, [*starts[1:], TOKENS], strict=True):

                def part(x, here=(slice(begin, end), slice(sequence, sequence + 1))):
                    return x[here]

                if options.get("noise") is not None:
                    options["noise"] = part(noise)
                alone = results(
                    attend, tables(end - begin, 6), rows=[part(x).detach().requires_grad_() for x in rows],
                    grads=[part(x) for x in grads], **options,
                )  # fmt: skip
                for a, b in zip(alone, together, strict=True):
                    torch.testing.assert_close(a, part(b), rtol=1e-10, atol=1e-10)


def test_documents_must_fit():
    query, key, value = inputs(0, 4, 2, 1, 1, 4)
    for attend in (dmc_attention, zero_out_attention):
        options = dict(last_channel=1.0) if attend is zero_out_attention else {}
        with pytest.raises(ValueError, match=r"documents must be of \[tokens, sequences\] = \(4, 2\); got \(4, 1\)"):
            attend(query, key, value, None, documents=Documents([[0]], 4, "cpu"), **options)
