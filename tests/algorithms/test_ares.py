"""ARES: the reward for a number of uncertain moments, and what it is compared with."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from token_examples import in_order, mini_batch, played, scored

from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.credit import prepare
from agentrl.algorithms.hooks import Context
from agentrl.algorithms.methods.ares import ARES, upper_quantile
from agentrl.algorithms.recipe import build_recipe
from agentrl.data import Episode, Group
from agentrl.errors import CheckpointError
from agentrl.learn.objective import build_objective

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
    batch = prepare(build("ares", base=KEEPING, window=1), [group_of(successes, 4, counts)], known(1.0, 10.0))
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


def drifted(build: Build, steps: int) -> Algorithm:
    """After steps at a divergence of .03 nats in a group in which all succeed."""
    algorithm = build("ares", kl_coefficient=0.01)
    # exp(d) - d - 1 = .03 at this d.
    batch = scored([group_of(2, 2, [1, 1])], logprobs=[-1.0] * 4, reference=[-1.0 + 0.2353441048] * 4)
    assert algorithm.find_stateful()
    for step in range(steps):
        for component in algorithm.find_stateful().values():
            component.update(mini_batch(batch, 0.0), Context(step))
    return algorithm


@pytest.mark.vector("zoo:1.23c")
def test_the_factor_of_the_divergence_after_two_updates(build: Build) -> None:
    algorithm = drifted(build, 2)
    batch = scored([group_of(2, 2, [1, 1])], logprobs=[-1.0] * 4, reference=[-1.2] * 4)
    objective = build_objective(mini_batch(batch, 0.0), algorithm, Context())
    (weights,) = [4 * factors for term, factors in objective.terms if term.name == "ares_kl"]
    assert in_order(batch, weights) == pytest.approx([1.008950] * 4, abs=5e-7)
    wrong = scored([group_of(0, 2, [1, 1])], logprobs=[-1.0] * 4, reference=[-1.2] * 4)
    objective = build_objective(mini_batch(wrong, 0.0), algorithm, Context())
    (weights,) = [4 * factors for term, factors in objective.terms if term.name == "ares_kl"]
    assert in_order(wrong, weights) == pytest.approx([1.0] * 4)


def test_the_factors_are_in_the_checkpoint() -> None:
    def build(name: str, **settings: Any) -> Algorithm:
        return build_recipe(name, settings).build()

    (held,), (other,) = (drifted(build, steps).find_stateful().values() for steps in (3, 0))
    other.load_state_dict(held.state_dict(), Context())
    assert other.state_dict() == held.state_dict()
    assert held.state_dict()["log_beta"]["easy"] > 0
    with pytest.raises(CheckpointError, match="ares_kl"):
        other.load_state_dict({"kl": {}}, Context())
