"""`agentrl/ALFWorld-v0` as an environment."""

import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from random import Random
from typing import Any

import gymnasium
import pytest
from gymnasium.error import ResetNeeded

from agentrl.env import check_text_env, load_plugins, make, make_panel, verify
from agentrl.env.settings import quickstart_kwargs
from agentrl.errors import ConfigError, PanelError
from agentrl_envs.alfworld.wording import compact
from agentrl_envs.alfworld_env import OPTIONAL_COMMANDS, ALFWorldEnv

ID = "agentrl/ALFWorld-v0"
TINY = quickstart_kwargs()


def test_it_is_made_by_gymnasium_after_the_plugins_are_loaded() -> None:
    load_plugins()
    env = gymnasium.make(ID, split="valid_unseen")
    observation, info = env.reset(seed=3)
    assert "Your task is to: " in observation
    assert "look" in info["actions"]
    assert env.unwrapped.data == "generated"


@pytest.mark.parametrize(("text", "share"), [("raw", 0.9), ("compact", 0.3)])
def test_a_paraphrase_keeps_the_task_and_says_the_rest_otherwise(text: str, share: float) -> None:
    env = ALFWorldEnv(text=text, expert=True, paraphrase=True)
    observation, info = env.reset(options={"task": "train/3"})
    first, snapshot, seen = info["paraphrase"], env.snapshot(), [(observation, info["paraphrase"])]
    assert info["task_text"] in first
    while info["expert"] is not None:
        observation, _, _, _, info = env.step(info["expert"])
        seen.append((observation, info["paraphrase"]))
    assert len(seen) > 5
    assert sum(said != again for said, again in seen) >= share * len(seen)
    for said, again in seen:
        assert again
        # Whatever the paraphrase names was in the observation.
        assert set(re.findall(r"[a-z]+ \d+", again)) <= set(re.findall(r"[a-z]+ \d+", said))
    assert env.restore(snapshot)[1]["paraphrase"] == first
    assert "paraphrase" not in ALFWorldEnv().reset(options={"task": "train/3"})[1]


@pytest.mark.parametrize(
    "settings", [{}, {**TINY, "expert": True, "paraphrase": True}], ids=["default", "tiny"]
)
def test_it_keeps_the_environment_contract(settings: Mapping[str, Any]) -> None:
    report = check_text_env(partial(make, ID, **settings), tasks=1, steps=20)
    report.raise_if_failed()
    assert {"snapshot", "expert", "data: generated"} <= set(report.declares)


def walk(env: gymnasium.Env[str, str], task: str, commands: tuple[str, ...]) -> list[tuple[Any, ...]]:
    answers: list[tuple[Any, ...]] = [env.reset(options={"task": task})]
    answers += [env.step(command) for command in commands]
    return answers


def test_the_walkthrough_ends_the_episode_with_reward_one() -> None:
    env = make(ID, **TINY)
    env.reset(options={"task": "train/4"})
    plan = env.unwrapped.walkthrough
    answers = walk(env, "train/4", plan)
    assert [answer[1] for answer in answers[1:]] == [0.0] * (len(plan) - 1) + [1.0]
    _, _, terminated, truncated, info = answers[-1]
    assert (terminated, truncated, info["success"], info["score"]) == (True, False, True, 1.0)
    with pytest.raises(ResetNeeded):
        env.step("look")


def test_an_episode_is_cut_off_at_max_steps() -> None:
    env = make(ID, max_steps=3)
    answers = walk(env, "train/0", ("look",) * 3)
    assert [answer[2:4] for answer in answers[1:]] == [(False, False), (False, False), (False, True)]
    assert answers[-1][4]["success"] is False


def test_info_says_whether_a_command_was_admissible() -> None:
    answers = walk(make(ID), "train/0", ("look", "dance", " look ", "go to the moon"))
    assert [answer[-1]["valid"] for answer in answers] == [True, True, False, True, False]


def test_the_task_menu_leaves_out_what_no_task_needs() -> None:
    full, task = make(ID), make(ID, menu="task")
    whole = full.reset(options={"task": "train/7"})[1]["actions"]
    menu = task.reset(options={"task": "train/7"})[1]["actions"]
    assert menu == [command for command in whole if not command.startswith(OPTIONAL_COMMANDS)]
    assert {"help", "inventory", "look"} == set(whole) - set(menu)


@pytest.mark.parametrize(
    ("raw", "short"),
    [
        (
            "You arrive at toaster 1. On the toaster 1, you see a bread 2, and a knife 1.",
            "toaster 1: bread 2 knife 1",
        ),
        ("You arrive at shelf 1. On the shelf 1, you see nothing.", "shelf 1: nothing"),
        ("You arrive at fridge 1. The fridge 1 is closed.", "closed"),
        ("You arrive at safe 1. The safe 1 is open. In it, you see a cd 2.", "safe 1: cd 2"),
        ("You open the safe 1. The safe 1 is open. In it, you see nothing.", "safe 1: nothing"),
        ("On the bed 1, you see a pillow 2, a pillow 1, and a book 1.", "bed 1: pillow 2 pillow 1 book 1"),
        ("You close the safe 1.", "closed"),
        ("You pick up the cd 2 from the safe 1.", "holding cd 2"),
        ("You move the cd 2 to the desk 1.", "hands empty"),
        ("You put the cd 2 in/on the desk 1.", "hands empty"),
        ("You heat the egg 1 using the microwave 1.", "egg 1: hot"),
        ("You cool the egg 1 using the fridge 1.", "egg 1: cool"),
        ("You clean the egg 1 using the sinkbasin 1.", "egg 1: clean"),
        ("You turn on the desklamp 1.", "desklamp 1: on"),
        ("You sliced the egg 1 with the knife 1.", "egg 1: sliced"),
        ("You are carrying: a egg 1.", "holding egg 1"),
        ("You are not carrying anything.", "hands empty"),
        ("You are facing the table 2, and table 1. Next to it, you see nothing.", "at table 2, and table 1"),
        ("You are in the middle of a room. Looking quickly around you, you see nothing.", "in middle"),
        ("This is a hot and clean egg 1.", "This is hot and clean egg 1"),
        ("Nothing happens.", "nothing happens"),
    ],
)
def test_compact_text_says_the_same_in_fewer_words(raw: str, short: str) -> None:
    assert compact(raw) == short


def test_the_compact_opening_names_the_task_and_the_room() -> None:
    raw = make(ID, **{**TINY, "text": "raw"}).reset(options={"task": "train/0"})[0]
    short = make(ID, **TINY).reset(options={"task": "train/0"})[0]
    task, _, room = short.partition(": ")
    assert task.startswith("put ")
    assert task.split()[1] in raw
    assert all(f"a {name}" in raw for name in room.replace(" 1", " 1,").rstrip(",").split(", "))


def test_the_same_seed_draws_the_same_task() -> None:
    env = make(ID, **TINY)
    assert env.reset(seed=5)[0] == env.reset(seed=5)[0] == make(ID, **TINY).reset(seed=5)[0]
    assert len({env.reset(seed=seed)[0] for seed in range(12)}) > 8


def test_told_another_object_the_first_goal_is_still_watched() -> None:
    env = make(ID, **TINY)
    env.reset(options={"task": "train/2"})
    plan = env.unwrapped.walkthrough
    other = env.unwrapped.other_goal("train/2")
    assert other == "train/2#other"
    assert env.unwrapped.other_goal(other) == "train/2"
    told_a, told_b = env.reset(options={"task": "train/2"})[0], env.reset(options={"task": other})[0]
    assert told_a != told_b
    assert told_a.split(": ")[1] == told_b.split(": ")[1]
    answers = walk(env, other, (*plan, "go nowhere"))
    assert [answer[-1]["other_success"] for answer in answers] == [False] * len(plan) + [True, True]
    assert not any(answer[-1]["success"] for answer in answers)
    assert env.unwrapped.task_hash(other) != env.unwrapped.task_hash("train/2")


def test_a_restored_episode_goes_on_as_it_did() -> None:
    env = make(ID, **TINY, expert=True)
    _, info = env.reset(options={"task": "train/6"})
    for _ in range(2):
        _, _, _, _, info = env.step(info["expert"])
    known = env.unwrapped
    kept = known.snapshot()
    first = env.step(info["expert"])
    env.reset(options={"task": "train/9"})
    assert known.restore(kept)[1] == info
    assert env.step(info["expert"]) == first


def test_equal_states_share_a_key_along_different_ways() -> None:
    env = make(ID)
    _, info = env.reset(options={"task": "train/0"})
    here, there = [command for command in info["actions"] if command.startswith("go to")][:2]
    direct = walk(env, "train/0", (here,))[-1][-1]["state_key"]
    around = walk(env, "train/0", (there, "look", here))
    assert around[-1][-1]["state_key"] == direct
    assert around[1][-1]["state_key"] != direct


def test_environments_in_threads_share_games_and_agree_with_one_alone() -> None:
    def play(task: str) -> list[str]:
        env, rng, seen = make(ID, **TINY), Random(task), []
        _, info = env.reset(options={"task": task})
        for _ in range(16):
            observation, _, terminated, truncated, info = env.step(rng.choice(info["actions"]))
            seen.append(observation)
            if terminated or truncated:
                break
        return seen

    tasks = [f"train/{index // 4}" for index in range(40)]
    alone = [play(task) for task in tasks]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(play, tasks)) == alone


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "test"}, "valid_unseen"),
        ({"text": "short"}, "text 'short' is unknown.*raw, compact"),
        ({"menu": "none"}, "menu 'none' is unknown"),
        ({"engine": "inform"}, "native, textworld"),
        ({"max_steps": 0}, "max_steps: 0"),
        ({"max_steps": True}, "max_steps: True"),
        ({"task_types": ["place"]}, "pick_and_place_simple"),
        ({"task_types": []}, "task_types"),
        ({"data": "/nowhere"}, "has none of the folders train"),
        ({"data": "/tmp", "object_types": 3}, "apply only to generated games"),
    ],
)
def test_wrong_settings_are_refused_with_the_choices(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ALFWorldEnv(**settings)


def test_a_panel_of_it_is_verified_by_the_content_of_its_games() -> None:
    panel = make_panel(ID, "valid_unseen", 4, {"max_receptacles": 6, "object_types": 8})
    verify(panel)
    with pytest.raises(PanelError):
        verify(replace(panel, env_kwargs={"max_receptacles": 5, "object_types": 8}))
