"""The configurations for real models are read, planned and run, with a tiny model of their architecture."""

from pathlib import Path

import pytest
from chat_models import chat_model
from transformers import LlamaConfig, Qwen2Config

import agentrl
from agentrl.planning.plan import plan
from agentrl.run.config_files import shipped_configs
from agentrl.run.logger import read_metrics

# What differs on a machine without a GPU, the official games and an hour.
SHORT = (
    *("engine.name=torch", "engine.max_tokens=8", "policy.device=cpu", "policy.dtype=float32"),
    *("rollout.groups_per_step=1", "rollout.group_size=2", "rollout.max_active=2", "trainer.steps=1"),
    *("trainer.threads=1", "learner.mini_batches=1", "evaluation.tasks=1", "evaluation.every=0"),
    *("evaluation.baselines=[]", "env.kwargs.max_steps=2"),
)
CONFIGS = {
    "smollm2_alfworld.yaml": (
        LlamaConfig,
        ("warm_start.steps=1", "warm_start.demonstrations=8", "env.kwargs.max_steps=16"),
    ),
    "qwen_alfworld.yaml": (Qwen2Config, ("env.kwargs.data=null",)),
    "qwen_alfworld_lora.yaml": (Qwen2Config, ("env.kwargs.data=null",)),
    "qwen_webshop.yaml": (Qwen2Config, ("env.kwargs.products=40",)),
    "qwen_scienceworld.yaml": (Qwen2Config, ()),
}


def test_every_configuration_of_a_real_model_is_tried_here() -> None:
    assert {name for name in shipped_configs() if name.startswith(("qwen", "smollm"))} == CONFIGS.keys()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_of_a_real_model_is_read_without_the_model(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = agentrl.load_config(name, warn=lambda line: None)
    assert config.policy.preset == "pretrained"
    assert config.learner.optimizer == "adamw"
    assert config.policy.max_observation_tokens is None


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.usefixtures("undrawn")
def test_a_configuration_of_a_real_model_is_planned_and_trains_a_step(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, more = CONFIGS[name]
    if name == "qwen_scienceworld.yaml":
        pytest.importorskip("scienceworld")
    model = chat_model(tmp_path / "model", kind)
    config = agentrl.load_config(
        name,
        f"policy.path={model}",
        *SHORT,
        *more,
        f"run.folder={tmp_path}",
        "run.name=run",
        warn=lambda line: None,
    )
    found = plan(config)
    assert found.missing == ()
    assert {line.what for line in found.lines} >= {"activations", "keys and values", "tokens of a step"}
    run = agentrl.train(config, quiet=True)
    assert (run.folder / ("adapter" if config.learner.lora else "model")).is_dir()
    assert [row["step"] for row in read_metrics(run.folder / "metrics.jsonl", "train")] == [1]
