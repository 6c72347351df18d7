import math

import pytest
import torch
from torch import tensor

from agentrl.algorithms import functional as f

NAN = math.nan
DOUBLE = torch.float64


def close(actual, expected, tolerance=1e-8):
    torch.testing.assert_close(actual, tensor(expected, dtype=actual.dtype), rtol=0, atol=tolerance)


# Advantages


def test_a_group_of_equal_returns_has_an_exactly_zero_advantage():
    returns = tensor([0.1] * 3 + [0.7] * 7, dtype=torch.float32)
    groups = tensor([4] * 3 + [2] * 7)
    assert f.group_relative_advantage(returns, groups).tolist() == [0.0] * 10


def test_a_group_of_one_has_zero_advantage_even_when_counted_several_times():
    single = f.group_relative_advantage(tensor([3.0, 1.0, 2.0]), tensor([0, 1, 1]), copies=tensor([4, 1, 1]))
    assert single[0] == 0.0
    assert single[1] < 0 < single[2]


def test_group_ids_need_be_neither_sorted_nor_dense():
    values = f.group_relative_advantage(
        tensor([1.0, 7.0, 0.0, 5.0]), tensor([9, -2, 9, -2]), divide_by_std=False
    )
    close(values, [0.5, 1.0, -0.5, -1.0])


def test_no_trajectories_have_no_advantages():
    assert f.group_relative_advantage(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).shape == (0,)


def test_wrong_group_shapes_are_refused():
    with pytest.raises(ValueError, match=r"groups has shape \(1,\), wanted that of returns, \(2,\)"):
        f.group_relative_advantage(tensor([1.0, 2.0]), tensor([0]))


@pytest.mark.parametrize("copies", [None, tensor([4, 1, 1])])
def test_only_what_is_counted_once_in_all_can_keep_its_raw_return(copies):
    returns, groups = tensor([3.0, 1.0, 2.0], dtype=DOUBLE), tensor([0, 1, 1])
    raw = f.group_relative_advantage(returns, groups, divide_by_std=False, copies=copies, singleton="raw")
    close(raw, [3.0 if copies is None else 0.0, -0.5, 0.5])


def test_branches_of_what_was_played_once_are_a_group_of_one():
    returns, groups = tensor([1.0, 0.0, 5.0, 1.0, 0.0], dtype=DOUBLE), tensor([0, 0, 0, 1, 1])
    shares = tensor([1 / 3] * 3 + [1.0] * 2, dtype=DOUBLE)
    centred = f.group_relative_advantage(returns, groups, divide_by_std=False, copies=shares)
    close(centred, [0.0, 0.0, 0.0, 0.5, -0.5])
    raw = f.group_relative_advantage(returns, groups, copies=shares, singleton="raw", eps=0.0)
    close(raw, [1.0, 0.0, 5.0, 0.5**0.5, -(0.5**0.5)])


def test_leaving_one_out_compares_with_the_mean_of_the_others():
    returns, groups = tensor([4.0, 1.0, 0.0, 7.0], dtype=DOUBLE), tensor([5, 5, 5, 2])
    close(f.leave_one_out_advantage(returns, groups), [3.5, -1.0, -2.5, 0.0])
    close(f.leave_one_out_advantage(returns, groups, singleton="raw"), [3.5, -1.0, -2.5, 7.0])
    equal = f.leave_one_out_advantage(tensor([0.1] * 3), tensor([0, 0, 0]))
    assert equal.tolist() == [0.0] * 3


def test_whitened_values_have_mean_zero_and_variance_one():
    mask = tensor([[True, True], [True, False]])
    # Deviations -1, 0, 1 of an unbiased variance of 1.
    close(f.whiten(tensor([[3.0, 4.0], [5.0, NAN]], dtype=DOUBLE), mask, eps=0.0), [[-1, 0], [1, 0]])


@pytest.mark.parametrize("values", [[[0.1, 0.1, 0.1]], [[0.7, NAN, NAN]]])
def test_equal_values_and_single_ones_are_whitened_to_zero(values):
    values = tensor(values, dtype=DOUBLE)  # in which three times .1 is not .3
    assert f.whiten(values, ~values.isnan()).tolist() == [[0.0] * 3]


def test_nothing_flows_back_across_a_restart():
    rewards, mask = tensor([[1.0, NAN, 2.0, 4.0]], dtype=DOUBLE), tensor([[True, False, True, True]])
    restart = tensor([[False, False, True, False]])
    # 2 stays 2, and reaches the decision before it past a token that does not count.
    close(f.discounted_returns(rewards, mask, gamma=0.5, restart=restart), [[2.0, 0, 2.0, 4.0]])
    close(f.discounted_returns(rewards, mask, gamma=0.5), [[3.0, 0, 4.0, 4.0]])


def test_the_value_after_a_row_that_was_cut_off_counts_as_the_next_turns():
    rewards, mask = torch.zeros(2, 2, dtype=DOUBLE), tensor([[True, True], [True, False]])
    values, turns = tensor([[1.0, 2.0], [3.0, NAN]], dtype=DOUBLE), tensor([[0, 0], [4, -1]])
    last = tensor([10.0, 0.0], dtype=DOUBLE)
    advantages, returns = f.gae(rewards, values, mask, turns, gamma_turn=0.5, last_values=last)
    # Row 0: return .5 * 10 at both; row 1 ended.
    close(returns, [[5.0, 5.0], [0.0, 0.0]])
    close(advantages, [[4.0, 3.0], [-3.0, 0.0]])


def test_decisions_far_apart_in_one_turn_are_not_discounted_as_turns():
    rewards, values = tensor([[0.0, NAN, 1.0]], dtype=DOUBLE), torch.zeros(1, 3, dtype=DOUBLE)
    mask, turns = tensor([[True, False, True]]), tensor([[2, 2, 2]])
    advantages, _ = f.gae(rewards, values, mask, turns, gamma_turn=0.0)
    close(advantages, [[1.0, 0, 1.0]])


@pytest.mark.parametrize("cache", [0, -1, 21])
def test_an_overlong_penalty_needs_room_to_grow(cache):
    with pytest.raises(ValueError, match=f"cache is {cache}, wanted above 0 and at most the limit, 20"):
        f.overlong_penalty(tensor([5]), limit=20, cache=cache)


def test_equal_entropies_scale_no_advantage():
    # The mean of three times .1 is not .1 in binary: a std of 0 must not become a quotient of two errors.
    advantages, mask = tensor([[1.0, -2.0, 3.0]], dtype=DOUBLE), torch.ones(1, 3, dtype=torch.bool)
    scaled = f.entropy_scaled_advantage(advantages, torch.full_like(advantages, 0.1), mask, scale=0.2)
    assert scaled.equal(advantages)


def test_the_limits_keep_a_certain_token_from_changing_sides():
    # 29 entropies of 1 and one of 0: mean 29/30, std sqrt(1/30), so that 0 is -5.295 deviations away.
    entropies = torch.ones(1, 30, dtype=DOUBLE)
    entropies[0, 0] = 0.0
    arguments = torch.ones(1, 30, dtype=DOUBLE), entropies, torch.ones(1, 30, dtype=torch.bool)
    assert f.entropy_scaled_advantage(*arguments, scale=0.2)[0, 0] == 0.0
    free = f.entropy_scaled_advantage(*arguments, scale=0.2, limits=None)[0, 0]
    assert free.item() == pytest.approx(1 - 0.2 * (29 / 30) * math.sqrt(30))


def test_the_next_step_is_the_next_turn_with_a_decision():
    present = tensor([[True, False, True, False]])
    entropies = tensor([[0.0, NAN, 1.0, NAN]], dtype=DOUBLE)
    advantages = torch.zeros(1, 4, dtype=DOUBLE)
    out = f.entropy_modulated_advantage(advantages, entropies, present, k=1.0, k_future=2.0, zeta=3.0)
    # The bonus of step 0 is 3 exp(-2), that of step 2 nothing; centred.
    close(out, [[1.5 * math.exp(-2), 0, -1.5 * math.exp(-2), 0]], 1e-7)


def test_a_step_that_branches_share_is_counted_once_in_the_means():
    # Two branches share their first step; dropping one of the twins leaves the means as they are.
    entropies = tensor([[0.2, 0.9], [0.2, 0.4]], dtype=DOUBLE)
    present, share = torch.ones(2, 2, dtype=torch.bool), tensor([[0.5, 1.0], [0.5, 1.0]], dtype=DOUBLE)
    scale, _ = f.entropy_modulation(entropies, present, k=1.0, k_future=1.0, weights=share)
    once = tensor([[True, True], [False, True]])
    wanted, _ = f.entropy_modulation(entropies, once, k=1.0, k_future=1.0)
    close(scale, [wanted[0].tolist(), [wanted[0, 0].item(), wanted[1, 1].item()]], 1e-12)
    out = f.entropy_modulated_advantage(
        entropies, entropies, present, k=1.0, k_future=1.0, zeta=0.1, weights=share
    )
    assert (share * out).sum().abs() < 1e-12


def test_means_of_steps_are_over_decisions_whichever_rows_they_are_in():
    turns = tensor([[1, 1, 1], [0, -1, 3]])
    mask = tensor([[True, False, True], [True, False, False]])
    values = tensor([[1.0, NAN, 2.0], [5.0, NAN, NAN]], dtype=DOUBLE)
    means, present = f.turn_means(values, mask, turns, tensor([1, 1]), episodes=2)
    close(means, [[0, 0, 0, 0], [5.0, 1.5, 0, 0]])
    assert present.tolist() == [[False] * 4, [True, True, False, False]]
    close(f.broadcast_turns_to_tokens(means, turns, tensor([1, 1]), mask), [[1.5, 0, 1.5], [5.0, 0, 0]])


def test_unrolled_decisions_are_in_the_order_in_which_they_were_made():
    # Trajectory 1 has turns 0 and 1 in rows 2 and 0; trajectory 0 has no row; 2 has one decision.
    turns = tensor([[-1, 1, 1], [-1, 0, 0], [0, -1, 2]])
    mask = tensor([[False, True, True], [False, False, True], [True, False, True]])
    index, valid = f.unroll(mask, turns, tensor([1, 2, 1]), episodes=3)
    assert valid.sum(dim=1).tolist() == [0, 4, 1]
    assert index[valid].tolist() == [6, 1, 2, 8, 5]


def test_spread_gives_each_decision_the_value_of_its_trajectory():
    sampled = tensor([[False, True], [True, True], [False, False]])
    close(
        f.broadcast_to_tokens(tensor([2.0, 3.0]), tensor([1, 0, 0]), sampled), [[0, 3.0], [2.0, 2.0], [0, 0]]
    )


# Policy loss

RATIO = tensor([[0.5, 0.9, 1.1, 1.5], [0.5, 0.9, 1.5, 4.0]], dtype=DOUBLE)
SIGN = tensor([[1.0] * 4, [-1.0] * 4], dtype=DOUBLE)


def test_without_the_dual_clip_a_large_ratio_is_penalised_in_full():
    assert f.clipped_surrogate(RATIO, SIGN, 0.8, 1.2)[1, 3] == 4.0


def test_bounds_may_differ_from_token_to_token():
    upper = tensor([[1.2, 1.2, 1.05, 2.0], [1.2] * 4], dtype=DOUBLE)
    loss = f.clipped_surrogate(RATIO, SIGN, torch.zeros_like(RATIO), upper)
    close(loss[0], [-0.5, -0.9, -1.05, -1.5])


def test_an_absurd_log_ratio_stays_finite():
    ratio = f.probability_ratio(tensor([1000.0, -1000.0]), tensor([0.0, 0.0]))
    close(ratio.log(), [20.0, -20.0], 1e-4)


def test_a_turn_has_one_ratio_and_each_token_its_own_gradient():
    # One trajectory: turns of gaps (.1, .3) and (-.2), a forced token between them.
    mask, turns = tensor([[True, True, False, True]]), tensor([[0, 0, 0, 1]])
    logprobs = tensor([[0.1, 0.3, NAN, -0.2]], dtype=DOUBLE, requires_grad=True)
    ratio = f.sequence_ratio(logprobs, torch.zeros(1, 4, dtype=DOUBLE), mask, turns, tensor([0]))
    close(ratio.detach(), [[math.exp(0.2), math.exp(0.2), 1.0, math.exp(-0.2)]])
    ratio[0, 0].backward()
    close(logprobs.grad, [[math.exp(0.2), 0, 0, 0]])


def test_an_absurd_ratio_of_a_turn_stays_finite():
    mask, turns = tensor([[True]]), tensor([[0]])
    ratio = f.sequence_ratio(tensor([[1000.0]]), tensor([[0.0]]), mask, turns, tensor([0]))
    close(ratio.log(), [[20.0]], 1e-4)


def test_the_worse_of_both_errors_is_the_loss_of_a_value():
    values = tensor([[0.0, 2.0]], dtype=DOUBLE, requires_grad=True)
    loss = f.value_loss(values, torch.ones(1, 2, dtype=DOUBLE), tensor([[1.0, 1.0]], dtype=DOUBLE), 0.5)
    close(loss.detach(), [[0.5, 0.5]])
    # Held at .5 the error would shrink: its own counts, and has a gradient back to the old value.
    loss.sum().backward()
    close(values.grad, [[-1.0, 1.0]])


def test_a_value_that_went_too_far_towards_the_return_is_not_pulled_further():
    values = tensor([[2.0]], dtype=DOUBLE, requires_grad=True)
    loss = f.value_loss(values, torch.ones(1, 1, dtype=DOUBLE), tensor([[3.0]], dtype=DOUBLE), 0.5)
    close(loss.detach(), [[1.125]])  # half of (1.5 - 3)^2
    loss.sum().backward()
    close(values.grad, [[0.0]])


@pytest.mark.parametrize("dual", [None, 3.0])
def test_the_stop_gradient_clip_equals_the_plain_one_but_for_a_gradient_above_the_bound(dual):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, 400, dtype=DOUBLE, generator=generator)
    advantages = torch.randn(2, 400, dtype=DOUBLE, generator=generator)
    gradients = []
    for surrogate in (f.stop_gradient_clipped_surrogate, f.clipped_surrogate):
        logprobs = values.clone().requires_grad_()
        ratio = f.probability_ratio(logprobs, torch.zeros_like(values))
        loss = surrogate(ratio, advantages, 0.8, 1.28, dual)
        loss.sum().backward()
        gradients.append((loss.detach(), logprobs.grad))
    (loss, gradient), (plain_loss, plain_gradient) = gradients
    torch.testing.assert_close(loss, plain_loss, rtol=0, atol=1e-12)
    above = (values.exp() > 1.28) & (advantages > 0)
    assert above.any()
    torch.testing.assert_close(gradient, torch.where(above, -advantages * 1.28, plain_gradient))


def test_a_token_matters_to_the_covariance_where_advantage_and_logprob_are_both_unusual():
    mask = tensor([[True, True, True, False]])
    advantages = tensor([[3.0, 0.0, 0.0, NAN]], dtype=DOUBLE)
    logprobs = tensor([[-1.0, -2.0, -3.0, NAN]], dtype=DOUBLE, requires_grad=True)
    covariance = f.covariance(advantages, logprobs, mask)
    close(covariance, [[2.0, 0.0, 1.0, 0.0]])
    assert not covariance.requires_grad


# Aggregation: two rows, each one turn of a trajectory of its own

VALUES = tensor([[1, 2, 3, 4], [10, 20, NAN, NAN]], dtype=DOUBLE)
MASK = tensor([[1, 1, 1, 1], [1, 1, 0, 0]], dtype=torch.bool)
TURNS = tensor([[0, 0, 0, 0], [0, 0, -1, -1]])
OWN = tensor([0, 1])


def reduce(weights, values=VALUES, mask=MASK):
    shares, count = weights
    return (torch.where(mask, values, 0.0) * shares).sum() / count


def test_a_sequence_may_be_a_turn_or_a_trajectory():
    # One trajectory of two turns: tokens 1 2 | 6, and one of a single turn: 8.
    values = tensor([[1.0, 2.0, 6.0], [8.0, NAN, NAN]], dtype=DOUBLE)
    turns, own = tensor([[0, 0, 1], [0, -1, -1]]), tensor([0, 1])
    mask = turns >= 0
    by_trajectory = f.sequence_weights(mask, turns, own)
    by_turn = f.sequence_weights(mask, turns, own, sequence="turn")
    nested = f.trajectory_weights(mask, turns, own)
    close(reduce(by_trajectory, values, mask), (3.0 + 8.0) / 2)
    close(reduce(by_turn, values, mask), (1.5 + 6.0 + 8.0) / 3)
    close(reduce(nested, values, mask), ((1.5 + 6.0) / 2 + 8.0) / 2)


@pytest.mark.parametrize("kind", [f.token_weights, f.sequence_weights, f.trajectory_weights])
def test_weights_over_their_count_sum_to_one(kind):
    weights, count = kind(MASK, TURNS, OWN)
    assert (weights.sum() / count).item() == pytest.approx(1.0, abs=1e-12)
    assert (weights[~MASK] == 0).all()


def test_a_sequence_without_tokens_that_count_is_not_counted():
    mask = tensor([[1, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
    for kind in (f.sequence_weights, f.trajectory_weights):
        close(reduce(kind(mask, TURNS, OWN), mask=mask), 2.5)


@pytest.mark.parametrize("kind", [f.token_weights, f.sequence_weights, f.trajectory_weights])
def test_weights_of_an_empty_batch_are_empty(kind):
    weights, count = kind(
        torch.zeros(0, 0, dtype=torch.bool), torch.zeros(0, 0, dtype=torch.int64), tensor([]).long()
    )
    assert weights.shape == (0, 0)
    assert count == 0


# Entropy


def test_entropy_means_at_three_levels():
    # Turn means .6, .8 and .4; trajectory means .7 and .4.
    entropies = tensor([[0.2, 0.6, 1.0], [1.5, 0.1, NAN], [0.4, NAN, NAN]], dtype=DOUBLE)
    turns = tensor([[0, 0, 0], [1, 1, -1], [0, -1, -1]])
    means = f.entropy_means(entropies, turns >= 0, turns, tensor([0, 0, 1]))
    assert means["token"].item() == pytest.approx(3.8 / 6)
    assert means["turn"].item() == pytest.approx(1.8 / 3)
    assert means["trajectory"].item() == pytest.approx(0.55)


def test_entropy_means_without_decisions_are_zero():
    nothing = torch.zeros(1, 2)
    means = f.entropy_means(nothing, nothing.bool(), nothing.long() - 1, tensor([0]))
    assert [value.item() for value in means.values()] == [0.0, 0.0, 0.0]


def test_a_forbidden_token_has_no_part_in_the_entropy():
    logits = tensor([0.0, 0.0, -math.inf], dtype=DOUBLE, requires_grad=True)
    entropy = f.entropy(logits)
    assert entropy.item() == pytest.approx(math.log(2))
    entropy.backward()
    close(logits.grad, [0.0, 0.0, 0.0])


def test_all_tokens_are_the_top_ones_when_there_are_no_more():
    logprobs = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).log_softmax(dim=-1)
    top = [f.top_k_entropy(logprobs.topk(k).values) for k in (2, 4, 6)]
    assert (top[0] < top[1]).all()
    assert (top[1] < top[2]).all()
    torch.testing.assert_close(top[2], f.entropy(logprobs))


@pytest.mark.parametrize("strength", [0.5, 1.0, 2.0])
def test_the_band_pulls_entropy_down_only_when_it_is_stronger_than_the_bonus(strength):
    entropies = tensor([0.2, 1.0, 2.0], dtype=DOUBLE, requires_grad=True)  # below, inside, above
    violation = f.entropy_band_violation(entropies, tensor([1.0] * 3, dtype=DOUBLE), 0.5, 1.5)
    (strength * violation - entropies).sum().backward()
    close(entropies.grad, [-1 - strength, -1.0, strength - 1])


def test_the_reference_of_a_band_gets_no_gradient():
    reference = tensor([[1.0]], requires_grad=True)
    violation = f.entropy_band_violation(tensor([[3.0]], requires_grad=True), reference, 0.5, 1.5)
    violation.sum().backward()
    assert reference.grad is None


def test_the_edge_of_a_band_is_outside_when_strict():
    entropies = tensor([[0.25, 0.5, 1.0, 1.5, 1.75]], requires_grad=True)
    strict = f.entropy_band_indicator(entropies, 1.0, 0.5, 1.5)
    assert strict.tolist() == [[1, 1, 0, 1, 1]]
    assert f.entropy_band_indicator(entropies, 1.0, 0.5, 1.5, strict=False).tolist() == [[1, 0, 0, 0, 1]]
    assert not strict.requires_grad
