"""Megatron's dynamic engine over the paged cache: requests that come, go, give way, or cannot be served."""

import gc
import math
import random
import re
from types import SimpleNamespace

import pytest
import torch
from test_layer import POSITIONS, YARN, config, gpt

from megatron_dmc.cache import PagedCache
from megatron_dmc.checkpoint import LoadedModel
from megatron_dmc.config import DMCConfig, DMCError
from megatron_dmc.engine import DMCInferenceContext, PageAccount

pytestmark = pytest.mark.usefixtures("megatron")
VOCABULARY, END = 60, 7


class Letters:
    """A tokenizer of 60 characters."""

    vocab_size, eod, bos = VOCABULARY, END, None

    def tokenize(self, text):
        return [ord(c) - 48 for c in text]

    def detokenize(self, tokens, **_):
        return "".join(chr(48 + t) for t in tokens)


def model_of(offset=0.1, **changes):
    """Of decisions both ways; with a larger offset, few tokens merge."""
    return gpt(config(**changes), DMCConfig(dmc_stage="retrofit", dmc_init_val=offset)).eval()


def serve(model, pages=None, **settings):
    """An LLM for a model; `pages` of the pool for each head."""
    from megatron_dmc.context import cache_shape
    from megatron_dmc.llm import LLM

    settings = dict(max_requests=4, max_step_tokens=16, max_sequence_length=60, cache_gib=0.02) | settings
    if pages is not None:
        sizes = dict(slots=settings["max_requests"], max_tokens=settings["max_sequence_length"])
        shape = cache_shape(model, **sizes, fp8=settings.get("cache_fp8", False))
        dtype = next(model.parameters()).dtype
        settings["cache_gib"] = PagedCache.gib_of(shape, dtype, pages * shape.layers * shape.kv_heads)
    args = SimpleNamespace(position_embedding_type="rope", max_position_embeddings=64)
    return LLM(LoadedModel(model, Letters(), args, None), **settings)


@torch.no_grad()
def without_cache(model, prompt, count, stop=(), end=END):
    """Greedy, the whole sequence again for every token, up to the end token or a stop word."""
    tokens, found = list(prompt), []
    while len(found) < count:
        positions = torch.arange(len(tokens), device="cuda")[None]
        logits = model(torch.tensor([tokens], device="cuda"), positions, None, runtime_gather_output=True)
        found.append(int(logits[0, -1, :VOCABULARY].argmax()))
        tokens.append(found[-1])
        if found[-1] == end or any(found[-len(word) :] == word for word in stop):
            break
    return found


def greedy(count, **changes):
    from megatron.core.inference.sampling_params import SamplingParams

    return SamplingParams(**{**dict(top_k=1, num_tokens_to_generate=count), **changes})


def prompts_of(*lengths):
    return [[t if t != END else END + 1 for t in torch.randint(0, VOCABULARY, (n,)).tolist()] for n in lengths]


def reason(request):
    """Why a request failed."""
    (error,) = (event.payload for event in request.events if "ERROR" in event.type.name)
    assert not error.is_transient
    return str(error)


def everything_returned(llm):
    cache = llm.context.cache
    statistics = cache.statistics()
    assert statistics.pages_free == statistics.pages and not cache.dry
    assert (cache.table[:, :-1] == -1).all()
    assert sorted(cache._free[: statistics.pages].tolist()) == list(range(statistics.pages))
    assert llm.context.kv_block_allocator.total_avail == cache.shape.slots
    heads = cache.shape.layers * cache.shape.kv_heads
    assert llm.context.account.free == pytest.approx(statistics.pages / heads, rel=1e-9)
    assert not llm.engine.requests and not llm.engine.waiting_request_ids


@pytest.fixture
def careless(monkeypatch):
    """Requests are admitted whatever those that run will still need."""
    monkeypatch.setattr(PageAccount, "peak", lambda self, prompt, answer: 0.0)


@pytest.mark.parametrize("pages", [None, 4])
def test_text_does_not_depend_on_company(fresh_seed, pages, careless):
    """Chunks, decoding and, in a small pool, requests that give way: the same tokens as alone and without a cache."""
    model = model_of(1.0)
    prompts = prompts_of(3, 20, 1, 9, 30, 2, 2, 40, 17, 16, 33, 5)
    expected = [without_cache(model, prompt, 18) for prompt in prompts]
    llm = serve(model, pages)
    results = llm.generate(prompts, greedy(18))
    assert [list(r.generated_tokens) for r in results] == expected
    assert [r.prompt_tokens.tolist() for r in results] == prompts
    assert (llm.engine.evicted_request_count > 0) == (pages is not None)
    everything_returned(llm)
    assert 1 < llm.context.account.ratio < 60


def test_the_peak_of_running_requests(fresh_seed):
    """As found by letting them run, token by token, until they end."""
    draw = random.Random(fresh_seed)
    for _ in range(100):
        slots, rate = draw.randint(0, 6), draw.choice([0.25, 0.5])
        account = PageAccount.empty(1000.0, slots, 16)
        account.rate = rate  # of pages that a request holds, the last one is half full
        for slot in range(slots):
            prompt, answer = draw.randint(1, 20), draw.randint(1, 20)
            seen = draw.choice([0, draw.randint(1, prompt), draw.randint(prompt, prompt + answer)])
            account.expected[slot], account.tokens[slot] = (prompt, answer), seen
            account.held[slot] = seen * rate + 0.5 if seen else 0.0
        new = draw.randint(1, 20), draw.randint(1, 20)
        running = [[prompt, prompt + answer, max(account.tokens[slot], prompt)]
                   for slot, (prompt, answer) in account.expected.items()] + [[new[0], sum(new), new[0]]]  # fmt: skip
        most = 0.0
        while running:
            most = max(most, sum(0.5 + seen * rate + 1 / 16 for _, _, seen in running))
            running = [[prompt, end, seen + 1] for prompt, end, seen in running if seen < end]
        assert account.peak(*new) == pytest.approx(most)


def test_several_ranks_never_have_less_than_the_account_says(fresh_seed):
    """Whoever gives pages back: it knows only the fewest free, and the most held, of any rank."""
    draw = random.Random(fresh_seed)
    for _ in range(100):
        pools = [draw.randint(60, 80) for _ in range(draw.randint(1, 3))]
        held = [[draw.randint(0, 10) for _ in range(6)] for _ in pools]
        account = PageAccount.empty(min(pools), 6, 16)
        ranks = list(zip(pools, held, strict=True))
        worst = [max(of_slot) for of_slot in zip(*held, strict=True)]
        account.update(min(pool - sum(own) for pool, own in ranks), [worst, [0] * 6, [0] * 6, [0] * 6])
        left = list(range(6))
        while left:
            gone = draw.sample(left, draw.randint(1, len(left)))
            left = [slot for slot in left if slot not in gone]
            free = min(pool - sum(own[slot] for slot in left) for pool, own in ranks)
            assert account.free_without(gone) <= free
            account.release(gone, ())
            assert account.free <= free and (account.free == free or len(pools) > 1)
        assert account.free == min(pools)


@pytest.mark.parametrize("chunk", [15, 16, 17])
def test_a_prompt_goes_on_in_a_pool_that_it_fills(fresh_seed, chunk):
    """However chunks fall on pages, of a prompt that does not merge: what it may take counts once."""
    model = model_of(100.0)
    (prompt,) = prompts_of(42)
    llm = serve(model, 3, max_step_tokens=chunk)
    future = llm.engine.add_request(0, prompt, greedy(6, termination_id=-1))
    for _ in range(12):
        llm.engine.step_modern()
    assert not llm.engine.has_unfinished_requests()
    (request,) = future.result().requests
    assert list(request.generated_tokens) == without_cache(model, prompt, 6, end=-1)
    assert llm.context.account.ratio == 1 and not llm.engine.evicted_request_count
    everything_returned(llm)


def test_text_in_a_crowd(fresh_seed):
    """Two hundred at once, while others come and go, or are given up: the same tokens as without a cache."""
    chance = random.Random(fresh_seed)
    model = model_of(num_layers=2)
    prompts = prompts_of(*[1 + i % 9 for i in range(24)])
    expected = [without_cache(model, prompt, 10) for prompt in prompts]
    llm = serve(model, max_requests=200, max_step_tokens=1024, max_sequence_length=24)
    engine, futures, given_up, at_once = llm.engine, {}, set(), 0
    while len(futures) < 320 or engine.has_unfinished_requests():
        for _ in range(chance.randint(30, 90) if 0 < len(futures) < 320 else 260 - len(futures)):
            futures[len(futures)] = engine.add_request(len(futures), prompts[len(futures) % 24], greedy(10))
        engine.step_modern()
        at_once = max(at_once, llm.context.total_request_count)
        if chance.random() < 0.5 and engine.requests:
            chosen = chance.choice(list(engine.requests))
            engine.cancel(chosen)
            given_up.add(chosen)
    assert at_once > 180  # after a step, in which a few have ended
    for index, future in futures.items():
        if index not in given_up:
            assert [t for r in future.result().requests for t in r.generated_tokens] == expected[index % 24], index
    everything_returned(llm)


def test_admission_leaves_room_to_grow(fresh_seed, monkeypatch):
    """With what is measured of compression hardly anybody has to give way, and yet several run at once."""
    prompts, evicted, at_once = prompts_of(*[20] * 30), [], []
    for _ in range(2):
        torch.manual_seed(fresh_seed)
        llm = serve(model_of(1.0), 6)
        for prompt in prompts:
            llm.engine.add_request(int(next(llm.engine.request_counter)), prompt, greedy(20, termination_id=-1))
        while llm.engine.has_unfinished_requests():
            llm.engine.step_modern()
            at_once.append(llm.context.total_request_count)
        evicted.append(llm.engine.evicted_request_count)
        everything_returned(llm)
        assert max(at_once) > 1
        monkeypatch.setattr(PageAccount, "peak", lambda self, prompt, answer: 0.0)
    foresighted, careless = evicted
    assert foresighted <= 2 and foresighted < careless, evicted


@pytest.fixture
def restless(monkeypatch):
    """Requests give way now and then for no reason, one as soon as two could."""
    make_room, gave_way = DMCInferenceContext._make_room, []

    def evict(context, mask):
        chosen, chunk = make_room(context, mask), context.chunked_prefill_request_id
        ids = context.request_ids[: context.total_request_count].tolist()
        others = [i for i, stays in enumerate(mask.tolist()) if stays and i not in chosen and ids[i] != chunk]
        if len(others) > 1 and (not gave_way or random.random() < 0.2):
            gave_way.append(random.choice(others))
            chosen.append(gave_way[-1])
        return chosen

    monkeypatch.setattr(DMCInferenceContext, "_make_room", evict)


def test_text_and_stop_words(fresh_seed, restless):
    """Also where a request gave way inside of a stop word."""
    model = model_of()
    random.seed(fresh_seed)
    prompts = prompts_of(25, 26, 27, 28, 24, 23)
    free = [without_cache(model, prompt, 20) for prompt in prompts]
    words = [free[i][n : n + 3] for i, n in enumerate((5, 9, 11, 6, 8, 10))]
    words = [word for word in words if len(word) == 3]
    expected = [without_cache(model, prompt, 20, words) for prompt in prompts]
    text = Letters().detokenize
    llm = serve(model, max_requests=6)
    params = greedy(20, stop_words=[text(word) for word in words], detokenize_stop_sequence=True)
    results = llm.generate([text(prompt) for prompt in prompts], params)
    assert [list(r.generated_tokens) for r in results] == expected
    assert llm.engine.evicted_request_count > 0
    everything_returned(llm)
    without = llm.generate(prompts, greedy(20, stop_words=params.stop_words))
    for result, tokens in zip(without, expected, strict=True):
        kept = tokens[:-3] if any(tokens[-3:] == word for word in words) else tokens
        assert list(result.generated_tokens) == kept


def test_arrivals_cancellations_and_evictions(fresh_seed, careless):
    """A thousand requests at random; each is answered once, and every page comes back."""
    chance = random.Random(fresh_seed)
    model = model_of(1.0, num_layers=1, hidden_size=16, ffn_hidden_size=16)
    llm = serve(model, 6, max_requests=8, max_step_tokens=32)
    engine, answered, futures = llm.engine, [], {}
    arrived = 0
    while arrived < 1000 or engine.has_unfinished_requests():
        for _ in range(chance.choice([0, 0, 1, 2, 5]) if arrived < 1000 else 0):
            (prompt,) = prompts_of(chance.choice([1, 2, 7, 20, 45]))
            if chance.random() < 0.05:
                prompt = chance.choice([[], [VOCABULARY], prompt + prompts_of(60)[0]])
            futures[arrived] = engine.add_request(arrived, prompt, greedy(chance.randint(1, 14)))
            futures[arrived].add_done_callback(lambda f: answered.append(f.result().request_id))
            arrived += 1
        if chance.random() < 0.3 and engine.requests:
            engine.cancel(chance.choice(list(engine.requests)))
        if engine.has_unfinished_requests():
            engine.step_modern()
    engine.forget_failed()
    engine._loop.run_until_complete(_nothing())
    assert llm.engine.evicted_request_count > 0
    assert sorted(answered) == list(range(arrived))
    everything_returned(llm)


async def _nothing():
    pass


def test_sampling_is_reproducible_and_probabilities_are_the_models(fresh_seed):
    model = model_of()
    (prompt,) = prompts_of(12)
    params = greedy(6, top_k=0, top_p=0.9, temperature=1.3, return_log_probs=True, top_n_logprobs=3)
    runs = []
    for seed in (1, 1, 2):
        llm = serve(model, prompt_log_probs=True, seed=seed)
        runs.append(llm.generate([prompt] * 3, params))
    tokens = [[list(r.generated_tokens) for r in run] for run in runs]
    assert tokens[0] == tokens[1] != tokens[2]
    request = runs[0][0]
    whole = prompt + list(request.generated_tokens)
    with torch.no_grad():
        positions = torch.arange(len(whole), device="cuda")[None]
        logits = model(torch.tensor([whole], device="cuda"), positions, None, runtime_gather_output=True)[0].float()
    logits[:, VOCABULARY:] = -math.inf
    expected = logits.log_softmax(-1)[torch.arange(len(whole) - 1), whole[1:]]
    found = torch.tensor(request.prompt_log_probs + request.generated_log_probs, device=expected.device)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert len(request.generated_top_n_logprobs) == len(request.generated_tokens)


@pytest.mark.parametrize(
    ("prompt", "changes", "message"),
    [
        ([], {}, "no tokens"),
        ([1, 60], {}, "token 60 does not exist: the vocabulary has 60"),
        ([1, -1], {}, "token -1 does not exist"),
        ("1", dict(add_BOS=True), "add_BOS is set, and the tokenizer has no token that begins a text"),
        ([1, "2"], {}, "it holds '2'"),
        ([1] * 60, {}, "leave no room for an answer"),
        ([1], dict(top_k=0, temperature=0.0), "temperature must be above 0"),
        ([1], dict(top_k=0, temperature=math.nan), "temperature must be above 0"),
        ([1], dict(top_k=60), "top_k must be 0"),
        ([1], dict(top_k=-1), "top_k must be 0"),
        ([1], dict(top_k=0, top_p=1.5), "top_p must be between"),
        ([1], dict(top_k=3, top_p=0.5), "either top_k or top_p"),
        ([1], dict(num_tokens_to_generate=-3), "num_tokens_to_generate must be"),
        ([1, 2], dict(num_tokens_to_generate=None, num_tokens_total=1), "the prompt alone has 2"),
        ([1], dict(num_tokens_total=20), "either num_tokens_to_generate or num_tokens_total"),
        ([1], dict(top_n_logprobs=2), "needs return_log_probs"),
        ([1], dict(return_log_probs=True), "materialize_only_last_token_logits"),
        ([1], dict(stop_words=["a", ""]), "a stop word is empty"),
        ([1] * 20, dict(num_tokens_to_generate=35), "enough for 48 tokens"),
    ],
)
def test_a_request_that_cannot_be_served_fails_alone(prompt, changes, message):
    model = model_of()
    expected = without_cache(model, [3, 4], 4)
    llm = serve(model, 3)
    failed, served = llm.engine.generate([prompt], greedy(4, **changes)) + llm.engine.generate([[3, 4]], greedy(4))
    assert failed[0].failed() and message in reason(failed[0])
    assert list(served[0].generated_tokens) == expected
    everything_returned(llm)


def test_prompts_longer_than_a_step_need_chunks():
    llm = serve(model_of(), enable_chunked_prefill=False)
    (record,) = llm.engine.generate([[1] * 17], greedy(2))
    assert record[0].failed() and "enable_chunked_prefill is off" in reason(record[0])


def test_settings_without_a_counterpart_are_refused():
    from megatron.core.inference.config import AsyncScheduleMode, KVCacheManagementMode

    model = model_of()
    for name, value in dict(
        enable_prefix_caching=True,
        num_speculative_tokens=1,
        unified_memory_level=1,
        kv_cache_management_mode=KVCacheManagementMode.OFFLOAD,
        async_sched_mode=AsyncScheduleMode.ASYNC,
    ).items():
        with pytest.raises(DMCError, match=f"cannot serve with {name}"):
            serve(model, **{name: value})
    with pytest.raises(DMCError, match="too little"):
        serve(model, cache_gib=1e-6)


def test_slots_leave_room_for_pages(monkeypatch):
    """Without `max_requests`, open segments and tables take at most a quarter of the memory."""
    llm = serve(model_of(), cache_gib=0.004, max_requests=None, max_step_tokens=512)
    shape = llm.context.cache.shape
    assert 4 <= shape.slots < 256 and shape.slots % 4 == 0
    assert shape.fixed_bytes(torch.float32) <= 0.3 * 0.004 * 2**30


def test_usage_counts_pages(fresh_seed):
    """What a cache says of its slots, against its tables."""
    from megatron_dmc.cache import CacheShape

    cache = PagedCache(
        CacheShape(2, 3, 2, 2, 8, 40, 4), 60, dtype=torch.float32, device=torch.empty(0, device="cuda").device
    )
    step = cache.begin(torch.tensor([2, 0], device="cuda"), 8)
    step.lengths.copy_(torch.randint(1, 9, step.lengths.shape))
    cache.commit(step)
    step = cache.begin(torch.tensor([2], device="cuda"), 8)
    step.lengths.fill_(16)
    cache.commit(step)
    held, needs = cache.usage()
    assert held.tolist() == (cache.table[:, :3] >= 0).sum((0, 2, 3)).tolist()
    assert needs.tolist() == [0, 0, 4] and cache.free_pages == 60 - held.sum()


@pytest.mark.parametrize("positions", ["yarn", "none", "rope"])
def test_positions_and_streams(fresh_seed, positions):
    """However a model embeds positions, and however its tokens are asked for."""
    cfg = config()
    if positions == "yarn":
        vars(cfg).update(YARN)
    dmc = DMCConfig(dmc_stage="retrofit", dmc_init_val=0.1, dmc_window_size=12 if positions == "rope" else 0)
    model = gpt(cfg, dmc, **POSITIONS[positions]).eval()
    prompts = prompts_of(21, 3, 9)
    expected = [without_cache(model, prompt, 8) for prompt in prompts]
    llm = serve(model, max_requests=2)
    found, ended = [[] for _ in prompts], []
    for index, tokens, last in llm.stream(prompts, greedy(8)):
        found[index] += tokens
        ended += [index] if last else []
    assert found == expected and sorted(ended) == [0, 1, 2]
    everything_returned(llm)
    with pytest.raises(DMCError, match="prompt 1 cannot be served: token 60 does not exist"):
        list(llm.stream([[1], [60]], greedy(8)))
    everything_returned(llm)
    steps = llm.stream(prompts, greedy(8))
    next(steps)
    steps.close()
    everything_returned(llm)


@pytest.mark.parametrize("fp8", [False, True])
def test_bytes_that_are_told(fresh_seed, fp8, capsys):
    """`generate` tells the bytes of the entries that were kept, beside those of a vanilla cache."""
    from megatron_dmc.commands.generate import _report

    model = model_of()
    llm = serve(model, cache_fp8=fp8)
    tokens = sum(20 + 20 - 1 for _ in llm.generate(prompts_of(20, 20), greedy(20, termination_id=-1)))
    _report(llm)
    numbers = [float(x.replace(",", "")) for x in re.findall(r"[0-9][0-9,.]*", capsys.readouterr().err)]
    prompts, seen, entries, ratio, kept, vanilla, *_ = numbers
    heads, channels = model.config.num_layers * model.config.num_query_groups, model.config.kv_channels
    item = next(model.parameters()).dtype.itemsize
    assert (prompts, seen, vanilla) == (2, tokens, tokens * heads * 2 * channels * item)
    entry = 2 * (channels + 4 if fp8 else channels * item)  # with a scale of 4 bytes each for key and value
    assert kept == pytest.approx(entries * 2 * heads * entry, rel=0.05 / entries + 1e-3)
    # `entries` is told to a tenth, the ratio to a hundredth: the rounding of both is all that may lie between.
    assert ratio == pytest.approx(tokens / 2 / entries, rel=0, abs=0.0051 + 0.051 * ratio / entries)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["local", "transformer_engine"])
@pytest.mark.parametrize("fp8", [False, True])
def test_fused_kernels_choose_the_models_tokens(fresh_seed, implementation, fp8):
    """In bfloat16, with chunks, changing batches and CUDA graphs, against a pass over what came out.

    A logit's rounding depends on the batch, and so does a decision at its threshold: a few tokens may differ.
    """
    if implementation == "transformer_engine":
        pytest.importorskip("transformer_engine")
    model = model_of(transformer_impl=implementation, hidden_size=256, params_dtype=torch.bfloat16, bf16=True)
    model, prompts = model.to(torch.bfloat16), prompts_of(1, 5, 40, 17, 2, 16)
    llm = serve(model, cache_fp8=fp8)
    assert llm.controller.captures, "the kernels do not run"
    same = []
    for prompt, result in zip(prompts, llm.generate(prompts, greedy(20, termination_id=-1)), strict=True):
        tokens = torch.tensor([prompt + list(result.generated_tokens)], device="cuda")
        positions = torch.arange(tokens.shape[1], device="cuda")[None]
        with torch.no_grad():
            logits = model(tokens, positions, None, runtime_gather_output=True)[0, :, :VOCABULARY]
        same.append(logits[len(prompt) - 1 : -1].argmax(-1) == tokens[0, len(prompt) :])
    assert torch.cat(same).float().mean() > (0.6 if fp8 else 0.9)
    assert llm.context.account.ratio > 1
    everything_returned(llm)


@pytest.mark.gpu
def test_graphs_of_engines_that_are_gone(monkeypatch):
    """Python finds them whenever it likes; it does not amid a capture, which they would end."""
    from megatron_dmc.engine import WholeStepController

    def a_graph():
        graph, x = torch.cuda.CUDAGraph(), torch.zeros(1, device="cuda")
        with torch.cuda.graph(graph):
            x.add_(1)
        return graph

    model = model_of(1.0, hidden_size=256, ffn_hidden_size=256, params_dtype=torch.bfloat16).bfloat16()
    graphs, run_step, amid = [a_graph() for _ in range(40)], WholeStepController._run_step, []

    def lose_one(*args):
        amid.append(torch.cuda.is_current_stream_capturing())
        cycle = [graphs.pop()]
        cycle.append(cycle)  # so that the garbage collector alone destroys it
        del cycle
        gc.set_threshold(1)
        try:
            run_step(*args)
        finally:
            gc.set_threshold(*threshold)

    threshold = gc.get_threshold()
    monkeypatch.setattr(WholeStepController, "_run_step", lose_one)
    llm = serve(model, 4, cuda_graphs=4)
    assert sum(amid) == len(llm.controller._graphs) > 1 and gc.isenabled()


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [False, True])
def test_graphs_and_kernels(fresh_seed, fp8, careless):
    """On kernels, steps as CUDA graphs give the tokens of steps without; nothing is lost of either."""
    model = model_of(1.0, hidden_size=256, ffn_hidden_size=256, params_dtype=torch.bfloat16).bfloat16()
    prompts = prompts_of(3, 20, 1, 9, 30, 2, 2, 40, 17, 16, 33, 5)
    found = []
    for captures in (True, False):
        llm = serve(model, 4, cuda_graphs=4, cache_fp8=fp8)
        assert llm.controller.captures and len(llm.controller._graphs) == len(llm.context.cuda_graph_token_counts) > 1
        llm.controller.captures = captures
        found.append([list(r.generated_tokens) for r in llm.generate(prompts, greedy(18))])
        assert llm.engine.evicted_request_count > 0
        everything_returned(llm)
    assert found[0] == found[1]
