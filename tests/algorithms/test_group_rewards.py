"""Rewards that depend on the other episodes of a group, by the example of a majority vote."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch

from agentrl.algorithms.algorithm import Algorithm, keep_all
from agentrl.algorithms.credit import compute_advantages, prepare
from agentrl.algorithms.hooks import Context
from agentrl.algorithms.methods.dr_bot import by_shaped_returns
from agentrl.data import Episode, Group, StopReason, Turn
from agentrl.data.batch import Layout
from agentrl.data.trajectory import BranchPoint

CONTEXT = Context()
BROKEN = StopReason.ENV_ERROR


def majority_vote(group: Group, context: Context) -> Sequence[Sequence[float]]:
    """Add 1 to the last turn of the episodes that give the group's most frequent answer."""
    answers = [episode.turns[-1].action for episode in group.episodes]
    winner = Counter(answers).most_common(1)[0][0]
    return [
        [*(turn.reward for turn in episode.turns[:-1]), episode.turns[-1].reward + (answer == winner)]
        for episode, answer in zip(group.episodes, answers, strict=True)
    ]


def share_of_the_best(group: Group, context: Context, *, bonus: float) -> Sequence[Sequence[float]]:
    """Multiply all rewards by `bonus` over the highest return."""
    best = max(episode.episode_return for episode in group.episodes)
    return [[turn.reward * bonus / best for turn in episode.turns] for episode in group.episodes]


def episode(
    answer: str, *, id: str = "", turns: int = 2, stop: StopReason = StopReason.TERMINATED
) -> Episode:
    texts = ["think"] * (turns - 1) + [answer]
    said = tuple(
        Turn("o", text, prompt_ids=(1, 2)[: 1 + k % 2], action_ids=(3, 4), new_sequence=k == 0)
        for k, text in enumerate(texts)
    )
    return Episode(id or answer, "env", "t", 0, said, stop)


def group(answers: str, **more: StopReason) -> Group:
    return Group("t", tuple(episode(answer, id=f"e{k}", turns=1 + k % 3) for k, answer in enumerate(answers)))


VOTING = Algorithm(select=keep_all, shape_group=(majority_vote,))


def test_the_majority_is_rewarded_and_the_advantage_is_that_of_its_rewards() -> None:
    batch = prepare(VOTING, [group("aab"), group("ccc")], CONTEXT)
    assert batch.returns.tolist() == [1, 1, 0, 1, 1, 1]
    # (1, 1, 0): mean 2/3, std with n-1 sqrt(1/3) = .57735: (1/3) / .57735 = .57735
    advantages = compute_advantages(VOTING, batch, CONTEXT)
    assert [float(row[row != 0][0]) for row in advantages[:3]] == pytest.approx(
        [0.57735, 0.57735, -1.15470], abs=1e-4
    )
    assert not advantages[3:].any()


def test_group_shapers_run_after_those_of_episodes_each_on_what_the_previous_one_left() -> None:
    length = lambda episode, context: [1.0 for _ in episode.turns]  # noqa: E731
    algorithm = replace(
        VOTING, shape_reward=(length,), shape_group=(majority_vote, partial(share_of_the_best, bonus=6))
    )
    # 1, 2 and 3 turns of 1; the vote for a adds 1 to the first two: 2, 3, 3; times 6/3
    assert prepare(algorithm, [group("aab")], CONTEXT).returns.tolist() == [4, 6, 6]


def test_an_aborted_episode_neither_votes_nor_is_rewarded_but_keeps_its_place() -> None:
    whole = group("abb")
    aborted = [replace(episode("a", id=f"x{k}", stop=BROKEN), turns=()) for k in range(2)]
    aborted[1] = replace(aborted[1], parent=BranchPoint("e1", 0, 1))
    first, *others = whole.episodes
    seen: list[Group] = []

    def watching(group: Group, context: Context) -> Sequence[Sequence[float]]:
        seen.append(group)
        return majority_vote(group, context)

    algorithm = replace(VOTING, shape_group=(watching,))
    mixed = replace(whole, episodes=(aborted[0], first, aborted[1], *others))
    dead = Group("t", tuple(aborted))
    batch = prepare(algorithm, [mixed, dead], CONTEXT)
    assert seen == [whole]
    assert [episode.id for episode in batch.episodes] == ["e0", "e1", "e2"]
    assert batch.returns.tolist() == [0, 1, 1]
    assert batch.aborted == {
        (0, "x0"): None,
        (0, "x1"): BranchPoint("e1", 0, 1),
        (1, "x0"): None,
        (1, "x1"): BranchPoint("e1", 0, 1),
    }


def advantages_by_turn(groups: Sequence[Group], layout: Layout) -> dict[tuple[str, str, int], float]:
    batch = prepare(VOTING, groups, CONTEXT, layout=layout)
    values = compute_advantages(VOTING, batch, CONTEXT)
    names = [(group.task, episode.id) for group in groups for episode in group.finished]
    return {
        (*names[int(batch.trajectory[row])], int(batch.turns[row, place])): float(values[row, place])
        for row, place in torch.nonzero(batch.action_mask).tolist()
    }


@pytest.mark.parametrize("layout", ["trajectory", "turn"])
def test_layout_order_and_padding_do_not_matter(layout: Layout) -> None:
    draw = random.Random(0)
    groups = [replace(group("aabcbb"), task="one"), replace(group("ddeedf"), task="two")]
    wanted = advantages_by_turn(groups, "trajectory")
    assert any(wanted.values())
    shuffled = [
        replace(each, episodes=tuple(draw.sample(each.episodes, len(each.episodes))))
        for each in reversed(groups)
    ]
    long = Group("long", (episode("x", id="l", turns=9),))
    for order in (groups, shuffled, [*groups, long]):
        found = advantages_by_turn(order, layout)
        assert {key: found[key] for key in wanted} == pytest.approx(wanted, abs=1e-12)


def test_selection_by_shaped_returns_sees_them_and_returns_the_episodes_as_played() -> None:
    """The environment's rewards are 0 in both groups: only the vote tells them apart."""
    default = Algorithm(shape_group=(majority_vote,))
    assert not len(prepare(default, [group("aab"), group("ccc")], CONTEXT).lengths)
    select = by_shaped_returns(default.select, (), (majority_vote,))
    groups = [replace(group(answers), task=answers) for answers in ("aab", "ccc")]
    assert select(groups, CONTEXT) == groups[:1]
    assert prepare(replace(default, select=select), groups, CONTEXT).returns.tolist() == [1, 1, 0]


def test_rewards_of_another_shape_are_refused_with_the_slot() -> None:
    with pytest.raises(ValueError, match=r"shape_group returned rewards for 0 episodes, .* 3 finished ones"):
        prepare(replace(VOTING, shape_group=(lambda group, context: [],)), [group("aab")], CONTEXT)
    wrong = replace(VOTING, shape_group=(lambda group, context: [[], [], []],))
    with pytest.raises(ValueError, match=r"shape_group returned 0 rewards for the 1 turns of episode 'e0'"):
        prepare(wrong, [group("aab")], CONTEXT)
