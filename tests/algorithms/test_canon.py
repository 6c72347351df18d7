"""CANON: returns compared between the halves of a group."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.credit import compute_advantages
from agentrl.algorithms.hooks import Context
from agentrl.algorithms.methods.canon import CANON
from agentrl.algorithms.methods.grpo import DrGRPO
from agentrl.data import Episode, Group, StopReason, Turn
from agentrl.data.batch import Batch, collate

Build = Callable[..., Algorithm]
RETURNS = [1.0, 1.0, 0.0, 1.0, 0.0, 0.0]
ENTROPIES = [0.9, 0.8, 0.7, 0.3, 0.2, 0.1]
THIRD = 1 / 3
BETWEEN = [2 * THIRD, 2 * THIRD, -THIRD, THIRD, -2 * THIRD, -2 * THIRD]
WITHIN = [THIRD, THIRD, -2 * THIRD, 2 * THIRD, -THIRD, -THIRD]


def batch_of(
    returns: Sequence[float], entropies: Sequence[Sequence[float]], layout: Any = "trajectory"
) -> Batch:
    """A group of episodes, each with a turn of one token for every entropy."""
    episodes = []
    for number, (reward, values) in enumerate(zip(returns, entropies, strict=True)):
        turns = tuple(
            Turn(
                "o",
                "a",
                prompt_ids=(1,),
                action_ids=(2,),
                logprobs=(-0.5,),
                entropies=(value,),
                reward=reward if index == len(values) - 1 else 0.0,
                new_sequence=index == 0,
            )
            for index, value in enumerate(values)
        )
        episodes.append(Episode(f"e{number}", "env", "t", 0, turns, StopReason.TERMINATED))
    batch = collate([Group("t", tuple(episodes))], layout=layout)
    return replace(
        batch,
        logprobs=batch.logprobs.double(),
        old_logprobs=batch.logprobs.double(),
        old_entropies=batch.entropies.double(),
    )


def advantages(algorithm: Algorithm, batch: Batch) -> list[float]:
    """The advantage of every episode, which is that of all its tokens."""
    found = compute_advantages(algorithm, batch, Context())
    each = []
    for owner in range(len(batch.episodes)):
        values = found[batch.trajectory == owner][batch.action_mask[batch.trajectory == owner]]
        assert len(set(values.tolist())) == 1
        each.append(float(values[0]))
    return each


@pytest.mark.parametrize("step", [0, 15, 30, 50, 70, 109, 110, 149])
def test_the_mix_follows_a_cosine_with_restarts(step: int) -> None:
    """Of 150 steps 30 rise to 0.6, and three cycles of 40 fall to 0."""
    wanted = {0: 0, 15: 0.3, 30: 0.6, 50: 0.3, 70: 0.6, 109: 0.000925, 110: 0.6, 149: 0.000925}[step]
    context = Context(step=step, total_steps=150)
    assert 1 - CANON(schedule="restarts").mix_at(context) == pytest.approx(wanted, abs=1e-6)
    assert CANON(schedule="reversed").mix_at(context) == pytest.approx(wanted, abs=1e-6)
    assert CANON(mix=0.7).mix_at(context) == 0.7


@pytest.mark.vector("zoo:1.6a")
@pytest.mark.parametrize(("mix", "wanted"), [(1.0, BETWEEN), (0.0, WITHIN)])
@pytest.mark.parametrize("layout", ["trajectory", "turn"])
def test_the_halves_are_compared_with_each_other_or_within(
    build: Build, mix: float, wanted: Any, layout: Any
) -> None:
    # The mean of two turns is the entropy of the example.
    batch = batch_of(RETURNS, [[value - 0.05, value + 0.05] for value in ENTROPIES], layout)
    assert advantages(build("canon", mix=mix), batch) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.vector("zoo:1.6b")
def test_half_of_each_is_the_mean_of_the_group() -> None:
    batch = batch_of(RETURNS, [[value] for value in ENTROPIES])
    found = advantages(CANON(mix=0.5).build(), batch)
    assert found == pytest.approx([0.5, 0.5, -0.5, 0.5, -0.5, -0.5], abs=1e-12)
    assert found == pytest.approx(advantages(DrGRPO().build(), batch), abs=1e-12)


def test_alpha_and_beta_prefer_the_half_with_more_entropy() -> None:
    batch = batch_of(RETURNS, [[value] for value in ENTROPIES])
    # high: R - .6/3 + .1, low: .6 R - 2/3 - .1
    wanted = [0.9, 0.9, -0.1, 0.6 - 2 * THIRD - 0.1, -2 * THIRD - 0.1, -2 * THIRD - 0.1]
    assert advantages(CANON(alpha=0.6, beta=0.1).build(), batch) == pytest.approx(wanted, abs=1e-12)


def test_by_length_alpha_prefers_the_short_half() -> None:
    batch = batch_of([1.0, 0.0, 1.0, 0.0, 1.0], [[0.5] * count for count in (5, 4, 1, 2, 3)])
    # Short are the two of length 1 and 2, with mean .5; long the other three, with mean 2/3.
    wanted = [0.6 - 0.5, -0.5, 1 - 0.6 * 2 / 3, -0.6 * 2 / 3, 0.6 - 0.5]
    assert advantages(CANON(measure="length", alpha=0.6).build(), batch) == pytest.approx(wanted, abs=1e-12)


def test_ties_keep_their_order_however_they_are_rounded() -> None:
    noise = [0.5 - 1e-13 * number for number in range(4)]
    batch = batch_of([1.0, 0.0, 0.0, 0.0], [[value] for value in noise])
    assert advantages(CANON().build(), batch) == [1.0, 0.0, -0.5, -0.5]


def test_equal_returns_and_groups_of_one() -> None:
    batch = batch_of([0.1 + 0.2] * 3, [[0.1], [0.2], [0.3]])
    assert advantages(CANON().build(), batch) == [0.0] * 3
    batch = batch_of([0.7], [[0.1]])
    assert advantages(CANON(alpha=0.5, beta=0.2).build(), batch) == [0.0]
    assert advantages(CANON(singleton="raw").build(), batch) == [0.7]


def test_only_entropies_need_a_scoring_pass() -> None:
    assert "entropy" in CANON().build().requires
    assert "entropy" not in CANON(measure="length").build().requires
