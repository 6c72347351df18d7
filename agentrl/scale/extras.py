"""Checks for packages that only some runs need."""

import importlib.util
import sys

from agentrl.errors import missing_extra


def check_ray(who: str) -> None:
    """Refuse to go on where Ray is not installed.

    Args:
        who: The setting that needs Ray, as written in the configuration.

    Raises:
        MissingDependencyError: With the command that installs it.
    """
    if importlib.util.find_spec("ray") is None:
        raise missing_extra(f"{who} needs Ray", "ray")


def ray_is_initialized() -> bool:
    """Return whether this process is connected to Ray, without importing it."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())
