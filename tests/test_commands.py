"""The commands as a user runs them, bad input included."""

import json
import sys

import pytest
from runs import ROOT, UNDECIDED, WITHOUT_DATA, dmc, python, train

from megatron_dmc.cli import COMMANDS
from megatron_dmc.config import STAGES

TEXT = "def f(x):\n    return x + 1\n\n" * 60


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder of texts, prepared as byte tokens with some held out; the dataset's prefix."""
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(12):
        (folder / "text" / f"{i}").mkdir(parents=True)
        (folder / "text" / f"{i}" / "code.py").write_text(f"# file {i}\n" + TEXT)
    run = dmc(
        "prepare-data", "--input", folder / "text", "--pattern", "*.py", "--holdout", 0.3, "--output", folder / "data",
        "--train-tokenizer", 257,
    )  # fmt: skip
    assert run.code == 0, run.output
    return folder / "data"


@pytest.fixture(scope="module")
def checkpoints(corpus, tmp_path_factory):
    """`base` and `dmc`: a model that was just begun, and the same after a step of retrofitting."""
    folder = tmp_path_factory.mktemp("checkpoints")
    flags = list(WITHOUT_DATA)
    flags[flags.index("NullTokenizer")] = "HuggingFaceTokenizer"
    at = flags.index("--vocab-size")
    del flags[at : at + 2]
    flags[flags.index("--make-vocab-size-divisible-by") + 1] = "1"
    flags += ["--tokenizer-model", f"{corpus}-tokenizer", "--train-data-path", f"{corpus}-train"]
    data = ["--valid-data-path", f"{corpus}-valid", "--test-data-path", f"{corpus}-valid", "--save-interval", "1"]
    run = python("-m", "megatron_dmc", "train", *flags, *data, "--train-iters", 1, "--save", folder / "base")
    assert run.code == 0, run.output[-5000:]
    run = python(
        "-m", "megatron_dmc", "train", *flags, *data, "--train-iters", 1, "--save", folder / "dmc", *UNDECIDED,
        "--dmc-stage", "retrofit", "--load", folder / "base", "--finetune",
    )  # fmt: skip
    assert run.code == 0, run.output[-5000:]
    return folder


def test_prepared_data(corpus, tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(f"{corpus}-tokenizer")
    texts = set()
    for split in ("train", "valid"):
        note = json.loads(corpus.with_name(f"data-{split}.json").read_text())
        dataset = IndexedDataset(f"{corpus}-{split}")
        documents = [dataset[i].tolist() for i in range(len(dataset))]
        assert note["documents"] == len(documents) > 0
        assert note["tokens"] == sum(map(len, documents)) and note["vocab_size"] == 257
        assert all(tokens[-1] == tokenizer.eos_token_id for tokens in documents)
        texts |= {tokenizer.decode(tokens[:-1]) for tokens in documents}
    assert texts == {f"# file {i}\n" + TEXT for i in range(12)}  # nothing lost, nothing changed


def test_prepare_json_lines_with_a_given_tokenizer(corpus, tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"body": "one"}\n\n{"body": "two €"}\n')
    tokenizer = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", f"{corpus}-tokenizer"]
    common = ["prepare-data", "--input", lines, "--output", tmp_path / "out" / "data", *tokenizer]
    run = dmc(*common, "--json-key", "body", "--workers", 2)
    assert run.code == 0 and "2 documents, 12 tokens" in run.output, run.output
    assert [len(x) for x in IndexedDataset(str(tmp_path / "out" / "data"))] == [4, 8]
    run = dmc(*common)
    assert run.code != 0 and "lines.jsonl:1 has no text under 'text'; name its key with --json-key" in run.output


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--input", "nowhere.txt", "--train-tokenizer", 300], "nowhere.txt is neither a file nor a folder"),
        (["--input", "README.md"], "name a tokenizer"),
        (["--input", "README.md", "--train-tokenizer", 100], "at least 257 tokens (all bytes); got 100"),
        (["--input", "README.md", "--train-tokenizer", 300, "--holdout", 1.5], "--holdout must be a share"),
        (["--input", "megatron_dmc", "--pattern", "*.zip", "--train-tokenizer", 300], "no file that matches '*.zip'"),
        (
            ["--input", "README.md", "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "/none"],
            "cannot build",
        ),
    ],
)
def test_prepare_data_mistakes(tmp_path, flags, message):
    run = dmc("prepare-data", "--output", tmp_path / "data", *flags)
    assert run.code != 0 and message in run.output, run.output
    assert "Traceback" not in run.output


def without_warnings(run):
    """The output without what says that there is no GPU, and when."""
    return "\n".join(line for line in run.output.splitlines() if "no cuda" not in line.lower())


def test_generate(checkpoints, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("def f\n\nreturn\n")
    greedy = dmc("generate", checkpoints / "dmc", "--prompt", "def f", "--max-new-tokens", 12)
    assert greedy.code == 0, greedy.output
    again = dmc(
        "generate", checkpoints / "dmc", "--max-new-tokens", 12, "--top-k", 1, "--temperature", 1, input="def f\n"
    )
    assert without_warnings(again) == without_warnings(greedy)
    tokens, ratio = 5 + 12 - 1, 16 * 8  # 4 layers of 2 heads
    assert f"[1 prompt, {tokens} tokens in; " in greedy.output and "entries kept per head and prompt" in greedy.output
    kept = float(greedy.output.split("tokens in; ")[1].split()[0])
    shown = float(greedy.output.split("ratio ")[1].split(";")[0])
    assert 1 < kept < tokens and shown == pytest.approx(tokens / kept, abs=0.06), ratio
    sampled = [
        "generate",
        checkpoints / "dmc",
        "--prompt-file",
        prompts,
        "--max-new-tokens",
        8,
        "--temperature",
        1.5,
        "--top-p",
        0.9,
    ]
    one, same, other = (without_warnings(dmc(*sampled, "--seed", seed)) for seed in (1, 1, 2))
    assert one == same != other
    assert "[2 prompts, " in one and one.index("def f") < one.index("return")


def test_report(checkpoints, corpus, tmp_path):
    run = dmc(
        "report", checkpoints / "dmc", "--data-path", f"{corpus}-valid", "--output", tmp_path, "--max-tokens", 600
    )
    assert run.code == 0, run.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"
    assert report["tokens"] == 600 and report["window"] == 24
    ratios = report["ratio_by_layer_and_head"]
    assert len(ratios) == 4 and all(len(row) == 2 and min(row) >= 1 for row in ratios)
    mean = 8 / sum(1 / ratio for row in ratios for ratio in row)
    assert report["compression_ratio"] == pytest.approx(mean) and 1.1 < mean < 10
    segments = report["segments_by_length"]
    assert sum(segments) == pytest.approx(600 * 8 / mean)  # one entry each
    assert sum(n * length for length, n in enumerate(segments)) == 600 * 8  # every token is in one of them
    assert f"compressed cache        {report['loss_compressed']:.4f}" in run.output
    assert f"same, nothing merged    {report['loss_uncompressed']:.4f}" in run.output
    as_trained = next(line for line in run.output.splitlines() if line.startswith("decisions of training")).split()
    assert as_trained[3] == f"{report['loss_as_trained']:.4f}"
    assert as_trained[5] == f"{report['compression_ratio_as_trained']:.2f}"
    hard = next(line for line in run.output.splitlines() if line.startswith("same, but hard")).split()
    assert hard[3] == f"{report['loss_hard_with_noise']:.4f}" != as_trained[3]
    assert hard[5] == f"{report['compression_ratio_hard_with_noise']:.2f}"
    closings = report["closings"]
    assert closings["tokens"] == 600 - 600 // 24 and closings["closings"] == sum(segments) - 8 * 600 // 24
    assert {"letter", "space ' '"} <= {row["ends_with"] for row in closings["characters"]}
    assert "letter  " in run.output and 'id="overview"' in (tmp_path / "report.html").read_text(encoding="utf-8")
    by_text = dmc(
        "report", checkpoints / "dmc", "--text", "megatron_dmc/cli.py", "--output", tmp_path, "--max-tokens", 100
    )
    assert by_text.code == 0, by_text.output


def said_in_one_process(commands, **variables):
    """What each of several commands ends with, all in one process: that of each would load Megatron anew."""
    words = [list(map(str, arguments)) for arguments in commands]
    run = python("-c", ONE_AFTER_THE_OTHER, json.dumps(words), **variables)
    assert run.code == 0 and "Traceback" not in run.output, run.output
    return [line.removeprefix("said: ") for line in run.output.splitlines() if line.startswith("said: ")]


def test_the_demos_control_trains_as_the_stages_do(monkeypatch, tmp_path):
    """In as many runs, as long, with the same learning rates and from the same base; only it is no stage of DMC."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    import demo

    calls = {}

    def record(command, *arguments, label="", **_):
        if command == "train":
            calls[label] = dict(zip(arguments, [*arguments[1:], None], strict=True))

    monkeypatch.setattr(demo, "dmc", record)
    monkeypatch.setattr(demo, "copy_standard_library", lambda folder: None)
    monkeypatch.setattr(demo, "evaluate", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--output", str(tmp_path)])
    demo.main()
    assert list(calls) == ["base", *(f"control-{x}" for x in STAGES), *STAGES]
    for before, stage in zip(("base", *STAGES), STAGES, strict=False):
        ours, control = calls[stage], calls[f"control-{stage}"]
        assert ours["--dmc-stage"] == stage and "--dmc-stage" not in control and "--dmc-cr" not in control
        for flag in ("--train-iters", "--lr", "--min-lr", "--lr-decay-style", "--train-data-path"):
            assert ours[flag] == control[flag], flag
        assert ours["--load"] == f"{tmp_path}/{before}"
        assert control["--load"] == f"{tmp_path}/{before if before == 'base' else f'control-{before}'}"


def test_the_demos_evaluation(checkpoints, corpus, tmp_path):
    """Its last step but one, on models that are there already."""
    for name, origin in (("base", "base"), ("control-finetune", "base"), ("finetune", "dmc")):
        (tmp_path / name).symlink_to(checkpoints / origin)
    code = (
        "import sys; from dataclasses import replace; from pathlib import Path; sys.path.insert(0, 'examples'); "
        "import demo; size = replace(demo.CPU, seq_length=24, held_out_tokens=600); "
        "demo.evaluate(size, Path(sys.argv[1]), sys.argv[2])"
    )
    run = python("-c", code, tmp_path, corpus)
    assert run.code == 0 and "control: trained on without compression" in run.output, run.output[-3000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["base_loss"] == report["control_loss"] and report["dmc_loss"] == report["loss_compressed"]
    assert report["tokens"] == 600 and (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"


ONE_AFTER_THE_OTHER = """
import json, sys
from megatron_dmc.cli import main
for words in json.loads(sys.argv[1]):
    sys.argv = ["megatron-dmc", *words]
    try:
        main()
    except SystemExit as ended:
        print("said:", str(ended.code).replace(chr(10), " "), flush=True)
"""


def test_checkpoint_mistakes(checkpoints, corpus, tmp_path):
    other = tmp_path / "other"
    run = dmc(
        "prepare-data", "--input", "megatron_dmc", "--pattern", "*.py", "--output", other, "--train-tokenizer", 400
    )
    assert run.code == 0, run.output
    prompt = ["--prompt", "x"]
    text = ["--text", "README.md"]
    mistakes = (
        (["generate", "/nowhere", *prompt], "no checkpoint at /nowhere"),
        (["report", tmp_path, *text], "is not a checkpoint of Megatron's distributed format"),
        (["generate", checkpoints / "base", *prompt], "not been trained with DMC: its cache does not compress"),
        (["report", checkpoints / "base", *text], "not been trained with DMC"),
        (
            ["generate", checkpoints / "dmc", *prompt, "--tokenizer-model", f"{other}-tokenizer"],
            "400 tokens, the model an embedding of 257",
        ),
        (
            ["generate", checkpoints / "dmc", *prompt, "--tokenizer-model", "/none"],
            "say where to with --tokenizer-model",
        ),
        (["report", checkpoints / "dmc", "--data-path", other], "was prepared with another tokenizer"),
        (["report", checkpoints / "dmc", "--data-path", "/none"], "no indexed dataset at /none"),
        (["report", checkpoints / "dmc"], "either --text or --data-path"),
        (
            ["report", checkpoints / "dmc", *text, "--seq-length", 1_000_000],
            "a window of --seq-length 1000000 needs 1000001: give more text, or a smaller --seq-length",
        ),
        (["generate", checkpoints / "dmc", *prompt, "--top-k", 5, "--top-p", 0.5], "either top_k or top_p"),
        (["generate", checkpoints / "dmc", *prompt, "--temperature", -1], "temperature must be 0 (greedy) or more"),
        (["generate", checkpoints / "dmc", *prompt, "--max-new-tokens", 0], "max_new_tokens must be at least 1"),
    )
    said = said_in_one_process([arguments for arguments, _ in mistakes])
    for (arguments, message), found in zip(mistakes, said, strict=True):
        assert message in found, (arguments, found)

    run = dmc("report", checkpoints / "base", *text)
    assert run.code == 1 and "Traceback" not in run.output and "not been trained with DMC" in run.output


def test_texts_longer_than_a_models_positions(tmp_path):
    """Where positions are learned there are no more."""
    flags = ["--train-iters", 1, "--save-interval", 1, "--dmc-stage", "retrofit", *UNDECIDED]
    train(*flags, "--position-embedding-type", "learned_absolute", "--save", tmp_path)
    commands = [
        ["report", tmp_path, "--text", "README.md", "--seq-length", 25],
        ["evaluate", tmp_path, "--text", "README.md", "--seq-length", 25],
        ["evaluate", tmp_path, "--needle", "--lengths", 24, 25],
    ]
    flags = ("--seq-length", "--seq-length", "--lengths")
    for flag, found in zip(flags, said_in_one_process(commands), strict=True):
        assert f"{flag} 25 exceeds the model's 24 learned positions: give 24 at most" in found


def test_commands_of_one_process_under_torchrun():
    commands = [["report", "nowhere", "--text", "README.md"], ["evaluate", "nowhere", "--text", "README.md"]]
    for (command, *_), found in zip(commands, said_in_one_process(commands, WORLD_SIZE="2"), strict=True):
        assert found == f"megatron-dmc {command}: {command} runs in one process: start it without torchrun"


def test_training_with_another_tokenizers_data(corpus, tmp_path):
    other = tmp_path / "other"
    assert dmc("prepare-data", "--input", "megatron_dmc/cli.py", "--output", other, "--train-tokenizer", 300).code == 0
    flags = list(WITHOUT_DATA)
    flags[flags.index("NullTokenizer")] = "HuggingFaceTokenizer"
    flags += ["--tokenizer-model", f"{other}-tokenizer", "--data-path", f"{corpus}-train", "--split", "90,10,0"]
    run = dmc("train", *flags, "--train-iters", 1)
    assert run.code != 0 and "prepared with a tokenizer of 257 tokens, --tokenizer-model has 300" in run.output


@pytest.mark.parametrize("command", ["prepare-data", "train", "generate", "serve", "report"])
def test_help_teaches_by_example(command):
    run = dmc(command, "--help")
    assert (
        run.code == 0
        and "examples" in run.output
        and f"megatron-dmc {command}" in run.output.replace("-m megatron_dmc", "megatron-dmc")
    )


def test_the_command_line_itself():
    assert dmc("--help").code == 0
    run = dmc("compress")
    assert run.code != 0 and f"no command 'compress'; there are {', '.join(COMMANDS)}" in run.output
    assert {"train", "generate", "serve", "report"} < COMMANDS.keys()
    run = python("-m", "megatron_dmc.cpu", "nowhere.py")
    assert run.code != 0 and "no such script: nowhere.py" in run.output


def test_importing_the_package_loads_no_cuda():
    code = (
        "import megatron_dmc, megatron_dmc.ops.reference, torch, sys; "
        "assert not torch.cuda.is_initialized(); assert 'megatron.core' not in sys.modules"
    )
    assert python("-c", code).code == 0


def test_a_model_trained_in_another_layout_opens_in_one_process(tmp_path):
    """What two tensor-parallel ranks have saved generates as one process would."""
    flags = ["--train-iters", 1, "--save-interval", 1, "--dmc-stage", "retrofit", *UNDECIDED]
    flags += ["--vocab-size", 60]  # two ranks pad it to 64, one alone would not
    train(*flags, "--save", tmp_path / "tp2", "--tensor-model-parallel-size", 2, processes=2)
    code = (
        "import sys; from megatron_dmc.cpu import emulate_cuda; emulate_cuda(); "
        "from megatron_dmc.checkpoint import load; "
        "from megatron_dmc.llm import LLM, SamplingParams; llm = LLM(load(sys.argv[1]), cache_gib=0.01); "
        "(r,) = llm.generate([[1, 2, 3]], SamplingParams(top_k=1, num_tokens_to_generate=5, termination_id=-1)); "
        "print('tokens', len(r.generated_tokens), llm.context.account.ended_tokens)"
    )
    run = python("-c", code, tmp_path / "tp2")
    assert run.code == 0 and "tokens 5 7.0" in run.output, run.output[-3000:]
