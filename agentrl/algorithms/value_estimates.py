"""Generalised advantage estimates over the tokens of trajectories, over turns, or within rows."""

import torch
from torch import Tensor

from agentrl.algorithms import functional
from agentrl.algorithms.features import (
    decision_rewards,
    decisions,
    has_decision,
    row_scores,
    step_rewards,
    turns_to_tokens,
)
from agentrl.algorithms.hooks import require_tensor
from agentrl.data.batch import Batch
from agentrl.data.trajectory import StopReason

_CUT_OFF = {StopReason.TRUNCATED, StopReason.TURN_LIMIT, StopReason.CONTEXT_LIMIT}


def trajectory_gae(batch: Batch, *, gamma: float, lam: float, bootstrap: bool) -> tuple[Tensor, Tensor]:
    """Estimate advantages and returns over the action tokens of trajectories, [B, T] each.

    Discounts apply between turns.
    """
    made = decisions(batch)
    estimates = functional.gae(
        made.read(decision_rewards(batch)),
        made.read(require_tensor(batch.values, "values").double()),
        made.valid,
        made.turns,
        gamma_turn=gamma,
        lam_turn=lam,
        last_values=truncation_values(batch) if bootstrap else None,
    )
    return made.write(estimates[0]), made.write(estimates[1])


def turn_gae(batch: Batch, *, gamma: float, lam: float, bootstrap: bool) -> tuple[Tensor, Tensor]:
    """Estimate advantages and returns over turns, each valued at its first action token; [B, T] each.

    The action tokens of a turn share its advantage, and its return is their value target.
    """
    made, rewards = decisions(batch), step_rewards(batch)
    values = torch.zeros_like(rewards)
    owners = torch.arange(len(rewards), device=rewards.device)[:, None].expand_as(made.turns)
    values[owners[made.first], made.turns[made.first]] = made.read(
        require_tensor(batch.values, "values").double()
    )[made.first]
    estimates = functional.gae(
        rewards,
        values,
        has_decision(batch),
        torch.arange(rewards.shape[1], device=rewards.device).expand_as(rewards),
        gamma_turn=gamma,
        lam_turn=lam,
        last_values=truncation_values(batch) if bootstrap else None,
    )
    advantages, returns = (turns_to_tokens(table, batch) for table in estimates)
    return advantages, returns


def row_gae(batch: Batch, *, invalid_penalty: float) -> tuple[Tensor, Tensor]:
    """Return `row_scores` less the value of each action token, and the scores; [B, T] each.

    This is GAE without discounts over the action tokens of a turn, where the score is the reward of the last
    one.
    """
    scores = turns_to_tokens(row_scores(batch, invalid_penalty), batch)
    return torch.where(batch.action_mask, scores - require_tensor(batch.values, "values"), 0.0), scores


def truncation_values(batch: Batch) -> Tensor | None:
    """Return the value after the last token of truncated episodes, 0 for other episodes; [E], or None."""
    cut = torch.tensor([episode.stop in _CUT_OFF for episode in batch.episodes], device=batch.tokens.device)
    if not bool(cut.any()):
        return None
    return torch.where(cut, require_tensor(batch.last_values, "last_values"), 0.0)
