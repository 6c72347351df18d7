"""A loss that couples the trajectories of a group, by the example of DRPO's discriminative objective."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fsdp_worker import GROUPED, listwise, measured
from torch import Tensor
from toy_policy import VOCABULARY, ToyPolicy, make_groups, toy_forward

from agentrl.algorithms.credit import prepare
from agentrl.algorithms.hooks import Context, GroupTerm, GroupValues, MiniBatch, Outputs
from agentrl.data import Episode, Group, StopReason, Turn
from agentrl.data.batch import Layout, collate
from agentrl.learn.group_losses import group_slopes
from agentrl.learn.learner import Learner
from agentrl.learn.packing import mini_batches
from agentrl.learn.settings import LearnerConfig

CONTEXT = Context(total_steps=10, vocabulary=VOCABULARY, tokenizer="toy")


def drpo(values: GroupValues, context: Context) -> Tensor:
    """The objective of arXiv:2510.04474, negated: lambda = .1, tau = 10, lengths over a limit of 10."""
    scores, good = values.logprobs / values.tokens, values.returns > 0
    if good.all() or not good.any():
        return 0 * scores.sum()
    weights = torch.where(good, (1 - values.tokens / 10) / 0.1, -torch.inf).softmax(0)
    bad = scores[~good]
    return 10 * ((bad / 10).logsumexp(0) - math.log(len(bad))) - (weights * scores).sum()


def episode(id: str, reward: float, tokens: int) -> Episode:
    turn = Turn("o", "a", prompt_ids=(1,), action_ids=(2,) * tokens, reward=reward, new_sequence=True)
    return Episode(id, "env", "t", 0, (turn,), StopReason.TERMINATED)


def test_drpo_has_the_published_objective_and_slopes() -> None:
    """The spec's example: s = [-.5, -.4 | -.6, -.7], length ratios [.2, .6] of the good ones."""
    made = Group("t", tuple(map(episode, "abcd", (1, 1, 0, 0), (2, 6, 1, 4))))
    batch = collate([made])
    means = torch.tensor([-0.5, -0.4, -0.6, -0.7])[:, None]
    current = Outputs(torch.where(batch.action_mask, means, 0.0), batch.entropies)
    found = group_slopes(
        GroupTerm("drpo", drpo), MiniBatch(batch, torch.zeros_like(batch.logprobs), current), CONTEXT
    )
    assert -found.value == pytest.approx(0.151674, abs=1e-6)
    lengths = torch.tensor([2, 6, 1, 4])  # the derivative by a mean is that by a token times the length
    assert (-found.slopes * lengths).tolist() == pytest.approx(
        [0.982014, 0.017986, -0.502500, -0.497500], abs=1e-6
    )


def learner_of(**settings: Any) -> Learner:
    config = {"warmup_steps": 0, "micro_batch_tokens": 60, "optimizer": "adamw", "clip_gradient": None}
    return Learner(ToyPolicy(), LearnerConfig(**config | settings), forward=toy_forward())


def weights(learner: Learner) -> Tensor:
    return torch.cat([value.detach().flatten() for value in learner.policy.parameters()])


def taught(learner: Learner, groups: list[Group], layout: Layout = "trajectory") -> dict[str, float]:
    numbers: dict[str, float] = {}
    for step in range(2):
        context = replace(CONTEXT, step=step)
        numbers = learner.update(prepare(GROUPED, groups, context, layout=layout), GROUPED, context)
    return numbers


def test_the_gradient_is_that_of_the_loss_over_all_trajectories_at_once() -> None:
    groups = make_groups(0)
    batch = prepare(GROUPED, groups, CONTEXT)
    learner = learner_of()
    logprobs = learner.forward.score(learner.policy, batch).logprobs
    sums = torch.zeros(len(batch.episodes), dtype=torch.float64).index_add(
        0, batch.trajectory, torch.where(batch.action_mask, logprobs, 0.0).sum(dim=1)
    )
    tokens = torch.zeros(len(batch.episodes), dtype=torch.int64).index_add(
        0, batch.trajectory, batch.action_mask.sum(dim=1)
    )
    losses = [
        listwise(GroupValues(sums[own], tokens[own], batch.returns[own], tuple(group.episodes)), CONTEXT)
        for number, group in enumerate(groups)
        for own in ((batch.groups == number).nonzero().squeeze(1),)
    ]
    wanted = torch.stack(losses).mean()
    gradients = torch.autograd.grad(wanted, list(learner.policy.parameters()))
    norm = torch.cat([value.flatten() for value in gradients]).norm()
    for budget in (1, 60, 10_000):
        numbers = learner_of(micro_batch_tokens=budget).update(batch, GROUPED, CONTEXT)
        assert numbers["learner/term/listwise"] == pytest.approx(wanted.item(), rel=1e-5)
        assert numbers["learner/grad_norm"] == pytest.approx(float(norm), rel=1e-6)


@pytest.mark.parametrize(
    ("layout", "settings"),
    [("turn", {}), ("trajectory", {"micro_batch_tokens": 1}), ("turn", {"micro_batch_tokens": 10_000})],
)
@pytest.mark.parametrize("count", [1, 3])
def test_layout_micro_batches_order_and_padding_do_not_matter(
    layout: Layout, settings: dict[str, Any], count: int
) -> None:
    groups = make_groups(0)
    aborted = replace(groups[0].episodes[0], id="x", turns=(), stop=StopReason.ENV_ERROR)
    turned = [replace(group, episodes=(aborted, *group.episodes[::-1])) for group in reversed(groups)]
    one, other = learner_of(mini_batches=count), learner_of(mini_batches=count, **settings)
    taught(one, groups)
    taught(other, turned, layout)
    assert not torch.equal(weights(one), weights(learner_of()))
    torch.testing.assert_close(weights(other), weights(one), rtol=0, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_with_a_group_term_a_mini_batch_holds_whole_groups(count: int) -> None:
    batch = prepare(GROUPED, make_groups(0, groups=3), CONTEXT)
    seen: list[int] = []

    def watching(values: GroupValues, context: Context) -> Tensor:
        seen.append(len(values.episodes))
        return values.logprobs.sum()

    algorithm = replace(GROUPED, group_terms=(GroupTerm("seen", watching),))
    numbers = learner_of(mini_batches=count).update(batch, algorithm, CONTEXT)
    assert seen == [4, 4, 4]
    assert numbers["learner/updates"] == min(count, 3)
    parts = [set(batch.group[rows].tolist()) for rows in mini_batches(batch, count, 0, 0, whole_groups=True)]
    assert sorted(group for part in parts for group in part) == [0, 1, 2]


def test_it_requires_the_current_policy_and_a_number() -> None:
    assert "current" in GROUPED.requires
    wrong = replace(GROUPED, group_terms=(GroupTerm("each", lambda values, context: values.logprobs),))
    with pytest.raises(ValueError, match=r"group_terms/each returned shape \(4,\), wanted a number"):
        learner_of().update(prepare(wrong, make_groups(0), CONTEXT), wrong, CONTEXT)


def test_two_ranks_learn_what_one_process_learns(tmp_path: Path) -> None:
    found = measured(tmp_path, "grouped")["grouped"]
    assert found["moved"] > 1e-3
    assert found["gradient"] < 1e-9
    assert found["weights"] < 1e-9
    assert found["unequal numbers"] == []
