"""Branching: where a rollout branches, and what the states in which branches start are worth.

Letters: E trajectories, L action tokens of the longest one, S states in which branches start.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from agentrl.algorithms.functional.returns import EQUAL_RETURNS, discounted_returns
from agentrl.algorithms.functional.shapes import same_shape

FirstState = Literal["one", "released"]
ROUNDING = 1e-3  # a smaller spread of ratios is the rounding of two passes over the same weights
_EXPONENT_LIMIT = 20.0


def initial_rollouts(budget: int, root: float, tool: float, *, slope: float, round_up: bool = False) -> int:
    """Return how many rollouts of a task start at the first observation; the others can branch.

        m = clamp( floor( k * sigmoid(slope * (H_root - H_tool)) + 1/2 ), 1, k )

    Args:
        budget: k, the number of rollouts of the task.
        root: H_root, entropy of the first turn, over the logarithm of the vocabulary.
        tool: H_tool, entropy of the turns that answer the environment, over the logarithm of the vocabulary.
        slope: The slope of the sigmoid.
        round_up: Whether to add 1 instead of 1/2, as the released code does.

    Source: Dong et al. 2025, arXiv:2510.14545.
    """
    share = 0.5 * (1 + math.tanh(0.5 * slope * (root - tool)))  # the sigmoid, without its overflow
    return min(max(math.floor(budget * share + (1.0 if round_up else 0.5)), 1), budget)


def branch_score(change: float, streak: int, *, offset: float, weight: float, penalty: float) -> float:
    """Return the score that decides whether to branch.

        P = clamp( (offset + weight * change) * max(0, 1 - penalty * streak), 0, 1 )

    Args:
        change: The change of entropy since the first turn of the path, over the logarithm of the vocabulary.
        streak: The number of replies in a row at which the path has branched.
        offset: A constant (the paper) or a fresh uniform draw (the released code).
        weight: The weight of the change.
        penalty: The penalty per reply of the streak.

    Source: Dong et al. 2025, arXiv:2510.14545.
    """
    return min(max((offset + weight * change) * max(0.0, 1 - penalty * streak), 0.0), 1.0)


def tree_episodes(trees: int, points: int, branches: int) -> int:
    """Return how many episodes trees have that fork once, M (1 + B N), their trunks included.

    Args:
        trees: M, the number of trees.
        points: N, the number of points of a trunk at which it forks.
        branches: B, the number of branches from each of them.

    Source: ETTRL, arXiv:2508.11356.
    """
    return trees * (1 + branches * points)


def tree_cost(points: int, branches: int) -> float:
    """Return the share of an episode's tokens that a tree samples per episode, for forks anywhere alike.

        (1 + B N / 2) / (1 + B N)

    A branch samples what follows its fork, which is half of an episode on average.

    Args:
        points: N, the number of points of a trunk at which it forks.
        branches: B, the number of branches from each of them.

    Source: ETTRL, arXiv:2508.11356.
    """
    grown = points * branches
    return (1 + 0.5 * grown) / (1 + grown)


def state_values(returns: Tensor, states: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the mean return of every state, and whether its continuations have different returns.

        V[s] = mean of R[e] over the continuations e of s

    Args:
        returns: [E] float, reward units.
        states: [E] int64, the state in which each trajectory starts; -1 for none.
        count: S, the number of states; each has a continuation.

    Returns:
        V: [S] float, reward units; and [S] bool.

    Source: Zheng et al. 2025, arXiv:2507.07017.
    """
    began = states >= 0
    member, values = states[began], returns[began]
    totals = values.new_zeros(count).index_add_(0, member, values)
    lowest, highest = (
        values.new_zeros(count).scatter_reduce_(0, member, values, reduce, include_self=False)
        for reduce in ("amin", "amax")
    )
    return totals / torch.bincount(member, minlength=count), highest - lowest > EQUAL_RETURNS


def state_modulation(
    values: Tensor,
    bases: Tensor,
    differ: Tensor,
    *,
    first: FirstState = "one",
    sharpen: bool = False,
    skip_equal: bool = False,
) -> Tensor:
    """Return the factor of each state's advantages: below 1 after a rise of value, above 1 after a fall.

        alpha[s] = exp(-d[s]),   d[s] = V[s] - V[s - 1]

    Args:
        values: [S] float, V; the states of a base are adjacent and in order.
        bases: [S] int64, equal for states of one base.
        differ: [S] bool, states whose continuations have different returns.
        first: d of a base's first state: 0 (`one`), or 1 - V (`released`).
        sharpen: Replace d by sign(d) |d|^1.5 / sum |d|^1.5 over the states of the base.
        skip_equal: Ignore states whose continuations have equal returns; their alpha is 1.

    Returns:
        [S] float.

    Source: Zheng et al. 2025, arXiv:2507.07017.
    """
    if skip_equal:
        alpha = torch.ones_like(values)
        alpha[differ] = state_modulation(
            values[differ], bases[differ], differ[differ], first=first, sharpen=sharpen
        )
        return alpha
    begins = torch.ones_like(differ)
    begins[1:] = bases[1:] != bases[:-1]
    start = 1 - values if first == "released" else torch.zeros_like(values)
    change = torch.where(begins, start, values - values.roll(1))
    if sharpen:
        power = change.abs() ** 1.5
        total = torch.where(bases == bases[:, None], power, 0.0).sum(1)
        change = change.sign() * power / torch.where(total > 0, total, 1.0)
    return torch.exp(-change)


def future_ratio(log_ratios: Tensor, mask: Tensor, *, gamma: float = 1.0) -> Tensor:
    """Return the ratio of two policies over a token and all that follow, which count less and less.

        out[t] = exp( sum over k >= t of gamma^(k - t) log_ratios[k] )

    The exponent is clamped to [-20, 20].

    Args:
        log_ratios: [E, L] float, nats, of single tokens.
        mask: [E, L] bool; other tokens are skipped and do not discount.
        gamma: The discount per action token.

    Returns:
        [E, L] float, 1 where masked; no gradient.

    Raises:
        ValueError: If shapes disagree.

    Source: arXiv:2606.12384.
    """
    return discounted_returns(log_ratios, mask, gamma=gamma).clamp(-_EXPONENT_LIMIT, _EXPONENT_LIMIT).exp()


def influence_scores(entropies: Tensor, ratios: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Score tokens by how uncertain they were, and by how much likelier all that follows has become (APPO).

        score = z(H) * z(Omega)

    where z = (x - mean) / (std + 1e-6) over the action tokens of the trajectory, with the std of the
    population. The product of two negative z is positive, so both are returned as well. Spreads of H below
    1e-9 and of Omega below 1e-3 count as 0, and their z is 0: this is rounding, not a difference.

    Args:
        entropies: [E, L] float, H, nats.
        ratios: [E, L] float, Omega, see `future_ratio`.
        mask: [E, L] bool, the action tokens.

    Returns:
        score, z(H) and z(Omega), [E, L] float each, 0 where masked.

    Raises:
        ValueError: If shapes disagree.

    Source: arXiv:2606.12384.
    """
    same_shape("ratios", ratios, "entropies", entropies)
    same_shape("mask", mask, "entropies", entropies)
    uncertain, influential = _standard_scores(entropies, mask, 1e-9), _standard_scores(ratios, mask, ROUNDING)
    return uncertain * influential, uncertain, influential


def _standard_scores(values: Tensor, mask: Tensor, least: float) -> Tensor:
    """Return the z of each row over its mask, 0 in a row whose spread is below `least`."""
    count = mask.sum(1, keepdim=True).clamp(min=1)
    centred = torch.where(mask, values - torch.where(mask, values, 0.0).sum(1, keepdim=True) / count, 0.0)
    spread = (centred.square().sum(1, keepdim=True) / count).sqrt()
    return torch.where(spread >= least, centred / (spread + 1e-6), 0.0)
