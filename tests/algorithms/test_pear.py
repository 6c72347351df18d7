"""PEAR: the reward of success, less the uncertainty of the reasoning."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from token_examples import played

from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.credit import compute_advantages, prepare
from agentrl.algorithms.hooks import Context
from agentrl.algorithms.recipe import build_recipe
from agentrl.data import Episode, Group

Build = Callable[..., Algorithm]
CLOSING = (9,)  # the token that closes the reasoning, the only allowed one at its place


def episode(
    number: int, reasoning: Sequence[float], choice: Sequence[float], success: bool = True
) -> Episode:
    """One turn with these entropies, and a closing token of entropy 5 between the phases."""
    count = len(reasoning) + 1 + len(choice)
    ((made,),) = (group.episodes for group in played([[count]]))
    allowed = (*[None] * len(reasoning), CLOSING, *[(7, 8, 1, 2, 3, 4, 5, 6)] * len(choice))
    ids = (*range(1, len(reasoning) + 1), 9, *[7] * len(choice))
    turn = replace(
        made.turns[0], action_ids=ids, allowed=allowed, entropies=(*reasoning, 5.0, *choice), reward=0.3
    )
    return replace(made, id=f"e{number}", turns=(turn,), success=success)


def returns_of(algorithm: Algorithm, *episodes: Episode) -> list[float]:
    return prepare(algorithm, [Group("t0", episodes)], Context()).returns.tolist()


@pytest.mark.vector("zoo:1.5a")
def test_the_rewards_of_a_group_and_its_advantages(build: Build) -> None:
    algorithm = build("pear")
    episodes = (
        episode(0, [0.8, 1.2, 0.4], [0.3, 0.1]),
        episode(1, [0.5, 0.3], [0.2]),
        episode(2, [0.5], [0.1], success=False),
        episode(3, [0.1], [0.9], success=False),
    )
    assert returns_of(algorithm, *episodes) == pytest.approx([0.4, 0.8, 0.0, 0.0], abs=1e-12)
    batch = prepare(algorithm, [Group("t0", episodes)], Context())
    found = compute_advantages(algorithm, batch, Context())
    each = [float(found[row][batch.action_mask[row]][0]) for row in range(4)]
    assert each == pytest.approx([0.261116, 1.305579, -0.783347, -0.783347], abs=2e-6)


def test_turns_count_equally_and_replies_without_a_choice_are_reasoning() -> None:
    algorithm = build_recipe("pear", {"alpha": 0.5}).build()
    first, second = episode(0, [0.2], [0.4]), episode(0, [0.6, 1.0], [0.2])
    joined = replace(first, turns=(*first.turns, *second.turns))
    assert returns_of(algorithm, joined) == pytest.approx([1 - (0.5 - 0.5 * 0.3)])
    ((free,),) = (group.episodes for group in played([[2]]))
    said = replace(free, turns=(replace(free.turns[0], entropies=(0.3, 0.5)),), success=True)
    assert returns_of(algorithm, said) == pytest.approx([0.6])
    certain = replace(first, turns=(replace(first.turns[0], entropies=(0.1, 5.0, 0.9)),))
    assert returns_of(algorithm, certain) == [1.0]


def test_it_needs_the_entropies_of_the_rollout() -> None:
    assert "rollout:entropy" in build_recipe("pear").build().requires
