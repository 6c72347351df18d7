import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from agentrl.algorithms.branching import anchor_points
from agentrl.algorithms.credit import compute_advantages, prepare
from agentrl.algorithms.functional import state_modulation, state_values
from agentrl.algorithms.hooks import Bounds, Context, MiniBatch, Outputs
from agentrl.algorithms.methods.fr3e import FR3E
from agentrl.algorithms.recipe import build_recipe, recipe_tree
from agentrl.data import BranchPoint, Episode, Group, StopReason, Turn
from agentrl.data.batch import collate
from agentrl.errors import ConfigError
from agentrl.learn.objective import build_objective

CONTEXT = Context()


def a_turn(*entropies: float, reward: float = 0.0, new_sequence: bool = False) -> Turn:
    """One decision per entropy, in nats."""
    count = len(entropies)
    return Turn(
        "o",
        "a",
        prompt_ids=(1,),
        action_ids=(2,) * count,
        logprobs=(-0.5,) * count,
        entropies=entropies,
        reward=reward,
        new_sequence=new_sequence,
    )


def an_episode(
    *turns: Turn,
    id: str = "base",
    parent: BranchPoint | None = None,
    stop: StopReason = StopReason.TERMINATED,
    success: bool = False,
) -> Episode:
    return Episode(id, "env", "t", 0, turns, stop, success=success, parent=parent)


def reply(entropies: list[float], surprisals: list[float] | None = None) -> Turn:
    turn = a_turn(*entropies)
    return turn if surprisals is None else replace(turn, logprobs=tuple(-value for value in surprisals))


def policy_of(budget: int | None = None, seed: int = 0, **settings):
    plan = FR3E(**settings).build().rollout
    assert plan.branch_policy is not None
    return plan.branch_policy(budget or plan.episodes, seed, CONTEXT)


def started(base: Episode, **settings) -> Counter[BranchPoint]:
    made = policy_of(**settings)
    made.begin()
    return Counter(made.ended(base))


@pytest.mark.vector("F-1")
def test_anchors_are_the_least_certain_tokens_but_the_first():
    entropies = [0.1, 2.0, 0.3, 1.5, 0.2, 1.9, 0.05, 0.8]
    surprisals = [0.05, 0.9, 0.2, 2.5, 0.1, 0.4, 3.0, 0.3]
    base = an_episode(reply(entropies, surprisals))
    assert [point.token for point in anchor_points(base, 3)] == [1, 3, 5]
    assert [point.token for point in anchor_points(base, 3, score="surprisal")] == [1, 3, 6]
    for settings, lengths in (({}, [0, 1, 3, 5]), ({"parity": "official"}, [0, 1, 3, 6])):
        states = started(base, anchors=3, continuations=2, **settings)
        assert states == {BranchPoint("base", 0, length): 2 for length in lengths}


def test_a_tie_goes_to_the_earlier_point_and_the_first_decision_is_none():
    assert [point.token for point in anchor_points(an_episode(a_turn(9, 1, 1, 1)), 2)] == [1, 2]
    assert [point.token for point in anchor_points(an_episode(a_turn(9, 1, 1)), 5)] == [1, 2]
    assert anchor_points(an_episode(a_turn(9)), 2) == []


def test_forced_tokens_are_no_anchors_and_the_first_decision_after_them_is_none_either():
    turn = replace(a_turn(9, 8, 1, 7, 2), allowed=((2,), (2, 3), (2, 3), (2,), None))
    assert [point.token for point in anchor_points(an_episode(turn), 3)] == [2, 4]


def test_several_turns_are_left_at_the_turn_of_the_highest_mean_entropy():
    forced = replace(a_turn(5.0), allowed=((2,),))
    base = an_episode(a_turn(9.0), a_turn(1.0, 0.0), forced, a_turn(0.7), a_turn(0.2))
    assert anchor_points(base, 2) == [BranchPoint("base", 1), BranchPoint("base", 3)]
    assert anchor_points(base, 2, unit="token") == [BranchPoint("base", 1, 0), BranchPoint("base", 3, 0)]
    assert anchor_points(base, 4) == [BranchPoint("base", 1), BranchPoint("base", 3), BranchPoint("base", 4)]
    assert anchor_points(an_episode(a_turn(0.1, 0.2)), 2, unit="turn") == []


def test_quantile_takes_the_upper_quarter_and_one_point_of_a_neighbourhood():
    values = [0.0, 1, 9, 8, 1, 1, 7, 1, 1, 1, 1, 1, 1]
    # The upper quarter of the twelve after the first begins at 2.5: 9, 8 and 7 are in it, 8 is near 9.
    base = an_episode(a_turn(*values))
    assert [point.token for point in anchor_points(base, 3, score="quantile")] == [2, 6]
    assert [point.token for point in anchor_points(base, 3)] == [2, 3, 6]
    assert [point.token for point in anchor_points(an_episode(a_turn(1, 1)), 3, score="quantile")] == [1]


def test_a_task_has_its_base_and_the_continuations_of_every_state():
    assert FR3E().build().rollout.episodes == 13
    base = an_episode(a_turn(0.1), a_turn(0.5), a_turn(0.4), a_turn(0.9))
    made = policy_of()
    assert made.begin() == [None]
    assert made.reached("base", None, base.turns[:2]) == ()
    states = Counter(made.ended(base))
    assert states == {BranchPoint("base", turn): 4 for turn in (0, 1, 3)}
    assert made.ended(an_episode(a_turn(0.1), id="other", parent=BranchPoint("base", 1))) == ()


@pytest.mark.parametrize(
    ("base", "wanted"),
    [
        (an_episode(a_turn(0.1), a_turn(0.5)), {BranchPoint("base", 0): 8, BranchPoint("base", 1): 4}),
        (an_episode(a_turn(0.1)), {BranchPoint("base", 0): 12}),
        (an_episode(a_turn(0.1), a_turn(0.5), stop=StopReason.ENV_ERROR), {BranchPoint("base", 0): 12}),
        (an_episode(stop=StopReason.WORKER_ERROR), {BranchPoint("base", 0): 12}),
    ],
    ids=["one turn later", "none", "aborted", "aborted at once"],
)
def test_what_points_are_missing_goes_to_the_beginning(base, wanted):
    assert started(base) == wanted


def test_of_several_bases_one_that_succeeded_and_one_that_did_not_are_explored():
    turns = (a_turn(0.1), a_turn(0.5))
    bases = [
        an_episode(*turns, id=f"b{number}", success=number in (1, 3), stop=stop)
        for number, stop in enumerate(
            [StopReason.TERMINATED, *[StopReason.TERMINATED] * 3, StopReason.ENV_ERROR]
        )
    ]
    seen = set()
    for seed in range(20):
        made = policy_of(seed=seed, bases=5, anchors=1, continuations=3)
        assert made.begin() == [None] * 5
        assert [made.ended(base) for base in bases[:4]] == [()] * 4
        states = Counter(made.ended(bases[4]))
        assert sum(states.values()) == 2 * 2 * 3
        drawn = sorted({point.parent for point in states})
        assert states == {BranchPoint(name, turn): 3 for name in drawn for turn in (0, 1)}
        seen.add(tuple(drawn))
        again = policy_of(seed=seed, bases=5, anchors=1, continuations=3)
        assert Counter(start for base in reversed(bases) for start in again.ended(base)) == states
    assert seen == {("b0", "b1"), ("b0", "b3"), ("b1", "b2"), ("b2", "b3")}


def test_bases_of_one_outcome_leave_their_continuations_to_the_one_explored():
    made = policy_of(bases=2, anchors=1, continuations=3)
    made.ended(an_episode(a_turn(0.1), a_turn(0.5), id="b0"))
    states = Counter(made.ended(an_episode(a_turn(0.1), a_turn(0.5), id="b1")))
    (drawn,) = {point.parent for point in states}
    assert states == {BranchPoint(drawn, 0): 6, BranchPoint(drawn, 1): 6}


F2 = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]]
F2_PAPER = [
    [0.75, -0.25, -0.25, -0.25],
    [0.38940039, 0.38940039, -0.38940039, -0.38940039],
    [0.1947002, 0.1947002, 0.1947002, -0.58410059],
    [1.23654095, -0.41218032, -0.41218032, -0.41218032],
]
F2_SHARPENED = [
    [0.44663068, *[-0.14887689] * 3],
    [0.45252965, 0.45252965, -0.45252965, -0.45252965],
    [0.22626483, 0.22626483, 0.22626483, -0.67879448],
    [0.99448241, *[-0.33149414] * 3],
]


def printed(wanted):
    return pytest.approx(wanted, abs=5e-9)


def values_of(rewards: list[list[float]]) -> tuple[torch.Tensor, torch.Tensor]:
    returns = torch.tensor(rewards, dtype=torch.float64)
    states = torch.arange(len(rewards))[:, None].expand_as(returns)
    return state_values(returns.flatten(), states.flatten(), len(rewards))


@pytest.mark.vector("F-2")
def test_values_and_modulation_of_four_states():
    values, differ = values_of(F2)
    assert values.tolist() == [0.25, 0.5, 0.75, 0.25]
    one_base = torch.zeros(4, dtype=torch.int64)
    for settings, wanted in (
        ({}, [1, 0.77880078, 0.77880078, 1.64872127]),
        ({"first": "released"}, [0.47236655, 0.77880078, 0.77880078, 1.64872127]),
        ({"first": "released", "sharpen": True}, [0.59550757, 0.9050593, 0.9050593, 1.32597654]),
    ):
        assert state_modulation(values, one_base, differ, **settings).tolist() == printed(wanted)


@pytest.mark.vector("F-3")
def test_states_whose_continuations_agree_are_told_apart():
    assert values_of([[1, 1, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]])[1].tolist() == [False, True, False]
    assert values_of([[0.1 + 0.2, 0.3]])[1].tolist() == [False]


@pytest.mark.vector("F-4")
def test_a_state_is_compared_with_the_one_before_even_if_that_one_teaches_nothing():
    values = torch.tensor([0.25, 1.0, 0.75], dtype=torch.float64)
    differ = torch.tensor([True, False, True])
    one_base = torch.zeros(3, dtype=torch.int64)
    assert state_modulation(values, one_base, differ)[2].item() == pytest.approx(1.2840254167, abs=5e-11)
    released = state_modulation(values, one_base, differ, skip_equal=True)
    assert released[2].item() == pytest.approx(0.6065306597, abs=5e-11)


def test_each_base_has_a_first_state_and_a_sum_of_its_own():
    values = torch.tensor([0.5, 0.25, 1.0, 0.5, 0.5], dtype=torch.float64)
    bases = torch.tensor([0, 0, 1, 1, 2])
    differ = torch.ones(5, dtype=torch.bool)
    plain = state_modulation(values, bases, differ)
    assert plain.tolist() == pytest.approx([1, math.exp(0.25), 1, math.exp(0.5), 1])
    sharpened = state_modulation(values, bases, differ, sharpen=True)
    # The only change of a base is all of its sum, so -1; the last base has no change at all.
    assert sharpened.tolist() == pytest.approx([1, math.e, 1, math.e, 1])
    assert state_modulation(values[:0], bases[:0], differ[:0]).tolist() == []


def tree(rewards: list[list[float]], name: str = "base", turns: int | None = None) -> list[Episode]:
    """A base, and continuations that leave it before turn 0, 1, ... and end with the given rewards."""
    base = an_episode(
        *[a_turn(0.5 + index, 0.5, new_sequence=index == 0) for index in range(turns or len(rewards))],
        id=name,
    )
    episodes = [base]
    for turn, row in enumerate(rewards):
        for member, reward in enumerate(row):
            end = a_turn(*[0.1] * (3 - member % 2), reward=reward)
            own = (a_turn(0.3, new_sequence=turn == 0), end)
            path = (*base.turns[:turn], *own)
            point = BranchPoint(name, turn)
            episodes.append(an_episode(*path, id=f"{name}.{turn}.{member}", parent=point))
    return episodes


def advantages_of(
    episodes: list[Episode], layout: str = "trajectory", order: list[int] | None = None, **settings
):
    """Advantages by episode and turn, after a check that all decisions of a turn have one."""
    algorithm = FR3E(**settings).build()
    batch = prepare(algorithm, [Group("t", tuple(episodes))], CONTEXT, layout=layout)
    batch = replace(batch, logprobs=batch.logprobs.double())
    if order is not None:
        batch = batch.select([row % len(batch.lengths) for row in order])
    advantages = compute_advantages(algorithm, batch, CONTEXT)
    found: dict[tuple[str, int], float] = {}
    for row, column in batch.action_mask.nonzero().tolist():
        key = (batch.episodes[batch.trajectory[row]].id, int(batch.turns[row, column]))
        assert found.setdefault(key, advantages[row, column].item()) == advantages[row, column].item()
    return found


@pytest.mark.vector("F-2")
@pytest.mark.parametrize("layout", ["trajectory", "turn"])
@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        ({}, F2_PAPER),
        ({"alpha_root": "released"}, [[0.35427491, *[-0.11809164] * 3], *F2_PAPER[1:]]),
        ({"alpha_root": "released", "sharpen": True}, F2_SHARPENED),
        ({"parity": "official"}, F2_SHARPENED),
    ],
    ids=["paper", "released root", "sharpened", "official"],
)
def test_continuations_are_credited_for_their_own_turns_only(layout, settings, rows):
    found = advantages_of(tree(F2), layout, **settings)
    assert {value for (name, _), value in found.items() if name == "base"} == {0.0}
    for turn, row in enumerate(rows):
        for member, wanted in enumerate(row):
            name = f"base.{turn}.{member}"
            assert [found[name, shared] for shared in range(turn)] == [0.0] * turn
            assert [found[name, turn], found[name, turn + 1]] == printed([wanted] * 2)


@pytest.mark.vector("F-2")
def test_centred_returns_can_be_divided_by_their_deviation():
    found = advantages_of(tree(F2), divide_by_std=True, alpha_root="released")
    assert [found[f"base.0.{member}", 0] for member in range(4)] == printed([0.70854841, *[-0.2361828] * 3])
    assert [found[f"base.3.{member}", 3] for member in range(4)] == printed([2.47307696, *[-0.82435899] * 3])


@pytest.mark.vector("F-4")
def test_the_released_code_compares_with_the_state_before_that_is_learned_from():
    episodes = tree([[1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]])
    assert advantages_of(episodes)["base.2.0", 2] == pytest.approx(0.25 * 1.2840254167, abs=5e-11)
    # Changes 1 - .25 and .75 - .25, sharpened: .64952 and .35355 over their sum.
    scale = math.exp(-(0.5**1.5) / (0.75**1.5 + 0.5**1.5))
    assert advantages_of(episodes, parity="official")["base.2.0", 2] == pytest.approx(0.25 * scale)


def test_the_order_of_episodes_and_rows_plays_no_role():
    episodes = [*tree(F2), *tree([[1, 0, 0], [1, 1, 1], [1, 1, 0]], "b")]
    wanted = advantages_of(episodes)
    shuffled = [episodes[(7 * index) % len(episodes)] for index in range(len(episodes))]
    assert [episode.id for episode in shuffled] != [episode.id for episode in episodes]
    assert advantages_of(shuffled) == wanted
    assert advantages_of(episodes, order=[7 * index for index in range(len(episodes))]) == wanted
    assert wanted["b.2.0", 2] == pytest.approx((1 - 2 / 3) * math.exp(1 / 3))


def test_aborted_continuations_and_bases_change_no_other_advantage_by_one_bit():
    episodes = tree(F2)
    wanted = advantages_of(episodes)
    lost = replace(episodes[1], id="lost", stop=StopReason.ENV_ERROR, error="crash")
    assert advantages_of([lost, *episodes]) == wanted
    without_base = advantages_of([replace(episodes[0], stop=StopReason.ENV_ERROR), *episodes[1:]])
    assert without_base == {key: value for key, value in wanted.items() if key[0] != "base"}


def test_a_branch_that_went_astray_counts_for_the_beginning():
    episodes = tree([[1, 0], [1, 0]])
    astray = replace(episodes[-1], parent=BranchPoint("base", 0))
    found = advantages_of([*episodes[:-1], astray])
    # Three continuations of the beginning return 1, 0 and 0; the one that is left of the other has no rival.
    assert found["base.0.0", 0] == pytest.approx(2 / 3)
    assert [found["base.1.1", turn] for turn in range(3)] == pytest.approx([-1 / 3] * 3)
    assert found["base.1.0", 1] == 0.0


def test_tokens_that_a_continuation_was_given_are_not_its_own():
    base = an_episode(a_turn(0.5, 0.9, 0.1, new_sequence=True))
    given = replace(a_turn(0.0, 0.4, 0.4, new_sequence=True), allowed=((2,), (2, 3), (2, 3)))
    more = replace(given, allowed=((2,), (2,), (2, 3)))
    episodes = [base] + [
        an_episode(replace(turn, reward=reward), id=f"{token}.{reward}", parent=BranchPoint("base", 0, token))
        for token, turn, rewards in ((1, given, (1.0, 0.0)), (2, more, (1.0, 1.0)))
        for reward in rewards
    ]
    algorithm = FR3E().build()
    batch = prepare(algorithm, [Group("t", tuple(episodes))], CONTEXT)
    advantages = compute_advantages(algorithm, batch, CONTEXT)
    assert advantages.tolist() == [[0] * 4, [0, 0, 0.5, 0.5], [0, 0, -0.5, -0.5], [0] * 4, [0] * 4]
    mask = algorithm.masks[0](MiniBatch(batch, advantages), CONTEXT)
    assert mask.tolist() == [[False] * 4, *[[False, False, True, True]] * 2, *[[False] * 4] * 2]


@pytest.mark.vector("F-3")
def test_only_what_continuations_decided_where_they_differ_is_in_the_mean():
    algorithm = FR3E().build()
    batch = prepare(algorithm, [Group("t", tuple(tree([[1, 0], [1, 1], [0, 1]])))], CONTEXT)
    batch = replace(batch, old_logprobs=batch.logprobs)
    mini = MiniBatch(batch, compute_advantages(algorithm, batch, CONTEXT))
    objective = build_objective(mini, algorithm, CONTEXT)
    # Continuations of the first and the last state decide four and three times themselves.
    learned = {
        (batch.episodes[batch.trajectory[row]].id, int(batch.turns[row, column]))
        for row, column in objective.mask.nonzero().tolist()
    }
    assert learned == {
        (f"base.{turn}.{member}", turn + step) for turn in (0, 2) for member in (0, 1) for step in (0, 1)
    }
    assert objective.factors[objective.mask].tolist() == pytest.approx([1 / 14] * 14)
    assert objective.bounds == Bounds(0.8, 1.28)
    said = Outputs(batch.logprobs.clone().requires_grad_(), batch.entropies)
    loss, _ = objective.contribution(torch.arange(len(batch.lengths)), said)
    loss.backward()
    assert (said.logprobs.grad != 0).equal(objective.mask)


def test_groups_in_which_no_state_differs_are_left_out():
    useful, useless = tree([[1, 0], [1, 1]]), tree([[0, 0], [1, 1]])  # the second differ between states only
    luckier = an_episode(a_turn(0.5, reward=1.0, new_sequence=True), id="another base")
    groups = [
        Group("a", (*useless, luckier)),
        Group("b", tuple(useful)),
        Group("c", tuple(useful[:2])),
    ]
    assert list(FR3E().build().select(groups, CONTEXT)) == [groups[1]]


def test_a_batch_without_continuations_has_nothing_to_learn_and_no_nan():
    algorithm = FR3E().build()
    for episodes in ((), (an_episode(a_turn(0.5, reward=1.0, new_sequence=True)),)):
        batch = collate([Group("t", episodes)])
        batch = replace(batch, old_logprobs=batch.logprobs)
        mini = MiniBatch(batch, compute_advantages(algorithm, batch, CONTEXT))
        assert not mini.advantages.any()
        loss, _ = build_objective(mini, algorithm, CONTEXT).contribution(
            torch.arange(len(batch.lengths)), Outputs(batch.logprobs, batch.entropies)
        )
        assert loss.item() == 0
        assert algorithm.diagnostics[1](mini, CONTEXT) == {}


def test_what_is_logged_of_the_states():
    algorithm = FR3E().build()
    batch = collate([Group("t", tuple(tree([[1, 0], [1, 1], [0, 1]])))])
    mini = MiniBatch(batch, compute_advantages(algorithm, batch, CONTEXT))
    # Values .5, 1 and .5; factors of the two that are learned from 1 and exp(.5). Anchors are turns 1 and 2
    # of the base, with entropies 1.5 and .5, and 2.5 and .5.
    assert algorithm.diagnostics[1](mini, CONTEXT) == {
        "states_kept": pytest.approx(2 / 3),
        "state_value": pytest.approx(2 / 3),
        "state_factor": pytest.approx((1 + math.exp(0.5)) / 2),
        "anchor_entropy": pytest.approx(1.25),
    }
    without_base = collate([Group("t", tuple(tree([[0, 0], [1, 1]])[1:]))])
    mini = MiniBatch(without_base, compute_advantages(algorithm, without_base, CONTEXT))
    assert algorithm.diagnostics[1](mini, CONTEXT) == {"states_kept": 0.0, "state_value": 0.5}


def test_a_configuration_is_read_and_written_back():
    made = build_recipe("fr3e", {"parity": "official", "bases": 4, "anchors": 4, "continuations": 16})
    assert made.build().rollout.episodes == 4 + 2 * 5 * 16
    tree = recipe_tree(made)
    assert build_recipe(tree.pop("name"), tree) == made


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"bases": 0}, r"bases: wrong value \(got 0"),
        ({"anchors": -1}, r"anchors: wrong value \(got -1"),
        ({"continuations": 1}, r"continuations: wrong value \(got 1"),
        ({"clip_low": 1.5}, r"clip_low: wrong value \(got 1.5"),
        ({"clip_high": -0.1}, r"clip_high: wrong value \(got -0.1"),
        (
            {"parity": "official", "score": "quantile"},
            "parity=official sets it to 'surprisal'",
        ),
    ],
)
def test_contradictions_are_refused_with_the_reason(settings, reason):
    with pytest.raises(ConfigError, match=reason):
        build_recipe("fr3e", settings)
