"""The quickstart's claim: reward alone lifts the policy, and the panel shows it."""

import json
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

import agentrl
from agentrl_envs.alfworld.generate import Options, generate
from agentrl_envs.alfworld_env import ALFWorldEnv

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_trained_policy_stands_above_the_cloned_one(seed: int, tmp_path: Path) -> None:
    overrides = [f"seed={seed}", f"run.folder={tmp_path}", "run.name=quick"]
    subprocess.run([ROOT / ".venv/bin/agentrl", "train", "quickstart.yaml", *overrides], check=True, cwd=ROOT)
    policies = json.loads((tmp_path / "quick" / "summary.json").read_text())["policies"]
    for decoding in ("greedy", "sampled"):
        cloned, trained = (policies[name][decoding]["interval"] for name in ("cloned", "trained"))
        assert trained[0] > cloned[1], f"{decoding}: {trained} and {cloned} overlap"
    assert policies["cloned"]["sampled"]["success_rate"] >= 0.12


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_make_targets_run_from_a_clean_clone(tmp_path: Path) -> None:
    subprocess.run(["git", "clone", "--quiet", ROOT, tmp_path / "clone"], check=True)
    for target in ("quickstart", "quickstart-control"):
        subprocess.run(["make", target], check=True, cwd=tmp_path / "clone")
    names = {path.name for path in (tmp_path / "clone" / "runs").iterdir()}
    assert {name.endswith("-control") for name in names} == {True, False}


@pytest.mark.usefixtures("undrawn")
def test_what_is_learned_from_and_measured_on_have_no_scene_in_common(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every game that a run resets is recorded, and the scenes of those games are compared."""
    played: list[str] = []
    reset = ALFWorldEnv.reset

    def recording(self: ALFWorldEnv, **kwargs: Any) -> Any:
        played.append(kwargs["options"]["task"])
        return reset(self, **kwargs)

    monkeypatch.setattr(ALFWorldEnv, "reset", recording)
    small = (
        *("warm_start.steps=2", "warm_start.demonstrations=200", "evaluation.baselines=[]"),
        *("trainer.steps=2", "rollout.group_size=2", "evaluation.tasks=70"),
    )
    config = agentrl.load_config("quickstart.yaml", *small, f"run.folder={tmp_path}")
    agentrl.train(config, quiet=True)
    block = config.env.kwargs
    options = Options(tuple(block["task_types"]), block["max_receptacles"], block["object_types"])
    scenes: dict[str, set[int]] = defaultdict(set)
    for split, _, index in (task.partition("#")[0].partition("/") for task in played):
        scenes[split].add(generate(split, int(index), options).scene)
    assert set(scenes) == {"train", "valid_unseen"}
    assert len(scenes["train"]) > 90
    assert len(scenes["valid_unseen"]) == 12
    assert scenes["train"].isdisjoint(scenes["valid_unseen"])
