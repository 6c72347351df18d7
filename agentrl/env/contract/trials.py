"""Checks of the environment contract that push an environment to its limits; see `checks`."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from random import Random
from threading import Barrier
from time import monotonic, sleep
from typing import Any

import gymnasium

from agentrl.env.contract.answers import observation_fault
from agentrl.env.contract.probe import (
    MAX_EPISODE_STEPS,
    FaultError,
    Gym,
    Probe,
    SkipError,
    Walk,
    admissible,
    comparable,
    idle_action,
    oversize_fault,
    raise_fault,
    running_processes,
    scripted,
    started_since,
    step_limit,
)
from agentrl.env.tools import call_of, read_tools
from agentrl.errors import AgentRLError
from agentrl.values import ValueFaultError, describe_value

ODD_ACTIONS = (
    *("", " ", "\n", "\t\x00\x7f", "ä ß 漢字 🎲 \u202e", "<task><obs><act><end>", "{}%s\\"),
    "a" * 100_000,
)
CLEAR_ERRORS = (AgentRLError, gymnasium.error.Error, RuntimeError)
SINGLES = 4  # admissible actions per task that are tried alone
THREADS = 3
PATIENCE = 10.0  # seconds that the processes of a closed environment may take to end


def max_steps(probe: Probe) -> str:
    """Check that an episode is truncated exactly at the step limit."""
    reached = 0
    env, limit = probe.limited(3), step_limit(probe.twins()[0])
    if env is not None:
        limit = 3
    env = env or probe.twins()[0]
    if limit is None:
        raise SkipError("make takes no max_steps and env.unwrapped has none")
    if limit > MAX_EPISODE_STEPS:
        raise SkipError(f"max_steps is {limit}: too many steps to play")
    for task in probe.tasks():
        for choose in (idle_action, probe.random_actions(task)):
            walk = probe.walk(env, task, choose, limit)
            if len(walk.actions) == limit and not walk.ended:
                raise FaultError(f"task {task!r} continues after max_steps={limit}")
            truncated = walk.ended and walk.answers[-1][3]
            if truncated and len(walk.actions) < limit:
                raise FaultError(
                    f"task {task!r} is truncated after {len(walk.actions)} steps, max_steps={limit}"
                )
            reached += bool(truncated)
    return f"max_steps={limit} ended {reached} episodes, none continued after it"


def step_after_end(probe: Probe) -> str:
    """Check that `step` raises a clear error before the first reset and after the end of an episode."""
    _refuses_step(probe.new_env(), "before the first reset")
    env = probe.limited(2) or probe.twins()[0]
    for task in probe.tasks():
        if probe.walk(env, task, None, MAX_EPISODE_STEPS).ended:
            _refuses_step(env, "after the end of an episode")
            probe.walk(env, task, None, 1)
            return "refused before the first reset and after the end; accepted again after a reset"
    raise SkipError(f"no episode ended within {MAX_EPISODE_STEPS} steps")


def _refuses_step(env: Gym, when: str) -> None:
    """Raise a `FaultError` unless `step` raises a clear error."""
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
    """Check that any text is accepted as an action."""
    env = probe.twins()[0]
    task = probe.tasks()[0]
    for action in ODD_ACTIONS:
        try:
            observation = probe.walk(env, task, scripted((action,)), 1).answers[-1][0]
        except Exception as error:
            raise FaultError(
                f"the action {describe_value(action)} raised {type(error).__name__}: {error}"
            ) from error
        fault = observation_fault(observation) or oversize_fault(env, observation)
        if fault is not None and isinstance(observation, str):  # the check "observations" covers other types
            raise FaultError(f"the action {describe_value(action)}: {fault}")
    return f"{len(ODD_ACTIONS)} accepted: empty, blank, control codes, Unicode, markup, 100,000 characters"


def admissible_actions(probe: Probe) -> str:
    """Check that actions listed as admissible are valid, and calls of the declared tools."""
    tried, reports_valid = 0, False
    env, draw = probe.twins()[0], Random(probe.seed)
    for walk in probe.walks():
        for turn, answer in enumerate(walk.answers):
            raise_fault(_call_fault(env, admissible(answer[-1])), walk, turn)
        first = admissible(walk.answers[0][-1])
        some = draw.sample(first, min(SINGLES, len(first)))
        singles = [probe.walk(env, walk.task, scripted((action,)), 1) for action in some]
        for played in [walk, *singles]:
            for turn, action in enumerate(played.actions):
                if action not in admissible(played.answers[turn][-1]):
                    continue
                info = played.answers[turn + 1][-1]
                if isinstance(info, Mapping) and info.get("valid") is False:
                    raise_fault(f"{action!r} is in info['actions'] but was not valid", walk, turn + 1)
                tried += 1
                reports_valid = reports_valid or (isinstance(info, Mapping) and "valid" in info)
    if not tried:
        raise SkipError("info contains no actions")
    return f"{tried} tried, " + ("all valid" if reports_valid else "none raised; there is no info['valid']")


def _call_fault(env: Gym, actions: Sequence[str]) -> str | None:
    """Return which of some actions no declared tool has a call for, or None."""
    try:
        tools = read_tools(getattr(env.unwrapped, "action_tools", ()))
    except ValueFaultError:  # the check of the interface names it
        return None
    lacking = next((action for action in actions if tools and call_of(tools, action) is None), None)
    return None if lacking is None else f"{lacking!r} is no call of a tool in action_tools"


def global_randomness(probe: Probe) -> str:
    """Check that the global random number generators are not used."""
    probe.walks()
    if probe.changed_generators:
        names = " and ".join(probe.changed_generators)
        raise FaultError(f"an episode changed the global state of {names}; use self.np_random")
    return "the global states of random and numpy.random are untouched"


def snapshots(probe: Probe) -> str:
    """Check that a restored snapshot continues like the original, twice and in another environment."""
    env = probe.twins()[0]
    known: Any = env.unwrapped
    if not callable(getattr(known, "snapshot", None)) or not callable(getattr(known, "restore", None)):
        raise SkipError("not declared")
    branch = probe.new_env()  # never reset, so it has only the snapshot
    other: Any = branch.unwrapped
    for walk in probe.walks():
        half = max(0, min(len(walk.actions) - 1, len(walk.actions) // 2))
        first_half = probe.walk(env, walk.task, scripted(walk.actions[:half]), max(1, half))

        def continued(
            env: Gym, first_half: Walk = first_half, rest: tuple[str, ...] = walk.actions[half:]
        ) -> list[str]:
            last = first_half.answers[-1]
            _, answers = probe.continue_episode(env, last, scripted(rest), probe.steps)
            return [comparable(answer) for answer in answers]

        snapshot = known.snapshot()
        other.restore(snapshot)
        branched = continued(branch)
        original = continued(env)
        if branched != original:
            raise FaultError(
                f"task {walk.task!r}: the {half}th state continues differently in another environment"
            )
        for time in ("once", "twice"):
            known.restore(snapshot)
            if continued(env) != original:
                raise FaultError(
                    f"task {walk.task!r}: the {half}th state, restored {time}, continues differently"
                )
    return (
        f"{len(probe.walks())} states continued alike: the original, restored twice, in another environment"
    )


def expert(probe: Probe) -> str:
    """Check that the expert solves at least half of the tasks with admissible actions and declared tools."""
    walks = probe.expert_walks()
    if walks is None:
        raise SkipError("not declared")
    for walk in walks:
        for turn, action in enumerate(walk.actions):
            offered = admissible(walk.answers[turn][-1])
            if offered and action not in offered:
                raise_fault(f"the expert's {action!r} is not in info['actions']", walk, turn)
            raise_fault(_call_fault(probe.twins()[0], [action]), walk, turn)
    steps = sorted(len(walk.actions) for walk in walks if walk.solved)
    if 2 * len(steps) < len(walks):
        raise FaultError(f"the expert solved {len(steps)} of {len(walks)} tasks, wanted at least half")
    limit = step_limit(probe.twins()[0])
    late = f"; max_steps={limit} is enough for {sum(count <= limit for count in steps)}" if limit else ""
    return f"solved {len(steps)} of {len(walks)} tasks, in {steps[0]} to {steps[-1]} steps{late}"


def threads(probe: Probe) -> str:
    """Check that environments used in several threads at once do not affect each other."""
    known: Any = probe.twins()[0].unwrapped
    if not getattr(known, "thread_safe", False):
        raise SkipError("not declared")
    # Episodes that are not repeatable in one thread need not be in several.
    whole = probe.proven == getattr(known, "determinism", "episode") == "episode"
    walks, start = probe.walks(), Barrier(THREADS)

    def play(index: int, env: Gym) -> list[tuple[Walk, Walk]]:
        start.wait()
        turn = index % len(walks)  # different tasks per thread, or shared state could agree by chance
        return [(walk, probe.replay(env, walk)) for walk in (walks[turn:] + walks[:turn])[:2]]

    envs = [probe.new_env() for _ in range(THREADS)]
    with _eager_threads(), ThreadPoolExecutor(THREADS) as pool:
        pairs = [pair for played in pool.map(play, range(THREADS), envs) for pair in played]
    for walk, again in pairs:
        how = f"task {walk.task!r}, played while other threads play"
        if probe.proven and walk.beginning != again.beginning:
            raise FaultError(f"{how}, has another first observation or task_type")
        difference = walk.difference(again) if whole else None
        if difference is not None:
            raise FaultError(f"{how}, {difference}")
    same = "the same as in one thread" if whole else "nothing raised"
    return f"{len(pairs)} episodes on {THREADS} environments in {THREADS} threads: {same}"


@contextmanager
def _eager_threads() -> Iterator[None]:
    """Switch between threads far more often than usual, so that short episodes interleave."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


def processes(probe: Probe) -> str:
    """Check that no process starts before the first reset, and none is left after `close`."""
    walk = probe.expert_or_random_walks()[0]
    if probe.started_early:
        raise FaultError(
            f"constructing it, listing tasks and hashing one started {', '.join(probe.started_early)}"
        )
    probe.close_envs(failed=True)  # closes all, since environments may share a process
    before = running_processes()
    env = probe.new_env()
    probe.replay(env, walk.prefix(5))
    started = started_since(before)
    env.close()
    deadline = monotonic() + PATIENCE
    while (left := started_since(probe.processes_before)) and monotonic() < deadline:
        sleep(0.05)
    if left:
        raise FaultError(f"{', '.join(left)} still running {PATIENCE:.0f} s after all were closed")
    if not started:
        return "none started"
    return f"an episode starts {', '.join(started)}, nothing before; none left after close()"


def closing(probe: Probe) -> str:
    """Check that `close` may be called twice at any time, and that `reset` reopens the environment."""
    unused, used = probe.new_env(), probe.twins()[0]
    for env in (unused, used):
        env.close()
        env.close()
    probe.walk(used, probe.tasks()[0], None, 1)
    used.close()
    used.close()
    return "close() twice, before and after episodes; a reset reopens it"
