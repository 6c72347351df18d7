"""The second rollout of a plan in the learner: scored at the temperature of the step, and logged apart."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from toy_policy import VOCABULARY, ToyPolicy, make_groups, sampled_at, toy_forward

from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.credit import prepare
from agentrl.algorithms.hooks import Context
from agentrl.algorithms.recipe import build_recipe
from agentrl.data import Group
from agentrl.data.batch import Batch
from agentrl.learn.learner import Learner
from agentrl.learn.settings import LearnerConfig

SIZES = {"episodes": 3, "tempered": 3}


def groups() -> list[Group]:
    """Groups of six, the last three of which were sampled at 1.2."""
    made = make_groups(size=6)
    hot = sampled_at(made, 1.2)
    return [
        replace(one, episodes=(*one.episodes[:3], *other.episodes[3:]))
        for one, other in zip(made, hot, strict=True)
    ]


def scored(algorithm: Algorithm, groups: Sequence[Group], temperature: float = 1.0) -> tuple[Batch, Learner]:
    learner = Learner(ToyPolicy(), LearnerConfig(warmup_steps=0), forward=toy_forward())
    batch = prepare(algorithm, groups, Context(), selected=True, temperature=temperature)
    return learner.score(batch, algorithm.requires), learner


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_second_rollout_is_scored_at_the_temperature_of_the_step(temperature: float) -> None:
    algorithm = build_recipe("arbitrary_entropy", SIZES).build()
    made = groups()
    batch, learner = scored(algorithm, made, temperature)
    as_sampled, _ = scored(build_recipe("grpo").build(), made)
    assert batch.old_logprobs is not None
    assert as_sampled.old_logprobs is not None
    members = batch.members
    assert members is not None
    second = (members >= 3)[batch.trajectory]
    assert torch.equal(batch.old_logprobs[~second], as_sampled.old_logprobs[~second])
    assert (batch.old_logprobs[second] - as_sampled.old_logprobs[second]).abs().max() > 0.01
    at = torch.ones(batch.tokens.shape, dtype=torch.float64)
    at[batch.action_mask & second[:, None]] = temperature
    anew = learner.score(replace(batch, temperatures=at)).old_logprobs
    torch.testing.assert_close(batch.old_logprobs, anew, rtol=0, atol=1e-12)


def test_it_logs_the_entropy_of_the_plain_tokens_and_what_it_replaced() -> None:
    algorithm = build_recipe("arbitrary_entropy", SIZES).build()
    batch, learner = scored(algorithm, groups())
    assert batch.old_entropies is not None
    plain = torch.tensor([episode.id[-1] in "012" for episode in batch.episodes])[batch.trajectory]
    wanted = batch.old_entropies[batch.action_mask & plain[:, None]].mean()
    numbers = learner.update(batch, algorithm, Context(vocabulary=VOCABULARY))
    assert numbers["algorithm/arbitrary_entropy/entropy"] == pytest.approx(float(wanted))
    assert numbers["algorithm/arbitrary_entropy/replaced"] == 4
    gap = (batch.old_logprobs - batch.logprobs)[batch.action_mask & plain[:, None]].abs()
    assert numbers["algorithm/mismatch/max"] == pytest.approx(float(gap.max()))
