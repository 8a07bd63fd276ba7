"""The Megatron layer against the reference operations, in every form that Megatron builds it; and what it refuses."""

import math
from types import SimpleNamespace

import pytest
import torch

from megatron_dmc.compression import Compression
from megatron_dmc.config import DMCConfig, DMCError
from megatron_dmc.ops.reference import dmc_attention, rotate, zero_out_attention

pytestmark = pytest.mark.usefixtures("megatron")
SEQ, BATCH = 21, 2


def config(**changes):
    from megatron.core.transformer.transformer_config import TransformerConfig

    settings = dict(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=48,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        transformer_impl="local",
        use_cpu_initialization=True,
        normalization="RMSNorm",
        add_bias_linear=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        init_method_std=0.4,
        params_dtype=torch.float32,
    )
    return TransformerConfig(**{**settings, **changes})


def gpt(cfg, dmc=None, **changes):
    from megatron.core.models.gpt import GPTModel

    from megatron_dmc.spec import dmc_layer_spec

    dmc = dmc or DMCConfig(dmc_stage="retrofit", dmc_init_val=0.1)
    settings = dict(vocab_size=64, max_sequence_length=64, position_embedding_type="rope", rotary_base=100)
    model = GPTModel(cfg, dmc_layer_spec(cfg, dmc=dmc), **{**settings, **changes})
    # Biases and gains start at constants that would hide a mistake; these leave decisions both ways.
    for name, p in model.named_parameters():
        if p.dim() == 1:
            torch.nn.init.uniform_(p, *((-0.3, 0.3) if name.endswith("bias") else (0.5, 1.5)))
    return model.to("cuda")


def captured(model, layer=0):
    """Run the model; return what went into attention layer `layer`, its output and the angles it was given."""
    attention = model.decoder.layers[layer].self_attention
    seen = {}

    def keep(module, args, kwargs, output):
        seen.update(
            hidden=args[0] if args else kwargs["hidden_states"], rotary=kwargs.get("rotary_pos_emb"), output=output[0]
        )

    handle = attention.register_forward_hook(keep, with_kwargs=True)
    tokens = torch.randint(0, 64, (BATCH, SEQ), device="cuda")
    model(tokens, torch.arange(SEQ, device="cuda").expand(BATCH, -1), None)
    handle.remove()
    return attention, seen


def rotary_tables(angles, interleaved=False, magnitude=1.0):
    """From the angle of every channel, as Megatron gives it, to one of every pair."""
    angles = angles[:, 0, 0]
    angles = angles[:, ::2] if interleaved else angles[:, : angles.shape[-1] // 2]
    return angles.cos() * magnitude, angles.sin() * magnitude


def by_hand(attention, hidden, angles, dmc, magnitude=1.0, temperature=None):
    """The layer's output from its weights, without Megatron's code: projection, norms, DMC, output projection."""
    cfg = attention.config
    d, g = cfg.kv_channels, cfg.num_query_groups
    r = cfg.num_attention_heads // g
    qkv = hidden @ attention.linear_qkv.weight.T
    if attention.linear_qkv.bias is not None:
        qkv = qkv + attention.linear_qkv.bias
    parts = qkv.unflatten(-1, (g, -1, d))  # per KV head: queries, [gates,] key, value
    query, key, value = parts[..., :r, :].flatten(2, 3), parts[..., -2, :], parts[..., -1, :]
    norm = lambda x, m: x if m is None else m(x)  # noqa: E731
    query, key = norm(query, attention.q_layernorm), norm(key, attention.k_layernorm)
    rotary = None if angles is None else rotary_tables(angles, cfg.rotary_interleaved, magnitude)
    out, alpha = dmc_attention(
        query, key, value, rotary,
        window=dmc.dmc_window_size, offset=dmc.dmc_init_val, temperature=temperature,
        interleaved=cfg.rotary_interleaved,
    )  # fmt: skip
    out = out.flatten(2)
    if cfg.attention_output_gate:
        out = out * torch.sigmoid(parts[..., r : 2 * r, :].flatten(2))
    out = out @ attention.linear_proj.weight.T
    return out, alpha


VARIANTS = {
    "gqa": {},
    "mha": dict(num_query_groups=4),
    "mqa": dict(num_query_groups=1),
    "qkv bias": dict(add_qkv_bias=True),
    "qk rms norm": dict(qk_layernorm=True),
    "qk layer norm": dict(qk_layernorm=True, normalization="LayerNorm"),
    "qk l2 norm": dict(qk_l2_norm=True),
    "interleaved": dict(rotary_interleaved=True),
    "wide heads": dict(kv_channels=12),
    "output gate": dict(attention_output_gate=True),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_layer_is_the_reference(fresh_seed, variant):
    dmc = DMCConfig(dmc_stage="retrofit", dmc_init_val=0.1, dmc_window_size=3, dmc_temp=0.7, dmc_noise=False)
    model = gpt(config(**VARIANTS[variant]), dmc)
    for training, step, temperature in ((False, 0, None), (True, 0, 0.7), (True, 1, None)):  # half the steps are hard
        model.train(training)
        model.config.dmc_compression.begin_step(step, 2)
        attention, seen = captured(model, layer=1)
        want, alpha = by_hand(attention, seen["hidden"], seen["rotary"], dmc, temperature=temperature)
        torch.testing.assert_close(seen["output"], want, rtol=1e-4, atol=1e-4)
        assert 0.02 < alpha.float().mean() < 0.98


def test_finetune_trains_what_inference_computes(fresh_seed):
    model = gpt(config(), DMCConfig(dmc_stage="finetune", dmc_init_val=0.1))
    compression = model.config.dmc_compression
    compression.begin_step(0, 10)
    compression.offset += 0.1  # it moves
    tokens, positions = torch.randint(0, 64, (BATCH, SEQ), device="cuda"), torch.arange(SEQ, device="cuda")
    arguments = tokens, positions.expand(BATCH, -1), None
    expected, merged = model.eval()(*arguments), []
    for layer in model.decoder.layers:  # KV heads of (2 queries, key, value) of 8 channels; a key's last one decides
        layer.self_attention.linear_qkv.register_forward_hook(
            lambda _, __, out: merged.append(out[0][1:, :, 23::32] > 0.2)
        )
    output = model.train()(*arguments)
    torch.testing.assert_close(output, expected)
    output.square().mean().backward()
    for layer, merges in zip(model.decoder.layers, merged, strict=True):
        grads = layer.self_attention.linear_qkv.weight.grad.norm(dim=1)
        # A head with one entry alone attends to that, whatever query and key are; queries' last channels weigh tokens.
        alone = merges.all(1).all(0).tolist()
        rows = [32 * g + i for g in range(2) for i in range(24) if i == 23 or (alone[g] and i not in (7, 15))]
        assert (grads == 0).nonzero().flatten().tolist() == rows
    assert 1.1 < compression.end_step().ratio < 10
    compression.offset -= 0.1
    assert not torch.allclose(model.eval()(*arguments), expected, atol=1e-3)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("per_token", [False, True])
def test_what_merging_costs_is_taken_out_of_the_gradient(fresh_seed, per_token, layers):
    """The same step once more has no gradient along a shift of all decisions. (Of one layer: what a layer's decisions
    are charged reaches those of layers before it, and takes further steps.)"""
    dmc = DMCConfig(dmc_stage="retrofit", dmc_init_val=0.1, dmc_temp=0.5)
    model = gpt(config(num_layers=layers, add_qkv_bias=True, calculate_per_token_loss=per_token), dmc).train()
    compression = model.config.dmc_compression
    tokens, positions = torch.randint(0, 64, (BATCH, SEQ), device="cuda"), torch.arange(SEQ, device="cuda")
    attentions = [layer.self_attention for layer in model.decoder.layers]
    last = [(g + 1) * 32 - 9 for g in range(2)]  # of the keys, in KV heads of (2 queries, key, value) of 8
    scale = 3.0  # as a scaled loss has it
    compression.set_loss_scale(torch.tensor([scale], device="cuda"))  # as Megatron has it
    along = []
    for _ in range(2):
        model.zero_grad()
        compression.begin_step(0, 10)  # the same noise
        for _ in range(2):
            (scale * model(tokens, positions.expand(BATCH, -1), None).square().mean()).backward()
        grads = torch.stack([a.linear_qkv.bias.grad[last] for a in attentions])
        along.append(grads.sum().item())
        unit = scale / (layers * 2 * (1 if per_token else BATCH * SEQ))
        allowed = 1e-4 * grads.abs().sum().item() + 1e-5 * abs(along[0])  # some cancel others
        assert compression._counts[2].sum().item() * unit == pytest.approx(along[-1], abs=allowed)
        compression.end_step()
        assert compression.offset == 0.1  # half the steps are on hard decisions, and move it
    assert compression.multiplier != 0 and (layers > 1 or abs(along[1]) < 1e-3 * abs(along[0]))
    multiplier = compression.multiplier
    compression.begin_step(1, 10)
    model(tokens, positions.expand(BATCH, -1), None).square().mean().backward()
    compression.end_step()
    assert compression.multiplier == multiplier and compression.offset != 0.1


POSITIONS = {
    "rope": dict(position_embedding_type="rope"),
    "partial rope": dict(position_embedding_type="rope", rotary_percent=0.5),
    "interpolated": dict(position_embedding_type="rope", seq_len_interpolation_factor=2.0),
    "llama 3": dict(position_embedding_type="rope", rope_scaling=True),
    "learned": dict(position_embedding_type="learned_absolute"),
    "none": dict(position_embedding_type="none"),
    "yarn": dict(position_embedding_type="yarn"),
}


YARN = dict(
    yarn_rotary_scaling_factor=4.0,
    yarn_original_max_position_embeddings=16,
    yarn_beta_fast=32.0,
    yarn_beta_slow=1.0,
    yarn_mscale=1.0,
    yarn_mscale_all_dim=0.0,
    yarn_correction_range_round_to_int=True,
)


@pytest.mark.parametrize("positions", POSITIONS)
def test_positions(fresh_seed, positions):
    dmc = DMCConfig(dmc_stage="retrofit", dmc_init_val=0.1)
    cfg, magnitude = config(), 1.0
    if positions == "yarn":
        vars(cfg).update(YARN)
        magnitude = 0.1 * math.log(4.0) + 1
    attention, seen = captured(gpt(cfg, dmc, **POSITIONS[positions]).eval())
    assert (seen["rotary"] is None) == (positions in ("learned", "none"))
    want, _ = by_hand(attention, seen["hidden"], seen["rotary"], dmc, magnitude)
    torch.testing.assert_close(seen["output"], want, rtol=1e-4, atol=1e-4)


def test_layers_without_rotation(fresh_seed):
    dmc = DMCConfig(dmc_stage="retrofit", dmc_init_val=0.1)
    model = gpt(config(no_rope_freq=[0, 1]), dmc).eval()
    for layer, rotates in enumerate((True, False)):
        attention, seen = captured(model, layer)
        want, _ = by_hand(attention, seen["hidden"], seen["rotary"] if rotates else None, dmc)
        torch.testing.assert_close(seen["output"], want, rtol=1e-4, atol=1e-4)


def test_mixture_of_experts(fresh_seed):
    from megatron_dmc.attention import DMCSelfAttention

    cfg = config(
        num_moe_experts=2, moe_router_topk=1, moe_router_pre_softmax=True, moe_layer_freq=[0, 1], moe_ffn_hidden_size=48
    )
    model = gpt(cfg)
    assert [type(layer.self_attention) for layer in model.decoder.layers] == [DMCSelfAttention] * 2
    assert [type(layer.mlp).__name__ for layer in model.decoder.layers] == ["MLP", "MoELayer"]
    captured(model.eval())


def test_the_spec_leaves_megatrons_own_alone():
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.attention import SelfAttention

    gpt(config())
    assert get_gpt_layer_local_spec().submodules.self_attention.module is SelfAttention


def test_local_attention_backend_does_not_replace_dmc(fresh_seed):
    """`--attention-backend local` sets the spec's core attention to Megatron's own after the spec is made."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    from megatron_dmc.attention import DMCCoreAttention
    from megatron_dmc.spec import dmc_layer_spec

    cfg = config()
    spec = dmc_layer_spec(cfg, dmc=DMCConfig(dmc_stage="retrofit"))
    spec.submodules.self_attention.submodules.core_attention = DotProductAttention
    from megatron.core.models.gpt import GPTModel

    model = GPTModel(cfg, spec, 64, 64)
    assert isinstance(model.decoder.layers[0].self_attention.core_attention, DMCCoreAttention)


RECOMPUTE = {
    "none": {},
    "selective": dict(recompute_granularity="selective", recompute_modules=["core_attn"]),
    "full": dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
}


def recomputed_step(how, seed):
    """Gradients and counts of a training step with noise, two micro-batches under way, whatever is recomputed."""
    dmc = DMCConfig(dmc_stage="finetune", dmc_init_val=0.1, dmc_temp=0.5, dmc_hard_finetune=False)
    torch.manual_seed(seed)
    model = gpt(config(**RECOMPUTE[how]), dmc).train()
    model.config.dmc_compression.begin_step(0, 10)
    torch.manual_seed(seed + 1)
    model.config.dmc_compression.seed = seed
    tokens, positions = torch.randint(0, 64, (BATCH, SEQ), device="cuda"), torch.arange(SEQ, device="cuda")
    losses = [model(tokens, positions.expand(BATCH, -1), None).square().mean() for _ in range(2)]
    assert losses[0] != losses[1]  # by their noise
    for loss in losses:
        loss.backward()
    return [p.grad for p in model.parameters()], model.config.dmc_compression._counts


@pytest.mark.parametrize("how", ["selective", "full"])
def test_recomputation_repeats_the_noise_and_counts_once(fresh_seed, how):
    grads, counts = recomputed_step(how, fresh_seed)
    expected_grads, expected_counts = recomputed_step("none", fresh_seed)
    assert counts[1].tolist() == [2 * SEQ * BATCH * 2] * 2
    assert torch.equal(counts, expected_counts)
    for a, b in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_noise_is_logistic_and_the_same_for_a_head_in_every_layout(fresh_seed):
    """Ranks that share out the heads draw, from the same state, their shares of what one process draws."""
    from megatron_dmc.attention import DMCCoreAttention

    class Group:
        def __init__(self, rank, size):
            self._rank, self._size = rank, size

        def rank(self):
            return self._rank

        def size(self):
            return self._size

    def draw(rank, size, cp=1, exchange="a2a"):
        collection = type("Groups", (), {"tp": Group(rank // cp, size // cp), "cp": Group(rank % cp, cp)})
        compression = Compression(DMCConfig(dmc_stage="retrofit"), 2, 4)
        compression.begin_step(5, 10)
        groups = dict(pg_collection=collection, cp_comm_type=exchange)
        core = DMCCoreAttention(config(), 1, compression=compression, **groups)
        torch.cuda.manual_seed(torch.seed())
        heads = 4 // size if exchange == "a2a" else 4 * cp // size
        return core._noise(torch.zeros(500, 4, heads, 8, device="cuda")).sample(500, 4, heads)

    whole = draw(0, 1)
    assert torch.equal(torch.cat([draw(0, 2), draw(1, 2)], -1), whole)
    assert torch.equal(torch.cat([draw(rank, 4, cp=2) for rank in range(4)], -1), whole)
    gathered = [draw(rank, 4, 2, "all_gather") for rank in range(4)]  # all heads of a tensor-parallel rank
    assert torch.equal(gathered[0], gathered[1]) and torch.equal(torch.cat(gathered[1:3], -1), whole)
    assert whole.isfinite().all()
    standard = whole / DMCConfig().dmc_noise_scale
    assert abs(standard.mean()) < 0.15 and abs(standard.var() / (math.pi**2 / 3) - 1) < 0.15


def test_gathered_context_has_no_room_for_unlimited_windows():
    """For a model that is built outside of Megatron's training loop, whose arguments were checked before."""
    from megatron_dmc.attention import DMCCoreAttention

    def core(ranks, exchange, window):
        group = SimpleNamespace(size=lambda: ranks, rank=lambda: 0)
        compression = Compression(DMCConfig(dmc_stage="retrofit", dmc_window_size=window), 2, 4)
        groups = dict(pg_collection=SimpleNamespace(tp=group, cp=group), cp_comm_type=exchange)
        return DMCCoreAttention(config(), 1, compression=compression, **groups)

    for fine in ((1, "all_gather", 0), (2, "a2a", 0), (2, "all_gather", 1)):
        core(*fine)
    with pytest.raises(DMCError, match="dmc_window_size = 0 lets a merge reach back to the sequence's first token"):
        core(2, "all_gather", 0)


def generate(model, tokens, cuts):
    from megatron.core.inference.contexts import StaticInferenceContext

    context = StaticInferenceContext(tokens.shape[0], tokens.shape[1])
    logits = []
    for start, stop in zip([0, *cuts], [*cuts, tokens.shape[1]], strict=True):
        positions = torch.arange(start, stop, device="cuda").expand(len(tokens), -1)
        logits.append(model(tokens[:, start:stop], positions, None, inference_context=context))
        context.sequence_len_offset = stop
    return torch.cat(logits, 1), context


@pytest.mark.parametrize("positions", ["rope", "learned", "yarn", "none"])
@pytest.mark.parametrize("cuts", [list(range(1, SEQ)), [7, 8, 15]])
def test_generation_is_evaluation(fresh_seed, cuts, positions):
    cfg = config()
    if positions == "yarn":
        vars(cfg).update(YARN)
    model = gpt(cfg, **POSITIONS[positions]).eval()
    tokens = torch.randint(0, 64, (BATCH, SEQ), device="cuda")
    with torch.no_grad():
        want = model(tokens, torch.arange(SEQ, device="cuda").expand(BATCH, -1), None)
        got, context = generate(model, tokens, cuts)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert all(
        c.tokens == SEQ and 0 < c.lengths.sum() < SEQ * c.lengths.numel()
        for c in context.key_value_memory_dict.values()
    )


def test_a_compressed_cache_cannot_be_rewound(fresh_seed):
    model = gpt(config()).eval()
    tokens = torch.randint(0, 64, (1, 6), device="cuda")
    with torch.no_grad():
        _, context = generate(model, tokens, [])
        context.sequence_len_offset = 3
        with pytest.raises(DMCError, match="cannot be rewound"):
            model(tokens[:, 3:4], torch.tensor([[3]], device="cuda"), None, inference_context=context)


@pytest.mark.parametrize("last_channel", [1.0, 0.4, 0.0])
def test_zero_out_stage(fresh_seed, last_channel):
    model = gpt(config(), DMCConfig(dmc_stage="zero-out")).eval()
    model.config.dmc_compression.last_channel = last_channel
    attention, seen = captured(model)
    parts = (seen["hidden"] @ attention.linear_qkv.weight.T).unflatten(-1, (2, 4, 8))
    query, key, value = parts[..., :2, :].flatten(2, 3), parts[..., 2, :], parts[..., 3, :]
    rotary = rotary_tables(seen["rotary"])
    want = zero_out_attention(query, key, value, rotary, last_channel=last_channel)
    torch.testing.assert_close(seen["output"], want.flatten(2) @ attention.linear_proj.weight.T, rtol=1e-4, atol=1e-4)
    if last_channel == 1.0:  # the original attention
        q, k, v = (x.permute(1, 2, 0, 3) for x in (rotate(query, rotary), rotate(key, rotary), value))
        plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        torch.testing.assert_close(want, plain.permute(2, 0, 1, 3), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "variant", ["gqa", "mha", "qkv bias", "qk rms norm", "qk layer norm", "qk l2 norm", "output gate"]
)
@pytest.mark.parametrize("decisions", [False, True])
def test_zeroed_last_channel(fresh_seed, variant, decisions):
    """The last channel of queries, and with `decisions` that of keys, is 0 for any input; nothing else has changed."""
    model = gpt(config(**VARIANTS[variant]), DMCConfig(dmc_stage="zero-out"))
    attention = model.decoder.layers[0].self_attention
    hidden = torch.randn(5, 3, 32, device="cuda")
    before = attention.get_query_key_value_tensors(hidden, output_gate=attention.config.attention_output_gate)
    assert attention.zeroed_rows() == (False, False)
    assert attention.zero_last_channel(decisions) and attention.zeroed_rows() == (True, decisions)
    after = attention.get_query_key_value_tensors(hidden, output_gate=attention.config.attention_output_gate)
    changed = before[:2] if decisions else before[:1]
    for b, a in zip(changed, after, strict=False):
        assert b[..., -1].abs().min() > 0
        assert not a[..., -1].any()
        if "norm" not in variant:
            assert torch.equal(b[..., :-1], a[..., :-1])
    for b, a in zip(before[len(changed) :], after[len(changed) :], strict=True):
        assert torch.equal(b, a)
    assert not attention.zero_last_channel(decisions)  # nothing left to change


REFUSED = {
    "window_size": dict(window_size=(4, 0)),
    "softmax_type": dict(softmax_type="learnable"),
    "attention_dropout": dict(attention_dropout=0.1),
    "context_parallel_size": dict(context_parallel_size=4, cp_comm_type="a2a"),
    "context_parallel_size = 2": dict(context_parallel_size=2, tensor_model_parallel_size=2, cp_comm_type="a2a"),
    "cp_comm_type = None": dict(context_parallel_size=2),
    "cp_comm_type = 'p2p'": dict(context_parallel_size=2, cp_comm_type="p2p"),
    "cp_comm_type = .'a2a', 'p2p'.": dict(context_parallel_size=2, cp_comm_type=["a2a", "p2p"]),
    "tensor_model_parallel_size": dict(tensor_model_parallel_size=4),
    "tensor_model_parallel_size = 4 .ranks share out 2 KV heads: set it to a divisor of 2": dict(
        tensor_model_parallel_size=4
    ),
    "gtp_weight_remat_size = 2 .*--tensor-parallel-num-weight-shards": dict(gtp_weight_remat_size=2),
    "heterogeneous_block_specs": dict(heterogeneous_block_specs=True),
    "log_max_attention_logit": dict(log_max_attention_logit=True),
    "fp8_dot_product_attention": dict(fp8_dot_product_attention=True),
    "cuda_graph_impl = 'local'": dict(cuda_graph_impl="local"),
    "transformer_impl must be transformer_engine or local; got 'inference_optimized'": dict(
        transformer_impl="inference_optimized"
    ),
    "fused_single_qkv_rope": dict(fused_single_qkv_rope=True),
    "flash_decode": dict(flash_decode=True),
    "qk_clip": dict(qk_clip=True),
    "experimental_attention_variant": dict(experimental_attention_variant="dsa"),
}


@pytest.mark.parametrize("setting", REFUSED)
def test_refusals_name_the_setting(setting):
    from megatron_dmc.spec import dmc_layer_spec

    cfg = config()
    for name, value in REFUSED[setting].items():  # past Megatron's own checks, which forbid some in company
        setattr(cfg, name, value)
    with pytest.raises(DMCError, match=setting):
        dmc_layer_spec(cfg, dmc=DMCConfig(dmc_stage="retrofit"))


def test_another_attention_is_refused():
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from megatron_dmc.spec import with_dmc

    spec = get_gpt_layer_local_spec()
    spec.submodules.self_attention = torch.nn.Identity
    with pytest.raises(DMCError, match=r"DMC replaces SelfAttention; this model's layers have .*Identity"):
        with_dmc(spec, Compression(DMCConfig("retrofit"), 2, 2))


def test_megatrons_choices_of_mlp_reach_its_spec(monkeypatch):
    """What its own builder passes on to the spec of Transformer Engine's layers."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from megatron_dmc import spec

    passed = {}
    monkeypatch.setattr(
        spec, "get_gpt_layer_with_transformer_engine_spec", lambda **options: passed.update(options) or local()
    )
    local = get_gpt_layer_local_spec
    cfg = config(transformer_impl="transformer_engine", use_transformer_engine_op_fuser=True)
    cfg.use_grouped_gemm_for_dense_mlp = True
    spec.dmc_layer_spec(cfg, dmc=DMCConfig(dmc_stage="retrofit"))
    assert passed["use_te_op_fuser"] is passed["use_grouped_gemm_for_dense_mlp"] is True


def test_multi_latent_attention_is_refused():
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    from megatron_dmc.spec import dmc_layer_spec

    cfg = MLATransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=4, attention_dropout=0.0)
    with pytest.raises(DMCError, match="multi_latent_attention"):
        dmc_layer_spec(cfg, dmc=DMCConfig(dmc_stage="retrofit"))


def packed(lengths):
    from megatron.core.packed_seq_params import PackedSeqParams

    borders = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    longest = max(lengths)
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=borders, cu_seqlens_kv=borders, max_seqlen_q=longest, max_seqlen_kv=longest
    )


@pytest.mark.parametrize("stage", ["zero-out", "retrofit"])
@pytest.mark.parametrize("how", ["none", "full"])
@pytest.mark.parametrize("positions", ["rope", "none"])
def test_packed_documents_are_as_if_alone(fresh_seed, stage, how, positions):
    """Outputs and gradients of a model, packed as Megatron packs documents in either way, and one by one."""
    dmc = DMCConfig(dmc_stage=stage, dmc_init_val=0.1, dmc_temp=0.5, dmc_noise=False)
    model = gpt(config(**RECOMPUTE[how]), dmc, position_embedding_type=positions).train()
    compression = model.config.dmc_compression
    compression.begin_step(0, 2)  # nothing is asked for yet, whatever the number of tokens in a pass
    compression.last_channel = 0.4
    lengths = [1, 9, 2, 6]
    rows = torch.randint(0, 64, (2, sum(lengths)), device="cuda")
    weight = torch.randn(2, sum(lengths), 64, device="cuda")

    def step(passes):
        model.zero_grad()
        outputs = [model(tokens, torch.arange(tokens.shape[1], device="cuda").expand_as(tokens), mask, **more)
                   for tokens, mask, more in passes]  # fmt: skip
        output = torch.cat([x.flatten(0, 1) for x in outputs])
        (output * weight.flatten(0, 1)).sum().backward()
        return [output.detach(), *(p.grad for p in model.parameters())]

    apart = [step([(part, None, {}) for row in rows for part in row[None].split(lengths, 1)])]
    apart.append(step([(row[None], None, dict(packed_seq_params=packed(lengths))) for row in rows]))
    apart.append(step([(rows.view(1, -1), None, dict(packed_seq_params=packed(lengths + lengths)))]))
    compression.packed_by_mask = True
    document = torch.arange(4).repeat_interleave(torch.tensor(lengths))
    mask = (document[:, None] != document).logical_or(torch.ones(18, 18).triu(1) > 0).expand(2, 1, -1, -1).cuda()
    apart.append(step([(rows, mask, {})]))
    for got in apart[1:]:
        for a, b in zip(got, apart[0], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-4 * b.abs().max().item())
    with pytest.raises(DMCError, match="this layer got none"):
        step([(rows, None, {})])


def test_packed_documents_are_read_once_for_each_pass(fresh_seed, monkeypatch):
    """Also where all layers run again in backward passes, and where a loop writes other borders to the same place."""
    from megatron_dmc.ops.documents import Documents

    times, read = 0, Documents.from_borders

    def counted(*args):
        nonlocal times
        times += 1
        return read(*args)

    monkeypatch.setattr(Documents, "from_borders", counted)
    cfg = config(**RECOMPUTE["full"])
    cfg.pipeline_model_parallel_size = 2
    model = gpt(cfg).train()
    assert model.config.dmc_compression.passes == 2
    model.config.dmc_compression.begin_step(0, 2)
    rows, positions = torch.randint(0, 64, (1, 8), device="cuda"), torch.arange(8, device="cuda")[None]
    losses = [model(rows, positions, None, packed_seq_params=packed([n, 8 - n])).sum() for n in (2, 5)]
    for loss in losses:
        loss.backward()
    assert times == 2

    def evaluate(params):
        with torch.no_grad():
            return model.eval()(rows, positions, None, packed_seq_params=params)

    params = packed([2, 6])
    before = evaluate(params)
    params.cu_seqlens_q[1] = 5
    after = evaluate(params)
    assert not torch.allclose(before, after) and torch.equal(after, evaluate(packed([5, 3]))) and times == 5
    params.cu_seqlens_q = packed([2, 6]).cu_seqlens_q
    assert torch.equal(before, evaluate(params))


def test_one_mask_for_all_sequences(fresh_seed):
    model = gpt(config()).eval()
    model.config.dmc_compression.packed_by_mask = True
    document = torch.arange(4).repeat_interleave(torch.tensor([1, 9, 2, 6])).cuda()
    mask = (document[:, None] != document).logical_or(torch.ones(18, 18, device="cuda").triu(1) > 0)[None, None]
    rows, positions = torch.randint(0, 64, (3, 18), device="cuda"), torch.arange(18, device="cuda").expand(3, -1)
    with torch.no_grad():
        assert torch.equal(model(rows, positions, mask), model(rows, positions, mask.expand(3, -1, -1, -1)))
        with pytest.raises(DMCError, match=r"\[b, 1, s, s\] with b = 3 sequences, .* got \(2, 1, 18, 18\)"):
            model(rows, positions, mask.expand(2, -1, -1, -1))


def test_what_attention_ran_on_is_noted(fresh_seed, monkeypatch):
    """Documents run on the flash kernel where cuDNN is asked for."""
    import megatron_dmc.attention

    model, ran = gpt(config(), DMCConfig(dmc_stage="retrofit", dmc_kernel="cudnn", dmc_noise=False)).train(), []

    def attend(*args, kernel, **options):
        ran.append(kernel)
        return dmc_attention(*args, **options)

    monkeypatch.setattr(megatron_dmc.attention, "dmc_attention", attend)
    compression = model.config.dmc_compression
    compression.begin_step(0, 2)
    rows, positions = torch.randint(0, 64, (1, 8), device="cuda"), torch.arange(8, device="cuda")[None]
    for params, kernel in ((packed([2, 6]), "flash"), (None, "cudnn")):
        model(rows, positions, None, packed_seq_params=params)
        assert ran[-1] == compression.kernel == kernel


def test_packed_documents_are_for_training(fresh_seed):
    from megatron.core.inference.contexts import StaticInferenceContext

    attention = gpt(config()).decoder.layers[0].self_attention
    hidden = torch.zeros(3, 1, 32, device="cuda")
    with pytest.raises(DMCError, match="packed documents are for training"):
        attention(hidden, None, inference_context=StaticInferenceContext(1, 8), packed_seq_params=packed([3]))
    attention.config.mrope_section = [1, 1, 2]
    with pytest.raises(DMCError, match="position_embedding_type = mrope"):
        attention(hidden, None, rotary_pos_emb=torch.zeros(3, 1, 1, 8, device="cuda"), packed_seq_params=packed([3]))
    params = packed([3])
    params.qkv_format = "sbhd"
    with pytest.raises(DMCError, match="qkv_format = 'thd'; got 'sbhd'"):
        attention(hidden, None, packed_seq_params=params)


@pytest.mark.parametrize(
    "argument", ["attention_bias", "key_value_states", "rotary_pos_cos", "rotary_pos_sin", "rotary_pos_cos_sin"]
)
def test_arguments_without_meaning_are_refused(argument):
    attention = gpt(config()).decoder.layers[0].self_attention
    with pytest.raises(DMCError, match=argument):
        attention(torch.zeros(3, 1, 32, device="cuda"), None, **{argument: torch.zeros(1)})


def test_where_there_is_nothing_to_generate_from(fresh_seed):
    from megatron_dmc import attention

    tokens = torch.zeros(1, 3, dtype=torch.long, device="cuda")
    model = gpt(config(), DMCConfig(dmc_stage="zero-out")).eval()
    with pytest.raises(DMCError, match="stage zero-out does not compress: there is no cache to generate from"):
        generate(model, tokens, [])
    core = gpt(config()).decoder.layers[0].self_attention.core_attention
    core._cp = type("Two", (), {"size": lambda _: 2})()
    call = attention.DMCCall(rotary=None, cache=object())
    with pytest.raises(DMCError, match="with context parallelism does not generate: load it with context_parallel_si"):
        core(None, None, None, None, attention_bias=call)


def test_dynamic_inference_is_refused():
    class Dynamic:
        def is_static_batching(self):
            return False

    attention = gpt(config()).decoder.layers[0].self_attention
    with pytest.raises(DMCError, match="StaticInferenceContext; got Dynamic"):
        attention(torch.zeros(3, 1, 32, device="cuda"), None, inference_context=Dynamic())


def test_all_chunks_of_a_model_share_one_compression():
    cfg = config()
    first = gpt(cfg).config.dmc_compression
    second = gpt(cfg).decoder.layers[0].self_attention.core_attention.compression
    assert isinstance(first, Compression) and first is second


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_transformer_engine_layer(fresh_seed, dtype):
    """The Transformer Engine spec builds DMC layers whose training step and generation agree with the reference."""
    pytest.importorskip("transformer_engine")
    dmc = DMCConfig(dmc_stage="retrofit", dmc_init_val=0.1, dmc_temp=0.7, dmc_noise=False)
    precision = dict(bf16=True) if dtype is torch.bfloat16 else dict(fp16=True)
    cfg = config(
        transformer_impl="transformer_engine", params_dtype=dtype, hidden_size=64, qk_layernorm=True, **precision
    )
    model = gpt(cfg, dmc).to(dtype)
    from megatron_dmc.attention import DMCSelfAttention

    assert isinstance(model.decoder.layers[0].self_attention, DMCSelfAttention)
    model.config.dmc_compression.begin_step(1, 2)
    tokens = torch.randint(0, 64, (BATCH, SEQ), device="cuda")
    positions = torch.arange(SEQ, device="cuda").expand(BATCH, -1)
    model.train()(tokens, positions, None).float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    with torch.no_grad():
        want = model(tokens, positions, None).float()
        got, _ = generate(model, tokens, list(range(1, SEQ)))
    # Entries are stored in `dtype`, and a decision near its threshold may fall the other way: compare typical errors.
    assert (got.float() - want).abs().median() < 0.05 * want.abs().mean()
