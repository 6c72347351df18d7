"""The `rollout` block of a run's configuration."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Interval

from agentrl.config import Count, Devices, OptionalCount, Processes, Seconds, Share, check_own_numbers
from agentrl.errors import ConfigError

Placement = Literal["auto", "inline", "thread", "process"]


@dataclass(frozen=True)
class WorkersConfig:
    """Processes that environments live in, and how long their calls may take.

    Args:
        count: processes of a machine; None for one per core.
        environments: of each process; None for as many as `rollout.max_active` needs.
        interpreter: another Python that they run in, with agentrl and the environment installed there.
        construct_timeout: seconds for the process to start and the environment to be made.
        reset_timeout: seconds for a reset.
        step_timeout: seconds for a step.
        recycle_episodes: a process is replaced after so many; None never.
        recycle_megabytes: a process is replaced when it holds more, with its children: after an episode, or
            in the middle of one when it holds half as much again; None never.
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
    """Actors that `rollout.backend=ray` plays through; each has the processes of `rollout.workers`.

    Args:
        address: of a cluster, "host:port", or "auto" for the one that this machine is part of; None starts
            Ray on this machine for as long as it is needed. `engine.actors` and the learner's `launcher: ray`
            are on the same one.
        actors: how many; None for one on each machine.
        cpus: that Ray sets aside for each actor and its processes.
        max_restarts: lost actors that are replaced, in all; then those that are left go on alone.
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
    """How episodes are collected.

    Args:
        backend: on whose machines environments run: `local` is this one, `ray` those of a cluster.
        placement: where an environment lives. `inline` is this process: the only one that repeats bit for
            bit, and the only one that a hanging or crashing environment takes down. `thread` is for
            environments that declare `thread_safe` and mostly wait. `process` is supervised: see
            `agentrl.rollout.placement` for what each survives. `auto` measures
            a few steps and decides; a run's config.yaml holds what it decided. With the backend `ray` it is
            always `process`.
        workers: of the placement `process`; its timeouts hold for `thread` as well.
        ray: of the backend `ray`.
        groups_per_step: tasks played in one training step.
        group_size: episodes of each task, whose returns are compared.
        max_active: episodes in flight at once.
        max_turns: limit on turns beside the environment's own, also of the play that a tokenizer is fitted on
            and of demonstrations; None leaves it to the environment, up to 10,000 (for these two 1,000).
        temperature: of the policy's replies while training.
        constrained: choose among the admissible commands by a token trie, after free thoughts with
            `policy.reply=think_action`; False generates freely and parses.
        max_attempts: plays of an episode that an environment or worker failed in; a task with as many
            failures in a row is not tried any more.
        max_aborted_share: the run stops when a larger share of a step's episodes was aborted.
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
        elsewhere = {
            "rollout.workers.interpreter is set": self.workers.interpreter is not None,
            "rollout.backend is ray": self.backend == "ray",
        }
        for why in (why for why, holds in elsewhere.items() if holds):
            if self.placement in ("inline", "thread"):
                raise ConfigError(
                    f"{why}, but rollout.placement={self.placement} plays in this process; "
                    "wanted process or auto"
                )
