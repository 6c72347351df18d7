"""The episode loop, driven by hand: its requests, and what follows from the answers."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from agentrl.data.trajectory import BranchPoint, Episode, Outcome, StopReason, Turn
from agentrl.rollout.play import (
    ActionRequest,
    Answer,
    Effect,
    EpisodeSpec,
    Fork,
    Path,
    Reply,
    Reset,
    Restore,
    Step,
    Stop,
    Transition,
    play,
)

SPEC = EpisodeSpec("e1", "test/Env-v0", "train-3", seed=5)


def info(**more: Any) -> dict[str, Any]:
    return {"success": False} | more


def drive(
    answers: Sequence[Answer], spec: EpisodeSpec = SPEC, max_turns: int | None = None, **more: Any
) -> tuple[list[Effect], Episode]:
    loop = play(spec, max_turns, **more)
    effects = [next(loop)]
    for answer in answers:
        try:
            effects.append(loop.send(answer))
        except StopIteration as end:
            assert answer is answers[-1], "the episode ended before its answers did"
            return effects, end.value
    raise AssertionError("the episode did not end")


def test_an_episode_asks_for_reset_reply_and_step_in_turn_and_records_them() -> None:
    effects, episode = drive(
        [
            Transition("a room", info=info(actions=["look", "win"], task_type="easy")),
            Reply(
                "look",
                (1, 2),
                (3, 9),
                (-0.5, -0.1),
                (0.7, 0.2),
                ((3, 4), (9,)),
                new_sequence=True,
                policy_version=4,
            ),
            Transition("a lamp", 0.25, info=info(actions=["win"], score=0.5)),
            Reply("win", (5,), (6,), (-0.2,), (0.1,)),
            Transition("you won", 1.0, terminated=True, info={"success": True}),
        ]
    )
    assert effects[0] == Reset("train-3", 5)
    assert isinstance(effects[1], ActionRequest)
    assert (effects[1].turn, effects[1].observation, effects[1].actions) == (0, "a room", ("look", "win"))
    assert effects[2] == Step("look")
    assert isinstance(effects[3], ActionRequest)
    assert (effects[3].turn, effects[3].observation, effects[3].actions) == (1, "a lamp", ("win",))
    assert [(turn.observation, turn.action, turn.reward) for turn in episode.turns] == [
        ("a room", "look", 0.25),
        ("a lamp", "win", 1.0),
    ]
    first = episode.turns[0]
    assert (first.prompt_ids, first.action_ids, first.logprobs, first.entropies, first.allowed) == (
        (1, 2),
        (3, 9),
        (-0.5, -0.1),
        (0.7, 0.2),
        ((3, 4), (9,)),
    )
    assert (first.new_sequence, first.policy_version) == (True, 4)
    assert (episode.outcome, episode.stop, episode.episode_return) == (
        Outcome.SUCCESS,
        StopReason.TERMINATED,
        1.25,
    )
    assert (episode.task_type, episode.final_observation, episode.seed) == ("easy", "you won", 5)


def test_the_score_is_that_after_the_reply_and_the_state_key_that_before_it() -> None:
    _, episode = drive(
        [
            Transition("", info=info(state_key="A", score=0.0)),
            Reply("x"),
            Transition("", info=info(state_key="B", score=0.5, private="no")),
            Reply("y"),
            Transition("", terminated=True, info=info(state_key="C", score=1.0)),
        ]
    )
    assert [turn.info for turn in episode.turns] == [
        {"success": False, "state_key": "A", "score": 0.5},
        {"success": False, "state_key": "B", "score": 1.0},
    ]


@pytest.mark.parametrize(
    ("parsed", "understood", "valid"), [(True, True, True), (False, True, False), (True, False, False)]
)
def test_a_turn_is_valid_if_it_was_parsed_and_understood(parsed: bool, understood: bool, valid: bool) -> None:
    _, episode = drive(
        [
            Transition("", info=info()),
            Reply("x", valid=parsed),
            Transition("", truncated=True, info=info(valid=understood)),
        ]
    )
    assert episode.turns[0].valid is valid
    assert episode.stop == StopReason.TRUNCATED
    assert episode.outcome == Outcome.FAILURE


def test_terminated_counts_where_both_flags_are_set() -> None:
    _, episode = drive(
        [Transition("", info=info()), Reply("x"), Transition("", 0, True, True, {"success": True})]
    )
    assert (episode.stop, episode.success) == (StopReason.TERMINATED, True)


def test_the_turn_limit_ends_an_episode_before_another_reply_is_asked_for() -> None:
    effects, episode = drive(
        [Transition("", info=info()), Reply("x"), Transition("then", info={"success": True})], max_turns=1
    )
    assert len([effect for effect in effects if isinstance(effect, ActionRequest)]) == 1
    assert (episode.stop, len(episode.turns), episode.success) == (StopReason.TURN_LIMIT, 1, True)
    assert episode.final_observation == "then"


def test_a_failed_reset_is_an_aborted_episode_without_turns() -> None:
    _, episode = drive([Stop(StopReason.ENV_ERROR, "OSError: gone")])
    assert (episode.outcome, episode.stop, episode.error) == (
        Outcome.ABORTED,
        StopReason.ENV_ERROR,
        "OSError: gone",
    )
    assert episode.turns == ()


def test_a_failed_step_keeps_the_reply_without_reward_and_the_task_type() -> None:
    _, episode = drive(
        [
            Transition("a", info=info(task_type="easy", success=True)),
            Reply("x"),
            Stop(StopReason.CONTRACT, "step: no"),
        ]
    )
    assert [(turn.action, turn.reward) for turn in episode.turns] == [("x", 0.0)]
    assert (episode.outcome, episode.task_type, episode.final_observation) == (Outcome.ABORTED, "easy", "")
    assert not episode.success


def test_a_full_context_ends_an_episode_which_still_counts() -> None:
    _, episode = drive(
        [
            Transition("a", info=info()),
            Reply("x"),
            Transition("b", info=info()),
            Stop(StopReason.CONTEXT_LIMIT, "too long"),
        ]
    )
    assert (episode.outcome, episode.stop) == (Outcome.FAILURE, StopReason.CONTEXT_LIMIT)
    assert (len(episode.turns), episode.final_observation, episode.error) == (1, "b", "too long")


@pytest.mark.parametrize("success", [None, 1, "yes"])
def test_a_last_info_without_a_bool_success_aborts_for_breach_of_contract(success: Any) -> None:
    last = {} if success is None else {"success": success}
    _, episode = drive([Transition("", info=info()), Reply("x"), Transition("", terminated=True, info=last)])
    assert (episode.stop, episode.outcome) == (StopReason.CONTRACT, Outcome.ABORTED)
    assert repr(success) in (episode.error or "")


def test_players_of_one_group_draw_differently_from_one_environment_seed() -> None:
    def requested(spec: EpisodeSpec) -> tuple[int, int]:
        loop = play(spec)
        reset, request = next(loop), loop.send(Transition("", info=info()))
        assert isinstance(reset, Reset)
        assert isinstance(request, ActionRequest)
        return reset.seed, request.seed

    first, again = requested(SPEC), requested(SPEC)
    other = requested(EpisodeSpec("e2", "test/Env-v0", "train-3", seed=5))
    assert first == again
    assert first[0] == other[0] == 5
    assert first[1] != other[1]


def test_where_an_episode_forked_off_is_kept() -> None:
    spec = EpisodeSpec("e1", "test/Env-v0", "train-3", 5, parent=BranchPoint("e0", 2))
    assert drive([Stop(StopReason.ENV_ERROR)], spec)[1].parent == BranchPoint("e0", 2)


def test_an_answer_of_the_wrong_kind_is_the_drivers_mistake() -> None:
    loop = play(SPEC)
    next(loop)
    with pytest.raises(TypeError, match="was sent a Reply, wanted a Transition or a Stop"):
        loop.send(Reply("x"))


# Forks.

CHILD = replace(SPEC, id="e2", parent=BranchPoint("e1", 2))
TURNS = (Turn("a room", "look", reward=0.25), Turn("a lamp", "take lamp", reward=0.5))
WAY = (
    Transition("a room", info=info(actions=["look"])),
    Transition("a lamp", 0.25, info=info(task_type="easy")),
    Transition("it is heavy", 0.5, info=info(actions=["go", "win"], state_key="heavy")),
)
END: list[Answer] = [Reply("win"), Transition("you won", 1.0, terminated=True, info={"success": True})]


def kept(snapshot: Any) -> Fork:
    return Fork(TURNS, (*WAY[:2], replace(WAY[2], snapshot=snapshot)))


def test_a_fork_with_a_snapshot_goes_on_from_there_with_its_parents_turns() -> None:
    path = Path()
    effects, episode = drive([Transition(""), *END], CHILD, fork=kept("a point"), path=path)
    assert effects[0] == Restore("a point")
    assert isinstance(effects[1], ActionRequest)
    assert (effects[1].turn, effects[1].observation, effects[1].actions) == (2, "it is heavy", ("go", "win"))
    assert effects[1].info["state_key"] == "heavy"
    assert episode.turns[0] is TURNS[0]
    assert episode.turns[1] is TURNS[1]
    assert [turn.reward for turn in episode.turns] == [0.25, 0.5, 1.0]
    assert (episode.parent, episode.task_type, episode.outcome) == (CHILD.parent, "easy", Outcome.SUCCESS)
    assert (path.branching, path.inherited, len(path.transitions)) == ("restored", 2, 4)


def test_a_fork_without_a_snapshot_plays_the_parents_actions_again() -> None:
    path = Path()
    again = [replace(answer, reward=9.0) for answer in WAY]
    effects, episode = drive([*again, *END], CHILD, fork=Fork(TURNS, WAY), path=path)
    assert effects[:3] == [Reset("train-3", 5), Step("look"), Step("take lamp")]
    assert isinstance(effects[3], ActionRequest)
    assert effects[3].turn == 2
    # The rewards are those that the parent was given.
    assert [turn.reward for turn in episode.turns] == [0.25, 0.5, 1.0]
    assert episode.turns[:2] == TURNS
    assert (path.branching, path.inherited, episode.parent) == ("replayed", 2, CHILD.parent)


def test_where_a_snapshot_cannot_be_restored_the_actions_are_played_again() -> None:
    path, no = Path(), Stop(StopReason.ENV_ERROR, "no")
    effects, restored = drive([Transition(""), *END], CHILD, fork=kept("a point"))
    effects, replayed = drive([no, *WAY, *END], CHILD, fork=kept("a point"), path=path)
    assert effects[:4] == [Restore("a point"), Reset("train-3", 5), Step("look"), Step("take lamp")]
    assert path.branching == "replayed"
    assert replayed == restored


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize(
    "other",
    [
        {"observation": "another room"},
        {"terminated": True},
        {"truncated": True},
        {"info": info(actions=["go"])},
        {"info": info(actions=["win", "go"])},
    ],
)
def test_a_replay_that_is_answered_otherwise_begins_the_episode_anew(
    place: int, other: dict[str, Any]
) -> None:
    path = Path()
    answers: list[Answer] = [*WAY[:place], replace(WAY[place], **other), WAY[0], *END]
    effects, episode = drive(answers, CHILD, fork=Fork(TURNS, WAY), path=path)
    request = effects[place + 2]
    played = [Reset("train-3", 5), Step("look"), Step("take lamp")][: place + 1]
    assert effects[: place + 2] == [*played, Reset("train-3", 5)]
    assert isinstance(request, ActionRequest)
    assert request.turn == 0
    assert [turn.action for turn in episode.turns] == ["win"]
    assert (episode.parent, path.parent) == (BranchPoint("e1", 0), BranchPoint("e1", 0))
    assert (path.branching, path.inherited) == ("diverged", 0)


def test_a_failure_during_the_replay_aborts_the_episode() -> None:
    path = Path()
    _, episode = drive([WAY[0], Stop(StopReason.ENV_ERROR, "gone")], CHILD, fork=Fork(TURNS, WAY), path=path)
    assert (episode.stop, episode.error, episode.turns) == (StopReason.ENV_ERROR, "gone", TURNS[:1])
    assert path.branching is None


def test_a_fork_of_the_first_turn_needs_no_step() -> None:
    fork = Fork((), WAY[:1], prefix_ids=(7,))
    effects, episode = drive([WAY[0], *END], replace(SPEC, parent=BranchPoint("e1", 0, 1)), fork=fork)
    assert effects[0] == Reset("train-3", 5)
    assert isinstance(effects[1], ActionRequest)
    assert (effects[1].turn, len(episode.turns)) == (0, 1)


def test_the_turns_of_the_parent_count_towards_the_limit() -> None:
    answers: list[Answer] = [Transition(""), Reply("go"), WAY[0]]
    _, episode = drive(answers, CHILD, max_turns=3, fork=kept("a point"))
    assert (episode.stop, len(episode.turns)) == (StopReason.TURN_LIMIT, 3)


def test_a_snapshot_is_asked_for_as_long_as_somebody_may_want_it() -> None:
    path = Path(keep=True)
    loop = play(SPEC, path=path)
    assert next(loop) == Reset("train-3", 5, keep=True)
    loop.send(replace(WAY[0], snapshot="here"))
    assert path.transitions[0].snapshot == "here"
    assert loop.send(Reply("look")) == Step("look", keep=True)
    loop.send(WAY[1])
    assert (len(path.turns), len(path.transitions)) == (1, 2)
    path.keep = False
    assert loop.send(Reply("look")) == Step("look")
