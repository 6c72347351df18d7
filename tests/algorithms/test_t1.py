"""T1: leave-one-out advantages of reward and divergence, and the price of overflow."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from token_examples import in_order, played, scored

from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.credit import compute_advantages, prepare
from agentrl.algorithms.hooks import Context
from agentrl.algorithms.recipe import build_recipe
from agentrl.data import StopReason

Build = Callable[..., Algorithm]


@pytest.mark.vector("zoo:1.2a")
@pytest.mark.parametrize("layout", ["trajectory", "turn"])
def test_the_advantage_of_reward_and_divergence(build: Build, layout: str) -> None:
    """The first episode has two turns, over which its divergence is summed."""
    groups = played([[1, 1], [1], [1], [1]], [1.0, 0.0, 0.0, 1.0])
    batch = scored(groups, logprobs=[-1.0] * 5, reference=[-1.03, -0.99, -1.05, -1.01, -1.04], layout=layout)
    batch = replace(batch, logprobs=batch.logprobs.double())
    found = in_order(batch, compute_advantages(build("t1", kl_coefficient=2e-4), batch, Context()))
    assert found == pytest.approx([0.6666693] * 2 + [-0.666672, -0.6666613, 0.666664], abs=6e-8)
    plain = compute_advantages(build_recipe("t1").build(), batch, Context())
    assert in_order(batch, plain) == pytest.approx([0.666667] * 2 + [-0.666667] * 2 + [0.666667], abs=5e-7)


def test_an_episode_that_overflowed_costs_one() -> None:
    ((good, cut, left),) = (group.episodes for group in played([[1], [1, 1], [1]], [1.0, 1.0, 0.5]))
    cut = replace(cut, turns=(replace(cut.turns[0], finish="length"), cut.turns[1]))
    left = replace(left, stop=StopReason.CONTEXT_LIMIT)
    (group,) = played([[1]])
    algorithm = build_recipe("t1", {"base": {"name": "rloo", "drop_equal_groups": False}}).build()
    batch = prepare(algorithm, [replace(group, episodes=(good, cut, left))], Context())
    assert batch.returns.tolist() == [1.0, -1.0, -1.0]


def test_only_the_divergence_needs_a_reference() -> None:
    assert "reference" not in build_recipe("t1").build().requires
    assert "reference" in build_recipe("t1", {"preset": "paper"}).build().requires
