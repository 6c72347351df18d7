"""Checks of the environment contract, one function per claim; `contract.check_text_env` runs them all.

A check returns what it observed, or raises `FaultError` or `SkipError`. It tolerates violations that other
checks cover, so that one fault of an environment fails one check. An exception of the environment also fails
the check.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from statistics import median
from typing import Any

from agentrl.env.briefing import briefing_fault
from agentrl.env.contract import trials
from agentrl.env.contract.answers import (
    RESET_PARTS,
    STEP_PARTS,
    flag_fault,
    observation_fault,
    optional_fault,
    reward_fault,
    success_fault,
)
from agentrl.env.contract.probe import (
    COMPARED_INFO,
    FaultError,
    Gym,
    Probe,
    Walk,
    expert_actions,
    oversize_fault,
    raise_fault,
    unpack,
)
from agentrl.errors import AgentRLError
from agentrl.values import ValueFaultError, as_text, describe_value

NO_SUCH = "agentrl: no such name"
LISTED_TASKS = 10_000


def interface(probe: Probe) -> str:
    """Check tasks, task hashes, splits, the texts and tools for prompts, and spaces that contain any text."""
    env = probe.twins()[0]
    known: Any = env.unwrapped
    missing = [name for name in ("tasks", "task_hash", "splits") if not hasattr(known, name)]
    if missing:
        probe.blocked = f"env.unwrapped lacks {', '.join(missing)}"
        raise FaultError(probe.blocked)
    splits = known.splits
    if not isinstance(splits, tuple) or not splits or not all(isinstance(name, str) for name in splits):
        probe.blocked = f"splits is {describe_value(splits)}, wanted a tuple of at least one str"
        raise FaultError(probe.blocked)
    if determinism(env) not in ("episode", "instance"):
        raise FaultError(f"determinism is {describe_value(determinism(env))}, wanted 'episode' or 'instance'")
    fault = briefing_fault(known)
    if fault is not None:
        raise FaultError(fault)
    if not isinstance(getattr(known, "thread_safe", False), bool):
        raise FaultError(f"thread_safe is {describe_value(known.thread_safe)}, wanted a bool")
    for name in ("observation_space", "action_space"):
        space = getattr(env, name, None)
        if space is None or not all(space.contains(text) for text in ("", "ä 漢\n", "a" * 10_000)):
            raise FaultError(f"{name} refuses some texts; use agentrl.env.TextSpace")
    return f"splits {', '.join(splits)}"


def task_ids(probe: Probe) -> str:
    """Check that the task ids of every split can be listed, are unique, and are the same every time."""
    first, second = _twins(probe)
    for split in first.splits:
        tasks = first.tasks(split)
        if not isinstance(tasks, Sequence) or isinstance(tasks, str) or not len(tasks):
            raise FaultError(
                f"tasks({split!r}) is {describe_value(tasks)}, wanted a sequence of at least one id"
            )
        fault = _listing_fault(tasks)
        if fault is not None:
            raise FaultError(f"tasks({split!r}) {fault}")
        listed = list(islice(tasks, LISTED_TASKS))
        ends = len(tasks), tasks[len(tasks) - 1]
        for again in (first.tasks(split), second.tasks(split)):
            if (len(again), again[len(again) - 1]) != ends or list(islice(again, LISTED_TASKS)) != listed:
                raise FaultError(f"tasks({split!r}) lists other ids when called again")
        probe.splits[split] = len(tasks)
    return f"stable, unique: {', '.join(f'{count} {split}' for split, count in probe.splits.items())}"


def _listing_fault(tasks: Sequence[Any]) -> str | None:
    """Return what is wrong with a sequence of task ids, or None."""
    listed = list(islice(tasks, LISTED_TASKS))
    for task in listed:
        if not isinstance(task, str) or not task:
            return f"contains {describe_value(task)}, wanted str ids"
        try:
            as_text(task)
        except ValueFaultError as fault:
            return f"contains an id that {fault}"
    if len(listed) != min(len(tasks), LISTED_TASKS):
        return f"has length {len(tasks)} but lists {len(listed)}"
    if len(set(listed)) != len(listed):
        return "lists an id twice"
    if (tasks[0], tasks[len(listed) - 1]) != (listed[0], listed[-1]):
        return "gives other ids by index than by iteration"
    return None


def answers(probe: Probe) -> str:
    """Check that `reset` returns 2 values and `step` 5, with finite rewards and mappings as infos."""
    for walk in probe.walks():
        for turn, answer in enumerate(walk.answers):
            if not isinstance(answer[-1], Mapping):
                raise_fault(f"info is {describe_value(answer[-1])}, wanted a mapping", walk, turn)
            if len(answer) == len(STEP_PARTS):
                raise_fault(reward_fault(answer[1]), walk, turn)
    return f"{_count(probe.walks())}: tuples of 2 and 5, finite rewards, info a mapping"


def observations(probe: Probe) -> str:
    """Check that every observation is a text of the observation space."""
    for walk in probe.walks():
        for turn, answer in enumerate(walk.answers):
            raise_fault(
                observation_fault(answer[0]) or oversize_fault(probe.twins()[0], answer[0]), walk, turn
            )
    return "every observation is a str, and no longer than its space allows"


def success(probe: Probe) -> str:
    """Check that every info contains the bool `success`."""
    for walk, turn, info in _infos(probe):
        raise_fault(success_fault(info), walk, turn)
    return "a bool in every info"


def optional_info(probe: Probe) -> str:
    """Check the values of the optional keys of info."""
    seen: set[str] = set()
    for walk, turn, info in _infos(probe):
        raise_fault(optional_fault(info), walk, turn)
        seen |= info.keys() & {*COMPARED_INFO} - {"success"}
    return f"info also contains {', '.join(sorted(seen)) or 'nothing'}"


def flags(probe: Probe) -> str:
    """Check that `terminated` and `truncated` are bools and never both true, even if the last step solves."""
    walks = list(probe.walks())
    with suppress(Exception):  # another check covers the expert
        walks += _solved_at_the_limit(probe)
    for walk in walks:
        for turn, (_, _, terminated, truncated, _) in enumerate(walk.answers[1:], start=1):
            raise_fault(
                flag_fault("terminated", terminated) or flag_fault("truncated", truncated), walk, turn
            )
            if terminated and truncated:
                raise_fault("terminated and truncated are both set", walk, turn)
    return f"terminated and truncated are bools, never both true, in {_count(walks)}"


def _solved_at_the_limit(probe: Probe) -> Iterator[Walk]:
    """Play episodes whose last allowed step solves the task, where both flags might be set by mistake."""
    solved = [walk for walk in probe.expert_walks() or () if walk.solved and walk.actions]
    steps = min((len(walk.actions) for walk in solved), default=0)
    env = (probe.limited(steps, expert=True) or probe.limited(steps)) if solved else None
    for walk in solved:
        if env is not None and len(walk.actions) == steps:
            yield probe.walk(env, walk.task, expert_actions(env), steps)


def hashes(probe: Probe) -> str:
    """Check that task hashes are SHA-256, stable, and depend on the task."""
    first, second = _twins(probe)
    found: set[str] = set()
    for walk in probe.walks():
        content = first.task_hash(walk.task)
        if not isinstance(content, str) or re.fullmatch("[0-9a-f]{64}", content) is None:
            raise FaultError(
                f"task_hash({walk.task!r}) is {describe_value(content)}, wanted 64 lower-case hex digits"
            )
        if content != first.task_hash(walk.task) or content != second.task_hash(walk.task):
            raise FaultError(f"task_hash({walk.task!r}) is different the second time")
        found.add(content)
    if len(found) == 1 and len({repr(walk.answers[0][0]) for walk in probe.walks()}) > 1:
        raise FaultError("task_hash is the same for tasks that begin differently")
    return f"{len(found)} hashes of {len(probe.walks())} tasks, the same when called again"


def unknown_names(probe: Probe) -> str:
    """Check that unknown splits and tasks raise an `AgentRLError`."""
    env = probe.new_env()
    known: Any = env.unwrapped
    calls: tuple[tuple[str, Callable[[], Any]], ...] = (
        ("tasks(an unknown split)", lambda: known.tasks(NO_SUCH)),
        ("task_hash(an unknown task)", lambda: known.task_hash(NO_SUCH)),
        ("reset to an unknown task", lambda: env.reset(seed=probe.seed, options={"task": NO_SUCH})),
    )
    for what, call in calls:
        try:
            call()
        except AgentRLError as error:
            if not str(error):
                raise FaultError(f"{what} raised {type(error).__name__} without a message") from error
        except Exception as error:
            raise FaultError(
                f"{what} raised {type(error).__name__}, wanted an AgentRLError: {error}"
            ) from error
        else:
            raise FaultError(f"{what} raised nothing, wanted an AgentRLError")
    return "refused with an AgentRLError: split, task, hash of a task"


def seeds(probe: Probe) -> str:
    """Check that a new environment repeats episodes as `determinism` declares."""
    env = probe.twins()[1]
    return _repeated(
        probe, "seeds", "on a new environment", ((w, probe.replay(env, w)) for w in probe.walks())
    )


def group_resets(probe: Probe) -> str:
    """Check that a used environment repeats episodes, even after an unfinished one, as groups need."""

    def again() -> Iterator[tuple[Walk, Walk]]:
        env = probe.twins()[1]
        for walk in reversed(probe.walks()):
            first_half = walk.prefix(len(walk.actions) // 2)
            yield (
                first_half,
                probe.replay(env, first_half),
            )  # the next reset comes in the middle of this episode
            yield walk, probe.replay(env, walk)

    return _repeated(probe, "group resets", "on a used environment", again())


def _repeated(probe: Probe, check: str, where: str, pairs: Iterable[tuple[Walk, Walk]]) -> str:
    """Compare episodes with their repetitions, and record the first difference that "instance" allows."""
    declared = determinism(probe.twins()[0]) == "episode"
    whole = declared and (check == "seeds" or "seeds" in probe.repeats)  # report a fault only once
    first, count = None, 0
    for walk, again in pairs:
        how = f"played again {where}"
        if walk.beginning != again.beginning:
            raise FaultError(f"task {walk.task!r}, {how}, has another first observation or task_type")
        difference = walk.difference(again)
        if difference is not None and whole:
            raise FaultError(f"task {walk.task!r}, {how}, {difference}")
        first, count = first or (difference and f"{walk.task!r} {difference}"), count + 1
    probe.repeats[check] = first
    if whole:
        return f"{count} episodes again {where}: the same"
    details = f"after that not: {first}" if first else "and all else"
    return f"{count} episodes again {where}: the same task and first observation, {details}"


def default_task(probe: Probe) -> str:
    """Check that `reset(seed=)` without a task draws one by the seed."""
    first, second = (unpack("reset", env.reset(seed=1), RESET_PARTS)[0] for env in probe.twins())
    if repr(first) != repr(second):
        raise FaultError("reset(seed=1) without a task begins differently the second time")
    return "reset without options draws a task by its seed"


def timing(probe: Probe) -> str:
    """Measure the wall-clock seconds of construct, reset and step."""
    return "\n".join(
        f"{what} {_duration(median(taken))} (worst {_duration(max(taken))})"
        for what, taken in probe.seconds.items()
    )


def sizes(probe: Probe) -> str:
    """Measure the sizes of observations and infos."""
    answers = [answer for walk in probe.walks() for answer in walk.answers]
    observed = [len(answer[0]) for answer in answers if isinstance(answer[0], str)] or [0]
    info = [len(repr(answer[-1]).encode(errors="replace")) for answer in answers]
    return (
        f"observation {median(observed):,.0f} characters (largest {max(observed):,})\n"
        f"info {median(info):,.0f} bytes (largest {max(info):,})"
    )


CHECKS: tuple[tuple[str, Callable[[Probe], str]], ...] = (
    ("interface", interface),
    ("task ids", task_ids),
    ("answers", answers),
    ("observations", observations),
    ("success", success),
    ("optional info", optional_info),
    ("flags", flags),
    ("task hashes", hashes),
    ("unknown names", unknown_names),
    ("seeds", seeds),
    ("group resets", group_resets),
    ("default task", default_task),
    ("max_steps", trials.max_steps),
    ("step after end", trials.step_after_end),
    ("odd actions", trials.odd_actions),
    ("admissible actions", trials.admissible_actions),
    ("global randomness", trials.global_randomness),
    ("snapshots", trials.snapshots),
    ("expert", trials.expert),
    ("threads", trials.threads),
    ("close", trials.closing),
    ("processes", trials.processes),
)

# Reported without a verdict.
MEASUREMENTS: tuple[tuple[str, Callable[[Probe], str]], ...] = (("timing", timing), ("sizes", sizes))


def determinism(env: Gym) -> Any:
    """Return the declared determinism, or the default of the contract."""
    return getattr(env.unwrapped, "determinism", "episode")


def _infos(probe: Probe) -> Iterator[tuple[Walk, int, Mapping[str, Any]]]:
    for walk in probe.walks():
        for turn, answer in enumerate(walk.answers):
            if isinstance(answer[-1], Mapping):
                yield walk, turn, answer[-1]


def _twins(probe: Probe) -> tuple[Any, Any]:
    first, second = probe.twins()
    return first.unwrapped, second.unwrapped


def _duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.{0 if seconds >= 10 * size else 1}f} {unit}"
    return f"{seconds / 1e-6:.0f} µs"


def _count(walks: Sequence[Walk]) -> str:
    return f"{len(walks)} episodes, {sum(len(walk.actions) for walk in walks)} steps"
