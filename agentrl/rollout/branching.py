"""Branching: which episodes a task gets is decided while they are played."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from agentrl.data.trajectory import BranchPoint, Episode, Group
from agentrl.rollout.play import EpisodeSpec, Fork, Path

if TYPE_CHECKING:
    from agentrl.algorithms.algorithm import BranchPolicy
    from agentrl.rollout.collector import Collection

BranchRequest = BranchPoint | None


@dataclass(frozen=True, slots=True)
class Start:
    """An episode that is to be played, and where to note how far it has come."""

    spec: EpisodeSpec
    fork: Fork | None = None
    path: Path = field(default_factory=Path)


class BranchScheduler:
    """Starts the episodes of several tasks as their policies request, exactly `episodes` of each.

    They are named after the task's template and numbered as they are started: "train-3-0-0", "train-3-0-1".
    All share the template's seed. What is wished beyond `episodes` is left out; when all episodes of a task
    have ended and some are left, these begin at the first observation. So does an episode that cannot leave
    its parent where it is meant to, because that was aborted, or never was there.

    Args:
        templates: one per task; ids must differ.
        policies: of the tasks, in the same order.
        episodes: of each task, aborted ones included.
    """

    def __init__(
        self, templates: Sequence[EpisodeSpec], policies: "Sequence[BranchPolicy]", episodes: int
    ) -> None:
        if len(templates) != len(policies):
            raise ValueError(f"{len(policies)} policies for {len(templates)} tasks, wanted one for each")
        if len({template.id for template in templates}) != len(templates):
            raise ValueError("two of the task templates have the same id")
        if episodes < 1:
            raise ValueError(f"episodes is {episodes}, wanted at least 1 of each task")
        pairs = zip(templates, policies, strict=True)
        self._trees = [_Tree(template, policy, episodes) for template, policy in pairs]
        self._where: dict[str, _Tree] = {}

    @property
    def total(self) -> int:
        """How many episodes there will be, of all tasks."""
        return sum(tree.budget for tree in self._trees)

    @property
    def ids(self) -> list[str]:
        """Of the episodes started so far, by task and then in the order in which they were started."""
        return [name for tree in self._trees for name in tree.paths]

    def begin(self) -> list[Start]:
        """What is played first."""
        return [start for tree in self._trees for start in self._named(tree, tree.begin())]

    def reached(self, episode: str) -> list[Start]:
        """What is started now that the environment has answered the last turn of an episode that goes on."""
        tree = self._where.get(episode)
        return [] if tree is None else self._named(tree, tree.reached(episode))

    def ended(self, episode: Episode) -> list[Start]:
        """What is started now that an episode has ended for good."""
        tree = self._where.get(episode.id)
        return [] if tree is None else self._named(tree, tree.ended(episode))

    def branched(self, episode: str) -> bool:
        """Whether others have left an episode: what they have of it must stay what it was."""
        return any(episode in tree.parents for tree in self._trees)

    def groups(self, collection: "Collection") -> list[Group]:
        """The episodes of each task, out of what was collected."""
        played = {episode.id: episode for episode in collection.episodes}
        return [Group(tree.template.task, tuple(played[name] for name in tree.paths)) for tree in self._trees]

    def _named(self, tree: "_Tree", starts: list[Start]) -> list[Start]:
        self._where.update((start.spec.id, tree) for start in starts)
        return starts


@dataclass(eq=False, slots=True)
class _Tree:
    """One task's episodes."""

    template: EpisodeSpec
    policy: "BranchPolicy"
    budget: int
    paths: dict[str, Path] = field(default_factory=dict)
    finished: dict[str, Episode] = field(default_factory=dict)
    parents: set[str] = field(default_factory=set)

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
        if not requests and len(self.finished) == len(self.paths):
            requests = [None] * left
        starts = [self._start(request) for request in requests[:left]]
        if len(self.paths) == self.budget:
            self._fence()
        return starts

    def _fence(self) -> None:
        """Keep nothing for those who might branch off: there will be no more."""
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
            elif request.parent in self.paths:
                request = BranchPoint(request.parent, 0)
            else:
                request = None
        spec = replace(self.template, id=f"{self.template.id}-{len(self.paths)}", parent=request)
        path = self.paths[spec.id] = Path(keep=True)
        return Start(spec, fork, path)

    def _fork(self, point: BranchPoint) -> Fork | None:
        """The way to a branch point; None where it is the first observation, or nobody can go there."""
        path, ended = self.paths.get(point.parent), self.finished.get(point.parent)
        if path is None or (point.turn, point.token) == (0, 0) or (ended is not None and ended.stop.aborted):
            return None
        running = ended is None and len(path.transitions) == len(path.turns) + 1
        if not 0 <= point.turn < len(path.turns) + running:
            return None
        reply = path.turns[point.turn].action_ids if point.turn < len(path.turns) else ()
        if not (point.token == 0 or 0 < point.token < len(reply)):
            return None
        turns, transitions = path.turns[: point.turn], path.transitions[: point.turn + 1]
        return Fork(tuple(turns), tuple(transitions), reply[: point.token])
