"""What a replay brings back: optimiser steps of its own, or a part of the others."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from toy_policy import ToyPolicy, make_groups, toy_forward

from agentrl.algorithms.algorithm import Algorithm, ReplayBatch
from agentrl.algorithms.credit import compute_advantages
from agentrl.algorithms.hooks import Context, MiniBatch, requires
from agentrl.data.batch import collate
from agentrl.errors import NonFiniteError
from agentrl.learn.learner import Learner
from agentrl.learn.settings import LearnerConfig

CONTEXT = Context(step=0, total_steps=10)


class Memory:
    """Brings back what it was given, and remembers what it was shown."""

    name = "memory"

    def __init__(self, replayed: ReplayBatch | None) -> None:
        self.replayed = replayed
        self.kept: list[MiniBatch] = []

    def sample(self, context: Context) -> ReplayBatch | None:
        return self.replayed

    def update(self, rollout: MiniBatch, context: Context) -> None:
        self.kept.append(rollout)

    def metrics(self) -> Mapping[str, float]:
        return {"size": 7.0}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any], context: Context) -> None: ...


def learner_of(**settings) -> Learner:
    config = {"warmup_steps": 0, "micro_batch_tokens": 10_000, "optimizer": "adamw", "schedule": "constant"}
    return Learner(ToyPolicy(), LearnerConfig(**config | settings), forward=toy_forward())


def weights(learner: Learner) -> torch.Tensor:
    return torch.cat([value.detach().flatten() for value in learner.policy.parameters()])


def replay_batch_of(seed: int, **more: Any) -> ReplayBatch:
    batch = learner_of().score(collate(make_groups(seed)))
    return ReplayBatch(batch, compute_advantages(Algorithm(), batch, CONTEXT), lambda _: Algorithm(), **more)


NEW = collate(make_groups(0))


def test_a_burst_is_the_same_as_a_later_update_on_replayed_rows():
    old = replay_batch_of(5)
    one = learner_of()
    numbers = one.update(NEW, Algorithm(replay=Memory(old)), CONTEXT)
    two = learner_of()
    two.update(NEW, Algorithm(), CONTEXT)
    two.update(old.batch, Algorithm(), CONTEXT)
    assert torch.equal(weights(one), weights(two))
    assert numbers["learner/updates"] == 2
    assert numbers["algorithm/replay/size"] == 7
    assert numbers["algorithm/replay/grad_norm"] > 0


def test_the_coefficient_scales_the_gradient():
    norms = [
        learner_of().update(NEW, Algorithm(replay=Memory(replay_batch_of(5, coefficient=c))), CONTEXT)
        for c in (1.0, 0.25)
    ]
    assert norms[1]["algorithm/replay/grad_norm"] == pytest.approx(
        norms[0]["algorithm/replay/grad_norm"] / 4, rel=1e-9
    )


def test_mixed_in_the_gradients_add_up_and_no_step_is_taken_more():
    learner = learner_of(clip_gradient=None, mini_batches=1)
    mixed = learner.update(NEW, Algorithm(replay=Memory(replay_batch_of(0, mixed=True))), CONTEXT)
    alone = learner_of(clip_gradient=None).update(NEW, Algorithm(), CONTEXT)
    assert mixed["learner/updates"] == 1
    assert mixed["learner/grad_norm"] == pytest.approx(
        2 * alone["learner/grad_norm"], rel=1e-6
    )  # the same rows twice


@pytest.mark.parametrize("mini_batches", [1, 2, 3])
def test_mixed_rows_are_dealt_out_to_the_optimiser_steps(mini_batches):
    seen: list[int] = []

    def counting(mini, context):
        seen.append(len(mini.batch.lengths))
        return torch.ones_like(mini.advantages)

    old = replay_batch_of(5, mixed=True)
    old = replace(old, algorithm=lambda _: Algorithm(weights=(counting,)))
    learner_of(mini_batches=mini_batches).update(NEW, Algorithm(replay=Memory(old)), CONTEXT)
    assert len(seen) == mini_batches
    assert sum(seen) == len(old.batch.lengths)


def test_without_anything_to_replay_nothing_changes_and_everything_is_shown():
    memory = Memory(None)
    one, two = learner_of(mini_batches=2), learner_of(mini_batches=2)
    one.update(NEW, Algorithm(replay=memory), CONTEXT)
    two.update(NEW, Algorithm(), CONTEXT)
    assert torch.equal(weights(one), weights(two))
    assert memory.kept[0].batch.old_logprobs is not None
    assert memory.kept[0].advantages.any()


def test_what_the_policy_says_now_is_the_scoring_pass_in_the_first_step_and_read_anew_later():
    found = []

    @requires("current", "entropy")
    def watching(mini, context):
        found.append((mini.current.logprobs - mini.batch.old_logprobs).abs().max().item())
        return torch.ones_like(mini.advantages)

    learner_of(mini_batches=2).update(NEW, Algorithm(weights=(watching,)), CONTEXT)
    assert found[0] == 0
    assert found[1] > 1e-4


def test_steps_that_are_not_finite_are_skipped_and_stop_the_run_when_they_repeat():
    def infinite(batch, context):
        return torch.full_like(batch.logprobs, torch.inf)

    learner = learner_of(max_skipped_updates=3)
    before = weights(learner)
    bad = Algorithm(advantage=infinite)
    assert learner.update(NEW, bad, CONTEXT)["learner/skipped_updates"] == 1
    assert learner.update(NEW, bad, CONTEXT)["learner/updates"] == 0
    again = learner_of(max_skipped_updates=3)
    again.load_state_dict(learner.state_dict())
    with pytest.raises(NonFiniteError, match="3 optimiser steps in a row"):
        again.update(NEW, bad, CONTEXT)
    assert torch.equal(weights(learner), before)
    learner.update(NEW, Algorithm(), CONTEXT)  # a good one in between starts the count anew
    assert learner.update(NEW, bad, CONTEXT)["learner/skipped_updates"] == 1


def test_nothing_left_in_the_loss_is_no_step_and_moves_no_weight_by_momentum():
    def nothing(mini, context):
        return torch.zeros_like(mini.batch.action_mask)

    learner = learner_of()
    learner.update(NEW, Algorithm(), CONTEXT)  # gives the optimiser momentum
    before = weights(learner)
    numbers = learner.update(NEW, Algorithm(masks=(nothing,)), CONTEXT)
    assert torch.equal(weights(learner), before)
    assert (numbers["learner/updates"], numbers["learner/skipped_updates"]) == (0, 0)
    assert numbers["algorithm/mismatch/max"] > 0
    assert numbers["learner/entropy/token"] > 0.1


def test_nothing_mixed_in_is_lost_where_the_rollout_batch_has_few_parts():
    seen: list[int] = []

    def counting(mini, context):
        seen.append(len(mini.batch.lengths))
        return torch.ones_like(mini.advantages)

    old = replay_batch_of(5, mixed=True)
    old = replace(old, algorithm=lambda _: Algorithm(weights=(counting,)))
    few = collate(make_groups(0, groups=1, size=2))
    learner_of(mini_batches=4).update(few, Algorithm(replay=Memory(old)), CONTEXT)
    assert sum(seen) == len(old.batch.lengths)
