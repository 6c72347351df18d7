"""Choosing where environments live.

What each placement promises when an environment misbehaves:

- An exception of any kind (SystemExit, KeyboardInterrupt and GeneratorExit included), a fork that comes back
  and an answer of hundreds of megabytes end an episode in all of them, on Ray as well.
- `process` and Ray also survive what ends or stops the process itself: `os._exit`, signals that it sends to
  itself, crashes of native code, calls that never return, more memory than `recycle_megabytes` allows. What
  the environment started ends with its worker.
- `thread` gives up a call that takes too long, but cannot end it; neither it nor `inline` can survive
  `os._exit`, a crash or too much memory, tell a SIGINT that an environment sends to this process from the
  user's, or find what it has left running.
- `inline` waits for a call as long as it takes.

Ctrl-C of the user stops a run in every one of them.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from agentrl.rollout.environments import EnvironmentPool, Environments, Make, ThreadedEnvironments
from agentrl.rollout.settings import Placement, RolloutConfig, WorkersConfig
from agentrl.rollout.worker import CallTimes
from agentrl.rollout.workers import EnvironmentLostError, ProcessEnvironments

_log = logging.getLogger(__name__)

# Below this many seconds a call, what a process costs is more than what it brings.
CHEAP_CALL = 0.002


def open_environments(make: Make, config: RolloutConfig) -> Environments:
    """Environments of this machine as configured; see `resolve_placement` for `auto`."""
    if config.placement == "inline":
        return EnvironmentPool(make)
    if config.placement == "thread":
        return ThreadedEnvironments(make, config.max_active, config.workers)
    return ProcessEnvironments(make, config.max_active, config.workers)


def resolve_placement(
    make: Make, config: RolloutConfig, split: str, seed: int = 0
) -> tuple[RolloutConfig, str | None]:
    """Decide what the configuration leaves open: the placement, and how many environments a worker holds.

    A few calls are timed, in a worker, so that nothing they do can hurt this process. Cheap calls then stay
    in this process; dear ones that mostly wait get threads where the environment declares `thread_safe`, all
    others processes. An environment that declares itself `heavy` gets a worker to itself, one per core. Where
    only processes will do, as on a cluster's machines, that is all that is to be found out.

    Args:
        make: makes an environment.
        config: of the rollouts.
        split: whose first tasks are played.
        seed: of the environment and the actions.

    Returns:
        The configuration without `auto`, and what was measured, in words; None where nothing was left open.
    """
    workers = config.workers
    if config.placement in ("inline", "thread"):
        return config, None
    if config.placement == "process" and workers.environments is not None:
        return config, None
    try:
        times = _time_environment(make, workers, split, seed)
    except EnvironmentLostError as error:
        return replace(config, placement="process"), f"placement process: not measured, {error}"
    placement = config.placement if config.placement != "auto" else _choose_placement(times, config)
    if placement == "process" and times.heavy and workers.environments is None:
        workers = replace(workers, environments=1)
    resolved = replace(config, placement=placement, workers=workers)
    _log.debug("placement %s, %s", placement, workers)
    return resolved, f"placement {placement}: {_describe_times(times)}"


def _time_environment(make: Make, workers: WorkersConfig, split: str, seed: int) -> CallTimes:
    with ProcessEnvironments(make, 1, replace(workers, count=1, environments=1)) as environments:
        with environments.borrow() as environment:
            known: Any = environment.unwrapped
            tasks: Sequence[str] = known.tasks(split)[:3]
        return environments.time_calls(tasks, seed)


def _choose_placement(times: CallTimes, config: RolloutConfig) -> Placement:
    if config.workers.interpreter is None and config.backend == "local":
        if times.wall < CHEAP_CALL:
            return "inline"
        if times.thread_safe and not times.heavy and times.cpu < times.wall / 2:
            return "thread"
    return "process"


def _describe_times(times: CallTimes) -> str:
    safe = "thread-safe" if times.thread_safe else "not declared thread-safe"
    return (
        f"a call takes {times.wall * 1e3:.2f} ms, of which {times.cpu * 1e3:.2f} ms CPU in its process "
        f"({times.calls} calls, {safe}{', heavy' if times.heavy else ''})"
    )
