"""Settings: one dataclass behind flags, YAML and checkpoints, and errors that say what is allowed."""

import argparse
from types import SimpleNamespace

import pytest

from megatron_dmc.config import AS_PUBLISHED, DMCConfig, DMCError, add_flags


def test_flags_are_nvidias():
    args = add_flags(argparse.ArgumentParser()).parse_args([])
    assert DMCConfig.from_args(args) == DMCConfig()
    assert (args.dmc_init_val, args.dmc_window_size, args.dmc_temp, args.dmc_cr) == (2.5, 12, 0.15, 4.0)
    assert (args.dmc_noise_scale, AS_PUBLISHED["dmc_noise_scale"]) == (0.5, 1.0)
    assert (AS_PUBLISHED["dmc_init_val"], AS_PUBLISHED["dmc_temp"]) == (5.0, 0.1)
    given = "--dmc-stage retrofit --dmc-cr 8 --dmc-window-size 0 --dmc-temp 0.2 --dmc-init-val 3 --dmc-no-noise"
    given += " --dmc-noise-scale 0.7 --dmc-no-zero-decisions"
    args = add_flags(argparse.ArgumentParser()).parse_args(given.split())
    assert DMCConfig.from_args(args) == DMCConfig("retrofit", 8.0, 3.0, 0, 0.2, 0.7, False, False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(dmc_stage="retro"), "one of zero-out, retrofit, finetune; got 'retro'"),
        (dict(dmc_cr=0.5), "dmc_cr must be a compression ratio of at least 1; got 0.5"),
        (dict(dmc_cr=float("nan")), "dmc_cr"),
        (dict(dmc_cr="4"), "dmc_cr"),
        (dict(dmc_window_size=-1), "dmc_window_size"),
        (dict(dmc_window_size=1.5), "dmc_window_size"),
        (dict(dmc_window_size=float("inf")), "dmc_window_size must be a whole number of tokens, .* got inf"),
        (dict(dmc_window_size=float("nan")), "dmc_window_size must be a whole number of tokens, .* got nan"),
        (dict(dmc_temp=0), "dmc_temp must be a positive temperature"),
        (dict(dmc_init_val=float("inf")), "dmc_init_val"),
        (dict(dmc_noise="no"), "dmc_noise"),
        (dict(dmc_noise_scale=0), "dmc_noise_scale must be a positive number .dmc_noise: false draws none.; got 0"),
        (dict(dmc_moving_offset=1), "dmc_moving_offset must be true or false; got 1"),
        (dict(dmc_hard_steps=1), "dmc_hard_steps must be a share of steps, at least 0 and less than 1; got 1"),
        (dict(dmc_hard_steps=-0.1), "dmc_hard_steps"),
        (dict(dmc_kernel="fast"), "dmc_kernel must be auto or one of cudnn, flash, dense, reference; got 'fast'"),
    ],
)
def test_values_out_of_range(change, message):
    with pytest.raises(DMCError, match=message):
        DMCConfig(**change)


def test_a_window_is_a_whole_number_however_it_is_written():
    window = DMCConfig(dmc_window_size=12.0).dmc_window_size
    assert window == 12 and isinstance(window, int)


def test_yaml_has_the_flags_names(tmp_path, monkeypatch):
    path = tmp_path / "dmc.yaml"
    path.write_text("dmc_stage: finetune\ndmc-cr: 2\ndmc_noise: false\n")
    assert DMCConfig.from_yaml(path) == DMCConfig(dmc_stage="finetune", dmc_cr=2, dmc_noise=False)
    monkeypatch.setenv("DMC_CONFIG", str(path))
    assert DMCConfig.from_environment().dmc_stage == "finetune" and DMCConfig.from_environment().dmc_hard_finetune


def test_models_from_before_it_could_be_otherwise_were_trained_as_published():
    saved = dict(dmc_stage="finetune", dmc_cr=2.0, hidden_size=8)
    assert DMCConfig.from_saved(saved) == DMCConfig("finetune", 2.0, **AS_PUBLISHED)
    assert DMCConfig.from_saved(saved).soft
    assert not DMCConfig.from_saved(saved | dict(dmc_hard_finetune=True)).soft
    assert DMCConfig.from_saved({}) == DMCConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dmc_stage: retrofit\ndmc_ratio: 4\n", "unknown keys: dmc_ratio; allowed are dmc_stage, dmc_cr"),
        ("- 1\n", "must hold `key: value` lines; got a list"),
        ("dmc_stage: [", "cannot read"),
        ("dmc_stage: retrofit\ndmc_cr: 0.5\n", "at least 1"),
        ("dmc_cr: 2\n", "must name a stage"),
        ("", "must name a stage"),
    ],
)
def test_yaml_mistakes(tmp_path, monkeypatch, text, message):
    path = tmp_path / "dmc.yaml"
    path.write_text(text)
    monkeypatch.setenv("DMC_CONFIG", str(path))
    with pytest.raises(DMCError, match=message):
        DMCConfig.from_environment()


def test_no_yaml(monkeypatch):
    monkeypatch.delenv("DMC_CONFIG", raising=False)
    with pytest.raises(DMCError, match="set DMC_CONFIG"):
        DMCConfig.from_environment()
    monkeypatch.setenv("DMC_CONFIG", "/nowhere.yaml")
    with pytest.raises(DMCError, match=r"cannot read DMC's settings from /nowhere.yaml"):
        DMCConfig.from_environment()


def test_arguments_of_a_checkpoint_without_dmc():
    assert DMCConfig.from_args(SimpleNamespace(num_layers=3)).dmc_stage is None
