"""The claims of the environment contract, one function each; `contract.check_text_env` runs them all.

A check returns what it saw, raises `FaultError` or `SkipError`, and tolerates what the other checks are
about: one fault of an environment fails one check. What the environment raises by itself fails the check as
well.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from agentrl.env import trials
from agentrl.env.answers import (
    RESET_PARTS,
    STEP_PARTS,
    flag_fault,
    observation_fault,
    optional_fault,
    reward_fault,
    shown,
    success_fault,
)
from agentrl.env.probe import (
    COMPARED_INFO,
    LONGEST_EPISODE,
    FaultError,
    Gym,
    Probe,
    Walk,
    blame,
    comparable,
    expert_of,
    unpack,
)
from agentrl.errors import AgentRLError

NO_SUCH = "agentrl: no such name"
LISTED_TASKS = 10_000


def interface(probe: Probe) -> str:
    """It has what a text environment has: tasks, their hashes, splits, spaces that take any text."""
    env = probe.fresh()
    known: Any = env.unwrapped
    missing = [name for name in ("tasks", "task_hash", "splits") if not hasattr(known, name)]
    if missing:
        probe.blocked = f"env.unwrapped lacks {', '.join(missing)}"
        raise FaultError(probe.blocked)
    splits = known.splits
    if not isinstance(splits, tuple) or not splits or not all(isinstance(name, str) for name in splits):
        probe.blocked = f"splits is {shown(splits)}, wanted a tuple of at least one str"
        raise FaultError(probe.blocked)
    if determinism(env) not in ("episode", "instance"):
        raise FaultError(f"determinism is {shown(determinism(env))}, wanted 'episode' or 'instance'")
    for name in ("observation_space", "action_space"):
        space = getattr(env, name, None)
        if space is None or not all(space.contains(text) for text in ("", "ä 漢\n", "a" * 10_000)):
            raise FaultError(f"{name} refuses some texts; agentrl.env.TextSpace does not")
    return f"splits {', '.join(splits)}"


def task_ids(probe: Probe) -> str:
    """The ids of every split can be listed, are unique, and are the same when asked again."""
    first: Any = probe.fresh().unwrapped
    second: Any = probe.fresh().unwrapped
    counts = []
    for split in first.splits:
        tasks = first.tasks(split)
        if not isinstance(tasks, Sequence) or isinstance(tasks, str) or not len(tasks):
            raise FaultError(f"tasks({split!r}) is {shown(tasks)}, wanted a sequence of at least one id")
        fault = _listing_fault(tasks)
        if fault is not None:
            raise FaultError(f"tasks({split!r}) {fault}")
        listed = list(islice(tasks, LISTED_TASKS))
        ends = len(tasks), tasks[len(tasks) - 1]
        for again in (first.tasks(split), second.tasks(split)):
            if (len(again), again[len(again) - 1]) != ends or list(islice(again, LISTED_TASKS)) != listed:
                raise FaultError(f"tasks({split!r}) lists other ids when asked again")
        counts.append(f"{len(tasks)} {split}")
    return f"stable, unique: {', '.join(counts)}"


def _listing_fault(tasks: Sequence[Any]) -> str | None:
    listed = list(islice(tasks, LISTED_TASKS))
    wrong = next((task for task in listed if not isinstance(task, str) or not task), None)
    if wrong is not None:
        return f"holds {shown(wrong)}, wanted str ids"
    if len(listed) != min(len(tasks), LISTED_TASKS):
        return f"has length {len(tasks)} but lists {len(listed)}"
    if len(set(listed)) != len(listed):
        return "lists an id twice"
    if (tasks[0], tasks[len(listed) - 1]) != (listed[0], listed[-1]):
        return "gives other ids by index than when listed"
    return None


def answers(probe: Probe) -> str:
    """Answers are tuples of 2 and 5, rewards finite real numbers, infos mappings."""
    for walk in probe.walks():
        for turn, answer in enumerate(walk.answers):
            if not isinstance(answer[-1], Mapping):
                blame(f"info is {shown(answer[-1])}, wanted a mapping", walk, turn)
            if len(answer) == len(STEP_PARTS):
                blame(reward_fault(answer[1]), walk, turn)
    return f"{_count(probe.walks())}: tuples of 2 and 5, finite rewards, info a mapping"


def observations(probe: Probe) -> str:
    """Every observation is a str."""
    for walk in probe.walks():
        for turn, answer in enumerate(walk.answers):
            blame(observation_fault(answer[0]), walk, turn)
    return "every observation is a str"


def success(probe: Probe) -> str:
    """Every info says in a bool whether the task is solved."""
    for walk, turn, info in _infos(probe):
        blame(success_fault(info), walk, turn)
    return "a bool in every info"


def optional_info(probe: Probe) -> str:
    """The optional keys of info hold what the contract says."""
    seen: set[str] = set()
    for walk, turn, info in _infos(probe):
        blame(optional_fault(info), walk, turn)
        seen |= info.keys() & {*COMPARED_INFO} - {"success"}
    return f"info also holds {', '.join(sorted(seen)) or 'nothing'}"


def flags(probe: Probe) -> str:
    """`terminated` and `truncated` are bools, never both set: the last allowed step that solves included."""
    walks = [*probe.walks(), *_solved_at_the_limit(probe)]
    for walk in walks:
        for turn, (_, _, terminated, truncated, _) in enumerate(walk.answers[1:], start=1):
            blame(flag_fault("terminated", terminated) or flag_fault("truncated", truncated), walk, turn)
            if terminated and truncated:
                blame("terminated and truncated are both set", walk, turn)
    return f"terminated and truncated are bools, never both true, in {_count(walks)}"


def _solved_at_the_limit(probe: Probe) -> Iterator[Walk]:
    """Episodes whose last allowed step solves the task: the one place where both flags suggest themselves."""
    for task in probe.tasks():
        env = probe.with_expert()
        if env is None:
            return
        solved = probe.walk(env, task, expert_of(env), LONGEST_EPISODE)
        limited = probe.limited(len(solved.actions)) if solved.solved and solved.actions else None
        if limited is not None:
            yield probe.replay(limited, solved)


def hashes(probe: Probe) -> str:
    """Hashes of tasks are SHA-256, stable, and say something about the task."""
    first: Any = probe.fresh().unwrapped
    second: Any = probe.fresh().unwrapped
    found: set[str] = set()
    for walk in probe.walks():
        content = first.task_hash(walk.task)
        if not isinstance(content, str) or re.fullmatch("[0-9a-f]{64}", content) is None:
            raise FaultError(f"task_hash({walk.task!r}) is {shown(content)}, wanted 64 lower-case hex digits")
        if content != first.task_hash(walk.task) or content != second.task_hash(walk.task):
            raise FaultError(f"task_hash({walk.task!r}) is another one the second time")
        found.add(content)
    if len(found) == 1 and len({repr(walk.answers[0][0]) for walk in probe.walks()}) > 1:
        raise FaultError("task_hash is the same for tasks that begin differently")
    return f"{len(found)} hashes of {len(probe.walks())} tasks, the same when asked again"


def unknown_names(probe: Probe) -> str:
    """Unknown splits and tasks are refused with an AgentRLError."""
    env = probe.fresh()
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
    """Same task, seed and actions give the same episode on new environments."""
    whole = determinism(probe.fresh()) == "episode"
    for walk in probe.walks():
        _same(walk, probe.replay(probe.fresh(), walk), "played again on a new environment", whole)
    same = "episodes" if whole else "first observations"
    probe.repeatable = whole
    return f"{_count(probe.walks())} again on new environments: same {same}"


def group_resets(probe: Probe) -> str:
    """They do so on a used environment as well, so that a group starts from one state."""
    env = probe.fresh()
    for walk in probe.walks():
        for _ in range(3):
            _same(walk, probe.replay(env, walk), "played again on a used environment", probe.repeatable)
    same = "episodes" if probe.repeatable else "first observations"
    return f"{_count(probe.walks())}, three times on one environment: same {same}"


def default_task(probe: Probe) -> str:
    """`reset(seed=)` without a task draws one by the seed."""
    first, second = (unpack("reset", probe.fresh().reset(seed=1), RESET_PARTS)[0] for _ in range(2))
    if repr(first) != repr(second):
        raise FaultError("reset(seed=1) without a task begins differently the second time")
    return "reset without options draws a task by its seed"


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
    ("close", trials.closing),
)


def determinism(env: Gym) -> Any:
    """What the environment declares; the contract's default where it says nothing."""
    return getattr(env.unwrapped, "determinism", "episode")


def _infos(probe: Probe) -> Iterator[tuple[Walk, int, Mapping[str, Any]]]:
    for walk in probe.walks():
        for turn, answer in enumerate(walk.answers):
            if isinstance(answer[-1], Mapping):
                yield walk, turn, answer[-1]


def _same(walk: Walk, again: Walk, how: str, whole: bool) -> None:
    if repr(walk.answers[0][0]) != repr(again.answers[0][0]):
        raise FaultError(f"task {walk.task!r}, {how}, has another first observation")
    if not whole:
        return
    for turn, (one, other) in enumerate(zip(walk.answers, again.answers, strict=False)):
        if comparable(one) != comparable(other):
            raise FaultError(f"task {walk.task!r}, {how}, differs after {turn} actions")
    if len(walk.answers) != len(again.answers):
        lengths = f"{len(again.actions)} steps, at first {len(walk.actions)}"
        raise FaultError(f"task {walk.task!r}, {how}, has {lengths}")


def _count(walks: Sequence[Walk]) -> str:
    return f"{len(walks)} episodes, {sum(len(walk.actions) for walk in walks)} steps"
