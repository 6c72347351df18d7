import math
import random
from dataclasses import dataclass, replace

import pytest
import torch

from agentrl.algorithms import branch_policies, functional
from agentrl.algorithms.algorithm import Algorithm, check_requirements
from agentrl.algorithms.branching import RolloutPlan, opening_entropy
from agentrl.algorithms.credit import compute_advantages, prepare
from agentrl.algorithms.functional import branch_score, initial_rollouts
from agentrl.algorithms.hooks import Context, MiniBatch, Outputs, excludes, trait
from agentrl.algorithms.methods.aepo import AEPO
from agentrl.algorithms.recipe import Recipe, build_recipe, recipe_tree
from agentrl.data import BranchPoint, Episode, Group, StopReason, Turn
from agentrl.data.batch import collate
from agentrl.errors import ConfigError, RequirementError
from agentrl.learn.objective import build_objective

# Logarithm of the vocabulary is 1, up to rounding: entropies are in its units.
CONTEXT = Context(vocabulary=3)
UNIT = math.log(3)
PLAIN = {"divide_by_std": False, "aggregation": "token", "dual_clip": 3.0}


def a_turn(
    *entropies: float, reward: float = 0.0, new_sequence: bool = False, observation: str = "o"
) -> Turn:
    """One decision per entropy, given in units of the logarithm of the vocabulary."""
    return Turn(
        observation,
        "a",
        prompt_ids=(1,),
        action_ids=(2,) * len(entropies),
        logprobs=(-0.5,) * len(entropies),
        entropies=tuple(value * UNIT for value in entropies),
        reward=reward,
        new_sequence=new_sequence,
    )


def an_episode(*turns: Turn, id: str = "e", parent: BranchPoint | None = None, **kept) -> Episode:
    return Episode(id, "env", "t", 0, turns, kept.get("stop", StopReason.TERMINATED), parent=parent)


def forced_turn() -> Turn:
    return replace(a_turn(0.7), allowed=((2,),))


def policy_of(budget: int = 8, seed: int = 0, context: Context = CONTEXT, **settings):
    branch_policy = AEPO(**settings).build().rollout.branch_policy
    assert branch_policy is not None
    return branch_policy(budget, seed, context)


def threshold(**settings):
    made = policy_of(branch_rule="threshold", initial_rollouts=4, **settings)
    made.begin()
    return made


@pytest.mark.vector("A-3")
@pytest.mark.parametrize(
    ("budget", "root", "tool", "share", "official", "rounded"),
    [
        (16, 0.8, 0.2, 0.5744425168, 10, 9),
        (16, 0.2, 0.8, 0.4255574832, 7, 7),
        (8, 0.5, 0.5, 0.5, 5, 4),
        (12, 3.0, 0.0, 0.8175744762, 10, 10),
        (4, 0.0, 20.0, 0.0000453979, 1, 1),
    ],
)
def test_the_split_of_the_budget(budget, root, tool, share, official, rounded):
    assert initial_rollouts(budget, root, tool, slope=0.5, round_up=True) == official
    assert initial_rollouts(budget, root, tool, slope=0.5) == rounded
    # A budget of 10^10 shows the printed digits of the share.
    assert initial_rollouts(10**10, root, tool, slope=0.5) == max(1, round(share * 10**10))


def test_the_split_has_no_overflow():
    assert initial_rollouts(8, 0.0, 1e9, slope=4.0) == 1
    assert initial_rollouts(8, 1e9, 0.0, slope=4.0, round_up=True) == 8


@pytest.mark.vector("A-4")
@pytest.mark.parametrize(
    ("drawn", "change", "streak", "score", "branches"),
    [
        (0.60, 0.0, 0, 0.600, True),
        (0.45, 0.3, 0, 0.510, True),
        (0.52, 0.0, 1, 0.494, False),
        (0.9, 0.5, 20, 0.0, False),
        (0.4, -0.5, 0, 0.300, False),
    ],
)
def test_the_stochastic_rule(drawn, change, streak, score, branches):
    value = branch_score(change, streak, offset=drawn, weight=0.2, penalty=0.05)
    assert value == pytest.approx(score, abs=5e-4)
    assert (value >= AEPO().branch_probability) is branches


@pytest.mark.vector("A-5")
@pytest.mark.parametrize(
    ("change", "streak", "score", "branches"),
    [
        (0.1, 0, 0.52, True),
        (-0.1, 0, 0.48, False),
        (0.5, 1, 0.57, True),
        (0.5, 2, 0.54, True),
        (1.0, 20, 0.0, False),
    ],
)
def test_the_threshold_rule(change, streak, score, branches):
    value = branch_score(change, streak, offset=0.5, weight=0.2, penalty=0.05)
    assert value == pytest.approx(score, abs=5e-3)
    assert (value > AEPO().branch_probability) is branches


def test_a_score_stays_within_0_and_1():
    assert branch_score(9.0, 0, offset=0.5, weight=0.2, penalty=0.05) == 1
    assert branch_score(-9.0, 0, offset=0.5, weight=0.2, penalty=0.05) == 0
    assert branch_score(-9.0, 30, offset=0.5, weight=0.2, penalty=0.05) == 0


@pytest.mark.vector("A-6")
def test_the_entropy_of_a_turns_opening():
    logprobs = torch.tensor([[-0.1, -2.5, -4.0], [-0.7, -0.9, -3.0]], dtype=torch.float64)
    entropies = tuple(functional.top_k_entropy(logprobs).tolist())
    turn = Turn("o", "a", action_ids=(1, 2), entropies=entropies)
    assert opening_entropy(turn, 32) == pytest.approx(0.1777172929, abs=5e-11)
    assert opening_entropy(turn, 32, total=True) == pytest.approx(0.3554345859, abs=5e-11)


def test_an_opening_is_twenty_decisions_and_no_forced_token():
    long = a_turn(*[0.5] * 20, *[9.0] * 5)
    assert opening_entropy(long, 3) == pytest.approx(0.5)
    mixed = replace(a_turn(9.0, 0.5, 0.7), allowed=((2,), (2, 3), None))
    assert opening_entropy(mixed, 3) == pytest.approx(0.6)
    assert opening_entropy(forced_turn(), 3) is None
    assert opening_entropy(Turn("o", "a"), 3) is None
    assert opening_entropy(a_turn(0.5), 0) == pytest.approx(0.5 * UNIT)


def test_the_first_rollout_is_alone_and_decides_how_many_begin_with_it():
    made = policy_of(8)
    assert made.begin() == [None]
    pilot = (a_turn(0.5), a_turn(0.2), forced_turn(), a_turn(0.3))
    assert made.reached("p", None, pilot[:2]) == ()
    # sigmoid(4 * (.5 - .25)) = .7310586; 8 of them .5 more are 6.35
    assert made.ended(an_episode(*pilot)) == [None] * 5
    assert made.ended(an_episode(*pilot, id="other")) == ()


@pytest.mark.parametrize("turns", [(), (a_turn(0.9),), (forced_turn(), a_turn(0.9))])
def test_a_first_rollout_without_two_entropies_gives_half_of_the_budget(turns):
    made = policy_of(8)
    made.begin()
    assert made.ended(an_episode(*turns, stop=StopReason.ENV_ERROR)) == [None] * 3


def test_a_given_number_of_rollouts_begins_at_once_within_the_budget():
    assert policy_of(8, initial_rollouts=3).begin() == [None] * 3
    assert policy_of(8, initial_rollouts=9).begin() == [None] * 8
    assert policy_of(8, initial_rollouts=3).ended(an_episode(a_turn(0.5))) == ()


def test_a_path_branches_where_it_is_less_certain_than_at_first_and_tires_of_it():
    made = threshold()
    turns = [
        a_turn(0.3),
        *[a_turn(0.5)] * 5,
    ]  # a change of .2 scores .54, .513 after one branch, .486 after two
    starts = [made.reached("e", None, turns[: count + 1]) for count in range(6)]
    assert starts == [
        [],
        [BranchPoint("e", 2)],
        [BranchPoint("e", 3)],
        [],
        [BranchPoint("e", 5)],
        [BranchPoint("e", 6)],
    ]


def test_a_branch_inherits_the_first_entropy_and_the_streak():
    made = threshold()
    turns = [a_turn(0.3), a_turn(0.5), a_turn(0.5)]
    assert [len(made.reached("e", None, turns[:count])) for count in (1, 2, 3)] == [0, 1, 1]
    path = [*turns, a_turn(0.5)]
    # Two branches in a row are behind it, and its own first turn is as uncertain as the one before.
    assert made.reached("child", BranchPoint("e", 3), path) == []
    assert made.reached("child", BranchPoint("e", 3), [*path, a_turn(0.5)]) == [BranchPoint("child", 5)]
    assert made.reached("other", BranchPoint("e", 2), path[:3]) == [BranchPoint("other", 3)]
    # A branch that could not be had begins at the first observation, with nothing behind it.
    assert made.reached("astray", BranchPoint("e", 0), turns[:1]) == []
    assert made.reached("astray", BranchPoint("e", 0), turns[:2]) == [BranchPoint("astray", 2)]


def test_a_turn_without_decisions_starts_no_branch_and_ends_the_streak():
    made = threshold()
    turns = [forced_turn(), a_turn(0.3), a_turn(0.5), a_turn(0.5), forced_turn(), a_turn(0.5)]
    starts = [len(made.reached("e", None, turns[: count + 1])) for count in range(6)]
    assert starts == [0, 0, 1, 1, 0, 1]


def test_draws_depend_on_seed_episode_turn_and_attempt_alone():
    def fired(seed: int, episode: str) -> list[int]:
        made = policy_of(8, seed, initial_rollouts=4, beam=3, branch_penalty=0.0)
        made.begin()
        return [len(made.reached(episode, None, [a_turn(0.5)] * (count + 1))) for count in range(200)]

    assert fired(0, "a") == fired(0, "a")
    assert fired(0, "a") != fired(0, "b")
    assert fired(0, "a") != fired(1, "a")
    # Each of two attempts succeeds half of the time: none, one and both show up, 200 in all or so.
    assert set(fired(0, "a")) == {0, 1, 2}
    assert 160 < sum(fired(0, "a")) < 240


def test_the_stochastic_rule_branches_when_its_draw_says_so(monkeypatch):
    made = policy_of(8, initial_rollouts=4)
    made.begin()
    turns = [a_turn(0.3), a_turn(0.6)]
    for drawn, branches in ((0.45, True), (0.43, False)):  # with .2 * .3 more: .51 and .49
        monkeypatch.setattr(branch_policies, "derive_seed", lambda *parts, drawn=drawn: drawn * 2**31)
        assert made.reached(f"e{drawn}", None, turns) == [BranchPoint(f"e{drawn}", 2)] * branches
    monkeypatch.setattr(branch_policies, "derive_seed", lambda *parts: 2**30)
    assert made.reached("e", None, turns[:1]) == [BranchPoint("e", 1)]  # a half, which is enough


def test_the_released_code_sums_entropies_compares_branches_with_themselves_and_counts_by_task():
    assert policy_of(12, parity="official").begin() == [None] * 6
    made = policy_of(8, parity="official", initial_rollouts="measured")
    assert made.begin() == [None]
    # Sums are 1 and .4, which with the first among them average .7: sigmoid(4 * .3) * 8 is 6.15, and 1 more.
    assert made.ended(an_episode(a_turn(0.5, 0.5), a_turn(0.2, 0.2))) == [None] * 6

    made = threshold(parity="official")
    turns = [a_turn(0.3), a_turn(0.5)]
    assert made.reached("a", None, turns) == [BranchPoint("a", 2)]
    assert made.reached("b", None, turns) == [BranchPoint("b", 2)]
    assert made.reached("c", None, turns) == []  # two in a row, whichever paths they are on
    assert (
        made.reached("d", BranchPoint("a", 2), [*turns, a_turn(0.5)]) == []
    )  # no change since its own start


def test_without_branches_the_rollout_is_the_bases():
    assert AEPO(branch=False).build().rollout == RolloutPlan()


def two_rows(**settings) -> tuple[Algorithm, MiniBatch]:
    """Advantages 1 and -1, three and two decisions of known entropy, in double precision."""
    rows = [[0.1, 0.5, 1.2], [2.0, 0.3]]
    episodes = [
        an_episode(a_turn(*row, reward=reward, new_sequence=True), id=f"e{reward}")
        for row, reward in zip(rows, (1.0, -1.0), strict=True)
    ]
    algorithm = AEPO(base=build_recipe("grpo", PLAIN), **settings).build()
    batch = prepare(algorithm, [Group("t", tuple(episodes))], CONTEXT)
    entropies = torch.zeros(batch.tokens.shape, dtype=torch.float64)
    entropies[batch.action_mask] = torch.tensor([*rows[0], *rows[1]], dtype=torch.float64)
    batch = replace(
        batch,
        logprobs=batch.logprobs.double(),
        old_logprobs=torch.zeros_like(entropies),
        old_entropies=torch.where(batch.action_mask, entropies, math.nan),
    )
    return algorithm, MiniBatch(batch, compute_advantages(algorithm, batch, CONTEXT))


def loss_and_gradient(algorithm: Algorithm, mini: MiniBatch, ratios: list[float]):
    logprobs = torch.zeros(mini.batch.tokens.shape, dtype=torch.float64)
    logprobs[mini.batch.action_mask] = torch.tensor(ratios, dtype=torch.float64).log()
    said = Outputs(logprobs.requires_grad_(), torch.zeros_like(logprobs))
    objective = build_objective(mini, algorithm, CONTEXT)
    loss, numbers = objective.contribution(torch.arange(len(mini.batch.lengths)), said)
    loss.backward()
    return loss, logprobs.grad[mini.batch.action_mask], numbers


def as_printed(wanted: list[float]):
    return pytest.approx(wanted, abs=5e-9)


@pytest.mark.vector("A-1")
def test_the_advantage_follows_the_entropy_of_the_token():
    _, mini = two_rows()
    assert mini.advantages[mini.batch.action_mask].tolist() == as_printed(
        [0.81517184, 0.91785415, 1.0975482, -1.30291282, -0.86651299]
    )


@pytest.mark.vector("A-2")
def test_the_loss_is_that_of_the_plain_clip_and_its_gradient_is_not():
    ratios = [0.7, 1.5, 1.5, 0.7, 1.5]
    results = {}
    for name, settings in {"aepo": {}, "plain": {"stop_gradient_clip": False}}.items():
        algorithm, mini = two_rows(**settings)
        loss, gradient, numbers = loss_and_gradient(algorithm, mini, ratios)
        assert loss.item() == pytest.approx(-0.1294006708, abs=5e-11)
        assert (numbers["clip_ratio"].item(), numbers["clip_ratio_high"].item()) == (
            pytest.approx(3 / 5),
            pytest.approx(2 / 5),
        )
        results[name] = (loss.item(), (gradient * 5).tolist())
    assert results["aepo"][0] == pytest.approx(results["plain"][0], abs=1e-12)
    assert results["aepo"][1] == as_printed([-0.57062029, -1.10142498, -1.31705784, 0, 1.29976949])
    assert results["plain"][1] == as_printed([-0.57062029, 0, 0, 0, 1.29976949])
    inverted = [-0.57062029, -1.10142498, 0, 0, 1.29976949]  # gradient kept at low entropy only
    assert results["aepo"][1] != as_printed(inverted)


def test_limits_of_the_factor_keep_the_sign_of_every_advantage():
    # Standardised entropies -.924, -.411, .488, 1.515 and -.667: factors -.848, .179, 1.975, 4.029 and -.335
    for limits, wanted, limited, flipped in (
        ((0.0, 2.0), [0.0, 0.1785415, 1.97548198, -2.0, 0.0], 3 / 5, 0),
        (None, [-0.84828162, 0.1785415, 1.97548198, -4.02912822, 0.33487006], 0, 2),
    ):
        algorithm, mini = two_rows(entropy_advantage=2.0, advantage_limits=limits)
        assert mini.advantages[mini.batch.action_mask].tolist() == pytest.approx(wanted, abs=2e-8)
        numbers = algorithm.diagnostics[-1](mini, CONTEXT)
        assert numbers == {
            "entropy_score_min": pytest.approx(-0.92414081),
            "entropy_score_max": pytest.approx(1.51456411),
            "advantage_factor_limited": pytest.approx(limited),
            "advantages_flipped": flipped,
        }


def trees(seed: int = 0) -> list[Group]:
    """Groups of three episodes and a branch of the first, with one to four turns and mixed returns."""
    draw = random.Random(seed)
    groups = []
    for number in range(3):
        episodes = []
        for member in range(3):
            turns = [
                a_turn(
                    *[draw.random() for _ in range(draw.randint(1, 3))],
                    reward=draw.random(),
                    new_sequence=index == 0,
                )
                for index in range(draw.randint(2, 4))
            ]
            episodes.append(an_episode(*turns, id=f"e{number}.{member}"))
        first = episodes[0]
        branch = an_episode(
            first.turns[0], a_turn(0.4, 0.8, reward=0.5), id=f"e{number}.3", parent=BranchPoint(first.id, 1)
        )
        groups.append(Group(f"t{number}", (*episodes, branch)))
    return groups


def scored(groups: list[Group], layout: str = "trajectory"):
    batch = collate(groups, layout=layout)
    return replace(batch, old_entropies=batch.entropies, old_logprobs=batch.logprobs - 0.05)


def by_decision(values: torch.Tensor, batch) -> dict[tuple[str, int, int], float]:
    """Values by episode, turn and place among the turn's decisions."""
    found, seen = {}, {}
    for row, column in batch.action_mask.nonzero().tolist():
        key = (batch.episodes[batch.trajectory[row]].id, int(batch.turns[row, column]))
        seen[key] = seen.get(key, -1) + 1
        found[*key, seen[key]] = values[row, column].item()
    return found


@pytest.mark.parametrize("settings", [{}, {"prefix_weight": "shared"}])
def test_both_layouts_give_the_same_advantages_and_factors(settings):
    algorithm = AEPO(base=build_recipe("grpo", PLAIN), **settings).build()
    found = []
    for layout in ("trajectory", "turn"):
        batch = scored(trees(), layout)
        mini = MiniBatch(batch, compute_advantages(algorithm, batch, CONTEXT))
        factors = build_objective(mini, algorithm, CONTEXT).factors
        found.append((by_decision(mini.advantages, batch), by_decision(factors, batch)))
    for one, other in zip(*found, strict=True):
        assert one == pytest.approx(other, abs=1e-6)


def test_with_everything_off_it_is_its_base():
    batch = scored(trees())
    base = build_recipe("grpo", {"clip_high": 0.28, "entropy_coefficient": 0.01})
    off = AEPO(
        base=base, entropy_advantage=0.0, stop_gradient_clip=False, initial_rollouts=8, advantage_limits=None
    )
    results = []
    for algorithm in (base.build(), off.build()):
        mini = MiniBatch(batch, compute_advantages(algorithm, batch, CONTEXT))
        objective = build_objective(mini, algorithm, CONTEXT)
        values = torch.linspace(-1, 0.3, batch.tokens.numel()).view_as(batch.logprobs)
        said = Outputs(values.requires_grad_(), batch.entropies)
        loss, _ = objective.contribution(torch.arange(len(batch.lengths)), said)
        loss.backward()
        results.append((mini.advantages, objective.factors, loss.detach(), said.logprobs.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)
    assert off.build().rollout.branch_policy(8, 0, CONTEXT).begin() == [None] * 8
    assert off.build().requires - base.build().requires == {"rollout:entropy"}


def test_the_released_scripts_leave_advantages_as_they_are():
    batch = scored(trees())
    base = build_recipe("grpo")
    released = compute_advantages(AEPO(base=base, parity="official").build(), batch, CONTEXT)
    assert torch.equal(released, compute_advantages(base.build(), batch, CONTEXT))
    assert not torch.equal(released, compute_advantages(AEPO(base=base).build(), batch, CONTEXT))


def test_missing_entropies_are_refused_before_and_while_training():
    algorithm = AEPO().build()
    with pytest.raises(RequirementError, match="transforms requires entropy"):
        check_requirements(algorithm, {"old_logprobs"})
    with pytest.raises(RequirementError, match="old_entropies is empty"):
        compute_advantages(algorithm, collate(trees()), CONTEXT)


def test_a_shared_turn_weighs_as_much_as_one_that_is_not():
    root = an_episode(a_turn(0.5, new_sequence=True), a_turn(0.5, reward=1.0), id="root")
    branch = an_episode(root.turns[0], a_turn(0.5), id="branch", parent=BranchPoint("root", 1))
    batch = scored([Group("t", (root, branch))])
    for weight, first in (("full", 0.25), ("shared", 0.125)):
        algorithm = AEPO(base=build_recipe("grpo", PLAIN), prefix_weight=weight).build()
        mini = MiniBatch(batch, compute_advantages(algorithm, batch, CONTEXT))
        factors = build_objective(mini, algorithm, CONTEXT).factors
        assert factors[batch.action_mask].tolist() == pytest.approx([first, 0.25, first, 0.25])


@dataclass(frozen=True)
class Whole(Recipe):
    """A base whose ratio belongs to sequences."""

    def build(self) -> Algorithm:
        @trait("sequence ratio")
        def whole(outputs, mini):
            return outputs.logprobs

        return Algorithm(ratio=whole)


@dataclass(frozen=True)
class Growing(Recipe):
    """A base that decides about its rollouts itself."""

    name = "growing"

    def build(self) -> Algorithm:
        return Algorithm(rollout=RolloutPlan(branch_policy=lambda budget, seed, context: None))


def test_bases_that_it_makes_no_sense_with_are_refused():
    with pytest.raises(
        ConfigError, match="surrogate cannot be combined with ratio: it bounds the ratio of single tokens"
    ):
        AEPO(base=Whole()).build()
    AEPO(base=Whole(), stop_gradient_clip=False).build()
    with pytest.raises(ConfigError, match="base behaviour_cloning does not have the clipped loss"):
        AEPO(base=build_recipe("behaviour_cloning")).build()
    with pytest.raises(ConfigError, match=r"base growing decides .*where episodes start"):
        AEPO(base=Growing()).build()
    AEPO(base=Growing(), branch=False).build()


def test_another_modulation_by_entropy_can_refuse_it():
    @excludes(token_entropy_advantage="one raises what the other lowers")
    def modulate(advantages, batch, context):
        return advantages

    algorithm = AEPO().build()
    with pytest.raises(ConfigError, match="transforms cannot be combined with transforms: one raises"):
        replace(algorithm, transforms=(*algorithm.transforms, modulate))


def test_a_configuration_is_read_and_written_back():
    settings = {
        "base": {"name": "grpo", "clip_high": 0.28},
        "advantage_limits": [0, 3],
        "initial_rollouts": 4,
    }
    made = build_recipe("aepo", settings)
    assert made == AEPO(
        base=build_recipe("grpo", {"clip_high": 0.28}), advantage_limits=(0, 3), initial_rollouts=4
    )
    tree = recipe_tree(made)
    assert build_recipe(tree.pop("name"), tree) == made


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"entropy_advantage": -0.1}, r"entropy_advantage: wrong value \(got -0.1"),
        (
            {"advantage_limits": [0.0, 0.5]},
            r"advantage_limits is \(0.0, 0.5\), wanted a range that contains 1",
        ),
        ({"initial_rollouts": 0}, r"initial_rollouts: wrong value \(got 0"),
        ({"initial_rollouts": "some"}, "algorithm.initial_rollouts"),
        ({"allocation_slope": -1.0}, r"allocation_slope: wrong value \(got -1.0"),
        ({"branch_probability": 1.5}, r"branch_probability: wrong value \(got 1.5"),
        ({"branch_penalty": 2.0}, r"branch_penalty: wrong value \(got 2.0"),
        ({"beam": 1}, r"beam: wrong value \(got 1"),
    ],
)
def test_contradictions_are_refused_with_the_reason(settings, reason):
    with pytest.raises(ConfigError, match=reason):
        build_recipe("aepo", settings)
