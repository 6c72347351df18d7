"""Environments on this machine or on a Ray cluster, as `rollout.backend` selects."""

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from agentrl.env.registry import Factory
from agentrl.env.settings import EnvConfig
from agentrl.rollout import placement
from agentrl.rollout.environments import EnvironmentPool, Environments, Make
from agentrl.rollout.mixture import MixedEnvironments
from agentrl.rollout.placement import resolve_placement
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
        config: The configuration of the run, with one environment.
        arguments: Arguments of the environment that replace those of the configuration.
    """
    env = config.only_env
    factory = Factory(env.id, split=env.split, **{**env.kwargs, **arguments})
    factory.where = f"{env.key}.kwargs."
    return factory


def open_training_environments(
    config: RunConfig, *, expert: bool = False, names: Collection[str] | None = None
) -> Environments:
    """Open the environments that a run trains in.

    Args:
        config: The configuration of the run.
        expert: Whether to ask them for their expert's actions.
        names: Those of several environments to open; None opens all.
    """
    asked = {"expert": True} if expert else {}
    members: dict[str, Environments] = {}
    with ExitStack() as undo:  # closes those that are open already if a later one fails
        for alone in config.each_alone():
            env = alone.only_env
            if names is None or env.label in names:
                members[env.label] = open_environments(environment_factory(alone, **asked), alone.rollout)
                undo.callback(members[env.label].close)
        undo.pop_all()
    return mixed(config, members)


def mixed(config: RunConfig, members: Mapping[str, Environments]) -> Environments:
    """Return the environments of a configuration in one: by the name of each, or the only one."""
    return next(iter(members.values())) if isinstance(config.env, EnvConfig) else MixedEnvironments(members)


def resolve_placements(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """Return the configuration with the placement of each environment, and lines that say why.

    Raises:
        AgentRLError: If an environment cannot be made.
    """
    resolved, notes = [], []
    for alone in config.each_alone():
        rollout, note = resolve_placement(
            environment_factory(alone), alone.rollout, alone.only_env.split, config.seed
        )
        resolved.append(rollout)
        if note is not None:
            notes.append(note if isinstance(config.env, EnvConfig) else f"{alone.only_env.label}: {note}")
    if isinstance(config.env, EnvConfig):
        return replace(config, rollout=resolved[0]), notes
    placed = tuple(
        replace(env, placement=rollout.placement, environments_per_worker=rollout.workers.environments)
        for env, rollout in zip(config.env, resolved, strict=True)
    )
    return replace(config, env=placed), notes
