"""Replies that plan (`policy.reply=subgoal_action`): their parts by token, their segments, their values.

A reply of another format is an action as a whole, and keeps the subgoal. E, K and L are those of `features`.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from agentrl.algorithms import functional
from agentrl.algorithms.features import (
    ActionTokens,
    decisions,
    has_decision,
    reply_positions,
    step_rewards,
    turn_table,
)
from agentrl.algorithms.functional import Hierarchical
from agentrl.algorithms.hooks import require_tensor
from agentrl.algorithms.value_estimates import truncation_values
from agentrl.data.batch import Batch
from agentrl.data.trajectory import Episode, Turn

Part = Literal["switch", "subgoal", "action"]


def plan_of(turn: Turn) -> Mapping[str, Any]:
    """Return the parts of a reply, see `agentrl.policy.reply_parts`; empty for one of another format."""
    found: Mapping[str, Any] = turn.info.get("parts", {})
    return found


def part_tokens(batch: Batch, part: Part) -> Tensor:
    """Mark the action tokens of one part of the replies; [B, T] bool."""
    spans = [[_span(turn, part) for turn in episode.turns] for episode in batch.episodes]
    positions, owners = reply_positions(batch), batch.trajectory[:, None].expand_as(batch.turns)
    start, stop = (
        turn_table(batch, [[float(span[edge]) for span in row] for row in spans])[
            owners, batch.turns.clamp(min=0)
        ]
        for edge in (0, 1)
    )
    return batch.action_mask & (positions >= start) & (positions < stop)


def _span(turn: Turn, part: Part) -> tuple[int, int]:
    whole = (0, len(turn.action_ids)) if part == "action" else (0, 0)
    start, stop = plan_of(turn).get(part, whole)
    return start, stop


def starts_of(episode: Episode) -> list[bool]:
    """Return for each turn whether a segment begins: the first with a decision, and those that switch."""
    starts, begun = [], False
    for turn in episode.turns:
        decides = any(turn.action_mask)
        starts.append(decides and (not begun or bool(plan_of(turn).get("switched"))))
        begun = begun or decides
    return starts


def segment_starts(batch: Batch) -> Tensor:
    """Return the turns in which a segment begins; [E, K] bool."""
    return turn_table(batch, [list(map(float, starts_of(episode))) for episode in batch.episodes]) > 0


def value_places(batch: Batch) -> tuple[ActionTokens, Tensor, Tensor]:
    """Return the decisions, and those before which a value is read: the first of a reply, and of its action.

    An action without a decision has the last decision of its reply.

    Returns:
        The decisions, and [E, L] bool twice.
    """
    made = decisions(batch)
    acts = made.read(part_tokens(batch, "action")).bool()
    follows = torch.nn.functional.pad(acts[:, :-1], (1, 0)) if acts.numel() else acts
    begins = acts & (made.first | ~follows)
    width = int(made.turns.max()) + 1 if made.turns.numel() else 0
    found = torch.zeros(len(acts), width, dtype=torch.bool, device=acts.device)
    owners = torch.arange(len(acts), device=acts.device)[:, None].expand_as(made.turns)
    found[owners[begins], made.turns[begins]] = True
    silent = made.valid & ~found.gather(1, made.turns.clamp(min=0)) if width else begins
    return made, made.first, begins | (silent & made.last)


def plan_estimates(
    batch: Batch, *, gamma: float, lam: float, lam_segment: float, bootstrap: bool
) -> tuple[Hierarchical, Tensor]:
    """Return `functional.hierarchical_gae` of every turn, [E, K], and the value targets, [B, T].

    There is one value head. Before the first token of a reply it stands for V_subgoal and V_switch. Its
    target is the return of the segment's beginning where one begins, else that of the switch. Before the
    first token of the action it stands for V_action. Where both are the same token, the target is that of the
    action.
    """
    made, first, begins = value_places(batch)
    rewards, starts = step_rewards(batch), segment_starts(batch)
    values = made.read(require_tensor(batch.values, "values").double())
    opening, acting = (_by_turn(values, mark, made, rewards) for mark in (first, begins))
    found = functional.hierarchical_gae(
        rewards,
        Hierarchical(acting, opening, opening),
        has_decision(batch),
        starts,
        gamma=gamma,
        lam=lam,
        lam_segment=lam_segment,
        last_values=truncation_values(batch) if bootstrap else None,
    )
    at_first = torch.where(starts, found.subgoal, found.switch) + opening
    targets = torch.where(
        begins, _by_token(found.action + acting, made), torch.where(first, _by_token(at_first, made), 0.0)
    )
    return found, made.write(targets)


def _by_turn(values: Tensor, mark: Tensor, made: ActionTokens, like: Tensor) -> Tensor:
    """Return the values at the one marked decision of each turn; [E, K]."""
    table = torch.zeros_like(like)
    owners = torch.arange(len(like), device=like.device)[:, None].expand_as(made.turns)
    table[owners[mark], made.turns[mark]] = values[mark]
    return table


def _by_token(table: Tensor, made: ActionTokens) -> Tensor:
    """Return the value of the turn of each decision; [E, L]."""
    if not table.numel():
        return torch.zeros(made.turns.shape, dtype=table.dtype, device=table.device)
    return table.gather(1, made.turns.clamp(min=0))
