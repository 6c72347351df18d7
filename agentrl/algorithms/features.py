"""What a batch says about the turns of its trajectories: rewards, anchor states, shared beginnings.

Letters: E trajectories, K turns of the longest, L decisions of the longest; a turn that a trajectory does not
have is 0.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Literal

import torch
from torch import Tensor

from agentrl.algorithms import functional
from agentrl.data.batch import Batch
from agentrl.data.trajectory import BranchPoint
from agentrl.errors import RequirementError

State = Literal["observation", "state_key"]


@dataclass(frozen=True)
class ActionTokens:
    """The decisions of every trajectory in the order in which they were made, whichever rows they are in."""

    index: Tensor  # [E, L] int64, into the flattened tokens of the batch
    valid: Tensor  # [E, L] bool
    turns: Tensor  # [E, L] int64, -1 where not valid
    shape: torch.Size  # of the batch: B, T

    def read(self, values: Tensor) -> Tensor:
        """Take the decisions out of [B, T]; [E, L], 0 where not valid."""
        return torch.where(self.valid, values.flatten()[self.index], 0)

    def write(self, values: Tensor) -> Tensor:
        """Put [E, L] back to where the decisions are; [B, T], 0 elsewhere."""
        flat = torch.zeros(self.shape.numel(), dtype=values.dtype, device=values.device)
        flat[self.index[self.valid]] = values[self.valid]
        return flat.view(self.shape)

    @property
    def first(self) -> Tensor:
        """The first decision of each turn; [E, L] bool."""
        before = torch.nn.functional.pad(self.turns[:, :-1], (1, 0), value=-1)
        return self.valid & (self.turns != before)

    @property
    def last(self) -> Tensor:
        """The last decision of each turn; [E, L] bool."""
        after = torch.nn.functional.pad(self.turns[:, 1:], (0, 1), value=-1)
        return self.valid & (self.turns != after)


def decisions(batch: Batch) -> ActionTokens:
    """Order the decisions of a batch by trajectory, turn and position."""
    index, valid = functional.unroll(batch.sampled, batch.turns, batch.trajectory, len(batch.episodes))
    turns = torch.where(valid, batch.turns.flatten()[index], -1)
    return ActionTokens(index, valid, turns, batch.tokens.shape)


def turn_rewards(batch: Batch) -> Tensor:
    """The reward of every turn; [E, K] float64, in the environment's units."""
    return _table(batch, [[turn.reward for turn in episode.turns] for episode in batch.episodes])


def turn_exists(batch: Batch) -> Tensor:
    """Whether a trajectory has a turn; [E, K] bool."""
    return _table(batch, [[1.0] * len(episode.turns) for episode in batch.episodes]) > 0


def turn_penalties(batch: Batch, penalty: float) -> Tensor:
    """`penalty` at every turn whose action was not understood; [E, K] float64."""
    return penalty * _table(
        batch, [[float(not turn.valid) for turn in episode.turns] for episode in batch.episodes]
    )


def row_scores(batch: Batch, invalid_penalty: float) -> Tensor:
    """The return of the whole episode at each of its turns, as verl-agent scores its rows; [E, K] float64.

    A turn answers for its own penalty only: those of the other turns, `invalid_penalty` each, are given back.
    """
    penalties = turn_penalties(batch, invalid_penalty)
    others = penalties.sum(dim=1, keepdim=True) - penalties
    return torch.where(turn_exists(batch), batch.returns[:, None] + others, 0.0)


def step_rewards(batch: Batch) -> Tensor:
    """The reward of every turn that holds a decision; [E, K] float64, in the environment's units.

    That of a turn without one belongs to the last turn with one before; what comes before the first decision
    of a trajectory is left out.
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
    """Whether a turn of a trajectory holds a decision; [E, K] bool."""
    decided = torch.zeros_like(turn_exists(batch))
    owners = batch.trajectory[:, None].expand_as(batch.turns)
    decided[owners[batch.sampled], batch.turns[batch.sampled]] = True
    return decided


def decision_rewards(batch: Batch) -> Tensor:
    """`step_rewards`, each at the last decision of its turn; [B, T] float64.

    A reply may end in tokens that were forced.
    """
    return at_last_decisions(step_rewards(batch), decisions(batch))


def at_last_decisions(table: Tensor, made: ActionTokens) -> Tensor:
    """Put the value of every turn, [E, K], at the last decision of it; [B, T]."""
    return made.write(torch.where(made.last, table.gather(1, made.turns.clamp(min=0)), 0.0))


def anchor_states(batch: Batch, *, similarity: float = 1.0, state: State = "observation") -> Tensor:
    """Number the states that turns acted in; [E, K] int64, -1 where there is no turn.

    Two turns have the same number if their trajectories are of one group and their states are the same.

    Args:
        batch: whose turns.
        similarity: below 1, states are the same if the ratio of `difflib` between an observation and that
            of the state's first turn is at least this.
        state: the text of the observation, or `info["state_key"]`, in whose place the text stands at turns
            without a key.

    Raises:
        RequirementError: when keys are asked for and no turn has one.
    """
    if state == "state_key" and not bool(has_state_key(batch).any()) and any(e.turns for e in batch.episodes):
        raise RequirementError(
            f"algorithm: states are told apart by info['state_key'], and no turn of "
            f"{batch.episodes[0].env!r} has one; wanted an environment that gives it, or state=observation"
        )
    known: dict[int, dict[object, int]] = {}
    numbers = 0
    rows = []
    for group, episode in zip(batch.groups.tolist(), batch.episodes, strict=True):
        states = known.setdefault(group, {})
        row = []
        for turn in episode.turns:
            key = turn.info.get("state_key") if state == "state_key" else None
            found = turn.observation if key is None else ("key", key)
            if found not in states:
                alike = _similar_state(turn.observation, states, similarity) if similarity < 1 else None
                states[found] = numbers if alike is None else alike
                numbers += alike is None
            row.append(float(states[found]))
        rows.append(row)
    return _table(batch, rows, fill=-1.0).long()


def has_state_key(batch: Batch) -> Tensor:
    """Whether the environment named the state that a turn acted in; [E, K] bool."""
    named = [[turn.info.get("state_key") is not None for turn in item.turns] for item in batch.episodes]
    return _table(batch, named) > 0


def branch_weights(batch: Batch) -> Tensor:
    """One over the number of trajectories of the batch that share a turn; [E, K] float64.

    A trajectory that branched off another holds the other's turns up to there, though they were played once.
    """
    parents = {
        (group, episode.id): episode.parent
        for group, episode in zip(batch.groups.tolist(), batch.episodes, strict=True)
    }
    parents |= batch.aborted
    owners = [
        [(group, _owner(group, episode.id, turn, parents), turn) for turn in range(len(episode.turns))]
        for group, episode in zip(batch.groups.tolist(), batch.episodes, strict=True)
    ]
    counts = Counter(place for row in owners for place in row)
    return _table(batch, [[1 / counts[place] for place in row] for row in owners])


def _similar_state(observation: str, states: dict[object, int], similarity: float) -> int | None:
    """The number of the first known state whose first observation is similar enough."""
    matcher = SequenceMatcher(None, "", observation)
    seen: set[int] = set()
    for state, number in states.items():
        if number in seen:
            continue
        seen.add(number)
        matcher.set_seq1(str(state))
        # The first two are cheap upper bounds of the third.
        bounds = (matcher.real_quick_ratio, matcher.quick_ratio, matcher.ratio)
        if all(bound() >= similarity for bound in bounds):
            return number
    return None


def _owner(group: int, episode: str, turn: int, parents: Mapping[tuple[int, str], BranchPoint | None]) -> str:
    """The id of the episode that played a turn of this one's path."""
    while (parent := parents.get((group, episode))) is not None and turn < parent.turn:
        episode = parent.parent
    return episode


def _table(batch: Batch, rows: Sequence[Sequence[float]], fill: float = 0.0) -> Tensor:
    width = max(map(len, rows), default=0)
    padded = [[*row, *[fill] * (width - len(row))] for row in rows]
    table = torch.tensor(padded, dtype=torch.float64).reshape(len(rows), width)
    return table.to(batch.tokens.device)
