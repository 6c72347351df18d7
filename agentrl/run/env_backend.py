"""Environments on this machine or on a Ray cluster, as `rollout.backend` selects."""

from agentrl.rollout import placement
from agentrl.rollout.environments import Environments, Make
from agentrl.rollout.settings import RolloutConfig
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
