"""Packages that only some runs need."""

import importlib.util

from agentrl.errors import missing_extra


def check_ray(who: str) -> None:
    """Refuse what needs Ray where it is absent.

    Args:
        who: asks for it, as in the configuration.
    """
    if importlib.util.find_spec("ray") is None:
        raise missing_extra(f"{who} needs Ray", "ray")
