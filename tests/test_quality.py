"""What `benchmarks/quality.py` measures and prepares, on small models."""

import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from argparse import ArgumentParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from runs import ROOT, environment

from benchmarks import quality_measure
from benchmarks.quality import pool
from benchmarks.quality_text import recall_text
from megatron_dmc.config import AS_PUBLISHED, add_flags


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
    found = quality_measure.continuations(reader, windows, 2, None)
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
    assert quality_measure.continuations(reader, windows, 2, None)["cache_bytes_by_context"][8] == size
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
            self.errs, self.asked, self.contexts, self.budgets = errs, 0, [], []

        def read_context(self, tokens, budget):
            self.contexts.append(tokens.shape[1])
            self.budgets.append(budget)
            layer = SimpleNamespace(keys=torch.zeros(1, 1, tokens.shape[1] // 2, 4), values=torch.zeros(1, 1, 1, 4))
            return SimpleNamespace(layers=[layer])

        def read(self, tokens, start, cache):
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

    places = {4: (0, 1, 2, 3), 16: (0, 4, 8, 12)}
    texts = [quality_measure.multi_key(tokenize, 1600, keys, 1_000_000 + i, asked=asked)
             for keys, which in places.items() for i in range(6) for asked in which]  # fmt: skip
    assert len({tuple(question.answer) for question in texts}) > 40
    reader = Knows(False)
    found = quality_measure.recall(reader, Bytes(), 1600, 6, {"4": 1000.0, "16": 2000.0})
    assert found["recall"] == 1 and found["recall_by_keys"] == {4: 1.0, 16: 1.0}
    assert reader.budgets == 6 * [1000.0] + 6 * [2000.0]
    lengths = reader.contexts[:6]
    assert found["recall_cache_bytes"][4] == sum(16 * (n // 2) + 16 for n in lengths) / 6
    assert found["recall_tokens_per_entry"] == pytest.approx(2, abs=0.01)
    found = quality_measure.recall(Knows(True), Bytes(), 1600, 6, None)
    assert found["recall"] == pytest.approx(2 / 3) and found["recall_by_keys"] == {4: 16 / 24, 16: 16 / 24}
    assert found["recall_answers"][4] == 8 * [True, True, False]


def test_presses_keep_what_the_budget_allows(folder):
    """Never less than an entry, or more than the context."""
    entry = 2 * 2 * 4 * 8 * (2 if torch.cuda.is_available() else 4)
    reader = quality_measure.Reader(folder, "SnapKV")
    assert [reader.kept(16, n * entry) for n in (0.5, 3, 8.5, 80)] == [1, 3, 8, 16]


def test_a_job_that_fails_leaves_the_others_measured(folder, tmp_path, monkeypatch, capsys):
    asked = []

    def measure(options, job, tokenizer):
        asked.append(job["name"])
        if job["name"] == "second":
            raise RuntimeError("it broke")
        return dict(job, continuation_loss=1.0)

    monkeypatch.setattr(quality_measure, "measure", measure)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda path: None)
    jobs = tmp_path / "jobs.json"
    jobs.write_text(json.dumps([dict(name=name) for name in ("first", "second", "third")]))
    words = f"quality_measure.py --work {tmp_path} --jobs {jobs} --windows 1 --contexts 1".split()
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit, match="1"):
        quality_measure.main()
    assert asked == ["first", "second", "third"] and "it broke" in capsys.readouterr().err
    assert sorted(path.stem for path in (tmp_path / "results").iterdir()) == ["first", "third"]


def options_of(work, **changes):
    """Of the command line of `benchmarks/quality.py`."""
    options = dict(work=work, size="tiny", minutes=5, parts=[], gpus=1, at_once=2, reserve=0, commit=None, only=None,
                   iterations=None, base_iterations=None, base_lr=1, lr=1, teacher_weight=1, peers_path=None,
                   out=work / "out.json")  # fmt: skip
    return SimpleNamespace(**options | changes)


def results_of(names):
    """Of methods by name: a made-up ratio, and a loss for each of two windows."""
    found = {}
    for name, (ratio, first, second) in names.items():
        by_window = dict(continuation_loss_by_window=[first, second], loss_by_window=[first, second])
        mean = (first + second) / 2
        found[name] = dict(ratio=ratio, continuation_loss=mean, loss=mean, recall=0.5, loss_by_position={"8": mean},
                           press="Knorm" if name.startswith(("Knorm", "none")) else None,
                           model="base" if "base" in name else "control", **by_window)  # fmt: skip
    return dict(results=found)


def test_costs_are_compared_by_window_and_at_equal_ratios():
    from benchmarks.quality import cost_at, error_of, over

    found = results_of({"control": (1, 1.0, 3.0), "dmc-2x": (2.5, 1.01, 3.03), "dmc-4x": (3.6, 1.04, 3.12),
                        "dmc-4x-seed2": (3.6, 1.0, 3.0), "gqa-2x": (2, 1.1, 3.0), "dmc-4x-window-4": (3.6, 1.1, 3.3),
                        "control-twice-the-tokens": (1, 0.5, 1.5),
                        "dmc-4x-twice-the-tokens": (3.6, 0.51, 1.53), "dmc-4x-half-the-lr": (3.6, 1.0, 3.0),
                        "none-base": (1, 1.2, 3.6), "none-control": (1, 1.0, 3.0),
                        "Knorm-base-2x": (2, 1.2 * 1.2, 3.6 * 1.2)})  # fmt: skip
    assert over(found, "dmc-4x", "loss") == pytest.approx(0.04) and over(found, "dmc-4x-seed2", "loss") is None
    assert error_of(found, "dmc-4x", "loss") == pytest.approx(0, abs=1e-9)  # in every window alike
    assert error_of(found, "gqa-2x", "loss") > 0.02 and error_of(found, "dmc-4x-seed2", "loss") is None
    assert cost_at(found, "dmc", 2.5) == pytest.approx(0.01) and cost_at(found, "dmc", 3.0) == pytest.approx(0.025)
    assert cost_at(found, "dmc", 2) is None and cost_at(found, "dmc", 4) is None  # beyond what was measured
    assert cost_at(found, "distilled", 2) is None
    assert over(found, "dmc-4x-window-4", "loss") == pytest.approx(0.1)
    assert over(found, "dmc-4x-twice-the-tokens", "loss") == pytest.approx(0.02)
    assert over(found, "dmc-4x-half-the-lr", "loss") is None  # there is no control with that rate
    assert over(found, "Knorm-base-2x", "loss") == pytest.approx(0.2)


def test_curves_are_compared_by_stage_and_batch(tmp_path):
    """Logs of Megatron's, one of a run that was resumed and one of a control that is further."""
    from benchmarks.quality import training_curves

    def write(name, stage, losses, ratio=""):
        (tmp_path / "logs").mkdir(exist_ok=True)
        lines = [
            f" [2026-01-01] iteration {i:8}/     500 | elapsed time (ms): 9 | lm loss: {loss:.6E} |{ratio}"
            " loss scale: 1.0 |\n validation loss at iteration 3 on test set | lm loss value: 9.0"
            for i, loss in losses
        ]
        (tmp_path / "logs" / f"runs.{name}.{stage}.log").write_text("\n".join(lines))

    steps = range(20, 301, 20)
    write("control", "retrofit", [(1, 7.0), *((i, 2.0) for i in steps), (320, 1.0)])
    resumed = [(1, 9.0), *((i, 2.04) for i in steps[:8]), (160, 2.04), *((i, 2.04 if i <= 200 else 2.2) for i in steps)]
    write("dmc-4x", "retrofit", resumed, " compression ratio: 2.5E+00 | target compression ratio: 9E+00 |")
    write("gqa-2x", "retrofit", [(i, 1.9) for i in steps[:3]])
    write("dmc-4x-half-the-lr", "retrofit", [(i, 1.9) for i in steps])  # its control has not run
    write("dmc-4x-window-4", "retrofit", [(i, 2.1) for i in steps[:1]])
    write("dmc-4x-longer-finetune", "retrofit", [(i, 2.1) for i in steps])  # nor has this one's
    curves = training_curves(SimpleNamespace(folder=tmp_path))
    assert curves.keys() == {"dmc-4x", "gqa-2x", "dmc-4x-window-4"}
    assert curves["dmc-4x"] == [
        ["retrofit", 200, pytest.approx(0.02), 2.5], ["retrofit", 300, pytest.approx(0.1), 2.5],
    ]  # fmt: skip
    assert curves["gqa-2x"] == [["retrofit", 60, pytest.approx(-0.05), None]]
    assert curves["dmc-4x-window-4"] == [["retrofit", 20, pytest.approx(0.05), None]]


@pytest.mark.parametrize("missing", [(), ("control",), ("control-seed2",), ("none-control",), ("dmc-4x",)])
def test_a_picture_is_drawn_of_what_there_is(tmp_path, missing):
    import matplotlib

    matplotlib.use("Agg")
    from benchmarks.plots import draw_quality

    names = dict.fromkeys(("control", "control-seed2", "none-control", "base"), (1, 1.0, 3.0))
    names |= {"dmc-4x": (3.6, 1.0, 3.1), "dmc-4x-seed2": (3.6, 1.0, 3.1), "Knorm-control-4x": (3.6, 2.0, 3.0),
              "Knorm-base-4x": (3.6, 2.0, 3.0), "distilled-4x-1of4": (3.6, 1.0, 3.1)}  # fmt: skip
    draw_quality(results_of({name: x for name, x in names.items() if name not in missing}), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_parts_that_lack_something_are_not_done(tmp_path):
    """Reports wait for runs at their end, and peers for the models that they run on; runs have iterations to train."""
    from benchmarks import quality

    work = quality.Work(options_of(tmp_path))
    called = []
    work.call = lambda *command, **named: called.append(command)
    (tmp_path / "results").mkdir()
    for ratio in quality.RATIOS:
        sizes = dict(cache_bytes_by_context={"8": 64.0}, recall_cache_bytes={"4": 32.0})
        (tmp_path / "results" / f"dmc-{ratio}x.json").write_text(json.dumps(sizes))
    finetune = tmp_path / "runs" / "dmc-4x" / "finetune"
    finetune.mkdir(parents=True)
    (finetune / quality.TRACKER).write_text("1")
    for part in (quality.reports, quality.peers):
        with pytest.raises(quality.Stopped):
            part(work)
    assert not called
    for name in ("dmc-4x", "distilled-4x"):
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / "config.json").write_text("{}")
    quality.reports(work)
    assert [command[3] for command in called] == ["report", "report"]
    for method in (*quality.METHODS, *quality.ABLATIONS):
        assert [n > 1 for _, n, _ in quality.stages(work, method)] == 3 * [True]
    assert len(set(quality.NAMES)) == 13 + 21 + 5 + 7
    published = add_flags(ArgumentParser()).parse_args(quality.CHANGES["as-published"].flags)
    assert vars(published).items() >= AS_PUBLISHED.items()


def test_results_are_written_as_they_come(tmp_path):
    from benchmarks import quality

    work = quality.Work(options_of(tmp_path))
    (tmp_path / "text.json").write_text("{}")
    (tmp_path / "results").mkdir()
    asked = []

    def call(*command, slot, **named):
        asked.append((slot, work.left()))
        (job,) = json.loads((tmp_path / "jobs" / "jobs.json").read_text())
        result = job | dict(parameters=7, cache_bytes_by_context={"8": 64})
        (tmp_path / "results" / f"{job['name']}.json").write_text(json.dumps(result))

    work.call = call
    for name in ("base", "control"):
        quality.measured(work, [dict(name=name)], "jobs", 1)
        found = json.loads(work.options.out.read_text())
        assert name in found["results"] and found["parameters"] == 7
    assert set(found["results"]) == {"base", "control"} and found["results"]["control"]["ratio"] == 1
    quality.measured(work, [dict(name="base")], "jobs", 1)  # is there
    assert [slot for slot, _ in asked] == [1, 1]


def test_some_methods_alone_and_longer(tmp_path, monkeypatch):
    from benchmarks import quality

    only = ["gqa-2x", "dmc-4x-soft-finetune", "dmc-4x"]
    work = quality.Work(options_of(tmp_path, only=only, iterations=54))
    asked = []
    monkeypatch.setattr(quality, "run", lambda work, method, slot: asked.append(method.name))
    monkeypatch.setattr(quality, "measured", lambda work, jobs, name, slot: None)
    (tmp_path / "models" / "base").mkdir(parents=True)
    (tmp_path / "models" / "base" / "config.json").write_text("{}")
    quality.runs(work)
    assert sorted(asked) == sorted(only)
    assert [method.name for method in work.wanted(quality.METHODS)] == ["gqa-2x", "dmc-4x"]  # as they were named
    twice = SimpleNamespace(options=SimpleNamespace(only=["dmc-4x", "dmc-4x"]))
    assert len(quality.Work.wanted(twice, quality.METHODS)) == 1
    quality.ablations(work)
    assert asked[3:] == ["dmc-4x-soft-finetune"]
    assert [n for _, n, _ in quality.stages(work, quality.METHODS[0])] == [4, 30, 20]
    monkeypatch.setattr(quality.Work, "train", lambda work, name, iterations, *_: asked.append((name, iterations)))
    quality.base(quality.Work(options_of(tmp_path / "longer", base_iterations=99)))
    assert asked.pop() == ("base", 99)
    with pytest.raises(SystemExit, match="was begun with"):
        quality.Work(options_of(tmp_path, only=only))
    work.calls()
    (again := quality.Work(options_of(tmp_path, only=["gqa-2x"], iterations=54))).calls()
    assert [(call["only"], call["gpus"]) for call in again.calls()] == [(only, 1), (["gqa-2x"], 1)]


def test_some_methods_alone_leave_the_rest_to_be_done(tmp_path, monkeypatch):
    """Text is written once: whatever goes on trains on the same."""
    from benchmarks import quality

    done = []
    for part in quality.PARTS:
        monkeypatch.setattr(quality, part, lambda work, part=part: done.append(part))
    line = ["quality.py", "--size", "tiny", "--work", str(tmp_path), "--peers-path", str(tmp_path)]
    for flags in (["--only", "dmc-4x"], ["--only", "gqa-4x"], []):
        monkeypatch.setattr(sys, "argv", line + flags)
        assert quality.main() == 0
    assert [call["only"] for call in json.loads((tmp_path / "calls.json").read_text()).values()] == [
        ["dmc-4x"], ["gqa-4x"], None,
    ]  # fmt: skip
    rest = ["runs", "reports", "ablations"]
    assert done == ["text", "base", *rest, *rest, "runs", "peers", "reports", "ablations"]
    for flags in (["--iterations", "26"], ["--base-iterations", "50"]):
        monkeypatch.setattr(sys, "argv", line + flags)
        with pytest.raises(SystemExit, match="2"):
            quality.main()


def test_what_is_called_runs_on_the_gpu_of_its_slot(tmp_path, monkeypatch):
    from benchmarks import quality

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    work = quality.Work(options_of(tmp_path, gpus=2))
    show = "import os; print('on', os.environ['CUDA_VISIBLE_DEVICES'])"
    barrier = threading.Barrier(4)

    def task(slot):
        barrier.wait(60)  # all slots at once
        work.call(sys.executable, "-c", show, log=f"slot-{slot}", slot=slot)

    quality.parallel(work, [task] * 4)
    assert not work.failures and not work.children
    found = [(tmp_path / "logs" / f"slot-{slot}.log").read_text() for slot in range(4)]
    assert ["on 4" in text for text in found] == [True, False, True, False]
    assert ["on 7" in text for text in found] == [False, True, False, True]


def test_nothing_goes_on_after_its_end(tmp_path):
    """What it has started would write into the folder of the next."""
    script = tmp_path / "script.py"
    script.write_text(f"""
import signal, sys
from argparse import Namespace
from pathlib import Path
from benchmarks import quality
options = Namespace(work=Path({str(tmp_path)!r}), size="tiny", minutes=5, parts=[], gpus=1, commit=None, reserve=0,
                    iterations=None, base_iterations=None, only=None, base_lr=1, lr=1, teacher_weight=1, at_once=1,
                    peers_path=None)
work = quality.Work(options)
signal.signal(signal.SIGTERM, lambda *_: quality.end(work))
sleep = "import os, time; print('pid', os.getpid(), flush=True); time.sleep(600)"
quality.parallel(work, [lambda slot: work.call(sys.executable, "-c", sleep, log="sleep", slot=slot)])
""")
    with subprocess.Popen([sys.executable, str(script)], env=environment(), cwd=ROOT) as run:
        log, pid = tmp_path / "logs" / "sleep.log", None
        for _ in range(600):
            if log.exists() and (found := re.search(r"^pid (\d+)", log.read_text(), re.MULTILINE)):
                pid = int(found[1])
                break
            time.sleep(0.1)
        run.terminate()
        assert run.wait(60) == 143 and pid is not None
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists():
            break
        time.sleep(0.1)
    else:
        os.kill(pid, 9)
        pytest.fail("it went on")


def test_parts_that_cannot_run_are_refused_before_any(tmp_path, monkeypatch, capsys):
    from benchmarks import quality

    monkeypatch.setattr(quality, "find_spec", lambda name: None)
    for flags, message in (
        ([], "the part peers needs kvpress"),
        (["text", "--gpus", "3"], "--gpus 3: the base's batch of 8 sequences does not divide among them"),
    ):
        monkeypatch.setattr("sys.argv", ["quality.py", "--work", str(tmp_path / "work"), "--size", "tiny", *flags])
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        with pytest.raises(SystemExit):
            quality.main()
        assert message in capsys.readouterr().err and not (tmp_path / "work").exists()


def test_a_stopped_benchmark_goes_on(tmp_path, monkeypatch, capsys):
    """What is measured is saved, failures are told, and a folder is not gone on with under other settings."""
    import benchmarks.quality as quality

    (tmp_path / "results").mkdir()
    (tmp_path / "text.json").write_text("{}")
    one = dict(press=None, cache_bytes_by_context={"8": 64}, cache_bytes=64, recall=0.5, tokens_per_entry=1.0,
               continuation_loss=2.0, loss=2.0, continuation_loss_by_window=[1.0, 3.0], loss_by_window=[1.0, 3.0],
               parameters=7)  # fmt: skip
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
        words = ["quality.py", "--work", str(tmp_path), "--size", "tiny", "--out", str(out), "--peers-path", "peers",
                 *flags]  # fmt: skip
        monkeypatch.setattr("sys.argv", words)
        return quality.main(), json.loads(out.read_text())

    def fails(gpu):
        raise RuntimeError("it broke")

    for name in quality.PARTS:
        part(name)
    part("runs", quality.Stopped())
    code, found = start()
    assert code == 75 and asked == list(quality.PARTS) and found["results"]["base"]["ratio"] == 1
    assert "2.0200 (+1.00 ± 0.00%)" in capsys.readouterr().out
    part("runs", [fails, lambda gpu: asked.append("the other")])
    asked.clear()
    code, found = start()
    assert code == 1 and asked == ["runs", "the other"] and found["failures"] == ["RuntimeError: it broke"]
    part("runs")
    assert start()[0] == 0 and start()[0] == 0 and asked[-1] == "runs" and asked.count("runs") == 2
    with pytest.raises(SystemExit, match="was begun with"):
        start("--lr", "1")


def test_lists_of_numbers_are_saved_in_a_line(tmp_path):
    from benchmarks.common import save

    result = dict(
        loss=[0.5, -1e-07, 3], answers={"4": [True, False]}, names=["a  [1,  2]", "b"], nothing=[], deep=[[1, 2], [3]]
    )
    save(result, tmp_path / "result.json")
    text = (tmp_path / "result.json").read_text()
    assert json.loads(text) == result and "0.5, -1e-07, 3 ]" in text and "true, false ]" in text
