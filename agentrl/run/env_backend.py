"""Environments on this machine or on a Ray cluster, as `rollout.backend` selects."""

from typing import Any

from agentrl.env.registry import Factory
from agentrl.rollout import placement
from agentrl.rollout.environments import EnvironmentPool, Environments, Make
from agentrl.rollout.settings import RolloutConfig
from agentrl.rollout.workers import ProcessEnvironments
from agentrl.run.settings import RunConfig
from agentrl.scale.extras import check_ray


def open_environments(make: Make, config: RolloutConfig) -> Environments:
    """Open environments as configured; see `placement.resolve_placement` for the placement `auto`.

    Args:
        make: Makes one environment.
        config: The rollout settings.

    Raises:
        MissingDependencyError: If the backend is `ray` and Ray is not installed.
        ConfigError: If the cluster cannot be reached or is too small.
    """
    if config.backend == "local":
        return placement.open_environments(make, config)
    check_ray("rollout.backend=ray")
    from agentrl.scale.ray_environments import RayEnvironments

    return RayEnvironments(make, config.max_active, config.workers, config.ray)


def open_one_environment(make: Make, config: RolloutConfig) -> Environments:
    """Open one environment to look into: in this process if the placement is `inline`, else in a worker.

    Args:
        make: Makes the environment.
        config: The rollout settings.
    """
    if config.backend == "local" and config.placement == "inline":
        return EnvironmentPool(make)
    return ProcessEnvironments(make, 1, config.workers)


def environment_factory(config: RunConfig, **arguments: Any) -> Factory:
    """Return the factory of the environments that a run trains in.

    Args:
        config: The configuration of the run.
        arguments: Arguments of the environment that replace those of the configuration.
    """
    factory = Factory(config.env.id, split=config.env.split, **{**config.env.kwargs, **arguments})
    factory.where = "env.kwargs."
    return factory
