"""Losses that couple the trajectories of a group, split over micro-batches without changing the gradient.

A loss L(s) of the log-probabilities s of whole trajectories cannot be computed from a micro-batch. Its
gradient can: dL/dw = sum_i (dL/ds_i) (ds_i/dw), where the slopes dL/ds_i are taken once for the mini-batch,
at the current policy, and s_i is a sum over tokens, each of which is in one micro-batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from agentrl.algorithms.hooks import Context, GroupTerm, GroupValues, MiniBatch, Outputs, require_tensor


@dataclass(frozen=True)
class GroupSlopes:
    """A group term at the current policy.

    Args:
        term: The term.
        value: Its mean over the groups of the mini-batch, without its coefficient.
        slopes: [B], the derivative of `value` by the log-probability of each action token of a row.
    """

    term: GroupTerm
    value: float
    slopes: Tensor

    def contribution(self, mini: MiniBatch, rows: Tensor, outputs: Outputs) -> Tensor:
        """Return the rows' part of the value; those of all rows add up to it, and to its gradient.

        Args:
            mini: The mini-batch.
            rows: The row numbers.
            outputs: The policy's outputs for these rows, with gradient.
        """
        part = mini.select(rows)
        assert part.current is not None
        mask = part.batch.action_mask
        moved = torch.where(mask, outputs.logprobs - part.current.logprobs, 0.0)
        share = mask.sum().double() / mini.batch.action_mask.sum().clamp(min=1)
        return (self.slopes[rows, None].to(moved) * moved).sum() + self.value * share


def group_slopes(term: GroupTerm, mini: MiniBatch, context: Context) -> GroupSlopes:
    """Evaluate a group term and differentiate it by the log-probability of every trajectory.

    Raises:
        ValueError: If the loss does not return a number.
    """
    batch = mini.batch
    current = require_tensor(None if mini.current is None else mini.current.logprobs, "current")
    count = len(batch.episodes)
    logprobs, tokens = (
        torch.zeros(count, dtype=dtype, device=current.device).index_add_(0, batch.trajectory, values)
        for dtype, values in (
            (torch.float64, torch.where(batch.action_mask, current, 0.0).double().sum(dim=1)),
            (torch.int64, batch.action_mask.sum(dim=1)),
        )
    )
    logprobs.requires_grad_(True)
    losses = []
    with torch.enable_grad():
        for group in sorted(set(batch.groups[tokens > 0].tolist())):
            members = ((batch.groups == group) & (tokens > 0)).nonzero().squeeze(1)
            episodes = tuple(batch.episodes[index] for index in members.tolist())
            loss = term.loss(
                GroupValues(logprobs[members], tokens[members], batch.returns[members], episodes), context
            )
            if loss.dim():
                raise ValueError(
                    f"algorithm.group_terms/{term.name} returned shape {tuple(loss.shape)}, wanted a number"
                )
            losses.append(loss)
        total = torch.stack(losses).mean() if losses else logprobs.sum() * 0
        (slopes,) = torch.autograd.grad(total + 0 * logprobs.sum(), logprobs)
    return GroupSlopes(term, float(total.detach()), slopes[batch.trajectory])
