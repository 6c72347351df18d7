"""The `rollout` block of a run's configuration."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Interval

from agentrl.config import Count, Devices, OptionalCount, Processes, Seconds, Share, check_own_numbers
from agentrl.errors import ConfigError

Placement = Literal["auto", "inline", "thread", "process"]


@dataclass(frozen=True)
class WorkersConfig:
    """Worker processes of environments, and the time limits of their calls.

    Args:
        count: The number of processes of a machine; None for one per core.
        environments: The number of environments in each process; None for as many as `rollout.max_active`
            needs.
        interpreter: The path of another Python to run them in, with agentrl and the environment installed.
        construct_timeout: The time limit for starting the process and making the environment, in seconds.
        reset_timeout: The time limit of a reset, in seconds.
        step_timeout: The time limit of a step, in seconds.
        recycle_episodes: The number of episodes after which a process is replaced; None for never.
        recycle_megabytes: The memory of a process with its children beyond which it is replaced: after an
            episode, or during one at 1.5 times as much; None for never.
    """

    count: Processes | None = None
    environments: Count | None = None
    interpreter: str | None = None
    construct_timeout: Seconds = 180.0
    reset_timeout: Seconds = 120.0
    step_timeout: Seconds = 60.0
    recycle_episodes: Annotated[int, Interval(ge=1, le=1_000_000_000)] | None = 1000
    recycle_megabytes: Annotated[int, Interval(ge=1, le=1_000_000_000)] | None = 4096

    def __post_init__(self) -> None:
        check_own_numbers(self, "rollout.workers")


@dataclass(frozen=True)
class RayConfig:
    """Ray actors of `rollout.backend=ray`, each with the processes of `rollout.workers`.

    Args:
        address: The address of a cluster, "host:port", or "auto" for the cluster of this machine; None starts
            Ray on this machine for the length of the run. `engine.actors` and the learner's `launcher: ray`
            use the same cluster.
        actors: The number of actors; None for one per machine.
        cpus: The number of CPUs that Ray reserves for each actor and its processes.
        max_restarts: The number of lost actors that are replaced in total; after that, the run continues with
            those that are left.
    """

    address: str | None = None
    actors: Processes | None = None
    cpus: Devices = 0.0
    max_restarts: OptionalCount = 16

    def __post_init__(self) -> None:
        check_own_numbers(self, "rollout.ray")
        host, _, port = (self.address or "auto").rpartition(":")
        if self.address not in (None, "auto") and not (host and "/" not in host and port.isdecimal()):
            raise ConfigError(f'rollout.ray.address is {self.address!r}, wanted "host:port", "auto" or null')


@dataclass(frozen=True)
class RolloutConfig:
    """Collection of episodes.

    Args:
        backend: The machines that environments run on: `local` for this one, `ray` for those of a cluster.
        placement: Where an environment lives. `inline` is this process: the only placement that repeats bit
            for bit, and the only one in which a hanging or crashing environment ends the run. `thread` is for
            environments that declare `thread_safe` and mostly wait. `process` is supervised; see
            `agentrl.rollout.placement` for the failures that each survives. `auto` times a few steps and
            decides; the config.yaml of a run holds the decision. With the backend `ray` it is always
            `process`.
        workers: The workers of the placement `process`; the timeouts apply to `thread` as well.
        ray: The actors of the backend `ray`.
        groups_per_step: The number of tasks that are played in a training step.
        group_size: The number of episodes of each task, whose returns are compared.
        max_active: The number of episodes in progress at once.
        max_turns: The maximum number of turns, beside the environment's own limit. It also applies to the
            episodes that a tokenizer is fitted on and to demonstrations. None leaves it to the environment,
            up to 10,000 turns (1,000 for these two).
        temperature: The sampling temperature of the policy's replies in training.
        constrained: Whether replies are chosen from the admissible commands by a token trie, after free
            thoughts with `policy.reply=think_action`; False generates freely and parses.
        max_attempts: The number of attempts at an episode in which the environment or worker fails; a task
            with as many failures in a row is not played any more.
        max_aborted_share: The share of a step's episodes beyond which aborted episodes stop the run.
    """

    backend: Literal["local", "ray"] = "local"
    placement: Placement = "auto"
    workers: WorkersConfig = field(default_factory=WorkersConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    groups_per_step: Count = 8
    group_size: Count = 8
    max_active: Count = 64
    max_turns: Count | None = None
    temperature: Annotated[float, Interval(gt=0, le=1000)] = 1.0
    constrained: bool = True
    max_attempts: Count = 3
    max_aborted_share: Share = 0.2

    def __post_init__(self) -> None:
        check_own_numbers(self, "rollout")
        needs_process = {
            "rollout.workers.interpreter is set": self.workers.interpreter is not None,
            "rollout.backend is ray": self.backend == "ray",
        }
        for why in (why for why, holds in needs_process.items() if holds):
            if self.placement in ("inline", "thread"):
                raise ConfigError(
                    f"{why}, but rollout.placement={self.placement} plays in this process; "
                    "wanted process or auto"
                )
