"""What an environment is, and the proof that one keeps to it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import gymnasium

from agentrl.env.answers import reset_answer, step_answer
from agentrl.env.checks import CHECKS, determinism
from agentrl.env.probe import FaultError, Probe, SkipError
from agentrl.errors import EnvironmentContractError

__all__ = ["Check", "ContractReport", "TextEnv", "check_text_env", "reset_answer", "step_answer", "text_env"]

Determinism = Literal["episode", "instance"]


class TextEnv(Protocol):
    """What the `unwrapped` of a text environment has, beside being a `gymnasium.Env[str, str]`.

    Its constructor takes `split=` and `max_steps=`, the environment's own step limit, kept as an attribute.
    `reset(seed=, options={"task": id})` starts a task, `reset(seed=)` one of the split. `info` of every
    answer holds `success: bool` (solved so far) and may hold

    - `actions`: list of the commands that are admissible now,
    - `valid`: whether the last action was understood,
    - `score`: progress as a number, `task_type`: a name that scores are grouped by,
    - `expert`: the next action of an expert, where constructed with `expert=True`,
    - `state_key`: str or int, equal for equal states.

    `step` sets at most one of `terminated` (the task is over, good or bad) and `truncated` (the step limit),
    and raises after either, and before the first `reset`. No global random number generator is touched.
    Unknown splits and tasks are refused with an `AgentRLError`; `agentrl.env.unknown` makes one.

    Optional, and declared by being there: `snapshot()` and `restore(snapshot)`; `expert() -> str | None`, the
    expert's next action from the current state; `data: str`, a label shown with every score.

    Attributes:
        splits: names of the task sets.
        determinism: "episode" (the default): same task, seed and actions give the same episode;
            "instance": they give the same task and first observation, details after that may differ.
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
    """What was checked of an environment, and what it declares."""

    env: str
    determinism: str
    declares: tuple[str, ...]  # optional capabilities: snapshot, expert, data
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

    def __str__(self) -> str:
        width = max(len(check.name) for check in self.checks)
        lines = [f"{check.status:8}{check.name:{width}}  {check.detail}" for check in self.checks]
        declared = ", ".join(self.declares) or "nothing optional"
        return "\n".join([f"{self.env}: determinism {self.determinism}; declares {declared}", *lines])


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
        A report; nothing that a made environment does raises here, but for `KeyboardInterrupt` and its like.

    Raises:
        AgentRLError: or whatever else `make` raises when it is called first.
    """
    probe = Probe(make, seed, tasks, steps)
    env = probe.fresh()
    try:
        checks = tuple(_run(name, check, probe) for name, check in CHECKS)
        known: Any = env.unwrapped
        name = env.spec.id if env.spec is not None else type(known).__name__
        return ContractReport(name, str(determinism(env)), tuple(_declared(known)), checks)
    finally:
        probe.close()


def _run(name: str, check: Callable[[Probe], str], probe: Probe) -> Check:
    if probe.blocked is not None:
        return Check(name, "skipped", f"not looked at: {probe.blocked}")
    try:
        return Check(name, "passed", check(probe))
    except SkipError as reason:
        return Check(name, "skipped", str(reason))
    except FaultError as fault:
        return Check(name, "failed", str(fault))
    except Exception as error:
        return Check(name, "failed", f"raised {type(error).__name__}: {error}")


def _declared(known: Any) -> Iterator[str]:
    if callable(getattr(known, "snapshot", None)) and callable(getattr(known, "restore", None)):
        yield "snapshot"
    if callable(getattr(known, "expert", None)):
        yield "expert"
    if getattr(known, "data", None):
        yield f"data: {known.data}"
