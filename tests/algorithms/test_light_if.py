"""Light-IF: the weight of each token's entropy, and the tokens that are imitated."""

from collections.abc import Callable

import pytest
from token_examples import in_order, loss_of, mini_batch, played, scored

from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.hooks import Context, MiniBatch
from agentrl.algorithms.recipe import build_recipe
from agentrl.learn.objective import build_objective

Build = Callable[..., Algorithm]
LOGPROBS = [-0.10536052, -0.69314718, -2.30258509, -0.35667494]  # of .9, .5, .1 and .7
ENTROPIES = [0.2, 0.8, 1.5, 0.5]
COEFFICIENTS = [4.090909, 2.272727, 0.454545, 3.181818, 0.764192, 1.375546, 5, 0.982533]


def example(lengths: list[list[int]], advantages: list[float], layout: str = "trajectory") -> MiniBatch:
    rows = len(advantages) // 4
    batch = scored(played(lengths), logprobs=LOGPROBS * rows, layout=layout)
    return mini_batch(batch, advantages, entropies=ENTROPIES * rows)


@pytest.mark.vector("zoo:1.24a")
@pytest.mark.parametrize("layout", ["trajectory", "turn"])
@pytest.mark.parametrize("lengths", [[[4], [4]], [[1, 3], [2, 2]]])
def test_the_weights_of_the_entropies_and_the_term(
    build: Build, lengths: list[list[int]], layout: str
) -> None:
    mini = example(lengths, [1.0] * 4 + [-1.0] * 4, layout)
    objective = build_objective(mini, build("light_if", base=build_recipe("grpo")), Context())
    found = [8 * factor for _, factors in objective.terms for factor in in_order(mini.batch, factors)]
    assert found == pytest.approx(COEFFICIENTS, abs=5e-7)
    numbers, outputs = loss_of(objective)
    assert numbers["loss"] - numbers["policy_loss"] == pytest.approx(-1.769204, abs=5e-7)
    assert outputs.entropies.grad is not None
    assert in_order(mini.batch, -8 * outputs.entropies.grad) == pytest.approx(COEFFICIENTS, abs=5e-7)


@pytest.mark.vector("zoo:1.24b")
def test_a_trajectory_alone_has_no_covariance(build: Build) -> None:
    mini = example([[4]], [1.0] * 4)
    objective = build_objective(mini, build("light_if", base=build_recipe("grpo")), Context())
    found = [4 * factor for _, factors in objective.terms for factor in in_order(mini.batch, factors)]
    assert found == pytest.approx([2.5] * 4)


@pytest.mark.vector("zoo:1.24c")
@pytest.mark.parametrize("lengths", [[[5]], [[2], [1, 2]]])
def test_the_token_of_which_the_policy_is_surely_wrong_is_imitated(
    build: Build, lengths: list[list[int]]
) -> None:
    surprise, entropies = [0.1, 2, 0.5, 3, 1], [0.1, 1.9, 0.1, 1, 1.2]
    batch = scored(played(lengths), logprobs=[-value for value in surprise], entropies=entropies)
    objective = build_objective(mini_batch(batch, 1.0), build("entropy_sft"), Context())
    assert in_order(batch, objective.mask) == [False, False, False, True, False]
    assert loss_of(objective)[0]["loss"] == pytest.approx(3.0)


def test_the_released_code_has_no_such_term() -> None:
    released = build_recipe("light_if", {"preset": "released"}).build()
    assert released.terms == ()
    assert [term.name for term in build_recipe("light_if").build().terms] == ["tea_entropy"]
