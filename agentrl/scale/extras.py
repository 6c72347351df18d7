"""Checks for packages that only some runs need."""

import importlib.util

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
