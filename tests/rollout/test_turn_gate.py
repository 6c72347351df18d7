"""A gate before the environment's step, and reasoning that is ended: from the engine to the recorded turn."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from test_branching_tokens import Shop, check_against_plain_forward
from test_play import SPEC, drive, info
from test_thinking_players import TEMPLATES, Table

from agentrl.algorithms.branching import RolloutPlan
from agentrl.algorithms.hooks import Context, ReplyState, SampledReply, Verdict
from agentrl.data.trajectory import Episode, StopReason
from agentrl.policy.engine import SamplingParams
from agentrl.policy.sampling import draw
from agentrl.rollout.collector import collect
from agentrl.rollout.environments import EnvironmentPool
from agentrl.rollout.play import ActionRequest, EpisodeSpec, Gate, Reply, Step, Stop, Transition
from agentrl.rollout.players import LanguagePlayer
from agentrl.training.rollouts import gate_of, watched_sampling

CONTEXT = Context(vocabulary=300)


def test_the_environment_sees_the_accepted_reply_alone_and_the_others_are_counted() -> None:
    seen: list[str] = []

    def judge(request: ActionRequest, reply: Reply) -> tuple[bool, float]:
        seen.append(reply.text)
        return reply.text == "win", float(len(seen))

    effects, episode = drive(
        [
            Transition("a room", info=info()),
            Reply("look", action_ids=(3, 4)),
            Reply("stay", action_ids=(3, 4, 5)),
            Reply("win", action_ids=(6,)),
            Transition("done", 1.0, terminated=True, info=info(success=True)),
        ],
        gate=Gate(judge, resamples=5),
    )
    assert [effect.attempt for effect in effects if isinstance(effect, ActionRequest)] == [0, 1, 2]
    assert [effect.action for effect in effects if isinstance(effect, Step)] == ["win"]
    assert seen == ["look", "stay", "win"]
    (turn,) = episode.turns
    assert turn.action_ids == (6,)
    assert turn.info["gate_score"] == 3.0
    assert (turn.info["discarded_replies"], turn.info["discarded_tokens"]) == (2, 5)


def test_the_last_attempt_is_played_whatever_the_gate_says() -> None:
    _, episode = drive(
        [
            Transition("a room", info=info()),
            Reply("a"),
            Reply("b"),
            Transition("done", terminated=True, info=info()),
        ],
        gate=Gate(lambda request, reply: (False, 0.5), resamples=1),
    )
    assert [turn.action for turn in episode.turns] == ["b"]
    assert episode.turns[0].info["discarded_replies"] == 1


def test_a_failure_while_a_turn_is_sampled_again_ends_the_episode_as_usual() -> None:
    _, episode = drive(
        [Transition("a room", info=info()), Reply("a"), Stop(StopReason.ENGINE_ERROR, "gone")],
        gate=Gate(lambda request, reply: (False, 0.0), resamples=1),
    )
    assert (episode.stop, episode.error, episode.turns) == (StopReason.ENGINE_ERROR, "gone", ())
    assert SPEC.id == episode.id


def refusing(state: ReplyState, reply: SampledReply, context: Context) -> Verdict:
    """Refuse every reply with an even number of decisions."""
    assert len(reply.entropies) == len(reply.confidences) > 0
    return Verdict(len(reply.entropies) % 2 == 1, sum(reply.confidences) / len(reply.confidences))


class Spy(LanguagePlayer):
    """Counts what is asked again."""

    again = 0

    def submit(self, request: ActionRequest) -> None:
        self.again += request.attempt > 0
        super().submit(request)


def played(table: Table, plan: RolloutPlan, count: int = 4) -> tuple[tuple[Episode, ...], Spy]:
    def choose(request: ActionRequest, sampling: SamplingParams) -> SamplingParams:
        return watched_sampling(plan, CONTEXT, None, request, sampling)

    player = Spy(table.dialogue, table.engine, SamplingParams(1.0, 48), choose_sampling=choose)
    specs = [EpisodeSpec(f"s-{member}", "test/Shelves-v0", "4", 7, member=member) for member in range(count)]
    gate = gate_of(plan, CONTEXT)
    episodes = collect(specs, player, EnvironmentPool(Shop), max_active=8, gate=gate).episodes
    for episode in episodes:
        player.close(episode.id)
    return episodes, player


@pytest.fixture(scope="module", params=list(TEMPLATES))
def table(request: pytest.FixtureRequest) -> Table:
    return Table(TEMPLATES[request.param])


def written(episodes: Sequence[Episode]) -> list[list[tuple[tuple[int, ...], int]]]:
    """The tokens of every reply, and how many were discarded before it."""
    return [
        [(turn.action_ids, turn.info.get("discarded_replies", 0)) for turn in episode.turns]
        for episode in episodes
    ]


def discarded(episodes: Sequence[Episode]) -> list[int]:
    return [turn.info.get("discarded_replies", 0) for episode in episodes for turn in episode.turns]


def test_discarded_replies_leave_no_trace_in_the_tokens_of_the_episode(table: Table) -> None:
    plan = RolloutPlan(turn_gate=refusing, resamples=3, confidence=5)
    episodes, player = played(table, plan)
    counts = discarded(episodes)
    assert sum(counts) == player.again > 0
    assert max(counts) <= 3
    assert any(count == 0 for count in counts)
    for episode in episodes:
        check_against_plain_forward(table.model, episode)
        for turn in episode.turns:
            table.check(turn)
            assert "gate_score" in turn.info
            assert ("discarded_tokens" in turn.info) is ("discarded_replies" in turn.info)
    # The same seeds play the same episodes; others beside them change the rounding alone.
    assert written(played(table, plan, count=2)[0]) == written(episodes[:2])
    # Without a gate the first reply of an episode that was accepted at once is the same.
    plain, _ = played(table, RolloutPlan())
    for one, other in zip(plain, episodes, strict=True):
        if not other.turns[0].info.get("discarded_replies"):
            assert one.turns[0].action_ids == other.turns[0].action_ids


def after_six(entropies: Sequence[float], confidences: Sequence[float], context: Context) -> bool:
    assert all(value > 0 for value in confidences)
    return len(entropies) >= 6


def test_ended_reasoning_is_closed_by_forced_tokens_and_recorded(table: Table) -> None:
    plan = RolloutPlan(end_thoughts=after_six, confidence=5)
    episodes, _ = played(table, plan)
    turns = [turn for episode in episodes for turn in episode.turns]
    ended = [turn for turn in turns if turn.info.get("intervened")]
    assert ended
    for turn in turns:
        table.check(turn)
        thought = len(table.thoughts(turn))
        assert thought == 6 if turn.info.get("intervened") else thought <= 6
    thinking = table.dialogue.thinking
    assert thinking is not None
    for turn in ended:
        start = len(thinking.opening) + 6
        cut = turn.action_ids[start : start + len(thinking.cut)]
        assert cut == thinking.cut
        assert not any(turn.action_mask[start : start + len(thinking.cut)])
    for episode in episodes:
        check_against_plain_forward(table.model, episode)
    plain, _ = played(table, RolloutPlan())
    assert not any(turn.info.get("intervened") for episode in plain for turn in episode.turns)


def test_a_confidence_is_the_mean_over_the_most_likely_of_what_is_allowed() -> None:
    weight = torch.log(torch.tensor([[0.5], [0.25], [0.125], [0.125]]))
    ones = torch.ones(1, 1)

    def confidence(top: int, menus: Any = None) -> float:
        return draw(ones, weight, menus, np.array([0.5]), np.array([1.0]), top).confidences[0]

    log2 = float(np.log(2))
    assert confidence(2) == pytest.approx(1.5 * log2)
    assert confidence(9) == pytest.approx((1 + 2 + 3 + 3) / 4 * log2)
    # Of the two allowed ones, each has one half.
    assert confidence(3, [(2, 3)]) == pytest.approx(log2)
    assert confidence(0) == 0.0
