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


def test_group_advantages_of_the_specification():
    returns = tensor([1, 0, 0, 1, 5, 5, 5, 5, 2], dtype=DOUBLE)
    groups = tensor([0, 0, 0, 0, 1, 1, 1, 1, 2])
    # std of (1, 0, 0, 1) is sqrt(1/3); .5 / (.57735027 + 1e-6) = .8660239
    expected = [0.8660239, -0.8660239, -0.8660239, 0.8660239, 0, 0, 0, 0, 0]
    close(f.group_relative_advantage(returns, groups), expected, 1e-7)
    mean_only = f.group_relative_advantage(returns, groups, divide_by_std=False)
    close(mean_only, [0.5, -0.5, -0.5, 0.5, 0, 0, 0, 0, 0])


def test_row_weighting_counts_a_trajectory_once_per_turn():
    returns, groups = tensor([10.0, 0.0], dtype=DOUBLE), tensor([0, 0])
    weighted = f.group_relative_advantage(returns, groups, copies=tensor([2, 6]))
    close(weighted, [1.62018482, -0.54006161])
    close(f.group_relative_advantage(returns, groups), [0.70710668, -0.70710668])


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


def test_spread_gives_each_decision_the_value_of_its_trajectory():
    sampled = tensor([[False, True], [True, True], [False, False]])
    close(f.spread(tensor([2.0, 3.0]), tensor([1, 0, 0]), sampled), [[0, 3.0], [2.0, 2.0], [0, 0]])


# Policy loss

RATIO = tensor([[0.5, 0.9, 1.1, 1.5], [0.5, 0.9, 1.5, 4.0]], dtype=DOUBLE)
SIGN = tensor([[1.0] * 4, [-1.0] * 4], dtype=DOUBLE)


def test_clipped_surrogate_of_the_specification():
    logprobs = RATIO.log().requires_grad_()
    ratio = f.probability_ratio(logprobs, torch.zeros_like(RATIO))
    loss = f.clipped_surrogate(ratio, SIGN, 0.8, 1.2, dual=3.0)
    close(loss.detach(), [[-0.5, -0.9, -1.1, -1.2], [0.8, 0.9, 1.5, 3.0]])
    loss.sum().backward()
    close(logprobs.grad, [[-0.5, -0.9, -1.1, 0], [0, 0.9, 1.5, 0]])
    assert f.clipped(RATIO, SIGN, 0.8, 1.2).int().tolist() == [[0, 0, 0, 1], [1, 0, 0, 0]]


def test_a_higher_upper_bound_changes_only_what_it_held_back():
    loss = f.clipped_surrogate(RATIO, SIGN, 0.8, 1.28, dual=3.0)
    close(loss, [[-0.5, -0.9, -1.1, -1.28], [0.8, 0.9, 1.5, 3.0]])


def test_without_the_dual_clip_a_large_ratio_is_penalised_in_full():
    assert f.clipped_surrogate(RATIO, SIGN, 0.8, 1.2)[1, 3] == 4.0


def test_bounds_may_differ_from_token_to_token():
    upper = tensor([[1.2, 1.2, 1.05, 2.0], [1.2] * 4], dtype=DOUBLE)
    loss = f.clipped_surrogate(RATIO, SIGN, torch.zeros_like(RATIO), upper)
    close(loss[0], [-0.5, -0.9, -1.05, -1.5])


def test_an_absurd_log_ratio_stays_finite():
    ratio = f.probability_ratio(tensor([1000.0, -1000.0]), tensor([0.0, 0.0]))
    close(ratio.log(), [20.0, -20.0], 1e-4)


def test_divergence_estimators_of_the_specification():
    logprobs = tensor([-1, -2, -0.5], dtype=DOUBLE)
    reference = tensor([-1.2, -1.5, -0.5], dtype=DOUBLE)
    close(f.kl_k1(logprobs, reference), [0.2, -0.5, 0])
    close(f.kl_k2(logprobs, reference), [0.02, 0.125, 0])
    close(f.kl_k3(logprobs, reference), [0.01873075, 0.14872127, 0])


# Aggregation: two rows of the specification, each one turn of a trajectory of its own

VALUES = tensor([[1, 2, 3, 4], [10, 20, NAN, NAN]], dtype=DOUBLE)
MASK = tensor([[1, 1, 1, 1], [1, 1, 0, 0]], dtype=torch.bool)
TURNS = tensor([[0, 0, 0, 0], [0, 0, -1, -1]])
OWN = tensor([0, 1])


def reduce(weights, values=VALUES, mask=MASK):
    shares, count = weights
    return (torch.where(mask, values, 0.0) * shares).sum() / count


def test_aggregations_of_the_specification():
    close(reduce(f.token_weights(MASK, TURNS, OWN)), 40 / 6)
    close(reduce(f.sequence_weights(MASK, TURNS, OWN)), (2.5 + 15) / 2)
    close(reduce(f.constant_weights(MASK, TURNS, OWN, length=1)), (10 + 30) / 2)
    close(reduce(f.constant_weights(MASK, TURNS, OWN, length=4)), 5.0)


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


def test_entropy_means_of_the_specification():
    # Turn means .6, .8 and .4; trajectory means .7 and .4.
    entropies = tensor([[0.2, 0.6, 1.0], [1.5, 0.1, NAN], [0.4, NAN, NAN]], dtype=DOUBLE)
    turns = tensor([[0, 0, 0], [1, 1, -1], [0, -1, -1]])
    means = f.entropy_means(entropies, turns >= 0, turns, tensor([0, 0, 1]))
    assert means["token"].item() == pytest.approx(3.8 / 6)
    assert means["turn"].item() == pytest.approx(1.8 / 3)
    assert means["trajectory"].item() == pytest.approx(0.55)
    weights, count = f.trajectory_weights(turns >= 0, turns, tensor([0, 0, 1]))
    close((weights / count)[turns >= 0], [1 / 12] * 3 + [1 / 8] * 2 + [1 / 2])


def test_entropy_means_without_decisions_are_zero():
    nothing = torch.zeros(1, 2)
    means = f.entropy_means(nothing, nothing.bool(), nothing.long() - 1, tensor([0]))
    assert [value.item() for value in means.values()] == [0.0, 0.0, 0.0]
