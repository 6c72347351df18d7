"""KL-Cov: a divergence penalty on the tokens of the highest covariance."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.credit import prepare
from agentrl.algorithms.hooks import Context, MiniBatch, Outputs
from agentrl.algorithms.methods.kl_cov import KLCov
from agentrl.algorithms.recipe import build_recipe
from agentrl.data import Episode, Group, StopReason, Turn
from agentrl.data.batch import collate
from agentrl.errors import ConfigError
from agentrl.learn.forward import Forward
from agentrl.learn.learner import Learner
from agentrl.learn.objective import Objective, build_objective
from agentrl.learn.settings import LearnerConfig

Build = Callable[..., Algorithm]
DOUBLE = torch.float64
PROBABILITIES = [0.9, 0.6, 0.3, 0.05, 0.8, 0.02]
OLD = [0.85, 0.6, 0.33, 0.06, 0.8, 0.03]
ADVANTAGES = [1.0, 1.0, 1.0, 1.0, -1.0, -1.0]
COVARIANCES = [0.924322, 0.654012, 0.191913, -1.002593, -1.691599, 3.226907]
BY_TOKEN = build_recipe("grpo", {"aggregation": "token"})


def example(lengths: Sequence[int], layout: Any = "trajectory") -> tuple[MiniBatch, Outputs]:
    """The six tokens of the published example in turns of these lengths, and what the policy says."""
    first = 0
    turns = []
    for number, length in enumerate(lengths):
        ids = tuple(range(first, first + length))
        turns.append(Turn("o", "a", prompt_ids=(9,), action_ids=ids, new_sequence=number == 0))
        first += length
    episode = Episode("e", "env", "t", 0, tuple(turns), StopReason.TERMINATED)
    batch = collate([Group("t", (episode,))], layout=layout)

    def at_tokens(values: Sequence[float]) -> Tensor:
        table = torch.tensor([*values, *[0.0] * 4], dtype=DOUBLE)
        return torch.where(batch.action_mask, table[batch.tokens], 0.0)

    new, old = (
        at_tokens(torch.tensor(values, dtype=DOUBLE).log().tolist()) for values in (PROBABILITIES, OLD)
    )
    current = Outputs(new, torch.zeros_like(new))
    mini = MiniBatch(replace(batch, old_logprobs=old), at_tokens(ADVANTAGES), current)
    return mini, Outputs(new.clone().requires_grad_(), torch.zeros_like(new))


def loss_of(objective: Objective, outputs: Outputs) -> Tensor:
    return objective.contribution(torch.arange(len(outputs.logprobs)), outputs)[0]


@pytest.mark.vector("zoo:1.8a")
@pytest.mark.parametrize("layout", ["trajectory", "turn"])
@pytest.mark.parametrize("lengths", [[6], [2, 3, 1]])
def test_the_token_of_the_highest_covariance_is_penalised(
    build: Build, lengths: list[int], layout: Any
) -> None:
    mini, outputs = example(lengths, layout)
    objective = build_objective(mini, build("kl_cov", base=BY_TOKEN), Context())
    penalised = {term.name: mini.batch.tokens[factors > 0].tolist() for term, factors in objective.terms}
    assert penalised == {"kl_cov": [5]}
    loss = loss_of(objective, outputs)
    assert loss.item() == pytest.approx(-0.288186, abs=5e-7)
    loss.backward()
    # -A ratio / 6, plus the sign of log pi - log pi_old for the one that is penalised.
    ratios = torch.tensor(PROBABILITIES, dtype=DOUBLE) / torch.tensor(OLD, dtype=DOUBLE)
    wanted = -torch.tensor(ADVANTAGES, dtype=DOUBLE) * ratios / 6
    wanted[5] += -1 / 6
    assert outputs.logprobs.grad is not None
    slopes = {
        int(token): float(slope)
        for token, slope in zip(
            mini.batch.tokens[mini.batch.action_mask],
            outputs.logprobs.grad[mini.batch.action_mask],
            strict=True,
        )
    }
    assert [slopes[token] for token in range(6)] == pytest.approx(wanted.tolist(), abs=1e-12)
    plain = build_objective(mini, KLCov(base=BY_TOKEN, coefficient=0.0).build(), Context())
    assert loss_of(plain, outputs).item() == pytest.approx(-0.355764, abs=5e-7)


@pytest.mark.vector("zoo:1.8a")
def test_the_covariances() -> None:
    mini, outputs = example([6])
    found = functional.covariance(mini.advantages, outputs.logprobs, mini.batch.action_mask)
    assert found[mini.batch.action_mask].tolist() == pytest.approx(COVARIANCES, abs=5e-7)


class Table(torch.nn.Module):
    """A policy whose logits depend on the token before alone; token 8 has what the example leaves."""

    def __init__(self) -> None:
        super().__init__()
        logits = torch.full((9, 9), -1e9, dtype=DOUBLE)
        for before, token in ((6, 0), (0, 1), (1, 2), (2, 3), (7, 4), (4, 5)):
            logits[before, token] = math.log(PROBABILITIES[token])
            logits[before, 8] = math.log(1 - PROBABILITIES[token])
        self.logits = torch.nn.Parameter(logits)


@pytest.mark.vector("zoo:1.8a")
@pytest.mark.parametrize("budget", [1, 10_000])
@pytest.mark.parametrize(("coefficient", "wanted"), [(1.0, -0.288186), (0.0, -0.355764)])
def test_the_loss_of_the_learner(coefficient: float, wanted: float, budget: int) -> None:
    episodes = []
    for prompt, ids, reward in ((6, (0, 1, 2, 3), 2.0), (7, (4, 5), 0.0)):  # advantages 1 and -1
        turn = Turn("o", "a", prompt_ids=(prompt,), action_ids=ids, reward=reward, new_sequence=True)
        episodes.append(Episode(f"e{prompt}", "env", "t", 0, (turn,), StopReason.TERMINATED))
    recipe = KLCov(base=build_recipe("dr_grpo", {"aggregation": "token"}), coefficient=coefficient)
    algorithm = recipe.build()
    batch = prepare(algorithm, [Group("t", tuple(episodes))], Context())
    old = torch.where(batch.action_mask, torch.tensor([*OLD, 1, 1, 1], dtype=DOUBLE)[batch.tokens].log(), 0.0)
    forward = Forward(
        lambda policy, tokens, lengths: policy.logits[tokens], lambda policy: torch.eye(9).double()
    )
    learner = Learner(Table(), LearnerConfig(micro_batch_tokens=budget), forward=forward)
    numbers = learner.update(replace(learner.score(batch), old_logprobs=old), algorithm, Context())
    assert numbers["learner/loss"] == pytest.approx(wanted, abs=5e-7)
    assert numbers["learner/policy_loss"] == pytest.approx(-0.355764, abs=5e-7)
    assert numbers["learner/term/kl_cov"] == pytest.approx(0.405465 / 6, abs=5e-7)


@pytest.mark.parametrize(
    ("share", "chosen"), [(0.002, [5]), (0.34, [0, 5]), (0.5, [0, 1, 5]), (1.0, [0, 1, 2, 3, 4, 5])]
)
def test_the_share_is_rounded_down_to_at_least_one_token(share: float, chosen: list[int]) -> None:
    mini, _ = example([6])
    objective = build_objective(mini, KLCov(base=BY_TOKEN, share=share).build(), Context())
    assert mini.batch.tokens[objective.terms[0][1] > 0].tolist() == chosen


def test_equal_covariances_go_by_trajectory_turn_and_token_however_they_are_rounded() -> None:
    mini, _ = example([2, 3, 1], "turn")
    assert mini.current is not None
    noise = 1e-14 * mini.batch.tokens.double() * mini.batch.action_mask
    mini = replace(mini, current=replace(mini.current, logprobs=noise))
    order = torch.tensor([2, 0, 1])
    for rows in (mini, mini.select(order)):
        algorithm = KLCov(base=BY_TOKEN, share=0.5).build()
        objective = build_objective(rows, algorithm, Context())
        assert sorted(rows.batch.tokens[objective.terms[0][1] > 0].tolist()) == [0, 1, 2]


def test_tokens_outside_the_surrogate_are_not_penalised() -> None:
    def all_but_last(mini: MiniBatch, context: Context) -> Tensor:
        return mini.batch.tokens != 5

    mini, _ = example([6])
    algorithm = replace(KLCov(base=BY_TOKEN).build(), masks=(all_but_last,))
    objective = build_objective(mini, algorithm, Context())
    assert mini.batch.tokens[objective.terms[0][1] > 0].tolist() == [0]


@pytest.mark.parametrize("base", ["behaviour_cloning", "aepo", "kl_cov"])
def test_a_base_without_a_plain_clip_is_refused(base: str) -> None:
    with pytest.raises(ConfigError, match=r"has no clipped ratio|nested in itself"):
        build_recipe("kl_cov", {"base": {"name": base}})
