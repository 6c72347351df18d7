"""An aborted episode moves no other episode's advantage by one bit, whatever the recipe."""

import random
from dataclasses import replace

import pytest
import torch

from agentrl.algorithms.credit import compute_advantages, prepare
from agentrl.algorithms.hooks import Context
from agentrl.algorithms.recipe import build_recipe, recipe_names
from agentrl.data import Episode, Group, StopReason, Turn
from agentrl.data.batch import Batch
from agentrl.data.trajectory import BranchPoint

ABORTED = [reason for reason in StopReason if reason.aborted]


def episode(draw: random.Random, name: str) -> Episode:
    turns = tuple(
        Turn(
            "seen",
            f"done {index}",
            prompt_ids=(1, 2, 3)[: draw.randint(1, 3)],
            action_ids=(4, 5),
            logprobs=(-draw.random(), -draw.random()),
            entropies=(draw.random(), draw.random()),
            reward=draw.choice((0.0, 0.1, 1 / 3, 1.0)),
            new_sequence=index == 0,
        )
        for index in range(draw.randint(1, 4))
    )
    # All but the first of a group left it at the start, so that recipes that explore from it have work too.
    first, parent = f"{name.split('.')[0]}.0", None
    if name != first:
        parent = BranchPoint(first, 0)
    return Episode(name, "env", "task", 0, turns, StopReason.TERMINATED, len(turns) > 1, parent=parent)


def scored(batch: Batch) -> Batch:
    """As a learner's scoring pass leaves it, that of a policy which has not changed."""
    return replace(
        batch,
        old_logprobs=batch.logprobs,
        old_entropies=batch.entropies,
        teacher_logprobs=2 * batch.logprobs,
        values=batch.logprobs.exp(),
        reward_logprobs=1.5 * batch.logprobs,
        reference_logprobs=1.2 * batch.logprobs,
        extras={
            "observation_kl": batch.entropies / 2,
            "logprob_at:0.8": 0.9 * batch.logprobs,
            "logprob_at:1.2": 1.1 * batch.logprobs,
        },
    )


@pytest.mark.parametrize("name", recipe_names())
@pytest.mark.parametrize("reason", ABORTED)
def test_an_aborted_episode_moves_no_advantage_by_one_bit(name: str, reason: StopReason) -> None:
    draw = random.Random(name)
    algorithm, compared = build_recipe(name).build(), 0
    for _ in range(20):
        healthy = [Group(f"t{i}", tuple(episode(draw, f"e{i}.{j}") for j in range(4))) for i in range(3)]
        broken = [
            replace(
                group,
                episodes=(
                    *group.episodes[:place],
                    replace(episode(draw, group.episodes[1].id + "x"), stop=reason, error="crash"),
                    *group.episodes[place:],
                ),
            )
            for place, group in enumerate(healthy)
        ]
        batches = [scored(prepare(algorithm, groups, Context())) for groups in (healthy, broken)]
        ids = [[episode.id for episode in batch.episodes] for batch in batches]
        assert ids[0] == ids[1]
        one, other = (compute_advantages(algorithm, batch, Context()) for batch in batches)
        assert one.numpy().tobytes() == other.numpy().tobytes()
        assert torch.equal(batches[0].tokens, batches[1].tokens)
        assert torch.equal(batches[0].returns, batches[1].returns)
        compared += int((one != 0).sum())
    # Losses of whole groups read the returns, and may have no advantage.
    assert compared > 100 or algorithm.group_terms
