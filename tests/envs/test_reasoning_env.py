"""`agentrl/Reasoning-v0`: one-step reasoning on generated problems and files."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from agentrl.env import check_text_env, make, make_panel, verify
from agentrl.errors import ConfigError
from agentrl_envs.math_tools_env import MathToolsEnv
from agentrl_envs.problems import KINDS
from agentrl_envs.reasoning_env import ReasoningEnv

ID = "agentrl/Reasoning-v0"


@pytest.mark.parametrize("settings", [{}, {"text": "short", "level": [1, 5]}], ids=["plain", "short"])
def test_it_keeps_the_environment_contract(settings: dict[str, Any]) -> None:
    report = check_text_env(partial(make, ID, **settings), tasks=7)
    report.raise_if_failed()
    assert {"snapshot", "expert", "data: generated"} <= set(report.declares)
    assert report.thread_safe


@pytest.mark.parametrize("text", ["plain", "short"])
def test_the_expert_solves_every_kind_at_every_level(text: str) -> None:
    env = ReasoningEnv(split="test", level=(1, 5), text=text, expert=True)
    for index in range(20 * len(KINDS)):
        _, info = env.reset(options={"task": f"test/{index}"})
        _, reward, terminated, truncated, info = env.step(info["expert"])
        assert (reward, terminated, truncated, info["success"]) == (1.0, True, False, True)
        assert info["task_type"] == KINDS[index % len(KINDS)]


@pytest.mark.parametrize(
    ("reply", "reward"),
    [
        ("{}", 1.0),
        ("<answer>{}</answer>", 1.0),
        ("<answer>7</answer>, no, <answer>{}</answer>", 1.0),
        (r"\boxed{{{}}} <answer>7</answer>", 1.0),
        ("It is {}, I think.", 0.0),
        ("{}0", 0.0),
        ("", 0.0),
    ],
)
def test_the_reply_is_graded_by_its_answer(reply: str, reward: float) -> None:
    env = ReasoningEnv(kinds="gcd")
    env.reset(options={"task": "train/5"})
    answer = env._find("train/5")["problem"]["answer"]
    assert env.step(reply.format(answer))[1] == reward


def test_both_environments_ask_the_same_questions() -> None:
    tools, alone = MathToolsEnv(text="short", level=3), ReasoningEnv(text="short", level=3)
    for index in range(len(KINDS)):
        task = {"task": f"test/{index}"}
        assert tools.reset(options=task)[0] == alone.reset(options=task)[0]


def test_the_plain_text_says_how_to_answer() -> None:
    short = ReasoningEnv(text="short").reset(options={"task": "train/0"})[0]
    plain = ReasoningEnv().reset(options={"task": "train/0"})[0]
    assert plain == f"{short}\nGive the answer as <answer>...</answer>."


def test_a_file_is_played(tmp_path: Path) -> None:
    path = tmp_path / "sums.jsonl"
    path.write_text("\n".join(json.dumps({"problem": f"{n} + 2", "answer": n + 2}) for n in range(20)))
    env = ReasoningEnv(data=str(path), expert=True)
    assert (env.data, len(env.tasks("test"))) == ("sums.jsonl", 2)
    _, info = env.reset(options={"task": "test/0"})
    assert env.step(info["expert"])[1] == 1.0
    panel = make_panel(ID, "test", 2, {"data": str(path)})
    verify(panel)


@pytest.mark.parametrize("kind", [ReasoningEnv, MathToolsEnv])
def test_how_decimals_count_is_an_option_that_task_hashes_tell(kind: Any, tmp_path: Path) -> None:
    path = tmp_path / "thirds.jsonl"
    path.write_text('{"problem": "2 / 3", "answer": "2/3"}\n')
    hashes = set()
    for settings, rewards in (
        ({}, (1.0, 0.0)),
        ({"rounded_digits": 2}, (1.0, 1.0)),
        ({"rounded_digits": None}, (0.0, 0.0)),
    ):
        env = kind(data={"train": str(path)}, **settings)
        hashes.add(env.task_hash("train/0"))
        for reply, reward in zip(("0.666667", "0.67"), rewards, strict=True):
            env.reset(options={"task": "train/0"})
            assert env.step(f"<answer>{reply}</answer>")[1] == reward
        env.close()
    assert len(hashes) == 3
    assert kind(data={"train": str(path)}, rounded_digits=6).task_hash("train/0") in hashes


def test_mathematics_is_judged_in_a_process_that_ends_with_the_environment(tmp_path: Path) -> None:
    pytest.importorskip("math_verify")
    path = tmp_path / "roots.jsonl"
    path.write_text('{"problem": "x^2 = 2", "answer": "\\\\sqrt{2}"}')
    report = check_text_env(partial(ReasoningEnv, data={"train": str(path)}), tasks=1)
    report.raise_if_failed()
    env = ReasoningEnv(data={"train": str(path)})
    env.reset(options={"task": "train/0"})
    assert env.step("So it is $2^{1/2}$.")[1] == 1.0
    env.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "valid"}, "split 'valid' is unknown"),
        ({"text": "long"}, "text 'long' is unknown"),
        ({"max_steps": 0}, "max_steps: 0, wanted a whole number of at least 1"),
        ({"rounded_digits": 0}, "rounded_digits: 0, wanted a whole number from 1 to 100, or None"),
        ({"rounded_digits": 2.5}, "rounded_digits: 2.5"),
        ({"rounded_digits": True}, "rounded_digits: True"),
        ({"kinds": "sums"}, "kind of problem 'sums'"),
        ({"data": "/nowhere.jsonl", "level": 1}, "apply only to generated"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ReasoningEnv(**settings)
