"""ARES: the reward for a number of uncertain moments, and what it is compared with."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from token_examples import mini_batch, played, scored

from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.credit import prepare
from agentrl.algorithms.hooks import Context
from agentrl.algorithms.methods.ares import ARES, upper_quantile
from agentrl.algorithms.recipe import build_recipe
from agentrl.data import Episode, Group

Build = Callable[..., Algorithm]
ENTROPIES = (0.1, 2, 0.2, 1.8, 1.6, 1.4, 0.2, 0.1)
KEEPING = build_recipe("grpo", {"drop_equal_groups": False})


def group_of(successes: int, size: int, counts: list[int]) -> Group:
    """A group in which this many succeed, and whose episodes have these numbers of moments above 1."""
    (group,) = played([[count + 1] for count in counts], [0.0] * size)
    episodes = tuple(
        replace(
            episode,
            success=member < successes,
            turns=(replace(episode.turns[0], entropies=(0.0, *[2.0] * counts[member])),),
        )
        for member, episode in enumerate(group.episodes)
    )
    return replace(group, episodes=episodes)


def known(threshold: float, target: float) -> Context:
    names = ("threshold", "target/easy", "target/medium", "target/hard")
    values = (threshold, target, target, target)
    history = {f"train/algorithm/ares/{name}": [value] for name, value in zip(names, values, strict=True)}
    return Context(step=1, history=history)


@pytest.mark.vector("zoo:1.23a")
@pytest.mark.parametrize(
    ("successes", "counts", "member", "wanted"),
    [
        (3, [16, 9, 9, 10], 0, -0.5),  # easy, succeeded
        (2, [4, 9, 9, 9], 0, -0.181818),  # medium, succeeded
        (1, [14, 9, 9, 9], 0, 0.554485),  # hard, succeeded
        (1, [9, 14, 9, 9], 1, 0.324942),  # hard, failed
        (3, [9, 9, 9, 10], 3, 0.15),  # easy, failed, at the target
    ],
)
def test_the_change_of_the_reward_by_difficulty_and_outcome(
    build: Build, successes: int, counts: list[int], member: int, wanted: float
) -> None:
    settings = {"base": KEEPING} if build.__name__ == "build_base" else {"base": KEEPING, "window": 1}
    batch = prepare(build("ares", **settings), [group_of(successes, 4, counts)], known(1.0, 10.0))
    assert float(batch.returns[member]) == pytest.approx(wanted, abs=5e-7)


def spoken() -> Episode:
    ((episode,),) = (group.episodes for group in played([[8]]))
    return replace(episode, turns=(replace(episode.turns[0], entropies=ENTROPIES),))


@pytest.mark.vector("zoo:1.23b")
def test_the_means_of_the_windows_and_their_quantile(build: Build) -> None:
    means = ARES().windows(spoken())
    assert means == pytest.approx([1.4, 1.25, 1.25, 0.825])
    assert upper_quantile(means) == pytest.approx(1.3775)
    batch = scored([replace(group, episodes=(spoken(),)) for group in played([[8]])], logprobs=[-1.0] * 8)
    logged = {
        name: value
        for each in build("ares").diagnostics
        for name, value in each(mini_batch(batch, 0.0), Context()).items()
    }
    assert logged.get("ares/threshold", 0.0) == pytest.approx(1.3775)


def test_threshold_and_target_are_moving_averages_of_the_steps_before() -> None:
    batch = scored([replace(group, episodes=(spoken(),)) for group in played([[8]])], logprobs=[-1.0] * 8)
    algorithm = build_recipe("ares", {"decay": 0.9}).build()
    logged = algorithm.diagnostics[-1](mini_batch(batch, 0.0), known(1.0, 5.0))
    assert logged["ares/threshold"] == pytest.approx(0.9 * 1.0 + 0.1 * 1.3775)
    assert logged["ares/target/hard"] == pytest.approx(0.9 * 5.0 + 0.1 * 3)  # three windows above 1


def test_without_a_past_the_reward_is_that_of_the_environment() -> None:
    algorithm = build_recipe("ares", {"base": KEEPING, "window": 1}).build()
    assert prepare(algorithm, [group_of(3, 4, [16] * 4)], Context()).returns.tolist() == [0.0] * 4
