"""Checkpoints in the layout of NVIDIA's published DMC models: they open, and loading them runs nothing."""

import argparse
import os
import shutil
from enum import Enum

import numpy
import pytest
import torch
from runs import dmc
from test_convert import make

from megatron_dmc import nvidia
from megatron_dmc.config import DMCError
from megatron_dmc.convert import nvidia_to_megatron, to_megatron
from megatron_dmc.distributed_checkpoint import Reader

pytestmark = pytest.mark.usefixtures("megatron")


class ModelType(Enum):
    """As arguments of Megatron hold one."""

    encoder_or_decoder = 1


class Command:
    """An object whose loading makes a file, or, by a module that torch's reader never takes, a folder."""

    def __init__(self, made, blocked=False):
        self.call = (os.mkdir, (str(made),)) if blocked else (shutil.copyfile, (__file__, str(made)))

    def __reduce__(self):
        return self.call


@pytest.fixture
def original(tmp_path, fresh_seed):
    """A model of Llama-2's kind as a folder of Hugging Face with a tokenizer, and its tensors by name."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    model = make(tmp_path / "hf", "llama", num_key_value_heads=4, dtype=torch.bfloat16)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(261)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1").save_pretrained(tmp_path / "hf")
    return tmp_path / "hf", model.state_dict()


def published(folder, weights, rank="mp_rank_00", **changes):
    """The same model as Megatron saved it at the end of 2024, with Transformer Engine's layers.

    Arguments have the names that they have in NVIDIA's branch `dmc`, and no others.
    """
    found = {
        "embedding.word_embeddings.weight": weights["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": weights["model.norm.weight"],
        "decoder.final_layernorm._extra_state": None,
        "output_layer.weight": weights["lm_head.weight"],
    }
    for i in range(3):
        theirs, ours = f"model.layers.{i}.", f"decoder.layers.{i}."
        heads = [weights[f"{theirs}self_attn.{x}_proj.weight"].unflatten(0, (4, -1)) for x in "qkv"]
        found |= {
            f"{ours}self_attention.linear_qkv.weight": torch.cat(heads, 1).flatten(0, 1),
            f"{ours}self_attention.linear_qkv.layer_norm_weight": weights[f"{theirs}input_layernorm.weight"],
            f"{ours}self_attention.linear_qkv._extra_state": torch.empty(0),
            f"{ours}self_attention.linear_proj.weight": weights[f"{theirs}self_attn.o_proj.weight"],
            f"{ours}mlp.linear_fc1.layer_norm_weight": weights[f"{theirs}post_attention_layernorm.weight"],
            f"{ours}mlp.linear_fc1.weight": torch.cat(
                [weights[f"{theirs}mlp.{x}_proj.weight"] for x in ("gate", "up")]
            ),
            f"{ours}mlp.linear_fc2.weight": weights[f"{theirs}mlp.down_proj.weight"],
        }
    args = dict(
        num_layers=3, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, group_query_attention=False,
        num_query_groups=1, kv_channels=16, max_position_embeddings=1024, norm_epsilon=1e-6, apply_layernorm_1p=False,
        normalization="RMSNorm", swiglu=True, add_bias_linear=False, add_qkv_bias=False, qk_layernorm=False,
        position_embedding_type="rope", rotary_base=10000, rotary_percent=1.0, use_rope_scaling=False,
        untie_embeddings_and_output_weights=True, padded_vocab_size=261, model_type=ModelType.encoder_or_decoder,
        bf16=True, params_dtype=torch.bfloat16, dmc_cr=4.0, dmc_init_val=5.0, dmc_window_size=12, dmc_temp=0.1,
        dmc_finetune=True, dmc_is_stage_one=False, dmc_paged_block_size=256,
    )  # fmt: skip
    content = dict(
        args=argparse.Namespace(**args), checkpoint_version=3.0, iteration=13722, model=found,
        opt_param_scheduler=dict(max_lr=3e-5), rng_state=[dict(np_rng_state=numpy.random.get_state())],
    )  # fmt: skip
    (folder / rank).mkdir(parents=True)
    torch.save(content | changes, folder / rank / nvidia.FILE)
    return args


def test_it_is_the_same_model(original, tmp_path):
    """Tensor by tensor that of the same weights from Hugging Face; and it opens as a DMC checkpoint."""
    from megatron_dmc.checkpoint import load

    hf, weights = original
    published(tmp_path / "published", weights)
    to_megatron(hf, tmp_path / "plain")
    run = dmc("convert", tmp_path / "published", tmp_path / "dmc", "--tokenizer", hf)
    assert run.code == 0, run.output
    plain, ours = (Reader(tmp_path / name / "release") for name in ("plain", "dmc"))
    assert plain.weights() == ours.weights() and len(ours.weights()) == 9
    from megatron.core import dist_checkpointing

    pairs = [dist_checkpointing.load_plain_tensors(str(tmp_path / name / "release")) for name in ("plain", "dmc")]
    for name in ours.weights():
        assert torch.equal(pairs[0][name], pairs[1][name]) and pairs[1][name].dtype == torch.bfloat16
    loaded = load(tmp_path / "dmc")
    assert loaded.model.config.layernorm_epsilon == 1e-6
    assert (loaded.dmc.dmc_stage, loaded.dmc.dmc_cr, loaded.dmc.dmc_window_size) == ("finetune", 4.0, 12)
    from megatron_dmc.evaluation import score

    (found,) = score(loaded, [([5, 6, 7], [8, 9])])
    assert found.log_prob < 0


def test_nothing_in_a_pickle_runs(original, tmp_path):
    _, weights = original
    for name, blocked, message in (
        ("args", False, "args and model must be a namespace"),
        ("rng_state", False, None),
        ("rng_state", True, "whose module posix is blocked"),
    ):
        folder, canary = tmp_path / f"{name} {blocked}", tmp_path / f"made by {name} {blocked}"
        published(folder, weights, **{name: Command(canary, blocked)})
        if message is None:
            nvidia.Legacy(nvidia.find(folder))
        else:
            with pytest.raises(DMCError, match=message):
                nvidia.Legacy(nvidia.find(folder))
        assert not canary.exists()
        torch.load(nvidia.find(folder), weights_only=False)
        assert canary.exists()  # it would have


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c: c.pop("args"), "has no args; it has checkpoint_version, iteration, model"),
        (lambda c: [c.pop("args"), c.pop("model")], "has no args and no model; it has"),
        (lambda c: c["model"].update(extra=torch.ones(2)), "has tensors that are no part of the model: extra"),
        (
            lambda c: c["model"].update({"decoder.layers.1.mlp.linear_fc2.weight": torch.ones(64, 96)}),
            "decoder.layers.1.mlp.linear_fc2.weight is torch.float32, in other layers it is torch.bfloat16",
        ),
        (lambda c: vars(c["args"]).update(apply_layernorm_1p=True), "layernorm_zero_centered_gamma is True"),
        (lambda c: vars(c["args"]).pop("norm_epsilon"), "holds other arguments than Megatron 0.19 saves"),
    ],
)
def test_content_that_is_refused(original, tmp_path, spoil, message):
    hf, weights = original
    published(tmp_path / "published", weights)
    file = nvidia.find(tmp_path / "published")
    content = torch.load(file, weights_only=False)
    spoil(content)
    torch.save(content, file)
    with pytest.raises(DMCError) as error:
        nvidia_to_megatron(tmp_path / "published", tmp_path / "target", hf)
    assert message in str(error.value)
    assert not (tmp_path / "target").exists()


def test_files_that_do_not_fit(original, tmp_path):
    hf, weights = original

    def refused(message, **changes):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        published(folder, weights, **changes)
        with pytest.raises(DMCError, match=message):
            nvidia_to_megatron(folder, tmp_path / "target", hf)
        assert not (tmp_path / "target").exists()
        return folder

    folder = refused("args and model must be", model=[])
    (folder / "mp_rank_01").mkdir()
    with pytest.raises(DMCError, match="a model in 2 parts"):
        nvidia.Legacy(nvidia.find(folder))
    lacking = {n: t for n, t in weights.items() if "layers.1.mlp.down" not in n}
    lacking["model.layers.1.mlp.down_proj.weight"] = torch.empty(0)
    weights, whole = lacking, weights
    refused(r"lacks decoder.layers.1.mlp.linear_fc2.weight")
    weights = dict(whole, **{"model.layers.1.mlp.down_proj.weight": torch.zeros(3, 3, dtype=torch.bfloat16)})
    refused(r"linear_fc2.weight has shape \(3, 3\); by its arguments it has \(64, 96\)")
    weights = whole
    args = argparse.Namespace(**published(tmp_path / "args", weights) | dict(swiglu=False))
    refused("swiglu is False", args=args)
    file = tmp_path / "args" / "mp_rank_00" / nvidia.FILE
    os.truncate(file, 1000)
    with pytest.raises(DMCError, match="cannot read"):
        nvidia.Legacy(file)
    for flags, message in (
        ([tmp_path / "args", tmp_path / "x"], "hold no tokenizer: give --tokenizer"),
        ([hf, tmp_path / "x", "--tokenizer", hf], "--tokenizer is for NVIDIA's DMC checkpoints"),
    ):
        run = dmc("convert", *flags)
        assert run.code != 0 and message in run.output
