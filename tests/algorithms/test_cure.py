"""CURE: which word is critical, what starts there, and the second stage."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from test_fr3e import a_turn, an_episode

from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.credit import prepare, with_mask
from agentrl.algorithms.hooks import Context, MiniBatch
from agentrl.algorithms.recipe import build_recipe
from agentrl.algorithms.tree_policies import critical_point
from agentrl.data import BranchPoint, Episode, Group, StopReason, Turn
from agentrl.errors import ConfigError

Build = Callable[..., Algorithm]
TEXTS = {0: " word", 1: " a", 2: "", 3: "\n\n", 4: "7", 5: "on"}


def reply(*entropies: float, tokens: str = "") -> Turn:
    """A turn whose tokens have these entropies and ids, by default of words."""
    ids = tuple(map(int, tokens)) if tokens else (0,) * len(entropies)
    return replace(a_turn(*entropies), action_ids=ids)


def policy_of(build: Build, *, step: int = 0, seed: int = 0, texts: Any = TEXTS, **settings: Any) -> Any:
    plan = build("cure", **settings).rollout
    assert plan.branch_policy is not None, "nothing branches"
    context = Context(step=step, token_text=None if texts is None else texts.__getitem__)
    return plan.branch_policy(plan.episodes, seed, context)


def drawn(trunk: Episode, build: Build | None = None, seeds: int = 40, **settings: Any) -> set[Any]:
    """The points at which the only trunk is left, over several seeds; each has all branches."""
    found = set()
    for seed in range(seeds):
        policy = policy_of(build or made, seed=seed, rollouts=1, **settings)
        policy.begin()
        (point,) = set(policy.ended(trunk))
        found.add((point.turn, point.token))
    return found


def made(name: str, **settings: Any) -> Algorithm:
    return build_recipe(name, settings).build()


@pytest.mark.vector("zoo:1.15")
def test_candidates_are_the_least_certain_words_but_the_first_token(build: Build) -> None:
    trunk = an_episode(reply(9, 0.1, 2.2, 0.3, 1.7, 0.2, tokens="000100"))
    assert drawn(trunk, build, top_k=2) == {(0, 2), (0, 4)}
    # Without the rule for words, the third of these would take its place.
    assert drawn(trunk, build, top_k=3) == {(0, 2), (0, 4), (0, 5)}
    assert drawn(trunk, build, top_k=3, texts=None) == {(0, 2), (0, 4), (0, 3)}


def test_special_tokens_white_space_and_single_characters_are_no_words() -> None:
    assert drawn(an_episode(reply(1, 9, 8, 7, 6, 5, 4, tokens="012345" + "0"))) == {(0, 5), (0, 6)}


def test_a_word_may_be_in_any_turn_and_forced_tokens_are_none() -> None:
    forced = replace(reply(9, 3), allowed=((0,), None))
    trunk = an_episode(reply(9, 1), forced, reply(2, 0.5))
    assert drawn(trunk, top_k=2) == {(1, 1), (2, 0)}


def test_the_draw_is_uniform_and_that_of_the_seed() -> None:
    trunk = an_episode(reply(*[9 - 0.1 * index for index in range(30)]))
    counts: Counter[int] = Counter()
    for seed in range(2000):
        ((point,), (again,)) = (critical_point(trunk, seed, Context(), among=20) for _ in range(2))
        assert point == again
        counts[point.token] += 1
    assert sorted(counts) == list(range(1, 21))
    assert min(counts.values()) > 60  # 100 are expected, with a deviation of 10


def test_a_group_has_its_rollouts_and_their_branches() -> None:
    assert made("cure").rollout.episodes == 16
    policy = policy_of(made)
    assert policy.begin() == [None] * 4
    trunks = [an_episode(reply(9, 1), id=f"a-{member}") for member in range(3)]
    aborted = an_episode(reply(9, 1), id="a-3", stop=StopReason.WORKER_ERROR)
    assert not any(policy.ended(trunk) for trunk in (aborted, *trunks[::-1][:2]))
    points = policy.ended(trunks[0])
    assert points == [
        *[BranchPoint(f"a-{member}", 0, 1) for member in range(3) for _ in range(3)],
        *[BranchPoint("a-3", 0)] * 3,
    ]
    assert policy.reached("a-0", None, (reply(9, 1),)) == ()


def test_without_a_word_all_start_at_the_first_observation() -> None:
    assert drawn(an_episode(reply(9, 8, tokens="01"))) == {(0, 0)}
    assert drawn(an_episode()) == {(0, 0)}


@pytest.mark.parametrize(("step", "branches"), [(0, True), (299, True), (300, False), (301, False)])
def test_the_second_stage_plays_as_many_episodes_without_branches(step: int, branches: bool) -> None:
    policy = policy_of(made, step=step)
    begun = policy.begin()
    assert begun == [None] * (4 if branches else 16)
    ended = [start for index in range(4) for start in policy.ended(an_episode(reply(9, 1), id=f"a-{index}"))]
    assert len(ended) == (12 if branches else 0)
    assert policy.reached("a-0", None, (reply(9, 1),)) == ()
    assert policy_of(made, step=10**6, second_stage=None).begin() == [None] * 4


@pytest.mark.vector("zoo:1.15")
def test_one_group_compares_all_and_branches_learn_their_suffix(build: Build) -> None:
    algorithm = build("cure")
    trunk = an_episode(a_turn(9.0, 1.0, new_sequence=True), a_turn(0.2, reward=1.0), id="trunk")
    begun = replace(trunk.turns[0], allowed=((2,), None))  # its first token was given
    inside = an_episode(begun, a_turn(0.3), id="inside", parent=BranchPoint("trunk", 0, 1))
    later = an_episode(trunk.turns[0], a_turn(0.3), id="later", parent=BranchPoint("trunk", 1))
    batch = prepare(algorithm, [Group("t", (trunk, inside, later))], Context())
    advantages = algorithm.advantage(batch, Context())
    mask = with_mask(algorithm, MiniBatch(batch, advantages), Context()).counted
    assert mask.sum(1).tolist() == [3, 2, 1]
    found = [float(row[own].unique()) for row, own in zip(advantages, mask, strict=True)]
    assert found == pytest.approx([1.154699, -0.577349, -0.577349], abs=2e-6)


@pytest.mark.parametrize("base", ["fr3e", "aepo", "cure", "arbitrary_entropy"])
def test_a_base_with_rollouts_of_its_own_is_refused(base: str) -> None:
    with pytest.raises(ConfigError, match=r"leaves the rollout as it is|nested in itself"):
        build_recipe("cure", {"base": {"name": base}})
