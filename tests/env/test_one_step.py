"""A reasoning problem as an episode of one action."""

import hashlib
from collections.abc import Mapping
from typing import Any

import gymnasium
import pytest

from agentrl.env import OneStepEnv, check_text_env, make_panel, register, verify
from agentrl.errors import ConfigError, EnvironmentContractError

SUMS = {
    "train": [{"prompt": f"{a} + 3 = ?", "answer": str(a + 3), "task_type": "sum"} for a in range(5)],
    "test": [{"prompt": "7 + 8 = ?", "answer": "15"}],
}


def grade(problem: Mapping[str, Any], reply: str) -> float:
    return 1.0 if problem["answer"] == reply.strip() else 0.1 * bool(reply)


def sums(**kwargs: Any) -> OneStepEnv:
    return OneStepEnv(SUMS, grade, **kwargs)


def test_it_keeps_the_contract() -> None:
    report = check_text_env(sums)
    assert report.passed, str(report)
    assert "snapshot" in report.declares
    assert {check.name for check in report.checks if check.status == "skipped"} == {
        "admissible actions",
        "expert",
        "threads",
    }


@pytest.mark.parametrize(
    ("reply", "reward", "success"),
    [("5", 1.0, True), (" 5\n", 1.0, True), ("6", 0.1, False), ("", 0.0, False)],
)
def test_the_prompt_is_observed_and_the_reply_is_graded_once(
    reply: str, reward: float, success: bool
) -> None:
    env = sums()
    observation, info = env.reset(options={"task": "train/2"})
    assert (observation, info) == ("2 + 3 = ?", {"success": False, "score": 0.0, "task_type": "sum"})
    _, found, terminated, truncated, info = env.step(reply)
    assert (found, terminated, truncated) == (reward, True, False)
    assert info == {"success": success, "score": reward, "task_type": "sum"}
    with pytest.raises(EnvironmentContractError, match="without a running episode"):
        env.step(reply)


def test_the_threshold_of_success_can_be_set() -> None:
    env = sums(success_at=0.1)
    env.reset(options={"task": "test/0"})
    assert env.step("wrong")[-1]["success"] is True


def test_a_problem_is_not_solved_before_it_is_answered_even_at_threshold_zero() -> None:
    assert sums(success_at=0.0).reset(options={"task": "test/0"})[1]["success"] is False


def test_tasks_are_listed_without_being_made() -> None:
    env = OneStepEnv({"train": _Endless()}, grade)
    tasks = env.tasks("train")
    assert len(tasks) == 10**12
    assert tasks[10**11] == "train/100000000000"
    assert tasks[-1] == f"train/{10**12 - 1}"
    assert tasks[3:5] == ["train/3", "train/4"]
    assert env.reset(options={"task": tasks[10**11]})[0] == "problem 100000000000"
    assert list(sums().tasks("test")) == ["test/0"]


class _Endless:
    def __len__(self) -> int:
        return 10**12

    def __getitem__(self, index: int) -> dict[str, str]:
        return {"prompt": f"problem {index}", "answer": ""}


def test_the_content_hash_covers_the_whole_problem_whatever_the_order_of_its_keys() -> None:
    text = '{"answer":"15","prompt":"7 + 8 = ?"}'
    assert sums().task_hash("test/0") == hashlib.sha256(text.encode()).hexdigest()
    turned = {"test": [{"answer": "15", "prompt": "7 + 8 = ?"}]}
    changed = {"test": [{"answer": "16", "prompt": "7 + 8 = ?"}]}
    assert OneStepEnv(turned, grade).task_hash("test/0") == sums().task_hash("test/0")
    assert OneStepEnv(changed, grade).task_hash("test/0") != sums().task_hash("test/0")


@pytest.mark.parametrize(
    "task", ["train/5", "train/-1", "train/02", "train/", "tran/0", "train", "", 3, "train/²"]
)
def test_an_unknown_task_is_refused(task: object) -> None:
    with pytest.raises(ConfigError, match=r"task .* is unknown"):
        sums().reset(options={"task": task})


def test_unknown_splits_and_empty_sets_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'tset' is unknown; did you mean 'test'"):
        sums(split="tset")
    with pytest.raises(ConfigError, match="'tset' is unknown"):
        sums().tasks("tset")
    for tasks in ({}, {"train": []}):
        with pytest.raises(ConfigError, match="at least one"):
            OneStepEnv(tasks, grade)
    with pytest.raises(ConfigError, match="max_steps: 0, wanted a whole number of at least 1"):
        sums(max_steps=0)


def test_without_a_task_one_of_the_split_is_drawn_by_the_seed() -> None:
    drawn = [sums().reset(seed=seed)[0] for seed in range(20)]
    assert drawn == [sums().reset(seed=seed)[0] for seed in range(20)]
    assert 1 < len(set(drawn)) <= 5
    assert {sums(split="test").reset(seed=seed)[0] for seed in range(5)} == {"7 + 8 = ?"}


def test_it_serves_as_a_registered_environment_with_panels() -> None:
    register("test/Sums-v0", sums)
    try:
        panel = make_panel("test/Sums-v0", "train", 3)
        assert panel.tasks == ("train/0", "train/1", "train/2")
        verify(panel)
    finally:
        del gymnasium.registry["test/Sums-v0"]


def test_a_problem_that_json_cannot_say_has_no_hash() -> None:
    with pytest.raises(ConfigError, match="'a/0' does not consist of JSON values"):
        OneStepEnv({"a": [{"prompt": "x", "check": grade}]}, grade).task_hash("a/0")
