"""STEER: the change of the entropy by a token, and its weight in the loss."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.hooks import Context, MiniBatch, Outputs
from agentrl.algorithms.methods.steer import STEER, entropy_changes
from agentrl.algorithms.recipe import build_recipe
from agentrl.algorithms.token_statistics import entropy_change
from agentrl.data import Episode, Group, StopReason, Turn
from agentrl.data.batch import collate
from agentrl.errors import ConfigError
from agentrl.learn.objective import build_objective

Build = Callable[..., Algorithm]
DOUBLE = torch.float64
PROBABILITIES = torch.tensor([0.9, 0.5, 0.05, 0.2], dtype=DOUBLE)
OLD = torch.tensor([0.88, 0.5, 0.06, 0.2], dtype=DOUBLE)
ENTROPIES = torch.tensor([0.3, 0.9, 2.0, 1.5], dtype=DOUBLE)
ADVANTAGES = torch.tensor([1.0, 1.0, 1.0, -0.5], dtype=DOUBLE)
TOKEN_MEAN = build_recipe("grpo", {"aggregation": "token"})
CHANGES = [0.019906, 0.103426, 0.788288, 0.043775]


def example(*lengths: int) -> MiniBatch:
    """The four tokens of the published example, in episodes of one turn with these many tokens."""
    episodes = [
        Episode(
            f"e{number}",
            "env",
            "t",
            0,
            (Turn("o", "a", prompt_ids=(1,), action_ids=(2,) * length, new_sequence=True),),
            StopReason.TERMINATED,
        )
        for number, length in enumerate(lengths)
    ]
    batch = collate([Group("t", tuple(episodes))])

    def at_tokens(values: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(batch.tokens.shape, dtype=DOUBLE)
        out[batch.action_mask] = values
        return out

    batch = replace(batch, old_logprobs=at_tokens(OLD.log()), logprobs=at_tokens(OLD.log()))
    current = Outputs(at_tokens(PROBABILITIES.log()), at_tokens(ENTROPIES))
    return MiniBatch(batch, at_tokens(ADVANTAGES), current)


def weights(algorithm: Algorithm, mini: MiniBatch) -> list[float]:
    """The weights in the loss, times the number of tokens, of a base that averages over tokens."""
    objective = build_objective(mini, algorithm, Context())
    return (4 * objective.factors[mini.batch.action_mask]).tolist()


@pytest.mark.vector("zoo:1.3")
def test_the_change_of_the_entropy_by_a_token() -> None:
    mini = example(4)
    assert mini.current is not None
    outputs = replace(mini.current, ratio=(mini.current.logprobs - mini.batch.old_logprobs).exp())
    found = entropy_changes(outputs, mini.advantages)[mini.batch.action_mask]
    assert found.tolist() == pytest.approx(CHANGES, abs=5e-7)


@pytest.mark.vector("zoo:1.3")
@pytest.mark.parametrize("lengths", [(4,), (1, 3), (2, 1, 1)])
@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, [1.2, 1.156522, 0.8, 1.187574]),
        ({"exponential": True}, [0.994381, 0.971147, 0.8, 0.987685]),
    ],
)
def test_the_weights_in_the_loss(
    build: Build, settings: dict[str, Any], wanted: list[float], lengths: Any
) -> None:
    algorithm = build("steer", base=TOKEN_MEAN, **settings)
    assert weights(algorithm, example(*lengths)) == pytest.approx(wanted, abs=5e-7)


def test_the_exact_change_is_that_of_a_step_along_the_gradient_of_the_token() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -3.0], dtype=DOUBLE, requires_grad=True)
    logprobs = logits.log_softmax(0)
    entropy = -(logprobs.exp() * logprobs).sum()
    (slope,) = torch.autograd.grad(entropy, logits, retain_graph=True)
    statistic = entropy_change(logits.detach()[None], torch.tensor([0]))
    for token in range(5):
        for advantage, old in ((1.5, 0.3), (-0.5, 0.1)):
            (step,) = torch.autograd.grad(
                advantage * (logprobs[token].exp() / old), logits, retain_graph=True
            )
            said = logprobs[token].detach()[None, None]
            outputs = Outputs(
                said,
                entropy.detach()[None, None],
                ratio=said.exp() / old,
                extras={"entropy_change": statistic[None]},
            )
            found = entropy_changes(outputs, torch.tensor([[advantage]], dtype=DOUBLE), exact=True)
            assert found.item() == pytest.approx(abs(float(slope @ step)), abs=1e-12)


def test_only_the_exact_change_needs_a_statistic_of_the_distribution() -> None:
    assert "entropy_change" in STEER(metric="exact").build().requires
    assert "current" in STEER(metric="exact").build().requires
    assert "entropy_change" not in STEER().build().requires


def test_equal_changes_have_the_weight_between_the_bounds_however_they_are_rounded() -> None:
    mini = example(4)
    assert mini.current is not None
    uneven = 0.5 + 1e-16 * torch.arange(mini.advantages.numel(), dtype=DOUBLE).view_as(mini.advantages)
    mini = replace(mini, advantages=uneven, current=Outputs(uneven.log(), uneven))
    mini = replace(mini, batch=replace(mini.batch, old_logprobs=uneven.log()))
    assert weights(STEER(base=TOKEN_MEAN, low=0.5, high=1.3).build(), mini) == pytest.approx(
        [0.9] * 4, abs=1e-12
    )


def test_tokens_outside_the_surrogate_neither_set_the_range_nor_get_a_weight() -> None:
    def all_but_third(mini: MiniBatch, context: Context) -> torch.Tensor:
        return torch.arange(mini.batch.tokens.shape[1]).expand_as(mini.batch.tokens) != 3

    mini = example(4)
    algorithm = STEER(base=TOKEN_MEAN).build()
    objective = build_objective(mini, replace(algorithm, masks=(all_but_third,)), Context())
    low, high = CHANGES[0], CHANGES[1]
    wanted = [1.2, 0.8, 0.0, 1.2 - 0.4 * (CHANGES[3] - low) / (high - low)]
    found = 3 * objective.factors[mini.batch.action_mask]
    assert found.tolist() == pytest.approx(wanted, abs=1e-5)


def test_a_highest_weight_below_the_lowest_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"high is 0\.5, wanted at least low, 0\.8"):
        build_recipe("steer", {"high": 0.5})
