"""`agentrl/MathTools-v0`: a problem, a calculator, Python in a sandbox, and an answer."""

import re
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import gymnasium
from gymnasium.error import ResetNeeded

from agentrl.env import TextSpace, unknown
from agentrl.env.numbers import MAX_STEPS, whole_number
from agentrl.env.problems import TaskIds, content_hash, find_problem
from agentrl.env.sandbox import Limits, Sandbox, Session
from agentrl_envs import limited_calls
from agentrl_envs.calculator import CalculatorError, calculate
from agentrl_envs.math_answers import ROUNDED_DIGITS, checked_digits, judged_by, last_boxed
from agentrl_envs.problem_files import choose_problems
from agentrl_envs.problems import Check, Problem

TAGS = {"calculator": "calc", "python": "python"}
ANSWER = "answer"
# By tag: the name and the description of the tool, and those of its argument.
_TOOLS = {
    "calc": ("calculator", "Compute an arithmetic expression.", "expression", "Such as (3 + 4) / 2."),
    "python": ("python", "Run Python code and read what it prints.", "code", "The code."),
    ANSWER: (ANSWER, "Answer the problem; the first answer counts.", "result", "A number or an expression."),
}
TEXTS = ("plain", "short", "tools")
STATES = ("session", "call")

_FENCE = re.compile(r"\s*```[a-z]*\n(.*?)\n?```\s*", re.DOTALL)


class Call(NamedTuple):
    """A tool call or an answer in a reply: its tag and the text inside it."""

    tool: str
    text: str


class EpisodeState(NamedTuple):
    """State of an episode; immutable."""

    task: str
    problem: Problem
    observation: str
    steps: int = 0
    finished: bool = False
    success: bool = False
    worked: int = 0  # steps of the problem's solution that have been computed
    call: Call | None = None
    tool_error: bool = False
    valid: bool = True


class MathToolsEnv(gymnasium.Env[str, str]):
    r"""Mathematical problems, solved with a calculator and Python.

    A turn is one of <calc>expression</calc>, <python>code</python> and <answer>result</answer>; the first
    complete one in a reply counts, and the text after it is ignored. In a reply without any, the last
    \boxed{…} is the answer. The episode terminates with an answer (reward 1 if it is correct, else 0), and is
    truncated after `max_steps` turns.

    Args:
        split: The split from which `reset` draws a problem when it is given none.
        max_steps: The number of turns per episode, including the answer.
        tools: "calculator" and "python", one of them, or none.
        kinds: The kinds of generated problems, one name or several, None for all; see `problems.KINDS`.
        level: The level of generated problems, 1 to 5, or the lowest and the highest; None is 2.
        data: The file of problems to use instead of generated ones, or split -> file; see `problem_files`.
        test_share: The fraction of a single file's problems that forms the test split.
        check: How a file's answers are judged, "number" or "mathematics" (extra `math`); None selects
            "number" if all of them are plain numbers.
        rounded_digits: The number of significant digits, correctly rounded, from which a decimal counts as an
            answer that is a fraction or irrational: 0.333333 is 1/3, 0.333 is not. None accepts only exact
            values. If the correct answer is a decimal, a relative error of 1e-9 is always allowed.
        text: "plain" appends the available tools to the question, "short" is the bare question, "tools" is
            the same but never asks for tags, for policies that call tools (`policy.reply=tool_call`).
        state: Whether Python's variables live for the "session" of an episode or for one "call".
        isolation: The isolation of the sandbox in which Python runs.
        require_isolation: Whether to refuse to run Python without isolation.
        limits: The limits of the sandbox by name; see `agentrl.env.sandbox.Limits`.
        expert: Whether to add `info["expert"]`, the next turn of a scripted expert that knows the solution.

    `info` holds success, score (0 or 1), valid (whether the turn was a tool call or an answer), task_type,
    tool ("calc", "python", "answer" or None), tool_error (whether the tool reported an error), task_text at
    the reset, and expert on request.
    """

    thread_safe: ClassVar[bool] = True
    callers_arguments: ClassVar[tuple[str, ...]] = ("isolation", "require_isolation", "limits")

    def __init__(
        self,
        split: str = "train",
        max_steps: int = 8,
        tools: str | Sequence[str] = ("calculator", "python"),
        kinds: str | Sequence[str] | None = None,
        level: int | Sequence[int] | None = None,
        data: str | Path | Mapping[str, str] | None = None,
        test_share: float = 0.1,
        check: Check | None = None,
        rounded_digits: int | None = ROUNDED_DIGITS,
        text: str = "plain",
        state: str = "session",
        isolation: str = "auto",
        require_isolation: bool = True,
        limits: Mapping[str, float] | None = None,
        expert: bool = False,
    ) -> None:
        for name, value, choices in (("text", text, TEXTS), ("state", state, STATES)):
            if value not in choices:
                raise unknown(name, value, choices)
        whole_number("max_steps", max_steps, 1, MAX_STEPS)
        tools = (tools,) if isinstance(tools, str) else tuple(tools)
        for tool in tools:
            if tool not in TAGS:
                raise unknown("tool", tool, TAGS)
        self._rounded_digits = checked_digits(rounded_digits)
        self._problems, self.data = choose_problems(kinds, level, data, test_share, check)
        self.splits = tuple(self._problems)
        if split not in self.splits:
            raise unknown("split", split, self.splits)
        self.split = split
        self.max_steps = max_steps
        self._tags = tuple(tag for tool, tag in TAGS.items() if tool in tools)
        self._text = text
        self._python = _Python(state, isolation, require_isolation, limits) if "python" in tools else None
        # Python's results may depend on the clock, and its variables cannot be copied.
        self.determinism: Literal["episode", "instance"] = "instance" if self._python else "episode"
        if self._python is not None:
            vars(self).update(snapshot=None, restore=None)
        self._with_expert = expert
        self.instructions = f"Solve a mathematical problem. {self._usage()} The first answer counts."
        self.action_tools = tuple(_declared(tag) for tag in (*self._tags, ANSWER))
        self._episode: EpisodeState | None = None
        self.observation_space = TextSpace()
        self.action_space = TextSpace()

    def tasks(self, split: str) -> Sequence[str]:
        """Return the task ids of a split, such as "train/0"."""
        if split not in self.splits:
            raise unknown("split", split, self.splits)
        return TaskIds(split, len(self._problems[split]))

    def task_hash(self, task: str) -> str:
        """Hash the problem, its answer and the rule by which it is judged."""
        return content_hash(task, self._find(task).content() | judged_by(self._rounded_digits))

    def _find(self, task: object) -> Problem:
        problem: Problem = find_problem(task, self.splits, self._problems.__getitem__)
        return problem

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Start the task `options["task"]`, or a random one of the split; return its observation and info."""
        super().reset(seed=seed)
        task = (options or {}).get("task")
        if task is None:
            task = f"{self.split}/{int(self.np_random.integers(len(self._problems[self.split])))}"
        problem = self._find(task)
        if self._python is not None:
            self._python.end_session()
        usage = f"\n{self._usage()}" if self._text == "plain" else ""
        self._episode = EpisodeState(task, problem, f"{problem.question}{usage}{self._last_turn_notice(0)}")
        return self._episode.observation, self._info(self._episode) | {"task_text": problem.question}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Run a turn; return observation, reward, terminated, truncated and info."""
        before = self._running()
        if before.finished:
            raise ResetNeeded("the episode is over: call reset first")
        call, steps = self._read(action), before.steps + 1
        last = steps >= self.max_steps
        worked, success, tool_error = before.worked, False, False
        if call is None:
            observation = self._usage()
        elif call.tool == ANSWER:
            success = self._solved(before.problem, call.text)
            observation, last = "Right." if success else "Wrong.", True
        else:
            output, tool_error = self._run(call)
            observation = f"<output>{output}</output>"
            work = before.problem.work[worked : worked + 1]
            worked += bool(work) and call.text == self._written(work[0])
        answered = call is not None and call.tool == ANSWER
        if not answered:
            observation += self._last_turn_notice(steps)
        self._episode = before._replace(
            observation=observation,
            steps=steps,
            finished=last,
            success=success,
            worked=worked,
            call=call,
            tool_error=tool_error,
            valid=call is not None,
        )
        if last and self._python is not None:
            self._python.end_session()
        return observation, float(success), answered, last and not answered, self._info(self._episode)

    def _read(self, reply: str) -> Call | None:
        found = []
        for tag in (*self._tags, ANSWER):
            begin = reply.find(f"<{tag}>")
            end = reply.find(f"</{tag}>", begin) if begin >= 0 else -1
            if end >= 0:
                found.append((begin, Call(tag, reply[begin + len(tag) + 2 : end].strip())))
        if found:
            return min(found)[1]
        boxed = last_boxed(reply)
        return None if boxed is None else Call(ANSWER, boxed)

    def _run(self, call: Call) -> tuple[str, bool]:
        if call.tool == TAGS["python"]:
            assert self._python is not None
            return self._python.run(call.text)
        try:
            return calculate(call.text), False
        except CalculatorError as error:
            return f"error: {error}", True

    def _solved(self, problem: Problem, answer: str) -> bool:
        limited_calls.calls.join(self)
        return problem.solved_by(f"<{ANSWER}>{answer}</{ANSWER}>", self._rounded_digits)

    def _usage(self) -> str:
        if self._text == "tools":
            return "Call a tool to compute something or to answer."
        shown = {"calc": "<calc>expression</calc>", "python": "<python>code</python>"}
        tools = " or ".join(shown[tag] for tag in self._tags)
        answer = "<answer>result</answer>"
        return f"Write {tools} to compute something, {answer} to answer." if tools else f"Write {answer}."

    def _last_turn_notice(self, steps: int) -> str:
        return "\nThis is the last turn: answer now." if steps == self.max_steps - 1 else ""

    def _running(self) -> EpisodeState:
        if self._episode is None:
            raise ResetNeeded("the episode has not begun: call reset first")
        return self._episode

    def _info(self, episode: EpisodeState) -> dict[str, Any]:
        info: dict[str, Any] = {
            "success": episode.success,
            "score": float(episode.success),
            "valid": episode.valid,
            "task_type": episode.problem.task_type,
            "tool": episode.call.tool if episode.call else None,
            "tool_error": episode.tool_error,
        }
        if self._with_expert:
            info["expert"] = self.expert()
        return info

    def expert(self) -> str | None:
        """Return the next tool call of the solution, or the answer; None after the end of the episode."""
        episode = self._running()
        if episode.finished:
            return None
        left = episode.problem.work[episode.worked :]
        if not left or not self._tags or episode.steps == self.max_steps - 1:
            return f"<{ANSWER}>{episode.problem.answer}</{ANSWER}>"
        return f"<{self._tags[0]}>{self._written(left[0])}</{self._tags[0]}>"

    def _written(self, expression: str) -> str:
        """Translate an expression of the calculator for the tool that the expert uses."""
        if not self._tags or self._tags[0] == TAGS["calculator"]:
            return expression
        if "gcd" in expression or "lcm" in expression:
            return f"from math import gcd, lcm\nprint({expression})"
        if "/" in expression.replace("//", ""):
            exact = re.sub(r"\d+", r"F(\g<0>)", expression)
            return f"from fractions import Fraction as F\nprint({exact})"
        return f"print({expression})"

    def close(self) -> None:
        """Close the Python session and release the shared processes."""
        if self._python is not None:
            self._python.close()
        limited_calls.calls.leave(self)

    def snapshot(self) -> EpisodeState:
        """Return the current state of the episode."""
        return self._running()

    def restore(self, snapshot: EpisodeState) -> tuple[str, dict[str, Any]]:
        """Return to a snapshot; return its observation and info."""
        self._episode = snapshot
        return snapshot.observation, self._info(snapshot)


def _declared(tag: str) -> dict[str, Any]:
    """Return the declaration of the tool with this tag."""
    name, description, argument, meaning = _TOOLS[tag]
    schema = {"type": "string", "description": meaning}
    return {
        "name": name,
        "description": description,
        "parameters": {"type": "object", "properties": {argument: schema}},
        "action": f"<{tag}>{{{argument}}}</{tag}>",
    }


class _Python:
    """Python tool of one environment: a session of the sandbox shared by environments with equal settings."""

    def __init__(
        self, state: str, isolation: str, require_isolation: bool, limits: Mapping[str, float] | None
    ) -> None:
        self._keeps_state = state == "session"
        self._settings = (isolation, require_isolation, _limits(limits or {}))
        Sandbox(isolation=isolation, require_isolation=require_isolation)  # raises if unavailable
        self._session: Session | None = None

    def run(self, text: str) -> tuple[str, bool]:
        """Run code; return its output and error as text for the policy, and whether there was an error."""
        fenced = _FENCE.fullmatch(text)
        if self._session is None:
            self._session = _sandbox(self, self._settings).session()
        try:
            execution = self._session.run(fenced[1] if fenced else text)
        except BaseException:
            self.end_session()
            raise
        if not self._keeps_state:
            self.end_session()
        told = [execution.output.strip("\n")] if execution.output.strip() else []
        if execution.error is not None:
            told.append(f"error: {execution.error}")
        return "\n".join(told) or "no output", execution.error is not None

    def end_session(self) -> None:
        """End the session, if there is one; the next call starts a new one."""
        session, self._session = self._session, None
        if session is not None:
            session.close()

    def close(self) -> None:
        """End the session and release the sandbox."""
        self.end_session()
        _leave_sandbox(self, self._settings)


def _limits(given: Mapping[str, float]) -> Limits:
    known = [item.name for item in fields(Limits)]
    for name in given:
        if name not in known:
            raise unknown("limit of the sandbox", name, known)
    return Limits(**given)  # type: ignore[arg-type]


Settings = tuple[str, bool, Limits]

_lock = threading.Lock()
_sandboxes: dict[Settings, tuple[Sandbox, "weakref.WeakSet[_Python]"]] = {}


def _sandbox(user: _Python, settings: Settings) -> Sandbox:
    """Return the process-wide sandbox with these settings; its server starts with its first session."""
    isolation, require_isolation, limits = settings
    with _lock:
        if settings not in _sandboxes:
            sandbox = Sandbox(isolation=isolation, require_isolation=require_isolation, limits=limits)
            _sandboxes[settings] = sandbox, weakref.WeakSet()
        sandbox, users = _sandboxes[settings]
        users.add(user)
        return sandbox


def _leave_sandbox(user: _Python, settings: Settings) -> None:
    with _lock:
        if settings in _sandboxes:
            sandbox, users = _sandboxes[settings]
            if user in users:
                users.discard(user)
                if not users:
                    del _sandboxes[settings]
                    sandbox.close()
