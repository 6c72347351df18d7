"""Extraction of the answer from a reply, and its comparison with the correct one."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import psutil
import pytest

from agentrl.errors import MissingDependencyError
from agentrl_envs import limited_calls, math_answers
from agentrl_envs.limited_calls import JudgeError, LimitedCalls, OverLimitError
from agentrl_envs.math_answers import extract_answer, last_boxed, number, same_mathematics, same_number


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed {3}", "3"),
        (r"\boxed{1} and \boxed{2", "1"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\fbox{$8$}", "$8$"),
        (r"so $\boxed 8$.", "8"),
        (r"\boxed{7} and \boxed 8", "8"),
        (r"\boxedness{7} \boxed{8}", "8"),
        (r"\boxed{\left\{ 1 \right.}", r"\left\{ 1 \right."),
        (r"<answer>5</answer> \boxed{6}", "6"),
        (r"\boxed{6} <answer>5</answer>", "6"),
        ("<answer>4</answer> no, <answer> 5 </answer>", "5"),
        ("<answer>4", "<answer>4"),
        (" 42\n", "42"),
        ("", ""),
    ],
)
def test_the_last_box_counts_then_the_last_tag_then_everything(reply: str, answer: str) -> None:
    assert extract_answer(reply) == answer


def test_unclosed_boxes_take_no_time() -> None:
    assert last_boxed("\\boxed{" * 50_000) is None
    assert last_boxed("\\boxed{1}" + "\\boxed{" * 50_000) == "1"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", Fraction(42)),
        ("-1,234.50", Fraction(-2469, 2)),
        ("7/3", Fraction(7, 3)),
        (r"-\dfrac{7}{3}", Fraction(-7, 3)),
        (r"$\frac{1}{2}$.", Fraction(1, 2)),
        (r"\$5", Fraction(5)),
        ("−3", Fraction(-3)),
        (".5", Fraction(1, 2)),
        ("+7", Fraction(7)),
        ("007", Fraction(7)),
        ("12,34", None),
        ("1/0", None),
        ("1e5", None),
        ("٣", None),
        ("", None),
        ("-", None),
        (".", None),
        ("1/2/3", None),
        ("four", None),
        ("9" * 3000, None),
    ],
)
def test_numbers_are_read_exactly_or_not_at_all(text: str, value: Fraction | None) -> None:
    assert number(text) == value


@pytest.mark.parametrize(
    ("gold", "answer", "same"),
    [
        ("42", "42.0", True),
        ("42", "x = 42", True),
        ("42", "42 red apples.", True),
        ("42", r"42\%", True),
        ("42", r"42 \text{ cm}", True),
        ("42", "$42", True),
        ("1/2", "0.5", True),
        ("7/3", "2.33", False),
        ("42", "42 or 43", False),
        ("42", "41 42", False),
        ("42", "420", False),
        ("42", "-42", False),
        ("42", "The answer is 42", False),
        ("42", "", False),
    ],
)
def test_a_number_may_be_said_in_several_ways(gold: str, answer: str, same: bool) -> None:
    assert same_number(gold, answer) is same


def test_plain_numbers_start_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limited_calls, "calls", None)
    assert same_mathematics("1,000", r"\boxed{1000}")
    assert same_mathematics(r"\frac12", r"\boxed{\frac12}")
    assert not same_mathematics("12", "13")
    assert not same_mathematics("12", "x" * 5_000 + r" \boxed{" + "1" * 3_000 + "}")


def test_without_the_extra_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install -e '\.\[math\]'"):
        same_mathematics(r"\sqrt{2}", "1.41")


PAIRS = [
    (r"\frac{\sqrt{2}}{2}", r"\boxed{\frac{1}{\sqrt{2}}}", True),
    (r"\frac{\sqrt{2}}{2}", r"It is $\frac{1}{\sqrt{2}}$.", True),
    ("2x + 1", "<answer>1 + 2x</answer>", True),
    (r"\{1, 2\}", r"\boxed{2, 1}", True),
    ("1/3", r"\boxed{0.333}", False),
    ("10", r"\boxed{10} or \boxed{12}", False),
    (r"x \le 3", r"\boxed{(-\infty, 3]}", True),
    (r"(-\infty, 3]", r"\boxed{x \le 3}", True),
    (r"\pi", r"\boxed{3.14}", False),
    (r"\text{Evelyn}", "<answer>Evelyn</answer>", True),
]


@pytest.mark.parametrize(("gold", "reply", "same"), PAIRS)
def test_mathematics_is_judged_by_meaning(gold: str, reply: str, same: bool) -> None:
    pytest.importorskip("math_verify")
    assert same_mathematics(gold, reply) is same


def test_judging_works_from_threads_and_agrees_with_judging_alone() -> None:
    pytest.importorskip("math_verify")
    questions = [(gold, reply) for gold, reply, _ in PAIRS] * 4
    math_answers._judged.cache_clear()
    with ThreadPoolExecutor(8) as pool:
        verdicts = list(pool.map(lambda question: same_mathematics(*question), questions))
    assert verdicts == [same for _, _, same in PAIRS] * 4


def test_a_tower_of_powers_is_not_equal_and_the_next_answer_is_judged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("math_verify")
    monkeypatch.setattr(limited_calls, "CPU_SECONDS", 1.0)
    monkeypatch.setattr(limited_calls, "_BOOT", limited_calls._BOOT.replace("serve()", BRIEF))
    limited_calls.calls.close()
    assert same_mathematics("5", r"\boxed{2^{2^{2^{30}}}}") is False
    assert same_mathematics(r"\sqrt{3}", r"\boxed{3^{1/2}}") is True
    limited_calls.calls.close()


BRIEF = """
from agentrl_envs import limited_calls
limited_calls.CPU_SECONDS = 1.0
limited_calls.serve()
"""


def processes() -> list[psutil.Process]:
    """Return the running processes that judge answers for this process."""
    found = psutil.Process().children(recursive=True)
    return [one for one in found if any("agentrl_envs.limited_calls" in word for word in one.cmdline())]


@pytest.fixture
def alone() -> LimitedCalls:
    limited_calls.calls.close()
    assert processes() == []
    return LimitedCalls()


def test_processes_end_with_the_last_user(alone: LimitedCalls) -> None:
    class User:
        pass

    first, second = User(), User()
    alone.join(first)
    alone.join(second)
    assert alone.call("math", "gcd", 12, 18) == 6
    assert alone.call("math", "gcd", 12, 8) == 4
    assert len(processes()) == 1
    alone.leave(first)
    alone.leave(first)
    assert len(processes()) == 1
    alone.leave(second)
    assert processes() == []
    assert alone.call("math", "gcd", 3, 9) == 3
    alone.close()
    assert processes() == []


def test_a_process_lost_between_calls_is_replaced(alone: LimitedCalls) -> None:
    assert alone.call("math", "gcd", 12, 18) == 6
    processes()[0].kill()
    assert alone.call("math", "gcd", 12, 18) == 6
    alone.close()


def test_what_crashes_its_process_is_to_blame_and_what_is_killed_is_not(alone: LimitedCalls) -> None:
    with pytest.raises(OverLimitError):
        alone.call("os", "abort")
    with pytest.raises(OverLimitError):
        alone.call("os", "_exit", 3)
    with pytest.raises(JudgeError, match=r"signal\.raise_signal: its process died twice"):
        alone.call("signal", "raise_signal", int(signal.SIGKILL))
    with pytest.raises(JudgeError, match="no_such_module"):
        alone.call("no_such_module", "judge")
    alone.close()


def test_a_process_that_cannot_start_raises(alone: LimitedCalls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limited_calls, "_BOOT", "raise SystemExit('no room')")
    with pytest.raises(JudgeError, match="cannot be started: no room"):
        alone.call("math", "gcd", 1, 2)


SCRIPT = """
import os, threading, time
from agentrl_envs import limited_calls
limited_calls.calls.call("math", "gcd", 1, 2)
threading.Thread(target=limited_calls.calls.call, args=("time", "sleep", 1), daemon=True).start()
import psutil
while len(psutil.Process().children()) < 1: time.sleep(0.01)
print(*(child.pid for child in psutil.Process().children()), flush=True)
time.sleep(60)
"""


def test_processes_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    # The script has no main guard, and still nothing in it runs twice.
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    judges = [int(pid) for pid in parent.stdout.readline().split()]
    assert judges
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 60
    while any(map(psutil.pid_exists, judges)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(psutil.pid_exists, judges))
