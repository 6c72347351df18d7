"""Entropies that the rollout recorded, at the levels over which they are averaged."""

from collections import defaultdict
from collections.abc import Iterable

from agentrl.data.trajectory import Episode


def entropies_by_level(episodes: Iterable[Episode]) -> dict[str, list[float]]:
    """Return the entropies of every action `token`, `turn` and `trajectory`, in nats.

    Turns and trajectories without action tokens are left out.
    """
    levels: dict[str, list[float]] = {"token": [], "turn": [], "trajectory": []}
    for episode in episodes:
        levels["token"] += [value for turn in episode.turns for value in turn.action_entropies]
        levels["turn"] += [value for turn in episode.turns if (value := turn.entropy) is not None]
        levels["trajectory"] += [] if (value := episode.entropy) is None else [value]
    return levels


def entropies_by_turn(episodes: Iterable[Episode]) -> dict[int, list[float]]:
    """Return the entropies of the turns of each index, in nats; turns without action tokens are left out."""
    by_turn: dict[int, list[float]] = defaultdict(list)
    for episode in episodes:
        for index, turn in enumerate(episode.turns):
            if (value := turn.entropy) is not None:
                by_turn[index].append(value)
    return dict(sorted(by_turn.items()))
