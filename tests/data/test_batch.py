from dataclasses import replace

import pytest
import torch

from agentrl.data import Episode, Group, StopReason, Turn
from agentrl.data.batch import collate

CHOICE = Turn(
    "room",
    "take mug",
    prompt_ids=(5, 9),
    action_ids=(7, 3),
    logprobs=(-0.7, 0.0),
    entropies=(0.69, 0.0),
    allowed=((7, 8), (3,)),
    reward=0.25,
    new_sequence=True,
)
FREE = Turn(
    "hall", "go", prompt_ids=(6,), action_ids=(1, 2), logprobs=(-1.0, -2.0), entropies=(0.5, 0.4), reward=1.0
)


def episode(
    *turns: Turn, id: str = "e", task: str = "t", stop: StopReason = StopReason.TERMINATED
) -> Episode:
    return Episode(id, "env", task, 0, turns, stop, success=True)


def batch_of(*episodes: Episode, layout: str = "trajectory"):
    return collate([Group("t", episodes)], layout=layout)


def test_a_trajectory_is_one_row_in_which_only_decisions_are_sampled():
    batch = batch_of(episode(CHOICE, FREE))
    assert batch.tokens.tolist() == [[5, 9, 7, 3, 6, 1, 2]]
    assert batch.lengths.tolist() == [7]
    assert batch.action_mask.tolist() == [[False, False, True, False, False, True, True]]
    assert batch.turns.tolist() == [[-1, -1, 0, 0, -1, 1, 1]]
    assert batch.logprobs[0].tolist() == pytest.approx([0, 0, -0.7, 0, 0, -1, -2])
    assert batch.entropies[0].tolist() == pytest.approx([0, 0, 0.69, 0, 0, 0.5, 0.4])
    assert batch.rewards.tolist() == [[0, 0, 0, 0.25, 0, 0, 1.0]]
    assert batch.returns.tolist() == [1.25]
    assert batch.allowed is not None
    assert (batch.allowed.rows.tolist(), batch.allowed.positions.tolist()) == ([0], [2])
    assert batch.allowed.ids.tolist() == [[7, 8]]


def test_in_the_turn_layout_each_turn_is_a_row_with_its_history_as_context():
    batch = batch_of(episode(CHOICE, FREE), layout="turn")
    assert batch.tokens.tolist() == [[5, 9, 7, 3, 0, 0, 0], [5, 9, 7, 3, 6, 1, 2]]
    assert batch.lengths.tolist() == [4, 7]
    assert batch.action_mask.tolist()[1] == [False] * 5 + [True, True]
    assert batch.turns.tolist() == [[-1, -1, 0, 0, -1, -1, -1], [-1, -1, -1, -1, -1, 1, 1]]
    assert batch.trajectory.tolist() == [0, 0]
    assert batch.rewards.sum().item() == 1.25
    assert batch.returns.tolist() == [1.25]


@pytest.mark.parametrize("layout", ["trajectory", "turn"])
def test_a_fresh_turn_forgets_what_came_before(layout):
    batch = batch_of(episode(CHOICE, replace(FREE, new_sequence=True)), layout=layout)
    assert batch.tokens.tolist() == [[5, 9, 7, 3], [6, 1, 2, 0]]
    assert batch.trajectory.tolist() == [0, 0]
    assert batch.turns.tolist() == [[-1, -1, 0, 0], [-1, 1, 1, -1]]


def test_aborted_episodes_are_left_out_of_rows_returns_and_groups():
    aborted = episode(CHOICE, id="aborted", stop=StopReason.ENV_ERROR)
    batch = collate([Group("a", (aborted, episode(CHOICE))), Group("b", (episode(FREE),))])
    assert [item.id for item in batch.episodes] == ["e", "e"]
    assert batch.returns.tolist() == [0.25, 1.0]
    assert batch.groups.tolist() == [0, 1]
    assert batch.group.tolist() == [0, 1]


def test_an_episode_without_turns_has_no_row_but_a_return():
    full = episode(id="full", stop=StopReason.CONTEXT_LIMIT)
    batch = batch_of(full, episode(CHOICE))
    assert batch.trajectory.tolist() == [1]
    assert batch.returns.tolist() == [0.0, 0.25]


def test_tokens_that_are_not_to_be_imitated_are_context():
    batch = batch_of(episode(CHOICE, replace(FREE, trainable=False)))
    assert batch.action_mask.tolist() == [[False, False, True, False, False, False, False]]
    assert batch.turns.tolist()[0][5:] == [1, 1]


def test_rows_are_padded_on_the_right():
    batch = batch_of(episode(CHOICE, FREE), episode(CHOICE))
    assert batch.tokens.tolist()[1] == [5, 9, 7, 3, 0, 0, 0]
    assert batch.turns.tolist()[1] == [-1, -1, 0, 0, -1, -1, -1]
    assert not batch.action_mask[1, 4:].any()


def test_selecting_rows_trims_the_width_and_keeps_the_choices_of_the_right_rows():
    batch = batch_of(episode(CHOICE, FREE), episode(CHOICE, id="second"), episode(FREE, id="third"))
    part = batch.select([2, 1])
    assert part.tokens.tolist() == [[6, 1, 2, 0], [5, 9, 7, 3]]
    assert part.trajectory.tolist() == [2, 1]
    assert part.allowed is not None
    assert (part.allowed.rows.tolist(), part.allowed.positions.tolist()) == ([1], [2])
    assert batch.select([2]).allowed is None
    assert batch.select([]).tokens.shape == (0, 0)


def test_selecting_keeps_the_scores_of_the_rows():
    batch = batch_of(episode(CHOICE), episode(FREE))
    scored = replace(batch, old_logprobs=torch.tensor([[0, 0, 5.0, 0], [0, 6.0, 7.0, 0]]))
    assert scored.select([1]).old_logprobs.tolist() == [[0, 6, 7]]


def test_no_groups_give_an_empty_batch():
    batch = collate([])
    assert batch.tokens.shape == (0, 0)
    assert batch.returns.shape == (0,)


def test_a_wrong_shape_is_refused_with_the_field_and_both_shapes():
    batch = batch_of(episode(CHOICE))
    with pytest.raises(ValueError, match=r"Batch.rewards has shape \(1, 3\), wanted \(1, 4\)"):
        replace(batch, rewards=batch.rewards[:, :3])


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        (replace(FREE, action_ids=()), r"episode 'e', turn 0: the reply has no tokens"),
        (replace(FREE, prompt_ids=()), "position 0, wanted a prompt before the first decision"),
        (replace(FREE, allowed=((1, 2), (8, 9))), r"token 2 is not among the allowed \(8, 9\)"),
        (replace(FREE, logprobs=(-1.0,)), "1 logprobs for 2 reply tokens"),
    ],
)
def test_episodes_that_cannot_be_learned_from_are_refused(turn, message):
    with pytest.raises(ValueError, match=message):
        batch_of(episode(turn))
