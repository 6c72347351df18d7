"""A value head on the policy's states: what it says, what it learns, what is kept of it."""

import math
from dataclasses import replace

import pytest
import torch
from toy_policy import WIDTH, ToyPolicy, hidden_states, make_groups, toy_forward

from agentrl.algorithms.algorithm import Algorithm, check_requirements
from agentrl.algorithms.hooks import Context, Term, require_tensor, requires
from agentrl.algorithms.methods.ppo import PPO
from agentrl.data import StopReason
from agentrl.data.batch import Batch, collate
from agentrl.errors import CheckpointError, ConfigError, RequirementError
from agentrl.learn.learner import Learner
from agentrl.learn.settings import LearnerConfig

CONTEXT = Context(step=0, total_steps=10)


@requires("values")
def ones(batch: Batch, context: Context) -> torch.Tensor:
    return torch.ones_like(batch.logprobs)


@requires("values:grad")
def squared_error(outputs, mini, context):
    return (require_tensor(outputs.values, "values") - require_tensor(mini.batch.targets, "targets")).square()


CRITIC = Algorithm(
    advantage=lambda batch, context: torch.zeros_like(batch.logprobs),
    targets=ones,
    terms=(Term("value", squared_error, 1.0),),
)


def learner_of(**settings) -> Learner:
    config = LearnerConfig(
        **{"warmup_steps": 0, "micro_batch_tokens": 10_000, "optimizer": "adamw"} | settings
    )
    return Learner(ToyPolicy(), config, critic=True, forward=toy_forward())


def test_values_belong_to_the_state_before_each_decision():
    learner = learner_of()
    torch.nn.init.normal_(learner.value_head.weight, generator=torch.Generator().manual_seed(1))
    batch = collate(make_groups(), layout="turn")
    values = learner.score(batch).values
    states = hidden_states(learner.policy, batch.tokens[0, : batch.lengths[0]], batch.lengths[:1])
    decisions = batch.action_mask[0].nonzero().squeeze(1)
    expected = (states @ learner.value_head.weight.T).squeeze(1)[decisions - 1]
    torch.testing.assert_close(values[0, decisions].double(), expected, rtol=0, atol=1e-6)
    assert not values[~batch.action_mask].any()


@pytest.mark.parametrize("layout", ["trajectory", "turn"])
def test_the_last_value_is_that_after_the_last_reply_of_an_episode_that_was_cut_short(layout):
    learner = learner_of()
    torch.nn.init.normal_(learner.value_head.weight, generator=torch.Generator().manual_seed(1))
    groups = make_groups(3)
    stops = [StopReason.TURN_LIMIT, StopReason.TERMINATED, StopReason.TRUNCATED, StopReason.CONTEXT_LIMIT]
    groups = [
        replace(g, episodes=tuple(replace(e, stop=s) for e, s in zip(g.episodes, stops, strict=True)))
        for g in groups
    ]
    batch = learner.score(collate(groups, layout=layout), {"last_values"})
    whole = collate(groups, layout="turn")
    for owner, episode in enumerate(batch.episodes):
        if episode.stop is StopReason.TERMINATED:
            assert batch.last_values[owner] == 0
            continue
        row = max(
            (whole.trajectory == owner).nonzero().squeeze(1).tolist(), key=lambda r: whole.turns[r].max()
        )
        tokens = whole.tokens[row, : whole.lengths[row]]
        states = hidden_states(learner.policy, tokens, whole.lengths[row : row + 1])
        assert batch.last_values[owner] == pytest.approx(
            (states[-1] @ learner.value_head.weight[0]).item(), abs=1e-6
        )
        assert batch.last_values[owner] != 0


def test_the_value_term_moves_the_head_and_the_policy_towards_the_targets():
    learner = learner_of(learning_rate=0.05)
    batch = collate(make_groups())
    first = learner.update(batch, CRITIC, CONTEXT)["learner/term/value"]
    assert first == pytest.approx(1.0)  # the head says 0, the targets are 1
    before = learner.policy.mix.detach().clone()
    for _ in range(30):
        last = learner.update(batch, CRITIC, CONTEXT)["learner/term/value"]
    assert last < 0.1
    assert not torch.equal(before, learner.policy.mix)


def test_without_a_value_head_an_algorithm_that_reads_values_is_refused():
    plain = Learner(ToyPolicy(), LearnerConfig(), forward=toy_forward())
    with pytest.raises(RequirementError, match="targets requires values; terms/value requires values:grad"):
        check_requirements(CRITIC, plain.provides)
    check_requirements(CRITIC, learner_of().provides)


def test_the_value_head_is_part_of_the_state():
    learner = learner_of(learning_rate=0.05)
    learner.update(collate(make_groups()), CRITIC, CONTEXT)
    other = learner_of()
    other.load_state_dict(learner.state_dict())
    assert learner.value_head.weight.shape == (1, WIDTH)
    assert torch.equal(other.value_head.weight, learner.value_head.weight)
    assert learner.value_head.weight.any()
    with pytest.raises(CheckpointError, match="has a value head"):
        Learner(ToyPolicy(), LearnerConfig(optimizer="adamw"), forward=toy_forward()).load_state_dict(
            learner.state_dict()
        )


def test_the_value_loss_does_not_depend_on_the_micro_batches():
    batch = collate(make_groups(), layout="turn")
    found = [
        learner_of(micro_batch_tokens=budget).update(batch, CRITIC, CONTEXT) for budget in (1, 37, 10_000)
    ]
    assert len({round(numbers["learner/grad_norm"], 9) for numbers in found}) == 1
    assert math.isfinite(found[0]["learner/grad_norm"])
    assert found[0]["learner/grad_norm"] > 0


def test_a_bootstrap_without_a_discount_is_refused():
    """With it, values of a policy that always meets the limit rose from 0 to 4.9 where returns were 0."""
    with pytest.raises(ConfigError, match="bootstrap_truncated is true with gamma_turn 1"):
        PPO(bootstrap_truncated=True)
    needed = PPO(bootstrap_truncated=True, gamma_turn=0.99).build().requires
    assert needed - PPO().build().requires == {"last_values"}
