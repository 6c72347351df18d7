"""Choosing where environments live.

The placements differ in the failures of an environment that they survive:

- In all of them, and on Ray, an exception of any kind (SystemExit, KeyboardInterrupt and GeneratorExit
  included), a fork that returns and an answer of hundreds of megabytes end one episode.
- `process` and Ray also survive failures of the process itself: `os._exit`, signals that it sends to itself,
  crashes of native code, calls that never return, and more memory than `recycle_megabytes` allows. Processes
  that the environment started end with its worker.
- `thread` abandons a call that takes too long but cannot end it. Neither `thread` nor `inline` survives
  `os._exit`, a crash or too much memory, nor can they distinguish a SIGINT that an environment sends to this
  process from the user's, or find processes that it has left running.
- `inline` waits for a call without limit.

Ctrl-C of the user stops a run in all of them.
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

# In seconds. Below it, sending a call to another process costs more than is gained by running in parallel.
CHEAP_CALL = 0.002


def open_environments(make: Make, config: RolloutConfig) -> Environments:
    """Return the configured environments of this machine; `resolve_placement` resolves `auto` before."""
    if config.placement == "inline":
        return EnvironmentPool(make)
    if config.placement == "thread":
        return ThreadedEnvironments(make, config.max_active, config.workers)
    return ProcessEnvironments(make, config.max_active, config.workers)


def resolve_placement(
    make: Make, config: RolloutConfig, split: str, seed: int = 0
) -> tuple[RolloutConfig, str | None]:
    """Resolve what the configuration leaves open: the placement, and the number of environments per worker.

    A few calls are timed in a worker, so that they cannot harm this process. An environment with cheap calls
    is placed in this process; one with expensive calls that mostly wait gets threads if it declares
    `thread_safe`; all others get processes. An environment that declares itself `heavy` gets one worker per
    core, with no other environment in it. Where only processes are possible, as on a cluster, the placement
    is `process` in any case.

    Args:
        make: The function that makes an environment.
        config: The configuration of the rollout.
        split: The split whose first tasks are played.
        seed: The seed of the environment and of the actions.

    Returns:
        The configuration without `auto`, and a description of what was measured; None if nothing was open.
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
            unwrapped: Any = environment.unwrapped
            tasks: Sequence[str] = unwrapped.tasks(split)[:3]
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
