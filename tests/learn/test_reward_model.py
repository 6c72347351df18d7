"""A reward model beside the policy: its step, its place in a training step, and its state."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_policy import VOCABULARY, ToyPolicy, make_groups, toy_forward

from agentrl.algorithms.algorithm import Algorithm, keep_all
from agentrl.algorithms.hooks import Context, require_tensor, requires
from agentrl.algorithms.reward_model import RewardModel
from agentrl.data.batch import Batch, Layout, collate
from agentrl.errors import CheckpointError, ConfigError, NonFiniteError, RequirementError
from agentrl.learn.learner import Learner
from agentrl.learn.reward_model import RewardLearner
from agentrl.learn.settings import LearnerConfig, LoraConfig

CONTEXT = Context(total_steps=10, vocabulary=VOCABULARY)
RATE = 0.01


def squared_sums(logprobs: Tensor, batch: Batch, context: Context) -> Tensor:
    """A loss that couples all rows and turns of an episode."""
    sums = logprobs.new_zeros(len(batch.episodes)).index_add(0, batch.trajectory, logprobs.sum(dim=1))
    return (sums / 10).square().mean()


@requires("reward_model")
def by_model(batch: Batch, context: Context) -> Tensor:
    return require_tensor(batch.reward_logprobs, "reward_model").double()


def judged_by(
    loss: Callable[[Tensor, Batch, Context], Tensor] = squared_sums, rate: float = RATE, clip: float = 1e9
) -> Algorithm:
    return Algorithm(select=keep_all, reward_model=RewardModel(loss, rate, clip), advantage=by_model)


def learner_of(judge: ToyPolicy | None, **settings: Any) -> Learner:
    config = {"warmup_steps": 0, "micro_batch_tokens": 60, "mini_batches": 2} | settings
    return Learner(ToyPolicy(), LearnerConfig(**config), reward_model=judge, forward=toy_forward())


def flat(model: torch.nn.Module) -> Tensor:
    return torch.cat([value.detach().flatten().clone() for value in model.parameters()])


@pytest.mark.parametrize("clip", [1e9, 0.01])
@pytest.mark.parametrize("layout", ["trajectory", "turn"])
@pytest.mark.parametrize("budget", [1, 60, 10_000])
def test_it_takes_one_step_of_adamw_down_the_loss_of_the_whole_batch(
    budget: int, layout: Layout, clip: float
) -> None:
    batch, judge = collate(make_groups(), layout=layout), ToyPolicy(1)
    plain = copy.deepcopy(judge)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=RATE, weight_decay=0.0)
    loss = squared_sums(toy_forward().score(plain, batch).logprobs, batch, CONTEXT)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), clip)
    optimizer.step()
    learner = learner_of(judge, micro_batch_tokens=budget)
    logged = learner.update(batch, judged_by(clip=clip), CONTEXT)
    torch.testing.assert_close(flat(judge), flat(plain), rtol=0, atol=1e-9)
    assert logged["learner/reward_model/loss"] == pytest.approx(float(loss.detach()), rel=1e-6)
    assert logged["learner/reward_model/grad_norm"] == pytest.approx(float(norm), rel=1e-6)
    assert float((flat(judge) - flat(ToyPolicy(1))).abs().max()) > 0.5 * RATE


def test_the_advantages_see_the_model_after_its_step() -> None:
    batch, judge, seen = collate(make_groups()), ToyPolicy(1), []

    @requires("reward_model")
    def advantage(batch: Batch, context: Context) -> Tensor:
        seen.append(require_tensor(batch.reward_logprobs, "reward_model"))
        return by_model(batch, context)

    learner = learner_of(judge)
    learner.update(batch, replace(judged_by(), advantage=advantage), CONTEXT)
    expected = toy_forward().score(judge, batch).logprobs.detach()
    torch.testing.assert_close(seen[0].double(), expected, rtol=0, atol=1e-6)
    before = toy_forward().score(ToyPolicy(1), batch).logprobs.detach()
    assert float((expected - before).abs().max()) > 1e-3


def test_a_state_goes_on_bit_for_bit() -> None:
    batches = [collate(make_groups(seed)) for seed in range(4)]
    judge = ToyPolicy(1)
    learner, algorithm = learner_of(judge), judged_by()
    for batch in batches[:2]:
        learner.update(batch, algorithm, CONTEXT)
    state = copy.deepcopy(learner.state_dict())
    policy, own = copy.deepcopy(learner.policy.state_dict()), copy.deepcopy(judge.state_dict())
    for batch in batches[2:]:
        learner.update(batch, algorithm, CONTEXT)
    again = ToyPolicy(7)
    other = learner_of(again)
    other.load_state_dict(state)
    other.policy.load_state_dict(policy)
    again.load_state_dict(own)
    for batch in batches[2:]:
        other.update(batch, algorithm, CONTEXT)
    assert torch.equal(flat(again), flat(judge))
    assert torch.equal(flat(other.policy), flat(learner.policy))


def test_the_state_of_a_learner_without_one_is_refused_and_the_other_way_round() -> None:
    judged, plain = learner_of(ToyPolicy(1)), learner_of(None)
    with pytest.raises(CheckpointError, match="it has a reward model, wanted none"):
        plain.load_state_dict(judged.state_dict())
    with pytest.raises(CheckpointError, match="it has no reward model, wanted one"):
        judged.load_state_dict(plain.state_dict())
    old = {key: value for key, value in plain.state_dict().items() if key != "reward_model"}
    learner_of(None).load_state_dict(old)  # as older versions wrote it


def test_a_loss_that_is_not_finite_moves_nothing_and_a_step_that_ends_so_is_named() -> None:
    judge, batch = ToyPolicy(1), collate(make_groups())
    algorithm = judged_by(lambda logprobs, batch, context: logprobs.sum() * torch.inf)
    learner = learner_of(judge, max_skipped_updates=2)
    logged = learner.update(batch, algorithm, CONTEXT)
    assert logged["learner/reward_model/skipped"] == 1.0
    assert "learner/reward_model/loss" not in logged
    with pytest.raises(NonFiniteError, match="2 steps of the reward model in a row had a loss or gradient"):
        learner.update(batch, algorithm, CONTEXT)
    assert torch.equal(flat(judge), flat(ToyPolicy(1)))
    with pytest.raises(NonFiniteError, match=r"left nan or inf in reward_model.mix and 2 more at a learning"):
        learner_of(ToyPolicy(1)).update(batch, judged_by(rate=1e309), CONTEXT)


def test_weights_that_are_not_finite_are_named_with_the_others() -> None:
    judge = ToyPolicy(1)
    learner = learner_of(judge)
    assert learner.non_finite() == []
    with torch.no_grad():
        judge.scale[0] = torch.nan
    assert learner.non_finite() == ["reward_model.scale"]


def test_a_batch_without_a_decision_teaches_it_nothing() -> None:
    judge, batch = ToyPolicy(1), collate(make_groups())
    undecided = replace(batch, action_mask=torch.zeros_like(batch.action_mask))
    logged = learner_of(judge).update(undecided, judged_by(), CONTEXT)
    assert torch.equal(flat(judge), flat(ToyPolicy(1)))
    assert "learner/reward_model/loss" not in logged


def test_what_does_not_fit_is_refused() -> None:
    batch = collate(make_groups())
    with pytest.raises(RequirementError, match="has a reward model, and the learner was given none"):
        learner_of(None).update(batch, judged_by(), CONTEXT)
    with pytest.raises(ValueError, match=r"reward_model returned a loss of shape \(\d+, \d+\), wanted a num"):
        learner_of(ToyPolicy(1)).update(batch, judged_by(lambda logprobs, batch, context: logprobs), CONTEXT)
    with pytest.raises(ConfigError, match=r"trains all of its weights, wanted learner.lora=null"):
        RewardLearner(ToyPolicy(1), LearnerConfig(lora=LoraConfig()))
    assert "reward_model" in learner_of(ToyPolicy(1)).provides
    assert "reward_model" not in learner_of(None).provides
