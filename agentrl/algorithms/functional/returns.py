"""Credit by token: discounted returns, generalised advantage estimation and the overlong penalty."""

from dataclasses import dataclass

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


@dataclass(frozen=True)
class Hierarchical:
    """Advantages of the three decisions of a turn, [E, K] float each, in reward units."""

    action: Tensor
    subgoal: Tensor  # 0 where no segment begins
    switch: Tensor


def hierarchical_gae(
    rewards: Tensor,
    values: Hierarchical,
    present: Tensor,
    boundary: Tensor,
    *,
    gamma: float,
    lam: float,
    lam_segment: float,
    last_values: Tensor | None = None,
) -> Hierarchical:
    """Estimate the advantages of actions in a segment, of segments, and of ending one (HiPER).

        G[t]        = r[t] + gamma G[t + 1],
                      where the segment's last turn has V_subgoal(next boundary) ahead
        A_action[t] = r[t] + gamma V_action[t + 1] - V_action[t] + gamma lam A_action[t + 1],
                      where the segment's last turn has V_subgoal(next boundary) ahead, and advantage 0
        A_subgoal   = G - V_subgoal + gamma^d lam_segment A_subgoal(next boundary),   at a boundary
        A_switch    = G - V_switch

    A segment of d turns begins at a boundary. After the last turn, values are `last_values`.

    Args:
        rewards: [E, K] float.
        values: The expected returns before the action, before the subgoal and before the switch.
        present: [E, K] bool, the turns of each trajectory; other turns are skipped.
        boundary: [E, K] bool, the turns that begin a segment. The first turn does in any case.
        gamma: The discount from one turn to the next.
        lam: The GAE lambda from one turn to the next of a segment.
        lam_segment: The GAE lambda from one segment to the next.
        last_values: [E] float, expected return after the last turn; None for 0.

    Returns:
        The advantages, 0 where not present; no gradient. Each plus its value is the return to regress on.

    Raises:
        ValueError: If shapes disagree.

    Source: arXiv:2602.16165.
    """
    for name, tensor in (("present", present), ("boundary", boundary), ("values", values.action)):
        same_shape(name, tensor, "rewards", rewards)
    zeros = rewards.new_zeros(len(rewards))
    next_start = zeros if last_values is None else last_values.detach().to(rewards)
    value_ahead = action_ahead = return_ahead = subgoal_ahead = zeros
    discount, ends = torch.ones_like(zeros), torch.ones_like(present[:, :1]).flatten().bool()
    found = [torch.zeros_like(rewards) for _ in range(3)]
    before = present.cumsum(1) - present.long()
    starts = present & (boundary | (before == 0))
    for t in _backwards(present):
        here, begins = present[:, t], starts[:, t]
        low, high, term = (each[:, t].detach() for each in (values.action, values.subgoal, values.switch))
        action = rewards[:, t] + gamma * torch.where(ends, next_start, value_ahead) - low
        action = action + gamma * lam * torch.where(ends, 0.0, action_ahead)
        gained = rewards[:, t] + gamma * torch.where(ends, next_start, return_ahead)
        span = gamma * torch.where(ends, 1.0, discount)
        subgoal = gained - high + span * lam_segment * subgoal_ahead
        for out, value, counted in zip(
            found, (action, subgoal, gained - term), (here, begins, here), strict=True
        ):
            out[:, t] = torch.where(counted, value, 0.0)
        value_ahead, action_ahead = (
            torch.where(here, low, value_ahead),
            torch.where(here, action, action_ahead),
        )
        return_ahead, discount = torch.where(here, gained, return_ahead), torch.where(here, span, discount)
        next_start = torch.where(begins, high, next_start)
        subgoal_ahead = torch.where(begins, subgoal, subgoal_ahead)
        ends = torch.where(here, begins, ends)
    return Hierarchical(*found)


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
