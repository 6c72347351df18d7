"""`agentrl/ScienceWorld-v0` as an environment."""

import json
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from random import Random
from typing import Any

import gymnasium
import pytest
from gymnasium.error import ResetNeeded

from agentrl.env import check_text_env, make, make_panel, verify
from agentrl.errors import ConfigError

pytest.importorskip("scienceworld", reason="the extra scienceworld is not installed")

from agentrl_envs.scienceworld.listing import _parsed, listing, make_listing
from agentrl_envs.scienceworld.simulator import NOT_UNDERSTOOD, SimulatorError
from agentrl_envs.scienceworld_env import ScienceWorldEnv

ID = "agentrl/ScienceWorld-v0"
SHORT = ["find-non-living-thing", "lifespan-longest-lived", "find-animal"]
FIND = "train/find-non-living-thing/0"


def close(env: gymnasium.Env[str, str]) -> None:
    env.close()
    assert env.unwrapped.java_pid is None


@pytest.fixture(scope="module")
def env() -> Any:
    made = make(ID, max_steps=60)
    yield made
    close(made)


@pytest.fixture(scope="module")
def led() -> Any:
    """Return an environment with an expert that chooses among the lexicon."""
    made = make(ID, max_steps=70, expert=True, actions="lexicon")
    yield made
    close(made)


def follow(env: gymnasium.Env[str, str], task: str) -> list[tuple[Any, ...]]:
    """Play the expert's actions."""
    answers: list[tuple[Any, ...]] = [env.reset(options={"task": task})]
    while answers[-1][-1]["expert"] is not None:
        answers.append(env.step(answers[-1][-1]["expert"]))
    return answers


@pytest.mark.slow
def test_it_keeps_the_environment_contract() -> None:
    settings = {"tasks": SHORT, "max_steps": 8, "actions": "lexicon"}
    report = check_text_env(partial(make, ID, **settings), tasks=1, steps=8)
    report.raise_if_failed()
    assert report.determinism == "instance"
    assert "expert" in report.declares


@pytest.mark.slow
@pytest.mark.parametrize("actions", [None, "valid"])
def test_it_keeps_the_contract_with_all_tasks_and_other_lists(actions: str | None) -> None:
    check_text_env(partial(make, ID, actions=actions), steps=12).raise_if_failed()


def test_listing_and_hashing_start_no_jvm() -> None:
    env = make(ID)
    known: Any = env.unwrapped
    assert {split: len(known.tasks(split)) for split in known.splits} == {
        "train": 3592,
        "dev": 1796,
        "test": 1819,
    }
    assert len(known.task_hash("test/boil/21")) == 64
    assert known.java_pid is None


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_the_first_ids_of_a_split_hold_every_task(split: str) -> None:
    names = [task.split("/")[1] for task in make(ID).unwrapped.tasks(split)]
    assert len(set(names[:30])) == len(set(names)) == 30
    some = make(ID, tasks=SHORT).unwrapped.tasks(split)
    assert {task.split("/")[1] for task in some[:3]} == set(SHORT)
    assert make(ID, tasks="boil").unwrapped.tasks("train") == tuple(f"train/boil/{n}" for n in range(14))


def test_the_hash_covers_variation_and_simplification_in_whatever_order() -> None:
    plain, easy = make(ID, simplification="").unwrapped, make(ID).unwrapped
    assert (
        len({plain.task_hash("train/boil/0"), easy.task_hash("train/boil/0"), easy.task_hash("train/boil/1")})
        == 3
    )
    one, other = (
        make(ID, tasks="boil", simplification=text).unwrapped.task_hash("train/boil/0")
        for text in ("openDoors,teleportAction", "teleportAction, openDoors")
    )
    assert one == other


@pytest.mark.slow
def test_the_shipped_listing_is_what_the_simulator_says() -> None:
    assert _parsed(make_listing()) == listing()


def test_another_version_is_listed_once_and_kept_in_the_cache(monkeypatch: Any, tmp_path: Any) -> None:
    made: list[int] = []

    def make_other() -> dict[str, Any]:
        made.append(1)
        facts = {"solution": 3, "train": [[0, 2]], "dev": [[2, 3]], "test": [[3, 4]]}
        return {"version": "9.9", "simplifications": ["openDoors"], "tasks": {"juggle": facts}}

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("agentrl_envs.scienceworld.listing.version", lambda _: "9.9")
    monkeypatch.setattr("agentrl_envs.scienceworld.listing.make_listing", make_other)
    listing.cache_clear()
    try:
        first = listing()
        listing.cache_clear()
        assert listing() == first
        assert first.variations == {"juggle": {"train": (0, 1), "dev": (2,), "test": (3,)}}
        assert make(ID, simplification="openDoors").unwrapped.tasks("train") == (
            "train/juggle/0",
            "train/juggle/1",
        )
    finally:
        listing.cache_clear()
    assert made == [1]
    assert [file.name for file in (tmp_path / "agentrl" / "scienceworld").iterdir()] == ["listing-9.9.json"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "valid"}, "split 'valid' is unknown.*train, dev, test"),
        ({"reward": "sparse"}, "reward 'sparse' is unknown.*gain, terminal, success"),
        ({"actions": "all"}, "actions 'all' is unknown.*lexicon"),
        ({"max_steps": 0}, "max_steps: 0"),
        ({"max_steps": True}, "max_steps: True"),
        ({"timeout": 0}, "timeout: 0"),
        ({"heap": "lots"}, "heap: 'lots'"),
        ({"tasks": "boli"}, "did you mean 'boil'"),
        ({"tasks": []}, "tasks: empty"),
        ({"simplification": "hard"}, "simplification 'hard' is unknown"),
        ({"simplification": "easy,openDoors"}, "'easy' alone"),
        ({"simplification": "noElectricalAction"}, "power-component.* impossible"),
        (
            {"tasks": "test-conductivity", "simplification": "noElectricalAction"},
            "test-conductivity impossible",
        ),
    ],
)
def test_wrong_settings_are_refused_with_what_was_wanted(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ScienceWorldEnv(**settings)


@pytest.mark.parametrize(
    "task", ["train/boil/14", "train/boil/00", "train/boil", "boil/0", "train/juggle/0", 3, ""]
)
def test_unknown_tasks_are_refused(task: object) -> None:
    env = make(ID)
    with pytest.raises(ConfigError, match="is unknown"):
        env.reset(options={"task": task})
    with pytest.raises(ConfigError, match="is unknown"):
        make(ID, tasks="boil").unwrapped.task_hash(FIND)
    assert env.unwrapped.java_pid is None


def test_the_first_observation_holds_the_task_and_the_room(env: Any) -> None:
    observation, info = env.reset(options={"task": "train/boil/0"})
    assert observation.startswith("Your task is to boil water.")
    assert "\n\nThis room is called the hallway." in observation
    assert info.pop("task_text") == observation.split("\n\n")[0]
    assert info == {
        "success": False,
        "score": 0.0,
        "valid": True,
        "task_type": "boil",
        "raw_score": 0,
        "moves": 0,
    }


def test_steps_are_counted_by_us_and_not_by_the_simulators_moves(env: Any) -> None:
    env.reset(options={"task": "train/boil/0"})
    infos = [env.step("wait") for _ in range(60)]
    assert infos[-1][4]["moves"] > 600
    assert [answer[3] for answer in infos] == [False] * 59 + [True]
    assert not any(answer[2] for answer in infos)
    with pytest.raises(ResetNeeded):
        env.step("wait")


def test_what_the_simulator_does_not_understand_counts_as_an_invalid_step(env: Any) -> None:
    odd = [
        "",
        " \t",
        "\n\r\\n\\",
        "a" * 100_000,
        "open " * 20_000,
        "🎲 漢字 \ud800 \x00\x1f\u2028",
        "0",
        "focus",
        "x\ne\nc",
    ]
    env.reset(options={"task": "train/boil/0"})
    answers = [env.step(action) for action in odd]
    assert [answer[4]["valid"] for answer in answers] == [False] * len(odd)
    assert {answer[4]["moves"] for answer in answers} == {0}
    observation, _, _, _, info = env.step(" go  to\nkitchen ")
    assert (observation, info["valid"], info["moves"]) == ("You move to the kitchen.", True, 1)


def test_a_question_is_answered_by_its_number(led: Any) -> None:
    led.reset(options={"task": "train/boil/0"})
    led.step("go to kitchen")
    observation, _, _, _, info = led.step("look at orange")
    assert observation.startswith("Ambiguous request")
    assert (info["valid"], info["actions"]) == (False, ["0", "1"])
    assert info["expert"] == "0"
    observation, _, _, _, info = led.step("1")
    assert ("orange" in observation, info["valid"]) == (True, True)
    led.step("look at orange")
    observation, _, _, _, info = led.step("neither")
    assert (observation.startswith("Unknown action"), info["valid"]) == (True, False)
    assert len(info["actions"]) > 2


@pytest.mark.parametrize("reward", ["gain", "terminal", "success"])
def test_rewards_add_up_to_the_progress_of_the_episode(reward: str) -> None:
    env = make(ID, reward=reward, expert=True)
    answers = follow(env, "train/find-animal/0")
    close(env)
    rewards, first = [answer[1] for answer in answers[1:]], answers[0][1]["score"]
    assert first > 0
    assert answers[-1][2:4] == (True, False)
    assert (answers[-1][4]["success"], answers[-1][4]["score"]) == (True, 1.0)
    if reward == "gain":
        assert sum(rewards) == pytest.approx(1 - first)
        assert sum(value > 0 for value in rewards) > 2
    else:
        assert rewards == [0.0] * (len(rewards) - 1) + [1.0]


def test_a_failing_focus_ends_the_episode_and_takes_back_what_was_gained(env: Any) -> None:
    first = env.reset(options={"task": "train/find-animal/0"})[1]["score"]
    answers = [env.step(action) for action in ("go to outside", "teleport to kitchen", "focus on stove")]
    _, _, terminated, truncated, info = answers[-1]
    assert (terminated, truncated, info["raw_score"], info["score"]) == (True, False, -100, 0.0)
    assert info["success"] is False
    assert sum(answer[1] for answer in answers) == pytest.approx(-first)


def test_partial_progress_at_the_step_limit_is_no_success() -> None:
    env = make(ID, expert=True, max_steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        answers = follow(env, "train/find-animal/0")
    close(env)
    _, _, terminated, truncated, info = answers[-1]
    assert (terminated, truncated, info["success"]) == (False, True, False)
    assert 0 < info["score"] < 1


@pytest.mark.parametrize(
    "name", ["find-non-living-thing", "power-component", "chemistry-mix-paint-secondary-color"]
)
def test_the_expert_solves_tasks_within_the_lexicon(led: Any, name: str) -> None:
    answers = follow(led, f"dev/{name}/{listing().variations[name]['dev'][0]}")
    assert answers[-1][4]["success"] is True
    for answer in answers[:-1]:
        assert answer[-1]["expert"] in answer[-1]["actions"]
        assert len(set(answer[-1]["actions"])) == len(answer[-1]["actions"]) <= 600


def test_the_expert_goes_on_after_being_led_astray(led: Any) -> None:
    _, info = led.reset(options={"task": FIND})
    for disturbance in ("teleport to foundry", "look around", "teleport to art studio"):
        *_, info = led.step(info["expert"])
        *_, info = led.step(disturbance)
    while info["expert"] is not None:
        *_, info = led.step(info["expert"])
    assert info["success"] is True


def test_an_expert_that_cannot_make_it_says_so_once() -> None:
    env = make(ID, expert=True, max_steps=2)
    with pytest.warns(UserWarning, match="max_steps is 2"):
        env.reset(options={"task": FIND})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env.reset(options={"task": FIND})
    close(env)


def test_without_an_expert_there_is_none_to_ask(env: Any) -> None:
    env.reset(options={"task": FIND})
    with pytest.raises(ConfigError, match="expert=True"):
        env.unwrapped.expert()


def test_every_action_of_the_lexicon_is_understood(led: Any) -> None:
    rng = Random(0)
    for task, room in (
        (FIND, "kitchen"),
        ("train/power-component/0", "workshop"),
        ("train/grow-plant/0", "greenhouse"),
    ):
        led.reset(options={"task": task})
        *_, info = led.step(f"teleport to {room}")
        for action in rng.sample(info["actions"], 12):
            led.reset(options={"task": task})
            led.step(f"teleport to {room}")
            observation, *_ = led.step(action)
            assert not observation.startswith(NOT_UNDERSTOOD), (action, observation)


def test_the_complete_list_is_the_simulators() -> None:
    env = make(ID, actions="valid")
    _, info = env.reset(options={"task": FIND})
    theirs = env.unwrapped._simulator.valid()
    close(env)
    assert sorted(info["actions"]) == sorted(theirs)
    assert len(theirs) > 50


def test_the_same_actions_give_the_same_episode_in_another_jvm_and_after_other_games(env: Any) -> None:
    other = make(ID, max_steps=60)
    for task in ("train/chemistry-mix/0", "train/find-plant/2"):
        draw = Random(task)
        env.reset(options={"task": task})
        offered = [name for name in env.unwrapped._simulator.valid() if not name.startswith("focus")]
        actions = ["teleport to kitchen", *draw.sample(offered, 20)]
        episodes = []
        for playing in (env, env, other):
            episodes.append([playing.reset(options={"task": task})[0]])
            for action in actions:
                answer = playing.step(action)
                episodes[-1].append(json.dumps(answer))
                if answer[2]:
                    break
        assert episodes[0] == episodes[1] == episodes[2]
    close(other)


def test_environments_in_threads_agree_with_one_alone(env: Any) -> None:
    def play(playing: Any, task: str) -> list[str]:
        seen = [playing.reset(options={"task": task})[0]]
        return seen + [
            playing.step(action)[0] for action in ("look around", "go to kitchen", "inventory", "wait1") * 3
        ]

    tasks = ["train/boil/0", "train/find-plant/1"]
    alone = [play(env, task) for task in tasks]
    several = [make(ID) for _ in tasks]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(play, several, tasks)) == alone
    pids = {made.unwrapped.java_pid for made in several}
    for made in several:
        close(made)
    assert len(pids) == 2


def test_an_answer_that_does_not_come_raises_in_time() -> None:
    env = make(ID, timeout=20)
    env.reset(options={"task": FIND})
    known: Any = env.unwrapped
    known._simulator.gateway._socket.settimeout(0.0001)
    with pytest.raises(SimulatorError, match="did not answer"):
        env.step("wait")
    assert known.java_pid is None
    env.reset(options={"task": FIND})
    close(env)


def test_a_panel_of_it_is_verified_without_a_jvm() -> None:
    verify(make_panel(ID, "test", 40, {"simplification": "openDoors"}))
