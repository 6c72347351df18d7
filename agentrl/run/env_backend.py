"""Environments on this machine or on a cluster's, as `rollout.backend` says."""

from typing import Any

from agentrl.env.registry import Factory
from agentrl.rollout import placement
from agentrl.rollout.environments import Environments, Make
from agentrl.rollout.settings import RolloutConfig
from agentrl.run.settings import RunConfig
from agentrl.scale.extras import check_ray


def open_environments(make: Make, config: RolloutConfig) -> Environments:
    """Environments as configured; see `placement.resolve_placement` for the placement `auto`.

    Raises:
        MissingDependencyError: for the backend `ray` without Ray.
        ConfigError: there is no such cluster, or it is smaller than what is asked.
    """
    if config.backend == "local":
        return placement.open_environments(make, config)
    check_ray("rollout.backend=ray")
    from agentrl.scale.ray_environments import RayEnvironments

    return RayEnvironments(make, config.max_active, config.workers, config.ray)


def environment_factory(config: RunConfig, **arguments: Any) -> Factory:
    """Return the factory of the environments that a run trains in.

    Args:
        config: The configuration of the run.
        arguments: Arguments of the environment that replace those of the configuration.
    """
    factory = Factory(config.env.id, split=config.env.split, **{**config.env.kwargs, **arguments})
    factory.where = "env.kwargs."
    return factory
