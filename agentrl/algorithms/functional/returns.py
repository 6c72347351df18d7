"""Credit by token: what is still to come, and how much more it is than a value function expected."""

import torch
from torch import Tensor

from agentrl.algorithms.functional.shapes import same_shape


def discounted_returns(
    rewards: Tensor, mask: Tensor, *, gamma: float, restart: Tensor | None = None
) -> Tensor:
    """Sum the rewards from every decision on.

        G[t] = r[t] + gamma G[next decision of the row],   G[t] = r[t] at its last one and where restart[t]

    Tokens that do not count are skipped: they neither discount nor restart. For trajectories of several rows,
    `unroll` them first.

    Args:
        rewards: [B, T] float; a reward counts at a decision only.
        mask: [B, T] bool, the decisions.
        gamma: discount per decision.
        restart: [B, T] bool, decisions into which nothing flows back from later ones; None for nowhere.

    Returns:
        [B, T] float, units of `rewards`, 0 where masked; no gradient.

    Raises:
        ValueError: if shapes disagree.
    """
    same_shape("mask", mask, "rewards", rewards)
    if restart is not None:
        same_shape("restart", restart, "rewards", rewards)
    values = rewards.detach()
    returns = torch.zeros_like(values)
    ahead = values.new_zeros(len(values))
    for t in _backwards(mask):
        if restart is not None:
            ahead = torch.where(mask[:, t] & restart[:, t], 0.0, ahead)
        ahead = torch.where(mask[:, t], values[:, t] + gamma * ahead, ahead)
        returns[:, t] = ahead
    return torch.where(mask, returns, 0.0)


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    turns: Tensor,
    *,
    gamma_turn: float = 1.0,
    lam_turn: float = 1.0,
    gamma_token: float = 1.0,
    lam_token: float = 1.0,
    last_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation, with a discount of its own between turns.

        delta[t] = r[t] + gamma V[n] - V[t],   A[t] = delta[t] + gamma lam A[n],   return[t] = A[t] + V[t]

    where n is the next decision of the row; gamma and lam are those of the turn where n is in another turn
    than t, and at the last decision, where V[n] is `last_values` and A[n] is 0; else those of the token.
    Tokens that do not count are skipped. For trajectories of several rows, `unroll` them first.

    Args:
        rewards: [B, T] float; a reward counts at a decision only.
        values: [B, T] float, return expected before each token.
        mask: [B, T] bool, the decisions.
        turns: [B, T] int64, turn index of each decision.
        gamma_turn: discount from one turn to the next.
        lam_turn: trust in what follows a turn over the value function.
        gamma_token: discount inside a turn.
        lam_token: likewise.
        last_values: [B] float, return expected after the last token, for rows that a limit cut off and 0 for
            others; None for 0 everywhere.

    Returns:
        Advantages and returns, [B, T] float each, units of `rewards`, 0 where masked; no gradient.

    Raises:
        ValueError: if shapes disagree.

    Source: Schulman et al. 2016, arXiv:1506.02438.
    """
    for name, tensor in (("values", values), ("mask", mask), ("turns", turns)):
        same_shape(name, tensor, "rewards", rewards)
    rewards, values = rewards.detach(), values.detach()
    advantages = torch.zeros_like(values)
    ahead = values.new_zeros(len(values))
    value_ahead = ahead if last_values is None else last_values.detach().to(values)
    turn_ahead = turns.new_full((len(turns),), -1)
    inside = values.new_tensor([[gamma_token], [lam_token]])
    between = values.new_tensor([[gamma_turn], [lam_turn]])
    for t in _backwards(mask):
        here = mask[:, t]
        gamma, lam = torch.where(turns[:, t] == turn_ahead, inside, between)
        delta = rewards[:, t] + gamma * value_ahead - values[:, t]
        ahead = torch.where(here, delta + gamma * lam * ahead, ahead)
        value_ahead = torch.where(here, values[:, t], value_ahead)
        turn_ahead = torch.where(here, turns[:, t], turn_ahead)
        advantages[:, t] = ahead
    return torch.where(mask, advantages, 0.0), torch.where(mask, advantages + values, 0.0)


def overlong_penalty(lengths: Tensor, limit: int, cache: int) -> Tensor:
    """Punish a reply for coming close to the limit.

        0 up to limit - cache tokens;   (limit - cache - length) / cache up to the limit;   -1 beyond

    Args:
        lengths: any shape, in tokens.
        limit: in tokens.
        cache: the last tokens before it, over which the penalty grows.

    Returns:
        The shape of `lengths`, float, reward units.

    Raises:
        ValueError: unless 0 < cache <= limit.

    Source: Yu et al. 2025, arXiv:2503.14476.
    """
    if not 0 < cache <= limit:
        raise ValueError(f"cache is {cache}, wanted above 0 and at most the limit, {limit}")
    return ((limit - cache - lengths) / cache).clamp(-1.0, 0.0)


def _backwards(mask: Tensor) -> list[int]:
    """Positions at which any row has a token that counts, the last one first."""
    positions: list[int] = mask.any(dim=0).nonzero().flatten().flip(0).tolist()
    return positions
