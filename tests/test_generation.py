"""Batches of prompts through the paged cache: the same tokens as one sequence at a time without any cache."""

from types import SimpleNamespace

import pytest
import torch
from test_layer import POSITIONS, YARN, config, gpt

from megatron_dmc import generation as module
from megatron_dmc.cache import PagedCache
from megatron_dmc.config import DMCConfig, DMCError
from megatron_dmc.context import PagedContext, cache_shape
from megatron_dmc.generation import Generation, Sampling

pytestmark = pytest.mark.usefixtures("megatron")
VOCABULARY, END = 60, 7


def loaded(model, eod=END):
    return SimpleNamespace(
        model=model,
        device=next(model.parameters()).device,
        tokenizer=SimpleNamespace(vocab_size=VOCABULARY, eod=eod),
        args=SimpleNamespace(position_embedding_type="rope", max_position_embeddings=64),
        dmc=None,
    )


@torch.no_grad()
def without_cache(model, prompt, max_new_tokens, eod=END):
    """Greedy, the whole sequence again for every token."""
    tokens, found = list(prompt), []
    for _ in range(max_new_tokens):
        logits = model(torch.tensor([tokens], device="cuda"), torch.arange(len(tokens), device="cuda")[None], None)
        token = int(logits[0, -1, :VOCABULARY].argmax())
        if token == eod:
            break
        tokens.append(token)
        found.append(token)
    return found


def prompts_of(*lengths):
    return [torch.randint(0, VOCABULARY, (n,)).tolist() for n in lengths]


def gathered(generation, count):
    found = [[] for _ in range(count)]
    for index, token in generation:
        found[index].append(token)
    return found


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


@pytest.mark.parametrize("slots", [1, 3, 64])
def test_batches_equal_single_sequences(fresh_seed, slots, monkeypatch):
    monkeypatch.setattr(module, "MAX_CHUNK", 16)  # prompts come in pieces
    model = gpt(config()).eval()
    prompts = prompts_of(1, 5, 40, 17, 2, 16)
    generation = Generation(loaded(model), prompts, 9, slots=slots)
    found = gathered(generation, len(prompts))
    assert found == [without_cache(model, p, 9) for p in prompts]
    report = generation.report
    assert generation.ended == set(range(6)) == set(range(report.sequences))
    assert report.heads == 4 and report.ratio > 1
    in_cache = sum(len(p) + len(f) - (len(f) == 9) for p, f in zip(prompts, found, strict=True))
    assert report.tokens == in_cache
    assert generation._cache._free_count == len(generation._cache.pages)


def test_entries_in_8_bits(fresh_seed):
    model, prompts = gpt(config()).eval(), prompts_of(20, 3)
    reports = []
    for fp8 in (False, True):
        generation = Generation(loaded(model, eod=-1), prompts, 9, fp8=fp8)
        found = gathered(generation, 2)
        assert [len(tokens) for tokens in found] == [9, 9]
        assert generation._cache._free_count == len(generation._cache.pages)
        reports.append(generation.report)
    exact, rounded = reports
    channels = exact.vanilla_bytes // (2 * 4 * exact.tokens * exact.heads)  # in float32
    assert exact.entry_bytes == exact.entries * 2 * 4 * channels
    assert rounded.entry_bytes == rounded.entries * 2 * (channels + 4)
    assert rounded.vanilla_bytes == exact.vanilla_bytes


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["local", "transformer_engine"])
@pytest.mark.parametrize("fp8", [False, True])
def test_fused_kernels_choose_the_models_tokens(fresh_seed, implementation, fp8, monkeypatch):
    """In bfloat16, with chunks, changing batches and a CUDA graph, against a pass over what came out.

    A logit's rounding depends on the batch, and so does a decision at its threshold: a few tokens may differ.
    """
    if implementation == "transformer_engine":
        pytest.importorskip("transformer_engine")
    monkeypatch.setattr(module, "MAX_CHUNK", 16)
    cfg = config(transformer_impl=implementation, hidden_size=256, params_dtype=torch.bfloat16, bf16=True)
    model, prompts = gpt(cfg).to(torch.bfloat16).eval(), prompts_of(1, 5, 40, 17, 2, 16)
    generation = Generation(loaded(model, eod=-1), prompts, 20, slots=4, fp8=fp8)
    assert generation._captures, "the kernels do not run"
    same = []
    for prompt, found in zip(prompts, gathered(generation, len(prompts)), strict=True):
        tokens = torch.tensor([prompt + found], device="cuda")
        with torch.no_grad():
            logits = model(tokens, torch.arange(tokens.shape[1], device="cuda")[None], None)[0, :, :VOCABULARY]
        same.append(logits[len(prompt) - 1 : -1].argmax(-1) == tokens[0, len(prompt) :])
    assert torch.cat(same).float().mean() > (0.6 if fp8 else 0.9)
    assert generation.report.ratio > 1 and generation._cache._free_count == len(generation._cache.pages)


def test_a_crowded_cache_delays_but_loses_nothing(fresh_seed, monkeypatch):
    model = gpt(config()).eval()
    prompts = prompts_of(20, 31, 7, 25)
    room = []
    make_room = Generation._make_room
    monkeypatch.setattr(Generation, "_make_room", lambda self: (room.append(1), make_room(self)))
    generation = Generation(loaded(model, eod=-1), prompts, 24)
    generation._cache._free_count.fill_(14)  # of 60: too few for all at once
    found = gathered(generation, len(prompts))
    assert found == [without_cache(model, p, 24, eod=-1) for p in prompts]
    assert room, "nobody had to give way: nothing was tested"
    assert generation._cache._free_count == 14 and not generation._cache.dry


def test_a_sequence_that_ends_makes_room(fresh_seed):
    """Its last token is read when the next step has been launched already, and has found the pool dry."""
    model = gpt(config(), DMCConfig(dmc_stage="retrofit", dmc_init_val=9.0)).eval()  # appends every token
    while True:
        prompts = prompts_of(12, 3)
        expected = [without_cache(model, p, 9, eod=-1) for p in prompts]
        end = expected[1][4]  # comes with the step before the one for which the other sequence needs more pages
        if end not in expected[0] + expected[1][:4]:
            break
    generation = Generation(loaded(model, eod=end), prompts, 9)
    generation._cache._free_count.fill_(8)  # one page a head for each, or two for one
    assert gathered(generation, 2) == [expected[0], expected[1][:4]]
    assert generation._cache._free_count == 8 and not generation._cache.dry


def test_a_cache_too_small_for_one_sequence_says_so(fresh_seed):
    model = gpt(config(), DMCConfig(dmc_stage="retrofit", dmc_init_val=9.0)).eval()  # appends every token
    generation = Generation(loaded(model, eod=-1), prompts_of(30), 9)
    generation._cache._free_count.fill_(7)
    with pytest.raises(DMCError, match="too few for prompt 0 alone, at 30 tokens"):
        list(generation)
    generation = Generation(loaded(model, eod=-1), prompts_of(14), 9)
    generation._cache._free_count.fill_(5)
    with pytest.raises(DMCError, match="too few for prompt 0 alone, at 17 tokens"):
        list(generation)


def test_sampling_is_repeatable(fresh_seed):
    model, prompts = gpt(config()).eval(), prompts_of(3, 8)
    runs = [gathered(Generation(loaded(model), prompts, 12, Sampling(2.0, 0, 0.9, seed)), 2) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_mistakes_name_the_argument(fresh_seed):
    model = gpt(config()).eval()
    for arguments, message in (
        (([[1], []], 5), "the prompt has no tokens"),
        (([], 5), "there is no prompt"),
        (([[1]], 0), "max_new_tokens must be at least 1; got 0"),
        (([[1]], 5, Sampling(top_k=60)), "top_k must be below the vocabulary's 60"),
    ):
        with pytest.raises(DMCError, match=message):
            Generation(loaded(model), *arguments)
    with pytest.raises(DMCError, match="slots must be at least 1"):
        Generation(loaded(model), [[1]], 5, slots=0)
    with pytest.raises(DMCError, match="GiB are too little"):
        Generation(loaded(model), [[1]], 5, cache_gib=1e-6)
    shape = cache_shape(model, slots=1, max_tokens=9)
    with pytest.raises(DMCError, match="the cache has 1 layers, the model 2"):
        PagedContext(model, PagedCache(type(shape)(1, 1, 4, 2, 8, 9, 12), 9, dtype=torch.float32, device="cuda"))
    other = type(shape)(2, 1, 4, 2, 8, 9, 5)
    context = PagedContext(model, PagedCache(other, 9, dtype=torch.float32, device="cuda"))
    context.begin(torch.tensor([0], device="cuda"))
    with pytest.raises(DMCError, match="windows of 5 tokens, the model merges over 12"):
        model(torch.tensor([[1]], device="cuda"), context.positions(), None, inference_context=context)
