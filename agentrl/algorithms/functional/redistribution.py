"""Return decomposition: rewards of steps that add up to the return of their episode."""

import torch
from torch import Tensor

from agentrl.algorithms.functional.shapes import same_shape


def redistribution_loss(
    rewards: Tensor, drawn: Tensor, returns: Tensor, lengths: Tensor, *, unbiased: bool = False
) -> Tensor:
    """Return the squared error of each episode's mean reward over the steps that were drawn.

        L[e] = (mean over draws of r[e, k] - R[e] / T[e])^2
        with `unbiased`:  L[e] - Var r[e, k] * (1 - K / T[e]) / K,   Var r * 1 / K if K > T[e]

    K is the number of draws and Var the unbiased variance over them, 0 of one. If K is at most T, the draws
    are without replacement, else with it. With all steps drawn once it is the error of the whole sum (RD),
    with fewer that of randomised decomposition (RRD); its expectation over the draws is the error of RD plus
    the variance of the sample mean, which `unbiased` subtracts.

    Args:
        rewards: [E, K] float, predicted reward of each draw, with gradient.
        drawn: [E, K] bool, which entries are draws; others are padding.
        returns: [E] float, reward units of the environment.
        lengths: [E] int64, T, the number of steps of each episode, at least 1.
        unbiased: Whether to subtract the variance.

    Returns:
        [E] float, in squared reward units.

    Raises:
        ValueError: If shapes disagree.

    Source: Ren et al. 2022, arXiv:2111.13485 (RRD); Qu et al. 2024, arXiv:2412.11120 (LaRe).
    """
    same_shape("drawn", drawn, "rewards", rewards)
    same_shape("lengths", lengths, "returns", returns)
    count, turns = drawn.sum(dim=1).to(rewards), lengths.to(rewards)
    mean = torch.where(drawn, rewards, 0.0).sum(dim=1) / count.clamp(min=1)
    loss = (mean - returns / turns).square()
    if not unbiased:
        return loss
    squares = torch.where(drawn, rewards - mean[:, None], 0.0).square().sum(dim=1)
    variance = squares / (count - 1).clamp(min=1)
    left = torch.where(count > turns, 1.0, 1 - count / turns)
    return loss - variance * left / count.clamp(min=1)
