"""`agentrl/MathTools-v0` as an environment."""

import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from gymnasium.error import ResetNeeded

from agentrl.env import check_text_env, make, make_panel, verify
from agentrl.env.sandbox import Sandbox, SandboxError
from agentrl.errors import ConfigError
from agentrl_envs import math_tools_env
from agentrl_envs.math_tools_env import MathToolsEnv
from agentrl_envs.problems import KINDS

ID = "agentrl/MathTools-v0"


def sandboxed() -> bool:
    try:
        with Sandbox() as sandbox:
            return bool(sandbox.isolation)
    except SandboxError:
        return False


needs_sandbox = pytest.mark.skipif(not sandboxed(), reason="no isolation for Python on this machine")


@pytest.fixture
def env() -> Iterator[MathToolsEnv]:
    made = MathToolsEnv(tools="calculator", kinds="arithmetic", level=1, expert=True)
    made.reset(options={"task": "train/0"})
    yield made
    made.close()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tools": "calculator", "text": "short", "level": [1, 5]},
        {"tools": []},
        pytest.param({"tools": "python", "kinds": "gcd"}, marks=needs_sandbox),
    ],
    ids=["both tools", "calculator", "no tools", "python"],
)
def test_it_keeps_the_environment_contract(settings: Mapping[str, Any]) -> None:
    report = check_text_env(partial(make, ID, **settings), tasks=2, steps=10)
    report.raise_if_failed()
    assert {"expert", "data: generated"} <= set(report.declares)
    assert ("snapshot" in report.declares) is ("python" not in settings.get("tools", "python"))


def play(env: MathToolsEnv, task: str) -> tuple[float, int]:
    _, info = env.reset(options={"task": task})
    for turn in range(1, env.max_steps + 1):
        _, reward, terminated, truncated, info = env.step(info["expert"])
        if terminated or truncated:
            return reward, turn
    raise AssertionError("the episode goes on after max_steps")


@pytest.mark.parametrize("level", [1, 2, 3, 4, 5])
def test_the_expert_solves_every_kind_with_the_calculator(level: int) -> None:
    env = MathToolsEnv(tools="calculator", level=level, expert=True)
    played = [play(env, f"test/{index}") for index in range(10 * len(KINDS))]
    assert {reward for reward, _ in played} == {1.0}
    assert {turns for _, turns in played} == ({2, 3} if level > 3 else {2})


@needs_sandbox
def test_the_expert_solves_every_kind_with_python() -> None:
    env = MathToolsEnv(tools="python", level=(1, 5), expert=True)
    played = [play(env, f"test/{index}") for index in range(6 * len(KINDS))]
    assert {reward for reward, _ in played} == {1.0}
    env.close()


def test_the_expert_answers_on_the_last_turn_and_at_once_without_tools() -> None:
    assert play(MathToolsEnv(max_steps=1, expert=True), "test/0") == (1.0, 1)
    assert play(MathToolsEnv(tools=(), expert=True), "test/0") == (1.0, 1)


def test_python_outputs_of_the_expert_read_like_the_calculators() -> None:
    written = MathToolsEnv(tools="python")._written
    assert written("12 * (3 + 4)") == "print(12 * (3 + 4))"
    assert written("7 // 2 % 2") == "print(7 // 2 % 2)"
    assert written("gcd(4, 6)") == "from math import gcd, lcm\nprint(gcd(4, 6))"
    assert written("(7 - 2) / 3") == "from fractions import Fraction as F\nprint((F(7) - F(2)) / F(3))"


@pytest.mark.parametrize(
    ("reply", "observation", "tool", "valid", "tool_error"),
    [
        ("<calc>2 * 3</calc>", "<output>6</output>", "calc", True, False),
        ("so <calc> 2*3 </calc> and <answer>5</answer>", "<output>6</output>", "calc", True, False),
        ("<answer> <calc>2 + 2</calc>", "<output>4</output>", "calc", True, False),
        ("<calc>1/0</calc>", "<output>error: division by zero</output>", "calc", True, True),
        ("<calc></calc>", "<output>error: the expression is empty</output>", "calc", True, True),
        ("<answer>5</answer> <calc>1</calc>", "Wrong.", "answer", True, False),
        (r"\boxed{1}, no, \boxed{5}", "Wrong.", "answer", True, False),
        ("<answer></answer>", "Wrong.", "answer", True, False),
        (r"\boxed{9} <calc>1 + 1</calc>", "<output>2</output>", "calc", True, False),
        ("<python>1</python>", "Write <calc>expression</calc> to compute something", None, False, False),
        ("<calc>2 * 3", "Write <calc>expression</calc>", None, False, False),
        ("</calc><calc>", "Write <calc>expression</calc>", None, False, False),
        ("42", "Write <calc>expression</calc>", None, False, False),
        ("", "Write <calc>expression</calc>", None, False, False),
    ],
)
def test_the_first_complete_tag_of_a_reply_counts(
    env: MathToolsEnv, reply: str, observation: str, tool: str | None, valid: bool, tool_error: bool
) -> None:
    seen, reward, terminated, truncated, info = env.step(reply)
    assert seen.startswith(observation)
    assert (reward, terminated, truncated) == (0.0, tool == "answer", False)
    assert (info["tool"], info["valid"], info["tool_error"]) == (tool, valid, tool_error)
    assert (info["success"], info["score"], info["task_type"]) == (False, 0.0, "arithmetic")


def test_tags_that_are_never_closed_take_no_time(env: MathToolsEnv) -> None:
    assert env.step("<calc>" * 100_000)[-1]["valid"] is False
    assert env.step("<calc>1</calc" * 100_000)[-1]["valid"] is False


@pytest.mark.parametrize("reply", ["<answer>{}</answer>", r"\boxed{{{}}}", r"<answer>\boxed{{{}}}</answer>"])
def test_the_right_answer_ends_the_episode_with_reward_one(env: MathToolsEnv, reply: str) -> None:
    gold = env._find("train/0").answer
    _, reward, terminated, truncated, info = env.step(reply.format(gold))
    assert (reward, terminated, truncated, info["success"], info["score"]) == (1.0, True, False, True, 1.0)
    assert info["expert"] is None
    with pytest.raises(ResetNeeded):
        env.step("<calc>1</calc>")


def test_the_last_turn_is_announced_and_then_the_episode_is_cut_off() -> None:
    env = MathToolsEnv(max_steps=3)
    first = env.reset(options={"task": "train/0"})[0]
    seen = [env.step("<calc>1</calc>") for _ in range(3)]
    assert ["last turn" in text for text in (first, *(answer[0] for answer in seen))] == [
        False,
        False,
        True,
        False,
    ]
    assert [answer[2:4] for answer in seen] == [(False, False), (False, False), (False, True)]
    assert "last turn" in MathToolsEnv(max_steps=1).reset(options={"task": "train/0"})[0]


def test_the_prompt_names_the_tools_in_use_and_no_others() -> None:
    def prompt(**settings: Any) -> str:
        return MathToolsEnv(**settings).reset(options={"task": "train/0"})[0]

    question = prompt(text="short")
    assert prompt() == (
        f"{question}\nWrite <calc>expression</calc> or <python>code</python> to compute something, "
        "<answer>result</answer> to answer."
    )
    assert "python" not in prompt(tools=["calculator"])
    assert "calc" not in prompt(tools="python").removeprefix(question)
    assert prompt(tools=[]) == f"{question}\nWrite <answer>result</answer>."


def test_a_restored_episode_goes_on_as_it_did(env: MathToolsEnv) -> None:
    env.step(str(env.expert()))
    kept, advice = env.snapshot(), env.expert()
    first = env.step(str(advice))
    env.reset(options={"task": "train/9"})
    assert env.restore(kept)[1]["expert"] == advice
    assert env.step(str(advice)) == first


@needs_sandbox
def test_python_keeps_its_variables_for_an_episode_and_no_longer() -> None:
    env = MathToolsEnv()
    env.reset(options={"task": "train/0"})
    assert env.step("<python>```python\nx = 6\nx * 7\n```</python>")[0] == "<output>42</output>"
    seen, _, _, _, info = env.step("<python>print(x)\n1 / 0</python>")
    assert seen.startswith("<output>6\nerror: ZeroDivisionError")
    assert (info["tool"], info["valid"], info["tool_error"]) == ("python", True, True)
    assert env.step("<python>y = x</python>")[0] == "<output>no output</output>"
    env.reset(options={"task": "train/0"})
    assert "NameError" in env.step("<python>x</python>")[0]
    env.close()


@needs_sandbox
def test_state_per_call_forgets_between_calls() -> None:
    env = MathToolsEnv(state="call")
    env.reset(options={"task": "train/0"})
    env.step("<python>x = 6</python>")
    assert "NameError" in env.step("<python>x</python>")[0]
    env.close()


@needs_sandbox
def test_output_is_capped_and_endless_code_is_an_observation() -> None:
    env = MathToolsEnv(limits={"seconds": 1, "cpu_seconds": 1, "output_chars": 100})
    env.reset(options={"task": "train/0"})
    seen = env.step("<python>print('a' * 10_000)</python>")[0]
    assert 100 < len(seen) < 200
    seen, reward, terminated, truncated, info = env.step("<python>while True: pass</python>")
    assert seen.startswith("<output>error: ")
    assert (reward, terminated, truncated, info["tool_error"]) == (0.0, False, False, True)
    assert env.step("<python>1 + 1</python>")[0] == "<output>2</output>"
    env.close()


def servers() -> int:
    found = psutil.Process(os.getpid()).children(recursive=True)
    return sum("agentrl.env.sandbox" in " ".join(one.cmdline()) for one in found)


@needs_sandbox
def test_environments_share_a_server_that_ends_with_the_last_of_them() -> None:
    before = servers()
    first, second, idle = MathToolsEnv(), MathToolsEnv(), MathToolsEnv()
    for env in (first, second, idle):
        env.reset(options={"task": "train/0"})
        assert env.step("<calc>1</calc>")[0] == "<output>1</output>"
    assert servers() == before
    for env in (first, second):
        assert env.step("<python>1</python>")[0] == "<output>1</output>"
    assert len(math_tools_env._sandboxes) == 1
    running = servers()
    assert running > before
    first.close()
    first.close()
    assert second.step("<python>2</python>")[0] == "<output>2</output>"
    second.close()
    assert (servers(), len(math_tools_env._sandboxes)) == (before, 0)
    first.reset(options={"task": "train/0"})
    assert first.step("<python>3</python>")[0] == "<output>3</output>"
    first.close()
    idle.close()
    assert servers() == before


def test_a_sandbox_that_fails_is_no_observation(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Sandbox) -> None:
        raise SandboxError("its server died")

    monkeypatch.setattr(Sandbox, "session", fail)
    env = MathToolsEnv()
    env.reset(options={"task": "train/0"})
    with pytest.raises(SandboxError, match="its server died"):
        env.step("<python>1</python>")
    env.close()


@needs_sandbox
def test_sessions_in_threads_do_not_see_each_other() -> None:
    def run(number: int) -> list[str]:
        env = MathToolsEnv(tools="python")
        env.reset(options={"task": f"train/{number}"})
        seen = [env.step(f"<python>x = {number}</python>")[0]]
        seen += [env.step("<python>x = x + 1; print(x)</python>")[0] for _ in range(3)]
        env.close()
        return seen

    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(run, range(8)))
    assert [seen[-1] for seen in outputs] == [f"<output>{number + 3}</output>" for number in range(8)]


def test_problems_from_a_file_are_played_and_judged(tmp_path: Path) -> None:
    rows = [{"question": f"{n} eggs and 2?", "answer": f"#### {n + 2}"} for n in range(20)]
    path = tmp_path / "eggs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    env = MathToolsEnv(data=str(path), expert=True)
    assert env.data == "eggs.jsonl"
    assert (len(env.tasks("train")), len(env.tasks("test"))) == (18, 2)
    assert play(env, "test/1") == (1.0, 1)
    _, info = env.reset(options={"task": "test/0"})
    assert info["task_type"] == "eggs"


def test_mathematics_from_a_file_is_judged_by_math_verify(tmp_path: Path) -> None:
    pytest.importorskip("math_verify")
    path = tmp_path / "roots.jsonl"
    path.write_text('{"problem": "x^2 = 2", "solution": "\\\\boxed{\\\\sqrt{2}}", "type": "Algebra"}')
    env = MathToolsEnv(data={"train": str(path)}, tools="calculator")
    rewards = []
    for answer in (r"\frac{2}{\sqrt{2}}", "1.41", "2^{1/2}"):
        env.reset(options={"task": "train/0"})
        rewards.append(env.step(rf"\boxed{{{answer}}}")[1])
    assert rewards == [1.0, 0.0, 1.0]
    env.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "valid"}, "split 'valid' is unknown.*train, test"),
        ({"tools": "pyhton"}, "tool 'pyhton' is unknown; did you mean 'python'"),
        ({"text": "long"}, "text 'long' is unknown"),
        ({"state": "none"}, "state 'none' is unknown.*session, call"),
        ({"max_steps": 0}, "max_steps: 0"),
        ({"max_steps": True}, "max_steps: True"),
        ({"kinds": "sums"}, "kind of problem 'sums'"),
        ({"level": 9}, "level: 9"),
        ({"data": "/nowhere.jsonl"}, "/nowhere.jsonl cannot be read"),
        ({"isolation": "jail"}, "isolation 'jail' is unknown"),
        ({"isolation": "none"}, "isolation is 'none'"),
        ({"limits": {"second": 1}}, "limit of the sandbox 'second' is unknown; did you mean 'seconds'"),
        ({"limits": {"seconds": "5"}}, "limits.seconds is '5'"),
        ({"limits": {"seconds": 0}}, "limits.seconds is 0"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MathToolsEnv(**settings)


def test_a_panel_of_it_is_verified_by_the_content_of_its_problems() -> None:
    panel = make_panel(ID, "test", 14, {"tools": "calculator", "level": 1})
    verify(panel)
    assert {MathToolsEnv()._find(task).task_type for task in panel.tasks} == set(KINDS)
    assert panel.hashes != make_panel(ID, "test", 14, {"level": 3}).hashes
