"""Claims of the environment contract about an environment that is driven to its limits; see `checks`."""

import pickle
import random
from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np

from agentrl.env.answers import shown
from agentrl.env.probe import (
    LONGEST_EPISODE,
    FaultError,
    Gym,
    Probe,
    SkipError,
    admissible,
    blame,
    comparable,
    expert_of,
    follow,
    idle,
    step_limit,
)
from agentrl.errors import AgentRLError

ODD_ACTIONS = (
    *("", " ", "\n", "\t\x00\x7f", "ä ß 漢字 🎲 \u202e", "<task><obs><act><end>", "{}%s\\"),
    "a" * 100_000,
)
CLEAR_ERRORS = (AgentRLError, gymnasium.error.Error, RuntimeError)
_UNLIKELY_SEED = 3_141_592_653


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
                    blame(f"{action!r} is in info['actions'] but was not valid", walk, turn + 1)
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
            if list(map(comparable, again[1])) != list(map(comparable, first[1])):
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
                blame(f"the expert's {action!r} is not in info['actions']", walk, turn)
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
