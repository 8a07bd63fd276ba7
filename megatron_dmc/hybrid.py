"""DMC in `HybridModel`, Megatron's successor of `GPTModel`: `--spec megatron_dmc.hybrid dmc_stack_spec`.

A hybrid model is a pattern of layers, such as `M*-` for Mamba, attention and MLP, and a stack spec that says what each
kind is. Here its attention layers (`*`) compress; all others are Megatron's.
"""

from __future__ import annotations

import copy
from typing import Any

from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols, parse_hybrid_pattern
from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dmc.config import DMCConfig, DMCError
from megatron_dmc.spec import prepare_model, with_dmc


class DMCHybridStack(HybridStack):
    """Megatron's stack of layers, its attention replaced by DMC's.

    Args:
        layer_pattern: of the whole model; in Megatron's training loop its `--hybrid-layer-pattern` unless given.
        dmc: the settings; from the YAML file that `DMC_CONFIG` names unless given.
        Others as for `HybridStack`.

    Raises:
        DMCError: for settings or a model that DMC cannot serve.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: HybridStackSubmodules,
        *args: Any,
        layer_pattern: str | None = None,
        dmc: DMCConfig | None = None,
        **kwargs: Any,
    ) -> None:
        pattern = parse_hybrid_pattern(layer_pattern or _pattern_of_training()).main_pattern or ""
        if Symbols.ATTENTION not in pattern:
            raise DMCError(f"the layer pattern {pattern!r} has no attention layer ({Symbols.ATTENTION}) to compress")
        compression = prepare_model(config, dmc, deciding=pattern.count(Symbols.ATTENTION))
        submodules = copy.copy(submodules)  # others keep theirs, layers of multi-token prediction among them
        submodules.attention_layer = with_dmc(submodules.attention_layer, compression)
        super().__init__(config, submodules, *args, **kwargs)


def dmc_stack(
    layer_pattern: str | None = None, *, dmc: DMCConfig | None = None, base: ModuleSpec = hybrid_stack_spec
) -> ModuleSpec:
    """The stack spec for `HybridModel`.

    Args:
        layer_pattern, dmc: see `DMCHybridStack`.
        base: the stack spec to begin with, Megatron's own unless given.
    """
    params = {**base.params, "layer_pattern": layer_pattern, "dmc": dmc}
    return ModuleSpec(module=DMCHybridStack, params=params, submodules=base.submodules, metainfo=base.metainfo)


dmc_stack_spec = dmc_stack()
"""For `--spec`: Megatron's own stack, the pattern from `--hybrid-layer-pattern`, the settings from `DMC_CONFIG`."""


def _pattern_of_training() -> str:
    try:
        from megatron.training.global_vars import get_args

        pattern = get_args().hybrid_layer_pattern
    except (ImportError, AssertionError):  # no training loop, or not in it
        pattern = None
    if not pattern:
        raise DMCError("DMC needs the whole model's layer pattern: dmc_stack(layer_pattern, …)")
    return pattern
