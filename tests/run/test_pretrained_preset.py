"""A model from elsewhere gets the defaults of its size: said in one line, each key overridable."""

import re
from pathlib import Path

import pytest
import torch
from chat_models import chat_model

import agentrl
from agentrl.errors import ConfigError
from agentrl.run import presets
from agentrl.run.presets import misfits, preset_of, pretrained_values


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(tmp_path_factory.mktemp("model"))


def read(model: Path, *more: str, base: str | None = None) -> tuple[agentrl.RunConfig, list[str]]:
    lines: list[str] = []
    return agentrl.load_config(base, f"policy.path={model}", *more, warn=lines.append), lines


def test_a_model_from_elsewhere_gets_the_defaults_of_its_size_and_one_line_says_so(model: Path) -> None:
    config, lines = read(model)
    assert config.policy.preset == "pretrained"
    assert (config.learner.optimizer, config.learner.learning_rate) == ("adamw", 3e-5)
    assert (config.warm_start.steps, config.trainer.threads) == (0, None)
    assert (config.policy.max_context, config.policy.max_observation_tokens) == (None, None)
    assert len(lines) == 1
    assert "policy.preset=pretrained sets" in lines[0]
    assert "learner.optimizer=adamw" in lines[0]
    assert "warm_start.steps=0" in lines[0]


@pytest.mark.parametrize("key", ["data=own.jsonl", "data=[a.jsonl, b.json]", "from=runs/mine"])
def test_data_to_clone_asks_for_a_warm_start(key: str, model: Path, tmp_path: Path) -> None:
    config, lines = read(model, f"warm_start.{key}")
    assert config.warm_start.steps == 110
    assert "warm_start.steps" not in lines[0]
    assert "warm_start.learner.learning_rate=0.0001" in lines[0]
    with pytest.raises(agentrl.errors.ConfigError, match=r"warm_start\.steps is 0, wanted at least 1"):
        read(model, f"warm_start.{key}", "warm_start.steps=0")


def test_what_is_given_with_the_path_or_later_overrides_the_preset(model: Path, tmp_path: Path) -> None:
    config, lines = read(model, "learner.learning_rate=2e-4", "warm_start.steps=7", "trainer.threads=3")
    assert (config.learner.learning_rate, config.warm_start.steps, config.trainer.threads) == (2e-4, 7, 3)
    assert not any(key in lines[0] for key in ("learner.learning_rate=3e-05", "trainer.threads"))
    file = tmp_path / "own.yaml"
    file.write_text(f"extends: quickstart.yaml\npolicy: {{path: {model}}}\nlearner: {{optimizer: muon}}\n")
    from_file = agentrl.load_config(file, warn=lines.append)
    assert from_file.learner.optimizer == "muon"
    assert from_file.learner.learning_rate == 3e-5
    assert from_file.warm_start.steps == 0


def test_the_preset_overrides_a_file_that_was_written_for_another_policy(model: Path) -> None:
    config, _ = read(model, base="quickstart.yaml")
    assert config.learner.optimizer == "adamw"  # quickstart.yaml says muon
    assert config.env.kwargs["max_steps"] == 16


def test_a_file_for_a_pretrained_model_keeps_its_values_with_another_model(
    model: Path, tmp_path: Path
) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("policy: {path: elsewhere}\nwarm_start: {steps: 9}\n")
    config, _ = read(model, base=str(file))
    assert (config.policy.path, config.warm_start.steps) == (str(model), 9)
    assert config.learner.optimizer == "adamw"


def test_a_stored_configuration_is_read_back_unchanged_and_without_a_line(
    model: Path, tmp_path: Path
) -> None:
    config, _ = read(model, "policy.dtype=float32")
    (tmp_path / "config.yaml").write_text(agentrl.run.settings.config_yaml(config))
    lines: list[str] = []
    assert agentrl.load_config(tmp_path / "config.yaml", warn=lines.append) == config
    assert not lines


def test_a_path_in_a_block_of_the_command_line_selects_the_preset_as_well(model: Path) -> None:
    config = agentrl.load_config(None, f"policy={{path: {model}}}", warn=lambda line: None)
    assert (config.policy.preset, config.learner.optimizer) == ("pretrained", "adamw")


def test_scratch_sets_nothing(model: Path) -> None:
    config, lines = read(model, "policy.preset=scratch")
    assert config.learner == agentrl.RunConfig().learner
    assert not lines


@pytest.mark.parametrize(
    ("stored", "preset"),
    [
        ("policy: {path: null}", "scratch"),
        ("policy: {path: somewhere}", "pretrained"),
        ("policy: {path: somewhere, preset: scratch}", "scratch"),
        ("policy: {path: somewhere, preset: pretrained}", "pretrained"),
    ],
)
def test_the_model_of_a_run_keeps_the_preset_of_the_run(stored: str, preset: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(stored)
    assert preset_of(str(tmp_path / "model")) == preset
    assert preset_of(str(tmp_path / "checkpoints" / "train-000002")) == preset


def test_a_folder_of_no_run_is_pretrained(tmp_path: Path) -> None:
    assert preset_of(str(tmp_path / "model")) == "pretrained"


def test_learning_rates_fall_with_the_size_and_an_unknown_size_counts_as_large() -> None:
    sizes = (1e8, 5e8, 1e9, 7e9)
    rates = [pretrained_values(int(size))["learner", "learning_rate"] for size in sizes]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] <= 5e-5
    assert rates[-1] == 1e-6 == pretrained_values(None)["learner", "learning_rate"]


def test_adapters_take_ten_times_the_learning_rate() -> None:
    key = ("learner", "learning_rate")
    assert pretrained_values(10**9, lora=True)[key] == pytest.approx(10 * pretrained_values(10**9)[key])


def test_a_policy_that_thinks_gets_room_to(model: Path) -> None:
    config, _ = read(model, "policy.reply=think_action")
    assert config.engine.max_tokens == 512


def test_a_machine_without_bfloat16_arithmetic_generates_in_float32(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert read(model)[0].policy.dtype == "float32"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert read(model)[0].policy.dtype == "bfloat16"


def test_a_preset_without_a_path_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"policy\.preset is pretrained, wanted scratch or null without"):
        agentrl.load_config(None, "policy.preset=pretrained")
    with pytest.raises(ConfigError, match=r"policy\.max_context is null, wanted a number without"):
        agentrl.load_config(None, "policy.max_context=null")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("learner.optimizer=muon", r"learner\.optimizer is muon"),
        (
            "learner.learning_rate=1e-3",
            r"learner\.learning_rate is 0\.001, wanted about 1e-06 for a model of 1\.5B",
        ),
        ("policy.dtype=float16", r"policy\.dtype is float16"),
        ("engine.max_tokens=16 policy.reply=think_action", r"engine\.max_tokens is 16"),
        ("learner.compute_dtype=bfloat16 policy.dtype=float32", r"learner\.compute_dtype is bfloat16"),
        (
            "warm_start.steps=5 warm_start.learner.learning_rate=3e-3",
            r"warm_start\.learner\.learning_rate is 0\.003",
        ),
    ],
)
def test_a_value_that_does_not_fit_the_size_is_named(
    change: str, named: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presets, "count_parameters", lambda path, revision: 1_543_714_304)
    config, _ = read(model, *change.split())
    (warning,) = misfits(config, 1_543_714_304)
    assert re.match(named, warning)


def test_the_preset_itself_fits_every_size(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (10**7, 3 * 10**8, 10**9, 7 * 10**9):
        monkeypatch.setattr(presets, "count_parameters", lambda path, revision, size=size: size)
        for more in (
            (),
            ("learner.lora={rank: 8}",),
            ("warm_start.steps=3",),
            ("policy.reply=think_action",),
        ):
            assert list(misfits(read(model, *more)[0], size)) == []
