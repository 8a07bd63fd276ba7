"""The settings of DMC: one dataclass, read from flags, from a YAML file or from a checkpoint, validated once."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

STAGES = ("zero-out", "retrofit", "finetune")
"""The three stages, in order: free the last channel, learn to merge, settle at the target ratio."""

CONFIG_VARIABLE = "DMC_CONFIG"
"""Environment variable that names the YAML file of settings, for scripts that do not know DMC's flags."""


KERNELS = ("cudnn", "flash", "dense", "reference")
"""What attention can run on in training, see `megatron_dmc.ops.fused`: cuDNN attention, PyTorch's flash kernel,
attention written out in float32 (quadratic memory, any dtype: for tests), or the reference operations."""


AS_PUBLISHED = dict(
    dmc_init_val=5.0, dmc_temp=0.1, dmc_noise_scale=1.0, dmc_zero_decisions=False, dmc_moving_offset=False,
    dmc_hard_steps=0.0, dmc_hard_finetune=False,
)  # fmt: skip
"""The settings in which our recipe departs from the published one, as they are there."""


class DMCError(ValueError):
    """A mistake that its reader can mend: the message says what was given, what is allowed and what to do."""


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class DMCConfig:
    """How a model compresses its cache and how it learns to. Names and defaults are NVIDIA's, where it published such a
    setting, but for the defaults that `AS_PUBLISHED` has.

    The same names serve as flags (`--dmc-window-size`), as keys of the YAML file and as attributes of the arguments
    that Megatron saves with a checkpoint.
    """

    dmc_stage: str | None = _setting(
        None, f"the stage to train: {', '.join(STAGES)}; left out, the model trains as it is"
    )
    dmc_cr: float = _setting(4.0, "target compression ratio: tokens per cache entry, at least 1")
    dmc_init_val: float = _setting(
        2.5, "offset c that makes an untrained model append every token; a checkpoint that merges brings its own"
    )
    dmc_window_size: int = _setting(12, "how many tokens back a merge reaches; 0 sets no limit")
    dmc_temp: float = _setting(0.15, "temperature of soft decisions in training")
    dmc_noise_scale: float = _setting(
        0.5,
        "scale of the noise of soft decisions in training (1, as published: the difference of two Gumbel variables), "
        "and of the offset's moves; with dmc_init_val and dmc_temp made smaller by the same factor, decisions learn "
        "faster by it",
    )
    dmc_noise: bool = _setting(True, "draw noise for soft decisions in training (off only to compare runs)")
    dmc_zero_decisions: bool = _setting(
        True,
        "set the key rows that make decisions to 0 at the end of the stage zero-out, so that these start from nothing "
        "(off, as published: from what the rows were for attention)",
    )
    dmc_moving_offset: bool = _setting(
        True, "hold the ratio by the offset, which moves after every step (off: by the published compression loss)"
    )
    dmc_hard_steps: float = _setting(
        0.5, "share of the steps of the stage retrofit that train on the hard decisions of inference (published: 0)"
    )
    dmc_hard_finetune: bool = _setting(
        True, "train the stage finetune on the hard decisions of inference (off: soft ones with noise, as published)"
    )
    dmc_kernel: str = _setting(
        "auto", f"what attention runs on in training: auto, {', '.join(KERNELS)} (auto: the fastest that can)"
    )

    def __post_init__(self) -> None:
        def number(name: str, allowed: str, good) -> None:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not good(value):
                raise DMCError(f"{name} must be {allowed}; got {value!r}")

        if self.dmc_stage is not None and self.dmc_stage not in STAGES:
            raise DMCError(f"dmc_stage must be one of {', '.join(STAGES)}; got {self.dmc_stage!r}")
        number("dmc_cr", "a compression ratio of at least 1", lambda x: 1 <= x < float("inf"))
        number("dmc_init_val", "a finite number", lambda x: abs(x) < float("inf"))
        number("dmc_window_size", "a whole number of tokens, 0 for no limit", lambda x: x >= 0 and x % 1 == 0)
        object.__setattr__(self, "dmc_window_size", int(self.dmc_window_size))  # YAML may have 12.0
        number("dmc_temp", "a positive temperature", lambda x: 0 < x < float("inf"))
        number("dmc_noise_scale", "a positive number (dmc_noise: false draws none)", lambda x: 0 < x < float("inf"))
        number("dmc_hard_steps", "a share of steps, at least 0 and less than 1", lambda x: 0 <= x < 1)
        if self.dmc_kernel != "auto" and self.dmc_kernel not in KERNELS:
            raise DMCError(f"dmc_kernel must be auto or one of {', '.join(KERNELS)}; got {self.dmc_kernel!r}")
        for name in ("dmc_noise", "dmc_zero_decisions", "dmc_moving_offset", "dmc_hard_finetune"):
            if not isinstance(getattr(self, name), bool):
                raise DMCError(f"{name} must be true or false; got {getattr(self, name)!r}")

    @property
    def merges(self) -> bool:
        """Whether tokens merge in this stage, as opposed to the last channel only fading out."""
        return self.dmc_stage in ("retrofit", "finetune")

    @property
    def hard_share(self) -> float:
        """The share of this stage's steps that train on hard decisions."""
        return {"retrofit": self.dmc_hard_steps, "finetune": float(self.dmc_hard_finetune)}.get(self.dmc_stage, 0.0)

    @property
    def soft(self) -> bool:
        """Whether this stage teaches decisions, which takes soft ones; hard ones have no gradient."""
        return self.hard_share < 1

    def flags(self, names: Iterable[str]) -> str:
        """The flags that set these settings: `with --dmc-temp 0.1, without --dmc-no-noise`."""
        given, left_out = [], []
        for name in names:
            value = getattr(self, name)
            if isinstance(value, bool):
                (left_out if value else given).append(_flag(name, off=True))
            else:
                given.append(f"{_flag(name)} {value}")
        words = (("with", given), ("without", left_out))
        return ", ".join(f"{word} {' '.join(flags)}" for word, flags in words if flags)

    @classmethod
    def from_args(cls, args: Any) -> DMCConfig:
        """From a namespace of arguments: the parsed command line, or what a checkpoint has saved."""
        return cls.from_saved(vars(args))

    @classmethod
    def from_saved(cls, settings: Mapping[str, Any]) -> DMCConfig:
        """From settings among others, those of a checkpoint's arguments or of an exported model's `config.json`."""
        # A model from before it could be otherwise was trained as published.
        found = AS_PUBLISHED if settings.get("dmc_stage") is not None else {}
        return cls(**found | {f.name: settings[f.name] for f in fields(cls) if f.name in settings})

    @classmethod
    def from_yaml(cls, path: str | Path) -> DMCConfig:
        """From a YAML file with the flags' names as keys (`dmc_stage: retrofit` or `dmc-stage: retrofit`).

        Raises:
            DMCError: where the file is missing or no mapping, or has a key or value that is not allowed.
        """
        import yaml

        path = Path(path)
        try:
            settings = yaml.safe_load(path.read_text()) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise DMCError(f"cannot read DMC's settings from {path}: {error}") from error
        if not isinstance(settings, dict):
            raise DMCError(f"{path} must hold `key: value` lines; got a {type(settings).__name__}")
        settings = {str(key).replace("-", "_"): value for key, value in settings.items()}
        allowed = [f.name for f in fields(cls)]
        if unknown := sorted(set(settings) - set(allowed)):
            raise DMCError(f"{path} has unknown keys: {', '.join(unknown)}; allowed are {', '.join(allowed)}")
        return cls(**settings)

    @classmethod
    def from_environment(cls) -> DMCConfig:
        """From the file that `DMC_CONFIG` names.

        Raises:
            DMCError: where the variable is not set, or the file is wrong.
        """
        path = os.environ.get(CONFIG_VARIABLE)
        if not path:
            raise DMCError(
                f"DMC has no settings: set {CONFIG_VARIABLE} to a YAML file (one line such as `dmc_stage: retrofit` "
                "will do), or train with `python -m megatron_dmc train --dmc-stage …`"
            )
        config = cls.from_yaml(path)
        if config.dmc_stage is None:
            raise DMCError(f"{path} must name a stage: dmc_stage: {' | '.join(STAGES)}")
        return config


def _flag(name: str, off: bool = False) -> str:
    """A setting's flag; of one that is true or false, the flag that turns it off."""
    return name.replace("dmc_", "--dmc-no-" if off else "--dmc-", 1).replace("_", "-")


def add_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add `--dmc-…` flags to a parser, in the form of Megatron's `extra_args_provider`."""
    group = parser.add_argument_group("dmc", "Dynamic Memory Compression")
    for f in fields(DMCConfig):
        help = f.metadata["help"].replace("%", "%%")
        if f.type == "bool":
            assert f.default  # a flag turns it off
            group.add_argument(_flag(f.name, off=True), dest=f.name, action="store_false", help=f"do not {help}")
        else:
            kind = {"float": float, "int": int}.get(f.type, str)
            group.add_argument(_flag(f.name), type=kind, default=f.default, help=f"{help} (default: {f.default})")
    return parser
