"""The scoring pass under changed observations: aligned, exact, and the same however rows are batched."""

import random
from dataclasses import replace

import pytest
import torch
from test_method_invariance import padded
from toy_policy import ToyPolicy, hidden_states, make_groups, toy_forward
from toy_views import NOISE, TOKENS, toy_perturb

from agentrl.algorithms.hooks import Context
from agentrl.algorithms.observation_view import ObservationView
from agentrl.data import Group
from agentrl.data.batch import Batch, collate
from agentrl.errors import RequirementError
from agentrl.learn.learner import Learner
from agentrl.learn.settings import LearnerConfig

REQUIRED = {"observation_kl"}
both = pytest.mark.parametrize("view", [NOISE, TOKENS], ids=["noise", "tokens"])


def scored(batch: Batch, view: ObservationView = NOISE, budget: int = 10_000, **given: int) -> torch.Tensor:
    learner = Learner(
        ToyPolicy(),
        LearnerConfig(micro_batch_tokens=budget),
        forward=toy_forward(),
        perturb=toy_perturb,
        longest=given.pop("longest", None),
    )
    return learner.score(batch, REQUIRED, view, Context(**given)).extras["observation_kl"]


def by_place(batch: Batch, values: torch.Tensor) -> dict[tuple[int, int, int], float]:
    """The values by trajectory, turn and action token."""
    found: dict[tuple[int, int, int], float] = {}
    for row, owner in enumerate(batch.trajectory.tolist()):
        seen: dict[int, int] = {}
        for position in batch.action_mask[row].nonzero().flatten().tolist():
            turn = int(batch.turns[row, position])
            seen[turn] = seen.get(turn, -1) + 1
            found[owner, turn, seen[turn]] = float(values[row, position])
    return found


def test_it_is_the_divergence_of_the_rows_without_the_tokens() -> None:
    """Collating the changed prompts gives the rows whose logits are compared, at the same action tokens."""
    groups = make_groups()
    changed = [
        Group(
            group.task,
            tuple(
                replace(
                    episode,
                    turns=tuple(
                        replace(
                            turn,
                            prompt_ids=turn.prompt_ids[1:] if len(turn.prompt_ids) > 1 else turn.prompt_ids,
                        )
                        for turn in episode.turns
                    ),
                )
                for episode in group.episodes
            ),
        )
        for group in groups
    ]
    batch, other = collate(groups), collate(changed)
    policy, found = ToyPolicy(), scored(batch, TOKENS)
    allowed = (
        {}
        if batch.allowed is None
        else {
            (row, position): [id for id in ids if id >= 0]
            for row, position, ids in zip(
                batch.allowed.rows.tolist(),
                batch.allowed.positions.tolist(),
                batch.allowed.ids.tolist(),
                strict=True,
            )
        }
    )
    compared = 0
    for row in range(len(batch.tokens)):
        logits = [
            (
                hidden_states(policy, each.tokens[row, : each.lengths[row]], each.lengths[row : row + 1])
                @ policy.embedding.weight.T
            ).detach()
            for each in (batch, other)
        ]
        places = [each.action_mask[row].nonzero().flatten().tolist() for each in (batch, other)]
        for one, two in zip(*places, strict=True):
            own = allowed.get((row, one), slice(None))
            p, q = logits[0][one - 1][own].log_softmax(0), logits[1][two - 1][own].log_softmax(0)
            assert float(found[row, one]) == pytest.approx(float(((p.exp() - q.exp()) * (p - q)).sum() / 2))
            compared += 1
    assert compared == int(batch.action_mask.sum()) > 50
    assert not bool(found[~batch.action_mask].any())
    assert float(found.max()) > 0.01


@both
@pytest.mark.parametrize("budget", [1, 17, 60])
def test_micro_batches_change_nothing(view: ObservationView, budget: int) -> None:
    batch = collate(make_groups())
    torch.testing.assert_close(scored(batch, view, budget), scored(batch, view), rtol=0, atol=1e-12)


@both
def test_both_layouts_give_the_same(view: ObservationView) -> None:
    rows, turns = (collate(make_groups(), layout=layout) for layout in ("trajectory", "turn"))
    one, other = by_place(rows, scored(rows, view)), by_place(turns, scored(turns, view))
    assert one.keys() == other.keys()
    assert list(one.values()) == pytest.approx([other[key] for key in one], abs=1e-12)


@both
def test_order_and_padding_of_rows_change_nothing(view: ObservationView) -> None:
    batch = collate(make_groups(), layout="turn")
    order = random.Random(0).sample(range(len(batch.tokens)), len(batch.tokens))
    plain = by_place(batch, scored(batch, view))
    for other in (batch.select(order), padded(batch)):
        found = by_place(other, scored(other, view))
        assert [found[key] for key in plain] == pytest.approx(list(plain.values()), abs=1e-12)


def test_draws_follow_the_seed_alone() -> None:
    batch = collate(make_groups())
    assert torch.equal(scored(batch, seed=1), scored(batch, seed=1, step=5))
    assert not torch.equal(scored(batch, seed=1), scored(batch, seed=2))


def test_the_noise_of_amount_0_changes_nothing_and_more_changes_more() -> None:
    batch = collate(make_groups())
    means = [float(scored(batch, replace(NOISE, amount=amount)).mean()) for amount in (0.0, 0.1, 1.0)]
    assert means[0] < 1e-15
    assert means[0] < means[1] < means[2]


def test_a_share_of_the_episodes_is_scored_twice() -> None:
    batch = collate(make_groups(groups=40))
    found = scored(batch, replace(NOISE, share=0.25))
    whole = scored(batch)
    rows = found.abs().sum(dim=1) > 0
    assert 0.15 < float(rows.double().mean()) < 0.35
    torch.testing.assert_close(found[rows], whole[rows], rtol=0, atol=1e-12)
    assert not bool(scored(batch, replace(NOISE, share=0.0)).any())


def test_the_taken_token_alone() -> None:
    batch = collate(make_groups())
    full, taken = scored(batch), scored(batch, replace(NOISE, taken=True))
    assert bool((taken <= full + 1e-12).all())
    assert not torch.equal(taken, full)


def test_rows_that_would_not_fit_are_left_out() -> None:
    batch = collate(make_groups())
    limit = int(batch.lengths.median())
    found = scored(batch, longest=limit)
    long = batch.lengths > limit
    assert not bool(found[long].any())
    torch.testing.assert_close(found[~long], scored(batch)[~long], rtol=0, atol=1e-12)


def test_an_empty_batch() -> None:
    assert scored(collate([])).shape == (0, 0)


def test_a_learner_without_a_change_of_observations_refuses() -> None:
    learner = Learner(ToyPolicy(), LearnerConfig(), forward=toy_forward())
    assert "observation_kl" not in learner.provides
    with pytest.raises(RequirementError, match="no change of observations"):
        learner.score(collate(make_groups()), REQUIRED, NOISE)
    with pytest.raises(RequirementError, match=r"no Algorithm\.view"):
        learner.score(collate(make_groups()), REQUIRED)
