"""The `env` block of a run's configuration."""

from dataclasses import dataclass, field
from typing import Any


def quickstart_kwargs() -> dict[str, Any]:
    """Small generated rooms, two task types, short text: what a tiny policy learns in minutes on a CPU."""
    return {
        "task_types": ["pick_and_place_simple", "look_at_obj_in_light"],
        "max_receptacles": 6,
        "object_types": 8,
        "text": "compact",
        "menu": "task",
        "max_steps": 16,
    }


@dataclass(frozen=True)
class EnvConfig:
    """Which environment is trained on.

    Args:
        id: a registered environment; `agentrl envs` lists them.
        split: the tasks to train on.
        kwargs: arguments of the environment; those of another `id` start empty.
    """

    id: str = "agentrl/ALFWorld-v0"
    split: str = "train"
    kwargs: dict[str, Any] = field(default_factory=quickstart_kwargs)
