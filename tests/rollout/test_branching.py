"""Branching episodes: how many there are, what they share with their parents, and what is recorded."""

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import worker_worlds
from shelves import CountingPlayer, Shelves, SnapshotShelves, by_id, specs

from agentrl.data.trajectory import BranchPoint, Episode, Outcome, StopReason, Turn
from agentrl.errors import TooManyAbortedError
from agentrl.rollout.branching import BranchRequest, BranchScheduler
from agentrl.rollout.collector import collect
from agentrl.rollout.environments import EnvironmentPool, Environments, ThreadedEnvironments
from agentrl.rollout.failures import Quarantine
from agentrl.rollout.play import Collection, EpisodeSpec
from agentrl.rollout.players import RandomPlayer
from agentrl.rollout.settings import WorkersConfig
from agentrl.rollout.workers import ProcessEnvironments


@dataclass
class Script:
    """Branch policy with a request per event: "begin", ("a-0", 2) for two turns reached, "a-0" for ended."""

    requests: dict[Any, list[BranchRequest]] = field(default_factory=dict)
    heard: list[Any] = field(default_factory=list)
    parents: dict[str, BranchPoint | None] = field(default_factory=dict)

    def begin(self) -> Sequence[BranchRequest]:
        return self.requests.get("begin", [None])

    def reached(
        self, episode: str, parent: BranchPoint | None, turns: Sequence[Turn]
    ) -> Sequence[BranchRequest]:
        self.heard.append((episode, len(turns)))
        self.parents[episode] = parent
        return self.requests.get((episode, len(turns)), [])

    def ended(self, episode: Episode) -> Sequence[BranchRequest]:
        self.heard.append(episode.id)
        return self.requests.get(episode.id, [])


def at(parent: str, turn: int, token: int = 0) -> BranchPoint:
    return BranchPoint(parent, turn, token)


def play_branches(
    requests: dict[Any, list[BranchRequest]],
    k: int,
    make: Any = SnapshotShelves,
    task: str = "4",
    player: Any = None,
    **more: Any,
) -> Collection:
    """Play one task, "a", with the requested branches."""
    scheduler = BranchScheduler(
        [EpisodeSpec("a", "test/Shelves-v0", task, 7)], [Script(requests)], episodes=k
    )
    pool = make if isinstance(make, Environments) else EnvironmentPool(make)
    with pool:
        more = {"max_active": 4} | more
        return collect((), player or CountingPlayer(), pool, scheduler=scheduler, **more)


def actions(episode: Episode) -> list[str]:
    return [turn.action for turn in episode.turns]


# Starts.


def test_an_episode_leaves_another_with_its_first_turns_and_goes_on_by_itself() -> None:
    played = by_id(play_branches({("a-0", 2): [at("a-0", 2)]}, k=2).episodes)
    parent, child = played["a-0"], played["a-1"]
    assert child.parent == at("a-0", 2)
    assert parent.parent is None
    assert child.turns[0] is parent.turns[0]
    assert child.turns[1] is parent.turns[1]
    assert [turn.observation for turn in child.turns][2] == parent.turns[2].observation
    assert actions(child)[2:] != actions(parent)[2:]
    assert (len(child.turns), child.outcome, child.seed) == (4, Outcome.SUCCESS, parent.seed)


def test_an_episode_that_has_ended_can_be_left() -> None:
    requests: dict[Any, list[BranchRequest]] = {"a-0": [at("a-0", 1), at("a-0", 3), at("a-0", 0)]}
    played = by_id(play_branches(requests, k=4).episodes)
    assert [actions(played[f"a-{k}"])[:n] for k, n in ((1, 1), (2, 3))] == [
        actions(played["a-0"])[:1],
        actions(played["a-0"])[:3],
    ]
    # A branch at the first observation is a new start.
    assert (played["a-3"].parent, len(played["a-3"].turns)) == (at("a-0", 0), 4)
    assert actions(played["a-3"])[0] != actions(played["a-0"])[0]


def test_a_child_can_be_left_in_its_turn_where_it_was_not_yet_itself() -> None:
    requests: dict[Any, list[BranchRequest]] = {
        ("a-0", 2): [at("a-0", 2)],
        "a-1": [at("a-1", 1), at("a-1", 3)],
    }
    played = by_id(play_branches(requests, k=4).episodes)
    assert actions(played["a-2"])[:1] == actions(played["a-0"])[:1]
    assert actions(played["a-3"])[:3] == actions(played["a-1"])[:3]
    assert [played[name].parent for name in ("a-2", "a-3")] == [at("a-1", 1), at("a-1", 3)]


def test_a_growth_hears_of_every_turn_that_was_played_and_of_every_end() -> None:
    script = Script({("a-0", 2): [at("a-0", 2)]})
    scheduler = BranchScheduler([EpisodeSpec("a", "e", "3", 0)], [script], episodes=2)
    collect((), CountingPlayer(), EnvironmentPool(SnapshotShelves), max_active=1, scheduler=scheduler)
    # The child begins after its parent has ended, at a state that was reached before.
    assert script.heard == [("a-0", 1), ("a-0", 2), "a-0", "a-1"]
    script = Script({("a-0", 1): [at("a-0", 1)]})
    scheduler = BranchScheduler([EpisodeSpec("a", "e", "3", 0)], [script], episodes=2)
    collect((), CountingPlayer(), EnvironmentPool(SnapshotShelves), max_active=1, scheduler=scheduler)
    assert script.heard == [("a-0", 1), ("a-0", 2), "a-0", ("a-1", 2), "a-1"]
    assert script.parents == {"a-0": None, "a-1": at("a-0", 1)}


def test_what_is_wished_is_started_before_the_parents_next_reply_is_asked_for() -> None:
    player = CountingPlayer()
    play_branches({("a-0", 1): [at("a-0", 1)] * 3}, k=4, player=player, task="3")
    # One reply, then all four have come as far.
    assert player.rounds == [1, 4, 4]


@pytest.mark.parametrize("k", [1, 2, 3, 5, 9])
@pytest.mark.parametrize(
    "requests",
    [
        {},
        {"begin": []},
        {"begin": [None] * 7},
        {("a-0", 1): [at("a-0", 1)] * 4, ("a-1", 2): [at("a-0", 2)] * 4},
        {"a-0": [at("a-0", 1)] * 2, "a-1": [None] * 2},
        {("a-0", 3): [at("a-0", 9), at("nobody", 1), at("a-0", -1)]},
    ],
)
def test_exactly_as_many_are_played_as_there_shall_be(
    k: int, requests: dict[Any, list[BranchRequest]]
) -> None:
    played = play_branches(requests, k)
    assert [episode.id for episode in played.episodes] == [f"a-{n}" for n in range(k)]
    assert all(episode.outcome == Outcome.SUCCESS for episode in played.episodes)
    assert all(episode.seed == 7 for episode in played.episodes)


def test_what_is_left_when_all_have_ended_begins_at_the_first_observation() -> None:
    played = by_id(play_branches({("a-0", 1): [at("a-0", 1)]}, k=5).episodes)
    assert [played[f"a-{k}"].parent for k in range(5)] == [None, at("a-0", 1), None, None, None]


def test_nothing_is_filled_up_while_one_is_still_playing() -> None:
    script = Script()
    scheduler = BranchScheduler([EpisodeSpec("a", "e", "2", 0)], [script], episodes=3)
    collect((), CountingPlayer(), EnvironmentPool(SnapshotShelves), max_active=9, scheduler=scheduler)
    assert script.heard.index("a-0") < script.heard.index(("a-1", 1))
    assert script.heard.index(("a-2", 1)) < script.heard.index("a-1")


@pytest.mark.parametrize(
    ("requested", "recorded"),
    [
        (at("a-0", 9), at("a-0", 0)),
        (at("a-0", 2), at("a-0", 0)),  # it will get there, but has not yet
        (at("a-0", -1), at("a-0", 0)),
        (at("a-0", 0, token=1), at("a-0", 0)),  # a reply without tokens
        (at("a-7", 1), None),
    ],
)
def test_a_place_that_nobody_has_reached_is_the_first_observation(
    requested: BranchPoint, recorded: BranchPoint | None
) -> None:
    found = play_branches({("a-0", 1): [requested]}, k=2)
    assert found.episodes[1].parent == recorded
    assert len(found.episodes[1].turns) == 4
    assert found.branches == {"restored": 0, "replayed": 0, "diverged": 0}


def test_the_place_after_the_last_reply_cannot_be_left() -> None:
    played = play_branches({"a-0": [at("a-0", 4), at("a-0", 3)]}, k=3).episodes
    assert [episode.parent for episode in played] == [None, at("a-0", 0), at("a-0", 3)]
    limited = play_branches({"a-0": [at("a-0", 2)]}, k=2, max_turns=2).episodes
    assert [episode.parent for episode in limited] == [None, at("a-0", 0)]


def test_groups_hold_the_episodes_of_each_task_in_the_order_of_their_start() -> None:
    templates = [EpisodeSpec(name, "e", task, 0) for name, task in (("b", "5"), ("a", "1"))]
    scripts = [Script({("b-0", 1): [at("b-0", 1)]}), Script()]
    scheduler = BranchScheduler(templates, scripts, episodes=3)
    ended: list[str] = []
    found = collect(
        (),
        CountingPlayer(),
        EnvironmentPool(SnapshotShelves),
        max_active=2,
        scheduler=scheduler,
        on_episode=lambda episode: ended.append(episode.id),
    )
    names = ["b-0", "b-1", "b-2", "a-0", "a-1", "a-2"]
    assert [episode.id for episode in found.episodes] == names
    assert ended[0] == "a-0"
    assert [
        (group.task, [episode.id for episode in group.episodes]) for group in scheduler.groups(found)
    ] == [
        ("5", names[:3]),
        ("1", names[3:]),
    ]


def test_who_branches_comes_before_those_that_have_not_begun() -> None:
    templates = [EpisodeSpec(name, "e", "2", 0) for name in "abc"]
    scripts = [Script({f"{name}-0": [at(f"{name}-0", 1)]}) for name in "abc"]
    ended: list[str] = []
    collect(
        (),
        CountingPlayer(),
        EnvironmentPool(SnapshotShelves),
        max_active=1,
        scheduler=BranchScheduler(templates, scripts, episodes=2),
        on_episode=lambda episode: ended.append(episode.id),
    )
    assert ended == ["a-0", "a-1", "b-0", "b-1", "c-0", "c-1"]


def test_other_episodes_are_played_beside_those_of_a_director() -> None:
    scheduler = BranchScheduler([EpisodeSpec("a", "e", "3", 0)], [Script()], episodes=2)
    found = collect(
        specs([2, 4]), CountingPlayer(), EnvironmentPool(SnapshotShelves), max_active=3, scheduler=scheduler
    )
    alone = collect(specs([2, 4]), CountingPlayer(), EnvironmentPool(SnapshotShelves), max_active=3)
    assert [episode.id for episode in found.episodes] == ["e0", "e1", "a-0", "a-1"]
    assert found.episodes[:2] == alone.episodes


@pytest.mark.parametrize(
    ("templates", "policies", "episodes", "words"),
    [
        ("ab", 1, 3, "1 branch policies for 2 tasks"),
        ("aa", 2, 3, "same id"),
        ("a", 1, 0, "episodes is 0"),
    ],
)
def test_a_director_that_makes_no_sense_is_refused(
    templates: str, policies: int, episodes: int, words: str
) -> None:
    made = [EpisodeSpec(name, "e", "1", 0) for name in templates]
    with pytest.raises(ValueError, match=words):
        BranchScheduler(made, [Script() for _ in range(policies)], episodes)


# Restoring and replaying.

TREE: dict[Any, list[BranchRequest]] = {
    ("a-0", 1): [at("a-0", 1)],
    ("a-0", 3): [at("a-0", 3), at("a-0", 2)],
    ("a-1", 2): [at("a-1", 2)],
}


def test_a_snapshot_and_a_replay_lead_to_the_same_episodes() -> None:
    restored, replayed = (
        play_branches(TREE, k=5, make=SnapshotShelves),
        play_branches(TREE, k=5, make=Shelves),
    )
    assert restored.episodes == replayed.episodes
    assert restored.branches == {"restored": 4, "replayed": 0, "diverged": 0}
    assert replayed.branches == {"restored": 0, "replayed": 4, "diverged": 0}


def test_snapshots_are_taken_until_all_have_been_started_and_never_of_an_end() -> None:
    SnapshotShelves.calls.clear()
    play_branches({("a-0", 2): [at("a-0", 1), at("a-0", 2)]}, k=3, task="5")
    # The parent's reset and two steps; after that, nothing can branch any more. 5 + 4 + 3 turns are played.
    assert SnapshotShelves.calls == {"reset": 1, "snapshot": 3, "restore": 2, "step": 12}
    SnapshotShelves.calls.clear()
    play_branches({"begin": [None, None]}, k=2, task="5")
    assert SnapshotShelves.calls == {"reset": 2, "step": 10}
    SnapshotShelves.calls.clear()
    play_branches({}, k=2, task="5")
    assert SnapshotShelves.calls["snapshot"] == 5


def test_snapshots_are_given_up_with_the_last_start_that_could_need_them() -> None:
    taken: list[weakref.ref[Any]] = []

    class Point:
        def __init__(self, kept: Any) -> None:
            self.kept = kept
            taken.append(weakref.ref(self))

    class Noted(SnapshotShelves):
        def snapshot(self) -> Any:
            return Point(super().snapshot())

        def restore(self, snapshot: Any) -> None:
            super().restore(snapshot.kept)

    scheduler = BranchScheduler(
        [EpisodeSpec("a", "e", "4", 0)], [Script({"a-0": [at("a-0", 2)]})], episodes=2
    )
    found = collect((), CountingPlayer(), EnvironmentPool(Noted), max_active=2, scheduler=scheduler)
    assert (len(taken), found.branches["restored"]) == (4, 1)
    assert [snapshot for snapshot in taken if snapshot() is not None] == []
    assert len(scheduler.groups(found)[0].episodes) == 2


def test_without_a_director_no_snapshot_is_taken() -> None:
    SnapshotShelves.calls.clear()
    plain = collect(specs([3, 2]), CountingPlayer(), EnvironmentPool(Shelves), max_active=2)
    found = collect(specs([3, 2]), CountingPlayer(), EnvironmentPool(SnapshotShelves), max_active=2)
    assert found.episodes == plain.episodes
    assert SnapshotShelves.calls == {"reset": 2, "step": 5}


def test_a_snapshot_that_cannot_be_taken_or_restored_is_replaced_by_a_replay() -> None:
    class Untakeable(SnapshotShelves):
        def snapshot(self) -> Any:
            raise OSError("no")

    class Unusable(SnapshotShelves):
        def restore(self, snapshot: Any) -> None:
            self.task = "1"  # half of it
            raise OSError("no")

    class Undeclared(SnapshotShelves):
        snapshot = restore = None  # type: ignore[assignment]

    expected = play_branches(TREE, k=5, make=SnapshotShelves).episodes
    for kind in (Untakeable, Unusable, Undeclared):
        found = play_branches(TREE, k=5, make=kind)
        assert found.episodes == expected
        assert found.branches["replayed"] == 4
        assert found.failures == ()


def test_where_the_environment_plays_otherwise_the_second_time_the_episode_is_begun_anew() -> None:
    plays = Counter[str]()

    class Moody(Shelves):
        def on_reset(self, answer: Any) -> Any:
            plays["reset"] += 1
            self.mood = plays["reset"]
            return answer

        def on_step(self, answer: Any) -> Any:
            observation, *rest = answer
            return (f"{observation}, mood {self.mood}" if self.steps == 2 else observation, *rest)

    script = Script({("a-0", 2): [at("a-0", 1), at("a-0", 2)], ("a-2", 1): [at("a-2", 1)]})
    scheduler = BranchScheduler([EpisodeSpec("a", "e", "4", 7)], [script], episodes=4)
    player = CountingPlayer()
    found = collect((), player, EnvironmentPool(Moody), max_active=4, scheduler=scheduler)
    # Up to turn 1 all is the same; the answer to turn 1 differs.
    assert found.branches == {"restored": 0, "replayed": 2, "diverged": 1}
    root, one, two, three = found.episodes
    assert (one.parent, one.turns[0]) == (at("a-0", 1), root.turns[0])
    assert (two.parent, len(two.turns)) == (at("a-0", 0), 4)
    assert two.turns[0].action != root.turns[0].action
    assert (three.parent, three.turns[0]) == (at("a-2", 1), two.turns[0])
    assert script.parents["a-2"] == at("a-0", 0)
    assert player.forked == [("a-1", "a-0", 1), ("a-3", "a-2", 1)]


def test_the_player_takes_over_from_a_parent_that_it_still_knows() -> None:
    player = CountingPlayer()
    requests: dict[Any, list[BranchRequest]] = {
        ("a-0", 1): [at("a-0", 1)],
        "a-0": [at("a-0", 2), at("a-0", 3)],
        "a-2": [at("a-2", 3)],
    }
    play_branches(requests, k=5, player=player, max_active=1)
    # Newer ones first. a-0 has ended when the others branch from it; it is closed after the last of them.
    assert player.forked == [("a-2", "a-0", 2), ("a-4", "a-2", 3), ("a-3", "a-0", 3), ("a-1", "a-0", 1)]
    assert player.closed == ["a-2", "a-4", "a-3", "a-0", "a-1"]


# Workers and threads.

PLACES: list[Callable[[Any], Environments]] = [
    EnvironmentPool,
    lambda make: ThreadedEnvironments(make, 3),
    lambda make: ProcessEnvironments(make, 3, WorkersConfig(count=2)),
]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("make", "portable"),
    [
        (worker_worlds.Corridor, False),
        (worker_worlds.SnapshotCorridor, True),
        (worker_worlds.Heaped, False),
        (worker_worlds.Stuck, False),
    ],
)
def test_where_branches_are_played_does_not_change_them(
    place: Callable[[Any], Environments], make: Any, portable: bool
) -> None:
    # One at a time, since the order of starts, and with it the names, depends on the order of the answers.
    expected = play_branches(TREE, k=5, make=Shelves, player=RandomPlayer(), max_active=1)
    found = play_branches(TREE, k=5, make=place(make), player=RandomPlayer(), max_active=1)
    assert found.episodes == expected.episodes
    here = place is not PLACES[2]
    restored = make is not worker_worlds.Corridor and (portable or here)
    assert found.branches["restored" if restored else "replayed"] == 4


@pytest.mark.parametrize("trouble", ["exit in restore", "hang in restore"])
def test_a_worker_that_is_lost_in_a_restore_is_replaced_and_the_actions_played_again(trouble: str) -> None:
    quick = WorkersConfig(count=1, construct_timeout=20, reset_timeout=0.7, step_timeout=0.7)
    environments = ProcessEnvironments(worker_worlds.SnapshotCorridor, 1, quick)
    found = play_branches(
        {("a-0", 1): [at("a-0", 1)]}, k=2, make=environments, task=f"3 {trouble}", player=RandomPlayer()
    )
    assert found.branches == {"restored": 0, "replayed": 1, "diverged": 0}
    assert [(episode.stop, len(episode.turns)) for episode in found.episodes] == [
        (StopReason.TERMINATED, 3)
    ] * 2
    assert (environments.restarts, found.failures) == (1, ())
    assert found.episodes[1].turns[0] == found.episodes[0].turns[0]


def test_a_snapshot_is_restored_in_another_process_than_it_was_made_in(tmp_path: Path) -> None:
    with ProcessEnvironments(_Noting(tmp_path), 2, WorkersConfig(count=2)) as environments:
        found = play_branches({("a-0", 1): [at("a-0", 1)]}, k=2, make=environments, player=RandomPlayer())
    assert found.branches["restored"] == 1
    notes = [note.name.split("-") for note in tmp_path.iterdir()]
    played, restored = ([note for note in notes if (note[0] == "restored") is kind] for kind in (False, True))
    assert [note[1] for note in restored] == ["1"]
    assert {note[-1] for note in played}.isdisjoint(note[-1] for note in restored)


@dataclass(frozen=True)
class _Noting:
    folder: Path

    def __call__(self) -> worker_worlds.SnapshotCorridor:
        return worker_worlds.SnapshotCorridor(notes=str(self.folder))


# Failures.


def failing(steps: Callable[[int], bool], base: type[Shelves] = SnapshotShelves) -> type[Shelves]:
    """Return an environment class whose n-th step in total fails if `steps(n)`."""
    played = Counter[str]()

    class Failing(base):  # type: ignore[misc, valid-type]
        def on_step(self, answer: Any) -> Any:
            played["step"] += 1
            if steps(played["step"]):
                raise OSError("gone")
            return answer

    return Failing


@pytest.mark.parametrize("base", [SnapshotShelves, Shelves])
@pytest.mark.parametrize("every", [2, 3, 5, 7])
@pytest.mark.parametrize("attempts", [1, 3])
def test_aborted_episodes_count_and_the_tree_never_lies(
    every: int, attempts: int, base: type[Shelves]
) -> None:
    found = play_branches(TREE, k=6, make=failing(lambda n: n % every == 0, base), max_attempts=attempts)
    assert [episode.id for episode in found.episodes] == [f"a-{n}" for n in range(6)]
    assert any(episode.stop.aborted for episode in found.episodes) or found.failures
    played = by_id(found.episodes)
    for episode in found.episodes:
        if episode.parent is not None and not episode.stop.aborted:
            turn = episode.parent.turn
            assert episode.turns[:turn] == played[episode.parent.parent].turns[:turn]


def test_an_episode_is_played_again_in_its_place_until_others_have_left_it() -> None:
    # Step 2 fails before anything branches from a-0. Its second attempt has a child after two turns and
    # fails in step 5.
    spoilt = failing(lambda n: n in (2, 5))
    found = play_branches({("a-0", 2): [at("a-0", 2)]}, k=2, make=spoilt, max_attempts=5, max_active=1)
    assert [failure.id for failure in found.failures] == ["a-0"]
    parent, child = found.episodes
    assert (parent.stop, len(parent.turns)) == (StopReason.ENV_ERROR, 3)
    assert (child.outcome, child.parent) == (Outcome.SUCCESS, at("a-0", 2))
    assert child.turns[:2] == parent.turns[:2]


def test_a_child_that_failed_leaves_its_parent_at_the_same_place_again() -> None:
    # Step 5 is the child's first.
    requests: dict[Any, list[BranchRequest]] = {"a-0": [at("a-0", 2)]}
    healthy = play_branches(requests, k=2)
    found = play_branches(requests, k=2, make=failing(lambda n: n == 5), max_attempts=2)
    assert found.episodes == healthy.episodes
    assert [failure.id for failure in found.failures] == ["a-1"]
    assert found.branches == {"restored": 1, "replayed": 0, "diverged": 0}


def test_an_attempt_that_failed_cannot_be_left() -> None:
    # a-0 fails in its second step and waits to be played again while a-1 plays.
    requests: dict[Any, list[BranchRequest]] = {"begin": [None, None], ("a-1", 1): [at("a-0", 1)]}
    found = play_branches(requests, k=3, make=failing(lambda n: n == 2), max_attempts=2, max_active=1)
    assert [failure.id for failure in found.failures] == ["a-0"]
    assert [episode.parent for episode in found.episodes] == [None, None, at("a-0", 0)]
    assert all(episode.outcome == Outcome.SUCCESS for episode in found.episodes)


def test_an_episode_that_was_aborted_cannot_be_left() -> None:
    found = play_branches({"a-0": [at("a-0", 1)]}, k=2, make=failing(lambda n: n == 3))
    assert [episode.stop.aborted for episode in found.episodes] == [True, False]
    assert found.episodes[1].parent == at("a-0", 0)
    assert len(found.episodes[1].turns) == 4


def test_a_failure_in_the_replay_is_an_attempt_like_any_other() -> None:
    # a-0 takes steps 1 to 4; step 5 plays its first action again.
    requests: dict[Any, list[BranchRequest]] = {"a-0": [at("a-0", 2)]}
    healthy = play_branches(requests, k=2, make=Shelves)
    found = play_branches(requests, k=2, make=failing(lambda n: n == 5, Shelves), max_attempts=2)
    assert found.episodes == healthy.episodes
    assert (len(found.failures), found.branches["replayed"]) == (1, 1)
    (aborted,) = play_branches(requests, k=2, make=failing(lambda n: n == 5, Shelves)).episodes[1:]
    assert (aborted.stop, aborted.parent) == (StopReason.ENV_ERROR, at("a-0", 2))


def test_a_task_in_quarantine_gets_its_aborted_episodes_without_being_played() -> None:
    quarantine = Quarantine(after=1)
    requests: dict[Any, list[BranchRequest]] = {("a-0", 1): [at("a-0", 1)]}
    SnapshotShelves.calls.clear()
    found = play_branches(requests, k=4, make=failing(lambda n: n == 2), max_active=1, quarantine=quarantine)
    assert [episode.stop for episode in found.episodes] == [
        StopReason.ENV_ERROR,
        *[StopReason.WORKER_ERROR] * 3,
    ]
    assert all("quarantined" in (episode.error or "") for episode in found.episodes[1:])
    assert (SnapshotShelves.calls["reset"], SnapshotShelves.calls["restore"]) == (1, 0)


@pytest.mark.parametrize(("share", "stops"), [(0.5, False), (0.49, True)])
def test_the_share_of_aborted_episodes_is_of_all_that_will_be(share: float, stops: bool) -> None:
    # 2 of 4: of every two episodes, the second fails in its first step.
    spoilt = failing(lambda n: n in (5, 10))
    if stops:
        with pytest.raises(TooManyAbortedError, match=r"2 episodes were aborted, more than 1\.96 allowed"):
            play_branches({}, k=4, make=spoilt, max_aborted_share=share, max_active=1)
    else:
        found = play_branches({}, k=4, make=spoilt, max_aborted_share=share, max_active=1)
        assert [episode.stop.aborted for episode in found.episodes] == [False, True, False, True]


def test_an_interrupt_lets_the_player_forget_those_that_wait_to_be_left() -> None:
    def interrupt(episode: Episode) -> None:
        if episode.id == "a-1":
            raise KeyboardInterrupt

    player = CountingPlayer()
    requests: dict[Any, list[BranchRequest]] = {
        "begin": [None, None],
        "a-0": [at("a-0", 1)] * 2,
        "a-1": [at("a-1", 1)],
    }
    scheduler = BranchScheduler([EpisodeSpec("a", "e", "2", 0)], [Script(requests)], episodes=5)
    with pytest.raises(KeyboardInterrupt):
        collect(
            (),
            player,
            EnvironmentPool(SnapshotShelves),
            max_active=2,
            scheduler=scheduler,
            on_episode=interrupt,
        )
    assert sorted(player.closed) == ["a-0", "a-1"]  # a-2 to a-4 had not begun
