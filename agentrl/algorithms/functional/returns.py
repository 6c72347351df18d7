"""Credit by token: discounted returns, generalised advantage estimation and the overlong penalty."""

import torch
from torch import Tensor

from agentrl.algorithms.functional.shapes import same_shape

EQUAL_RETURNS = 1e-9  # returns that differ by less count as equal


def discounted_returns(
    rewards: Tensor, mask: Tensor, *, gamma: float, restart: Tensor | None = None
) -> Tensor:
    """Sum the discounted rewards from every action token on.

        G[t] = r[t] + gamma G[next action token],   G[t] = r[t] at the row's last one and where restart[t]

    Masked tokens are skipped: they neither discount nor restart. Use `unroll` first for trajectories of
    several rows.

    Args:
        rewards: [B, T] float; only rewards at action tokens count.
        mask: [B, T] bool, the action tokens.
        gamma: The discount per action token.
        restart: [B, T] bool, action tokens that get nothing from later ones; None for nowhere.

    Returns:
        [B, T] float, units of `rewards`, 0 where masked; no gradient.

    Raises:
        ValueError: If shapes disagree.
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
    """Compute generalised advantage estimates, with a separate discount between turns.

        delta[t] = r[t] + gamma V[n] - V[t],   A[t] = delta[t] + gamma lam A[n],   return[t] = A[t] + V[t]

    where n is the next action token of the row. gamma and lam are those of the turn if n is in another turn
    than t, else those of the token. The last action token uses those of the turn, with `last_values` for V[n]
    and 0 for A[n]. Masked tokens are skipped. Use `unroll` first for trajectories of several rows.

    Args:
        rewards: [B, T] float; only rewards at action tokens count.
        values: [B, T] float, expected return before each token.
        mask: [B, T] bool, the action tokens.
        turns: [B, T] int64, turn index of each action token.
        gamma_turn: The discount from one turn to the next.
        lam_turn: The GAE lambda between turns.
        gamma_token: The discount within a turn.
        lam_token: The GAE lambda within a turn.
        last_values: [B] float, expected return after the last token for truncated rows, 0 for other rows;
            None for 0 everywhere.

    Returns:
        Advantages and returns, [B, T] float each, units of `rewards`, 0 where masked; no gradient.

    Raises:
        ValueError: If shapes disagree.

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
    """Return the penalty of a reply whose length is close to the limit or above it.

        0 up to limit - cache tokens;   (limit - cache - length) / cache up to the limit;   -1 beyond

    Args:
        lengths: Any shape, in tokens.
        limit: The maximum length, in tokens.
        cache: The number of tokens before the limit over which the penalty grows.

    Returns:
        The shape of `lengths`, float, reward units.

    Raises:
        ValueError: Unless 0 < cache <= limit.

    Source: Yu et al. 2025, arXiv:2503.14476.
    """
    if not 0 < cache <= limit:
        raise ValueError(f"cache is {cache}, wanted above 0 and at most the limit, {limit}")
    return ((limit - cache - lengths) / cache).clamp(-1.0, 0.0)


def _backwards(mask: Tensor) -> list[int]:
    """Return the positions at which any row has a token in the mask, last one first."""
    positions: list[int] = mask.any(dim=0).nonzero().flatten().flip(0).tolist()
    return positions
