"""What an environment is, and the proof that one keeps to it."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import gymnasium

from agentrl.env.answers import reset_answer, step_answer
from agentrl.env.checks import CHECKS, MEASUREMENTS, determinism
from agentrl.env.containment import EscapeError, call_contained, describe_error, signals
from agentrl.env.probe import FaultError, Probe, SkipError
from agentrl.errors import EnvironmentContractError, MissingDependencyError
from agentrl.terminal import Terminal, plain

if TYPE_CHECKING:
    from rich.console import Group

__all__ = ["Check", "ContractReport", "TextEnv", "check_text_env", "reset_answer", "step_answer", "text_env"]

Determinism = Literal["episode", "instance"]
_STYLES = {"passed": "green", "failed": "bold red", "skipped": "dim"}
_PLAIN_WIDTH = 110
_NOT_CHECKED = "not looked at: "  # by the checks after one that could play nothing


class TextEnv(Protocol):
    """What the `unwrapped` of a text environment has, beside being a `gymnasium.Env[str, str]`.

    Its constructor takes `split=` and `max_steps=`, the environment's own step limit, kept as an attribute.
    `reset(seed=, options={"task": id})` starts a task, `reset(seed=)` one of the split. `info` of every
    answer holds `success: bool` (solved so far) and may hold

    - `actions`: list of the commands that are admissible now; of two that a policy's tokenizer writes alike,
      as it may those that differ in case or in white space around them, it can choose the first only,
    - `valid`: whether the last action was understood,
    - `score`: progress as a number, `task_type`: a name that scores are grouped by,
    - `expert`: the next action of an expert, where constructed with `expert=True`,
    - `state_key`: str or int, equal for equal states,
    - `tool` and `tool_error`: the tool that the last action used, and what went wrong with it; JSON values,
    - `other_success`: whether another task's goal was reached, see `other_goal` in `run.evaluate`.

    Numbers may be of numpy, `Fraction` or `Decimal`, flags and texts of numpy: they become Python's. What
    these keys hold must be finite, and texts no longer than `agentrl.values.MAX_TEXT_CHARS`; else the episode
    is aborted. All other keys are for players alone: they are neither checked nor stored.

    `step` sets at most one of `terminated` (the task is over, good or bad) and `truncated` (the step limit),
    and raises after either, and before the first `reset`, which may come in the middle of an episode. No
    global random number generator is touched. Unknown splits and tasks are refused with an `AgentRLError`;
    `agentrl.env.unknown` makes one.

    A process or server starts with the first `reset` that needs it: to construct an environment, list its
    tasks and hash one starts none. `close` ends them all, may be called twice, and the next `reset` starts
    them again. When one of them dies, `reset` and `step` raise: that is no fault of the policy's, and so no
    observation and no reward.

    Optional, and declared by being there: `snapshot()` and `restore(snapshot)`, which goes back to that point
    as often as wanted, in this or another environment that was constructed alike; `expert() -> str | None`,
    the expert's next action from the current state; `data: str`, a label shown with every score.

    Attributes:
        splits: names of the task sets.
        determinism: "episode" (the default): same task, seed and actions give the same episode;
            "instance": they give the same task (`task_type`) and first observation, details after that may
            differ.
        callers_arguments: names of the constructor's arguments that say which code runs, what is contacted or
            written to, or how code is shut in. They count where a person gives them, and not where a run's
            folder does, which may be somebody else's; () is the default.
        thread_safe: True says that several environments may be used at once, each by a thread of its own;
            False (the default) that they may not.
        heavy: True says that each environment has a process or hundreds of megabytes of its own, so that only
            as many as there are cores are played in at a time, unless somebody asks for more.
    """

    splits: tuple[str, ...]

    def tasks(self, split: str) -> Sequence[str]:
        """Stable task ids of a split; may be made when asked for."""
        ...

    def task_hash(self, task: str) -> str:
        """SHA-256, as 64 hex digits, of what the task consists of."""
        ...


def text_env(env: gymnasium.Env[str, str]) -> TextEnv:
    """The environment beneath all wrappers, typed."""
    return cast(TextEnv, env.unwrapped)


@dataclass(frozen=True, slots=True)
class Check:
    """One claim about an environment: "skipped" where it makes none or there was no way to look."""

    name: str
    status: Literal["passed", "failed", "skipped"]
    detail: str

    @property
    def passed(self) -> bool:
        return self.status == "passed"


@dataclass(frozen=True, slots=True)
class ContractReport:
    """What was checked of an environment, and what it declares. Rich prints it as a table, and so does `str`.

    Attributes:
        env: its id, or its class.
        determinism: what it declares.
        proven: the determinism that was seen; None where it was less than may be declared.
        thread_safe: whether it declares to be.
        declares: optional capabilities: snapshot, expert, data.
        splits: how many tasks each split has.
        measured: what is no claim: timing and sizes, in words.
        checks: the claims in the order in which they were checked.
    """

    env: str
    determinism: str
    proven: str | None
    thread_safe: bool
    declares: tuple[str, ...]
    splits: Mapping[str, int]
    measured: Mapping[str, str]
    checks: tuple[Check, ...]

    @property
    def failed(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.status == "failed")

    @property
    def passed(self) -> bool:
        return not self.failed

    def raise_if_failed(self) -> None:
        """Raise `EnvironmentContractError` that lists the failed checks, if any."""
        if self.failed:
            faults = "; ".join(f"{check.name}: {check.detail}" for check in self.failed)
            raise EnvironmentContractError(f"{self.env} breaks the environment contract: {faults}")

    def summary(self) -> str:
        """Say in a line what came of it."""
        counts = Counter(check.status for check in self.checks)
        verdict = "breaks the contract" if self.failed else "keeps the contract"
        told = ", ".join(f"{counts[s]} {s}" for s in ("passed", "failed", "skipped") if counts[s])
        return f"{self.env} {verdict}: {told}"

    def __rich__(self) -> "Group":
        from rich import box
        from rich.console import Group
        from rich.table import Table

        head = Table.grid(padding=(0, 2))
        for name, value in self._head():
            head.add_row(plain(name, "bold"), plain(value))
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        for column in ("claim", "", "what was seen"):
            table.add_column(column, no_wrap=column != "what was seen", overflow="fold")
        unseen = [check for check in self.checks if check.detail.startswith(_NOT_CHECKED)]
        for check in self.checks[: len(self.checks) - max(0, len(unseen) - 1)]:
            name = f"{len(unseen)} others" if check in unseen else check.name
            table.add_row(plain(name), plain(check.status, _STYLES[check.status]), plain(check.detail))
        title = plain(self.summary(), "bold red" if self.failed else "bold green")
        return Group(title, head, "", table, "")

    def _head(self) -> Iterator[tuple[str, str]]:
        yield "determinism", f"{self.determinism} declared, {self.proven or 'nothing'} proven"
        yield "thread safe", "declared" if self.thread_safe else "not declared"
        yield "declares", ", ".join(self.declares) or "nothing optional"
        yield "tasks", ", ".join(f"{count:,} {split}" for split, count in self.splits.items()) or "unknown"
        yield from self.measured.items()

    def __str__(self) -> str:
        text = StringIO()
        Terminal(file=text, width=_PLAIN_WIDTH).print(self)
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def check_text_env(
    make: Callable[..., gymnasium.Env[str, str]], *, seed: int = 0, tasks: int = 2, steps: int = 40
) -> ContractReport:
    """Prove, as far as playing can, that an environment keeps to the contract of `TextEnv`.

    Args:
        make: makes a new environment when called without arguments. Where it also takes `max_steps`, as a
            class or `functools.partial(agentrl.env.make, id)` does, step limits are proven on short episodes
            as well.
        seed: of the episodes and of the walks through them.
        tasks: played per split.
        steps: at most so many per walk.

    Returns:
        A report; nothing else that a made environment raises is raised here.

    Raises:
        MissingDependencyError: something is not installed, which says nothing about the contract.
        AgentRLError: or whatever else `make` raises when it is called first.
    """
    with signals:
        return _checked(Probe(make, seed, tasks, steps))


def _checked(probe: Probe) -> ContractReport:
    try:
        try:
            env = probe.twins()[0]
        except EscapeError as error:
            raise EnvironmentContractError(f"the environment's constructor raised {error}") from error
        known: Any = env.unwrapped
        checks = tuple(_run(name, check, probe) for name, check in CHECKS)
        measured = {} if probe.blocked else {n: _run(n, look, probe).detail for n, look in MEASUREMENTS}
        return ContractReport(
            env=env.spec.id if env.spec is not None else type(known).__name__,
            determinism=str(determinism(env)),
            proven=probe.proven,
            thread_safe=getattr(known, "thread_safe", False) is True,
            declares=tuple(_declared(known)),
            splits=probe.splits,
            measured=measured,
            checks=checks,
        )
    finally:
        probe.close_envs(failed=True)


def _run(name: str, check: Callable[[Probe], str], probe: Probe) -> Check:
    if probe.blocked is not None:
        return Check(name, "skipped", f"{_NOT_CHECKED}{probe.blocked}")
    result = _look(name, check, probe)
    probe.close_envs(failed=result.status == "failed")
    return result


def _look(name: str, check: Callable[[Probe], str], probe: Probe) -> Check:
    try:
        return Check(name, "passed", call_contained(lambda: check(probe)))
    except SkipError as reason:
        return Check(name, "skipped", str(reason))
    except FaultError as fault:
        return Check(name, "failed", str(fault))
    except MissingDependencyError:
        raise
    except Exception as error:
        return Check(name, "failed", f"raised {describe_error(error)}")


def _declared(known: Any) -> Iterator[str]:
    if callable(getattr(known, "snapshot", None)) and callable(getattr(known, "restore", None)):
        yield "snapshot"
    if callable(getattr(known, "expert", None)):
        yield "expert"
    if getattr(known, "data", None):
        yield f"data: {known.data}"
