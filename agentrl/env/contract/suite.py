"""The contract of text environments, and a checker that plays an environment to verify it."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import gymnasium

from agentrl.env.containment import EscapeError, call_contained, describe_error, signals
from agentrl.env.contract.answers import reset_answer, step_answer
from agentrl.env.contract.checks import CHECKS, MEASUREMENTS, determinism
from agentrl.env.contract.probe import FaultError, Probe, SkipError
from agentrl.errors import EnvironmentContractError, MissingDependencyError
from agentrl.terminal import Terminal, plain

if TYPE_CHECKING:
    from rich.console import Group

__all__ = ["Check", "ContractReport", "TextEnv", "check_text_env", "reset_answer", "step_answer", "text_env"]

Determinism = Literal["episode", "instance"]
_STYLES = {"passed": "green", "failed": "bold red", "skipped": "dim"}
_PLAIN_WIDTH = 110
_NOT_CHECKED = "not checked: "  # after a check that could not play the environment at all


class TextEnv(Protocol):
    """Interface of `env.unwrapped` of a text environment, beyond that of `gymnasium.Env[str, str]`.

    The constructor takes `split=` and `max_steps=`, the step limit, which is kept as an attribute.
    `reset(seed=, options={"task": id})` starts the given task, and `reset(seed=)` a task drawn from the
    split. Every `info` contains `success: bool` (whether the task is solved so far) and may contain

    - `actions`: the list of actions that are admissible now; if the tokenizer of a policy encodes several of
      them alike, as some that differ only in case or surrounding white space, it can choose only the first,
    - `valid`: whether the last action was understood,
    - `task_text`: at the reset, the text of the task, which prompts never cut; without it, the first
      observation is taken for the task,
    - `score`: the progress as a number, `task_type`: a name that scores are grouped by,
    - `expert`: the next action of the expert, if constructed with `expert=True`,
    - `paraphrase`: the observation in other words, with the text of the task unchanged if it is in it, for
      methods that compare the two,
    - `state_key`: a str or int that is equal for equal states,
    - `tool` and `tool_error`: the tool that the last action used, and its error; JSON values,
    - `other_success`: whether another task's goal was reached; see `other_goal` in
      `agentrl.evaluation.evaluate`.

    Numbers may be NumPy, `Fraction` or `Decimal` numbers, and flags and texts NumPy ones; they are converted
    to Python types. Numbers must be finite and texts at most `agentrl.values.MAX_TEXT_CHARS` long; otherwise
    the episode is aborted. All other keys are passed to policies and are neither checked nor stored.

    `step` sets at most one of `terminated` (the task is over, solved or not) and `truncated` (the step limit
    was reached). It raises after either, and before the first `reset`. `reset` may be called in the middle of
    an episode. The environment does not touch global random number generators. Unknown splits and tasks raise
    an `AgentRLError`, such as the one that `agentrl.env.unknown` returns.

    Processes and servers start with the first `reset` that needs them; constructing an environment, listing
    tasks and hashing a task starts none. `close` ends them and may be called twice; the next `reset` starts
    them again. If one of them dies, `reset` and `step` raise, since this must not look like an observation or
    a reward.

    Optional methods and attributes, declared by being present: `snapshot()` and `restore(snapshot)`, which
    returns to that state any number of times, in this or another environment with the same arguments;
    `expert() -> str | None`, the next action of an expert in the current state; `data: str`, a label shown
    with every score; `instructions: str`, what to do here and how an action is written, in a few sentences
    for a reader who knows nothing of the environment; `action_forms: Mapping[str, str]`, forms that stand for
    many actions where a prompt lists them, by prefix, as in {"search[": "search[your words]"};
    `action_tools: Sequence[Mapping[str, Any]]`, the actions as functions for policies that call tools
    (`policy.reply=tool_call`): each has a `name`, a `description`, a JSON schema of its `parameters`, and the
    `action` that a call stands for, with every parameter once in braces, as in "search[{query}]". Text is
    inserted as it is, everything else as JSON. Types and `enum` are checked, and the environment judges the
    rest. Every admissible action, and every one of the expert, must be a call. Without tools, a policy calls
    `act(command)`.

    Attributes:
        splits: The names of the task sets.
        determinism: "episode" (default): the same task, seed and actions give the same episode. "instance":
            they give the same task (`task_type`) and first observation; later details may differ.
        callers_arguments: The names of constructor arguments that choose which code runs, what is contacted
            or written to, or how code is isolated. They are accepted from the user, but not from a run
            folder, which may come from someone else. Default: ().
        thread_safe: Whether several environments may be used at the same time, each in its own thread.
            Default: False.
        heavy: Whether each environment has a process or hundreds of megabytes of its own. If so, at most as
            many as there are CPU cores are active at a time, unless configured otherwise. Default: False.
    """

    splits: tuple[str, ...]

    def tasks(self, split: str) -> Sequence[str]:
        """Return the stable task ids of a split, possibly as a lazy sequence."""
        ...

    def task_hash(self, task: str) -> str:
        """Return the SHA-256 of the content of a task, as 64 hex digits."""
        ...


def text_env(env: gymnasium.Env[str, str]) -> TextEnv:
    """Return the environment beneath all wrappers, typed as `TextEnv`."""
    return cast(TextEnv, env.unwrapped)


@dataclass(frozen=True, slots=True)
class Check:
    """Result of one check; "skipped" if the environment does not make the claim or it cannot be checked."""

    name: str
    status: Literal["passed", "failed", "skipped"]
    detail: str

    @property
    def passed(self) -> bool:
        """Return whether the check passed."""
        return self.status == "passed"


@dataclass(frozen=True, slots=True)
class ContractReport:
    """Results of the contract checks of an environment; printed as a table by `str` and by rich.

    Attributes:
        env: The id of the environment, or its class.
        determinism: The declared determinism.
        proven: The observed determinism; None if it is weaker than any that may be declared.
        thread_safe: Whether the environment declares to be thread-safe.
        declares: The optional capabilities: snapshot, expert, data, instructions, action_tools.
        splits: The number of tasks of each split.
        measured: Timing and sizes, in words.
        checks: The results in the order of the checks.
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
        """Return the failed checks."""
        return tuple(check for check in self.checks if check.status == "failed")

    @property
    def passed(self) -> bool:
        """Return whether no check failed."""
        return not self.failed

    def raise_if_failed(self) -> None:
        """Raise an `EnvironmentContractError` that lists the failed checks, if any."""
        if self.failed:
            faults = "; ".join(f"{check.name}: {check.detail}" for check in self.failed)
            raise EnvironmentContractError(f"{self.env} breaks the environment contract: {faults}")

    def summary(self) -> str:
        """Return the verdict and the number of passed, failed and skipped checks in one line."""
        counts = Counter(check.status for check in self.checks)
        verdict = "breaks the contract" if self.failed else "keeps the contract"
        totals = ", ".join(f"{counts[s]} {s}" for s in ("passed", "failed", "skipped") if counts[s])
        return f"{self.env} {verdict}: {totals}"

    def __rich__(self) -> "Group":
        from rich import box
        from rich.console import Group
        from rich.table import Table

        head = Table.grid(padding=(0, 2))
        for name, value in self._head():
            head.add_row(plain(name, "bold"), plain(value))
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        for column in ("claim", "", "observed"):
            table.add_column(column, no_wrap=column != "observed", overflow="fold")
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
    """Check, by playing it, that an environment keeps the contract of `TextEnv`.

    Args:
        make: A function that makes a new environment. If it accepts `max_steps`, as a class or
            `functools.partial(agentrl.env.make, id)` does, step limits are also checked on short episodes.
        seed: The seed of the episodes and of the random actions.
        tasks: The number of tasks to play per split.
        steps: The maximum number of steps of a random episode.

    Returns:
        The report. Errors of the environment are reported in it, not raised.

    Raises:
        MissingDependencyError: A dependency is not installed, which says nothing about the contract.
        Exception: The first call of `make` failed.
    """
    with signals:
        return _checked(Probe(make, seed, tasks, steps))


def _checked(probe: Probe) -> ContractReport:
    """Run all checks and return the report."""
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
    """Run a check and convert its exceptions to a result."""
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
    """Yield the optional capabilities that the environment declares."""
    if callable(getattr(known, "snapshot", None)) and callable(getattr(known, "restore", None)):
        yield "snapshot"
    if callable(getattr(known, "expert", None)):
        yield "expert"
    if getattr(known, "data", None):
        yield f"data: {known.data}"
    if getattr(known, "instructions", ""):
        yield "instructions"
    if getattr(known, "action_tools", ()):
        yield "action_tools"
