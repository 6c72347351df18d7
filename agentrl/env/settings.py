"""The `env` block of a run's configuration."""

from dataclasses import dataclass, field
from typing import Any


def quickstart_kwargs() -> dict[str, Any]:
    """Return the arguments of a small ALFWorld that a tiny policy learns in minutes on a CPU."""
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
    """The environment to train on.

    Args:
        id: The id of a registered environment; `agentrl envs` lists them.
        split: The split of tasks to train on.
        kwargs: The arguments of the environment; if `id` is changed, they start empty.
    """

    id: str = "agentrl/ALFWorld-v0"
    split: str = "train"
    kwargs: dict[str, Any] = field(default_factory=quickstart_kwargs)

    @property
    def label(self) -> str:
        """Return how messages call the environment."""
        return self.id

    @property
    def key(self) -> str:
        """Return the key of the environment in a configuration."""
        return "env"
