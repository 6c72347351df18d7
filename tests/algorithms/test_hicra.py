"""HICRA: which tokens plan, and by how much their advantage rises."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from token_examples import in_order, mini_batch, played, scored

from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.credit import compute_advantages
from agentrl.algorithms.hooks import Context
from agentrl.algorithms.methods.hicra import HICRA, gram_entropy
from agentrl.data import Group

Build = Callable[..., Algorithm]


def thinking() -> list[Group]:
    """Two episodes, of three tokens with the two last as reasoning and of two with the last one."""
    (group,) = played([[3], [2]], [1.0, 0.0])
    choices = (tuple(range(9)), None, None), (tuple(range(9)), None)
    episodes = tuple(
        replace(each, turns=(replace(each.turns[0], allowed=allowed),))
        for each, allowed in zip(group.episodes, choices, strict=True)
    )
    return [replace(group, episodes=episodes)]


@pytest.mark.vector("zoo:1.16a")
@pytest.mark.parametrize("layout", ["trajectory", "turn"])
def test_planning_tokens_have_more_credit_and_less_blame(build: Build, layout: str) -> None:
    batch = scored(thinking(), logprobs=[-1.0] * 5, layout=layout)
    algorithm = build("hicra")
    found = in_order(batch, compute_advantages(algorithm, batch, Context()))
    assert found == pytest.approx([0.5, 0.6, 0.6, -0.5, -0.4], abs=1e-7)


@pytest.mark.vector("zoo:1.16b")
def test_the_entropy_of_the_grams(build: Build) -> None:
    texts = ["so wait"] * 5 + ["Verify it"] * 3 + ["go back"] * 2
    batch = scored(played([[1]] * 10, answers=texts), logprobs=[-1.0] * 10)
    logged = {
        name: value
        for each in build("hicra").diagnostics
        for name, value in each(mini_batch(batch, 0.0), Context()).items()
    }
    assert logged.get("hicra/gram_entropy", 0.0) == pytest.approx(1.029653, abs=5e-7)
    assert logged["hicra/planning_share"] == 1.0


def test_a_reply_with_a_gram_plans_and_one_without_does_not() -> None:
    batch = scored(played([[1, 1], [1]], answers=["Wait, look", "look"]), logprobs=[-1.0] * 3)
    assert in_order(batch, HICRA().planning_tokens(batch)) == [False, True, False]
    assert in_order(batch, HICRA(grams=("look",)).planning_tokens(batch)) == [False, True, True]
    assert gram_entropy([0, 0]) == 0.0
