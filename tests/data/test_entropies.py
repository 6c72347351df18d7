from agentrl.data import Episode, StopReason, Turn
from agentrl.data.entropies import entropies_by_level, entropies_by_turn


def an_episode(*turns: tuple[float | None, ...]) -> Episode:
    """A turn is the entropies of its tokens, None for a forced one."""
    made = tuple(
        Turn(
            "o",
            "a",
            action_ids=(1,) * len(tokens),
            entropies=tuple(value or 0.0 for value in tokens),
            allowed=tuple((1,) if value is None else (1, 2) for value in tokens),
        )
        for tokens in turns
    )
    return Episode("e", "env", "t", 0, made, StopReason.TERMINATED)


EPISODES = [an_episode((1.0, None, 3.0), (None,), (4.0,)), an_episode((6.0,), (8.0,)), an_episode((None,))]


def test_every_level_has_one_entropy_for_each_member_that_decided():
    assert entropies_by_level(EPISODES) == {
        "token": [1.0, 3.0, 4.0, 6.0, 8.0],
        "turn": [2.0, 4.0, 6.0, 8.0],
        "trajectory": [3.0, 7.0],
    }
    assert entropies_by_level([]) == {"token": [], "turn": [], "trajectory": []}


def test_turns_of_one_index_come_together_in_order():
    assert entropies_by_turn(EPISODES) == {0: [2.0, 6.0], 1: [8.0], 2: [4.0]}
    assert list(entropies_by_turn(reversed(EPISODES))) == [0, 1, 2]
