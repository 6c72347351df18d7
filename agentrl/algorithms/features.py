"""Features of a batch by turn: rewards, action tokens, turns that branches share.

Letters: E trajectories, K turns of the longest one, L action tokens of the longest one. Tables hold 0 for
turns that a trajectory does not have.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from agentrl.algorithms import functional
from agentrl.algorithms.branching import AnchorUnit, point_scores
from agentrl.algorithms.named_features import feature
from agentrl.data.batch import Batch
from agentrl.data.trajectory import BranchPoint, Turn


@dataclass(frozen=True)
class ActionTokens:
    """Action tokens of every trajectory in the order of sampling, whichever rows they are in."""

    index: Tensor  # [E, L] int64, into the batch's flattened tokens
    valid: Tensor  # [E, L] bool
    turns: Tensor  # [E, L] int64, -1 where not valid
    shape: torch.Size  # of the batch: B, T

    def read(self, values: Tensor) -> Tensor:
        """Gather the values of action tokens from [B, T]; [E, L], 0 where not valid."""
        return torch.where(self.valid, values.flatten()[self.index], 0)

    def write(self, values: Tensor) -> Tensor:
        """Scatter [E, L] back to the positions of the action tokens; [B, T], 0 elsewhere."""
        flat = torch.zeros(self.shape.numel(), dtype=values.dtype, device=values.device)
        flat[self.index[self.valid]] = values[self.valid]
        return flat.view(self.shape)

    @property
    def first(self) -> Tensor:
        """Mark the first action token of each turn; [E, L] bool."""
        before = torch.nn.functional.pad(self.turns[:, :-1], (1, 0), value=-1)
        return self.valid & (self.turns != before)

    @property
    def last(self) -> Tensor:
        """Mark the last action token of each turn; [E, L] bool."""
        after = torch.nn.functional.pad(self.turns[:, 1:], (0, 1), value=-1)
        return self.valid & (self.turns != after)


def decisions(batch: Batch) -> ActionTokens:
    """Order the action tokens of a batch by trajectory, turn and position."""
    index, valid = functional.unroll(batch.action_mask, batch.turns, batch.trajectory, len(batch.episodes))
    turns = torch.where(valid, batch.turns.flatten()[index], -1)
    return ActionTokens(index, valid, turns, batch.tokens.shape)


def reply_positions(batch: Batch) -> Tensor:
    """Return the index of every reply token in its reply, forced tokens included; [B, T] int64, else -1."""
    places = torch.arange(batch.tokens.shape[1], device=batch.tokens.device).expand_as(batch.turns)
    if not batch.turns.numel():
        return places
    begins = torch.ones_like(batch.action_mask)
    begins[:, 1:] = batch.turns[:, 1:] != batch.turns[:, :-1]
    start = torch.where(begins, places, 0).cummax(1).values
    return torch.where(batch.turns >= 0, places - start, -1)


def thought_tokens(batch: Batch) -> Tensor:
    """Mark the action tokens of reasoning before a choice among actions; [B, T] bool.

    A reply that is not such a choice has none, since its text is not split. The batch is whole.
    """
    made = decisions(batch)
    flags = torch.zeros(made.valid.shape, dtype=torch.bool)
    for owner, episode in enumerate(batch.episodes):
        found = [thought for turn in episode.turns for thought in thoughts_of(turn)]
        flags[owner, : len(found)] = torch.tensor(found, dtype=torch.bool)
    return made.write(flags.to(batch.tokens.device))


def thoughts_of(turn: Turn) -> list[bool]:
    """Return for each action token of a turn whether it is reasoning before a choice."""
    allowed = turn.allowed or ()
    return [ids is None for ids, own in zip(allowed, turn.action_mask, strict=False) if own] or (
        [False] * sum(turn.action_mask)
    )


def highest_tokens(values: Tensor, candidates: Tensor, count: int, batch: Batch) -> Tensor:
    """Mark the candidates with the highest values; [B, T] bool.

    Ties, also up to rounding, go to the earlier trajectory, turn and token, whichever rows they are in.

    Args:
        values: [B, T] float.
        candidates: [B, T] bool.
        count: How many are marked, or all candidates if there are fewer.
        batch: The rows.
    """
    index, valid = functional.unroll(candidates, batch.turns, batch.trajectory, len(batch.episodes))
    places = index[valid]
    rounded = values.flatten()[places].double().round(decimals=9)
    chosen = torch.zeros_like(candidates).flatten()
    chosen[places[rounded.argsort(stable=True, descending=True)[:count]]] = True
    return chosen.view_as(candidates)


def share_of(count: int, share: float) -> int:
    """Return max(1, floor(share * count)), where a share of 0.29 of 100 is 29 despite rounding."""
    return max(1, int(round(share * count, 9)))


def turn_rewards(batch: Batch) -> Tensor:
    """Return the reward of every turn; [E, K] float64, in the environment's units."""
    return turn_table(batch, [[turn.reward for turn in episode.turns] for episode in batch.episodes])


def turn_exists(batch: Batch) -> Tensor:
    """Return whether a trajectory has a turn; [E, K] bool."""
    return turn_table(batch, [[1.0] * len(episode.turns) for episode in batch.episodes]) > 0


def turn_penalties(batch: Batch, penalty: float) -> Tensor:
    """Return `penalty` at every turn with an invalid action, 0 elsewhere; [E, K] float64."""
    return penalty * turn_table(
        batch, [[float(not turn.valid) for turn in episode.turns] for episode in batch.episodes]
    )


def row_scores(batch: Batch, invalid_penalty: float) -> Tensor:
    """Return the return of the whole episode at each of its turns, as verl-agent scores rows; [E, K] float64.

    A turn is charged its own penalty only: the penalties of the other turns, `invalid_penalty` each, are
    added back.
    """
    penalties = turn_penalties(batch, invalid_penalty)
    others = penalties.sum(dim=1, keepdim=True) - penalties
    return torch.where(turn_exists(batch), batch.returns[:, None] + others, 0.0)


def step_rewards(batch: Batch) -> Tensor:
    """Return the reward of every turn that has an action token; [E, K] float64, in the environment's units.

    The reward of a turn without action tokens goes to the last earlier turn that has one. Rewards before the
    first action token of a trajectory are dropped.
    """
    rewards, decided = turn_rewards(batch), has_decision(batch)
    out = torch.zeros_like(rewards)
    carried = rewards.new_zeros(len(rewards))
    for turn in reversed(range(rewards.shape[1])):
        carried = carried + rewards[:, turn]
        out[:, turn] = torch.where(decided[:, turn], carried, 0.0)
        carried = torch.where(decided[:, turn], 0.0, carried)
    return out


def has_decision(batch: Batch) -> Tensor:
    """Return whether a turn of a trajectory has an action token; [E, K] bool."""
    decided = torch.zeros_like(turn_exists(batch))
    owners = batch.trajectory[:, None].expand_as(batch.turns)
    decided[owners[batch.action_mask], batch.turns[batch.action_mask]] = True
    return decided


def decision_rewards(batch: Batch) -> Tensor:
    """Place `step_rewards` at the last action token of each turn; [B, T] float64.

    This is not always the last token of the reply, because a reply may end in forced tokens.
    """
    return at_last_decisions(step_rewards(batch), decisions(batch))


def turns_to_tokens(table: Tensor, batch: Batch) -> Tensor:
    """Give every action token the value of its turn, from [E, K]; [B, T], 0 elsewhere."""
    return functional.broadcast_turns_to_tokens(table, batch.turns, batch.trajectory, batch.action_mask)


def at_last_decisions(table: Tensor, made: ActionTokens) -> Tensor:
    """Place the values of turns, [E, K], at the last action token of each turn; [B, T]."""
    return made.write(torch.where(made.last, table.gather(1, made.turns.clamp(min=0)), 0.0))


@feature("branch_weights")
def branch_weights(batch: Batch) -> Tensor:
    """Return one over the number of trajectories of the batch that share a turn; [E, K] float64.

    A trajectory that branched off another one holds that trajectory's turns up to the branch point, although
    they were played only once.
    """
    owners = played_turns(batch)
    counts = Counter(place for row in owners for place in row)
    return turn_table(batch, [[1 / counts[place] for place in row] for row in owners])


def played_turns(batch: Batch) -> list[list[tuple[int, str, int]]]:
    """Return the group, episode and index under which each turn was played; equal for a shared turn."""
    parents = {
        (group, episode.id): episode.parent
        for group, episode in zip(batch.groups.tolist(), batch.episodes, strict=True)
    }
    parents |= batch.aborted
    return [
        [(group, _owner(group, episode.id, turn, parents), turn) for turn in range(len(episode.turns))]
        for group, episode in zip(batch.groups.tolist(), batch.episodes, strict=True)
    ]


@dataclass(frozen=True)
class BranchStates:
    """States in which the branches of a batch start, in order along each base episode.

    Args:
        points: S branch points, each with the group that it belongs to.
        bases: [S] int64, equal for states of one base.
        member: [E] int64, the state in which each trajectory starts, -1 for a trajectory that is not a
            branch.
    """

    points: tuple[tuple[int, BranchPoint], ...]
    bases: Tensor
    member: Tensor

    def of_trajectories(self, values: Tensor) -> Tensor:
        """Return the value of the state in which each trajectory starts, from [S]; [E], 0 without a state."""
        # The appended 0 is the value at index -1.
        return torch.cat([values, values.new_zeros(1)])[self.member]


def branch_states(batch: Batch) -> BranchStates:
    """Return the states in which branches start; the order of rows and episodes does not matter."""
    device = batch.tokens.device
    found = [
        None if (point := episode.parent) is None else (group, point.parent, point.turn, point.token)
        for group, episode in zip(batch.groups.tolist(), batch.episodes, strict=True)
    ]
    keys = sorted({key for key in found if key is not None})
    number = {key: index for index, key in enumerate(keys)}
    lines = {line: index for index, line in enumerate(dict.fromkeys(key[:2] for key in keys))}
    return BranchStates(
        tuple((group, BranchPoint(base, turn, token)) for group, base, turn, token in keys),
        torch.tensor([lines[key[:2]] for key in keys], dtype=torch.int64, device=device),
        torch.tensor([-1 if key is None else number[key] for key in found], dtype=torch.int64, device=device),
    )


def anchor_entropies(batch: Batch, states: BranchStates, unit: AnchorUnit) -> list[float]:
    """Return the entropies in nats at the points of `states`, as far as the batch has their bases."""
    scores = {
        (group, episode.id): point_scores(episode, unit, "entropy")
        for group, episode in zip(batch.groups.tolist(), batch.episodes, strict=True)
        if episode.parent is None
    }
    found = [scores.get((group, at.parent), {}).get((at.turn, at.token)) for group, at in states.points]
    return [entropy for entropy in found if entropy is not None]


def tokens_after_branching(batch: Batch) -> Tensor:
    """Mark the action tokens of branches after their branch point; [B, T] bool, nothing of a base."""
    branch = torch.tensor([episode.parent is not None for episode in batch.episodes], dtype=torch.bool)
    return own_tokens(batch) & branch.to(batch.tokens.device)[batch.trajectory][:, None]


def own_tokens(batch: Batch) -> Tensor:
    """Mark the action tokens that each trajectory sampled itself, after its branch point; [B, T] bool.

    In the turn in which a branch begins, the tokens that it took over are no action tokens.
    """
    turns = [0 if episode.parent is None else episode.parent.turn for episode in batch.episodes]
    first = torch.tensor(turns, dtype=torch.int64, device=batch.tokens.device)
    return batch.action_mask & (batch.turns >= first[batch.trajectory][:, None])


def _owner(group: int, episode: str, turn: int, parents: Mapping[tuple[int, str], BranchPoint | None]) -> str:
    """Return the id of the episode in which a turn of this episode's path was played."""
    while (parent := parents.get((group, episode))) is not None and turn < parent.turn:
        episode = parent.parent
    return episode


def turn_table(batch: Batch, rows: Sequence[Sequence[float]], fill: float = 0.0, *, extra: int = 0) -> Tensor:
    """Pad one number per turn and trajectory to [E, K + extra] float64."""
    width = max((len(episode.turns) for episode in batch.episodes), default=0) + extra
    padded = [[*row, *[fill] * (width - len(row))] for row in rows]
    table = torch.tensor(padded, dtype=torch.float64).reshape(len(rows), width)
    return table.to(batch.tokens.device)
