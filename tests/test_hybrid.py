"""`HybridModel` with DMC's layers: the same training as `GPTModel`'s, and what it refuses."""

import copy
import math
from importlib.util import find_spec

import pytest
import torch
from runs import MODEL, python
from test_layer import BATCH, SEQ, config, gpt
from test_layouts_on_gpus import RETROFIT, SHAPE

from megatron_dmc.config import AS_PUBLISHED, DMCConfig, DMCError

pytestmark = pytest.mark.usefixtures("megatron")
DMC = DMCConfig(dmc_stage="finetune", dmc_cr=4.0, **AS_PUBLISHED | dict(dmc_init_val=0.1, dmc_temp=0.5))
PATTERN = "*-*-"


@pytest.fixture
def stack(monkeypatch):
    """Megatron's own stack is Transformer Engine's; this one is of the local spec's modules."""
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.hybrid import hybrid_block
    from megatron.core.ssm.mlp_layer import MLPLayer
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

    monkeypatch.setattr(hybrid_block, "TENorm", WrappedTorchNorm)
    layer = get_gpt_layer_local_spec(normalization="RMSNorm").submodules
    attention = TransformerLayerSubmodules(
        input_layernorm=layer.input_layernorm, self_attention=layer.self_attention, self_attn_bda=get_bias_dropout_add
    )
    mlp = TransformerLayerSubmodules(
        pre_mlp_layernorm=layer.pre_mlp_layernorm, mlp=layer.mlp, mlp_bda=get_bias_dropout_add
    )
    return ModuleSpec(
        module=hybrid_block.HybridStack,
        submodules=hybrid_block.HybridStackSubmodules(
            attention_layer=ModuleSpec(module=TransformerLayer, submodules=attention),
            mlp_layer=ModuleSpec(module=MLPLayer, submodules=mlp),
        ),
    )


def hybrid(stack, pattern=PATTERN, dmc=DMC):
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    from megatron_dmc.hybrid import dmc_stack

    return HybridModel(
        config(num_layers=len(pattern), is_hybrid_model=True), dmc_stack(pattern, dmc=dmc, base=stack), vocab_size=64,
        max_sequence_length=64, hybrid_layer_pattern=pattern, position_embedding_type="rope", rotary_base=100,
    ).to("cuda")  # fmt: skip


def name_in_gpt(name):
    """A hybrid model has a layer for each half of one of `GPTModel`'s."""
    before, found, after = name.partition("decoder.layers.")
    if not found:
        return name.replace("final_norm", "final_layernorm")
    number, rest = after.split(".", 1)
    return f"{before}{found}{int(number) // 2}.{rest}"


def step(model, compression, tokens):
    compression.begin_step(0, 10)
    model(tokens, torch.arange(SEQ, device="cuda").expand(BATCH, -1), None).square().mean().backward()
    return compression.end_step()


def test_hybrid_trains_as_gpt(fresh_seed, stack):
    """Outputs, gradients with the compression loss's, and counts, of the same weights and without noise."""
    import dataclasses

    quiet = dataclasses.replace(DMC, dmc_noise=False)
    ours, reference = hybrid(stack, dmc=quiet).train(), gpt(config(num_layers=2), quiet).train()
    weights = dict(reference.named_parameters())
    with torch.no_grad():
        for name, p in ours.named_parameters():
            p.copy_(weights[name_in_gpt(name)])
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in weights.values())
    tokens = torch.randint(0, 64, (BATCH, SEQ), device="cuda")
    report = step(ours, ours.config.dmc_compression, tokens)
    expected = step(reference, reference.config.dmc_compression, tokens)
    assert 1.2 < expected.ratio < 4 and report.ratio == expected.ratio and report.loss == expected.loss
    assert report.layer_ratios.isnan().tolist() == [False, True, False, True]
    assert report.layer_ratios[::2].tolist() == expected.layer_ratios.tolist()
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, weights[name_in_gpt(name)].grad, rtol=1e-5, atol=1e-6, msg=name)


def test_other_layers_stay(stack):
    from megatron.core.ssm.mlp_layer import MLPLayer

    from megatron_dmc.attention import DMCSelfAttention

    before = copy.deepcopy(stack.submodules.attention_layer.submodules.self_attention)
    model = hybrid(stack)
    assert [type(layer) is MLPLayer for layer in model.decoder.layers] == [False, True, False, True]
    assert isinstance(model.decoder.layers[0].self_attention, DMCSelfAttention)
    assert stack.submodules.attention_layer.submodules.self_attention.module is before.module  # not changed in place


def test_refusals(stack, monkeypatch):
    with pytest.raises(DMCError, match="the layer pattern '--' has no attention layer"):
        hybrid(stack, "--")

    from megatron_dmc.hybrid import DMCHybridStack, dmc_stack_spec

    assert dmc_stack_spec.module is DMCHybridStack
    monkeypatch.setattr("megatron.training.global_vars._GLOBAL_ARGS", None)
    with pytest.raises(DMCError, match="needs the whole model's layer pattern"):
        DMCHybridStack(config(), stack.submodules)


HYBRID = [*SHAPE, "--hybrid-layer-pattern", "*-*-", *RETROFIT[:-1], "4"]


@pytest.mark.gpu
def test_hybrid_models(tmp_path):
    """Megatron's own stack of Transformer Engine's modules, by flags and by `--spec`."""
    pytest.importorskip("transformer_engine")
    model = [f for i, f in enumerate(MODEL) if "--num-layers" not in (f, MODEL[i - 1])]
    flags = [f for f in HYBRID if f != "--finetune"]
    run = python("-m", "megatron_dmc", "train", *model, *flags)
    assert run.code == 0, run.output[-6000:]
    assert all(map(math.isfinite, run.values("lm loss"))) and max(run.values("compression ratio")) > 1.1

    settings = tmp_path / "dmc.yaml"
    settings.write_text("dmc_stage: retrofit\ndmc_cr: 4\ndmc_init_val: 0.3\ndmc_temp: 0.3\n")
    plain = [f for i, f in enumerate(flags) if not f.startswith("--dmc") and not flags[i - 1].startswith("--dmc")]
    spec = ["--spec", "megatron_dmc.hybrid", "dmc_stack_spec"]
    by_spec = python("-m", "megatron_dmc", "train", *model, *plain, *spec, DMC_CONFIG=str(settings))
    assert by_spec.code == 0, by_spec.output[-6000:]
    assert by_spec.values("lm loss") == pytest.approx(run.values("lm loss"), rel=1e-2)


@pytest.mark.skipif(find_spec("transformer_engine") is not None, reason="Transformer Engine is installed")
def test_hybrid_models_need_transformer_engine():
    run = python("-m", "megatron_dmc", "train", *MODEL, "--hybrid-layer-pattern", "*-*-", "--train-iters", 1)
    assert run.code != 0 and "Megatron's hybrid models are made of Transformer Engine; install it" in run.output
