"""The claims of the environment contract, one function each; `contract.check_text_env` runs them all.

A check returns what it saw, raises `FaultError` or `SkipError`, and tolerates what the other
checks are about: one fault of an environment fails one check. What the environment raises by itself fails
the check as well.
"""

import pickle
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import gymnasium
import numpy as np

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
    LONGEST_EPISODE,
    FaultError,
    Gym,
    Probe,
    SkipError,
    Walk,
    admissible,
    expert_of,
    follow,
    idle,
    step_limit,
    unpack,
)
from agentrl.errors import AgentRLError

NO_SUCH = "agentrl: no such name"
ODD_ACTIONS = (
    *("", " ", "\n", "\t\x00\x7f", "ä ß 漢字 🎲 \u202e", "<task><obs><act><end>", "{}%s\\"),
    "a" * 100_000,
)
COMPARED_INFO = ("success", "score", "valid", "task_type", "expert", "state_key", "actions")
_UNLIKELY_SEED = 3_141_592_653
LISTED_TASKS = 10_000
CLEAR_ERRORS = (AgentRLError, gymnasium.error.Error, RuntimeError)


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
                _raise(f"info is {shown(answer[-1])}, wanted a mapping", walk, turn)
            if len(answer) == len(STEP_PARTS):
                _raise(reward_fault(answer[1]), walk, turn)
    return f"{_count(probe.walks())}: tuples of 2 and 5, finite rewards, info a mapping"


def observations(probe: Probe) -> str:
    """Every observation is a str."""
    for walk in probe.walks():
        for turn, answer in enumerate(walk.answers):
            _raise(observation_fault(answer[0]), walk, turn)
    return "every observation is a str"


def success(probe: Probe) -> str:
    """Every info says in a bool whether the task is solved."""
    for walk, turn, info in _infos(probe):
        _raise(success_fault(info), walk, turn)
    return "a bool in every info"


def optional_info(probe: Probe) -> str:
    """The optional keys of info hold what the contract says."""
    seen: set[str] = set()
    for walk, turn, info in _infos(probe):
        _raise(optional_fault(info), walk, turn)
        seen |= info.keys() & {*COMPARED_INFO} - {"success"}
    return f"info also holds {', '.join(sorted(seen)) or 'nothing'}"


def flags(probe: Probe) -> str:
    """`terminated` and `truncated` are bools, never both set: the last allowed step that solves included."""
    walks = [*probe.walks(), *_solved_at_the_limit(probe)]
    for walk in walks:
        for turn, (_, _, terminated, truncated, _) in enumerate(walk.answers[1:], start=1):
            _raise(flag_fault("terminated", terminated) or flag_fault("truncated", truncated), walk, turn)
            if terminated and truncated:
                _raise("terminated and truncated are both set", walk, turn)
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


def max_steps(probe: Probe) -> str:
    """The step limit ends an episode, not earlier and not later."""
    reached = 0
    env, limit = probe.limited(3), step_limit(probe.fresh())
    if env is not None:
        limit = 3
    env = env or probe.fresh()
    if limit is None:
        raise SkipError("make takes no max_steps and env.unwrapped has none")
    if limit > LONGEST_EPISODE:
        raise SkipError(f"max_steps is {limit}: too long to be waited for")
    for task in probe.tasks():
        for choose in (idle, probe.wander(task)):
            walk = probe.walk(env, task, choose, limit)
            if len(walk.actions) == limit and not walk.ended:
                raise FaultError(f"task {task!r} goes on after max_steps={limit}")
            truncated = walk.ended and walk.answers[-1][3]
            if truncated and len(walk.actions) < limit:
                raise FaultError(
                    f"task {task!r} is truncated after {len(walk.actions)} steps, max_steps={limit}"
                )
            reached += bool(truncated)
    return f"max_steps={limit} ended {reached} episodes, none went on after it"


def step_after_end(probe: Probe) -> str:
    """A step that no running episode can take raises a clear error."""
    env = probe.limited(2) or probe.fresh()
    _refuses_step(env, "before the first reset")
    for task in probe.tasks():
        if probe.walk(env, task, None, LONGEST_EPISODE).ended:
            _refuses_step(env, "after the end of an episode")
            probe.walk(env, task, None, 1)
            return "refused before the first reset and after the end; a reset helps"
    raise SkipError(f"no episode ended within {LONGEST_EPISODE} steps")


def _refuses_step(env: Gym, when: str) -> None:
    try:
        env.step("look")
    except CLEAR_ERRORS as error:
        if not str(error):
            raise FaultError(f"step {when} raised {type(error).__name__} without a message") from error
    except Exception as error:
        wanted = "an AgentRLError or a RuntimeError that says so"
        raise FaultError(f"step {when} raised {type(error).__name__}: {error}; wanted {wanted}") from error
    else:
        raise FaultError(f"step {when} was accepted")


def odd_actions(probe: Probe) -> str:
    """Whatever a policy writes is accepted."""
    env = probe.fresh()
    task = probe.tasks()[0]
    for action in ODD_ACTIONS:
        try:
            probe.walk(env, task, follow((action,)), 1)
        except Exception as error:
            raise FaultError(f"the action {shown(action)} raised {type(error).__name__}: {error}") from error
    return f"{len(ODD_ACTIONS)} accepted: empty, blank, control codes, Unicode, markup, 100,000 characters"


def admissible_actions(probe: Probe) -> str:
    """Actions that are told to be admissible are valid."""
    tried, told = 0, False
    env = probe.fresh()
    for walk in probe.walks():
        first = admissible(walk.answers[0][-1])
        singles = [probe.walk(env, walk.task, follow((action,)), 1) for action in first[: probe.steps]]
        for played in [walk, *singles]:
            for turn, action in enumerate(played.actions):
                if action not in admissible(played.answers[turn][-1]):
                    continue
                info = played.answers[turn + 1][-1]
                if isinstance(info, Mapping) and info.get("valid") is False:
                    _raise(f"{action!r} is in info['actions'] but was not valid", walk, turn + 1)
                tried, told = tried + 1, told or (isinstance(info, Mapping) and "valid" in info)
    if not tried:
        raise SkipError("info holds no actions")
    return f"{tried} tried, " + ("all valid" if told else "none raised; info['valid'] would say more")


def global_randomness(probe: Probe) -> str:
    """The global random number generators are left alone."""
    kept = random.getstate(), np.random.get_state()
    # A state that no environment seeds by itself, or seeding it to what it is would not show.
    random.seed(_UNLIKELY_SEED)
    np.random.seed(_UNLIKELY_SEED)
    before = _global_states()
    try:
        env = probe.fresh()
        for task in probe.tasks():
            probe.walk(env, task)
        env.close()
        touched = [name for name, state in _global_states().items() if state != before[name]]
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
    if touched:
        raise FaultError(
            f"an episode changed the global state of {' and '.join(touched)}; use self.np_random"
        )
    return "the global states of random and numpy.random are untouched"


def _global_states() -> dict[str, object]:
    return {
        "random": random.getstate(),
        "numpy.random": pickle.dumps(
            np.random.get_state(legacy=False)
        ),  # holds an array, which has no plain ==
    }


def snapshots(probe: Probe) -> str:
    """A restored state goes on as it did."""
    env = probe.fresh()
    known: Any = env.unwrapped
    if not callable(getattr(known, "snapshot", None)) or not callable(getattr(known, "restore", None)):
        raise SkipError("not declared")
    for walk in probe.walks():
        half = max(0, min(len(walk.actions) - 1, len(walk.actions) // 2))
        begun = probe.walk(env, walk.task, follow(walk.actions[:half]), max(1, half))
        snapshot = known.snapshot()
        first = probe.go_on(env, begun.answers[-1], follow(walk.actions[half:]), probe.steps)
        for _ in range(2):
            known.restore(snapshot)
            again = probe.go_on(env, begun.answers[-1], follow(walk.actions[half:]), probe.steps)
            if list(map(_comparable, again[1])) != list(map(_comparable, first[1])):
                raise FaultError(f"task {walk.task!r}: the {half}th state, restored, goes on differently")
    return f"{len(probe.walks())} states, restored twice, went on as before"


def expert(probe: Probe) -> str:
    """Following the expert solves tasks, and what it says is admissible."""
    solved, tasks = 0, probe.tasks()
    env = probe.with_expert()
    if env is None:
        raise SkipError("not declared")
    for task in tasks:
        walk = probe.walk(env, task, expert_of(env), LONGEST_EPISODE)
        for turn, action in enumerate(walk.actions):
            offered = admissible(walk.answers[turn][-1])
            if offered and action not in offered:
                _raise(f"the expert's {action!r} is not in info['actions']", walk, turn)
        solved += walk.solved
    if 2 * solved < len(tasks):
        raise FaultError(f"the expert solved {solved} of {len(tasks)} tasks, wanted at least half")
    return f"solved {solved} of {len(tasks)} tasks"


def closing(probe: Probe) -> str:
    """`close` may be called twice."""
    for env in (probe.fresh(), probe.fresh()):
        env.close()
        env.close()
        env = probe.fresh()
        probe.walk(env, probe.tasks()[0], None, 1)
        env.close()
        env.close()
    return "close() twice, before and after an episode"


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
    ("max_steps", max_steps),
    ("step after end", step_after_end),
    ("odd actions", odd_actions),
    ("admissible actions", admissible_actions),
    ("global randomness", global_randomness),
    ("snapshots", snapshots),
    ("expert", expert),
    ("close", closing),
)


def determinism(env: Gym) -> Any:
    """What the environment declares; the contract's default where it says nothing."""
    return getattr(env.unwrapped, "determinism", "episode")


def _infos(probe: Probe) -> Iterator[tuple[Walk, int, Mapping[str, Any]]]:
    for walk in probe.walks():
        for turn, answer in enumerate(walk.answers):
            if isinstance(answer[-1], Mapping):
                yield walk, turn, answer[-1]


def _raise(fault: str | None, walk: Walk, turn: int) -> None:
    if fault is not None:
        where = "reset" if turn == 0 else f"step {turn}"
        raise FaultError(f"{where} of task {walk.task!r}: {fault}")


def _same(walk: Walk, again: Walk, how: str, whole: bool) -> None:
    if repr(walk.answers[0][0]) != repr(again.answers[0][0]):
        raise FaultError(f"task {walk.task!r}, {how}, has another first observation")
    if not whole:
        return
    for turn, (one, other) in enumerate(zip(walk.answers, again.answers, strict=False)):
        if _comparable(one) != _comparable(other):
            raise FaultError(f"task {walk.task!r}, {how}, differs after {turn} actions")
    if len(walk.answers) != len(again.answers):
        lengths = f"{len(again.actions)} steps, at first {len(walk.actions)}"
        raise FaultError(f"task {walk.task!r}, {how}, has {lengths}")


def _comparable(answer: tuple[Any, ...]) -> str:
    info = answer[-1]
    kept = {key: info[key] for key in COMPARED_INFO if key in info} if isinstance(info, Mapping) else info
    return repr((answer[:-1], kept))  # as text: nan equals nan


def _count(walks: Sequence[Walk]) -> str:
    return f"{len(walks)} episodes, {sum(len(walk.actions) for walk in walks)} steps"
