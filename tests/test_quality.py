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
    reader = quality_measure.Reader(folder, None, 1.0)
    windows = torch.randint(0, 50, (5, 65))
    expected = losses(reader, windows)
    tolerance = dict(rel=2e-2 if reader.device == "cuda" else 1e-4)
    found = quality_measure.continuations(reader, windows, batch=2)
    assert found["ratio"] == 1 and set(found["continuation_loss_by_context"]) == {8, 16, 32, 48, 62}
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
    before = losses(quality_measure.Reader(folder, None, 1.0), windows)
    pool(folder, tmp_path / "pooled", 2)
    reader = quality_measure.Reader(tmp_path / "pooled", None, 1.0)
    assert reader.model.config.num_key_value_heads == 2
    after = losses(reader, windows)
    torch.testing.assert_close(after, before, rtol=1e-2 if reader.device == "cuda" else 1e-5, atol=1e-5)
    assert quality_measure.continuations(reader, windows, 2)["cache_bytes_by_context"][8] % (8 * 2 * 2 * 2 * 8) == 0
    config = json.loads((folder / "config.json").read_text())
    assert config["num_key_value_heads"] == 4  # a copy was changed


def test_recall_texts_answer_what_they_ask(fresh_seed):
    text = recall_text(random.Random(fresh_seed))
    first = text.index("What is")
    answers = re.findall(r"\? The special number of the ([a-z ]+) is (\d{7})\.", text[first:])
    assert 1 <= len(answers) <= 16 and len(answers) == text.count("What is")
    for key, value in answers:
        assert f"The special number of the {key} is {value}." in text[:first]
