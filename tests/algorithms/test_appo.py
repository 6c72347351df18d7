"""APPO: where it branches, what branches are worth, and the factor of the future."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from agentrl.algorithms.credit import compute_advantages, prepare
from agentrl.algorithms.functional import future_ratio, influence_scores
from agentrl.algorithms.hooks import Context, MiniBatch, Outputs
from agentrl.algorithms.influence_branching import OMEGA, InfluenceBranching
from agentrl.algorithms.recipe import build_recipe, recipe_tree
from agentrl.data import BranchPoint, Episode, Group, StopReason, Turn
from agentrl.data.batch import Batch, collate
from agentrl.errors import ConfigError
from agentrl.learn.objective import build_objective

CONTEXT = Context()
GAPS = [0.02, -0.01, 0.03, 0.0]
ENTROPIES = [0.2, 1.4, 0.9, 0.1]


def a_turn(*entropies: float, reward: float = 0.0, new_sequence: bool = False, forced: int = 0) -> Turn:
    """One decision per entropy, in nats, and then forced tokens."""
    count = len(entropies)
    return Turn(
        "o",
        "a",
        prompt_ids=(1,),
        action_ids=(2,) * (count + forced),
        logprobs=(-0.5,) * count + (0.0,) * forced,
        entropies=entropies + (0.0,) * forced,
        allowed=((2, 3),) * count + ((2,),) * forced if forced else None,
        reward=reward,
        new_sequence=new_sequence,
    )


def an_episode(
    *turns: Turn,
    id: str = "e-0",
    parent: BranchPoint | None = None,
    stop: StopReason = StopReason.TERMINATED,
) -> Episode:
    return Episode(id, "env", "t", 0, turns, stop, parent=parent)


def moved_by(gaps: list[float]) -> Callable[[Episode], list[list[float]]]:
    """A learner whose log-probabilities differ from the sampler's by these numbers, in order."""

    def score(episode: Episode) -> list[list[float]]:
        left = iter(gaps)
        return [[logprob + next(left) for logprob in turn.logprobs] for turn in episode.turns]

    return score


def started(*episodes: Episode, budget: int, gaps: list[float] | None = None) -> list[BranchPoint | None]:
    context = replace(CONTEXT, score=None if gaps is None else moved_by(gaps))
    policy = InfluenceBranching(budget, 0, context, initial=len(episodes))
    assert policy.begin() == [None] * len(episodes)
    *earlier, last = episodes
    assert all(policy.ended(episode) == () for episode in earlier)
    return list(policy.ended(last))


@pytest.mark.vector("APPO-1")
def test_the_score_of_a_token_is_the_product_of_two_z() -> None:
    mask = torch.ones(1, 4, dtype=torch.bool)
    omega = future_ratio(torch.tensor([GAPS], dtype=torch.float64), mask).clamp(*OMEGA)
    assert omega[0].tolist() == pytest.approx([1.040811, 1.020201, 1.030455, 1], abs=5e-7)
    score, entropy, future = influence_scores(torch.tensor([ENTROPIES], dtype=torch.float64), omega, mask)
    assert score[0].tolist() == pytest.approx([-1.007421, -0.249395, 0.236666, 1.569069], abs=5e-7)
    assert [entropy[0, 3].item(), future[0, 3].item()] == pytest.approx([-1.034791, -1.516315], abs=5e-7)


@pytest.mark.vector("APPO-1")
def test_branches_follow_tokens_of_which_both_scores_are_positive_first() -> None:
    base = an_episode(a_turn(*ENTROPIES, reward=1.0), a_turn(0.0))
    # A fifth decision of neither kind keeps the order of the four.
    points = started(base, budget=4, gaps=[*GAPS, 0.0])
    assert points[0] == BranchPoint("e-0", 0, 3)
    # Two negative scores make a positive product and come last: here the end of the first turn.
    assert BranchPoint("e-0", 1) not in points[:2]


def test_if_the_sampler_is_the_learner_entropy_alone_decides() -> None:
    base = an_episode(a_turn(0.1, 0.9, 0.5), a_turn(0.3, 0.0))
    by_entropy = [BranchPoint("e-0", 0, 2), BranchPoint("e-0", 1), BranchPoint("e-0", 1, 1)]
    assert started(base, budget=4) == by_entropy
    rounding = [1e-6, -1e-6, 2e-6, -3e-6, 1e-6]
    assert started(base, budget=4, gaps=rounding) == by_entropy


def test_the_best_tokens_of_all_first_rollouts_are_taken_and_aborted_ones_have_none() -> None:
    low, high = a_turn(0.1, 0.2, 0.1, 0.1), a_turn(0.0, 9.0, 0.0, 0.0)
    one, other = an_episode(low, id="e-0"), an_episode(high, id="e-1")
    lost = an_episode(a_turn(0.0, 9.9, 0.0), id="e-2", stop=StopReason.ENV_ERROR)
    # z is that of the own trajectory, so both are alike up to the small constant of its denominator.
    points = started(one, other, lost, budget=5)
    assert points == [BranchPoint("e-1", 0, 2), BranchPoint("e-0", 0, 2)]
    assert started(lost, budget=3) == []
    assert started(an_episode(a_turn(0.5)), budget=3) == []


def test_the_last_decision_starts_no_branch_and_forced_tokens_are_not_written_again() -> None:
    base = an_episode(a_turn(0.5, forced=2), a_turn(0.7, 0.1, forced=1))
    assert started(base, budget=9) == [BranchPoint("e-0", 1, 1), BranchPoint("e-0", 1)]


def test_half_of_the_group_are_first_rollouts() -> None:
    plan = build_recipe("appo").build().rollout
    assert plan.branch_policy is not None
    assert [len(plan.branch_policy(size, 0, CONTEXT).begin()) for size in (1, 2, 7, 16)] == [1, 1, 3, 8]
    assert {"rollout:entropy", "rollout:scores"} <= build_recipe("appo").build().requires


def family() -> Group:
    """Two first rollouts of two turns, with three branches of the first of them."""
    first = [
        an_episode(
            a_turn(0.5, 0.5, 0.5, new_sequence=True), a_turn(0.5, 0.5, reward=reward), id=f"e-{number}"
        )
        for number, reward in enumerate((1.0, 0.0))
    ]
    given = replace(a_turn(0.5, 0.5, 0.5, new_sequence=True), allowed=((2,), (2,), (2, 3)))
    branches = [
        an_episode(given, a_turn(0.5, reward=1.0), id="e-2", parent=BranchPoint("e-0", 0, 2)),
        an_episode(given, a_turn(0.5, reward=0.0), id="e-3", parent=BranchPoint("e-0", 0, 2)),
        an_episode(first[0].turns[0], a_turn(0.5, reward=1.0), id="e-4", parent=BranchPoint("e-0", 1)),
    ]
    return Group("t", (*first, *branches))


def batch_of(*groups: Group, layout: str = "trajectory") -> Batch:
    batch = prepare(build_recipe("appo").build(), groups, CONTEXT, layout=layout)
    return replace(batch, old_logprobs=batch.logprobs.double(), logprobs=batch.logprobs.double())


@pytest.mark.vector("APPO-2")
@pytest.mark.parametrize("layout", ["trajectory", "turn"])
def test_tokens_of_a_first_rollout_add_the_mean_of_the_branches_that_share_them(build, layout: str) -> None:
    batch = batch_of(family(), layout=layout)
    found = compute_advantages(build("appo"), batch, CONTEXT)
    by_episode = [
        found[batch.trajectory == index][batch.action_mask[batch.trajectory == index]] for index in range(5)
    ]
    # Branches return 1, 0, 1: mean 2/3, deviation sqrt(2)/3, so A = sqrt(1/2), -sqrt(2), sqrt(1/2).
    good, bad = math.sqrt(0.5), -math.sqrt(2)
    shared, late = (good + bad + good) / 3, good
    assert by_episode[0].tolist() == pytest.approx([1 + shared, 1 + shared, 1 + late, 1, 1], abs=1e-5)
    assert by_episode[1].tolist() == pytest.approx([-1] * 5, abs=1e-5)
    assert all(not rows.any() for rows in by_episode[2:])


def test_branches_are_not_learned_from_and_do_not_count() -> None:
    algorithm = build_recipe("appo", {"influence": 0.0, "dual_clip": None, "kl_coefficient": 0.1}).build()
    batch = batch_of(family())
    mini = MiniBatch(batch, compute_advantages(algorithm, batch, CONTEXT))
    objective = build_objective(mini, algorithm, CONTEXT)
    assert objective.mask.equal(batch.action_mask & (batch.trajectory < 2)[:, None])
    (term,) = algorithm.terms
    assert term.where is not None
    assert term.where(mini, CONTEXT).equal(objective.mask)


def test_a_branch_that_went_astray_is_a_first_rollout() -> None:
    group = family()
    astray = replace(group.episodes[4], parent=BranchPoint("e-0", 0))
    batch = batch_of(Group("t", (*group.episodes[:4], astray)))
    algorithm = build_recipe("appo").build()
    found = compute_advantages(algorithm, batch, CONTEXT)
    # Returns of first rollouts are 1, 0 and 1.
    wanted = torch.where(batch.action_mask, math.sqrt(0.5), 0.0)[4]
    torch.testing.assert_close(found[4], wanted.double(), atol=1e-5, rtol=0)


def test_without_its_parent_a_branch_gives_no_credit_and_an_empty_batch_has_none() -> None:
    group = family()
    lost = replace(group.episodes[0], stop=StopReason.ENV_ERROR, error="crash")
    algorithm = build_recipe("appo").build()
    batch = batch_of(Group("t", (lost, *group.episodes[1:])))
    assert not compute_advantages(algorithm, batch, CONTEXT).any()
    empty = batch_of()
    assert compute_advantages(algorithm, empty, CONTEXT).shape == empty.tokens.shape
    assert algorithm.diagnostics[-1](MiniBatch(empty, empty.logprobs), CONTEXT) == {}


def one_row(log_ratios: list[float], advantage: float = 1.0) -> MiniBatch:
    """One trajectory whose current policy differs from the old one by these log-ratios."""
    turn = a_turn(*[0.5] * len(log_ratios), new_sequence=True)
    batch = collate([Group("t", (an_episode(turn),))])
    old = batch.logprobs.double()
    current = old.clone()
    current[batch.action_mask] += torch.tensor(log_ratios, dtype=torch.float64)
    return MiniBatch(
        replace(batch, old_logprobs=old, logprobs=old),
        torch.where(batch.action_mask, advantage, 0.0).double(),
        Outputs(current, torch.zeros_like(current), ratio=(current - old).exp()),
    )


def factors(mini: MiniBatch, **settings: float) -> list[float]:
    (weight,) = build_recipe("appo", settings).build().weights
    return weight(mini, CONTEXT)[mini.batch.action_mask].tolist()


@pytest.mark.vector("APPO-3")
def test_the_factor_of_the_future_is_that_of_the_paper(build) -> None:
    mini = one_row(GAPS)
    found = [weight(mini, CONTEXT)[mini.batch.action_mask] - 1 for weight in build("appo").weights]
    assert [each.tolist() for each in found] == [pytest.approx([1.040254, 1.019872, 1.030455, 1], abs=5e-7)]


def test_where_nothing_has_moved_the_loss_is_twice_that_of_grpo() -> None:
    assert factors(one_row([0.0] * 3)) == [2.0] * 3
    assert factors(one_row([0.0] * 3), influence=0.5) == [1.5] * 3


def test_the_factor_is_limited_and_falls_where_a_bad_token_became_far_likelier() -> None:
    assert factors(one_row([0.5, 0.5])) == pytest.approx([2.2, 2.2])
    # Above the dual clip a token is left out of the sums: the first sees -0.15 only.
    low = math.exp(-0.15 * 2 ** (-1 / 64))
    assert factors(one_row([2.0, -0.15], advantage=-1.0)) == pytest.approx([1 + low, 2.0])
    assert factors(one_row([2.0, -0.15])) == pytest.approx([2.0, 2.0])
    assert factors(one_row([2.0, -0.9], advantage=-1.0)) == pytest.approx([1.8, 2.0])


def test_a_trajectory_with_two_dual_clipped_tokens_leaves_the_loss() -> None:
    algorithm = build_recipe("appo").build()

    def kept(log_ratios: list[float], advantage: float) -> int:
        mini = one_row(log_ratios, advantage)
        return int(build_objective(mini, algorithm, CONTEXT).mask.sum())

    assert kept([1.2, 1.2, 0.0], -1.0) == 0
    assert kept([1.2, 1.0, 0.0], -1.0) == 3  # exp(1.0) is below 3
    assert kept([1.2, 1.2, 0.0], 1.0) == 3


def test_what_is_logged_of_the_branches() -> None:
    algorithm = build_recipe("appo").build()
    batch = batch_of(family())
    logged = algorithm.diagnostics[-1](
        MiniBatch(batch, compute_advantages(algorithm, batch, CONTEXT)), CONTEXT
    )
    good, bad = math.sqrt(0.5), -math.sqrt(2)
    assert logged == {
        "appo/branches": pytest.approx(3 / 5),
        "appo/shared": pytest.approx(3 / 10),
        "appo/credit": pytest.approx((2 * abs(2 * good + bad) / 3 + good) / 10, abs=1e-5),
    }


def test_a_configuration_is_read_and_written_back() -> None:
    made = build_recipe("appo", {"preset": "released", "initial_rollouts": 8})
    tree = recipe_tree(made)
    assert build_recipe(tree.pop("name"), tree) == made


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"weighting": "row"}, "weighting is row, wanted trajectory"),
        ({"initial_rollouts": 0}, "initial_rollouts"),
        ({"influence_high": 0.5}, r"influence_high: wrong value \(got 0.5"),
        ({"half_life": 0}, r"half_life: wrong value \(got 0"),
        ({"dual_clip": 1.1}, "dual_clip is 1.1, wanted above"),
    ],
)
def test_contradictions_are_refused_with_the_reason(settings: dict[str, object], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        build_recipe("appo", settings)
