"""SEED-GRPO: advantages shrink with the semantic entropy of their group."""

from collections.abc import Callable

import pytest
from token_examples import in_order, mini_batch, played, scored

from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.credit import compute_advantages
from agentrl.algorithms.hooks import Context
from agentrl.algorithms.named_features import with_features
from agentrl.algorithms.recipe import build_recipe

Build = Callable[..., Algorithm]


@pytest.mark.vector("zoo:1.18a")
@pytest.mark.parametrize("layout", ["trajectory", "turn"])
def test_the_advantages_of_a_group_with_three_answers(build: Build, layout: str) -> None:
    """The first episode has two tokens, whose mean log-probability counts."""
    groups = played([[1, 1], [1], [1], [1]], [1.0, 0.0, 1.0, 0.0], answers=["a", "a", "b", "c"])
    batch = scored(groups, logprobs=[-0.1, -0.3, -0.3, -0.5, -1.0], layout=layout)
    algorithm = build("seed_grpo")
    found = in_order(batch, compute_advantages(algorithm, batch, Context()))
    assert found == pytest.approx([0.486520, 0.486520, -0.486520, 0.486520, -0.486520], abs=5e-7)
    mini = mini_batch(with_features(batch, algorithm.requires), 0.0)
    logged = {name: value for each in algorithm.diagnostics for name, value in each(mini, Context()).items()}
    assert logged["seed_grpo/semantic_entropy"] == pytest.approx(0.921135, abs=5e-7)


def test_one_answer_leaves_the_advantages_as_they_are() -> None:
    groups = played([[1], [2]], [1.0, 0.0], answers=["a", "a"])
    batch = scored(groups, logprobs=[-0.2, -0.3, -0.4])
    found, plain = (
        compute_advantages(build_recipe(name).build(), batch, Context()) for name in ("seed_grpo", "dr_grpo")
    )
    assert in_order(batch, found) == pytest.approx(in_order(batch, plain), abs=1e-12)
