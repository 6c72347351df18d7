"""Published numbers, checked in float64 to half a unit of the last printed digit.

Tables are written as they are printed: rows end in `;`, and `x` is a position that no mask includes. As input
it is nan, so that it shows when it matters; as output it is 0.
"""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from agentrl.algorithms import functional as f
from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.functional import state_modulation
from agentrl.algorithms.hooks import Context, MiniBatch
from agentrl.algorithms.replay import ReplayBuffer
from agentrl.algorithms.self_imitation import recalibrated
from agentrl.data import Episode, Group, StopReason, Turn
from agentrl.data.batch import collate
from agentrl.learn.fused import token_statistics

ROUNDED = 6  # decimals; with fewer, what is printed is exact


def table(printed: str) -> Tensor:
    """`1 2; 3 x` -> [2, 2], a single row -> [1, n]."""
    lines = [line.replace("x", "nan").split() for line in printed.split(";")]
    return torch.tensor([[float(number) for number in line] for line in lines], dtype=torch.float64)


def row(printed: str) -> Tensor:
    return table(printed)[0]


def whole(printed: str) -> Tensor:
    return row(printed).long()


def bits(printed: str) -> Tensor:
    """`110 101` -> [2, 3] bool."""
    return torch.tensor([[digit == "1" for digit in line] for line in printed.split()])


def check(actual: Tensor, printed: str) -> None:
    wanted = table(printed).nan_to_num(0.0)
    decimals = [[len(number.partition(".")[2]) for number in line.split()] for line in printed.split(";")]
    slack = [[0.5 * 10**-places if places >= ROUNDED else 1e-12 for places in line] for line in decimals]
    assert actual.dtype == torch.float64
    actual = actual.detach().reshape(wanted.shape)
    wrong = ~((actual - wanted).abs() <= torch.tensor(slack, dtype=torch.float64) + 1e-13)
    assert not wrong.any(), f"\n{actual}\nwanted\n{wanted}"


def mean(weights: tuple[Tensor, Tensor], values: Tensor) -> Tensor:
    shares, count = weights
    return torch.where(shares > 0, values, 0.0).mul(shares).sum() / count


def one_turn(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mask, turns and trajectories of rows that are each one turn of a trajectory of its own."""
    return mask, torch.where(mask, 0, -1), torch.arange(len(mask))


# Entropy and the policy loss


@pytest.mark.vector("V1.1")
def test_exact_entropies_and_their_gradients():
    logits = table("0 0 0 0; 2 1 0 -1; 5 0 0 0").requires_grad_()
    entropies = f.entropy(logits)
    check(entropies, "1.3862943611 0.9475369640 0.1190789401")
    check(f.entropy(logits / 0.5), "1.38629436 0.45542862 0.00149800")
    entropies.sum().backward()
    check(
        logits.grad,
        "0 0 0 0; -0.32668814 0.11670097 0.13007621 0.07991097; -0.09710385 0.03236795 0.03236795 0.03236795",
    )


@pytest.mark.vector("V1.1")
def test_exact_entropies_of_the_learner():
    hidden, targets = table("0 0 0 0; 2 1 0 -1; 5 0 0 0").requires_grad_(), torch.tensor([1, 0, 0])
    output = torch.eye(4, dtype=torch.float64)
    logprobs, entropies = token_statistics(hidden, output, targets)
    check(logprobs, "-1.38629436 -0.44018970 -0.02001225")
    check(entropies, "1.3862943611 0.9475369640 0.1190789401")
    check(token_statistics(hidden, output, targets, temperature=0.5)[1], "1.38629436 0.45542862 0.00149800")
    entropies[1].backward()
    check(hidden.grad[1], "-0.32668814 0.11670097 0.13007621 0.07991097")


@pytest.mark.vector("V1.2a")
def test_the_clipped_surrogate_its_gradient_and_what_it_holds_back():
    ratio, advantages = table(".5 .9 1.1 1.5; .5 .9 1.5 4."), table("1 1 1 1; -1 -1 -1 -1")
    logprobs = ratio.log().requires_grad_()
    loss = f.clipped_surrogate(
        f.probability_ratio(logprobs, torch.zeros_like(ratio)), advantages, 0.8, 1.2, dual=3.0
    )
    check(loss, "-0.5 -0.9 -1.1 -1.2; 0.8 0.9 1.5 3.0")
    loss.sum().backward()
    check(logprobs.grad, "-0.5 -0.9 -1.1 0; 0 0.9 1.5 0")
    assert f.clipped(ratio, advantages, 0.8, 1.2).equal(bits("0001 1000"))
    higher = f.clipped_surrogate(ratio, advantages, 0.8, 1.28, dual=3.0)
    check(higher, "-0.5 -0.9 -1.1 -1.28; 0.8 0.9 1.5 3.0")


@pytest.mark.vector("V1.2b")
def test_aggregations():
    values, rows = table("1 2 3 4; 10 20 x x"), one_turn(bits("1111 1100"))
    check(mean(f.token_weights(*rows), values), "6.6666666667")
    check(mean(f.sequence_weights(*rows), values), "8.75")
    check(mean(f.constant_weights(*rows, length=1), values), "20")
    check(mean(f.constant_weights(*rows, length=4), values), "5.0")
    # verl forgets the number of rows.
    weights, count = f.constant_weights(*rows, length=4)
    check(mean((weights, count), values) * count, "10.0")


@pytest.mark.vector("V1.2c")
def test_estimators_of_the_divergence():
    logprobs, reference = table("-1 -2 -.5"), table("-1.2 -1.5 -.5")
    check(f.kl_k1(logprobs, reference), ".2 -.5 0")
    check(f.kl_k2(logprobs, reference), ".02 .125 0")
    check(f.kl_k3(logprobs, reference), "0.01873075 0.14872127 0")


# Values


@pytest.mark.vector("V1.3a")
def test_gae_skips_tokens_that_do_not_count():
    rewards, values, mask = table("0 0 x x 1 x"), table(".5 .4 x x .7 x"), bits("110010")
    turns = torch.zeros(1, 6, dtype=torch.int64)
    factors = {"gamma_turn": 0.95, "lam_turn": 0.9, "gamma_token": 0.95, "lam_token": 0.9}
    advantages, returns = f.gae(rewards, values, mask, turns, **factors)
    check(advantages, "0.3258825 0.5215 0 0 0.3 0")
    check(returns, "0.8258825 0.9215 0 0 1.0 0")
    check(f.whiten(advantages, mask), "-0.46718441 1.14808844 x x -0.68090403 x")
    # What a learner does that counts every token.
    values = table(".5 .4 .6 .2 .7 .9")
    every, _ = f.gae(rewards.nan_to_num(0.0), values, torch.ones_like(mask), turns, **factors)
    check(every, "0.22227727 0.40032429 0.26938514 0.7946025 0.3855 -0.9")


@pytest.mark.vector("V1.3b")
def test_gae_over_turns():
    rewards, values = table("0 0 1"), table(".3 .5 .6")
    advantages, returns = f.gae(rewards, values, bits("111"), torch.tensor([[0, 1, 2]]), lam_turn=0.95)
    check(advantages, "0.656 0.48 0.4")
    check(returns, "0.956 0.98 1.0")


@pytest.mark.vector("V1.3c")
def test_the_value_loss_and_its_clip():
    loss = f.value_loss(table("1.0 .2 .5"), table(".5 .5 .5"), table(".9 0 .5"), clip=0.2)
    check(2 * loss, ".04 .09 0")
    check(2 * loss.mean(), "0.0433333333")
    check(loss.mean(), "0.0216666667")


@pytest.mark.vector("V1.3d")
def test_by_row_every_turn_is_credited_with_the_whole_return():
    advantages, _ = f.gae(table("0 10"), table(".2 .4"), bits("11"), torch.tensor([[3, 3]]))
    check(advantages, "9.8 9.6")


@pytest.mark.vector("V1.3e")
def test_gae_discounts_at_the_end_of_a_turn_only():
    rewards, values, mask = table("0 .5 x 0 1"), table(".3 .4 x .5 .6"), bits("11011")
    turns = torch.tensor([[0, 0, -1, 1, 1]])
    advantages, returns = f.gae(rewards, values, mask, turns, gamma_turn=0.95, lam_turn=0.9)
    check(advantages, "1.1025 1.0025 x .5 .4")
    check(returns, "1.4025 1.4025 x 1 1")
    everywhere, _ = f.gae(
        rewards, values, mask, turns, gamma_turn=0.95, lam_turn=0.9, gamma_token=0.95, lam_token=0.9
    )
    check(everywhere, ".8728073 .92726 x .412 .4")


# Returns


@pytest.mark.vector("V1.5a")
def test_group_relative_advantages():
    returns, groups = row("1 0 0 1 5 5 5 5 2"), whole("0 0 0 0 1 1 1 1 2")
    check(f.group_relative_advantage(returns, groups), ".8660239 -.8660239 -.8660239 .8660239 0 0 0 0 0")
    check(f.group_relative_advantage(returns, groups, divide_by_std=False), ".5 -.5 -.5 .5 0 0 0 0 0")
    raw = f.group_relative_advantage(returns, groups, singleton="raw")
    check(raw, ".8660239 -.8660239 -.8660239 .8660239 0 0 0 0 1.999998")


@pytest.mark.vector("V1.5b")
def test_group_relative_advantages_by_row_and_by_trajectory():
    returns, groups = row("10 0"), whole("0 0")
    by_row = f.group_relative_advantage(returns, groups, copies=whole("2 6"))
    check(by_row, "1.62018482 -0.54006161")
    check(f.group_relative_advantage(returns, groups), "0.70710668 -0.70710668")


@pytest.mark.vector("V1.6a")
def test_leave_one_out_advantages():
    advantages = f.leave_one_out_advantage(row("1 0 0 1"), whole("7 7 7 7"))
    check(advantages, "0.66666667 -0.66666667 -0.66666667 0.66666667")


@pytest.mark.vector("V1.6b")
def test_whitened_discounted_returns():
    mask = bits("111 110")
    returns = f.discounted_returns(table("0 0 1; 0 -.5 x"), mask, gamma=0.9)
    check(returns, ".81 .9 1.; -.45 -.5 0")
    check(f.whiten(returns, mask), "0.60411334 0.72282557 0.85472805; -1.05785786 -1.1238091 0")


@pytest.mark.vector("V1.6c")
def test_whitening_over_tokens_weighs_long_replies():
    mask = bits("111 110 100")
    centred = f.group_relative_advantage(row("1 0 0"), whole("0 0 0"), divide_by_std=False)
    advantages = f.whiten(f.broadcast_to_tokens(centred, torch.arange(3), mask), mask)
    check(advantages, "0.91287091 0.91287091 0.91287091; -0.91287091 -0.91287091 x; -0.91287091 x x")


@pytest.mark.vector("V1.6d")
def test_discounted_returns_do_not_restart_where_nothing_counts():
    rewards, mask = table("0 x 0 1; 0 -.5 x x"), bits("1011 1100")
    for restart in (None, ~mask):
        returns = f.discounted_returns(rewards, mask, gamma=0.9, restart=restart)
        check(returns, ".81 x .9 1; -.45 -.5 x x")
        check(f.whiten(returns, mask), "0.60411334 x 0.72282557 0.85472805; -1.05785786 -1.1238091 x x")


@pytest.mark.vector("V1.7")
def test_overlong_penalty():
    lengths = row("15 16 17 18 20 21")
    check(f.overlong_penalty(lengths, limit=20, cache=4), "0 0 -0.25 -0.5 -1 -1")


ANCHORED = {  # of GiGPO with both terms centred, or divided by their std; by trajectory, or by row
    (False, False): "0.77270833 0.30833333 0.33333333 -1.12979167 -1.12979167 0.82020833 0.35833333",
    (False, True): "0.72508929 0.26071429 0.28571429 -1.17741071 -1.17741071 0.77258929 0.31071429",
    (True, False): "1.39842193 -0.12973751 0.57734927 -2.02015351 -2.02015351 1.48718654 1.28443605",
    (True, True): "1.40661151 -0.12154794 0.58553884 -2.32930208 -2.32930208 1.49537612 1.29262563",
}


@pytest.mark.vector("V1.8")
@pytest.mark.parametrize(("divide_by_std", "by_row"), ANCHORED)
def test_episode_and_anchor_state_advantages_of_the_functions(divide_by_std, by_row):
    owner, anchors, exists = whole("0 0 0 1 1 2 2"), whole("0 1 2 0 0 0 1"), bits("111 110 110")
    to_go = f.discounted_returns(table("0 0 1; 0 0 x; 0 1 x"), exists, gamma=0.95)[exists]
    check(to_go, ".9025 .95 1 0 0 .95 1")
    step = f.group_relative_advantage(to_go, anchors, divide_by_std=divide_by_std)
    if not divide_by_std:
        check(step, "0.439375 -0.025 0 -0.463125 -0.463125 0.486875 0.025")
    episode = f.group_relative_advantage(
        row("1 0 1"),
        whole("0 0 0"),
        divide_by_std=divide_by_std,
        copies=whole("3 2 2") if by_row else None,
    )
    check(episode[owner] + step, ANCHORED[divide_by_std, by_row])


@pytest.mark.vector("V1.9")
@pytest.mark.parametrize(
    ("lower", "upper", "loss", "gradient"),
    [
        (0.8, 1.2, "-0.0144412963", "-0.17231585 -0.17231585 -0.17231585 x; 0.25125313 0.25125313 x x"),
        (0.9997, 1.0004, "0.0023062604", "0 0 0 x; 0.25125313 0.25125313 x x"),
    ],
)
def test_one_ratio_per_sequence(lower, upper, loss, gradient):
    rows = one_turn(bits("1110 1100"))
    logprobs = table("-.9 -2.3 -.7 x; -.99 -1. x x").requires_grad_()
    ratio = f.sequence_ratio(logprobs, table("-1 -2 -1 x; -1 -1 x x"), *rows)
    check(ratio[:, 0], "1.03389511 1.00501252")
    surrogate = f.clipped_surrogate(ratio, table("1 1 1 0; -1 -1 0 0"), lower, upper)
    total = mean(f.sequence_weights(*rows, sequence="turn"), surrogate)
    check(total, loss)
    total.backward()
    check(logprobs.grad, gradient)


# EPO: rows are turns 0 and 1 of one trajectory, turn 0 of another

TURNS = torch.tensor([[0, 0, 0], [1, 1, -1], [0, -1, -1]])
TWO = torch.tensor([0, 0, 1])
CALM = "0.2 0.6 1.0; 1.5 0.1 x; 0.4 x x"
WILD = "0.2 0.6 1.0; 1.8 0.1 x; 0.4 x x"
ENTROPY_BAND = {"low": 0.5, "high": 1.5}


def regularised(policy_loss: float, scale: float, entropy: Tensor | float, smoothing: Tensor) -> Tensor:
    return policy_loss - scale * (entropy - smoothing)


def epo(printed: str, reference: Tensor | float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean entropy, mean violation, loss and gradient per unit of weight."""
    entropies = table(printed).requires_grad_()
    shares, count = f.trajectory_weights(TURNS >= 0, TURNS, TWO)
    violation = mean((shares, count), f.entropy_band_violation(entropies, reference, **ENTROPY_BAND))
    entropy = mean((shares, count), entropies)
    loss = regularised(0.25, 0.001, entropy, 2 * violation)
    loss.backward()
    return entropy, violation, loss, (entropies.grad / (shares / count))[TURNS >= 0]


@pytest.mark.vector("E-R1")
def test_the_entropy_band():
    entropies, rows = table(CALM), (TURNS >= 0, TURNS, TWO)
    weights, count = f.trajectory_weights(*rows)
    check((weights / count)[rows[0]] * 24, "2 2 2 3 3 12")
    check(mean(f.token_weights(*rows), entropies), "0.6333333333")
    check(f.entropy_means(entropies, *rows)["trajectory"], "0.55")
    entropy, violation, loss, gradient = epo(CALM, 1.0)
    check(entropy, "0.55")
    check(violation, "0.125")
    check(loss, "0.24970")
    # Below the band -.003, inside and on its edge (1.5) -.001.
    check(gradient, "-.003 -.001 -.001 -.001 -.003 -.003")
    by_token = mean(f.token_weights(*rows), f.entropy_band_violation(entropies, 1.0, **ENTROPY_BAND))
    check(by_token, "0.1333333333")


@pytest.mark.vector("E-R1")
def test_the_entropy_band_on_means_and_as_an_indicator():
    of_means = f.entropy_band_violation(row("0.7 0.4"), 1.0, **ENTROPY_BAND).mean()
    check(of_means, "0.05")
    check(regularised(0.25, 0.001, 0.55, 2 * of_means), "0.24955")
    outside = f.entropy_band_indicator(table(CALM), 1.0, **ENTROPY_BAND, strict=False)
    penalty = 0.1 * mean(f.trajectory_weights(TURNS >= 0, TURNS, TWO), outside)
    check(penalty, "0.0708333333")
    check(regularised(0.25, 0.001, 0.55, penalty), "0.2495208333")


@pytest.mark.vector("E-R1b")
def test_the_entropy_band_holds_high_entropy_down():
    entropy, violation, loss, gradient = epo(WILD, 1.0)
    check(entropy, "0.5875")
    check(violation, "0.1625")
    check(loss, "0.2497375")
    check(gradient, "-.003 -.001 -.001 .001 -.003 -.003")


@pytest.mark.vector("E-R1t")
def test_the_entropy_band_around_a_reference_per_turn():
    reference = f.broadcast_turns_to_tokens(table("0.6 1.0; 0.6 x"), TURNS, TWO, TURNS >= 0)
    check(f.entropy_band_violation(table(WILD), reference, **ENTROPY_BAND)[TURNS >= 0], ".1 0 .1 .3 .4 0")
    _, violation, loss, _ = epo(WILD, reference)
    check(violation, "0.1041666667")
    check(loss, "0.2496208333")


@pytest.mark.vector("E-R2")
def test_the_gradient_of_the_entropy_band():
    logits = table("2 1 0 -1; .5 0 0 0").requires_grad_()
    entropies = f.entropy(logits)
    check(entropies, "0.9475369640 1.3592615640")
    violation = f.entropy_band_violation(entropies, 1.0, 0.25, 0.75).mean()
    check(violation, "0.40339926400595")
    (gradient,) = torch.autograd.grad(violation, logits, retain_graph=True)
    check(
        gradient,
        "-0.1633440695 0.0583504841 0.0650381028 0.0399554826;"
        "-0.0572191615 0.0190730538 0.0190730538 0.0190730538",
    )
    (balanced,) = torch.autograd.grad(entropies.mean() - violation, logits, retain_graph=True)
    assert (balanced == 0).all()
    outside = f.entropy_band_indicator(entropies, 1.0, 0.25, 0.75)
    assert outside.tolist() == [1.0, 1.0]
    (with_indicator,) = torch.autograd.grad((entropies - 0.1 * outside).mean(), logits, retain_graph=True)
    (without,) = torch.autograd.grad(entropies.mean(), logits)
    assert with_indicator.equal(without)


@pytest.mark.vector("E-O1")
def test_the_released_penalty_is_a_constant_by_comparison():
    entropies, mask = table("0.2 0.6 1.0 x; 1.5 0.1 x x"), bits("1110 1100")
    penalty = 0.1 * f.entropy_band_indicator(entropies, table("0.5; 0.8"), **ENTROPY_BAND)
    check(torch.where(mask, penalty, 0.0), ".1 0 .1 x; .1 .1 x x")
    entropy, constant = f.masked_mean(entropies, mask), f.masked_mean(penalty, mask)
    check(entropy, ".68")
    check(constant, ".08")
    check(regularised(0.25, 0.001, entropy, constant), "0.249400")
    check(regularised(0.25, 0.001, entropy, 0.8 * constant), "0.249384")


@pytest.mark.vector("E-S2")
def test_the_entropy_loss_rewards_entropy():
    entropies = row("1.2").requires_grad_()
    violation = f.entropy_band_violation(entropies, 1.0, 0.5, 1.16)
    check(violation, ".04")
    loss = regularised(0.25, 0.1, entropies, 2 * 0.1 * violation)
    check(loss, "0.1308")  # neither 0.378, which has the sign of entropy wrong, nor 0.138
    loss.backward()
    assert entropies.grad < 0


# EMPG

STEPS = bits("111 110")


@pytest.mark.vector("M-1")
def test_entropy_modulated_advantages():
    advantages, entropies = table("1 1 1; -1 -1 x"), table(".2 .8 .5; 1.0 .4 x")
    scale, clarity = f.entropy_modulation(entropies, STEPS, k=1.0, k_future=1.0)
    check(scale, "1.51224794 0.71433535 1.0393518; 0.55632494 1.17773989 x")
    check(clarity, "1 0.47236656 0.68728928; 0.36787945 0.77880079 x")
    for zeta, average, modulated, final in (
        (
            0.1,
            0.3451431885,
            "1.5594846 0.78306428 1.0393518; -0.47844486 -1.17773989 x",
            "1.21434141 0.43792109 0.69420862; -0.82358805 -1.52288308 x",
        ),
        (
            0.05,
            0.3257586223,
            "1.53586627 0.74869982 1.0393518; -0.5173849 -1.17773989 x",
            "1.21010765 0.4229412 0.71359318; -0.84314352 -1.50349851 x",
        ),
    ):
        out = f.entropy_modulated_advantage(advantages, entropies, STEPS, k=1.0, k_future=1.0, zeta=zeta)
        check(out, final)
        check(torch.where(STEPS, out + average, 0.0), modulated)


@pytest.mark.vector("M-2")
def test_constant_entropy_modulates_nothing():
    steps = bits("11 10")
    out = f.entropy_modulated_advantage(
        table("1 1; -1 x"), table(".7 .7; .7 x"), steps, k=1.0, k_future=1.0, zeta=0.1
    )
    check(out, "0.73333333 0.63333333; -1.36666665 x")
    # Centred once: the mean of what was there before is what each one lost.
    modulated = torch.where(steps, out + 0.3666666633, 0.0)
    torch.testing.assert_close(modulated, table("1.1 1.0; -1.0 0"), rtol=0, atol=1e-7)


@pytest.mark.vector("M-3")
def test_one_step_problems_are_scaled_and_get_no_bonus():
    steps, entropies = bits("1 1 1"), table(".3; .9; .6")
    scale, _ = f.entropy_modulation(entropies, steps, k=1.0, k_future=1.0)
    check(scale, "1.51944114; 0.55897117; 0.92158765")
    out = f.entropy_modulated_advantage(table("2; -1; -1"), entropies, steps, k=1.0, k_future=1.0, zeta=0.1)
    check(out, "2.51944113; -1.07841232; -1.4410288")
    check(out + 0.5194411567, "3.03888228; -0.55897117; -0.92158765")


@pytest.mark.vector("M-4")
def test_the_entropy_of_a_step_is_the_mean_of_its_decisions():
    mask, turns = bits("11001110"), torch.tensor([[0, 0, -1, -1, 1, 1, 1, -1]])
    means, present = f.turn_means(table(".1 .3 .9 .9 .5 .7 .3 0"), mask, turns, torch.tensor([0]), 1)
    check(means, "0.2 0.5")
    assert present.all()


# AEPO

UNCERTAIN = {"entropies": table(".1 .5 1.2 x; 2.0 .3 x x"), "mask": bits("1110 1100"), "scale": 0.2}
SIGNS = table("1 1 1 x; -1 -1 x x")
SCALED = "0.81517184 0.91785415 1.0975482 x; -1.30291282 -0.86651299 x x"


@pytest.mark.vector("A-1")
@pytest.mark.parametrize("limits", [None, (0.0, 2.0)])
def test_entropy_scaled_advantages(limits):
    entropies, mask = UNCERTAIN["entropies"], UNCERTAIN["mask"]
    check(f.masked_mean(entropies, mask), ".82")
    check(entropies[mask].std(), "0.7791020472")
    standardised = "-0.92414081 -0.41072925 0.48774099 x; 1.51456411 -0.66743503 x x"
    check(f.whiten(entropies, mask, eps=0.0), standardised)
    check(f.entropy_scaled_advantage(SIGNS, **UNCERTAIN, limits=limits), SCALED)


@pytest.mark.vector("A-2")
def test_the_stop_gradient_clip_has_the_loss_of_ppo_and_a_gradient_above_the_bound():
    mask = UNCERTAIN["mask"]
    advantages = f.entropy_scaled_advantage(SIGNS, **UNCERTAIN)
    gradients = []
    for surrogate in (f.stop_gradient_clipped_surrogate, f.clipped_surrogate):
        logprobs = table(".7 1.5 1.5 1; .7 1.5 1 1").log().requires_grad_()
        ratio = f.probability_ratio(logprobs, torch.zeros_like(logprobs))
        losses = surrogate(ratio, advantages, 0.8, 1.2, dual=3.0)
        check(losses, "-0.57062029 -1.10142498 -1.31705784 x; 1.04233026 1.29976949 x x")
        loss = f.masked_mean(losses, mask)
        check(loss, "-0.1294006708")
        loss.backward()
        gradients.append(5 * logprobs.grad)
    ours, plain = gradients
    check(ours, "-0.57062029 -1.10142498 -1.31705784 x; 0 1.29976949 x x")
    check(plain, "-0.57062029 0 0 x; 0 1.29976949 x x")
    inverted = table("-0.57062029 -1.10142498 0 0; 0 1.29976949 0 0")  # high entropies left out
    assert (ours - inverted).abs().max() > 1


@pytest.mark.vector("A-6")
def test_the_entropy_that_an_inference_server_can_tell():
    entropies = f.top_k_entropy(table("-.1 -2.5 -4.; -.7 -.9 -3.")) / math.log(32)
    check(entropies.sum(), "0.3554345859")
    check(entropies.mean(), "0.1777172929")


# SPEAR


def remembered(returns: Tensor, groups: Tensor, advantages: Tensor) -> ReplayBuffer:
    """A buffer that has kept a step of trajectories of one decision each."""
    turns = [
        Turn("o", "a", prompt_ids=(1,), action_ids=(2,), logprobs=(0.0,), entropies=(0.0,), reward=earned)
        for earned in returns.tolist()
    ]
    episodes = [
        Episode(f"e{i}", "env", "t", 0, (turn,), StopReason.TERMINATED) for i, turn in enumerate(turns)
    ]
    members = ([e for e, group in zip(episodes, groups, strict=True) if group == n] for n in groups.unique())
    batch = collate([Group("t", tuple(found)) for found in members])
    batch = replace(batch, old_logprobs=batch.logprobs, old_entropies=batch.entropies)
    buffer = ReplayBuffer(
        lambda _: Algorithm(),
        size=1,
        baselines=10,
        tolerance=5,
        coefficient=lambda context: 1.0,
        recompute_advantage=recalibrated,
    )
    buffer.update(MiniBatch(batch, torch.where(batch.action_mask, advantages[:, None], 0.0)), Context())
    return buffer


@pytest.mark.vector("S-2")
def test_what_is_recalled_is_better_than_the_median_of_recent_groups():
    # Groups of mean .2 .5 .6 .8 .1; the first of each of the first four is the trajectory in question.
    returns, groups = row(".4 0 .6 .4 1 .2 1 .6 .1"), whole("0 0 1 1 2 2 3 3 4")
    advantages = row(".2 -1 .1 -1 .5 -1 -.1 -1 -1")
    recalled = set()
    for seed in range(20):
        buffer = remembered(returns, groups, advantages)
        again = buffer.sample(Context(step=1, seed=seed))
        numbers = buffer.metrics()
        assert (numbers["baseline"], numbers["usable"]) == (0.5, 2)
        recalled.add((again.batch.returns.item(), round(again.advantages.sum().item(), 12)))
    # The return of .4 is below the median, the other one of 1 was no surprise when it was new.
    assert recalled == {(1.0, 0.5), (0.6, 0.1)}
    worth = torch.stack([recalibrated(row("0"), earned, 0.5)[0] for earned in (1.0, 0.6, 0.4, 1.0)])
    check(worth, ".5 .1 -.1 .5")


@pytest.mark.vector("S-2")
def test_the_median_of_an_even_number_of_groups_is_between_the_middle_two():
    buffer = remembered(row(".2 .4 .6 .8"), whole("0 1 2 3"), row("0 0 0 0"))
    assert buffer.sample(Context(step=1)) is None
    assert buffer.metrics()["baseline"] == pytest.approx(0.5, abs=1e-12)


@pytest.mark.vector("S-3")
def test_the_self_imitation_loss():
    mask = bits("111 110")
    advantages = f.broadcast_to_tokens(row(".5 .2"), torch.arange(2), mask)
    ratio = f.probability_ratio(table(".1 -.3 .4; 0 .2 x"), table("0 0 0; 0 0 0"))
    losses = f.clipped_surrogate(ratio, advantages, 0.8, 1.28)
    check(losses[mask], "-0.55258546 -0.37040911 -0.64 -0.2 -0.24428055")
    loss = mean(f.token_weights(*one_turn(mask)), losses)
    check(loss, "-0.4014550242")
    check(loss * (1 - math.cos(math.pi * 50 / 200)) / 2, "-0.0587917271")


@pytest.mark.vector("S-4")
def test_tokens_of_high_covariance_are_left_out_of_the_loss():
    mask = bits("1110 1110")
    advantages = table("2 2 2 0; -1 -1 -1 0")
    logprobs = table("-.1 -3 -.2 x; -.1 -2 -.3 x").requires_grad_()
    old = logprobs.detach() - table("1 1 1.5 1; 1 .7 1 1").log()
    covariance = f.covariance(advantages, logprobs, mask)
    check(covariance, "1.275 -3.075 1.125 x; -1.275 1.575 -.975 x")
    ratio = f.probability_ratio(logprobs, old)
    held = f.clipped(ratio, advantages, 0.8, 1.28)
    assert (held & mask).equal(bits("0010 0100"))
    candidates = (covariance > 1) & (covariance < 40) & mask & ~held
    assert candidates.equal(bits("1000 0000"))
    losses = torch.where(candidates, 0.0, f.clipped_surrogate(ratio, advantages, 0.8, 1.28))
    check(losses[mask], "0 -2 -2.56 1 .8 1")
    rows = one_turn(mask)
    loss = mean(f.token_weights(*rows), losses)
    check(loss, "-0.2933333333")
    weights, count = f.constant_weights(*rows, length=4)
    check(mean((weights, count), losses) * count, "-0.44")
    loss.backward()
    check(6 * logprobs.grad, "0 -2 0 x; 1 0 1 x")


# FR3E


@pytest.mark.vector("F-5")
def test_bounds_hold_for_the_ratio_and_leave_the_advantage_alone():
    advantages = table(".05 .7")
    losses = f.clipped_surrogate(torch.ones_like(advantages), advantages, 0.8, 1.2)
    check(-losses, ".05 .7")  # not raised to .2


@pytest.mark.vector("F-5")
def test_a_rise_of_value_weakens_what_is_learned():
    alpha = state_modulation(row(".25 .5 .25"), whole("0 0 0"), bits("111")[0])
    check(alpha, "1 0.77880078 1.28402542")  # not 2.5 after the rise and 0 after the fall


# All of them

PUBLISHED = 48


@pytest.mark.reference
def test_every_published_vector_has_a_test(reference_folder):
    text = (reference_folder / "specs" / "algorithms-core.md").read_text()
    published = set(re.findall(r"^(?:Vector )?(V1\.\d+[a-z]?|[EMASF]-[A-Z]?\d+[a-z]?)\b", text, re.M))
    assert len(published) >= PUBLISHED
    sources = "\n".join(path.read_text() for path in Path(__file__).parents[1].rglob("test_*.py"))
    checked = set(re.findall(r'vector\("([^"]+)"\)', sources))
    assert sorted(published - checked) == []
