"""Answers of episodes: which episodes of a group end with the same one, and how much a group disagrees."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from agentrl.algorithms import functional
from agentrl.algorithms.named_features import feature
from agentrl.data.batch import Batch
from agentrl.data.trajectory import Episode

Answer = Literal["normalised", "exact", "state"]


@feature("answer_clusters")
def answer_clusters(batch: Batch, by: Answer = "normalised") -> Tensor:
    """Assign a number to the answer of each episode; [E] int64.

    Two episodes get the same number if they belong to one group and have the same answer. An episode without
    an answer is in a cluster of its own.

    Args:
        batch: The batch of the episodes.
        by: The answer is the text of the last turn's action, if it is valid: as it is (`exact`), or without
            case, a final full stop and differences of white space (`normalised`); or it is the observation
            after the last turn (`state`).
    """
    found = cluster_answers(batch.episodes, batch.groups.tolist(), by)
    return torch.tensor(found, dtype=torch.int64, device=batch.tokens.device)


def cluster_answers(episodes: Sequence[Episode], groups: Sequence[int], by: Answer) -> list[int]:
    """Return the number of each episode's answer, as in `answer_clusters`, from the group of each."""
    numbers: dict[object, int] = {}
    return [
        numbers.setdefault(
            (group, answer) if (answer := answer_of(episode, by)) else ("none", index), len(numbers)
        )
        for index, (group, episode) in enumerate(zip(groups, episodes, strict=True))
    ]


@feature("answer_entropy")
def answer_entropy(batch: Batch, by: Answer = "normalised") -> Tensor:
    """Return the entropy of the answers in an episode's group, by their frequency; [E] float64, nats."""
    return functional.cluster_entropy(answer_clusters(batch, by), batch.groups)


def answer_of(episode: Episode, by: Answer) -> str:
    """Return the answer of an episode, empty without one."""
    if not episode.turns:
        return ""
    if by == "state":
        return episode.final_observation
    last = episode.turns[-1]
    text = last.action.strip() if last.valid else ""
    return text if by == "exact" else " ".join(text.casefold().split()).removesuffix(".")
