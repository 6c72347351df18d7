"""A run on several environments: what it learns from, measures and reports, and that it goes on exactly."""

import json
import shutil
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium
import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

import agentrl
from agentrl.cli import app
from agentrl.data.storage import read_episodes
from agentrl.env import TextSpace, register
from agentrl.errors import ConfigError
from agentrl.evaluation.report import write_report
from agentrl.run.metric_keys import find_metric
from agentrl.run.resumption import record_more_steps, with_overrides
from agentrl.run.signals import RunInterrupted
from agentrl.training.state import TrainingState

NAMES = ("ALFWorld", "Reasoning", "MathTools")
TINY = (
    "warm_start.steps=4",
    "warm_start.batch_size=4",
    "warm_start.demonstrations=16",
    "trainer.steps=3",
    "trainer.save_episodes_every=1",
    "trainer.checkpoint_every=1",
    "evaluation.tasks=2",
    "evaluation.instruction_check=false",
    "evaluation.baselines=[expert, cloned]",
    "policy.tokenizer_episodes=9",
    "policy.hidden_size=32",
    "policy.layers=1",
    "policy.heads=1",
    "engine.max_tokens=8",
    "rollout.groups_per_step=4",
    "rollout.group_size=2",
    "rollout.placement=inline",
    "env.ALFWorld.kwargs.max_steps=4",
)


def config(folder: Path, *more: str) -> agentrl.RunConfig:
    return agentrl.load_config("mixture.yaml", *TINY, f"run.folder={folder}", "run.name=mixed", *more)


@pytest.fixture(scope="module")
def run(undrawn: None, tmp_path_factory: pytest.TempPathFactory) -> agentrl.Run:
    return agentrl.train(config(tmp_path_factory.mktemp("mixed")), quiet=True)


def rows(run: agentrl.Run, stage: str = "train") -> list[dict[str, Any]]:
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["stage"] == stage]


def command(*words: str) -> str:
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 0, result.output
    return result.output


def test_each_step_plays_each_environment_by_its_weight_and_groups_never_mix(run: agentrl.Run) -> None:
    for step in (1, 2, 3):
        episodes = read_episodes(run.folder / "episodes" / f"train-{step:06d}.parquet")
        assert len(episodes) == 8
        for first in range(0, 8, 2):
            assert len({(each.env, each.task, each.seed) for each in episodes[first : first + 2]}) == 1
        names = Counter(episode.task.partition("/")[0] for episode in episodes)
        assert names == {"ALFWorld": 4, "Reasoning": 2, "MathTools": 2}
        assert all(episode.env == f"agentrl/{episode.task.partition('/')[0]}-v0" for episode in episodes)


def test_a_command_is_chosen_where_one_is_named_and_else_written_freely(run: agentrl.Run) -> None:
    episodes = read_episodes(run.folder / "episodes" / "train-000001.parquet")
    for episode in episodes:
        chosen = [turn.allowed is not None for turn in episode.turns]
        assert set(chosen) == {episode.env == "agentrl/ALFWorld-v0"}


def test_each_environment_has_metrics_beside_those_of_all(run: agentrl.Run) -> None:
    for row in rows(run):
        assert all(find_metric(key) for key in row if key not in ("stage", "step"))
        own = [row[f"train/rollout/{name}/episodes"] for name in NAMES]
        assert (own, row["train/rollout/episodes"]) == ([4.0, 2.0, 2.0], 8.0)
        rates = [row[f"train/rollout/{name}/success_rate"] for name in NAMES]
        assert row["train/rollout/success_rate"] == pytest.approx((2 * rates[0] + rates[1] + rates[2]) / 4)
        assert not any(key.startswith("train/rollout/success_rate/") for key in row)
        assert any(key.startswith("train/rollout/MathTools/success_rate/") for key in row)
    assert len(rows(run, "warm_start")) == 4


def test_every_policy_is_scored_in_each_environment_and_nowhere_in_all(run: agentrl.Run) -> None:
    summary = run.summary
    assert summary["env"] == "ALFWorld 50%, Reasoning 25%, MathTools 25%"
    assert "policies" not in summary
    assert tuple(summary["environments"]) == NAMES
    for name, found in summary["environments"].items():
        assert found["env"] == f"agentrl/{name}-v0"
        assert {policy: list(scores) for policy, scores in found["policies"].items()} == {
            "expert": ["greedy"],
            "cloned": ["greedy", "sampled"],
            "trained": ["greedy", "sampled"],
        }
        assert found["policies"]["trained"]["sampled"]["episodes"] == 2
        assert found["panel"]["tasks"] == 2
        assert found["panel"]["split"] == ("valid_unseen" if name == "ALFWorld" else "test")
    stored = json.loads((run.folder / "evaluations.json").read_text())
    assert {name: found["policies"] for name, found in summary["environments"].items()} == stored


def test_the_report_has_a_row_for_each_environment(run: agentrl.Run, undrawn: None) -> None:
    page = write_report(run.folder).read_text()
    for name in NAMES:
        assert page.count(f"<td>{name}</td>") == 1
        assert page.count(f"<h2>{name}</h2>") == 1


def same(one: agentrl.Run, other: agentrl.Run) -> None:
    weights = [load_file(each.model / "model.safetensors") for each in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])
    assert (one.folder / "metrics.jsonl").read_text() == (other.folder / "metrics.jsonl").read_text()
    assert one.summary["environments"] == other.summary["environments"]


def test_a_run_that_is_stopped_and_resumed_equals_one_that_never_was(
    run: agentrl.Run, tmp_path: Path, undrawn: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    saving, stops = TrainingState.save_when_due, {"warm_start", "train"}

    def save_and_stop(state: TrainingState) -> None:
        saving(state)
        if state.step == 2 and state.stage in stops:
            stops.remove(state.stage)
            raise KeyboardInterrupt

    monkeypatch.setattr(TrainingState, "save_when_due", save_and_stop)
    with pytest.raises(RunInterrupted, match="stopped after warm_start step 2"):
        agentrl.train(config(tmp_path), quiet=True)
    with pytest.raises(RunInterrupted, match="stopped after train step 2"):
        agentrl.resume(tmp_path / "mixed", quiet=True)
    same(agentrl.resume(tmp_path / "mixed", quiet=True), run)


def test_more_steps_keep_the_scores_of_each_environment(run: agentrl.Run, tmp_path: Path) -> None:
    shutil.copytree(run.folder, tmp_path / "mixed")
    copied = agentrl.open_run(tmp_path / "mixed")
    record_more_steps(with_overrides(copied, ("trainer.steps=4", "trainer.schedule_steps=3")))
    for name, found in json.loads((tmp_path / "mixed" / "evaluations.json").read_text()).items():
        assert name in NAMES
        assert list(found) == ["expert", "cloned", "step-000003"]


def test_a_run_is_evaluated_on_all_of_its_environments_or_on_one(run: agentrl.Run, tmp_path: Path) -> None:
    several = command(
        "evaluate", "--policy", str(run.folder), "--tasks", "1", "--output", f"{tmp_path}/a.json"
    )
    assert "agentrl/MathTools-v0: 1 tasks of test" in several
    found = json.loads((tmp_path / "a.json").read_text())["policies"][str(run.folder)]
    assert list(found) == [f"agentrl/{name}-v0" for name in NAMES]
    command(
        *("evaluate", "--policy", str(run.folder), "--tasks", "1", "--env", "Reasoning"),
        *("--output", f"{tmp_path}/b.json"),
    )
    one = json.loads((tmp_path / "b.json").read_text())
    assert one["panel_hash"] == found["agentrl/Reasoning-v0"]["evaluation"]["panel_hash"]
    with pytest.raises(ConfigError, match="env lists several environments: name one of them, ALFWorld"):
        agentrl.evaluate(run)


def test_plan_prompt_and_config_show_every_environment(run: agentrl.Run) -> None:
    file = str(run.folder / "config.yaml")
    planned = json.loads(command("plan", file, "run.name=another", "--json"))
    work = {line["what"]: line["amount"] for line in planned["lines"]}
    assert planned["missing"] == []
    for name in NAMES:
        # Random is not played: the expert once, the cloned and the trained policy twice, 2 tasks each.
        assert work[f"episodes of evaluation, {name}"] == 10
        assert work[f"tasks to train on, {name}"] == 1_000_000
        assert work[f"environments, {name}"] > 0
    shown = json.loads(command("prompt", file, "--turns", "1", "--json"))
    assert [preview["env"] for preview in shown] == list(NAMES)
    assert "Compute" in shown[1]["turns"][0]["prompt"]
    one = json.loads(command("prompt", file, "--turns", "1", "--json", "--env", "MathTools"))
    assert one == shown[2]
    assert "name: MathTools" in command("config", file, "env.MathTools.weight=3")


class Dumb(gymnasium.Env[str, str]):
    """Always over at once; there is no expert."""

    splits = ("train", "test")
    observation_space = action_space = TextSpace()

    def __init__(self, split: str = "train") -> None:
        self.split = split

    def tasks(self, split: str) -> list[str]:
        return [f"{split}/{index}" for index in range(3)]

    def task_hash(self, task: str) -> str:
        return f"{len(task):064x}"

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        return "say", {"success": False, "actions": ["a", "b"]}

    def step(self, action: str) -> Any:
        return "said", 0.0, True, False, {"success": action == "a", "actions": ["a", "b"]}


def test_an_environment_without_an_expert_is_left_out_of_the_warm_start_and_said(
    tmp_path: Path, examples: dict[str, ModuleType], undrawn: None, capsys: pytest.CaptureFixture[str]
) -> None:
    register("tests/Dumb-v0", Dumb)
    envs = "{id: tests/Dumb-v0}, {id: example/HotCold-v0}, {id: example/HotCold-v0, name: again, weight: 2}"
    small = [text for text in TINY if not text.startswith("env.")]
    mixed = (f"env=[{envs}]", *small, "trainer.steps=1", f"run.folder={tmp_path}", "run.name=mixed")
    run = agentrl.train(agentrl.load_config(None, *mixed))
    said = capsys.readouterr()
    assert "warm start: no demonstrations of Dumb, which has no expert" in said.out + said.err
    found = run.summary["environments"]
    assert [list(found[name]["policies"]) for name in ("Dumb", "again")] == [
        ["cloned", "trained"],
        ["expert", "cloned", "trained"],
    ]
    assert found["HotCold"]["policies"] == found["again"]["policies"]  # the same tasks and policy
    with pytest.raises(ConfigError, match=r"warm_start\.steps is 4, but Dumb has no expert to clone"):
        agentrl.train(agentrl.load_config(None, *mixed, "env=[{id: tests/Dumb-v0}]", "run.name=alone"))
