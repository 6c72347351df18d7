import copy
import math
import random
from dataclasses import replace
from functools import partial

import pytest
import torch
from toy_policy import VOCABULARY, ToyPolicy, make_groups, make_turn, sampled_at, toy_forward

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import Algorithm, clipped_policy_loss
from agentrl.algorithms.credit import prepare
from agentrl.algorithms.hooks import Bounds, Context, MiniBatch, Term, requires
from agentrl.algorithms.methods.cloning import BehaviourCloning
from agentrl.algorithms.methods.grpo import GRPO
from agentrl.data import Episode, Group, StopReason, Turn
from agentrl.data.batch import Batch, collate
from agentrl.errors import CheckpointError, RequirementError
from agentrl.learn.diagnostics import teaching_metrics
from agentrl.learn.learner import Learner
from agentrl.learn.settings import LearnerConfig

CONTEXT = Context(step=2, total_steps=10)
AGGREGATIONS = [
    {"aggregation": "token"},
    {"aggregation": "sequence", "sequence": "turn"},
    {"aggregation": "sequence", "sequence": "trajectory"},
    {"aggregation": "trajectory"},
    {"aggregation": "constant", "sequence_length": 8, "sequence": "turn"},
    {"aggregation": "constant", "sequence_length": 8, "sequence": "trajectory"},
]


def learner_of(policy=None, *, reference=None, **settings) -> Learner:
    config = LearnerConfig(**{"warmup_steps": 0, "micro_batch_tokens": 10_000} | settings)
    return Learner(policy or ToyPolicy(), config, reference=reference, forward=toy_forward())


def gradients(
    batch: Batch, algorithm: Algorithm, **settings
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Metrics and gradient of one update of the same policy."""
    policy = ToyPolicy()
    found = {}
    for name, value in policy.named_parameters():
        value.register_post_accumulate_grad_hook(
            lambda value, name=name: found.update({name: value.grad.clone()})
        )
    return learner_of(policy, **settings).update(batch, algorithm, CONTEXT), found


def assert_same(one, other, tolerance=1e-12):
    (numbers, slopes), (other_numbers, other_slopes) = one, other
    for name in (
        "learner/loss",
        "learner/grad_norm",
        "learner/entropy/token",
        "learner/entropy/turn",
        "learner/entropy/trajectory",
        "learner/action_tokens",
        "learner/mask_share",
        "learner/weight_mean",
        "learner/bound_lower",
        "learner/bound_upper",
    ):
        assert numbers[name] == pytest.approx(other_numbers[name], abs=max(tolerance, 1e-9)), name
    assert slopes.keys() == other_slopes.keys()
    assert all(slope.any() for slope in slopes.values())
    for name, slope in slopes.items():
        torch.testing.assert_close(slope, other_slopes[name], rtol=0, atol=tolerance)


def scored(batch: Batch, drift: float = 0.1) -> Batch:
    """Old logprobs a little off, so that ratios are not 1 and some are clipped."""
    batch = learner_of().score(batch)
    noise = torch.linspace(-3, 3, batch.tokens.numel()).sin().view_as(batch.logprobs) * drift * 3
    return replace(batch, old_logprobs=torch.where(batch.action_mask, batch.old_logprobs + noise, 0.0))


FULL = GRPO(entropy_coefficient=0.01, dual_clip=3.0).build()


# Invariances


@pytest.mark.parametrize("settings", AGGREGATIONS)
@pytest.mark.parametrize("budget", [1, 17, 60])
def test_loss_and_gradient_do_not_depend_on_the_micro_batches(settings, budget):
    algorithm = GRPO(entropy_coefficient=0.01, **settings).build()
    batch = scored(collate(make_groups(), layout="turn"))
    whole = gradients(batch, algorithm)
    assert whole[0]["learner/clip_ratio"] > 0
    assert_same(whole, gradients(batch, algorithm, micro_batch_tokens=budget))


@pytest.mark.parametrize("settings", AGGREGATIONS)
def test_loss_and_gradient_do_not_depend_on_the_order_of_rows(settings):
    algorithm = GRPO(entropy_coefficient=0.01, **settings).build()
    batch = scored(collate(make_groups(), layout="turn"))
    order = list(range(len(batch.lengths)))
    random.Random(0).shuffle(order)
    assert_same(gradients(batch, algorithm), gradients(batch.select(order), algorithm))


def test_padding_changes_nothing_whatever_is_written_there():
    batch = scored(collate(make_groups()))

    def widened(values, fill):
        return torch.cat([values, torch.full((len(values), 5), fill, dtype=values.dtype)], dim=1)

    names = ("logprobs", "entropies", "rewards", "old_logprobs", "old_entropies")
    wide = replace(
        batch,
        tokens=widened(batch.tokens, 3),
        action_mask=widened(batch.action_mask, False),
        turns=widened(batch.turns, 0),
        **{name: widened(getattr(batch, name), math.nan) for name in names},
    )
    assert_same(gradients(batch, FULL), gradients(wide, FULL))


def test_nan_at_any_position_that_was_not_sampled_changes_nothing():
    batch = scored(collate(make_groups()))
    reference = ToyPolicy(seed=5)
    algorithm = GRPO(entropy_coefficient=0.01, kl_coefficient=0.1).build()
    batch = replace(batch, reference_logprobs=learner_of(reference).score(batch).old_logprobs)
    names = ("logprobs", "entropies", "old_logprobs", "old_entropies", "reference_logprobs")
    poisoned = replace(
        batch, **{name: torch.where(batch.action_mask, getattr(batch, name), math.nan) for name in names}
    )
    assert_same(gradients(batch, algorithm), gradients(poisoned, algorithm))


def test_hooks_see_zeros_where_nothing_was_sampled():
    seen = []

    def watched(advantages, batch, context):
        seen.extend([batch.logprobs, batch.entropies, batch.old_logprobs, batch.old_entropies])
        return advantages

    batch = scored(collate(make_groups()))
    names = ("logprobs", "entropies", "old_logprobs", "old_entropies")
    poisoned = replace(
        batch, **{name: torch.where(batch.action_mask, getattr(batch, name), math.nan) for name in names}
    )
    learner_of().update(poisoned, Algorithm(transforms=(watched,)), CONTEXT)
    assert len(seen) == 4
    assert all((values[~batch.action_mask] == 0).all() for values in seen)


@pytest.mark.parametrize("settings", AGGREGATIONS)
def test_both_layouts_give_equal_losses_gradients_and_entropies(settings):
    algorithm = GRPO(entropy_coefficient=0.01, **settings).build()
    groups = make_groups()
    results = [gradients(collate(groups, layout=layout), algorithm) for layout in ("trajectory", "turn")]
    assert_same(*results)


def above_mean(values, mini):
    return values > functional.masked_mean(values, mini.batch.action_mask)


def selective() -> Algorithm:
    """Mask, bounds, weights and the tokens of a term, all by statistics of the whole mini-batch."""
    unlikely = requires("entropy")(lambda mini, context: above_mean(-mini.batch.old_entropies, mini))
    grown = requires("current")(lambda mini, context: above_mean(mini.current.ratio, mini))
    weight = requires("current")(lambda mini, context: 1.0 + 2.0 * above_mean(mini.current.logprobs, mini))
    change = lambda said, mini, context: (said.logprobs - mini.batch.old_logprobs).abs()  # noqa: E731
    return Algorithm(
        masks=(unlikely,),
        clip=lambda mini, context: Bounds(0.9, 1.0 + mini.batch.old_entropies),
        weights=(weight,),
        terms=(Term("change", change, 0.5, where=grown),),
    )


@pytest.mark.parametrize("layout", ["trajectory", "turn"])
@pytest.mark.parametrize(("budget", "shuffled"), [(1, False), (40, True)])
def test_what_is_chosen_by_the_whole_mini_batch_does_not_depend_on_its_parts(layout, budget, shuffled):
    algorithm, groups = selective(), make_groups()
    whole = gradients(collate(groups), algorithm, epochs=2, learning_rate=0.1)
    batch = collate(groups, layout=layout)
    order = list(range(len(batch.lengths)))
    if shuffled:
        random.Random(0).shuffle(order)
    rows = {"epochs": 2, "learning_rate": 0.1, "micro_batch_tokens": budget}
    parts = gradients(batch.select(order), algorithm, **rows)
    assert_same(whole, parts, tolerance=1e-9)
    for name in ("learner/term/change", "learner/clip_ratio"):
        assert whole[0][name] == pytest.approx(parts[0][name], abs=1e-7)
        assert whole[0][name] > 0
    assert 0.1 < whole[0]["learner/mask_share"] < 0.9
    assert 1.1 < whole[0]["learner/weight_mean"] < 2.9


def test_a_forced_token_is_worth_as_much_as_a_token_of_the_prompt():
    """The same tokens, once as forced parts of replies and once as the prompts around them."""
    draw = random.Random(3)
    forced, told = [], []
    for member in range(4):
        turn = make_turn(draw, constrained=False, reward=float(member % 2), new_sequence=True)
        count = len(turn.action_ids)
        a, b, c = (draw.randrange(VOCABULARY) for _ in range(3))
        fixed = replace(
            turn,
            action_ids=(a, *turn.action_ids, b, c),
            logprobs=(0.0, *turn.logprobs, 0.0, 0.0),
            entropies=(0.0, *turn.entropies, 0.0, 0.0),
            allowed=((a,), *[None] * count, (b,), (c,)),
        )
        second = make_turn(draw, constrained=True)
        forced.append(episode(f"e{member}", fixed, second))
        told.append(
            episode(
                f"e{member}",
                replace(turn, prompt_ids=(*turn.prompt_ids, a)),
                replace(second, prompt_ids=(b, c, *second.prompt_ids)),
            )
        )
    for settings in AGGREGATIONS:
        algorithm = GRPO(entropy_coefficient=0.01, **settings).build()
        assert_same(*(gradients(collate([Group("t", tuple(made))]), algorithm) for made in (forced, told)))


def test_forced_tokens_after_the_last_decision_change_nothing():
    groups = make_groups()

    def longer(played: Episode) -> Episode:
        *before, last = played.turns
        allowed = (*(last.allowed or [None] * len(last.action_ids)), (1,), (2,))
        tail = {"logprobs": (*last.logprobs, 0.0, 0.0), "entropies": (*last.entropies, 0.0, 0.0)}
        last = replace(last, action_ids=(*last.action_ids, 1, 2), allowed=allowed, **tail)
        return replace(played, turns=(*before, last))

    longer_groups = [replace(group, episodes=tuple(map(longer, group.episodes))) for group in groups]
    assert_same(gradients(collate(groups), FULL), gradients(collate(longer_groups), FULL))


def episode(id: str, *turns: Turn) -> Episode:
    return Episode(id, "toy", "t", 0, turns, StopReason.TERMINATED)


# By hand


class Constant(torch.nn.Module):
    """Its state is 1 everywhere, so that token v has the logit weight[v, 0]."""

    def __init__(self, weight: list[float]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(weight, dtype=torch.float64)[:, None])


def constant_learner(policy: Constant, **settings) -> Learner:
    forward = replace(
        toy_forward(),
        hidden_states=lambda policy, tokens, lengths: torch.ones(len(tokens), 1, dtype=torch.float64),
        output_weight=lambda policy: policy.weight,
    )
    return Learner(policy, LearnerConfig(**{"warmup_steps": 0} | settings), forward=forward)


def slope_after(learner: Learner, batch: Batch, algorithm: Algorithm) -> tuple[dict[str, float], list[float]]:
    found = []
    learner.policy.weight.register_post_accumulate_grad_hook(lambda value: found.append(value.grad.clone()))
    numbers = learner.update(batch, algorithm, CONTEXT)
    return numbers, found[-1].flatten().tolist()


def choose(id: str, token: int, reward: float = 0.0) -> Episode:
    choices = ((0, 1),)
    turn = Turn(
        "o", "a", (2,), (token,), (math.log(0.5),), (math.log(2),), choices, reward=reward, new_sequence=True
    )
    return episode(id, turn)


def test_cloning_is_cross_entropy_with_the_slope_of_a_softmax():
    learner = constant_learner(Constant([0.0, 0.0, 9.0]))
    batch = collate([Group("t", (choose("e", 0),))])
    numbers, slope = slope_after(learner, batch, BehaviourCloning().build())
    # Two allowed ids of equal logit: -log .5, and p - onehot; the third id was not to choose from.
    assert numbers["learner/loss"] == pytest.approx(math.log(2))
    assert slope == pytest.approx([-0.5, 0.5, 0.0])
    assert numbers["learner/entropy/token"] == pytest.approx(math.log(2))


def test_the_group_relative_slope_by_hand():
    learner = constant_learner(Constant([0.0, 0.0, 9.0]))
    batch = collate([Group("t", (choose("good", 0, reward=1.0), choose("bad", 1)))])
    numbers, slope = slope_after(learner, batch, GRPO(divide_by_std=False).build())
    # Advantages +-.5, ratios 1: loss (-.5 + .5) / 2. Slope: mean of -.5 * (.5, -.5) and .5 * (-.5, .5).
    assert numbers["learner/loss"] == pytest.approx(0.0)
    assert slope == pytest.approx([-0.25, 0.25, 0.0])
    assert (numbers["learner/clip_ratio"], numbers["learner/kl"]) == (0.0, 0.0)
    assert numbers["learner/action_tokens"] == numbers["learner/trajectories"] == 2
    assert numbers["learner/tokens"] == 4
    assert numbers["algorithm/mismatch/max"] == pytest.approx(0.0, abs=1e-7)
    assert numbers["learner/taught_tokens"] == numbers["learner/effective_episodes"] == 2
    assert numbers["learner/advantage_size"] == 0.5


def test_effective_episodes_are_fewer_where_some_teach_more():
    batch = collate([Group("t", tuple(choose(str(index), index % 2) for index in range(4)))])
    advantages = torch.zeros_like(batch.logprobs)
    sizes = torch.tensor([[3.0], [-1.0], [0.0], [5.0]])
    advantages[batch.action_mask] = sizes.expand_as(batch.action_mask)[batch.action_mask]
    mask = batch.action_mask & (torch.arange(4) < 3)[:, None]  # the last episode is masked
    found = teaching_metrics(MiniBatch(batch, advantages, mask=mask))
    assert found["effective_episodes"] == pytest.approx((3 + 1) ** 2 / (9 + 1))
    assert (found["taught_tokens"], found["advantage_size"]) == (2, 2)
    nothing = teaching_metrics(MiniBatch(batch, advantages, mask=torch.zeros_like(mask)))
    assert set(nothing.values()) == {0.0}


def test_an_episode_counts_by_the_mean_over_its_own_tokens_however_many():
    batch = collate(make_groups(), layout="turn")
    advantages = torch.where(batch.action_mask, -2.0, 0.0)
    taught = set(batch.trajectory[batch.action_mask.any(dim=1)].tolist())
    found = teaching_metrics(MiniBatch(batch, advantages))
    assert found["effective_episodes"] == pytest.approx(len(taught))
    assert found["taught_tokens"] == batch.action_mask.sum()


def test_the_gap_between_rollout_and_learner_is_logged():
    learner = constant_learner(Constant([math.log(3), 0.0, 9.0]))
    batch = collate([Group("t", (choose("good", 0, reward=1.0), choose("bad", 1)))])
    numbers = learner.update(batch, GRPO().build(), CONTEXT)
    # The rollout said log .5 twice, the learner says log .75 and log .25.
    gaps = [math.log(0.75 / 0.5), math.log(0.5 / 0.25)]
    assert numbers["algorithm/mismatch/max"] == pytest.approx(max(gaps), abs=1e-6)
    assert numbers["algorithm/mismatch/mean"] == pytest.approx(sum(gaps) / 2, abs=1e-6)


def test_learning_is_about_the_distribution_at_the_temperature_of_sampling():
    batch = collate(sampled_at([Group("t", (choose("e", 0),))], 0.5))
    learner = constant_learner(Constant([math.log(2), 0.0, 9.0]))
    # Logits ln 4 and 0, so p = .8; the slope by the weight is that by the logit, over the temperature.
    numbers, slope = slope_after(learner, batch, BehaviourCloning().build())
    assert numbers["learner/loss"] == pytest.approx(-math.log(0.8))
    assert slope == pytest.approx([-0.4, 0.4, 0.0])


def test_the_gradient_is_clipped_by_its_norm():
    policy = Constant([0.0, 0.0, 9.0])
    batch = collate([Group("t", (choose("e", 0),))])
    numbers, _ = slope_after(constant_learner(policy, clip_gradient=0.1), batch, BehaviourCloning().build())
    assert numbers["learner/grad_norm"] == pytest.approx(math.sqrt(0.5))  # as it was before


def test_rewarded_choices_become_likely():
    policy = Constant([0.0, 0.0, 9.0])
    learner = constant_learner(policy, learning_rate=0.1, optimizer="adamw")
    for step in range(20):
        batch = collate([Group("t", (choose("good", 0, reward=1.0), choose("bad", 1)))])
        learner.update(batch, GRPO().build(), Context(step, 20))
    assert (policy.weight[0] - policy.weight[1]).item() > 2


def test_an_entropy_bonus_raises_the_entropy_that_is_logged():
    batch = collate([Group("t", (choose("e", 0), choose("f", 1)))])
    algorithm = GRPO(entropy_coefficient=1.0, drop_equal_groups=False).build()
    learner = constant_learner(Constant([2.0, 0.0, 9.0]), learning_rate=0.05, optimizer="adamw")
    logged = [
        learner.update(batch, algorithm, Context(step, 20))["learner/entropy/token"] for step in range(20)
    ]
    p = math.exp(2) / (1 + math.exp(2))
    assert logged[0] == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p), abs=1e-6)
    assert logged == sorted(logged)


# Order of a step


def test_the_second_mini_batch_sees_other_ratios_and_the_same_advantages():
    computed, ratios, used = [], [], []

    def counted(batch, context):
        values = functional.broadcast_to_tokens(
            torch.where(batch.returns > 0, 1.0, -1.0), batch.trajectory, batch.action_mask
        )
        computed.append(values)
        return values

    def watched(outputs, mini, bounds):
        ratio = functional.probability_ratio(outputs.logprobs.detach(), mini.batch.old_logprobs)
        ratios.append(ratio[mini.batch.action_mask])
        used.append(mini)
        return clipped_policy_loss(outputs, mini, bounds)

    batch = prepare(Algorithm(), make_groups(), CONTEXT)
    algorithm = Algorithm(advantage=counted, surrogate=watched)
    learner = learner_of(mini_batches=2, learning_rate=0.01)
    before = learner.score(batch)
    learner.update(batch, algorithm, CONTEXT)
    assert len(computed) == 1
    assert len(ratios) == 2
    torch.testing.assert_close(ratios[0], torch.ones_like(ratios[0]), rtol=0, atol=1e-6)
    assert (ratios[1] - 1).abs().max() > 1e-3
    for mini in used:
        for row, owner in enumerate(mini.batch.trajectory.tolist()):
            original = (
                int((batch.trajectory == owner).nonzero()[0])
                if (batch.trajectory == owner).sum() == 1
                else None
            )
            if original is not None:
                width = mini.advantages.shape[1]
                assert torch.equal(mini.advantages[row], computed[0][original, :width])
                assert torch.equal(mini.batch.old_logprobs[row], before.old_logprobs[original, :width])


def test_every_epoch_goes_through_all_trajectories():
    seen = []

    def watched(outputs, mini, bounds):
        seen.extend(mini.batch.trajectory.tolist())
        return clipped_policy_loss(outputs, mini, bounds)

    batch = collate(make_groups())
    numbers = learner_of(epochs=2, mini_batches=3).update(batch, Algorithm(surrogate=watched), CONTEXT)
    with_decisions = batch.trajectory[batch.action_mask.any(dim=1)].tolist()
    assert sorted(seen) == sorted(with_decisions * 2)
    assert numbers["learner/updates"] == 6


def test_leaving_out_the_scoring_pass_changes_nothing_when_there_is_one_update():
    batch = collate(make_groups())
    assert_same(gradients(batch, FULL), gradients(learner_of().score(batch), FULL), tolerance=1e-7)


def test_components_that_read_scores_get_them_before_the_update():
    seen = {}

    @requires("entropy")
    def transform(advantages, batch, context):
        seen["old"] = batch.old_entropies
        return advantages

    batch = collate(make_groups())
    learner = learner_of()
    wanted = learner.score(batch).old_entropies
    learner.update(batch, Algorithm(transforms=(transform,)), CONTEXT)
    assert torch.equal(seen["old"], wanted)


def test_a_component_that_requires_current_sees_the_policy_of_this_mini_batch():
    seen = []

    @requires("current")
    def weigh(mini, context):
        seen.append(
            (mini.current.logprobs - mini.batch.old_logprobs)[mini.batch.action_mask].abs().max().item()
        )
        return torch.ones(mini.batch.tokens.shape)

    learner = learner_of(mini_batches=2, learning_rate=0.01)
    learner.update(collate(make_groups()), Algorithm(weights=(weigh,)), CONTEXT)
    assert seen[0] == 0.0
    assert seen[1] > 1e-3


def test_divergence_from_the_reference_is_logged_and_needs_one():
    algorithm = GRPO(kl_coefficient=0.1).build()
    batch = collate(make_groups())
    same = learner_of(reference=ToyPolicy()).update(batch, algorithm, CONTEXT)
    other = learner_of(reference=ToyPolicy(seed=1)).update(batch, algorithm, CONTEXT)
    assert same["learner/term/kl"] == pytest.approx(0.0, abs=1e-9)
    assert other["learner/term/kl"] > 0.01
    assert other["learner/loss"] == pytest.approx(
        other["learner/policy_loss"] + 0.1 * other["learner/term/kl"]
    )
    with pytest.raises(RequirementError, match="reference"):
        learner_of().update(batch, algorithm, CONTEXT)
    assert "reference" not in learner_of().provides
    assert "reference" in learner_of(reference=ToyPolicy()).provides


def test_a_batch_without_rows_is_no_update():
    policy = ToyPolicy()
    before = copy.deepcopy(policy.state_dict())
    numbers = learner_of(policy).update(prepare(Algorithm(), [], CONTEXT), Algorithm(), CONTEXT)
    assert (
        numbers["learner/updates"]
        == numbers["learner/action_tokens"]
        == numbers["learner/skipped_updates"]
        == 0
    )
    assert all(torch.equal(before[name], value) for name, value in policy.state_dict().items())


# Steps that must not be taken


def test_a_step_that_is_not_finite_is_not_applied_but_counted_and_reported():
    def broken(outputs, mini, bounds):
        return outputs.logprobs * math.nan

    policy = ToyPolicy()
    learner = learner_of(policy)
    batch = collate(make_groups())
    learner.update(batch, Algorithm(), CONTEXT)
    before, state = copy.deepcopy(policy.state_dict()), copy.deepcopy(learner.state_dict())
    numbers = learner.update(batch, Algorithm(surrogate=broken), CONTEXT)
    assert (numbers["learner/skipped_updates"], numbers["learner/updates"]) == (1, 0)
    assert all(math.isfinite(value) for value in numbers.values())
    assert all(torch.equal(before[name], value) for name, value in policy.state_dict().items())
    assert learner.skipped_updates == 1
    for old, new in zip(state["optimizers"], learner.state_dict()["optimizers"], strict=True):
        torch.testing.assert_close(new["state"], old["state"], rtol=0, atol=0)


def test_an_infinite_gradient_of_a_finite_loss_is_not_applied():
    def steep(outputs, mini, bounds):
        # 0 with slope infinity, at the sampled tokens
        return (outputs.logprobs - outputs.logprobs.detach()).abs().sqrt()

    policy = ToyPolicy()
    before = copy.deepcopy(policy.state_dict())
    numbers = learner_of(policy).update(collate(make_groups()), Algorithm(surrogate=steep), CONTEXT)
    assert numbers["learner/skipped_updates"] == 1
    assert all(torch.equal(before[name], value) for name, value in policy.state_dict().items())


# Resuming


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_learner_continues_bit_by_bit(optimizer, tmp_path):
    settings = {"optimizer": optimizer, "mini_batches": 2, "warmup_steps": 3, "schedule": "cosine"}
    policy = ToyPolicy()
    learner = learner_of(policy, **settings)
    batches = [collate(make_groups(seed)) for seed in range(4)]
    for step in range(2):
        learner.update(batches[step], FULL, Context(step, 4))
    torch.save((policy.state_dict(), learner.state_dict()), tmp_path / "state.pt")
    expected = [learner.update(batches[step], FULL, Context(step, 4)) for step in (2, 3)]

    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = ToyPolicy(seed=9)
    resumed.load_state_dict(weights)
    other = learner_of(resumed, **settings)
    other.load_state_dict(state)
    assert [other.update(batches[step], FULL, Context(step, 4)) for step in (2, 3)] == expected
    for name, value in policy.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value)


def test_the_reference_is_stored_apart_from_the_state():
    first = learner_of(reference=ToyPolicy(seed=1))
    second = learner_of(reference=ToyPolicy(seed=2))
    assert first.state_dict()["reference"] == {}
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.reference.mix, ToyPolicy(seed=2).mix)
    with pytest.raises(CheckpointError, match="has a reference"):
        learner_of().load_state_dict(first.state_dict())


def test_a_state_that_does_not_fit_is_refused():
    state = learner_of().state_dict()
    with pytest.raises(CheckpointError, match=r"\('muon', False, False\), wanted \('adamw', False, False\)"):
        learner_of(optimizer="adamw").load_state_dict(state)
    with pytest.raises(CheckpointError, match="does not fit this policy"):
        learner_of().load_state_dict(state | {"optimizers": state["optimizers"][:1]})


def test_the_learning_rate_follows_the_step_not_the_number_of_calls():
    batch = collate(make_groups())
    learner = learner_of(learning_rate=0.01, warmup_steps=0, schedule="cosine", mini_batches=2)
    # Steps 0 and 9 of 10, two updates each: places 0, 1 and 18, 19 of 20 on the cosine.
    first = learner.update(batch, FULL, Context(0, 10))["learner/learning_rate"]
    last = learner.update(batch, FULL, Context(9, 10))["learner/learning_rate"]
    curve = partial(lambda place: 0.1 + 0.9 * (1 + math.cos(math.pi * place / 19)) / 2)
    assert first == pytest.approx(0.01 * (curve(0) + curve(1)) / 2)
    assert last == pytest.approx(0.01 * (curve(18) + curve(19)) / 2)
