"""Every method takes two steps of the real trainer on single-turn problems, from one cloned start."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

import agentrl
from agentrl.algorithms.recipe import recipe_class, recipe_names

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("undrawn")]

SMALL = (
    "rollout.groups_per_step=8",
    "rollout.group_size=8",
    "rollout.placement=inline",
    "evaluation.tasks=2",
    "evaluation.baselines=[]",
    "evaluation.instruction_check=false",
    "trainer.save_episodes_every=0",
    "learner.mini_batches=2",
)
BRANCHING = ("fr3e",)  # learns from branches of a turn, and an episode here has one turn
METHODS = [
    name
    for name in recipe_names()
    if (recipe_class(name).KIND != "imitation" or name == "distill") and name not in BRANCHING
]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that answers some of the problems."""
    folder = tmp_path_factory.mktemp("clone")
    stage = ("trainer.steps=0", f"run.folder={folder}", "run.name=clone")
    return agentrl.train(agentrl.load_config("reasoning.yaml", *SMALL, *stage), quiet=True).model


@pytest.mark.parametrize("name", METHODS)
def test_a_method_learns_from_single_turns(name: str, clone: Path, tmp_path: Path) -> None:
    config = agentrl.load_config(
        "reasoning.yaml",
        *SMALL,
        f"policy.path={clone}",
        "policy.preset=scratch",
        "warm_start.steps=0",
        "trainer.steps=2",
        f"algorithm={{compose: [{name}]}}",
        *([f"learner.teacher={clone}"] if name == "distill" else []),
        f"run.folder={tmp_path}",
        "run.name=run",
    )
    run = agentrl.train(config, quiet=True)
    logged = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert sum(row.get("train/learner/updates", 0) for row in logged) >= 2
    before, after = (load_file(model / "model.safetensors") for model in (clone, run.model))
    assert all(bool(value.isfinite().all()) for value in after.values())
    assert any(bool((after[key] != before[key]).any()) for key in before)
