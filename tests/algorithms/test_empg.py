import math
from dataclasses import replace

import pytest
import torch
from torch import tensor

from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.credit import compute_advantages
from agentrl.algorithms.hooks import Context, MiniBatch, trait
from agentrl.algorithms.methods.empg import EMPG
from agentrl.algorithms.methods.epo import EPO
from agentrl.algorithms.methods.grpo import GRPO
from agentrl.algorithms.methods.reinforce_pp import ReinforcePlusPlus
from agentrl.algorithms.recipe import Recipe, build_recipe, recipe_tree
from agentrl.data import BranchPoint, Episode, Group, StopReason, Turn
from agentrl.data.batch import Batch, collate
from agentrl.errors import ConfigError, RequirementError

CONTEXT = Context()
LAYOUTS = ("trajectory", "turn")
FORCED = None
CENTRED = GRPO(divide_by_std=False, drop_equal_groups=False)

# The entropies of the tokens of each turn; over the decisions their means are [.2, .8, .5] and [1.0, .4].
EXAMPLE = ([[0.1, 0.3, FORCED], [0.8], [FORCED, 0.7, 0.3]], [[1.0], [0.4, 0.4]])
# The same with turns between and behind that were not decided at all.
INTERRUPTED = (
    [[0.1, 0.3, FORCED], [FORCED], [0.8], [FORCED, 0.7, 0.3], [FORCED]],
    [[FORCED, FORCED], [1.0], [FORCED], [0.4, 0.4]],
)


def episode(name: str, turns, reward: float, parent: BranchPoint | None = None) -> Episode:
    """A turn is the entropies of its tokens; the reward comes with the last turn."""
    made = [
        Turn(
            "o",
            "a",
            prompt_ids=(1, 1),
            action_ids=(2,) * len(entropies),
            entropies=tuple(entropy or 0.0 for entropy in entropies),
            allowed=tuple((2,) if entropy is FORCED else (2, 3) for entropy in entropies),
            reward=reward if index == len(turns) - 1 else 0.0,
            new_sequence=index == 0,
        )
        for index, entropies in enumerate(turns)
    ]
    return Episode(name, "env", "t", 0, tuple(made), StopReason.TERMINATED, parent=parent)


def scored(episodes, layout="trajectory", masked: float = 0.0) -> Batch:
    """One group, in float64; the scoring pass found the entropies that the rollout recorded."""
    batch = collate([Group("t", tuple(episodes))], layout=layout)
    entropies = torch.full(batch.tokens.shape, masked, dtype=torch.float64)
    for row, owner in enumerate(batch.trajectory.tolist()):
        for index, turn in enumerate(batch.episodes[owner].turns):
            own = batch.action_mask[row] & (batch.turns[row] == index)
            values = [
                value for value, decided in zip(turn.entropies, turn.action_mask, strict=True) if decided
            ]
            if own.any():
                entropies[row, own] = tensor(values, dtype=torch.float64)
    return replace(batch, logprobs=torch.zeros_like(entropies), old_entropies=entropies)


def example(trajectories=EXAMPLE, layout="trajectory", masked: float = 0.0, returns=(2.0, 0.0)) -> Batch:
    """Returns 2 and 0 are advantages 1 and -1."""
    pairs = zip(trajectories, returns, strict=True)
    return scored(
        [episode(f"e{i}", turns, reward) for i, (turns, reward) in enumerate(pairs)], layout, masked
    )


def advantages_of(recipe: Recipe, batch: Batch) -> torch.Tensor:
    return compute_advantages(recipe.build(), batch, CONTEXT)


def by_turn(values: torch.Tensor, batch: Batch) -> list[list[float]]:
    """The one value of each turn that made a decision, by trajectory."""
    found = [{} for _ in batch.episodes]
    for row, position in batch.action_mask.nonzero().tolist():
        turn = int(batch.turns[row, position])
        value = values[row, position].item()
        assert found[batch.trajectory[row]].setdefault(turn, value) == value
    return [[turns[turn] for turn in sorted(turns)] for turns in found]


def close(actual: list[list[float]], expected: list[list[float]], tolerance: float) -> None:
    assert [len(row) for row in actual] == [len(row) for row in expected]
    for row, wanted in zip(actual, expected, strict=True):
        assert row == pytest.approx(wanted, abs=tolerance)


# The advantage


@pytest.mark.vector("M-1")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("trajectories", [EXAMPLE, INTERRUPTED])
@pytest.mark.parametrize(
    ("zeta", "expected"),
    [
        (0.1, [[1.21434141, 0.43792109, 0.69420862], [-0.82358805, -1.52288308]]),
        (0.05, [[1.21010765, 0.4229412, 0.71359318], [-0.84314352, -1.50349851]]),
    ],
)
def test_certain_turns_and_those_before_them_get_more_credit(zeta, expected, trajectories, layout):
    batch = example(trajectories, layout)
    advantages = advantages_of(EMPG(CENTRED, zeta=zeta), batch)
    close(by_turn(advantages, batch), expected, 5e-9)
    assert not advantages[~batch.action_mask].any()


@pytest.mark.vector("M-2")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_with_constant_entropy_all_but_last_turns_get_the_same_bonus(layout):
    batch = example(([[0.7], [0.7]], [[0.7]]), layout)
    advantages = advantages_of(EMPG(CENTRED, zeta=0.1), batch)
    close(by_turn(advantages, batch), [[0.73333333, 0.63333333], [-1.36666665]], 1e-7)


@pytest.mark.vector("M-3")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_episodes_of_one_turn_are_scaled_and_have_no_bonus(layout):
    batch = example(([[0.3]], [[0.9, 0.9]], [[0.6]]), layout, returns=(3.0, 0.0, 0.0))
    advantages = advantages_of(EMPG(CENTRED), batch)
    close(by_turn(advantages, batch), [[2.51944113], [-1.07841232], [-1.4410288]], 5e-9)


@pytest.mark.vector("M-4")
def test_the_entropy_of_a_turn_is_the_mean_over_its_decisions():
    split = example(([[0.1, 0.3, FORCED, FORCED], [0.5, 0.7, 0.3, FORCED]], [[0.9]]))
    whole = example(([[0.2], [0.5]], [[0.9]]))
    advantages = advantages_of(EMPG(CENTRED), split), advantages_of(EMPG(CENTRED), whole)
    close(by_turn(advantages[0], split), by_turn(advantages[1], whole), 1e-12)


def test_with_nothing_switched_on_it_is_its_base_less_the_mean_over_turns():
    batch = example()
    off = EMPG(CENTRED, k=0.0, k_future=0.0, zeta=0.0)
    # Three turns of 1 and two of -1: mean .2
    close(by_turn(advantages_of(off, batch), batch), [[0.8] * 3, [-1.2] * 2], 1e-7)


def test_a_turn_that_branches_share_counts_once_in_the_means():
    root = episode("root", [[0.2], [0.5]], 2.0)
    branch = episode("branch", [[0.2], [0.8]], 0.0, BranchPoint("root", turn=1))
    batch = scored([root, branch])
    # N = 0, .5, 1; exp(-N) = 1, e, e^2 with e = exp(-.5), and the turn of the 1 is one turn, not two.
    e = math.exp(-0.5)
    mean = (1 + e + e * e) / 3
    expected = [[1 / mean + 0.05 * e, e / mean], [-1 / mean + 0.05 * e * e, -e * e / mean]]
    centre = ((expected[0][0] + expected[1][0]) / 2 + expected[0][1] + expected[1][1]) / 3
    expected = [[value - centre for value in row] for row in expected]
    close(by_turn(advantages_of(EMPG(CENTRED), batch), batch), expected, 1e-7)
    numbers = log_of(EMPG(CENTRED), batch)
    assert numbers["empg/scale_mean"] == pytest.approx(1, abs=1e-7)


def test_the_transforms_of_the_base_come_first():
    doubled = lambda advantages, batch, context: 2 * advantages  # noqa: E731

    class Doubled(Recipe):
        def build(self) -> Algorithm:
            return replace(CENTRED.build(), transforms=(doubled,))

    batch = example()
    plain = advantages_of(EMPG(CENTRED, zeta=0.0), batch)
    torch.testing.assert_close(advantages_of(EMPG(Doubled(), zeta=0.0), batch), 2 * plain)


# What must not matter


@pytest.mark.parametrize("layout", LAYOUTS)
def test_neither_the_order_of_rows_nor_padding_nor_masked_values_matter(layout):
    batch = example(INTERRUPTED, layout)
    plain = advantages_of(EMPG(CENTRED), batch)
    order = list(reversed(range(len(batch.lengths))))
    shuffled = advantages_of(EMPG(CENTRED), batch.select(order))
    torch.testing.assert_close(shuffled, plain[order], rtol=0, atol=1e-12)
    poisoned = example(INTERRUPTED, layout, masked=math.nan)
    assert torch.equal(advantages_of(EMPG(CENTRED), poisoned), plain)
    base = torch.where(batch.action_mask, compute_advantages(CENTRED.build(), batch, CONTEXT), math.nan)
    torch.testing.assert_close(EMPG().modulate(base, poisoned, CONTEXT), plain, rtol=0, atol=1e-12)
    long = scored([*batch.episodes, episode("long", [[FORCED] * 40], 1.0)], layout)
    assert long.tokens.shape[1] > batch.tokens.shape[1]
    # Its return, 1, is the mean of 2 and 0, and it is no step: the others keep what they had.
    close(by_turn(advantages_of(EMPG(CENTRED), long), long)[:2], by_turn(plain, batch), 1e-12)


def test_groups_that_teach_nothing_are_left_with_the_bonus():
    batch = example(returns=(1.0, 1.0))
    # f of the turns that follow: exp(-.75), exp(-.375) and exp(-.25); last turns have none.
    bonus = [[0.05 * math.exp(-0.75), 0.05 * math.exp(-0.375), 0.0], [0.05 * math.exp(-0.25), 0.0]]
    mean = sum(map(sum, bonus)) / 5
    advantages = advantages_of(EMPG(CENTRED), batch)
    close(by_turn(advantages, batch), [[value - mean for value in row] for row in bonus], 1e-7)
    assert log_of(EMPG(CENTRED), batch)["empg/bonus_share"] == 1


def test_a_trajectory_without_rows_is_no_step():
    batch = example().select([1])
    # exp(-N) is exp(-1) and 1 here, N of the first being 1 and of the second 0.
    mean = (math.exp(-1) + 1) / 2
    scaled = [-math.exp(-1) / mean + 0.05, -1 / mean]
    expected = [scaled[0] - sum(scaled) / 2, scaled[1] - sum(scaled) / 2]
    close(by_turn(advantages_of(EMPG(CENTRED), batch), batch), [[], expected], 1e-7)


def test_without_a_decision_there_is_nothing_to_modulate():
    batch = example(([[FORCED]], [[FORCED], [FORCED]]))
    assert not advantages_of(EMPG(CENTRED), batch).any()
    assert log_of(EMPG(CENTRED), batch) == {}


# The log


def log_of(recipe: EMPG, batch: Batch) -> dict[str, float]:
    algorithm = recipe.build()
    mini = MiniBatch(batch, compute_advantages(algorithm, batch, CONTEXT))
    return dict(algorithm.diagnostics[-1](mini, CONTEXT))


def test_what_became_of_the_advantage_is_logged():
    numbers = log_of(EMPG(CENTRED, zeta=0.1), example(INTERRUPTED))
    # A g, and A as published with the bonus.
    assert numbers["empg/scale_mean"] == pytest.approx(1, abs=1e-7)
    assert numbers["empg/scale_min"] == pytest.approx(0.55632494, abs=5e-9)
    assert numbers["empg/scale_max"] == pytest.approx(1.51224794, abs=5e-9)
    scale = [1.51224794, 0.71433535, 1.0393518, -0.55632494, -1.17773989]
    scaled = [value - sum(scale) / 5 for value in scale]
    final = [1.21434141, 0.43792109, 0.69420862, -0.82358805, -1.52288308]
    bonus = sum(abs(value - without) for value, without in zip(final, scaled, strict=True))
    assert numbers["empg/bonus_share"] == pytest.approx(bonus / (bonus + sum(map(abs, scaled))), abs=1e-7)
    assert numbers["empg/sign_flips"] == 0
    for returns in ((2.0, 0.0), (1.0, 1.0)):
        assert log_of(EMPG(CENTRED, zeta=0.0), example(returns=returns))["empg/bonus_share"] == 0


def test_a_turn_whose_advantage_changed_its_sign_is_counted():
    # Advantages 4/3, 1/3, -5/3. Over six turns, four of them the first's, the mean is 2/3: 1/3 falls below 0.
    batch = example(([[0.5]] * 4, [[0.5]], [[0.5]]), returns=(3.0, 2.0, 0.0))
    assert log_of(EMPG(CENTRED, zeta=0.0), batch)["empg/sign_flips"] == pytest.approx(1 / 6, abs=1e-12)


# The configuration


def test_a_configuration_is_read_and_written_back():
    made = build_recipe("empg", {"base": {"name": "dr_grpo", "clip_high": 0.28}, "zeta": 0.1})
    tree = recipe_tree(made)
    assert tree["base"]["clip_high"] == 0.28
    assert build_recipe(tree.pop("name"), tree) == made


@pytest.mark.parametrize("name", ["k", "k_future", "zeta"])
def test_a_setting_below_zero_is_refused(name):
    with pytest.raises(ConfigError, match=rf"{name}: wrong value \(got -0.1, wanted at least 0 and"):
        EMPG(**{name: -0.1})


@pytest.mark.parametrize(
    ("slot", "name", "why"),
    [
        ("advantage", "advantage within a turn", "the advantage of a turn must be one number"),
        ("transforms", "token entropy advantage", "one gives more credit to certain turns"),
    ],
)
def test_a_base_that_it_contradicts_is_refused(slot, name, why):
    hook = trait(name)(lambda *arguments: arguments[0])

    class Contradicting(Recipe):
        def build(self) -> Algorithm:
            return Algorithm(**{slot: (hook,) if slot == "transforms" else hook})

    with pytest.raises(ConfigError, match=f"transforms cannot be combined with {slot}: .*{why}"):
        EMPG(Contradicting()).build()


@pytest.mark.parametrize("settings", [{"gamma": 0.9}, {"reward_kl_coefficient": 0.1}])
def test_returns_that_differ_between_the_tokens_of_a_turn_are_refused_as_a_base(settings):
    with pytest.raises(ConfigError, match="the advantage of a turn must be one number"):
        EMPG(ReinforcePlusPlus(**settings)).build()
    EMPG(ReinforcePlusPlus()).build()


def test_an_advantage_that_differs_within_a_turn_is_refused():
    batch = example()
    with pytest.raises(ValueError, match="differs within a turn"):
        EMPG().modulate(torch.arange(batch.tokens.numel()).view_as(batch.tokens).double(), batch, CONTEXT)


def test_missing_entropies_are_refused():
    batch = replace(example(), old_entropies=None)
    with pytest.raises(RequirementError, match="old_entropies is empty"):
        advantages_of(EMPG(CENTRED), batch)
    assert "entropy" in EMPG().build().requires
    assert EMPG().build().reads_scores


def test_the_entropy_band_goes_over_it():
    algorithm = EPO(base=EMPG(CENTRED)).build()
    batch = example()
    assert torch.equal(compute_advantages(algorithm, batch, CONTEXT), advantages_of(EMPG(CENTRED), batch))
    assert [term.name for term in algorithm.terms] == ["epo_entropy", "epo_smoothing"]


@pytest.mark.parametrize("name", ["dcpo", "distill"])
def test_it_goes_below_a_method_that_changes_single_tokens(name: str) -> None:
    with pytest.raises(ConfigError, match=f"its base '{name}' changes the advantages of single tokens"):
        build_recipe("empg", {"base": {"name": name}})
    assert build_recipe(name, {"base": {"name": "empg"}}).build().transforms
