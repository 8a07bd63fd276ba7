"""DMC models as folders of Hugging Face: this project's logits and tokens, through a cache that is truly smaller."""

import ast
import copy
import importlib
import json
import shutil
from dataclasses import asdict
from itertools import pairwise

import pytest
import torch
from runs import UNDECIDED, dmc, saved_arguments, train
from test_convert import MODELS, SIZES, assert_same_bits, change, make, tensors

from megatron_dmc.config import DMCConfig, DMCError

SETTINGS = DMCConfig(dmc_stage="finetune", dmc_cr=3.0, dmc_init_val=0.1, dmc_window_size=5, dmc_temp=0.3)
"""With the random weights of `make`, about half of the tokens merge."""

VOCABULARY = 257
GREEDY = dict(do_sample=False, pad_token_id=0, eos_token_id=None)


@pytest.fixture(scope="module", autouse=True)
def code_of_folders(tmp_path_factory):
    """Where transformers copies the code to that it runs; Python remembers the first such place."""
    from transformers import dynamic_module_utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from megatron_dmc.commands.prepare_data import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["some text"], VOCABULARY, str(folder))
    return folder


def checkpoint(folder, name, tokenizer, settings=SETTINGS, **changes):
    """A checkpoint of Megatron of a random DMC model, and the plain folder of Hugging Face with its weights."""
    from megatron_dmc.convert import to_megatron
    from megatron_dmc.exported import with_dmc

    model_type, sizes = MODELS[name]
    plain = folder / "plain"
    make(plain, model_type, **sizes | changes)
    shutil.copytree(plain, folder / "begin")
    shutil.copytree(tokenizer, folder / "begin", dirs_exist_ok=True)
    config = json.loads((plain / "config.json").read_text())
    (folder / "begin" / "config.json").write_text(json.dumps(with_dmc(config, settings)))
    to_megatron(folder / "begin", folder / "megatron")
    return folder / "megatron", plain


def exported(source, target):
    from transformers import AutoModelForCausalLM

    from megatron_dmc.convert import to_hugging_face

    _, notes = to_hugging_face(source, target)
    assert "trust_remote_code" in notes
    return AutoModelForCausalLM.from_pretrained(target, trust_remote_code=True)


def code():
    from megatron_dmc.remote_code import modeling_dmc

    return modeling_dmc


def model_of(name="llama-2", **settings):
    """A model of the folder's code, in float64, with random weights."""
    model_type, sizes = MODELS[name]
    family = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[model_type]
    config = getattr(code(), f"DMC{family}Config")(**SIZES | sizes | asdict(SETTINGS) | settings)
    model = getattr(code(), f"DMC{family}ForCausalLM")(config).double().eval()
    with torch.no_grad():
        for parameter, weight in model.named_parameters():
            weight.normal_(mean=float("norm" in parameter), std=0.2)
    return model


def random_tokens(*shape):
    return torch.randint(3, VOCABULARY, shape)


def decided_tokens(model, *shape):
    """Random tokens for which no decision is so close to its threshold that rounding could turn it."""
    margins = []

    def measure(module, args, output):
        margins.append((output.unflatten(-1, (-1, module.dim))[..., -1] - model.config.dmc_init_val).abs().min().item())

    hooks = []
    for layer in model.model.layers:
        source = getattr(layer.self_attn, "k_norm", layer.self_attn.k_proj)
        source.dim = layer.self_attn.head_dim
        hooks.append(source.register_forward_hook(measure))
    try:
        for _ in range(200):
            tokens = torch.randint(3, model.config.vocab_size, shape)
            margins.clear()
            with torch.no_grad():
                model(tokens, use_cache=False)
            if min(margins) > 5e-5:
                return tokens
    finally:
        for hook in hooks:
            hook.remove()
    raise AssertionError("no tokens with clear decisions")


def cache_of(output):
    return output["cache" if "cache" in output else "past_key_values"]


def entries_of(cache):
    return sum(int(layer.lengths.sum()) for layer in cache.layers)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits_and_round_trip(name, megatron, fresh_seed, tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM

    from megatron_dmc.checkpoint import load
    from megatron_dmc.convert import to_megatron

    middle, plain = checkpoint(tmp_path, name, tokenizer)
    model = exported(middle, tmp_path / "exported")
    assert_same_bits(tmp_path / "exported", plain)
    assert json.loads((tmp_path / "exported" / "config.json").read_text()) == json.loads(
        (tmp_path / "begin" / "config.json").read_text()
    )
    assert (tmp_path / "exported" / "tokenizer.json").is_file()

    tokens = decided_tokens(model, 2, 100)
    loaded = load(middle)
    assert loaded.dmc == SETTINGS
    positions = torch.arange(100, device=loaded.device).expand(2, -1)
    expected = loaded.model(tokens.to(loaded.device), positions, None).cpu()
    output = model(tokens)
    assert 1.3 < cache_of(output).ratio < 3
    largest = expected.abs().max().item()
    assert (output.logits - expected).abs().max() < 1e-4 * largest
    uncompressed = AutoModelForCausalLM.from_pretrained(plain)(tokens).logits
    assert (uncompressed - expected).abs().max() > 1e-2 * largest

    # What transformers saves again is such a folder, too.
    model.save_pretrained(tmp_path / "saved")
    shutil.copytree(tokenizer, tmp_path / "saved", dirs_exist_ok=True)
    to_megatron(tmp_path / "saved", tmp_path / "again")
    again = load(tmp_path / "again")
    assert again.dmc == SETTINGS
    assert torch.equal(again.model(tokens.to(loaded.device), positions, None).cpu(), expected)
    exported(tmp_path / "again", tmp_path / "back")
    assert_same_bits(tmp_path / "back", plain)


def test_greedy_search_is_the_engines(megatron, fresh_seed, tokenizer, tmp_path):
    from megatron.core.inference.sampling_params import SamplingParams

    from megatron_dmc.checkpoint import load
    from megatron_dmc.llm import LLM

    middle, _ = checkpoint(tmp_path, "qwen2.5", tokenizer, vocab_size=VOCABULARY)
    model = exported(middle, tmp_path / "exported")
    loaded = load(middle)
    llm = LLM(
        loaded, max_requests=4, max_step_tokens=16, max_sequence_length=100, cache_gib=0.02, use_coordinator=False
    )
    prompts = [random_tokens(length).tolist() for length in (1, 30, 7)]
    results = llm.generate(prompts, SamplingParams(top_k=1, num_tokens_to_generate=25))
    for prompt, result in zip(prompts, results, strict=True):
        found = model.generate(
            torch.tensor([prompt]), max_new_tokens=25, **GREEDY | dict(eos_token_id=loaded.tokenizer.eod)
        )
        assert found[0, len(prompt) :].tolist() == list(result.generated_tokens)


@pytest.mark.parametrize("window", [0, 1, 2, 5, 12])
@torch.no_grad()
def test_attention_and_entries_are_the_references(window, fresh_seed, monkeypatch):
    """Of calls of any lengths, and however few scores are in memory at a time."""
    from megatron_dmc.ops import reference

    modeling, softmax, scores = code(), torch.Tensor.softmax, []
    monkeypatch.setattr(modeling, "SCORES", 700)
    monkeypatch.setattr(torch.Tensor, "softmax", lambda x, dim: scores.append(x.numel()) or softmax(x, dim))
    s, b, h, g, d = 50, 2, 6, 3, 8
    query, key, value = (torch.randn(s, b, n, d, dtype=torch.float64) for n in (h, g, g))
    key[..., -1] += 0.6  # longer runs of merges than the window
    angles = torch.arange(s)[:, None] * torch.rand(d // 2)
    settings = dict(window=window, offset=0.1, scale=0.3)
    expected, alpha = reference.dmc_attention(query, key, value, (angles.cos(), angles.sin()), **settings)
    runs = torch.cat([torch.zeros(1, b, g), alpha]).bool()
    assert any(runs[i : i + 5].all(0).any() for i in range(s - 4)) and 0.4 < alpha.mean() < 0.9
    stored = reference.DMCCache.empty(b, g, d, dtype=torch.float64, device="cpu")
    reference.dmc_attention_cached(query, key, value, (angles.cos(), angles.sin()), stored, **settings)

    def attend(slices, layer):
        parts = [
            modeling.dmc_attention(
                *(x[t].permute(1, 2, 0, 3) for x in (query, key, value)),
                *(x[None, t].double() for x in (angles.cos(), angles.sin())),
                torch.ones(b, len(query[t]), dtype=torch.bool),
                layer,
                **settings,
            )
            for t in slices
        ]
        return torch.cat(parts, 1).transpose(0, 1)

    scores.clear()
    torch.testing.assert_close(attend([slice(0, s)], None), expected)
    assert max(scores) <= 700 < sum(scores)
    borders = [0, *sorted(torch.randperm(s - 1)[:6].add(1).tolist()), s]
    chunks = [slice(*pair) for pair in pairwise(borders)]
    for slices in ([slice(t, t + 1) for t in range(s)], chunks):
        layer = modeling.DMCCacheLayer()
        torch.testing.assert_close(attend(slices, layer), expected)
        assert torch.equal(layer.lengths, stored.lengths) and layer.tokens == s
        assert layer.keys.shape == layer.values.shape == (b, g, int(stored.lengths.max()), d)
        for i in range(b):
            for j in range(g):
                used = slice(0, int(stored.lengths[i, j]))
                torch.testing.assert_close(layer.keys[i, j, used], stored.entries[0, i, j, used])
                torch.testing.assert_close(layer.values[i, j, used], stored.entries[1, i, j, used])
        for mine, theirs in zip(layer.tail, stored.tail, strict=True):
            torch.testing.assert_close(mine.movedim(2, 0), theirs, check_dtype=mine.dtype != torch.bool)


@pytest.mark.parametrize("name", ["llama-3.1", "mistral", "qwen2.5", "qwen3, tied"])
@torch.no_grad()
def test_calls_of_any_length(name, fresh_seed):
    model = model_of(name)
    tokens = decided_tokens(model, 2, 40)
    expected = model(tokens, use_cache=False).logits
    for lengths in ([1] * 40, [40], [17, 1, 1, 9, 12]):
        cache, logits = model.new_cache(), []
        for part in tokens.split(lengths, 1):
            logits.append(model(part, past_key_values=cache).logits)
        torch.testing.assert_close(torch.cat(logits, 1), expected)
        assert cache.get_seq_length() == 40 and cache.ratio > 1.2


@torch.no_grad()
def test_half_precision(fresh_seed):
    """Entries take the model's dtype, sums float32; rotation is as exact as in float32."""
    model = model_of("qwen3, tied").bfloat16()
    tokens = random_tokens(1, 700)
    angles = {}
    model.model.rotary_emb.register_forward_hook(lambda module, args, output: angles.update(tables=output))
    cache = cache_of(model(tokens))
    assert all(table.dtype == torch.float32 for table in angles["tables"])
    for layer in cache.layers:
        assert layer.keys.dtype == layer.values.dtype == torch.bfloat16
        assert [x.dtype for x in layer.tail] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.bool]


def greedy_without_cache(model, tokens, count):
    for _ in range(count):
        tokens = torch.cat([tokens, model(tokens, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return tokens


def padded(*rows):
    """Rows of tokens of different lengths, padded on the left, and their mask."""
    longest = max(row.shape[1] for row in rows)
    tokens = torch.cat([torch.nn.functional.pad(row, (longest - row.shape[1], 0), value=1) for row in rows])
    mask = torch.cat([torch.arange(longest)[None] >= longest - row.shape[1] for row in rows]).long()
    return dict(input_ids=tokens, attention_mask=mask)


@pytest.mark.parametrize("window", [5, 0])
@torch.no_grad()
def test_padded_batches(window, fresh_seed):
    """Every sequence as if it were alone: absolute positions count, since DMC clears a rotated channel."""
    model = model_of("mistral", dmc_window_size=window)
    rows = [decided_tokens(model, 1, length) for length in (3, 11, 24)]
    batch = padded(*rows)
    cache = model.new_cache()
    logits = model(**batch, past_key_values=cache).logits
    alone = [greedy_without_cache(model, row, 15) for row in rows]
    for i, row in enumerate(rows):
        torch.testing.assert_close(logits[i, -row.shape[1] :], model(row).logits[0])
    torch.testing.assert_close(model(**batch, use_cache=False).logits[:, -3:], logits[:, -3:])
    assert cache.seen.tolist() == [3, 11, 24] and cache.get_seq_length() == 24
    lengths = [cache_of(model(row)).layers[1].lengths[0] for row in rows]
    assert torch.equal(cache.layers[1].lengths, torch.stack(lengths))
    for options in ({}, dict(prefill_chunk_size=4), dict(past_key_values=model.new_cache()), dict(use_cache=False)):
        found = model.generate(**batch, max_new_tokens=15, **options, **GREEDY)
        for i, (row, want) in enumerate(zip(rows, alone, strict=True)):
            assert torch.equal(found[i, 24 - row.shape[1] :], want[0]), (options, i)


@torch.no_grad()
def test_beams_and_samples(fresh_seed):
    """The same as without a cache: beams change places, and sequences have several answers."""
    model = model_of("llama-3.1")
    batch = padded(*(decided_tokens(model, 1, length) for length in (5, 12)))
    for options in (
        dict(do_sample=False, num_beams=4, num_return_sequences=3, length_penalty=0.3),
        dict(do_sample=True, num_return_sequences=3, temperature=2.0, top_k=30),
    ):
        found = []
        for use_cache in (True, False):
            torch.manual_seed(fresh_seed)
            found.append(
                model.generate(
                    **batch, max_new_tokens=14, use_cache=use_cache, pad_token_id=0, eos_token_id=9, **options
                )
            )
        assert torch.equal(*found), options
        assert len({tuple(row.tolist()) for row in found[0]}) > 3


@pytest.mark.parametrize("window", [5, 0])
@torch.no_grad()
def test_sequences_change_places(window, fresh_seed):
    model = model_of("qwen2.5", dmc_window_size=window)
    tokens = decided_tokens(model, 3, 30)

    def rest(move, rows):
        cache = model.new_cache()
        model(tokens[:, :20], past_key_values=cache)
        move(cache)
        logits = model(tokens[rows, 20:], past_key_values=cache).logits
        longest = [int(layer.lengths.max()) for layer in cache.layers]
        assert [layer.keys.shape[2] for layer in cache.layers] == longest
        return logits

    expected = model(tokens).logits[:, 20:]
    for move, rows in (
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ):
        torch.testing.assert_close(rest(move, rows), expected[rows])
    cache = model.new_cache()
    model(tokens[:, :20], past_key_values=cache)
    kept = copy.deepcopy(cache)
    model(tokens[:, 20:], past_key_values=cache)
    torch.testing.assert_close(model(tokens[:, 20:], past_key_values=kept).logits, expected)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.ratio == 1 and cache.allocated_bytes == 0
    torch.testing.assert_close(model(tokens[:1], past_key_values=cache).logits[:, 20:], expected[:1])


@torch.no_grad()
def test_conversation(fresh_seed):
    """`generate` goes on from the cache of the turn before."""
    model = model_of("llama-2")
    cache, turns = model.new_cache(), random_tokens(2, 9)
    for _ in range(3):
        mask = torch.ones_like(turns)  # by its own, `generate` would take answers of 0 for padding
        answer = model.generate(turns, attention_mask=mask, past_key_values=cache, max_new_tokens=7, **GREEDY)
        assert cache.get_seq_length() == answer.shape[1] - 1
        assert torch.equal(answer, greedy_without_cache(model, turns, 7))
        turns = torch.cat([answer, random_tokens(2, 5)], 1)


@torch.no_grad()
def test_memory_falls(fresh_seed):
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    model = model_of("llama-2")
    # Decisions of some heads by their bias, of others by their tokens.
    for layer in model.model.layers:
        bias = torch.nn.Parameter(torch.zeros(layer.self_attn.k_proj.out_features, dtype=torch.float64))
        bias.view(-1, layer.self_attn.head_dim)[:, -1] = torch.tensor([1.5, 1.0, 0.5, 0.5])
        layer.self_attn.k_proj.bias = bias
    tokens = random_tokens(2, 500)
    cache = cache_of(model(tokens))
    plain = LlamaForCausalLM(LlamaConfig(**SIZES | MODELS["llama-2"][1])).double().eval()
    full = DynamicCache(config=plain.config)
    plain(tokens, past_key_values=full)
    uncompressed = sum(layer.keys.nbytes + layer.values.nbytes for layer in full.layers)

    layers, sequences, heads, d, size = 3, 2, 4, 16, 8
    entries = entries_of(cache)
    assert cache.ratio == pytest.approx(layers * sequences * heads * 500 / entries) and cache.ratio > 1.5
    assert cache.entry_bytes == entries * 2 * d * size == pytest.approx(uncompressed / cache.ratio)
    longest = sum(int(layer.lengths.max()) for layer in cache.layers)
    tail = layers * sequences * heads * (SETTINGS.dmc_window_size - 1) * ((2 * d + 1) * size + 1)
    assert cache.allocated_bytes == longest * sequences * heads * 2 * d * size + tail < uncompressed
    # Nothing larger is held by what views share.
    stored = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for layer in cache.layers
              for x in (layer.keys, layer.values, *layer.tail)}  # fmt: skip
    assert sum(stored.values()) == cache.allocated_bytes
    assert cache.seen.tolist() == [500, 500]


REPORT = dict(tokens=12345, window=64, compression_ratio=3.987, loss_compressed=2.0123, loss_uncompressed=1.9876)


def test_trained_checkpoint(megatron, fresh_seed, tmp_path):
    """Half of a retrofit, from the command line: its logits, and a card that says what is known."""
    from transformers import AutoModelForCausalLM

    from megatron_dmc.checkpoint import load

    run = train(
        "--train-iters", 6, "--exit-interval", 3, "--save", tmp_path / "trained", "--save-interval", 3,
        "--dmc-stage", "retrofit", *UNDECIDED, "--dmc-cr", 5, "--dmc-window-size", 0,
    )  # fmt: skip
    report = tmp_path / "report.json"
    report.write_text(json.dumps(REPORT))
    done = dmc("convert", tmp_path / "trained", tmp_path / "out", "--report", report)
    assert done.code == 0 and "trust_remote_code=True" in done.output, done.output
    card = (tmp_path / "out" / "README.md").read_text()
    offset = saved_arguments(tmp_path / "trained").dmc_init_val
    assert offset != 0.1  # it has moved
    for line in (
        "| Model | llama, 4 layers, 4 query heads, 2 KV heads of 8 channels |",
        "| Compression ratio, target | 5 tokens per cache entry |",
        "| Window of a merge | no limit |",
        f"| Decision offset | {offset:g} |",
        "| Stage | retrofit, not finished: it asked for a ratio of 2.33 so far |",
        f"| Compression ratio, last training step | {run.values('compression ratio')[-1]:.2f} |",
        "| Iterations of this stage | 3 of 6 |",
        "| Tokens trained in this stage | 576 (24 samples of 24) |",
        "| Loss with the compressed cache (12,345 held-out tokens in windows of 64, nats per token) | 2.0123, at 3.99 ",
        "| Stages before | unknown: ",
        "on transformers 5.0 or later",
    ):
        assert line in card, card
    assert run.values("target compression ratio")[-1] == pytest.approx(7 / 3)
    assert run.values("compression ratio")[-1] > 1.02

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    tokens = decided_tokens(model, 2, 24)
    loaded = load(tmp_path / "trained")
    with torch.no_grad():
        positions = torch.arange(24, device=loaded.device).expand(2, -1)
        expected = loaded.model(tokens.to(loaded.device), positions, None).cpu()
        output = model(tokens)
    assert cache_of(output).ratio > 1.05
    assert (output.logits - expected).abs().max() < 1e-4 * expected.abs().max()


def test_cards_of_other_checkpoints():
    from argparse import Namespace

    from megatron_dmc.exported import model_card
    from megatron_dmc.families import Architecture

    model = Architecture("qwen3", 2, 32, 64, 4, 2, 8, 61, 128, 1e-5, 10000, None, False)
    finished = Namespace(train_iters=1000, consumed_train_samples=8000, seq_length=4096, dmc_merge_rate=0.75)
    card = model_card(model, SETTINGS, dict(args=finished, iteration=1000))
    for line in (
        "| Stage | finetune |",
        "| Iterations of this stage | 1,000 of 1,000 |",
        "| Tokens trained in this stage | 32,768,000 (8,000 samples of 4,096) |",
        "| Compression ratio, last training step | 4.00 |",
        "| Window of a merge | 5 tokens |",
    ):
        assert line in card, card
    card = model_card(model, SETTINGS, dict(args=Namespace(train_iters=None), iteration=0))
    assert "| Iterations, tokens trained | unknown: " in card and "last training step | unknown |" in card
    assert "| Losses | unknown: " in card and "None" not in card


def test_reports_that_are_refused(tmp_path):
    from megatron_dmc.exported import read_report

    path = tmp_path / "report.json"
    path.write_text(json.dumps(REPORT))
    assert read_report(path) == REPORT
    path.write_text(json.dumps(REPORT | dict(loss_compressed=None)))
    with pytest.raises(DMCError, match="has no loss_compressed: give the report"):
        read_report(path)


def test_files_of_the_folder(fresh_seed, tokenizer, tmp_path):
    """Code that stands alone; what an earlier conversion left goes, what is the user's stays."""
    from setuptools import find_packages

    from megatron_dmc.convert import to_hugging_face, to_megatron

    middle, plain = checkpoint(tmp_path, "mistral", tokenizer)
    target = tmp_path / "target"
    target.mkdir()
    (target / "README.md").write_text("mine")
    _, notes = to_hugging_face(middle, target, overwrite=True)
    assert (target / "README.md").read_text() == "mine" and "no model card" in notes
    for name in ("configuration_dmc.py", "modeling_dmc.py"):
        for node in ast.walk(ast.parse((target / name).read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = ["configuration_dmc" if node.level else node.module]
            known = ("torch", "transformers", "configuration_dmc", "__future__", "inspect", "collections", "typing")
            assert {found.split(".")[0] for found in names} <= set(known)
    assert "megatron_dmc.remote_code" in find_packages(".", include=["megatron_dmc*"])

    (target / "README.md").unlink()
    to_hugging_face(middle, target, overwrite=True)
    assert "Dynamic Memory Compression" in (target / "README.md").read_text()
    to_megatron(plain, tmp_path / "plain-megatron")
    # Without DMC the original's configuration serves as well, less what is DMC's.
    to_hugging_face(tmp_path / "plain-megatron", target, like=tmp_path / "begin", overwrite=True)
    assert not {"README.md", "modeling_dmc.py", "configuration_dmc.py"} & {path.name for path in target.iterdir()}
    assert json.loads((target / "config.json").read_text()) == json.loads((plain / "config.json").read_text())
    assert tensors(target).keys() == tensors(plain).keys()


@torch.no_grad()
def test_what_is_refused(fresh_seed):
    from transformers import DynamicCache, StaticCache

    model = model_of("qwen3, tied")
    tokens = random_tokens(2, 6)
    mask = torch.ones(2, 6, dtype=torch.long)
    hole, right = mask.clone(), mask.clone()
    hole[0, 2], right[1, 4:] = 0, 0

    def filled(mask=mask):
        cache = model.new_cache()
        model(tokens, attention_mask=mask, past_key_values=cache)
        return cache

    def after(given, **options):
        model(tokens[:, :2], attention_mask=given, past_key_values=filled(), **options)

    left, longer = mask.clone(), torch.ones(2, 8, dtype=torch.long)
    left[0, :3] = 0
    positions = torch.arange(6)[None] + 1
    for act, message in (
        (lambda: model(tokens, attention_mask=hole), 'tokenizer.padding_side = "left"'),
        (lambda: model(tokens, attention_mask=right), 'tokenizer.padding_side = "left"'),
        (lambda: model(tokens, attention_mask=mask[:, None, None].expand(2, 1, 6, 6)), "got (2, 1, 6, 6)"),
        (lambda: after(mask[:, :2]), "must be [sequences, tokens] = (2, 8), of the 6 tokens in the cache and the 2"),
        (lambda: after(torch.cat([left, mask[:, :2]], 1)), "tells of [3, 6] tokens in the cache, and there are [6, 6]"),
        (lambda: model(tokens, position_ids=positions), "leave position_ids out"),
        (lambda: model(tokens, output_attentions=True), "output_attentions"),
        (lambda: model(tokens, past_key_values=DynamicCache(config=model.config)), "given a DynamicCache"),
        (lambda: model(tokens, past_key_values=StaticCache(model.config, max_cache_len=9)), "given a StaticCache"),
        (lambda: model(tokens[:1], past_key_values=filled()), "holds 2 sequences and was given tokens of 1"),
        (lambda: filled().crop(3), "cannot be cropped"),
        (lambda: filled().update(torch.ones(2, 2, 1, 24), torch.ones(2, 2, 1, 24), 0), "merges by the queries"),
        (lambda: model.generate(tokens, max_new_tokens=2, cache_implementation="static"), "leave cache_implementation"),
        (lambda: model.generate(tokens[:1], max_new_tokens=2, prompt_lookup_num_tokens=2), "assisted decoding"),
        (lambda: model_of("llama-2", dmc_window_size=None), "got None and 0.1"),
        (lambda: model_of("llama-2", dmc_window_size=-1), "got -1 and 0.1"),
        (lambda: model_of("llama-2", dmc_init_val="5"), "got 5 and '5'"),
    ):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            act()
        assert message in str(error.value)
    after(longer)
    model(tokens, position_ids=positions - 1)
    filled(left)
    model.train()
    with pytest.raises(ValueError, match=r"call model\.eval\(\)"):
        model(tokens)


def test_older_versions_are_refused(monkeypatch):
    import transformers

    from megatron_dmc.remote_code import configuration_dmc

    for version, allowed in (("4.57.6", False), ("5.0.0", True), ("5.1.0.dev0", True)):
        monkeypatch.setattr(transformers, "__version__", version)
        if allowed:
            importlib.reload(configuration_dmc)
        else:
            with pytest.raises(ImportError, match=r"5\.0 or later, and 4\.57\.6 is installed"):
                importlib.reload(configuration_dmc)


def test_folders_that_are_refused(fresh_seed, tokenizer, tmp_path):
    from megatron_dmc.convert import to_megatron
    from megatron_dmc.exported import with_dmc

    _, plain = checkpoint(tmp_path, "llama-2", tokenizer)
    config = with_dmc(json.loads((plain / "config.json").read_text()), SETTINGS)
    for changes, message in (
        (dict(dmc_window_size=-3), "dmc_window_size must be a whole number of tokens, 0 for no limit; got -3"),
        (dict(dmc_stage="zero-out"), "dmc_stage is 'zero-out'; a dmc_llama has been through retrofit or finetune"),
        (dict(model_type="dmc_mamba"), "model_type is 'mamba'"),
    ):
        change(plain, **config | changes)
        with pytest.raises(DMCError) as error:
            to_megatron(plain, tmp_path / "out")
        assert message in str(error.value)
    assert not (tmp_path / "out").exists()
