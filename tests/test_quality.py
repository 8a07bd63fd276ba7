"""What `benchmarks/quality.py` measures and prepares, on small models."""

import json
import random
import re

import pytest
import torch
import torch.nn.functional as F

from benchmarks import quality_measure
from benchmarks.quality import pool
from benchmarks.quality_text import recall_text


@pytest.fixture
def folder(tmp_path, fresh_seed):
    """A model of Hugging Face whose KV heads are alike in pairs."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, tie_word_embeddings=False, initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            heads = projection.weight.data.view(2, 2, 8, 32)
            heads[:, 1] = heads[:, 0]
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def losses(reader, windows):
    with torch.no_grad():
        logits = reader.model(windows[:, :-1].to(reader.device)).logits.float().cpu()
    return F.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none")


def test_losses_through_caches_are_those_of_whole_windows(folder, monkeypatch):
    monkeypatch.setattr(quality_measure, "CHUNK", 24)  # does not divide the window
    reader = quality_measure.Reader(folder, None)
    windows = torch.randint(0, 50, (5, 65))
    expected = losses(reader, windows)
    tolerance = dict(rel=2e-2 if reader.device == "cuda" else 1e-4)
    found = quality_measure.continuations(reader, windows, batch=2)
    assert found["tokens_per_entry"] == 1 and set(found["continuation_loss_by_context"]) == {8, 16, 32, 48, 62}
    for context, loss in found["continuation_loss_by_context"].items():
        assert loss == pytest.approx(float(expected[:, context : context + 2].mean()), **tolerance), context
        size = next(reader.model.parameters()).element_size()
        assert found["cache_bytes_by_context"][context] == context * 2 * 2 * 4 * 8 * size
    whole = quality_measure.whole_windows(reader, windows, batch=3)
    assert whole["loss"] == pytest.approx(float(expected.mean()), **tolerance)
    assert list(whole["loss_by_position"]) == [24, 48, 64]
    assert whole["loss_by_position"][64] == pytest.approx(float(expected[:, 48:].mean()), **tolerance)


def test_pooled_heads_of_a_kind_change_nothing(folder, tmp_path):
    windows = torch.randint(0, 50, (2, 65))
    before = losses(quality_measure.Reader(folder, None), windows)
    pool(folder, tmp_path / "pooled", 2)
    reader = quality_measure.Reader(tmp_path / "pooled", None)
    assert reader.model.config.num_key_value_heads == 2
    after = losses(reader, windows)
    torch.testing.assert_close(after, before, rtol=1e-2 if reader.device == "cuda" else 1e-5, atol=1e-5)
    size = 8 * 2 * 2 * 2 * 8 * next(reader.model.parameters()).element_size()  # half of what four heads take
    assert quality_measure.continuations(reader, windows, 2)["cache_bytes_by_context"][8] == size
    config = json.loads((folder / "config.json").read_text())
    assert config["num_key_value_heads"] == 4  # a copy was changed


def test_recall_texts_answer_what_they_ask(fresh_seed):
    text = recall_text(random.Random(fresh_seed))
    first = text.index("What is")
    answers = re.findall(r"\? The special number of the ([a-z ]+) is (\d{7})\.", text[first:])
    assert 1 <= len(answers) <= 16 and len(answers) == text.count("What is")
    for key, value in answers:
        assert f"The special number of the {key} is {value}." in text[:first]


def test_recall_counts_answers_that_are_right_in_all_tokens(fresh_seed):
    """A reader that knows what comes next, and one that errs in the last token of every third answer."""

    class Knows:
        def __init__(self, errs):
            self.errs, self.asked, self.contexts = errs, 0, []

        def new_cache(self):
            return None

        def read(self, tokens, start, cache, compress=False):
            if compress:
                self.contexts.append(tokens.shape[1])
                return None
            assert start == self.contexts[-1]
            self.asked += 1
            question = texts[self.asked - 1]
            following = (question.question + question.answer)[1:]
            following[-1] += self.errs and self.asked % 3 == 0
            return F.one_hot(torch.tensor([following]), 300).float()

    class Bytes:
        def __call__(self, text, add_special_tokens):
            return dict(input_ids=list(text.encode()))

    def tokenize(text):
        return list(text.encode())

    texts = [quality_measure.multi_key(tokenize, 1600, keys, 1_000_000 + i) for keys in (4, 16) for i in range(6)]
    assert quality_measure.recall(Knows(False), Bytes(), 1600, 6) == dict(recall=1.0, recall_by_keys={4: 1.0, 16: 1.0})
    found = quality_measure.recall(Knows(True), Bytes(), 1600, 6)
    assert found["recall"] == pytest.approx(2 / 3) and found["recall_by_keys"] == {4: 4 / 6, 16: 4 / 6}


def test_presses_keep_what_the_budget_allows(folder):
    """Bytes of a budget for another length count in proportion; never less than an entry, or more than the context."""
    entry = 2 * 2 * 4 * 8 * (2 if torch.cuda.is_available() else 4)
    reader = quality_measure.Reader(folder, "SnapKV", {"8": 3 * entry, "32": 8.5 * entry})
    assert [reader.kept(n) for n in (1, 8, 16, 32, 64)] == [1, 3, 6, 8, 17]
    assert quality_measure.Reader(folder, "SnapKV", {"8": 80 * entry}).kept(8) == 8


def test_a_stopped_benchmark_goes_on(tmp_path, monkeypatch, capsys):
    """What is measured is saved, failures are told, and a folder is not gone on with under other settings."""
    import benchmarks.quality as quality

    (tmp_path / "results").mkdir()
    (tmp_path / "text.json").write_text("{}")
    one = dict(press=None, cache_bytes_by_context={"8": 64}, cache_bytes=64, recall=0.5, tokens_per_entry=1.0,
               continuation_loss=2.0, loss=2.0, parameters=7)  # fmt: skip
    asked = []

    def part(name, outcome=None):
        def act(work):
            asked.append(name)
            if name == "runs":
                for method, factor in (("base", 1.0), ("control", 1.0), ("dmc-4x", 1.01)):
                    result = one | dict(loss=2.0 * factor)
                    (tmp_path / "results" / f"{method}.json").write_text(json.dumps(result))
            if isinstance(outcome, list):
                quality.parallel(work, outcome)
            elif outcome is not None:
                raise outcome

        monkeypatch.setattr(quality, name, act)

    def start(*flags):
        out = tmp_path / "out.json"
        words = ["quality.py", "--work", str(tmp_path), "--size", "tiny", "--out", str(out), *flags]
        monkeypatch.setattr("sys.argv", words)
        return quality.main(), json.loads(out.read_text())

    def fails(gpu):
        raise RuntimeError("it broke")

    for name in quality.PARTS:
        part(name)
    part("runs", quality.Stopped())
    code, found = start()
    assert code == 75 and asked == list(quality.PARTS) and found["results"]["base"]["ratio"] == 1
    assert "2.0200 (+1.00%)" in capsys.readouterr().out
    part("runs", [fails, lambda gpu: asked.append("the other")])
    asked.clear()
    code, found = start()
    assert code == 1 and asked == ["runs", "the other"] and found["failures"] == ["RuntimeError: it broke"]
    part("runs")
    assert start()[0] == 0 and start()[0] == 0 and asked[-1] == "runs" and asked.count("runs") == 2
    with pytest.raises(SystemExit, match="was begun with"):
        start("--lr", "1")
