import math
from dataclasses import replace

import pytest
import torch

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.credit import compute_advantages
from agentrl.algorithms.hooks import Bounds, Context, MiniBatch, Outputs, Term, requires
from agentrl.data import Episode, Group, StopReason, Turn
from agentrl.data.batch import collate
from agentrl.learn.objective import build_objective

CONTEXT = Context(step=3, total_steps=10)
ALL = torch.tensor([0, 1])


def episode(reward: float, replies: int) -> Episode:
    turn = Turn("o", "a", prompt_ids=(1, 1), action_ids=(2,) * replies, reward=reward, new_sequence=True)
    return Episode("e", "env", "t", 0, (turn,), StopReason.TERMINATED)


def mini_batch(algorithm: Algorithm, old: float = 0.0) -> MiniBatch:
    """Rows of 2 decisions with return 1 and of 1 decision with return 0, after two prompt tokens each."""
    batch = collate([Group("t", (episode(1.0, 2), episode(0.0, 1)))])
    batch = replace(batch, old_logprobs=torch.full_like(batch.logprobs, old))
    return MiniBatch(batch, compute_advantages(algorithm, batch, CONTEXT))


def outputs(values: float | list[list[float]], entropies: float = 0.0) -> Outputs:
    logprobs = torch.tensor(values) if isinstance(values, list) else torch.full((2, 4), values)
    return Outputs(logprobs.requires_grad_(), torch.full((2, 4), entropies, requires_grad=True))


def centred(batch, context):
    return functional.broadcast_to_tokens(torch.tensor([0.5, -0.5]), batch.trajectory, batch.action_mask)


PLAIN = Algorithm(advantage=centred)


def test_the_default_loss_and_its_gradient_by_hand():
    said = outputs([[0, 0, math.log(1.1), math.log(1.3)], [0, 0, math.log(0.5), 0]])
    loss, numbers = build_objective(mini_batch(PLAIN), PLAIN, CONTEXT).contribution(ALL, said)
    # Row 0: -.5 * 1.1 and -.5 * 1.2 (clipped), mean -.575. Row 1: .5 * max(.5, .8) = .4. Mean: -.0875
    assert loss.item() == pytest.approx(-0.0875)
    assert numbers["clip_ratio"].item() == pytest.approx(2 / 3)
    approx_kl = -(math.log(1.1) + math.log(1.3) + math.log(0.5)) / 3
    assert numbers["kl"].item() == pytest.approx(approx_kl)
    loss.backward()
    # -A * ratio / (2 sequences * 2 tokens) for the one token that is not held back
    wanted = torch.zeros(2, 4)
    wanted[0, 2] = -0.5 * 1.1 / 4
    torch.testing.assert_close(said.logprobs.grad, wanted)


def test_the_gradient_is_exactly_zero_where_nothing_was_sampled():
    said = outputs(-0.3, entropies=0.7)
    algorithm = replace(PLAIN, terms=(Term("entropy", lambda said, mini, context: said.entropies, -0.1),))
    mini = mini_batch(algorithm, old=-0.3)
    loss, _ = build_objective(mini, algorithm, CONTEXT).contribution(ALL, said)
    loss.backward()
    assert (said.logprobs.grad != 0).equal(mini.batch.action_mask)
    assert (said.entropies.grad != 0).equal(mini.batch.action_mask)


def test_nan_outside_the_decisions_changes_nothing():
    results = []
    for poison in (0.0, math.nan):
        mini = mini_batch(PLAIN)
        values = torch.where(mini.batch.action_mask, -0.3, poison)
        said = Outputs(values.requires_grad_(), values.detach().clone())
        mini = replace(mini, batch=replace(mini.batch, logprobs=values.detach()))
        loss, numbers = build_objective(mini, PLAIN, CONTEXT).contribution(ALL, said)
        loss.backward()
        results.append((loss.item(), numbers, torch.where(mini.batch.action_mask, said.logprobs.grad, 0.0)))
    assert results[0][0] == results[1][0]
    assert results[0][1] == results[1][1]
    assert torch.equal(results[0][2], results[1][2])


def first_decision(mini, context):
    return torch.arange(mini.batch.tokens.shape[1]).expand_as(mini.batch.tokens) == 2


def test_a_mask_changes_the_normaliser_and_a_weight_does_not():
    by_token = replace(PLAIN, aggregation=functional.token_weights)
    masked = replace(by_token, masks=(first_decision,))
    weighted = replace(by_token, weights=(lambda mini, context: first_decision(mini, context).float(),))
    losses = []
    for algorithm in (by_token, masked, weighted):
        objective = build_objective(mini_batch(algorithm), algorithm, CONTEXT)
        losses.append(objective.contribution(ALL, outputs(0.0))[0].item())
    # Token losses -.5, -.5 and .5: over 3 tokens; the first of each row over 2; the same two over 3.
    assert losses == pytest.approx([-0.5 / 3, 0.0, 0.0])
    longer = replace(masked, advantage=lambda batch, context: batch.action_mask.float())
    objective = build_objective(mini_batch(longer), longer, CONTEXT)
    assert objective.contribution(ALL, outputs(0.0))[0].item() == pytest.approx(-1.0)
    longer = replace(weighted, advantage=lambda batch, context: batch.action_mask.float())
    objective = build_objective(mini_batch(longer), longer, CONTEXT)
    assert objective.contribution(ALL, outputs(0.0))[0].item() == pytest.approx(-2 / 3)


def test_a_term_is_over_all_decisions_with_its_own_aggregation_and_schedule():
    term = Term(
        "entropy",
        lambda said, mini, context: said.entropies * (1 + mini.batch.trajectory[:, None]),
        lambda context: 0.1 * context.step,
        functional.token_weights,
    )
    algorithm = replace(PLAIN, masks=(first_decision,), terms=(term,))
    objective = build_objective(mini_batch(algorithm), algorithm, CONTEXT)
    loss, numbers = objective.contribution(ALL, outputs(0.0, entropies=0.6))
    # (.6 + .6 + 1.2) / 3 = .8, with coefficient .3; the surrogate is 0
    assert numbers["term/entropy"].item() == pytest.approx(0.8)
    assert loss.item() == pytest.approx(0.24)


def test_a_term_acts_where_it_is_told_and_counts_all_decisions():
    seen = []

    @requires("current")
    def above_one(mini, context):
        seen.append((mini.mask.sum().item(), mini.bounds.upper, torch.is_grad_enabled()))
        return mini.current.ratio > 1

    entropy = Term("entropy", lambda said, *_: said.entropies.log(), 2.0, functional.token_weights, above_one)
    algorithm = replace(PLAIN, masks=(first_decision,), terms=(entropy,))
    now = torch.tensor([[0.0, 0, 0.1, -0.1], [0, 0, 0.1, 0]])
    mini = replace(mini_batch(algorithm), current=Outputs(now, now))
    objective = build_objective(mini, algorithm, CONTEXT)
    # Where it does not act, its loss is minus infinity, and its gradient is not finite.
    entropies = torch.tensor([[1.0, 1, math.e, 0], [1, 1, math.e**2, 1]], requires_grad=True)
    loss, numbers = objective.contribution(ALL, replace(outputs(0.0), entropies=entropies))
    assert numbers["term/entropy"].item() == pytest.approx((1 + 2) / 3)  # of the 3 decisions
    assert loss.item() == pytest.approx(2.0)  # the surrogate is -.5 and .5
    assert seen == [(2, 1.2, False)]
    parts = [
        objective.contribution(ALL[[row]], Outputs(torch.zeros(1, width), entropies[[row], :width]))
        for row, width in ((0, 4), (1, 3))
    ]
    assert [part["term/entropy"].item() for _, part in parts] == pytest.approx([1 / 3, 2 / 3])
    assert len(seen) == 1


def test_a_term_that_acts_nowhere_is_no_signal():
    nowhere = lambda mini, context: torch.zeros_like(mini.batch.action_mask)  # noqa: E731
    everywhere = lambda mini, context: torch.ones_like(mini.batch.action_mask)  # noqa: E731
    for where, signal in ((nowhere, False), (everywhere, True)):
        term = Term("entropy", lambda said, *_: said.entropies, 1.0, where=where)
        algorithm = replace(PLAIN, masks=(nowhere,), terms=(term,))
        assert build_objective(mini_batch(algorithm), algorithm, CONTEXT).has_signal is signal


def test_contributions_of_parts_add_up_with_bounds_per_token():
    def narrow(mini, context):
        width = torch.linspace(0.01, 0.4, 4).expand(2, 4)
        return Bounds(1 - width, 1 + width, dual=3.0)

    algorithm = replace(PLAIN, clip=narrow)
    mini = mini_batch(algorithm, old=-0.2)
    objective = build_objective(mini, algorithm, CONTEXT)
    values = [[0.0, 0, 0.1, 0.3], [0, 0, -0.7, 0]]
    whole, numbers = objective.contribution(ALL, outputs(values))
    parts = []
    for row, width in ((0, 4), (1, 3)):
        said = Outputs(torch.tensor([values[row][:width]]), torch.zeros(1, width))
        parts.append(objective.contribution(torch.tensor([row]), said))
    assert sum(loss.item() for loss, _ in parts) == pytest.approx(whole.item())
    for name, value in numbers.items():
        assert sum(part[name].item() for _, part in parts) == pytest.approx(value.item())


def test_the_mask_the_weights_and_the_bounds_are_logged():
    def rising(mini, context):
        upper = torch.tensor([[math.inf, math.inf, 1.2, math.inf], [math.inf, math.inf, 1.5, math.inf]])
        return Bounds(0.0, upper)

    def by_row(mini, context):
        return torch.tensor([[0.5], [0.2]]).expand(mini.batch.tokens.shape)

    plain = build_objective(mini_batch(PLAIN), PLAIN, CONTEXT).metrics()
    assert plain == {"mask_share": 1, "weight_mean": 1, "bound_lower": 0.8, "bound_upper": 1.2}
    algorithm = replace(PLAIN, masks=(first_decision,), weights=(by_row, by_row), clip=rising)
    found = build_objective(mini_batch(algorithm), algorithm, CONTEXT).metrics()
    # Of 3 action tokens the first of each row: weights .25 and .04, upper bounds 1.2 and 1.5.
    assert found == pytest.approx(
        {"mask_share": 2 / 3, "weight_mean": 0.145, "bound_lower": 0.0, "bound_upper": 1.35}
    )
    unmasked = build_objective(mini_batch(algorithm), replace(algorithm, masks=()), CONTEXT).metrics()
    assert unmasked == pytest.approx({"mask_share": 1, "weight_mean": 0.54 / 3, "bound_lower": 0.0})
    unclipped = build_objective(mini_batch(PLAIN), replace(PLAIN, clip=None), CONTEXT).metrics()
    assert unclipped == {"mask_share": 1, "weight_mean": 1}
    nothing = replace(PLAIN, masks=(lambda mini, context: torch.zeros_like(mini.batch.action_mask),))
    found = build_objective(mini_batch(PLAIN), nothing, CONTEXT).metrics()
    assert found == {"mask_share": 0, "bound_lower": 0.8, "bound_upper": 1.2}


def test_a_hook_of_another_shape_is_refused_with_its_slot():
    two = lambda mini, context: torch.ones(2)  # noqa: E731
    nothing = Term("nothing", lambda said, *_: said.entropies, 1.0, where=two)
    for slot, algorithm in (
        ("weights", replace(PLAIN, weights=(two,))),
        ("terms/nothing.where", replace(PLAIN, terms=(nothing,))),
    ):
        with pytest.raises(ValueError, match=rf"algorithm.{slot} returned shape \(2,\), wanted \(2, 4\)"):
            build_objective(mini_batch(algorithm), algorithm, CONTEXT)
