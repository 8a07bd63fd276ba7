"""Models of Hugging Face as Megatron's checkpoints, and back: the same logits, the same bits, in little memory."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from runs import DESCENT, ROOT, dmc, python, train

SIZES = dict(
    vocab_size=261,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1024,
)
# In these a rotation of Llama 3's is slower than without scaling, as are most of a head's channels.
LLAMA3 = dict(
    rope_theta=500000.0,
    rope_scaling=dict(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    ),
)
MODELS = {
    "llama-2": ("llama", dict(num_key_value_heads=4, rms_norm_eps=1e-5)),
    "llama-3.1": ("llama", LLAMA3),
    "llama-3.2, tied": ("llama", LLAMA3 | dict(tie_word_embeddings=True, num_key_value_heads=1)),
    "mistral": ("mistral", dict(sliding_window=None, head_dim=24)),
    "qwen2.5": ("qwen2", dict(rope_theta=1000000.0)),
    "qwen2.5, tied": ("qwen2", dict(rope_theta=1000000.0, tie_word_embeddings=True)),
    "qwen3": ("qwen3", dict(head_dim=24, rms_norm_eps=1e-4)),
    "qwen3, tied": ("qwen3", dict(head_dim=24, tie_word_embeddings=True, rms_norm_eps=1e-4)),
}


def make(folder, model_type, *, dtype=torch.float32, shard="40KB", **settings):
    """A model of random weights, biases and norms included, in several files; what transformers made."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**SIZES | settings), dtype=dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(mean=float("norm" in name), std=0.2)
    model.save_pretrained(folder, max_shard_size=shard)
    return model.eval()


def tensors(folder):
    """All tensors of a folder of Hugging Face, by name."""
    from safetensors.torch import load_file

    found = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        content = load_file(file)
        assert not content.keys() & found.keys()
        found |= content
    return found


def assert_same_bits(folder, expected):
    have, expected = tensors(folder), tensors(expected)
    assert have.keys() == expected.keys()
    for name, tensor in expected.items():
        assert have[name].dtype == tensor.dtype and torch.equal(have[name], tensor), name


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A folder with a tokenizer of 257 tokens, fewer than the models' embeddings have rows."""
    from megatron_dmc.commands.prepare_data import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["some text"], 257, str(folder))
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_round_trip(name, megatron, fresh_seed, tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM

    from megatron_dmc.checkpoint import load
    from megatron_dmc.convert import to_hugging_face, to_megatron

    model_type, settings = MODELS[name]
    source, middle, target = tmp_path / "hf", tmp_path / "megatron", tmp_path / "back"
    original = make(source, model_type, **settings)
    shutil.copytree(tokenizer, source, dirs_exist_ok=True)
    assert len(list(source.glob("*.safetensors"))) > 2
    to_megatron(source, middle)

    tokens = torch.randint(SIZES["vocab_size"], (2, 512))
    loaded = load(middle, need_dmc=False)
    device = loaded.device
    with torch.no_grad():
        expected = original(tokens).logits
        logits = loaded.model(tokens.to(device), torch.arange(512, device=device).expand(2, -1), None).cpu()
    assert logits.shape == expected.shape
    largest = expected.abs().max().item()
    difference = (logits - expected).abs().max().item()
    assert difference < 1e-4 * largest, (difference, largest)
    if settings.get("rope_scaling"):  # the scaling is large enough to be seen
        plain = AutoModelForCausalLM.from_pretrained(source, rope_parameters=dict(rope_type="default", rope_theta=5e5))
        with torch.no_grad():
            assert (plain(tokens).logits - expected).abs().max() > 1e-2 * largest

    _, notes = to_hugging_face(middle, target, shard_bytes=100_000)
    assert_same_bits(target, source)
    assert json.loads((target / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    assert (target / "tokenizer.json").read_bytes() == (tokenizer / "tokenizer.json").read_bytes()
    assert "tokenizer.json" in notes
    assert 1 < len(list(target.glob("*.safetensors"))) < len(list(source.glob("*.safetensors")))
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(target)(tokens).logits, expected)


def test_logits_with_llama_32_scaling(megatron, fresh_seed, tokenizer, tmp_path):
    from megatron_dmc.checkpoint import load
    from megatron_dmc.convert import to_megatron

    scaling = LLAMA3["rope_scaling"] | dict(factor=32.0)
    original = make(tmp_path / "hf", "llama", rope_theta=500000.0, rope_scaling=scaling)
    shutil.copytree(tokenizer, tmp_path / "hf", dirs_exist_ok=True)
    to_megatron(tmp_path / "hf", tmp_path / "megatron")
    tokens = torch.randint(SIZES["vocab_size"], (1, 512))
    loaded = load(tmp_path / "megatron", need_dmc=False)
    assert loaded.args.rope_scaling_factor == 32
    with torch.no_grad():
        expected = original(tokens).logits
        logits = loaded.model(tokens.to(loaded.device), torch.arange(512, device=loaded.device)[None], None).cpu()
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_arguments_say_what_the_configuration_says(name):
    from transformers import CONFIG_MAPPING

    from megatron_dmc.convert import _arguments
    from megatron_dmc.families import Architecture

    model_type, settings = MODELS[name]
    config = CONFIG_MAPPING[model_type](**SIZES | settings).to_dict()
    model = Architecture.from_config(config, "config.json")
    dtypes = {chunk.key: torch.bfloat16 for chunk in model.chunks()}
    args = _arguments(model, "somewhere", dtypes)
    assert args.params_dtype == torch.bfloat16 and args.tokenizer_model == "somewhere"
    back = Architecture.from_args(args, model.vocabulary, "checkpoint")
    same_classes = {"mistral": "llama"}  # without a sliding window one is the other
    assert vars(back) == vars(model) | dict(model_type=same_classes.get(model_type, model_type))
    assert Architecture.from_config(back.config(), "config.json") == back


LLAMA_2_7B = dict(
    model_type="llama", hidden_act="silu", hidden_size=4096, intermediate_size=11008, max_position_embeddings=4096,
    num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=32, pretraining_tp=1, rms_norm_eps=1e-05,
    rope_scaling=None, tie_word_embeddings=False, torch_dtype="float16", vocab_size=32000,
)  # fmt: skip
LLAMA_31_8B = dict(
    model_type="llama", attention_bias=False, attention_dropout=0.0, hidden_act="silu", hidden_size=4096,
    intermediate_size=14336, max_position_embeddings=131072, mlp_bias=False, num_attention_heads=32,
    num_hidden_layers=32, num_key_value_heads=8, pretraining_tp=1, rms_norm_eps=1e-05, tie_word_embeddings=False,
    torch_dtype="bfloat16", vocab_size=128256, **LLAMA3,
)  # fmt: skip
QWEN_25_7B = dict(
    model_type="qwen2", attention_dropout=0.0, hidden_act="silu", hidden_size=3584, intermediate_size=18944,
    max_position_embeddings=131072, max_window_layers=28, num_attention_heads=28, num_hidden_layers=28,
    num_key_value_heads=4, rms_norm_eps=1e-06, rope_theta=1000000.0, sliding_window=131072,
    tie_word_embeddings=False, torch_dtype="bfloat16", use_mrope=False, use_sliding_window=False, vocab_size=152064,
)  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "config"),
    [("llama-2-7b", LLAMA_2_7B), ("llama-3.1-8b", LLAMA_31_8B), ("qwen2.5-7b", QWEN_25_7B)],
)
def test_recipes_have_the_flags_of_the_published_models(recipe, config):
    import yaml

    from megatron_dmc.families import Architecture

    written = yaml.safe_load((ROOT / "examples" / "recipes" / f"{recipe}.yaml").read_text())["model"]
    assert Architecture.from_config(config, recipe).flags() == written


def test_layers_under_keys_of_their_own(fresh_seed, small, tmp_path):
    """The other form of Megatron's checkpoints, that of models whose layers differ."""
    from dataclasses import replace

    from megatron.core import dist_checkpointing

    from megatron_dmc.convert import to_hugging_face, to_megatron
    from megatron_dmc.distributed_checkpoint import Reader, write
    from megatron_dmc.families import Architecture

    to_megatron(small, tmp_path / "stacked")
    stacked = Reader(tmp_path / "stacked" / "release")
    chunks = {}
    for chunk in Architecture.from_config(json.loads((small / "config.json").read_text()), "config.json").chunks():
        own = chunk
        if chunk.key.startswith("decoder.layers."):
            name = chunk.key.removeprefix("decoder.layers.")
            own = replace(
                chunk, key=f"decoder.layers.{chunk.offset[0]}.{name}", shape=chunk.shape[1:], size=chunk.size[1:],
                offset=chunk.offset[1:],
            )  # fmt: skip
        chunks[own] = chunk
    common = dist_checkpointing.load_common_state_dict(str(tmp_path / "stacked" / "release"))
    (tmp_path / "own").mkdir()
    write(
        tmp_path / "own",
        [(own, torch.float32) for own in chunks],
        lambda own: stacked.read(chunks[own]).reshape(own.size),
        {},
        common,
    )
    to_hugging_face(tmp_path / "own", tmp_path / "back")
    assert_same_bits(tmp_path / "back", small)


def test_training_from_the_converted_model(fresh_seed, tmp_path):
    """Tensor-parallel ranks load it and save it again, with a padded vocabulary; the way back gives the same bits."""
    from megatron_dmc.config import DMCError
    from megatron_dmc.convert import to_hugging_face, to_megatron

    source, middle = tmp_path / "hf", tmp_path / "megatron"
    make(
        source, "qwen2", hidden_size=32, intermediate_size=64, num_hidden_layers=4, vocab_size=61,
        max_position_embeddings=24,
    )  # fmt: skip
    to_megatron(source, middle)
    same = [*DESCENT[:-1], 2, "--lr", 0, "--add-qkv-bias", "--norm-epsilon", 1e-6, "--save-interval", 2]
    common = [*same, "--load", middle, "--finetune"]
    run = train(*common, "--tensor-model-parallel-size", 2, "--save", tmp_path / "trained", processes=2)
    assert "successfully loaded checkpoint" in run.output and len(run.values("lm loss")) == 2
    _, notes = to_hugging_face(tmp_path / "trained", tmp_path / "back", like=source)
    assert "3 rows of padding left out" in notes
    assert_same_bits(tmp_path / "back", source)  # 61 rows of the 64
    # Without the original's configuration it follows from the arguments, and padding stays.
    model, notes = to_hugging_face(tmp_path / "trained", tmp_path / "from-args")
    assert model.vocabulary == 64 and "arguments" in notes
    padded = tensors(tmp_path / "from-args")["lm_head.weight"]
    assert torch.equal(padded[:61], tensors(source)["lm_head.weight"]) and not padded[61:].any()

    pipeline = ["--pipeline-model-parallel-size", 2]
    run = train(*common, *pipeline, "--dmc-stage", "zero-out", "--save", tmp_path / "zero-out", processes=2)
    assert "successfully loaded checkpoint" in run.output
    with pytest.raises(DMCError, match="dmc_stage = zero-out"):
        to_hugging_face(tmp_path / "zero-out", tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


MEASURED = """
import sys, threading, time
from pathlib import Path
from megatron_dmc.convert import to_hugging_face, to_megatron

def anonymous():
    text = Path("/proc/self/status").read_text()
    return int(text.split("RssAnon:")[1].split()[0]) * 1024

def watch():
    while True:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.001)

source, small, folder = map(Path, sys.argv[1:])
to_megatron(small, folder / "first")  # whatever is imported on the way
to_hugging_face(folder / "first", folder / "first-back")
peak = [0]
threading.Thread(target=watch, daemon=True).start()
for convert, origin, target in (
    (to_megatron, source, folder / "megatron"),
    (to_hugging_face, folder / "megatron", folder / "back"),
):
    peak[0] = before = anonymous()
    convert(origin, target)
    print("GROWTH", peak[0] - before)
"""


def test_memory_is_bounded_by_a_layer(fresh_seed, tmp_path):
    from safetensors.torch import save_file

    from megatron_dmc.families import Architecture

    make(tmp_path / "small", "llama")
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    config |= dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=14, vocab_size=1024, head_dim=128)
    chunks = list(Architecture.from_config(config, "config.json").chunks())
    shapes = {name: shape for c in chunks for name, shape in zip(c.sources, c.source_shapes, strict=True)}
    weights = {name: torch.randn(shape) for name, shape in shapes.items()}
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "config.json").write_text(json.dumps(config))
    save_file(weights, tmp_path / "big" / "model.safetensors")
    size = sum(w.nbytes for w in weights.values())
    layer = sum(w.nbytes for name, w in weights.items() if name.startswith("model.layers.0."))
    run = python("-c", MEASURED, tmp_path / "big", tmp_path / "small", tmp_path)
    assert run.code == 0, run.output[-5000:]
    growth = [int(line.split()[1]) for line in run.output.splitlines() if line.startswith("GROWTH")]
    assert len(growth) == 2
    assert max(growth) < 1.5 * layer < size / 5, (growth, layer, size)
    assert_same_bits(tmp_path / "back", tmp_path / "big")


def test_command(fresh_seed, tmp_path):
    make(tmp_path / "hf", "llama", dtype=torch.bfloat16)
    run = dmc("convert", tmp_path / "hf", tmp_path / "megatron")
    assert run.code == 0 and "the model's flags" in run.output and "100%" in run.output, run.output
    flags = (tmp_path / "megatron" / "model.yaml").read_text()
    assert "num-query-groups: 2\n" in flags and "padded-vocab-size: 261\n" in flags
    run = dmc("convert", tmp_path / "megatron", tmp_path / "back")
    assert run.code == 0 and "; there is no tokenizer" in run.output, run.output
    assert_same_bits(tmp_path / "back", tmp_path / "hf")


def change(folder, **settings):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))


def drop(folder, name, replacement=None):
    """Leave a tensor out of a folder of one file, or put another in its place."""
    from safetensors.torch import save_file

    content = tensors(folder)
    content.pop(name, None)
    save_file(content | ({} if replacement is None else {name: replacement}), folder / "model.safetensors")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    make(folder, "mistral", sliding_window=None, shard="1GB")
    return folder


Q = "model.layers.1.self_attn.q_proj.weight"
NORM = "decoder.final_layernorm.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: change(f, model_type="mixtral"), "model_type is 'mixtral'; convert knows llama"),
        (lambda f: change(f, sliding_window=16), "sliding_window is 16, and must be null"),
        (lambda f: change(f, attention_dropout=0.1), "attention_dropout is 0.1, and must be 0"),
        (lambda f: change(f, hidden_act="gelu"), "hidden_act is 'gelu', and must be silu"),
        (lambda f: change(f, quantization_config={"quant_method": "gptq"}), "quantization_config is"),
        (
            lambda f: change(f, rope_parameters=dict(rope_type="yarn", factor=4.0, rope_theta=1e4)),
            "rope_type is 'yarn', and must be default or llama3",
        ),
        (
            lambda f: change(f, rope_parameters=LLAMA3["rope_scaling"] | dict(rope_theta=1e4, high_freq_factor=2.0)),
            "high_freq_factor is 2.0, and must be 4",
        ),
        (lambda f: change(f, rope_parameters=dict(rope_type="default", rope_theta=0.5)), "rope_theta is 0.5"),
        (lambda f: change(f, hidden_size="many"), "config.json: transformers cannot read it as mistral"),
        (lambda f: change(f, num_hidden_layers=4), "lacks 9 tensors of a mistral: model.layers.3."),
        (lambda f: change(f, num_hidden_layers=2), "has 9 tensors that a mistral does not have: model.layers.2."),
        (lambda f: change(f, hidden_size=32), "has shape (261, 64); by config.json it has (261, 32)"),
        (lambda f: drop(f, "lm_head.weight"), "lacks 1 tensors of a mistral: lm_head.weight"),
        (lambda f: drop(f, "score.weight", torch.ones(2)), "does not have: score.weight"),
        (lambda f: drop(f, Q, torch.ones(64, 64, dtype=torch.int8)), f"{Q} is I8; convert knows F32, BF16, F16"),
        (lambda f: drop(f, Q, torch.ones(64, 64).bfloat16()), "save the model in one dtype"),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            "has no *.safetensors; convert reads no other",
        ),
        (lambda f: (f / "model.safetensors").write_bytes(b"cut"), "cannot read"),
        (lambda f: (f / "config.json").write_text("{"), "config.json"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json must hold a JSON object; it holds a list"),
    ],
)
def test_models_that_are_refused(small, tmp_path, spoil, message):
    from megatron_dmc.config import DMCError
    from megatron_dmc.convert import to_megatron

    shutil.copytree(small, tmp_path / "hf")
    spoil(tmp_path / "hf")
    with pytest.raises(DMCError) as error:
        to_megatron(tmp_path / "hf", tmp_path / "out")
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_targets_and_sources_that_are_refused(small, tmp_path):
    from argparse import Namespace

    from megatron_dmc.commands.convert import convert
    from megatron_dmc.config import DMCError
    from megatron_dmc.convert import to_hugging_face, to_megatron

    def command(source, **options):
        defaults = dict(like=None, overwrite=False, tokenizer=None, report=None)
        convert(Namespace(source=source, target=tmp_path / "out", **defaults | options))

    source, middle = tmp_path / "hf", tmp_path / "megatron"
    shutil.copytree(small, source)
    to_megatron(source, middle)
    other = tmp_path / "other"
    make(other, "llama", num_key_value_heads=1)
    (tmp_path / "empty").mkdir()
    for act, message in (
        (lambda: to_megatron(source, source), "must be another folder"),
        (lambda: to_megatron(source, tmp_path), "and not hold it"),
        (lambda: to_megatron(source, source / "config.json"), "is not a folder"),
        (
            lambda: to_megatron(source, middle),
            "is not empty: name another folder, or replace a conversion in it with --overwrite",
        ),
        (
            lambda: to_hugging_face(tmp_path / "empty", tmp_path / "out"),
            "is not a checkpoint of Megatron's distributed",
        ),
        (lambda: to_hugging_face(middle, tmp_path / "out", like=other), "is of another model than"),
        (lambda: to_hugging_face(middle, tmp_path / "out", like=tmp_path / "empty"), "cannot read"),
        (lambda: command(source, like=source), "--like is for the way back"),
        (lambda: command(source, report=source), "--report is for the model card of a DMC model"),
        (lambda: command(middle, report=source), "has been trained without DMC"),
        (lambda: command(tmp_path / "none"), "no folder"),
    ):
        with pytest.raises(DMCError) as error:
            act()
        assert message in str(error.value)
    assert not (tmp_path / "out").exists()
    (middle / "notes.txt").write_text("mine")
    to_megatron(source, middle, overwrite=True)
    assert (middle / "notes.txt").read_text() == "mine"
    # A conversion that is cut short leaves nothing that opens.
    (middle / "latest_checkpointed_iteration.txt").unlink()
    with pytest.raises(DMCError, match="is not a checkpoint"):
        to_hugging_face(middle, tmp_path / "out")


def test_arguments_that_are_refused(small, tmp_path):
    from argparse import Namespace

    from megatron_dmc.config import DMCError
    from megatron_dmc.convert import _arguments
    from megatron_dmc.families import Architecture

    model = Architecture.from_config(json.loads((small / "config.json").read_text()), "config.json")
    args = vars(_arguments(model, small, {"decoder.layers.mlp.linear_fc2.weight": torch.float32}))
    for change, message in (
        (dict(num_experts=8), "num_experts is 8, and must be None"),
        (dict(normalization="LayerNorm", swiglu=False), "normalization is 'LayerNorm', and must be RMSNorm; swiglu"),
        (dict(add_qkv_bias=True, qk_layernorm=True), "of the families none has both"),
    ):
        with pytest.raises(DMCError) as error:
            Architecture.from_args(Namespace(**args | change), 261, "checkpoint")
        assert message in str(error.value)
    del args["rotary_base"]
    with pytest.raises(DMCError, match=r"checkpoint holds other arguments than Megatron 0.19 saves: .*rotary_base"):
        Architecture.from_args(Namespace(**args), 261, "checkpoint")


def resized(chunk, key, rows):
    """In place of one chunk, another of so many rows."""
    from dataclasses import replace

    return replace(chunk, key=key, shape=(rows,), size=(rows,), offset=(0,))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda chunks, common: common.pop("args"), "holds no arguments that say what model it is"),
        (
            lambda chunks, common: chunks.append((resized(chunks[-1][0], "decoder.extra", 3), torch.float32)),
            "has tensors that are no part of the model by its arguments: decoder.extra",
        ),
        (
            lambda chunks, common: chunks.append((chunks.pop()[0], torch.float64)),
            "has tensors of float32, float64; convert knows float32, bfloat16 and float16",
        ),
        (lambda chunks, common: chunks.pop(), "has no tensor output_layer.weight; it has decoder.final_layernorm"),
        (
            lambda chunks, common: chunks.append((resized(chunks.pop(-2)[0], NORM, 65), torch.float32)),
            f"{NORM} has shape (65,); by the arguments it has (64,)",
        ),
    ],
)
def test_checkpoints_that_are_refused(megatron, small, tmp_path, spoil, message):
    """On the way back, before anything is written."""
    from megatron_dmc.config import DMCError
    from megatron_dmc.convert import _arguments, to_hugging_face
    from megatron_dmc.distributed_checkpoint import write
    from megatron_dmc.families import Architecture

    model = Architecture.from_config(json.loads((small / "config.json").read_text()), "config.json")
    args = _arguments(model, small, {"decoder.layers.mlp.linear_fc2.weight": torch.float32})
    chunks, common = [(chunk, torch.float32) for chunk in model.chunks()], dict(args=args, iteration=0)
    spoil(chunks, common)
    dtypes = dict(chunks)
    (tmp_path / "checkpoint").mkdir()
    write(tmp_path / "checkpoint", chunks, lambda c: torch.zeros(c.size, dtype=dtypes[c]), {}, common)
    with pytest.raises(DMCError) as error:
        to_hugging_face(tmp_path / "checkpoint", tmp_path / "out")
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_rows_without_tokens(tmp_path):
    """A published model has more rows than its tokenizer has tokens, and not many more."""
    from argparse import ArgumentParser

    from megatron.training.arguments import _add_tokenizer_args

    from megatron_dmc.checkpoint import _tokenizer
    from megatron_dmc.commands.prepare_data import train_tokenizer
    from megatron_dmc.config import DMCError

    train_tokenizer(["some text"], 257, str(tmp_path))

    def opened(rows, padding):
        args = _add_tokenizer_args(ArgumentParser()).parse_args(["--tokenizer-type", "HuggingFaceTokenizer"])
        vars(args).update(tokenizer_model=str(tmp_path), padded_vocab_size=rows, rank=0, tensor_model_parallel_size=1)
        args.pad_vocab_size = False
        return _tokenizer(args, None, padding).vocab_size

    assert opened(257, 1) == opened(259, 1) == opened(384, 128) == 257
    for rows, padding in ((256, 1), (260, 1), (385, 128)):
        with pytest.raises(DMCError, match=f"has 257 tokens, the model an embedding of {rows}"):
            opened(rows, padding)
