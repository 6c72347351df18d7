"""1-shot RLVR: the bonus of entropy, and the tasks whose accuracy varies most."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from token_examples import DOUBLE, mini_batch, played, scored

from agentrl.algorithms.algorithm import Algorithm, drop_equal_returns
from agentrl.algorithms.hooks import Context, Outputs
from agentrl.algorithms.methods.one_shot import SuccessRates
from agentrl.algorithms.recipe import build_recipe
from agentrl.data import Group
from agentrl.data.batch import collate
from agentrl.errors import CheckpointError
from agentrl.learn.objective import build_objective

Build = Callable[..., Algorithm]
RATES: dict[str, list[float]] = {
    "t0": [0, 0.25, 0.5, 0.75, 1],
    "t1": [1] * 5,
    "t2": [0.5, 0.5, 0.25, 0.5, 0.5],
}


def step_of(step: int) -> list[Group]:
    """Groups of four episodes of the three tasks, with the rates of success of this step."""
    groups = played([[1]] * 12, groups=[number // 4 for number in range(12)])
    return [
        replace(
            group,
            episodes=tuple(
                replace(episode, task=group.task, success=member < 4 * RATES[group.task][step])
                for member, episode in enumerate(group.episodes)
            ),
        )
        for group in groups
    ]


def learned(algorithm: Algorithm, steps: int) -> None:
    for step in range(steps):
        batch = collate(algorithm.select(step_of(step), Context(step)))
        for component in algorithm.find_stateful().values():
            component.update(mini_batch(batch, 0.0), Context(step))


@pytest.mark.vector("zoo:1.4a")
def test_the_tasks_whose_accuracy_varies_most_are_learned_from(build: Build) -> None:
    algorithm = build("one_shot", tasks=1, warmup=5, base=build_recipe("grpo", {"drop_equal_groups": False}))
    learned(algorithm, 5)
    assert [group.task for group in algorithm.select(step_of(1), Context(5))] == ["t0"]
    (rates,) = algorithm.find_stateful().values()
    assert isinstance(rates, SuccessRates)
    assert rates.ranking() == ["t0", "t2", "t1"]
    metrics = algorithm.diagnostics[-1](mini_batch(collate(step_of(0)), 0.0), Context(5))
    assert metrics["one_shot/largest_deviation"] == pytest.approx(0.353553, abs=5e-7)


@pytest.mark.vector("zoo:1.4b")
def test_the_gradient_of_the_bonus(build: Build) -> None:
    logits = torch.tensor([2.0, 1.0, 0.0], dtype=DOUBLE, requires_grad=True)
    logprobs = logits.log_softmax(0)
    entropy = -(logprobs.exp() * logprobs).sum()
    batch = scored(played([[1]]), logprobs=[-1.0])
    objective = build_objective(mini_batch(batch, 0.0), build("one_shot"), Context())
    zeros = torch.zeros(batch.tokens.shape, dtype=DOUBLE)
    said = Outputs(zeros.clone().requires_grad_(), torch.where(batch.action_mask, entropy, zeros))
    loss, _ = objective.contribution(torch.tensor([0]), said)
    (slope,) = torch.autograd.grad(loss, logits, allow_unused=True)
    assert slope is not None
    assert slope.tolist() == pytest.approx([0.000283, -0.000141, -0.000142], abs=6e-7)


def test_the_rates_are_in_the_checkpoint() -> None:
    settings: dict[str, Any] = {"tasks": 1, "warmup": 3}
    first, second = (build_recipe("one_shot", settings).build() for _ in range(2))
    learned(first, 3)
    (one,), (other,) = (each.find_stateful().values() for each in (first, second))
    other.load_state_dict(one.state_dict(), Context())
    assert other.state_dict() == one.state_dict()
    assert first.select(step_of(1), Context(3)) == second.select(step_of(1), Context(3))
    with pytest.raises(CheckpointError, match="success_rates"):
        other.load_state_dict({}, Context())
    assert build_recipe("one_shot").build().select is drop_equal_returns
