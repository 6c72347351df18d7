"""Episodes of turns in named states, whose replies have tokens of given entropies."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.credit import compute_advantages, prepare
from agentrl.algorithms.hooks import Context
from agentrl.data import Episode, Group, StopReason, Turn
from agentrl.data.batch import Batch


def play(
    name: str,
    observations: Sequence[str],
    reward: float = 0.0,
    *,
    entropies: Sequence[float] = (),
    success: bool = False,
    final: str = "",
) -> Episode:
    """An episode with a turn of one token for each observation; the last one is rewarded."""
    turns = tuple(
        Turn(
            observation,
            "a",
            prompt_ids=(1,),
            action_ids=(2,),
            logprobs=(-0.5,),
            entropies=(entropies[index] if entropies else 0.5,),
            reward=reward if index == len(observations) - 1 else 0.0,
            new_sequence=index == 0,
        )
        for index, observation in enumerate(observations)
    )
    return Episode(
        name, "env", "t", 0, turns, StopReason.TERMINATED, success=success, final_observation=final
    )


def batch_of(algorithm: Algorithm, *groups: Sequence[Episode], layout: Any = "trajectory") -> Batch:
    """The batch as the scoring pass of the policy that acted leaves it, in double precision."""
    made = [Group(f"t{number}", tuple(episodes)) for number, episodes in enumerate(groups)]
    batch = prepare(algorithm, made, Context(), layout=layout, selected=True)
    batch = replace(batch, logprobs=batch.logprobs.double())
    return replace(batch, old_logprobs=batch.logprobs, old_entropies=batch.entropies.double())


def advantages(algorithm: Algorithm, batch: Batch) -> list[float]:
    """The advantage of every turn, trajectory by trajectory, in order."""
    found = compute_advantages(algorithm, batch, Context())
    owners = batch.trajectory[:, None].expand_as(batch.turns)
    mask = batch.action_mask
    order = sorted(zip(owners[mask].tolist(), batch.turns[mask].tolist(), found[mask].tolist(), strict=True))
    return [value for *_, value in order]
