"""Scores, recall and tasks of lm-evaluation-harness, of models that read through compressed caches."""

import argparse
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import dmc, python
from test_commands import checkpoints, corpus  # noqa: F401  (fixtures)

from megatron_dmc.config import DMCError
from megatron_dmc.retrieval import multi_key, needle

pytestmark = pytest.mark.usefixtures("megatron")


@pytest.fixture(scope="module")
def loaded(checkpoints, megatron):  # noqa: F811
    from megatron_dmc.checkpoint import load

    return load(checkpoints / "dmc")


def random_rows(seed, count=7, longest=40):
    generator = torch.Generator().manual_seed(seed)

    def tokens(most):
        return torch.randint(0, 257, (int(torch.randint(1, most, (1,), generator=generator)),), generator=generator)

    return [(tokens(longest).tolist(), tokens(6).tolist()) for _ in range(count)]


def test_scores_are_those_of_the_compressed_cache(fresh_seed, loaded):
    """Token by token through a cache, one row at a time."""
    from megatron.core.inference.contexts import StaticInferenceContext

    from megatron_dmc.evaluation import appending_all, score

    rows = random_rows(fresh_seed)
    ratios = []
    for found, (text, continuation) in zip(score(loaded, rows, batch_tokens=64), rows, strict=True):
        tokens = torch.tensor([text + continuation], device=loaded.device)
        context = StaticInferenceContext(1, tokens.shape[1])
        logits = []
        with torch.no_grad():
            for t in range(tokens.shape[1] - 1):
                position = torch.tensor([[t]], device=loaded.device)
                logits.append(loaded.model(tokens[:, t : t + 1], position, None, inference_context=context)[0, -1])
                context.sequence_len_offset += 1
        own = torch.stack(logits)[len(text) - 1 :, :257].float()
        want = own.log_softmax(-1).gather(1, torch.tensor(continuation, device=own.device)[:, None]).sum()
        assert found.log_prob == pytest.approx(float(want), rel=1e-4)
        assert found.greedy == (own.argmax(-1).tolist() == continuation)
        entries = [cache.lengths.sum().item() for cache in context.key_value_memory_dict.values()]
        assert found.ratio == pytest.approx((tokens.shape[1] - 1) * 2 * len(entries) / sum(entries), rel=1e-6)
        ratios.append(found.ratio)
        greedy = (text, own.argmax(-1).tolist()[:1])
        assert score(loaded, [greedy])[0].greedy
    assert max(ratios) > 1.2
    with appending_all(loaded):
        assert {found.ratio for found in score(loaded, rows)} == {1.0}


def test_rows_that_cannot_be_scored(loaded):
    from megatron_dmc.evaluation import score

    for row in (([], [1]), ([1], [])):
        with pytest.raises(DMCError, match="must have a token each"):
            score(loaded, [row])
    for token in (-1, 257):
        with pytest.raises(DMCError, match=r"tokens must be 0 to 256"):
            score(loaded, [([1, token], [1])])


def words(text):
    return text.split()


def test_needles(fresh_seed):
    lengths = []
    for depth in (0.0, 0.3, 1.0):
        question = needle(words, 400, depth, fresh_seed)
        text = " ".join(question.text)
        (value,) = question.answer
        assert text.count(f"is {value}.") == 1 and text.endswith("number of the " + text.rsplit("the ", 1)[1])
        key = text.rsplit("special number of the ", 1)[1].removesuffix(" is")
        assert f"The special number of the {key} is {value}." in text
        assert abs(question.depth - depth) < 0.08
        lengths.append(len(question.text) + len(question.answer))
    assert all(380 < n <= 400 for n in lengths)
    assert needle(words, 400, 0.3, fresh_seed) == needle(words, 400, 0.3, fresh_seed)
    assert needle(words, 400, 0.3, fresh_seed) != needle(words, 400, 0.3, fresh_seed + 1)


def test_keys(fresh_seed):
    depths = set()
    for seed in range(fresh_seed, fresh_seed + 20):
        question = multi_key(words, 600, 8, seed)
        text = " ".join(question.text)
        assert text.count("The special number of the") == 9
        key = text.rsplit("special number of the ", 1)[1].removesuffix(" is")
        assert text.count(f"The special number of the {key} is {question.answer[0]}.") == 1
        depths.add(round(question.depth, 1))
    assert len(depths) > 3
    questions = [multi_key(words, 600, 8, fresh_seed, asked) for asked in range(8)]
    assert multi_key(words, 600, 8, fresh_seed) in questions
    assert all(question.context == questions[0].context for question in questions)
    assert [question.depth for question in questions] == sorted({question.depth for question in questions})
    for arguments, message in (
        ((600, 145, 0), "keys must be 1 to 144"), ((60, 8, 0), "60 tokens have no room for"),
        ((600, 8, 0, 8), "asked must be 0 to 7"),
    ):  # fmt: skip
        with pytest.raises(DMCError, match=message):
            multi_key(words, *arguments)
    with pytest.raises(DMCError, match="depth must be from 0"):
        needle(words, 100, 1.5, 0)


def with_beginning(pieces, prefix, size=400):
    """A tokenizer that begins every text with a token of its own, as Llama's do; `prefix` as SentencePiece, a space."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    from megatron_dmc.retrieval import ADJECTIVES, FILLER, NOUNS, QUESTION, STATEMENT

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    if pieces == "SentencePiece":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always" if prefix else "never")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="always" if prefix else "never")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
        tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    texts = [*FILLER, *ADJECTIVES, *NOUNS, QUESTION, STATEMENT, " ".join("0123456789"), " 0 1 2 3 4 5 6 7 8 9."]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


@pytest.mark.parametrize(
    ("pieces", "prefix"), [("bytes", False), ("bytes", True), ("SentencePiece", False), ("SentencePiece", True)]
)
def test_texts_begin_once(fresh_seed, pieces, prefix):
    """Tokens are those of the whole text: one beginning, and an answer without a beginning or a space of its own."""
    tokenizer = with_beginning(pieces, prefix)

    def tokenize(text):
        return tokenizer.encode(text).ids

    for question in (
        *(needle(tokenize, 700, depth, fresh_seed) for depth in (0.0, 0.4, 1.0)),
        multi_key(tokenize, 900, 5, fresh_seed),
    ):
        whole = question.text + question.answer
        text = tokenizer.decode(whole).strip()
        assert whole == tokenize(text) and whole.count(1) == 1 and whole[0] == 1
        assert 640 < len(whole) <= 900
        context, asked, answer = map(tokenizer.decode, (question.context, question.question, question.answer))
        assert context.strip().endswith(".") and asked.strip().startswith("What is") and asked.endswith(" is")
        key = asked.rsplit("the ", 1)[1].removesuffix(" is")
        assert text.count(f"The special number of the {key} is {answer.strip()}.") == 1
        assert question.answer == whole[len(tokenize(text.removesuffix(answer.strip()).rstrip())) :]


def test_a_token_over_a_border(fresh_seed):
    """Tokens of three characters, wherever words end: one that begins in the question belongs to the answer."""
    cut = lambda text: [text[i : i + 3] for i in range(0, len(text), 3)]  # noqa: E731
    merged = 0
    for seed in range(fresh_seed, fresh_seed + 9):
        question = needle(cut, 900, 0.5, seed)
        text, answer = "".join(question.text), "".join(question.answer)
        assert cut(text + answer) == question.text + question.answer
        asked, value = (text + answer).rsplit(" is ", 1)
        assert value.isdigit() and len(value) == 7 and f"{asked.rsplit('. ', 1)[0]}." in text
        assert text.startswith(asked[:-2]) and f" {value}." in text
        merged += not answer.startswith(" ")
    assert merged


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with a multiple-choice task, one of generation and one of perplexity, over local files."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [dict(question=f"def f{i}(x):", choices=["return x", "import os"], answer=i % 2) for i in range(5)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = f"dataset_path: json\ndataset_kwargs:\n  data_files: {{test: {folder}/rows.jsonl}}\ntest_split: test\n"
    (folder / "choice.yaml").write_text(
        "task: tiny_choice\noutput_type: multiple_choice\ndoc_to_text: question\ndoc_to_choice: choices\n"
        "doc_to_target: answer\nmetric_list:\n  - metric: acc\n" + common
    )
    (folder / "answer.yaml").write_text(
        "task: tiny_answer\noutput_type: generate_until\ndoc_to_text: question\ndoc_to_target: '{{choices[answer]}}'\n"
        "generation_kwargs:\n  until: ['e']\n  max_gen_toks: 4\nmetric_list:\n  - metric: exact_match\n" + common
    )
    (folder / "text.yaml").write_text(
        "task: tiny_text\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: question\n"
        "metric_list:\n  - metric: byte_perplexity\n" + common
    )
    return folder


def test_command(checkpoints, corpus, tasks, tmp_path):  # noqa: F811
    text = corpus.parent / "text"
    run = dmc(
        "evaluate", checkpoints / "dmc", "--text", text, "--max-tokens", 500, "--needle", "--depths", 2, "--samples", 2,
        "--keys", 2, "--lengths", 400, "--tasks", "tiny_choice", "tiny_answer", "tiny_text", "--include-path", tasks,
        "--output", tmp_path / "results.json", "--cache-gib", 0.05, HF_HUB_OFFLINE="1",
        HF_DATASETS_CACHE=str(tmp_path / "datasets"),
    )  # fmt: skip
    assert run.code == 0, run.output[-5000:]
    results = json.loads((tmp_path / "results.json").read_text())
    compressed, plain = (results["perplexity"][way] for way in ("compressed", "uncompressed"))
    assert compressed["ratio"] > 1.1 and plain["ratio"] == 1 and compressed["loss"] != plain["loss"]
    assert [(r["test"], r["way"]) for r in results["recall"]] == [
        (test, way) for test in ("needle", "needle", "keys") for way in ("compressed", "uncompressed")
    ]
    assert results["tasks"]["tiny_choice"]["acc,none"] in (0, 0.2, 0.4, 0.6, 0.8, 1)
    assert results["tasks"]["tiny_answer"]["exact_match,none"] == 0
    assert results["tasks"]["tiny_text"]["byte_perplexity,none"] > 2

    report = dmc("report", checkpoints / "dmc", "--text", text, "--max-tokens", 500, "--output", tmp_path)
    assert report.code == 0
    losses = json.loads((tmp_path / "report.json").read_text())
    for way, name in ((compressed, "compressed"), (plain, "uncompressed")):
        assert way["loss"] == pytest.approx(losses[f"loss_{name}"], rel=1e-4)


def test_a_model_without_dmc(checkpoints, corpus, tasks, tmp_path):  # noqa: F811
    """It is scored; answers to compare with are another program's, which is said before anything is scored."""
    from lm_eval.api.instance import Instance

    from megatron_dmc.config import DMCError
    from megatron_dmc.harness import HarnessModel

    run = dmc(
        "evaluate", checkpoints / "base", "--text", corpus.parent / "text", "--max-tokens", 500,
        "--include-path", tasks, "--tasks", "tiny_text", "tiny_answer", HF_HUB_OFFLINE="1",
        HF_DATASETS_CACHE=str(tmp_path / "datasets"),
    )  # fmt: skip
    assert run.code != 0 and "answers are generated from the compressed cache (tiny_answer), and" in run.output
    assert "uncompressed: loss" not in run.output
    run = dmc(
        "evaluate", checkpoints / "base", "--text", corpus.parent / "text", "--max-tokens", 500,
        "--include-path", tasks, "--tasks", "tiny_text", "--output", tmp_path / "results.json", HF_HUB_OFFLINE="1",
        HF_DATASETS_CACHE=str(tmp_path / "datasets"),
    )  # fmt: skip
    assert run.code == 0, run.output[-5000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["perplexity"]) == ["tokens", "seq_length", "uncompressed"]
    assert results["tasks"]["tiny_text"]["byte_perplexity,none"] > 2

    with pytest.raises(DMCError, match="has not been trained with DMC"):
        HarnessModel(str(checkpoints / "base"))
    model = HarnessModel(str(checkpoints / "base"), compress=False)
    (rolling,) = model.loglikelihood_rolling([Instance("", {}, ("def f(x):",), 0)], disable_tqdm=True)
    assert -math.inf < rolling < 0
    with pytest.raises(DMCError, match="lm_eval --model hf"):
        model.generate_until([Instance("", {}, ("def", {"max_gen_toks": 4}), 0)], disable_tqdm=True)


def test_the_harness_own_command(checkpoints, tasks, tmp_path):  # noqa: F811
    run = python(
        "-m", "megatron_dmc.harness", "--model", "megatron_dmc", "--model_args", f"checkpoint={checkpoints / 'dmc'}",
        "--tasks", "tiny_choice", "--include_path", tasks, "--limit", 2, HF_HUB_OFFLINE="1",
        HF_DATASETS_CACHE=str(tmp_path / "datasets"),
    )  # fmt: skip
    assert run.code == 0 and "|tiny_choice|" in run.output, run.output[-5000:]


def test_harness(loaded, fresh_seed):
    """The adapter against scores and greedy generation."""
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model

    from megatron_dmc import harness
    from megatron_dmc.evaluation import score

    assert get_model("megatron_dmc") is harness.HarnessModel
    model = harness.HarnessModel(loaded, max_length=60, max_gen_toks=5, cache_gib=0.05, batch_size=2)
    request = lambda kind, *arguments: Instance(kind, {}, arguments, 0)  # noqa: E731
    text, end = "def f(x):\n    ", "return x + 1"
    tokens = [list(loaded.tokenizer.tokenize(t)) for t in (text, end)]
    ((log_prob, greedy),) = model.loglikelihood([request("loglikelihood", text, end)], disable_tqdm=True)
    # The harness moves the space between the two to the continuation.
    whole = tokens[0] + tokens[1]
    first = len(loaded.tokenizer.tokenize(text.rstrip()))
    want = score(loaded, [(whole[:first], whole[first:])])[0]
    assert (log_prob, greedy) == (pytest.approx(want.log_prob), want.greedy)
    long = "x = 1\n" * 30 + "x"
    ((cut, _),) = model.loglikelihood([request("loglikelihood", long, "y")], disable_tqdm=True)
    end_of_long = list(loaded.tokenizer.tokenize(long))[-60:], list(loaded.tokenizer.tokenize("y"))
    assert cut == pytest.approx(score(loaded, [end_of_long])[0].log_prob)

    (rolling,) = model.loglikelihood_rolling([request("loglikelihood_rolling", long)], disable_tqdm=True)
    assert -math.inf < rolling < 0
    (short,) = model.loglikelihood_rolling([request("loglikelihood_rolling", text)], disable_tqdm=True)
    assert short == pytest.approx(score(loaded, [([loaded.tokenizer.eod], tokens[0])])[0].log_prob)

    prompts = ["def f(x):", "import", "x = 3", ""]
    answers = model.generate_until(
        [request("generate_until", prompt, {"until": ["\n"], "max_gen_toks": 5}) for prompt in prompts],
        disable_tqdm=True,
    )
    for prompt, answer in zip(prompts, answers, strict=True):
        context = list(loaded.tokenizer.tokenize(prompt)) or [loaded.tokenizer.eod]
        given = []
        for _ in range(5):
            every = score(loaded, [(context + given, [token]) for token in range(257)])
            best = max(range(257), key=lambda token, every=every: every[token].log_prob)
            if best == loaded.tokenizer.eod:
                break
            given.append(best)
        assert answer == loaded.tokenizer.detokenize(given).split("\n")[0]
    greedy = dict(until=["\n"], max_gen_toks=5)
    for options in (dict(do_sample=False, temperature=0.7, top_p=0.9), dict(top_p=0.9), dict(do_sample=True)):
        same = [request("generate_until", prompt, greedy | options) for prompt in prompts]
        assert model.generate_until(same, disable_tqdm=True) == answers
    with pytest.raises(DMCError, match="cannot follow: penalty"):
        model.generate_until([request("generate_until", "x", {"penalty": 2})], disable_tqdm=True)
    with pytest.raises(DMCError, match="leaves no room"):
        model.generate_until([request("generate_until", "x", {"max_gen_toks": 60})], disable_tqdm=True)


@pytest.fixture(scope="module")
def beginning(loaded, tmp_path_factory):
    """The same model with a tokenizer that begins every text with the token 1, and a chat template that spells it."""
    from megatron.core.tokenizers import MegatronTokenizer
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("beginning")
    template = "<s>{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %} is{% endif %}"
    PreTrainedTokenizerFast(
        tokenizer_object=with_beginning("SentencePiece", False, 250), bos_token="<s>", eos_token="</s>",
        unk_token="<unk>", chat_template=template,
    ).save_pretrained(folder)  # fmt: skip
    tokenizer = MegatronTokenizer.from_pretrained(str(folder), metadata_path={"library": "huggingface"})
    return replace(loaded, tokenizer=tokenizer)


def test_the_beginning_of_a_text(beginning, monkeypatch):
    """Once before every text, also where the text spells it or has nothing before it."""
    from lm_eval.api.instance import Instance

    from megatron_dmc import harness
    from megatron_dmc.evaluation import score

    model = harness.HarnessModel(beginning, max_length=60, max_gen_toks=5, cache_gib=0.05)
    request = lambda kind, *arguments: Instance(kind, {}, arguments, 0)  # noqa: E731
    text, end = "The river runs slowly", " past the old mill"
    tokens, rest = (
        beginning.tokenizer._tokenizer.tokenizer(t, add_special_tokens=False).input_ids for t in (text, end)
    )
    assert model.prefix_token_id == 1 and 1 not in tokens + rest and model.eot_token_id == 2
    assert model.tok_encode(text) == model.tok_encode("<s>" + text) == [1, *tokens]
    assert model.tok_encode(text, add_special_tokens=True) == [1, *tokens]
    assert model.tok_encode(text, add_special_tokens=False) == tokens
    assert model.tok_encode("<s>" + text, add_special_tokens=False) == [1, *tokens]

    def found(row):
        return pytest.approx(score(beginning, [row])[0].log_prob)

    after, spelt, first = model.loglikelihood(
        [request("loglikelihood", *pair) for pair in ((text, end), ("<s>" + text, end), ("", text))], disable_tqdm=True
    )
    assert after[0] == spelt[0] == found(([1, *tokens], rest)) and first[0] == found(([1], tokens))
    rolling = [request("loglikelihood_rolling", t) for t in (text, "<s>" + text, "")]
    assert model.loglikelihood_rolling(rolling, disable_tqdm=True) == [found(([1], tokens))] * 2 + [0]

    chat = [dict(role="user", content=text)]
    assert model.apply_chat_template(chat) == f"<s>[{text}] is" and model.chat_template(True).startswith("<s>")
    chat.append(dict(role="assistant", content="It"))
    assert model.apply_chat_template(chat, add_generation_prompt=False) == f"<s>[{text}][It"
    engine, given = model._engine(), []
    answer = engine.generate
    monkeypatch.setattr(engine, "generate", lambda prompts, params: given.extend(prompts) or answer(prompts, params))
    prompts = [text, f"<s>{text}", ""]
    model.generate_until([request("generate_until", prompt, {}) for prompt in prompts], disable_tqdm=True)
    assert given == [[1, *tokens], [1, *tokens], [1]]


def test_all_ways_to_a_prompt_begin_it_alike(beginning, monkeypatch):
    """Text that the engine is given, the command and the server."""
    import asyncio
    from unittest.mock import MagicMock

    from megatron.core.inference.sampling_params import SamplingParams

    from megatron_dmc.commands import generate
    from megatron_dmc.front_end import EngineAddress, EngineBackend
    from megatron_dmc.llm import LLM

    prompts = ["The river runs", "<s>The river runs"]
    tokens = beginning.tokenizer.tokenize(prompts[0])
    assert tokens[0] == 1 and len(tokens) > 3
    llm = LLM(beginning, max_sequence_length=40, cache_gib=0.05, max_requests=2)
    for add in (False, True):
        params = SamplingParams(top_k=1, num_tokens_to_generate=2, add_BOS=add)
        assert [r.prompt_tokens.tolist() for r in llm.generate(prompts, params)] == [tokens] * 2

    given = []
    monkeypatch.setattr(LLM, "stream", lambda self, prompts, params: given.extend(prompts) or iter(()))
    options = argparse.Namespace(
        max_new_tokens=2, batch_size=2, cache_gib=0.05, cache_fp8=False, seed=0, temperature=0, top_k=0, top_p=0
    )
    with pytest.raises(RuntimeError, match="StopIteration"):  # nothing is generated here
        generate._generate(beginning, prompts, options)
    assert given == [tokens] * 2

    monkeypatch.setattr("megatron_dmc.front_end.StreamingClient", MagicMock())

    async def backend():
        return EngineBackend(EngineAddress("nowhere", beginning.tokenizer, 64))

    assert [asyncio.run(backend()).tokenize(prompt) for prompt in prompts] == [tokens] * 2


def task_options(name):
    """The generation options of one of the harness's own tasks, as its file has them."""
    import lm_eval
    import yaml

    (file,) = (Path(lm_eval.__file__).parent / "tasks").glob(f"*/{name}.yaml")
    return yaml.safe_load(file.read_text())["generation_kwargs"]


def test_options_of_gsm8k(loaded, fresh_seed, monkeypatch):
    """Greedy, though they name a temperature; with `do_sample` the temperature and `top_p` reach the engine."""
    from lm_eval.api.instance import Instance

    from megatron_dmc import harness

    model = harness.HarnessModel(loaded, max_length=60, max_gen_toks=5, cache_gib=0.05)
    engine, given = model._engine(), []

    def generate(prompts, params):
        given.append(params)
        return answer(prompts, params)

    answer = engine.generate
    monkeypatch.setattr(engine, "generate", generate)
    options = task_options("gsm8k")
    assert options["do_sample"] is False and options["temperature"] == 0.0
    for changes in ({}, dict(do_sample=True, temperature=0.8, top_p=0.9), dict(do_sample=None, temperature=0.8)):
        every = {key: value for key, value in (options | changes).items() if value is not None}
        model.generate_until([Instance("generate_until", {}, ("def f(x):", every), 0)], disable_tqdm=True)
    assert [(p.top_k, p.temperature, p.top_p) for p in given] == [(1, 1.0, 0.0), (0, 0.8, 0.9), (0, 0.8, 0.0)]
    assert given[0].stop_words == options["until"]


def test_what_the_harness_may_not_ask(loaded):
    from lm_eval.api.instance import Instance

    from megatron_dmc import harness

    model = harness.HarnessModel(loaded, max_length=10, max_gen_toks=2, compress=False)
    long = Instance("loglikelihood", {}, ("x", " = 1" * 9), 0)
    with pytest.raises(DMCError, match="a continuation has 36 tokens, more than max_length = 10"):
        model.loglikelihood([long], disable_tqdm=True)
    with pytest.raises(DMCError, match="compress=False is for log-probabilities"):
        model.generate_until([Instance("generate_until", {}, ("x", {}), 0)], disable_tqdm=True)


def test_held_out_text_that_makes_no_window(loaded, tmp_path):
    from megatron_dmc.evaluation import read_windows

    (tmp_path / "short.txt").write_text("x = 1")
    with pytest.raises(DMCError, match=r"has 6 tokens; a window of --seq-length 6 needs 7: give more text"):
        read_windows(loaded, 6, text=[tmp_path / "short.txt"])
    assert read_windows(loaded, 5, text=[tmp_path / "short.txt"]).shape == (1, 6)
    for given in ({}, dict(text=[tmp_path], data="data")):
        with pytest.raises(DMCError, match="either as text or as an indexed dataset"):
            read_windows(loaded, 6, **given)


def test_tasks_without_the_harness(monkeypatch):
    from megatron_dmc.commands import evaluate

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr(sys, "argv", ["evaluate", "nowhere", "--tasks", "gsm8k"])
    with pytest.raises(DMCError, match=r'--tasks needs the package lm_eval: pip install "megatron-dmc\[evaluate\]"'):
        evaluate.main()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "nothing to evaluate: give --text"),
        (["--needle", "--samples", 0], "--samples must be at least 1; got 0"),
        (["--needle", "--lengths", 20], "20 tokens have no room for statements (1) and a question"),
        (["--tasks", "no_such_task"], "the harness has no task no_such_task"),
        (["--text", "x", "--data-path", "y"], "either as --text or as --data-path"),
    ],
)
def test_mistakes_are_named(checkpoints, flags, message):  # noqa: F811
    run = dmc("evaluate", checkpoints / "dmc", *flags)
    assert run.code != 0 and message in run.output, run.output[-3000:]
    assert "Traceback" not in run.output
