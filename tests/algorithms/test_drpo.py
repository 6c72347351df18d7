"""DRPO: the margin of good over bad episodes, and the trust region."""

from collections.abc import Callable
from typing import Any

import pytest
from token_examples import in_order, loss_of, mini_batch, played, scored

from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.hooks import Context, MiniBatch
from agentrl.algorithms.recipe import build_recipe
from agentrl.learn.objective import build_objective

Build = Callable[..., Algorithm]
SETTINGS: dict[str, Any] = {"length": "tokens", "longest": 10}
SCORES, LENGTHS = [-0.5, -0.4, -0.6, -0.7], [2, 6, 1, 3]
SLOPES = [0.982014, 0.017986, -0.502500, -0.497500]


def example(moved: float = 0.0, layout: str = "trajectory", groups: list[int] | None = None) -> MiniBatch:
    """Episodes of two turns if they can be, whose tokens all have the mean log-probability."""
    each = [score for score, length in zip(SCORES, LENGTHS, strict=True) for _ in range(length)]
    turns = [[1, length - 1] if length > 1 else [1] for length in LENGTHS]
    old = [value + moved for value in each]
    batch = scored(played(turns, [1.0, 1.0, 0.0, 0.0], groups), logprobs=old, layout=layout)
    return mini_batch(batch, 0.0, logprobs=each)


@pytest.mark.vector("zoo:1.21a")
@pytest.mark.parametrize("layout", ["trajectory", "turn"])
def test_the_margin_and_its_slopes(build: Build, layout: str) -> None:
    mini = example(layout=layout)
    objective = build_objective(mini, build("drpo", **SETTINGS), Context())
    numbers, outputs = loss_of(objective)
    assert numbers["loss"] == pytest.approx(-0.151674, abs=5e-7)
    assert outputs.logprobs.grad is not None
    slopes = in_order(mini.batch, -outputs.logprobs.grad)
    wanted = [slope / length for slope, length in zip(SLOPES, LENGTHS, strict=True) for _ in range(length)]
    assert slopes == pytest.approx(wanted, abs=1e-6)


@pytest.mark.vector("zoo:1.21b")
def test_the_coefficient_of_the_divergence(build: Build) -> None:
    objective = build_objective(example(moved=3e-4), build("drpo", **SETTINGS), Context())
    numbers, _ = loss_of(objective)
    assert numbers["loss"] - numbers.get("term/drpo", 0.0) == pytest.approx(0.2 * 3e-4, abs=1e-9)
    inside = build_objective(example(moved=0.9e-4), build("drpo", **SETTINGS), Context())
    assert loss_of(inside)[0].get("term/drpo_kl") == 0.0


def test_a_group_of_one_kind_adds_nothing_and_counts() -> None:
    """The first group has one good and one bad episode, and the second none of them."""
    algorithm = build_recipe("drpo", SETTINGS).build()
    mini = example(groups=[0, 1, 0, 1])
    numbers, _ = loss_of(build_objective(mini, algorithm, Context()))
    assert numbers["term/drpo"] == pytest.approx(-((-0.5 + 0.6) + (-0.4 + 0.7)) / 2)
    mini = example(groups=[0, 0, 1, 1])
    numbers, outputs = loss_of(build_objective(mini, algorithm, Context()))
    assert numbers["loss"] == 0.0
    assert outputs.logprobs.grad is None or not bool(outputs.logprobs.grad.any())


def test_episodes_with_fewer_turns_count_more() -> None:
    algorithm = build_recipe("drpo", {"longest": 10, "sharpness": 0.1}).build()
    batch = scored(played([[1], [1, 1], [1]], [1.0, 1.0, 0.0]), logprobs=[-1.0] * 4)
    _, outputs = loss_of(build_objective(mini_batch(batch, 0.0), algorithm, Context()))
    assert outputs.logprobs.grad is not None
    first, second, third, bad = in_order(batch, -outputs.logprobs.grad)
    assert first == pytest.approx(0.731059, abs=5e-7)  # 1 / (1 + exp(-1))
    assert second + third == pytest.approx(1 - first)
    assert bad == pytest.approx(-1.0)
