"""Configurations of models whose KV cache compresses itself, by Dynamic Memory Compression (DMC)."""

import transformers

MINIMUM = "5.0"
"""The oldest version of transformers that this code runs on: older ones do not read `rope_parameters`."""


def _check_version() -> None:
    have, need = (
        tuple(int(part) for part in version.split(".")[:2]) for version in (transformers.__version__, MINIMUM)
    )
    if have < need:
        raise ImportError(
            f"models with DMC need transformers {MINIMUM} or later, and {transformers.__version__} is installed: "
            f"pip install 'transformers>={MINIMUM}'"
        )


_check_version()

from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config  # noqa: E402

# In all of them, besides the family's own settings:
#   dmc_window_size: how many tokens back a merge reaches; 0 sets no limit.
#   dmc_init_val: the offset c, subtracted from a token's decision and added to its importance.
# The others record how its last stage was trained: dmc_stage, dmc_cr (the compression ratio it was trained towards),
# dmc_temp, dmc_noise_scale, dmc_noise, dmc_zero_decisions, dmc_moving_offset, dmc_hard_steps, dmc_hard_finetune,
# dmc_kernel.


class DMCLlamaConfig(LlamaConfig):
    """Llama's configuration with DMC's settings."""

    model_type = "dmc_llama"


class DMCMistralConfig(MistralConfig):
    """Mistral's configuration with DMC's settings."""

    model_type = "dmc_mistral"


class DMCQwen2Config(Qwen2Config):
    """Qwen2's configuration with DMC's settings."""

    model_type = "dmc_qwen2"


class DMCQwen3Config(Qwen3Config):
    """Qwen3's configuration with DMC's settings."""

    model_type = "dmc_qwen3"
