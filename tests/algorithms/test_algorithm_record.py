from dataclasses import replace
from functools import partial

import pytest
import torch

from agentrl.algorithms.algorithm import Algorithm, check_requirements, drop_equal_returns
from agentrl.algorithms.credit import compute_advantages, prepare
from agentrl.algorithms.hooks import Context, Term, excludes, require_tensor, requirements, requires, trait
from agentrl.algorithms.recipe import build_recipe
from agentrl.data import Episode, Group, StopReason, Turn
from agentrl.errors import ConfigError, RequirementError

CONTEXT = Context()
TURN = Turn("o", "a", prompt_ids=(1,), action_ids=(2,), new_sequence=True)


def episode(
    reward: float, *, id: str = "e", stop: StopReason = StopReason.TERMINATED, valid: bool = True
) -> Episode:
    return Episode(id, "env", "t", 0, (replace(TURN, reward=reward, valid=valid),), stop)


def group(*rewards: float) -> Group:
    return Group("t", tuple(episode(reward) for reward in rewards))


@requires("entropy", "topk:10")
def hungry(advantages, batch, context, factor=1.0):
    return advantages * factor


def test_the_default_record_is_group_relative_with_degenerate_groups_left_out():
    batch = prepare(Algorithm(), [group(1, 0), group(1, 1), group(0.5)], CONTEXT)
    assert batch.returns.tolist() == [1, 0]
    advantages = compute_advantages(Algorithm(), batch, CONTEXT)
    # std of (1, 0) is sqrt(1/2): .5 / (.70710678 + 1e-6) = .70710578
    assert advantages[:, 0].tolist() == [0, 0]
    assert advantages[:, 1].tolist() == pytest.approx([0.70710578, -0.70710578], abs=1e-7)


def test_an_aborted_episode_makes_no_difference_in_its_group():
    aborted = episode(0.0, stop=StopReason.ENV_ERROR)
    assert drop_equal_returns([Group("t", (episode(1), episode(1), aborted))], CONTEXT) == []
    kept = drop_equal_returns([Group("t", (episode(1), episode(0), aborted))], CONTEXT)
    assert len(kept) == 1


def test_returns_that_differ_by_rounding_are_the_same_outcome():
    assert drop_equal_returns([group(0.1 + 0.2, 0.3)], CONTEXT) == []


def test_groups_are_selected_by_the_environments_rewards_and_learned_from_with_the_shaped_ones():
    shaped = Algorithm(shape_reward=(lambda episode, context: [0.0 for _ in episode.turns],))
    batch = prepare(shaped, [group(1, 0)], CONTEXT)
    assert batch.returns.tolist() == [0, 0]


def test_reward_shapers_see_what_the_one_before_left():
    double = lambda episode, context: [2 * turn.reward for turn in episode.turns]  # noqa: E731
    plus_one = lambda episode, context: [turn.reward + 1 for turn in episode.turns]  # noqa: E731
    batch = prepare(Algorithm(shape_reward=(double, plus_one)), [group(1, 0)], CONTEXT)
    assert batch.returns.tolist() == [3, 1]


def test_a_shaper_that_forgets_a_turn_is_refused():
    with pytest.raises(ValueError, match="0 rewards for the 1 turns of episode 'e'"):
        prepare(Algorithm(shape_reward=(lambda episode, context: [],)), [group(1, 0)], CONTEXT)


def test_transforms_run_in_order_and_only_decisions_keep_an_advantage():
    add = lambda advantages, batch, context: advantages + 1  # noqa: E731
    square = lambda advantages, batch, context: advantages**2  # noqa: E731
    algorithm = Algorithm(
        advantage=lambda batch, context: batch.action_mask.float(), transforms=(add, square)
    )
    batch = prepare(algorithm, [group(1, 0)], CONTEXT)
    assert compute_advantages(algorithm, batch, CONTEXT).tolist() == [[0, 4], [0, 4]]


def test_a_hook_of_another_shape_is_refused_with_its_slot():
    algorithm = Algorithm(transforms=(lambda advantages, batch, context: advantages[:, 0],))
    batch = prepare(algorithm, [group(1, 0)], CONTEXT)
    with pytest.raises(ValueError, match=r"algorithm.transforms returned shape \(2,\), wanted \(2, 2\)"):
        compute_advantages(algorithm, batch, CONTEXT)


def test_an_algorithm_requires_what_any_of_its_components_does():
    @requires("reference")
    def divergence(outputs, mini, context):
        return outputs.logprobs

    algorithm = Algorithm(transforms=(partial(hungry, factor=2.0),), terms=(Term("kl", divergence, 0.1),))
    assert requirements(partial(hungry)) == {"entropy", "topk:10"}
    assert algorithm.requires == {"entropy", "topk:10", "reference", "old_logprobs"}
    assert algorithm.reads_scores
    assert not Algorithm().reads_scores


def test_a_missing_requirement_is_refused_with_the_slot_that_has_it():
    algorithm = Algorithm(transforms=(hungry,))
    with pytest.raises(
        RequirementError, match=r"transforms requires topk:10; this run provides entropy, old_logprobs"
    ):
        check_requirements(algorithm, {"entropy", "old_logprobs"})
    check_requirements(algorithm, {"entropy", "old_logprobs", "topk:10"})


def test_components_that_contradict_each_other_are_refused_with_the_reason():
    @trait("sequence ratio")
    def whole(outputs, mini):
        return outputs.logprobs

    @excludes(sequence_ratio="one bounds tokens, the other sequences")
    def surrogate(outputs, mini, bounds, scale=1.0):
        return outputs.logprobs

    Algorithm(ratio=whole)
    Algorithm(surrogate=surrogate)
    with pytest.raises(
        ConfigError, match=r"surrogate cannot be combined with ratio: one bounds tokens.*surrogate, .*whole\)"
    ):
        Algorithm(ratio=whole, surrogate=partial(surrogate, scale=2.0))


def test_what_selects_the_tokens_of_a_term_is_a_component_too():
    @requires("current", "entropy")
    @excludes(sequence_ratio="it selects single tokens")
    def likely(mini, context, share=0.5):
        return mini.batch.action_mask

    @trait("sequence ratio")
    def whole(outputs, mini):
        return outputs.logprobs

    term = Term("kl", lambda outputs, mini, context: outputs.logprobs, 0.1, where=partial(likely, share=0.1))
    algorithm = Algorithm(terms=(term,))
    assert dict(algorithm.declared())["terms/kl"] == {"current", "entropy"}
    assert {"current", "entropy"} <= algorithm.requires
    with pytest.raises(RequirementError, match="terms/kl requires current, entropy; this run"):
        check_requirements(algorithm, {"old_logprobs"})
    with pytest.raises(ConfigError, match=r"terms cannot be combined with ratio: it selects.*likely"):
        Algorithm(terms=(term,), ratio=whole)


def test_reading_a_field_that_nothing_filled_is_refused():
    with pytest.raises(RequirementError, match="old_entropies is empty"):
        require_tensor(None, "old_entropies")
    assert require_tensor(torch.ones(1), "old_entropies").item() == 1


@pytest.mark.parametrize("name", ["aepo", "fr3e", "cure", "ettrl"])
def test_a_growth_that_goes_by_entropies_needs_an_engine_that_records_them(name):
    algorithm = build_recipe(name).build()
    with pytest.raises(RequirementError, match="rollout requires rollout:entropy"):
        check_requirements(algorithm, {"old_logprobs", "entropy"})
    check_requirements(algorithm, {"old_logprobs", "entropy", "rollout:entropy"})
