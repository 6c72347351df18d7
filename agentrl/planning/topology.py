"""How a run's processes and actors are dealt out to machines."""

import os
from dataclasses import dataclass

from agentrl.errors import ConfigError
from agentrl.run.settings import RunConfig


@dataclass(frozen=True)
class Topology:
    """What of a run is on one of its machines.

    Args:
        config: of the run, its placement settled or given.
        ranks: processes that learn, on all machines.
        nodes: machines.
    """

    config: RunConfig
    ranks: int
    nodes: int

    @classmethod
    def of(cls, config: RunConfig, processes: int, nodes: int) -> "Topology":
        """Those of a configuration, which may itself say how many processes learn.

        Raises:
            ConfigError: when they cannot be dealt out evenly.
        """
        ranks = config.learner.processes or processes
        if min(ranks, nodes) < 1 or ranks % nodes:
            raise ConfigError(f"{ranks} processes on {nodes} nodes: wanted as many on each, and at least one")
        return cls(config, ranks, nodes)

    @property
    def ray(self) -> bool:
        """Whether any of it is on a Ray cluster."""
        config = self.config
        return (
            config.rollout.backend == "ray"
            or config.engine.actors is not None
            or config.learner.launcher == "ray"
        )

    @property
    def drivers(self) -> int:
        """Processes that only wait for those that learn."""
        return int(self.config.learner.launcher == "ray")

    @property
    def trainers(self) -> int:
        """Processes that learn."""
        return self.ranks // self.nodes

    @property
    def engine_actors(self) -> int:
        """Those of every process that learns, dealt out."""
        return self.trainers * (self.config.engine.actors or 0)

    @property
    def environment_actors(self) -> int:
        """Those of training and, beside them, those of the panel, of every process that learns, dealt out."""
        if self.config.rollout.backend == "local":
            return 0
        return 2 * self.trainers * self._actors_per_rank

    @property
    def workers(self) -> int:
        """Processes that environments are in; none where they are in those that learn."""
        if self.config.rollout.placement != "process":
            return 0
        return self._worker_owners * self._workers_per_owner

    @property
    def environments(self) -> int:
        """Environments at a time."""
        block = self.config.rollout
        if block.placement != "process":
            return 2 * self.trainers * block.max_active
        each = self._workers_per_owner
        held = block.workers.environments or -(-self._episodes_per_owner // each)
        return self._worker_owners * min(self._episodes_per_owner, each * held)

    @property
    def _actors_per_rank(self) -> int:
        return self.config.rollout.ray.actors or self.nodes

    @property
    def _worker_owners(self) -> int:
        """Who has workers: actors, or the processes that learn, for training and for the panel."""
        return self.environment_actors or 2 * self.trainers

    @property
    def _episodes_per_owner(self) -> int:
        """Episodes at a time of whoever has workers."""
        block = self.config.rollout
        return -(-block.max_active // (self._actors_per_rank if block.backend == "ray" else 1))

    @property
    def _workers_per_owner(self) -> int:
        count = self.config.rollout.workers.count or os.cpu_count() or 1
        return min(count, self._episodes_per_owner)
