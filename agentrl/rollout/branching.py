"""Branching: the episodes of a task are decided while they are played, by a `BranchPolicy`."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from agentrl.data.trajectory import BranchPoint, Episode, Group
from agentrl.rollout.play import Collection, EpisodeSpec, Fork, Path

if TYPE_CHECKING:
    from agentrl.algorithms.branching import BranchPolicy

BranchRequest = BranchPoint | None


@dataclass(frozen=True, slots=True)
class Start:
    """An episode to be played, and the path on which its progress is recorded."""

    spec: EpisodeSpec
    fork: Fork | None = None
    path: Path = field(default_factory=Path)


class BranchScheduler:
    """Scheduler that starts the episodes of several tasks as their branch policies request.

    Every task gets exactly `episodes` episodes. They are named after the task's template and numbered in the
    order of their start: "train-3-0-0", "train-3-0-1". All share the template's seed. Requests beyond
    `episodes` are ignored. When all episodes of a task have ended and fewer were requested, the rest begin at
    the first observation. So does an episode whose branch point cannot be reached, because the parent was
    aborted or never was there.

    Args:
        templates: One spec per task; their ids must differ.
        policies: The branch policies of the tasks, in the same order.
        episodes: The number of episodes of each task, aborted ones included.
    """

    def __init__(
        self, templates: Sequence[EpisodeSpec], policies: "Sequence[BranchPolicy]", episodes: int
    ) -> None:
        if len(templates) != len(policies):
            raise ValueError(
                f"{len(policies)} branch policies for {len(templates)} tasks, wanted one for each"
            )
        if len({template.id for template in templates}) != len(templates):
            raise ValueError("two of the task templates have the same id")
        if episodes < 1:
            raise ValueError(f"episodes is {episodes}, wanted at least 1 of each task")
        pairs = zip(templates, policies, strict=True)
        self._trees = [_Tree(template, policy, episodes) for template, policy in pairs]
        self._tree_of: dict[str, _Tree] = {}

    @property
    def total(self) -> int:
        """Return the number of episodes of all tasks."""
        return sum(tree.budget for tree in self._trees)

    @property
    def ids(self) -> list[str]:
        """Return the ids of the episodes started so far, by task and then in the order of their start."""
        return [name for tree in self._trees for name in tree.paths]

    def begin(self) -> list[Start]:
        """Return the first episodes of all tasks."""
        return [start for tree in self._trees for start in self._register(tree, tree.begin())]

    def reached(self, episode: str) -> list[Start]:
        """Return the episodes to start when the environment has answered an episode's turn."""
        tree = self._tree_of.get(episode)
        return [] if tree is None else self._register(tree, tree.reached(episode))

    def ended(self, episode: Episode) -> list[Start]:
        """Return the episodes to start when an episode has ended and is not played again."""
        tree = self._tree_of.get(episode.id)
        return [] if tree is None else self._register(tree, tree.ended(episode))

    def branched(self, episode: str) -> bool:
        """Return whether others have branched from an episode, so that its turns must stay as they are."""
        return any(episode in tree.parents for tree in self._trees)

    def revisits(self, episode: str) -> bool:
        """Return whether others may still branch from an episode after it has ended."""
        tree = self._tree_of.get(episode)
        return tree is not None and tree.revisits

    def groups(self, collection: Collection) -> list[Group]:
        """Return the collected episodes of each task as a group."""
        played = {episode.id: episode for episode in collection.episodes}
        return [Group(tree.template.task, tuple(played[name] for name in tree.paths)) for tree in self._trees]

    def _register(self, tree: "_Tree", starts: list[Start]) -> list[Start]:
        self._tree_of.update((start.spec.id, tree) for start in starts)
        return starts


@dataclass(eq=False, slots=True)
class _Tree:
    """The episodes of one task."""

    template: EpisodeSpec
    policy: "BranchPolicy"
    budget: int
    paths: dict[str, Path] = field(default_factory=dict)
    finished: dict[str, Episode] = field(default_factory=dict)
    parents: set[str] = field(default_factory=set)

    @property
    def revisits(self) -> bool:
        return len(self.paths) < self.budget and getattr(self.policy, "revisits", False)

    def begin(self) -> list[Start]:
        return self._start_requested(self.policy.begin())

    def reached(self, episode: str) -> list[Start]:
        path = self.paths[episode]
        return self._start_requested(self.policy.reached(episode, path.parent, tuple(path.turns)))

    def ended(self, episode: Episode) -> list[Start]:
        self.finished[episode.id] = episode
        return self._start_requested(self.policy.ended(episode))

    def _start_requested(self, requests: Sequence[BranchRequest]) -> list[Start]:
        left = self.budget - len(self.paths)
        # With all episodes ended, no later event could request the rest of the budget.
        if not requests and len(self.finished) == len(self.paths):
            requests = [None] * left
        starts = [self._start(request) for request in requests[:left]]
        if len(self.paths) == self.budget:
            self._drop_snapshots()
        return starts

    def _drop_snapshots(self) -> None:
        """Keep no more snapshots: the budget is spent, so that nothing branches any more."""
        for name, path in self.paths.items():
            path.keep = False
            if name in self.finished:
                path.transitions.clear()

    def _start(self, request: BranchRequest) -> Start:
        fork = None
        if request is not None:
            fork = self._fork(request)
            if fork is not None:
                self.parents.add(request.parent)
            elif request.parent in self.paths:  # the first state is shared, as all have the same seed
                request = BranchPoint(request.parent, 0)
            else:
                request = None
        member = len(self.paths)
        spec = replace(self.template, id=f"{self.template.id}-{member}", parent=request, member=member)
        path = self.paths[spec.id] = Path(keep=True)
        return Start(spec, fork, path)

    def _fork(self, point: BranchPoint) -> Fork | None:
        """Return the fork at a branch point; None for the first observation and for an unreachable point."""
        path, ended = self.paths.get(point.parent), self.finished.get(point.parent)
        if path is None or (point.turn, point.token) == (0, 0) or (ended is not None and ended.stop.aborted):
            return None
        # Before its reply, an episode in progress has one state more than it has turns.
        running = ended is None and len(path.transitions) == len(path.turns) + 1
        if not 0 <= point.turn < len(path.turns) + running:
            return None
        reply = path.turns[point.turn].action_ids if point.turn < len(path.turns) else ()
        if not (point.token == 0 or 0 < point.token < len(reply)):
            return None
        turns, transitions = path.turns[: point.turn], path.transitions[: point.turn + 1]
        return Fork(tuple(turns), tuple(transitions), reply[: point.token])


@dataclass(slots=True)
class RetainedParents:
    """Record of the ended episodes whose tokens the player must keep for children that have yet to start.

    Attributes:
        pending_children: The parent of each child that has not taken over its parent's tokens yet.
        retained_parents: The ended episodes that the player has not closed yet.
    """

    pending_children: dict[str, str] = field(default_factory=dict)
    retained_parents: set[str] = field(default_factory=set)

    def release(self, child: str, revisits: Callable[[str], bool]) -> Iterator[str]:
        """Mark a child as no longer pending, and yield the parents that can be closed, removing each.

        Args:
            child: The id of the child.
            revisits: Says whether others may still branch from an ended episode, which then stays open.
        """
        self.pending_children.pop(child, None)
        for parent in sorted(self.retained_parents - set(self.pending_children.values())):
            if not revisits(parent):
                self.retained_parents.remove(parent)
                yield parent
