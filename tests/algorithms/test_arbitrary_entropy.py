"""Arbitrary-entropy AEPO: the temperature, what is replaced and by what, and where it is scored."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_fr3e import a_turn, an_episode

from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.credit import compute_advantages, prepare, with_mask
from agentrl.algorithms.hooks import Context, MiniBatch, ReplyState
from agentrl.algorithms.methods.arbitrary_entropy import ArbitraryEntropy
from agentrl.algorithms.recipe import build_recipe
from agentrl.algorithms.stack import build_stack
from agentrl.data import Group, StopReason
from agentrl.errors import ConfigError

Build = Callable[..., Algorithm]
LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0], dtype=torch.float64)
SIZES = {"episodes": 3, "tempered": 2}


def entropy(probabilities: torch.Tensor) -> float:
    return float(-(probabilities * probabilities.log()).sum())


@pytest.mark.vector("zoo:1.1")
@pytest.mark.parametrize(
    ("factor", "push", "after"),
    [
        (1.2, [-0.057596, 0.017930, 0.023597, 0.016069], 0.950059),
        (0.8, None, 0.944248),
    ],
)
def test_tokens_of_a_hotter_policy_raise_the_entropy_and_those_of_a_colder_one_lower_it(
    factor: float, push: list[float] | None, after: float
) -> None:
    """The expected step on the logits is p_T - p, since nothing corrects for T."""
    plain, tempered = LOGITS.softmax(0), (LOGITS / factor).softmax(0)
    assert plain.tolist() == pytest.approx([0.64391, 0.23688, 0.08714, 0.03206], abs=5e-6)
    assert entropy(plain) == pytest.approx(0.947537, abs=5e-7)
    if push is not None:
        assert (tempered - plain).tolist() == pytest.approx(push, abs=5e-7)
    assert entropy((LOGITS + 0.1 * (tempered - plain)).softmax(0)) == pytest.approx(after, abs=5e-7)


def groups_of(*returns: Sequence[float], aborted: Sequence[int] = ()) -> list[Group]:
    """Groups of episodes of one turn; in a group of five, the last two are the second rollout."""
    return [
        Group(
            f"t{number}",
            tuple(
                an_episode(
                    a_turn(0.5, 0.4, reward=value, new_sequence=True),
                    id=f"{number}-{member}",
                    stop=StopReason.ENV_ERROR if member in aborted else StopReason.TERMINATED,
                )
                for member, value in enumerate(group)
            ),
        )
        for number, group in enumerate(returns)
    ]


def mixed(
    algorithm: Algorithm, groups: list[Group], context: Context | None = None, **more: Any
) -> dict[str, float]:
    """The advantages of the episodes that are learned from, by name."""
    context = context or Context()
    batch = prepare(algorithm, groups, context, selected=True, **more)
    advantages = compute_advantages(algorithm, batch, context)
    mini = with_mask(algorithm, MiniBatch(batch, advantages), context)
    return {
        batch.episodes[int(batch.trajectory[row])].id: float(advantages[row][mini.counted[row]].unique())
        for row in range(len(batch.tokens))
        if bool(mini.counted[row].any())
    }


RETURNS = ([1, 0, 0, 1, 0], [0, 0, 1, 0, 1], [1, 1, 1, 1, 1])


@pytest.mark.vector("zoo:1.1")
@pytest.mark.parametrize("layout", ["trajectory", "turn"])
def test_good_tempered_episodes_replace_the_first_plain_ones(build: Build, layout: Any) -> None:
    algorithm = build("arbitrary_entropy", **SIZES)
    found = mixed(algorithm, groups_of(*RETURNS), layout=layout)
    high, low = 1.154701, -0.577350
    assert found == pytest.approx(
        {
            "0-2": low,
            "0-3": 1.0,
            "1-0": low,
            "1-1": low,
            "1-2": high,
            "1-4": 1.0,
            "2-0": 0.0,
            "2-1": 0.0,
            "2-2": 0.0,
        },
        abs=5e-6,
    )


@pytest.mark.parametrize(
    ("replaced", "last", "count"),
    [(60, 0.4, 2), (60, 0.5, 2), (60, 0.6, 1), (1, 0.4, 1), (1, 0.6, 0), (0, 0.4, 0)],
)
def test_the_number_of_replaced_episodes_is_exact_and_halved_above_the_target(
    replaced: int, last: float, count: int
) -> None:
    algorithm = build_recipe("arbitrary_entropy", {**SIZES, "replaced": replaced}).build()
    context = Context(history={"train/algorithm/arbitrary_entropy/entropy": [9.0, last]})
    found = mixed(algorithm, groups_of(*RETURNS), context)
    assert sum(name[-1] in "34" for name in found) == count
    assert sum(name[-1] in "012" for name in found) == 9 - count
    assert len(found) == 9  # the update batch keeps its size


@pytest.mark.parametrize("tempered", [(0, 0), (1, 1)])
def test_with_nothing_kept_nothing_is_replaced(tempered: tuple[float, float]) -> None:
    algorithm = build_recipe("arbitrary_entropy", SIZES).build()
    found = mixed(algorithm, groups_of([1, 0, 0, *tempered]))
    assert sorted(found) == ["0-0", "0-1", "0-2"]


def test_members_are_those_of_the_rollout_also_where_some_were_aborted() -> None:
    algorithm = build_recipe("arbitrary_entropy", SIZES).build()
    assert sorted(mixed(algorithm, groups_of([1, 0, 0, 1, 0], aborted=[0]))) == ["0-2", "0-3"]
    # The other tempered one is alone, so that there is nothing that it is better than.
    assert sorted(mixed(algorithm, groups_of([1, 0, 0, 1, 0], aborted=[4]))) == ["0-0", "0-1", "0-2"]
    assert mixed(algorithm, groups_of([1, 0, 0, 1, 0], aborted=range(5))) == {}
    assert sorted(mixed(algorithm, groups_of([1, 0, 0, 1, 0], aborted=[0, 1, 2]))) == []


def test_the_temperature_follows_the_entropy_of_the_last_step() -> None:
    algorithm = build_recipe("arbitrary_entropy", SIZES).build()
    hook = algorithm.rollout.reply_temperature
    assert hook is not None
    assert (algorithm.rollout.episodes, algorithm.rollout.second) == (5, 2)

    def temperatures(*past: float) -> list[float | Any]:
        context = Context(history={"train/algorithm/arbitrary_entropy/entropy": past})
        return [hook(ReplyState("t", "e", member, 0, None, 0.5), context) for member in range(5)]

    assert temperatures() == [0.5, 0.5, 0.5, 0.6, 0.6]
    assert temperatures(0.9, 0.5) == [0.5, 0.5, 0.5, 0.6, 0.6]
    assert temperatures(0.1, 0.51) == [0.5, 0.5, 0.5, 0.4, 0.4]


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        (["hapo", "arbitrary_entropy"], None),
        ([{"name": "hapo", "temperature_change": 0.05}, "arbitrary_entropy"], "leaves the rollout"),
        (["arbitrary_entropy", {"name": "hapo", "temperature_change": 0.05}], "chooses temperatures"),
        (["fr3e", "arbitrary_entropy"], "leaves the rollout"),
        (["arbitrary_entropy", "aepo"], "begin with tokens of another temperature"),
        (["arbitrary_entropy", "tis"], "without importance correction"),
        (["dppo", "arbitrary_entropy"], "as if it had been sampled"),
        (["siren", "arbitrary_entropy"], "two targets of the entropy"),
        (["arbitrary_entropy", "dcpo"], "two targets of the entropy"),
        (["dcpo", "siren"], "two targets of the entropy"),
    ],
)
def test_what_would_contradict_it_is_refused(parts: list[Any], why: str | None) -> None:
    if why is None:
        build_stack({"compose": parts}).build()
        return
    with pytest.raises(ConfigError, match=why):
        build_stack({"compose": parts}).build()


def test_no_more_episodes_than_there_are_can_be_tempered() -> None:
    plan = ArbitraryEntropy().build().rollout
    with pytest.raises(ConfigError, match="second is 8, wanted less than episodes, 8"):
        replace(plan, second=8)
