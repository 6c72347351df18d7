from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from agentrl.algorithms.features import (
    at_last_decisions,
    branch_weights,
    decision_rewards,
    decisions,
    has_decision,
    row_scores,
    step_rewards,
    turn_exists,
    turn_rewards,
)
from agentrl.algorithms.states import has_state_key, states
from agentrl.data import BranchPoint, Episode, Group, StopReason, Turn
from agentrl.data.batch import Batch, collate
from agentrl.errors import RequirementError


def turn(decided: str, reward: float = 0.0, *, seen: str = "o", valid: bool = True, **info: object) -> Turn:
    """One letter per reply token: d for a decision, f for a forced token."""
    return Turn(
        seen,
        "a",
        prompt_ids=(1,),
        action_ids=(5,) * len(decided),
        allowed=tuple(None if letter == "d" else (5,) for letter in decided),
        reward=reward,
        valid=valid,
        info=info,
    )


def episode(name: str, *turns: Turn, parent: BranchPoint | None = None) -> Episode:
    first, *rest = turns
    kept = (replace(first, new_sequence=True), *rest)
    return Episode(name, "env", "t", 0, kept, StopReason.TERMINATED, parent=parent)


def batch_of(*groups: Sequence[Episode], layout="trajectory") -> Batch:
    return collate([Group(f"t{number}", tuple(group)) for number, group in enumerate(groups)], layout=layout)


MIXED = (
    episode("a", turn("f", 1.0), turn("dfd", 2.0), turn("ff", 4.0), turn("df", 8.0)),
    episode("b", turn("dd", 16.0)),
)


@pytest.mark.parametrize("layout", ["trajectory", "turn"])
def test_decisions_are_in_the_order_in_which_they_were_made_and_go_back_to_their_places(layout):
    batch = batch_of(MIXED, layout=layout)
    batch = batch.select(list(reversed(range(len(batch.tokens)))))
    made = decisions(batch)
    assert made.turns.tolist() == [[1, 1, 3], [0, 0, -1]]
    assert made.valid.tolist() == [[True] * 3, [True, True, False]]
    assert made.first.tolist() == [[True, False, True], [True, False, False]]
    assert made.last.tolist() == [[False, True, True], [False, True, False]]
    numbered = torch.arange(batch.tokens.numel()).view(batch.tokens.shape)
    assert made.write(made.read(numbered)).equal(torch.where(batch.action_mask, numbered, 0))
    assert made.read(torch.full(batch.tokens.shape, torch.nan))[1, 2] == 0


def test_a_table_holds_the_rewards_of_every_turn():
    batch = batch_of(MIXED)
    assert turn_rewards(batch).tolist() == [[1, 2, 4, 8], [16, 0, 0, 0]]
    assert turn_exists(batch).tolist() == [[True] * 4, [True, False, False, False]]
    assert has_decision(batch).tolist() == [[False, True, False, True], [True, False, False, False]]


@pytest.mark.parametrize("layout", ["trajectory", "turn"])
def test_the_reward_of_a_turn_without_decisions_belongs_to_the_last_decision_before(layout):
    batch = batch_of(MIXED, layout=layout)
    # The reward of 1 comes before the first decision of its trajectory; 2 and 4 after that of turn 1.
    assert step_rewards(batch).tolist() == [[0, 6, 0, 8], [16, 0, 0, 0]]
    assert decisions(batch).read(decision_rewards(batch)).tolist() == [[0, 6, 8], [0, 16, 0]]
    assert decision_rewards(batch).sum() == 30


def test_a_value_per_turn_goes_to_its_last_decision():
    batch = batch_of(MIXED)
    made = decisions(batch)
    table = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]])
    assert made.read(at_last_decisions(table, made)).tolist() == [[0, 2, 4], [0, 5, 0]]


def test_a_row_answers_for_its_own_invalid_action_only():
    turns = (turn("d", -0.1, valid=False), turn("d", 1.0), turn("d", -0.1, valid=False))
    scores = row_scores(batch_of([episode("a", *turns), episode("b", turn("d", 1.0))]), 0.1)
    assert scores.tolist() == [pytest.approx([0.9, 1.0, 0.9]), [1, 0, 0]]


def test_states_are_numbered_within_their_group():
    one = episode("a", turn("d", seen="hall"), turn("d", seen="shed"), turn("d", seen="hall"))
    two = episode("b", turn("d", seen="shed"))
    batch = batch_of([one, two], [replace(two, id="c")])
    assert states(batch).tolist() == [[0, 1, 0], [1, -1, -1], [2, -1, -1]]


def test_states_are_told_apart_by_what_was_seen_or_by_the_environments_key_where_that_is_asked_for():
    one = episode("a", turn("d", seen="hall", state_key=7), turn("d", seen="hall", state_key=8))
    two = episode("b", turn("d", seen="shed", state_key=7), turn("d", seen="hall", state_key=None))
    batch = batch_of([one, two])
    assert states(batch).tolist() == [[0, 0], [1, 0]]
    assert states(batch, "state_key").tolist() == [[0, 1], [0, 2]]
    assert has_state_key(batch).tolist() == [[True, True], [True, False]]


def test_a_key_is_never_taken_for_an_observation():
    batch = batch_of(
        [episode("a", turn("d", seen="7"), turn("d", seen="x", state_key="7"), turn("d", seen="y"))]
    )
    assert states(batch, "state_key").tolist() == [[0, 1, 2]]


def test_keys_that_no_environment_gives_are_refused():
    with pytest.raises(RequirementError, match=r"no turn of 'env' has one; wanted .* state=observation"):
        states(batch_of([episode("a", turn("d"))]), "state_key")
    assert states(batch_of(), "state_key").shape == (0, 0)


def test_similar_observations_are_the_state_whose_first_observation_they_resemble():
    # Against "abcdefgh" the others have 7 and 6 letters in common: ratios of 14/16 and 12/16.
    texts = ["abcdefgh", "abcdefgX", "abcdefXX", "abcdefgh"]
    chain = episode("a", *(turn("d", seen=text, state_key=number) for number, text in enumerate(texts)))
    assert states(batch_of([chain]), 0.8).tolist() == [[0, 0, 1, 0]]
    assert states(batch_of([chain]), 0.75).tolist() == [[0, 0, 0, 0]]
    assert states(batch_of([chain]), 0.9).tolist() == [[0, 1, 2, 0]]


def test_branches_share_the_turns_before_they_parted():
    turns = (turn("d"), turn("d"), turn("d"))
    root = episode("root", *turns)
    child = episode("child", *turns, parent=BranchPoint("root", 2))
    grandchild = episode("grandchild", *turns, parent=BranchPoint("child", 1))
    shares = branch_weights(batch_of([root, child, grandchild]))
    assert shares.tolist() == [
        pytest.approx([1 / 3, 1 / 2, 1]),
        pytest.approx([1 / 3, 1 / 2, 1]),
        pytest.approx([1 / 3, 1, 1]),
    ]
    orphans = branch_weights(batch_of([child, replace(child, id="other")]))
    assert orphans.tolist() == [[0.5, 0.5, 1], [0.5, 0.5, 1]]


def test_an_aborted_branch_between_two_others_changes_no_share():
    turns = (turn("d"), turn("d"), turn("d"))
    root = episode("root", *turns)
    gone = replace(episode("gone", *turns, parent=BranchPoint("root", 1)), stop=StopReason.ENV_ERROR)
    late = episode("late", *turns, parent=BranchPoint("gone", 2))
    later = episode("later", *turns, parent=BranchPoint("gone", 2))
    # Turn 0 was played by root; turn 1 by what was aborted.
    assert branch_weights(batch_of([root, gone, late])).tolist() == [[0.5, 1, 1], [0.5, 1, 1]]
    assert branch_weights(batch_of([root, gone, late, later])).tolist() == [
        pytest.approx([1 / 3, 1, 1]),
        pytest.approx([1 / 3, 1 / 2, 1]),
        pytest.approx([1 / 3, 1 / 2, 1]),
    ]
    # Two in a row: what branched off is that of the root all the same.
    again = replace(episode("again", *turns, parent=BranchPoint("gone", 1)), stop=StopReason.WORKER_ERROR)
    last = episode("last", *turns, parent=BranchPoint("again", 1))
    assert branch_weights(batch_of([root, gone, again, last])).tolist() == [[0.5, 1, 1], [0.5, 1, 1]]


def test_episodes_of_one_name_in_two_groups_share_nothing():
    turns = (turn("d"), turn("d"))
    root, child = episode("root", *turns), episode("child", *turns, parent=BranchPoint("root", 1))
    shares = branch_weights(batch_of([root, child], [replace(root, id="root"), replace(child, id="child")]))
    assert shares.tolist() == [[0.5, 1]] * 4


def test_nothing_is_known_about_no_episodes():
    batch = batch_of()
    for table in (turn_rewards, turn_exists, has_decision, step_rewards, branch_weights, states):
        assert table(batch).shape == (0, 0)
    assert decision_rewards(batch).shape == (0, 0)
