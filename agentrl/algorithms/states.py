"""States of turns: which turns acted in the same one, how they follow each other, how often they occur."""

from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from hashlib import blake2b
from itertools import pairwise
from typing import Annotated, Any, Literal

import torch
from annotated_types import Interval
from torch import Tensor

from agentrl.algorithms.features import played_turns, turn_exists, turn_table
from agentrl.algorithms.hooks import Context, MiniBatch, requires
from agentrl.algorithms.named_features import feature, feature_of
from agentrl.config import PositiveShare
from agentrl.data.batch import Batch
from agentrl.data.trajectory import Episode, Turn
from agentrl.errors import CheckpointError, RequirementError

State = Literal["observation", "state_key"]
# What makes two states the same: the text of the observation, the environment's `info["state_key"]`, or, as a
# number, a `difflib` ratio of the observations of at least that.
By = State | PositiveShare
SUCCESS = -1  # the node of a graph that the last turn of a successful episode leads to


@feature("states")
def states(batch: Batch, by: By = "observation") -> Tensor:
    """Assign a number to the state of each turn; [E, K] int64, -1 where there is no turn.

    Two turns get the same number if their trajectories belong to one group and their states are the same.
    With a ratio, an observation is compared with that of a state's first turn. Turns without a key use the
    text.

    Raises:
        RequirementError: If keys are asked for and no turn has one.
    """
    return turn_table(batch, _numbered_states(batch, by), fill=-1.0).long()


@feature("history_states")
@requires("states")
def history_states(batch: Batch, k: Annotated[int, Interval(ge=0, le=1000)]) -> Tensor:
    """Assign a number to the last k + 1 states up to each turn; [E, K] int64, -1 where there is no turn.

    Near the start of an episode there are fewer. Two turns get the same number if these states are the same,
    one by one. With k = 0 the turns are compared as by `states`.

    Source: HGPO, arXiv:2602.22817.
    """
    numbers: dict[tuple[int, ...], int] = {}
    rows = [
        [
            numbers.setdefault(tuple(row[max(0, turn - k) : turn + 1]), len(numbers))
            for turn in range(len(episode.turns))
        ]
        for row, episode in zip(feature_of(batch, "states").tolist(), batch.episodes, strict=True)
    ]
    return turn_table(batch, rows, fill=-1.0).long()


@feature("state_visits")
@requires("states")
def state_visits(batch: Batch) -> Tensor:
    """Return how often a trajectory has been in the state of a turn, this turn included; [E, K] int64."""
    found = feature_of(batch, "states")
    earlier = torch.ones(found.shape[1], found.shape[1], device=found.device).tril().bool()
    visits = ((found[:, :, None] == found[:, None, :]) & earlier).sum(dim=2)
    return torch.where(turn_exists(batch), visits, 0)


@dataclass(frozen=True)
class StateGraph:
    """Turns of a group as the edges of a directed graph between states.

    Args:
        edges: The states that a turn led to, by the state that it was played in. The last turn of a
            successful episode leads to `SUCCESS`.
    """

    edges: Mapping[int, frozenset[int]]

    def distances(self) -> dict[int, int]:
        """Return the least number of turns to success by state, without the states that lead to none."""
        sources: dict[int, set[int]] = {}
        for state, following in self.edges.items():
            for other in following:
                sources.setdefault(other, set()).add(state)
        found, queue = {SUCCESS: 0}, deque([SUCCESS])
        while queue:
            node = queue.popleft()
            for state in sorted(sources.get(node, set()) - found.keys()):
                found[state] = found[node] + 1
                queue.append(state)
        return found


def state_graphs(batch: Batch, by: By = "observation") -> tuple[list[list[int]], dict[int, StateGraph]]:
    """Return the nodes along each trajectory, one more than turns, and the graph of each group by number."""
    paths = _numbered_states(batch, by, final=True)
    edges: dict[int, dict[int, set[int]]] = {group: {} for group in batch.groups.tolist()}
    for group, episode, path in zip(batch.groups.tolist(), batch.episodes, paths, strict=True):
        if episode.success:
            path[-1] = SUCCESS
        for state, other in pairwise(path):
            edges[group].setdefault(state, set()).add(other)
    return paths, {
        group: StateGraph({state: frozenset(others) for state, others in found.items()})
        for group, found in edges.items()
    }


@feature("success_distance")
def success_distance(batch: Batch, by: By = "observation") -> Tensor:
    """Return the least number of turns from each state to success; [E, K + 1] int64.

    Column k is the state in which turn k was played, and the column after a trajectory's last turn the state
    that this turn led to. The turns of all episodes of the group count. A state that led to no success has
    the largest distance of its group plus 1. Beyond the trajectory it is -1.

    Source: GraphGPO, arXiv:2605.26684.
    """
    paths, graphs = state_graphs(batch, by)
    distances = {group: graph.distances() for group, graph in graphs.items()}
    rows = [
        [distances[group].get(state, max(distances[group].values()) + 1) for state in path]
        for group, path in zip(batch.groups.tolist(), paths, strict=True)
    ]
    return turn_table(batch, rows, fill=-1.0, extra=1).long()


def has_state_key(batch: Batch) -> Tensor:
    """Return whether the environment gave the state of a turn a key; [E, K] bool."""
    named = [[turn.info.get("state_key") is not None for turn in item.turns] for item in batch.episodes]
    return turn_table(batch, named) > 0


class VisitCounts:
    """Numbers of turns of earlier steps that were played in each state: a `Stateful` component.

    A method keeps one in an attribute of the object whose method is its hook, or passes it to its hook by
    `functools.partial`; it is then updated after each step and is part of the checkpoint. Turns that several
    branches share count once. Episodes that are not learned from are not counted.

    Args:
        name: The key of the counts in a checkpoint.
        by: What identifies a state.
        final: Whether the state after the last turn counts too.
        normalised: Whether observations that differ in case and white space alone are the same state.
    """

    def __init__(
        self,
        name: str = "visits",
        by: State = "observation",
        *,
        final: bool = False,
        normalised: bool = False,
    ) -> None:
        self.name = name
        self.by = by
        self.final = final
        self.normalised = normalised
        self._counts: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._counts)

    def visits(self, episode: Episode) -> list[int]:
        """Return for each turn how often its state was counted in earlier steps; then the final state."""
        return [self._counts[key] for key in self.keys(episode)]

    def keys(self, episode: Episode) -> list[str]:
        """Return the hash of each turn's state, and of the final one if it counts."""
        # A hash, so that a checkpoint does not hold the texts.
        return [
            blake2b(repr(self._simplified(state)).encode(), digest_size=8).hexdigest()
            for state, _ in _visited(episode, self.by, final=self.final)
        ]

    def update(self, rollout: MiniBatch, context: Context) -> None:
        """Count the turns of a rollout batch."""
        played = {
            place: key
            for episode, places in zip(rollout.batch.episodes, self._places(rollout.batch), strict=True)
            for key, place in zip(self.keys(episode), places, strict=True)
        }
        self._counts.update(played.values())

    def _places(self, batch: Batch) -> list[list[tuple[int, str, int]]]:
        """Return what tells the counted states of a batch apart: equal for a turn that branches share."""
        ends = zip(batch.groups.tolist(), batch.episodes, played_turns(batch), strict=True)
        return [
            [*places, *[(group, episode.id, len(places))] * self.final] for group, episode, places in ends
        ]

    def state_dict(self) -> dict[str, Any]:
        """Return the counts."""
        return {"by": self.by, "counts": dict(self._counts)}

    def load_state_dict(self, state: Mapping[str, Any], context: Context) -> None:
        """Restore the counts.

        Raises:
            CheckpointError: If they are of states that were identified otherwise.
        """
        if state["by"] != self.by:
            raise CheckpointError(f"{self.name} counted states by {state['by']}, wanted by {self.by}")
        self._counts = Counter(state["counts"])

    def _simplified(self, state: object) -> object:
        return normalise(state) if self.normalised and isinstance(state, str) else state


def normalise(observation: str) -> str:
    """Return an observation in lower case, with single spaces.

    >>> normalise("You see:  a Mug 1. ")
    'you see: a mug 1.'
    """
    return " ".join(observation.casefold().split())


def _identity(turn: Turn, by: By) -> object:
    key = turn.info.get("state_key") if by == "state_key" else None
    return turn.observation if key is None else ("key", key)


def _numbered_states(batch: Batch, by: By, *, final: bool = False) -> list[list[int]]:
    """Return the number of each turn's state and, if `final`, of the state after the last turn."""
    if by == "state_key" and not bool(has_state_key(batch).any()) and any(e.turns for e in batch.episodes):
        raise RequirementError(
            f"algorithm: states are identified by info['state_key'], but no turn of "
            f"{batch.episodes[0].env!r} has one; wanted an environment that sets it, or state=observation"
        )
    similarity = 1.0 if isinstance(by, str) else by
    known: dict[int, dict[object, int]] = {}
    numbers = 0
    rows = []
    for group, episode in zip(batch.groups.tolist(), batch.episodes, strict=True):
        found = known.setdefault(group, {})
        row = []
        for state, observation in _visited(episode, by, final=final):
            if state not in found:
                alike = _similar_state(observation, found, similarity) if similarity < 1 else None
                found[state] = numbers if alike is None else alike
                numbers += alike is None
            row.append(found[state])
        rows.append(row)
    return rows


def _visited(episode: Episode, by: By, *, final: bool) -> Iterator[tuple[object, str]]:
    """Yield the states of an episode in order, each with its observation."""
    for turn in episode.turns:
        yield _identity(turn, by), turn.observation
    if final:
        yield episode.final_observation, episode.final_observation


def _similar_state(observation: str, states: dict[object, int], similarity: float) -> int | None:
    """Return the number of the first known state whose first observation is similar enough, or None."""
    matcher = SequenceMatcher(None, "", observation)
    seen: set[int] = set()
    for state, number in states.items():
        if number in seen:
            continue
        seen.add(number)
        matcher.set_seq1(str(state))
        # The first two are cheap upper bounds of the last.
        bounds = (matcher.real_quick_ratio, matcher.quick_ratio, matcher.ratio)
        if all(bound() >= similarity for bound in bounds):
            return number
    return None
