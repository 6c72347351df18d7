"""A run that learns adapters leaves a model like any other."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_fsdp_run import TINY

import agentrl
from agentrl.errors import ConfigError

pytestmark = pytest.mark.usefixtures("undrawn")

ADAPTED = ("learner.lora.rank=2", "learner.lora.targets=[q_proj]")


def trained(folder: Path, *more: str) -> dict[str, object]:
    config = agentrl.load_config("quickstart.yaml", *TINY, f"run.folder={folder}", "run.name=tiny", *more)
    return load_file(agentrl.train(config, quiet=True).model / "model.safetensors")


def test_a_target_that_the_policy_lacks_is_refused_before_a_folder_is_made(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    with pytest.raises(
        ConfigError, match="targets is qproj, wanted some of the policy's linear layers: down_"
    ):
        trained(tmp_path, "learner.lora.targets=[qproj]")
    assert not list(tmp_path.iterdir())


def test_training_changes_what_is_adapted_and_can_be_resumed(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    cloned = trained(tmp_path / "cloned", "trainer.steps=0")
    adapted = trained(tmp_path / "adapted", *ADAPTED)
    assert cloned.keys() == adapted.keys()
    changed = {name for name in cloned if not cloned[name].equal(adapted[name])}
    assert {name.split(".", 4)[-1] for name in changed} == {"q_proj.weight"}

    run = tmp_path / "adapted" / "tiny"
    shutil.rmtree(run / "checkpoints" / "train-000004")
    shutil.rmtree(run / "model")
    agentrl.resume(run, quiet=True)
    resumed = load_file(run / "model" / "model.safetensors")
    assert all(resumed[name].equal(adapted[name]) for name in adapted)
