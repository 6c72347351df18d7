import math
import warnings
from dataclasses import replace

import pytest
import torch
from torch import tensor

from agentrl.algorithms.algorithm import check_requirements
from agentrl.algorithms.credit import compute_advantages
from agentrl.algorithms.entropy_band import EntropyBand, entropy_levels
from agentrl.algorithms.hooks import Context, MiniBatch, Outputs
from agentrl.algorithms.methods.epo import EPO
from agentrl.algorithms.methods.grpo import GRPO
from agentrl.algorithms.recipe import build_recipe, recipe_tree
from agentrl.data import Episode, Group, StopReason, Turn
from agentrl.data.batch import Batch, collate
from agentrl.errors import ConfigError, RequirementError
from agentrl.learn.objective import build_objective
from agentrl.schedule import two_piece_decay

FORCED = None
LAYOUTS = ("trajectory", "turn")

# The entropies of the decisions of each turn of trajectories A and B.
EXAMPLE = ([[0.2, 0.6, 1.0], [1.5, 0.1]], [[0.4]])
EXPLODED = ([[0.2, 0.6, 1.0], [1.8, 0.1]], [[0.4]])
# A decision's part in the mean over its turn, over the turns of its trajectory and over trajectories.
WEIGHTS = tensor([1 / 12, 1 / 12, 1 / 12, 1 / 8, 1 / 8, 1 / 2], dtype=torch.float64)


def episode(name: str, turns, reward: float = 0.0) -> Episode:
    """A turn is the entropies of its tokens, None for a forced one; the reward comes with the last turn."""
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
    return Episode(name, "env", "t", 0, tuple(made), StopReason.TERMINATED)


def scored(trajectories=EXAMPLE, layout="trajectory", masked: float = 0.0) -> Batch:
    """The first trajectory has return 1; the scoring pass found the entropies that the rollout recorded."""
    episodes = [episode(f"e{index}", turns, float(index == 0)) for index, turns in enumerate(trajectories)]
    batch = collate([Group("t", tuple(episodes))], layout=layout)
    entropies = torch.full(batch.tokens.shape, masked, dtype=torch.float64)
    for row, owner in enumerate(batch.trajectory.tolist()):
        for index, turn in enumerate(episodes[owner].turns):
            own = batch.action_mask[row] & (batch.turns[row] == index)
            values = [
                value for value, decided in zip(turn.entropies, turn.action_mask, strict=True) if decided
            ]
            if own.any():
                entropies[row, own] = tensor(values, dtype=torch.float64)
    nothing = torch.zeros_like(entropies)
    return replace(batch, logprobs=nothing, old_logprobs=nothing, old_entropies=entropies)


START = Context()


def past(context: Context = START, **values: list[float]) -> Context:
    """History of `turn0`, `turn1`, ... and of `trajectory`, under the names that they are logged by."""
    names = {name: name.replace("turn", "turn/0") for name in values} | {"trajectory": "trajectory_mean"}
    return replace(
        context, history={f"train/algorithm/entropy/{names[name]}": past for name, past in values.items()}
    )


def flat(recipe: EPO):
    """The recipe over a loss of a quarter, whatever the policy says."""
    constant = lambda outputs, mini, bounds: torch.full_like(outputs.logprobs, 0.25)  # noqa: E731
    return replace(recipe.build(), surrogate=constant, clip=None)


def band_of(recipe: EPO) -> EntropyBand:
    """The band that the recipe's last diagnostic measures."""
    return recipe.build().diagnostics[-1].__self__


def learn(algorithm, batch: Batch, context: Context, parts=None, entropies=None):
    """Loss, numbers, and the gradients by entropies and by logprobs, summed over parts of the rows."""
    mini = MiniBatch(batch, compute_advantages(algorithm, batch, context))
    objective = build_objective(mini, algorithm, context)
    entropies = (batch.old_entropies if entropies is None else entropies).clone().requires_grad_()
    logprobs = torch.full_like(batch.logprobs, 0.05).requires_grad_()
    total, numbers = 0.0, {}
    for rows in parts or [list(range(len(batch.lengths)))]:
        width = int(batch.lengths[rows].max())
        outputs = Outputs(logprobs[rows, :width], entropies[rows, :width])
        loss, logged = objective.contribution(tensor(rows), outputs)
        loss.backward()
        total += loss.item()
        numbers = {name: numbers.get(name, 0.0) + value.item() for name, value in logged.items()}
    return total, numbers, entropies.grad, logprobs.grad


def by_decision(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Values at decisions, by trajectory and turn."""
    rows, positions = batch.action_mask.nonzero(as_tuple=True)
    keys = torch.stack([batch.trajectory[rows], batch.turns[batch.action_mask], positions, rows], dim=1)
    return torch.stack([values[row, position] for _, _, position, row in sorted(keys.tolist())])


def close(actual, expected, tolerance=1e-12):
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


# The loss


@pytest.mark.vector("E-R1")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_decisions_outside_the_band_of_past_trajectories_are_penalised(layout):
    batch = scored(EXAMPLE, layout)
    recipe = EPO(reference="scalar", min_history=1)
    loss, numbers, slope, _ = learn(flat(recipe), batch, past(trajectory=[0.9, 1.1]))
    assert numbers["term/epo_entropy"] == pytest.approx(0.55, abs=1e-12)
    assert numbers["term/epo_smoothing"] == pytest.approx(0.125, abs=1e-12)
    assert loss == pytest.approx(0.24970, abs=1e-12)
    # The band is [.5, 1.5]; on its bound, 1.5 is inside.
    close(by_decision(slope, batch) / WEIGHTS, [-0.003, -0.001, -0.001, -0.001, -0.003, -0.003])


@pytest.mark.vector("E-R1b")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_entropy_is_raised_inside_and_below_and_lowered_above(layout):
    batch = scored(EXPLODED, layout)
    recipe = EPO(reference="scalar", min_history=1)
    loss, numbers, slope, _ = learn(flat(recipe), batch, past(trajectory=[0.9, 1.1]))
    assert numbers["term/epo_entropy"] == pytest.approx(0.5875, abs=1e-12)
    assert numbers["term/epo_smoothing"] == pytest.approx(0.1625, abs=1e-12)
    assert loss == pytest.approx(0.2497375, abs=1e-12)
    close(by_decision(slope, batch) / WEIGHTS, [-0.003, -0.001, -0.001, 0.001, -0.003, -0.003])


@pytest.mark.vector("E-R1t")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_turn_has_the_reference_of_past_turns_of_its_index(layout):
    batch = scored(EXPLODED, layout)
    context = past(turn0=[0.5, 0.7], turn1=[1.0])
    loss, numbers, slope, _ = learn(flat(EPO(min_history=1)), batch, context)
    assert numbers["term/epo_smoothing"] == pytest.approx(0.1041666667, abs=5e-11)
    assert loss == pytest.approx(0.2496208333, abs=5e-11)
    # Corridors [.3, .9] and [.5, 1.5].
    close(by_decision(slope, batch) / WEIGHTS, [-0.003, -0.001, 0.001, 0.001, -0.003, -0.001])


@pytest.mark.vector("E-R1")
def test_the_indicator_shows_in_the_loss_and_moves_nothing():
    batch = scored()
    context = past(trajectory=[0.9, 1.1])
    recipe = EPO(reference="scalar", min_history=1, smoothing="indicator", penalty=0.1)
    loss, numbers, slope, _ = learn(flat(recipe), batch, context)
    assert 0.1 * numbers["term/epo_smoothing"] == pytest.approx(0.0708333333, abs=5e-11)
    assert loss == pytest.approx(0.2495208333, abs=5e-11)
    without = learn(flat(replace(recipe, penalty=0.0)), batch, context)[2]
    assert torch.equal(slope, without)


@pytest.mark.parametrize(("penalty", "sign"), [(0.5, -1), (1.0, 0), (2.0, 1)])
def test_the_ceiling_pulls_entropy_down_only_with_a_penalty_above_one(penalty, sign):
    batch = scored(([[2.0, 1.0]],))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        recipe = EPO(penalty=penalty, min_history=1, entropy_coefficient=0.25)
    above, inside = by_decision(learn(flat(recipe), batch, past(turn0=[1.0]))[2], batch).sign().tolist()
    assert (above, inside) == (sign, -1)


def test_without_a_coefficient_it_is_its_base():
    base = GRPO(clip_high=0.28, entropy_coefficient=0.01)
    batch, context = scored(), past(turn0=[1.0] * 5, turn1=[1.0] * 5)
    recipe = EPO(base=base, entropy_coefficient=0.0)
    loss, _, *slopes = learn(recipe.build(), batch, context)
    base_loss, _, *base_slopes = learn(base.build(), batch, context)
    assert loss == pytest.approx(base_loss, abs=1e-12)
    assert base_slopes[1].any()
    for slope, wanted in zip(slopes, base_slopes, strict=True):
        close(slope, wanted)
    assert learn(replace(recipe, entropy_coefficient=0.001).build(), batch, context)[0] != base_loss
    assert set(base.build().diagnostics) < set(recipe.build().diagnostics)


# The reference


@pytest.mark.vector("E-W1")
@pytest.mark.parametrize(("window", "expected"), [(3, [1, 0.9, 0.8, 0.6, 0.4]), (0, [1, 0.9, 0.8, 0.7, 0.6])])
def test_the_reference_is_the_mean_of_the_last_steps_that_logged_the_turn(window, expected):
    recipe, batch = EPO(window=window, min_history=1), scored(([[0.5]],))
    stored = [1, 0.8, 0.6, 0.4, 0.2]
    found = [
        by_decision(band_of(recipe).reference(batch, past(turn0=stored[:count])), batch).item()
        for count in range(1, 6)
    ]
    assert found == pytest.approx(expected, abs=1e-12)
    assert band_of(recipe).reference(batch, past(turn0=stored))[0, :2].isnan().all()


def test_a_turn_with_too_little_history_is_not_penalised_and_leaves_the_weights_as_they_are():
    batch = scored(EXPLODED)
    context = past(turn0=[0.6] * 5, turn1=[1.0] * 4)
    _, numbers, slope, _ = learn(flat(EPO()), batch, context)
    # Turn 0 has band [.3, .9]: (.1 + .1) / 12
    assert numbers["term/epo_smoothing"] == pytest.approx(0.2 / 12, abs=1e-12)
    close(by_decision(slope, batch)[3:5] / WEIGHTS[3:5], [-0.001, -0.001])
    _, numbers, slope, _ = learn(flat(EPO()), batch, START)
    assert numbers["term/epo_smoothing"] == 0
    close(by_decision(slope, batch), -0.001 * WEIGHTS)


def test_what_a_step_logs_is_the_reference_of_the_next():
    recipe, history = EPO(min_history=2), {}
    logs = recipe.build().diagnostics[-2:]
    active = []
    for scale in (1.0, 3.0, 1.0):
        trajectories = ([[0.2 * scale], [0.6 * scale]], [[0.4 * scale, 0.8 * scale]])
        mini = MiniBatch(batch := scored(trajectories), torch.zeros(2, 6))
        context = Context(history=history)
        numbers = {name: value for log in logs for name, value in log(mini, context).items()}
        active.append(numbers["entropy_band/active"])
        for name, value in numbers.items():
            history.setdefault(f"train/algorithm/{name}", []).append(value)
    assert active == [0, 0, 1]
    # Turn 0 of the first two: (.2 + .6) / 2 * 1 and * 3; turn 1: .6 and 1.8.
    reference = by_decision(band_of(recipe).reference(batch, replace(context, history=history)), batch)
    close(reference, [2 / 3 * 0.4 * 2.5, 2 / 3 * 0.6 * 2.5, 2 / 3 * 0.4 * 2.5, 2 / 3 * 0.4 * 2.5])


def test_entropy_levels_are_of_the_turns_that_decided():
    trajectories = ([[0.2, FORCED], [FORCED], [0.6]], [[0.4, 0.8]], [[FORCED], [0.3]])
    for layout in LAYOUTS:
        numbers = entropy_levels(MiniBatch(scored(trajectories, layout, math.nan), torch.zeros(1)), START)
        assert numbers == pytest.approx(
            {
                "entropy/turn/00": (0.2 + 0.6) / 2,
                "entropy/turn/01": 0.3,
                "entropy/turn/02": 0.6,
                "entropy/trajectory_mean": (0.4 + 0.6 + 0.3) / 3,
            },
            abs=1e-12,
        )


# Schedules


@pytest.mark.vector("E-O2")
def test_the_released_schedule_falls_in_two_pieces():
    found = [two_piece_decay(step, 150) for step in (0, 37, 75, 76, 112, 150, 999)]
    expected = [1, 0.8745634693, 0.8270670566, 0.7686315513, 0.1821101507, 0.0398296547, 0.0398296547]
    assert found == pytest.approx(expected, abs=5e-11)
    assert [two_piece_decay(step, 1) for step in (0, 1)] == pytest.approx([1, 0.8 * math.exp(-3)])


@pytest.mark.vector("E-S1")
def test_the_exponential_schedule_falls_from_two_towards_one():
    recipe = EPO(schedule="exponential")
    found = [recipe.beta(Context(step, total_steps=100)) for step in (0, 30, 60, 120)]
    assert found == pytest.approx([2, 1.6065306597, 1.3678794412, 1.1353352832], abs=5e-11)


@pytest.mark.filterwarnings("ignore:epo")
def test_the_ramp_rises_to_one_and_the_constant_is_one():
    steps = [Context(step, total_steps=100) for step in (0, 15, 60, 99)]
    assert [EPO(schedule="ramp").beta(context) for context in steps] == [0, 0.25, 1, 1]
    assert [EPO().beta(context) for context in steps] == [1, 1, 1, 1]
    assert EPO(schedule="official_epoch").beta(Context(75, total_steps=75)) == pytest.approx(
        0.8 * math.exp(-3)
    )


def test_the_schedule_weighs_the_penalty_and_not_the_bonus():
    batch = scored(EXPLODED)
    recipe = EPO(reference="scalar", min_history=1, schedule="exponential")
    context = past(Context(step=60, total_steps=100), trajectory=[1.0])
    loss, _, _, _ = learn(flat(recipe), batch, context)
    assert loss == pytest.approx(0.25 - 0.001 * (0.5875 - 1.3678794412 * 2 * 0.1625), abs=1e-12)


# The released code


@pytest.mark.vector("E-O1")
def test_the_released_loss_counts_the_present_and_every_token_the_same():
    batch = scored(([[0.2, 0.6, 1.0], [1.5, 0.1]],))
    # With the present .6 and .8 the references are .5 and .8: bands [.25, .75] and [.4, 1.2].
    context = past(Context(step=37, total_steps=60), turn0=[0.4], turn1=[0.8])
    constant = flat(EPO(parity="official", schedule="constant"))
    loss, numbers, _, _ = learn(constant, batch, context)
    assert numbers["term/epo_entropy"] == pytest.approx(0.68, abs=1e-12)
    assert 0.1 * numbers["term/epo_smoothing"] == pytest.approx(0.08, abs=1e-12)
    assert loss == pytest.approx(0.249400, abs=1e-12)
    # Its schedule is over 150 steps, in a run of 60 as well.
    loss, _, _, _ = learn(flat(EPO(parity="official")), batch, context)
    assert loss == pytest.approx(0.25 - 0.001 * (0.68 - 0.8745634693 * 0.08), abs=1e-12)


def test_the_released_reference_is_of_the_whole_rollout_batch_in_every_part_of_it():
    batch = scored(EXPLODED)
    algorithm = flat(EPO(parity="official"))
    assert band_of(EPO(parity="official")).reference(batch.select([1]), START)[0, 2].item() == 0.5
    whole, parts = learn(algorithm, batch, START), learn(algorithm, batch, START, [[1], [0]])
    assert whole[0] == pytest.approx(parts[0], abs=1e-12)


def test_a_decision_on_the_bound_is_outside_in_the_released_code_only():
    batch, context = scored(([[0.5]],)), past(turn0=[1.0] * 5)
    ours = EPO(smoothing="indicator")
    assert learn(flat(ours), batch, context)[1]["term/epo_smoothing"] == 0
    # The present is .5 as well: of 1, 0 and .5 the mean is .5, and .5 is on the bound of [.5, .75].
    theirs = EPO(parity="official", low=1.0)
    numbers = learn(flat(theirs), batch, past(turn0=[1.0, 0.0]))[1]
    assert numbers["term/epo_smoothing"] == 1


def test_the_released_penalty_moves_nothing():
    batch, context = scored(EXPLODED), past(turn0=[0.1], turn1=[9.0])
    released = EPO(parity="official")
    _, numbers, slope, _ = learn(flat(released), batch, context)
    assert numbers["term/epo_smoothing"] > 0
    assert torch.equal(slope, learn(flat(replace(released, penalty=0.0)), batch, context)[2])


# What must not matter

HISTORY = past(turn0=[0.6] * 5, turn1=[1.0] * 5)
MIXED = ([[0.2, 0.6, FORCED], [FORCED], [1.8, 0.1]], [[0.4], [FORCED, 2.0]], [[FORCED]])


def test_both_layouts_give_the_same_loss_and_gradients():
    one, other = (scored(MIXED, layout) for layout in LAYOUTS)
    algorithm = flat(EPO())
    (loss, _, slope, _), (other_loss, _, other_slope, _) = (
        learn(algorithm, batch, HISTORY) for batch in (one, other)
    )
    assert loss == pytest.approx(other_loss, abs=1e-12)
    assert loss < 0.25
    close(by_decision(slope, one), by_decision(other_slope, other))


def test_neither_the_order_nor_the_partition_of_rows_nor_padding_nor_masked_values_matter():
    batch = scored(MIXED, "turn")
    algorithm = flat(EPO())
    loss, numbers, slope, _ = learn(algorithm, batch, HISTORY)
    order = list(reversed(range(len(batch.lengths))))
    shuffled = learn(algorithm, batch.select(order), HISTORY)
    assert shuffled[0] == pytest.approx(loss, abs=1e-12)
    close(shuffled[2][order, : slope.shape[1]], slope)
    parts = learn(algorithm, batch, HISTORY, [[0, 3], [1, 2, 4], [5]])
    assert parts[1] == pytest.approx(numbers, abs=1e-12)
    close(parts[2], slope)
    poisoned = learn(algorithm, scored(MIXED, "turn", masked=math.nan), HISTORY)
    assert poisoned[0] == loss
    assert torch.equal(torch.where(batch.action_mask, poisoned[2], 0.0), slope)


def test_a_batch_without_a_decision_has_no_penalty_and_no_nan():
    batch = scored(([[FORCED]], [[FORCED]]))
    mini = MiniBatch(batch, torch.zeros(2, 3))
    for recipe in (EPO(), EPO(parity="official"), EPO(reference="scalar")):
        loss, _, slope, _ = learn(flat(recipe), batch, HISTORY)
        assert loss == 0
        assert not slope.any()
        assert band_of(recipe).metrics(mini, HISTORY)["entropy_band/active"] == 0
    assert entropy_levels(mini, HISTORY) == {}


# The log


def test_the_band_is_logged_with_the_share_of_decisions_outside_it():
    recipe = EPO(schedule="exponential")
    mini = MiniBatch(scored(EXPLODED, masked=math.nan), torch.zeros(1))
    context = past(Context(step=60, total_steps=100), turn0=[0.6] * 5, turn1=[1.0] * 5)
    # Corridors [.3, .9] for four decisions, of which .2 is below and 1.0 above, and [.5, 1.5] for 1.8 and .1.
    assert band_of(recipe).metrics(mini, context) == pytest.approx(
        {
            "entropy_band/beta": 1.3678794412,
            "entropy_band/active": 1,
            "entropy_band/low": (4 * 0.3 + 2 * 0.5) / 6,
            "entropy_band/high": (4 * 0.9 + 2 * 1.5) / 6,
            "entropy_band/share_below": 2 / 6,
            "entropy_band/share_above": 2 / 6,
        },
        abs=1e-10,
    )
    partly = band_of(recipe).metrics(mini, past(turn1=[1.0] * 5))
    assert partly["entropy_band/active"] == pytest.approx(2 / 6)
    assert partly["entropy_band/low"] == 0.5
    assert band_of(recipe).metrics(mini, START) == {"entropy_band/beta": 2, "entropy_band/active": 0}


# The configuration


def test_a_configuration_is_read_and_written_back():
    settings = {
        "base": {"name": "dr_grpo"},
        "smoothing": "indicator",
        "window": 3,
        "min_history": 2,
        "penalty": 3,
    }
    made = build_recipe("epo", settings)
    assert recipe_tree(made)["base"]["name"] == "dr_grpo"
    tree = recipe_tree(made)
    assert build_recipe(tree.pop("name"), tree) == made


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"low": 1.5}, r"low is 1.5, wanted below high \(1.5\)"),
        ({"low": -0.1}, r"low: wrong value \(got -0.1"),
        ({"entropy_coefficient": -1.0}, r"entropy_coefficient: wrong value \(got -1.0"),
        ({"penalty": -1.0}, r"penalty: wrong value \(got -1.0"),
        ({"window": -1}, r"window: wrong value \(got -1"),
        ({"min_history": 0}, r"min_history: wrong value \(got 0"),
        ({"window": 4}, r"min_history is 5, wanted at most the window \(4\)"),
        ({"schedule_rate": -1.0}, r"schedule_rate: wrong value \(got -1.0"),
        ({"schedule_midpoint": 0.0}, r"schedule_midpoint: wrong value \(got 0.0"),
    ],
)
def test_a_setting_out_of_range_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        EPO(**settings)


@pytest.mark.parametrize(
    ("settings", "shown"),
    [
        ({"penalty": 1.0}, "is 1,"),
        ({"schedule": "official_epoch"}, "is 0.0797,"),  # 2 * .8 * exp(-3)
        ({"schedule": "ramp"}, "is 0,"),
    ],
)
def test_a_penalty_too_weak_to_pull_entropy_down_is_warned_of(settings, shown):
    with pytest.warns(UserWarning, match=f"lowest weight {shown} wanted above 1"):
        EPO(**settings)


def test_the_defaults_and_what_has_no_gradient_anyway_are_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EPO()
        EPO(schedule="exponential")
        EPO(parity="official")


def test_a_learner_without_the_gradient_of_entropies_is_refused():
    algorithm = EPO().build()
    check_requirements(algorithm, {"old_logprobs", "entropy", "entropy:grad"})
    with pytest.raises(RequirementError, match="terms/epo_smoothing requires entropy:grad"):
        check_requirements(algorithm, {"old_logprobs", "entropy"})
    assert not algorithm.reads_scores
