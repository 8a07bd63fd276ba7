"""The layer spec: `--spec megatron_dmc.spec dmc_layer_spec` in any Megatron script."""

from __future__ import annotations

import copy
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dmc import megatron_hooks
from megatron_dmc.attention import DMCSelfAttention, check_model
from megatron_dmc.compression import Compression, passes_in_flight
from megatron_dmc.config import DMCConfig, DMCError

megatron_hooks.keep_compiled_helpers()


def dmc_layer_spec(
    config: Any, vp_stage: int | None = None, *, dmc: DMCConfig | None = None
) -> ModuleSpec | TransformerBlockSubmodules:
    """Megatron's layer spec for `config`, its self-attention replaced by DMC's.

    Args:
        config: the `TransformerConfig`, or a model config or provider that holds one in `transformer`.
        vp_stage: the chunk of an interleaved pipeline.
        dmc: the settings; from the YAML file that `DMC_CONFIG` names unless given.

    Returns:
        A spec of one layer, or of the block where layers differ (mixture of experts), with Transformer Engine's or
        Megatron's own modules as `config.transformer_impl` says.

    Raises:
        DMCError: for settings or a model that DMC cannot serve.
    """
    transformer: TransformerConfig = getattr(config, "transformer", config)
    compression = prepare_model(transformer, dmc)
    return with_dmc(_base_spec(transformer, vp_stage), compression)


def prepare_model(
    config: TransformerConfig, dmc: DMCConfig | None = None, *, deciding: int | None = None
) -> Compression:
    """Check the model and settings, and join the model to Megatron's training loop; once per model.

    The resulting `Compression` hangs on the config (`config.dmc_compression`), so that all chunks of an interleaved
    pipeline, and the training loop, find the same one.

    Args:
        config: of the whole model.
        dmc: the settings; from the YAML file that `DMC_CONFIG` names unless given.
        deciding: how many layers have DMC's attention, all of them unless given.
    """
    check_model(config)
    compression = getattr(config, "dmc_compression", None)
    if compression is None:
        dmc = dmc or DMCConfig.from_environment()
        compression = Compression(
            dmc,
            config.num_layers,
            config.num_query_groups,
            config.calculate_per_token_loss,
            deciding,
            passes_in_flight(config),
        )
        config.dmc_compression = compression
        config.experimental_attention_variant_loss_scale_func = compression.set_loss_scale
        megatron_hooks.install(compression)
    return compression


def _base_spec(config: TransformerConfig, vp_stage: int | None) -> ModuleSpec | TransformerBlockSubmodules:
    if config.transformer_impl not in ("transformer_engine", "local"):
        raise DMCError(f"transformer_impl must be transformer_engine or local; got {config.transformer_impl!r}")
    with_te = config.transformer_impl == "transformer_engine"
    if config.num_moe_experts is not None:
        return get_gpt_decoder_block_spec(
            config, with_te, normalization=config.normalization, qk_l2_norm=config.qk_l2_norm, vp_stage=vp_stage
        )
    common = dict(
        qk_layernorm=config.qk_layernorm,
        qk_l2_norm=config.qk_l2_norm,
        use_kitchen=config.use_kitchen,
        use_kitchen_attention=config.use_kitchen_attention,
        kitchen_attention_backend=config.kitchen_attention_backend,
    )
    if with_te:
        return get_gpt_layer_with_transformer_engine_spec(
            use_te_activation_func=config.use_te_activation_func,
            use_te_op_fuser=config.use_transformer_engine_op_fuser,
            use_grouped_gemm_for_dense_mlp=config.use_grouped_gemm_for_dense_mlp,
            **common,
        )
    return get_gpt_layer_local_spec(normalization=config.normalization, **common)


def with_dmc(spec: Any, compression: Compression) -> Any:
    """A copy of a layer's spec, or a block's, its self-attention replaced by DMC's."""
    if isinstance(spec, TransformerBlockSubmodules):
        spec.layer_specs = [with_dmc(layer, compression) for layer in spec.layer_specs]
        return spec
    # Megatron shares specs between layers and models: ours must not reach the others.
    spec = copy.copy(spec)
    spec.submodules = copy.copy(spec.submodules)
    attention = spec.submodules.self_attention
    if not (isinstance(attention, ModuleSpec) and attention.module is SelfAttention):
        raise DMCError(
            f"DMC replaces SelfAttention; this model's layers have {getattr(attention, 'module', attention)}"
        )
    spec.submodules.self_attention = ModuleSpec(
        module=DMCSelfAttention,
        params={**attention.params, "compression": compression},
        submodules=attention.submodules,
        metainfo=attention.metainfo,
    )
    return spec
