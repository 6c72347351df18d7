"""The distribution of a run's processes and actors over machines."""

import os
from collections.abc import Iterable
from dataclasses import dataclass

from agentrl.errors import ConfigError
from agentrl.rollout.settings import RolloutConfig
from agentrl.run.settings import RunConfig


@dataclass(frozen=True)
class Topology:
    """Processes, actors and environments of a run on each of its machines.

    Args:
        config: The configuration of the run.
        ranks: The number of processes that learn, on all machines.
        nodes: The number of machines.
    """

    config: RunConfig
    ranks: int
    nodes: int

    @classmethod
    def of(cls, config: RunConfig, processes: int, nodes: int) -> "Topology":
        """Return the topology of a configuration.

        Args:
            config: The configuration of the run; its `learner.processes` takes precedence over `processes`.
            processes: The number of processes that learn, on all machines.
            nodes: The number of machines.

        Raises:
            ConfigError: If the processes cannot be divided evenly among the machines.
        """
        ranks = config.learner.processes or processes
        if min(ranks, nodes) < 1 or ranks % nodes:
            raise ConfigError(f"{ranks} processes on {nodes} nodes: wanted as many on each, and at least one")
        return cls(config, ranks, nodes)

    @property
    def ray(self) -> bool:
        """Return whether the run needs a Ray cluster."""
        config = self.config
        return (
            config.rollout.backend == "ray"
            or config.engine.actors is not None
            or config.learner.launcher == "ray"
        )

    @property
    def drivers(self) -> int:
        """Return the number of processes that only wait for those that learn."""
        return int(self.config.learner.launcher == "ray")

    @property
    def trainers(self) -> int:
        """Return the number of processes that learn, per machine."""
        return self.ranks // self.nodes

    @property
    def engine_actors(self) -> int:
        """Return the number of engine actors per machine."""
        return self.trainers * (self.config.engine.actors or 0)

    @property
    def environment_actors(self) -> int:
        """Return the number of environment actors per machine, for training and for a panel."""
        if self.config.rollout.backend == "local":
            return 0
        return (len(self.config.environments) + 1) * self.trainers * self._actors_per_rank

    @property
    def workers(self) -> int:
        """Return the number of environment workers per machine; 0 where the ranks hold the environments."""
        return _with_panel(
            0 if block.placement != "process" else self._worker_owners * self._workers_per_owner
            for block in self._rollouts
        )

    @property
    def environments(self) -> int:
        """Return the largest number of environments at a time, per machine."""
        return _with_panel(map(self._environments, self._rollouts))

    @property
    def _rollouts(self) -> list[RolloutConfig]:
        """Return the rollout settings of each environment."""
        return [alone.rollout for alone in self.config.each_alone()]

    def _environments(self, block: RolloutConfig) -> int:
        if block.placement != "process":
            return self.trainers * block.max_active
        workers = self._workers_per_owner
        held = block.workers.environments or -(-self._episodes_per_owner // workers)
        return self._worker_owners * min(self._episodes_per_owner, workers * held)

    @property
    def _actors_per_rank(self) -> int:
        return self.config.rollout.ray.actors or self.nodes

    @property
    def _worker_owners(self) -> int:
        """Return the number of owners of an environment's workers: actors or ranks."""
        actors = 0 if self.config.rollout.backend == "local" else self._actors_per_rank
        return self.trainers * max(1, actors)

    @property
    def _episodes_per_owner(self) -> int:
        block = self.config.rollout
        return -(-block.max_active // (self._actors_per_rank if block.backend == "ray" else 1))

    @property
    def _workers_per_owner(self) -> int:
        count = self.config.rollout.workers.count or os.cpu_count() or 1
        return min(count, self._episodes_per_owner)


def _with_panel(of_each: Iterable[int]) -> int:
    """Return what training needs of all environments, and a panel of one of them at a time."""
    counts = list(of_each)
    return sum(counts) + max(counts)
