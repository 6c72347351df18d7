"""ETTRL: trees, the label of the majority, and advantages by the entropy of an episode."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from played import advantages, batch_of, play
from test_fr3e import a_turn, an_episode

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.credit import prepare, with_mask
from agentrl.algorithms.hooks import Context, MiniBatch
from agentrl.algorithms.recipe import build_recipe
from agentrl.data import BranchPoint, Episode, Group, StopReason

Build = Callable[..., Algorithm]
MEANS = [0.4, 0.9, 0.6, 1.2, 0.5, 0.6]
RESHAPED = [1.304099, -0.652049, 1.043279, -0.260820, 1.173689, -1.043279]


def answering(answers: Sequence[str], means: Sequence[float] = MEANS) -> list[Episode]:
    """Episodes of two turns, the last of which says the answer; the environment's reward is always 1."""
    made = []
    for index, (answer, mean) in enumerate(zip(answers, means, strict=True)):
        episode = play(f"e{index}", ["q", "again"], 1.0, entropies=[mean - 0.1, mean + 0.1])
        *turns, last = episode.turns
        made.append(replace(episode, turns=(*turns, replace(last, action=answer))))
    return made


@pytest.mark.vector("zoo:1.9")
@pytest.mark.parametrize("layout", ["trajectory", "turn"])
def test_majority_and_entropy(build: Build, layout: Any) -> None:
    algorithm = build("ettrl", reward="majority")
    batch = batch_of(algorithm, answering("abacab"), layout=layout)
    found = advantages(algorithm, batch)
    assert found[::2] == pytest.approx(RESHAPED, abs=2e-6)
    assert found[1::2] == found[::2]


@pytest.mark.vector("zoo:1.9")
def test_the_same_without_entropy_is_grpo_of_the_majority() -> None:
    algorithm = build_recipe("ettrl", {"reward": "majority", "advantage": "plain"}).build()
    batch = batch_of(algorithm, answering("abacab"))
    assert batch.returns.tolist() == [1, 0, 1, 0, 1, 0]
    assert advantages(algorithm, batch)[::2] == pytest.approx([0.912869, -0.912869] * 3, abs=2e-6)


def test_the_size_of_advantages_can_be_limited_instead() -> None:
    wide = {"reward": "majority", "advantage": "clip", "limit": 0.9}
    algorithm = build_recipe("ettrl", wide).build()
    assert advantages(algorithm, batch_of(algorithm, answering("abacab"))) == [0.9, 0.9, -0.9, -0.9] * 3
    by_default = build_recipe("ettrl", {"advantage": "clip"}).build()
    batch = batch_of(by_default, [play(f"{index}", "o", float(index == 0)) for index in range(9)])
    assert advantages(by_default, batch) == pytest.approx([2.0] + [-1 / 3] * 8, abs=2e-6)


def test_an_episode_twice_as_unsure_as_its_group_is_left_out_and_no_entropy_changes_nothing() -> None:
    algorithm = build_recipe("ettrl").build()
    batch = batch_of(
        algorithm,
        [
            play(f"{index}", "o", index % 2, entropies=[value])
            for index, value in enumerate([3.0, 0.2, 0.2, 0.2])
        ],
    )
    assert advantages(algorithm, batch)[0] == 0
    calm = batch_of(algorithm, [play(f"{index}", "o", index % 2, entropies=[0.0]) for index in range(2)])
    assert advantages(algorithm, calm) == pytest.approx([-0.707106, 0.707106], abs=2e-6)


@pytest.mark.parametrize(
    ("answers", "rewards"),
    [
        (["b", "a", "a", "b"], [1, 0, 0, 1]),  # of equally frequent ones, the first
        (["", "", "a", ""], [0, 0, 1, 0]),
        (["", ""], [0, 0]),
        (["A. ", "a", "c"], [1, 1, 0]),
    ],
)
def test_the_label_is_the_most_frequent_answer(answers: list[str], rewards: list[float]) -> None:
    algorithm = build_recipe("ettrl", {"reward": "majority"}).build()
    batch = batch_of(algorithm, answering(answers, [0.5] * len(answers)))
    assert batch.returns.tolist() == rewards


def test_groups_are_selected_by_their_labels() -> None:
    algorithm = build_recipe("ettrl", {"reward": "majority"}).build()
    groups = [Group(name, tuple(answering(name, [0.5] * 3))) for name in ("aaa", "aab")]
    assert [group.task for group in algorithm.select(groups, Context())] == ["aab"]


@pytest.mark.vector("zoo:1.9")
def test_leaves_and_cost() -> None:
    assert functional.tree_episodes(12, 2, 2) == 60
    assert functional.tree_cost(2, 2) == pytest.approx(0.6)
    assert functional.tree_cost(3, 2) == pytest.approx(0.571429, abs=5e-7)
    assert functional.tree_cost(0, 2) == 1
    assert build_recipe("ettrl", {"preset": "paper"}).build().rollout.episodes == 60


def started(trunks: Sequence[Episode], **settings: Any) -> Counter[BranchPoint | None]:
    """What is started when the trunks end, in any order."""
    plan = build_recipe("ettrl", settings).build().rollout
    assert plan.branch_policy is not None
    assert plan.episodes is not None
    orders = []
    for order in (trunks, trunks[::-1]):
        policy = plan.branch_policy(plan.episodes, 0, Context())
        assert policy.begin() == [None] * len(trunks)
        *before, last = [list(policy.ended(trunk)) for trunk in order]
        assert not any(before)
        assert list(policy.ended(trunks[0])) == []
        orders.append(last)
    assert orders[0] == orders[1]
    assert len(orders[0]) + len(trunks) == plan.episodes
    return Counter(orders[0])


def test_every_trunk_forks_at_its_own_least_certain_points() -> None:
    one = an_episode(a_turn(9.0, 0.1, 2.0, 0.3, 1.5), id="one")
    several = an_episode(a_turn(9.0), a_turn(0.5), a_turn(0.4), a_turn(0.9), id="several")
    assert started([one, several]) == {
        BranchPoint("one", 0, 2): 2,
        BranchPoint("one", 0, 4): 2,
        BranchPoint("several", 1): 2,
        BranchPoint("several", 3): 2,
    }
    assert started([several], trees=1, anchor="token", points=1, branches=5) == {
        BranchPoint("several", 3, 0): 5
    }


def test_branches_without_a_point_start_at_the_first_observation() -> None:
    short, none = an_episode(a_turn(9.0, 1.0), id="short"), an_episode(a_turn(9.0), id="none")
    aborted = an_episode(a_turn(9.0, 1.0, 2.0), id="aborted", stop=StopReason.ENV_ERROR)
    assert started([short, none, aborted], trees=3) == {
        BranchPoint("short", 0, 1): 2,
        BranchPoint("short", 0): 2,
        BranchPoint("none", 0): 4,
        BranchPoint("aborted", 0): 4,
    }
    assert started([short], trees=1, points=0) == {}


def test_a_branch_is_learned_from_after_its_branch_point() -> None:
    algorithm = build_recipe("ettrl").build()
    trunk = an_episode(a_turn(0.1, new_sequence=True), a_turn(0.2), a_turn(0.3, reward=1.0), id="trunk")
    branch = an_episode(*trunk.turns[:2], a_turn(0.3, 0.3), id="b", parent=BranchPoint("trunk", 2))
    anew = an_episode(a_turn(0.1, 0.1, new_sequence=True), id="anew", parent=BranchPoint("trunk", 0))
    batch = prepare(algorithm, [Group("t", (trunk, branch, anew))], Context())
    mask = with_mask(algorithm, MiniBatch(batch, batch.logprobs), Context()).counted
    assert mask.sum(1).tolist() == [3, 2, 2]
    assert batch.action_mask.sum(1).tolist() == [3, 4, 2]
    assert bool((batch.turns[1][mask[1]] == 2).all())
    metrics = algorithm.diagnostics[-1](MiniBatch(batch, batch.logprobs), Context())
    assert metrics == pytest.approx({"trees/branches": 2 / 3, "trees/own_tokens": 7 / 9})
