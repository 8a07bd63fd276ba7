"""A model's steps through the paged cache, driven by hand: the same logits as a pass over each sequence as a whole."""

import pytest
import torch
from test_layer import POSITIONS, YARN, config, gpt

from megatron_dmc.cache import PagedCache
from megatron_dmc.config import DMCConfig, DMCError
from megatron_dmc.context import PagedContext, cache_shape

pytestmark = pytest.mark.usefixtures("megatron")


@pytest.mark.parametrize("positions", ["rope", "learned", "yarn", "none"])
@pytest.mark.parametrize("window", [12, 0])
def test_steps_of_chunks_and_decoding_are_evaluation(fresh_seed, positions, window):
    """Two sequences at their own pace, tokens of both kinds in one step, against a pass over each as a whole."""
    cfg = config()
    if positions == "yarn":
        vars(cfg).update(YARN)
    dmc = DMCConfig(dmc_stage="retrofit", dmc_init_val=0.1, dmc_window_size=window)
    model = gpt(cfg, dmc, **POSITIONS[positions]).eval()
    tokens = torch.randint(0, 64, (2, 30), device="cuda")
    shape = cache_shape(model, slots=3, max_tokens=40)
    context = PagedContext(model, PagedCache(shape, 60, dtype=torch.float32, device=tokens.device))
    plan = [  # (slots, new tokens of each, chunks)
        ([], 1, {2: 9}),
        ([2], 1, {0: 13}),
        ([0, -1, 2], 2, {}),
        ([2], 3, {0: 8}),
        ([-1, 2, 0], 1, {}),
    ]
    sequence_of, entered = {0: 0, 2: 1}, {0: 0, 2: 0}
    with torch.no_grad():
        whole = [model(tokens[i : i + 1], torch.arange(30, device="cuda")[None], None)[0] for i in range(2)]
        for slots, n, chunks in plan:
            context.begin(
                torch.tensor(slots, dtype=torch.int64, device="cuda"), n,
                chunk_slots=torch.tensor(list(chunks), dtype=torch.int64, device="cuda"),
                chunk_lengths=list(chunks.values()),
            )  # fmt: skip
            new, ends = [], []
            for slot, count in [*((slot, n) for slot in slots), *chunks.items()]:
                begin = entered.get(slot, 0)
                new.append(tokens[sequence_of.get(slot, 0), begin : begin + count])
                ends.append((slot, begin + count))
            from megatron.core.inference.utils import InferenceMode

            with InferenceMode.active():
                logits = model(
                    torch.cat(new)[None], context.positions(), None,
                    inference_context=context, runtime_gather_output=True,
                )  # fmt: skip
            context.commit()
            assert logits.shape[:2] == (1, len(ends))
            for row, (slot, end) in zip(logits[0], ends, strict=True):
                if slot >= 0:
                    entered[slot] = end
                    torch.testing.assert_close(row, whole[sequence_of[slot]][end - 1], rtol=1e-4, atol=1e-4)
    ratio = context.cache.statistics().ratio
    assert (ratio > 1).any() and context.cache.tokens.tolist() == [entered[0], 0, entered[2], 0]


def test_mistakes_name_the_argument(fresh_seed):
    model = gpt(config()).eval()
    shape = cache_shape(model, slots=1, max_tokens=9)
    with pytest.raises(DMCError, match="the cache has 1 layers, the model 2"):
        PagedContext(model, PagedCache(type(shape)(1, 1, 4, 2, 8, 9, 12), 9, dtype=torch.float32, device="cuda"))
    other = type(shape)(2, 1, 4, 2, 8, 9, 5)
    context = PagedContext(model, PagedCache(other, 9, dtype=torch.float32, device="cuda"))
    context.begin(torch.tensor([0], device="cuda"))
    with pytest.raises(DMCError, match="windows of 5 tokens, the model merges over 12"):
        model(torch.tensor([[1]], device="cuda"), context.positions(), None, inference_context=context)
