"""`MultiTurnEnv` keeps the contract for its author, who writes how a task begins and what an action does."""

from collections.abc import Sequence
from typing import Any

import pytest
from gymnasium.error import ResetNeeded

from agentrl.env import MultiTurnEnv, check_text_env, make, register
from agentrl.errors import ConfigError


class Countdown(MultiTurnEnv):
    """Count down from the problem; the pace that is asked for is drawn anew at each turn."""

    max_steps = 8

    def problems(self, split: str) -> Sequence[Any]:
        return range(2, 6) if split == "train" else [{"from": 3}]

    def start(self, problem: Any) -> str:
        self.left = problem if isinstance(problem, int) else problem["from"]
        return self.ask()

    def ask(self) -> str:
        self.pace = 1 + int(self.np_random.integers(2))
        return f"{self.left} left, take {self.pace}"

    def act(self, action: str) -> tuple[str, float, bool]:
        if action == "stop":
            return "stopped", 0.0, True
        if action == str(self.pace):
            self.left = max(0, self.left - self.pace)
        return self.ask(), float(not self.left), not self.left


class Guided(Countdown):
    thread_safe = True

    def actions(self) -> list[str]:
        return ["1", "2"]

    def expert(self) -> str:
        return str(self.pace)

    def info(self) -> dict[str, Any]:
        return {"score": -float(self.left), "state_key": self.left}


@pytest.mark.parametrize(("kind", "declared"), [(Countdown, ("snapshot",)), (Guided, ("snapshot", "expert"))])
def test_what_is_left_to_it_keeps_the_contract(kind: type[MultiTurnEnv], declared: tuple[str, ...]) -> None:
    report = check_text_env(kind)
    assert report.failed == (), str(report)
    assert (report.declares, report.proven, report.splits) == (declared, "episode", {"train": 4, "test": 1})


def test_an_episode_by_hand() -> None:
    env = Guided(expert=True)
    text, info = env.reset(seed=0, options={"task": "test/0"})
    pace = int(text[-1])
    assert text == f"3 left, take {pace}"
    assert info == {
        "success": False,
        "actions": ["1", "2"],
        "valid": True,
        "expert": str(pace),
        "score": -3.0,
        "state_key": 3,
    }
    *answer, info = env.step("7")
    assert answer[1:] == [0.0, False, False]
    assert (info["valid"], info["state_key"], env.steps, env.task) == (False, 3, 1, "test/0")
    while not answer[2]:
        *answer, info = env.step(info["expert"])
    assert answer[1:] == [1.0, True, False]
    assert (info["success"], info["expert"], info["state_key"]) == (True, None, 0)
    with pytest.raises(ResetNeeded, match="call reset first"):
        env.step("1")


def test_the_end_without_a_reward_is_no_success_and_the_limit_is_truncation() -> None:
    env = Countdown(max_steps=2)
    env.reset(options={"task": "train/0"})
    *answer, info = env.step("stop")
    assert (answer[1:], info) == ([0.0, True, False], {"success": False})
    env.reset(options={"task": "train/3"})
    assert [env.step("idle")[2:4] for _ in range(2)] == [(False, False), (False, True)]
    env.reset(options={"task": "train/3"})
    env.step("idle")
    assert env.step("stop")[2:4] == (True, False)  # not both at the last step


def test_info_may_say_itself_what_success_is() -> None:
    class Thrifty(Countdown):
        def info(self) -> dict[str, Any]:
            return {"success": self.left == 0 and self.steps <= 2}

    env = Thrifty()
    env.reset(options={"task": "train/3"})
    done = False
    while not done:
        _, reward, done, _, info = env.step(str(env.pace))
    assert (reward, info["success"], env.steps > 2) == (1.0, False, True)


def test_a_task_is_hashed_with_the_name_of_its_environment() -> None:
    assert Countdown().task_hash("train/1") != Countdown().task_hash("train/2")
    assert Countdown().task_hash("train/1") != Guided().task_hash("train/1")

    class Strange(Countdown):
        def problems(self, split: str) -> Sequence[Any]:
            return [object()]

    with pytest.raises(ConfigError, match="'train/0' does not consist of JSON values"):
        Strange().task_hash("train/0")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"split": "trian"}, "split 'trian' is unknown; did you mean 'train'"),
        ({"max_steps": 0}, "max_steps: 0, wanted a whole number of at least 1"),
        ({"max_steps": True}, "max_steps: True"),
        ({"expert": True}, r"Countdown has no method expert\(\)"),
    ],
)
def test_a_bad_argument_is_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Countdown(**kwargs)


@pytest.mark.parametrize("task", ["train/4", "train/01", "train/-1", "train", "other/0", "train/²", 3])
def test_an_unknown_task_is_refused(task: object) -> None:
    with pytest.raises(ConfigError, match=r"task .* is unknown"):
        Countdown().reset(options={"task": task})


def test_a_constructor_of_ones_own_passes_the_rest_on() -> None:
    class From(Countdown):
        def __init__(self, most: int = 9, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.most = most

        def problems(self, split: str) -> Sequence[Any]:
            return range(1, self.most + 1)

    register("agentrl-tests/From-v0", From)
    env = make("agentrl-tests/From-v0", most=4, max_steps=3, split="test")
    assert list(env.unwrapped.tasks("test")) == [f"test/{number}" for number in range(4)]
    assert env.unwrapped.max_steps == 3
    with pytest.raises(ConfigError, match="mosst"):
        make("agentrl-tests/From-v0", mosst=4)


def test_a_million_generated_tasks_cost_nothing() -> None:
    class Many(Countdown):
        def problems(self, split: str) -> Sequence[Any]:
            return range(10**12)

    env = Many()
    assert len(env.tasks("train")) == 10**12
    assert env.reset(options={"task": f"train/{10**12 - 1}"})[0].startswith("999999999999 left")


def test_a_snapshot_before_the_first_episode_is_refused() -> None:
    with pytest.raises(ResetNeeded):
        Countdown().snapshot()
