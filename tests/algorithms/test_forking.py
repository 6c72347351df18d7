"""Forking tokens: which tokens stay in the policy loss, and by how many it is divided."""

from collections.abc import Callable

import pytest
from token_examples import in_order, loss_of, mini_batch, played, scored

from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.hooks import Context
from agentrl.algorithms.recipe import build_recipe
from agentrl.learn.objective import build_objective

Build = Callable[..., Algorithm]
ENTROPIES = [0.1, 0.01, 1.2, 0.02, 0.5, 0.03, 2, 0.05, 0.2, 0.9]
LOSSES = [0.1 * token for token in range(1, 11)]
TOKEN_MEAN = build_recipe("grpo", {"aggregation": "token"})


@pytest.mark.vector("zoo:1.19a")
@pytest.mark.parametrize("layout", ["trajectory", "turn"])
@pytest.mark.parametrize("lengths", [[[10]], [[3, 2], [5]], [[4], [1, 1, 4]]])
def test_the_loss_is_the_mean_over_the_fifth_of_highest_entropy(
    build: Build, lengths: list[list[int]], layout: str
) -> None:
    zeros = [0.0] * 10
    batch = scored(played(lengths), logprobs=zeros, entropies=ENTROPIES, layout=layout)
    mini = mini_batch(batch, [-loss for loss in LOSSES])
    objective = build_objective(mini, build("forking", base=TOKEN_MEAN), Context())
    kept = [token for token, one in enumerate(in_order(batch, objective.mask)) if one]
    assert kept == [2, 6]
    numbers, outputs = loss_of(objective)
    assert numbers["loss"] == pytest.approx((0.3 + 0.7) / 2, abs=1e-12)
    assert outputs.logprobs.grad is not None
    slopes = in_order(batch, outputs.logprobs.grad)
    assert slopes == pytest.approx([0, 0, 0.15, 0, 0, 0, 0.35, 0, 0, 0], abs=1e-12)
    assert objective.metrics()["mask_share"] == pytest.approx(0.2)


def test_ties_at_the_threshold_are_kept_however_they_are_rounded() -> None:
    batch = scored(played([[4]]), logprobs=[0.0] * 4, entropies=[0.5, 0.5 + 1e-13, 0.1, 0.5 - 1e-13])
    algorithm = build_recipe("forking", {"share": 0.25}).build()
    objective = build_objective(mini_batch(batch, 1.0), algorithm, Context())
    assert in_order(batch, objective.mask) == [True, True, False, True]
