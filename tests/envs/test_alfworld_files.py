"""Games in the folder layout of ALFWorld's own data."""

import json
from pathlib import Path
from typing import Any

import pytest

from agentrl.errors import ConfigError
from agentrl_envs.alfworld.games import OfficialGames, write_games
from agentrl_envs.alfworld.generate import TASK_TYPES, Options, generate
from agentrl_envs.alfworld.pddl import GameFileError
from agentrl_envs.alfworld_env import ALFWorldEnv


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    options = Options(max_receptacles=6, object_types=8)
    write_games(tmp_path, (generate("train", index, options) for index in range(6)))
    write_games(tmp_path, (generate("valid_unseen", index, options) for index in range(3)))
    return tmp_path


def test_a_folder_of_games_is_played_in_place_of_generated_ones(folder: Path) -> None:
    env = ALFWorldEnv(split="train", data=folder)
    assert env.data == "official"
    assert len(env.tasks("train")) == 6
    assert len(env.tasks("valid_unseen")) == 3
    assert env.tasks("valid_seen") == ()
    generated = ALFWorldEnv(max_receptacles=6, object_types=8)
    openings = {generated.reset(options={"task": f"train/{index}"})[0] for index in range(6)}
    types = set()
    for task in env.tasks("train"):
        observation, _ = env.reset(options={"task": task})
        assert observation in openings
        for command in env.walkthrough:
            _, reward, terminated, _, info = env.step(command)
        assert (reward, terminated, info["success"]) == (1.0, True, True)
        types.add(info["task_type"])
    assert types == set(TASK_TYPES)


def test_the_expert_plays_official_games_too(folder: Path) -> None:
    env = ALFWorldEnv(split="train", data=folder, expert=True, text="compact")
    for task in env.tasks("train"):
        _, info = env.reset(options={"task": task})
        while info["expert"] is not None:
            info = env.step(info["expert"])[-1]
        assert info["success"]


def test_official_games_have_no_other_goal(folder: Path) -> None:
    env = ALFWorldEnv(data=folder)
    assert env.other_goal(env.tasks("train")[0]) is None


def test_only_the_wanted_task_types_are_listed(folder: Path) -> None:
    (task,) = ALFWorldEnv(data=folder, task_types=["look_at_obj_in_light"]).tasks("train")
    assert task.startswith("train/look_at_obj_in_light-")


def test_the_layout_is_the_one_alfworld_reads(folder: Path) -> None:
    trial = next((folder / "train").glob("pick_and_place_simple-*/trial_*"))
    facts = json.loads((trial / "traj_data.json").read_text())
    assert facts["task_type"] == "pick_and_place_simple"
    name = f"{facts['task_type']}-{facts['pddl_params']['object_target']}-None-"
    assert trial.parent.name.startswith(name + facts["pddl_params"]["parent_target"])
    game = json.loads((trial / "game.tw-pddl").read_text())
    assert {"pddl_domain", "grammar", "pddl_problem", "solvable", "walkthrough"} == game.keys()
    assert (trial / "initial_state.pddl").read_text() == game["pddl_problem"]


def rewrite(folder: Path, change: Any) -> tuple[ALFWorldEnv, str]:
    """Corrupt one game of the folder."""
    task = OfficialGames(folder).tasks("train")[0]
    path = folder / task / "game.tw-pddl"
    path.write_text(change(path.read_text()))
    return ALFWorldEnv(data=folder), task


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[: len(text) // 2], "not JSON"),
        (lambda text: "[]", "wanted a JSON object, found list"),
        (lambda text: text.replace('"grammar"', '"grammer"'), "'grammar' must be a string, found NoneType"),
        (lambda text: text.replace("(:goal", "(:aim"), "section ':aim' is not supported"),
        (lambda text: text.replace("#look.feedback#", "#lock#"), "the rule 'lock' does not exist"),
    ],
)
def test_a_corrupt_game_is_refused_with_its_path(folder: Path, change: Any, message: str) -> None:
    env, task = rewrite(folder, change)
    with pytest.raises(GameFileError) as caught:
        env.reset(options={"task": task})
    assert message in str(caught.value)
    assert task in str(caught.value)


def test_games_without_a_solution_are_not_listed(tmp_path: Path) -> None:
    (trial,) = write_games(tmp_path, [generate("train", 0, Options())])
    path = trial / "game.tw-pddl"
    path.write_text(path.read_text().replace('"solvable": true', '"solvable": false'))
    assert OfficialGames(tmp_path).tasks("train") == ()


@pytest.mark.parametrize("task", ["train/nothing/here", "../secret/game", "train", ""])
def test_tasks_outside_the_folder_are_refused(folder: Path, task: str) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        ALFWorldEnv(data=folder).reset(options={"task": task})
