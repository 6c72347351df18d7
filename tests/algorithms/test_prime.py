"""PRIME: process rewards of a trained model, their advantages, and which groups are learned from."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from token_examples import at_tokens, in_order, played, scored

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import Algorithm, check_requirements
from agentrl.algorithms.credit import compute_advantages
from agentrl.algorithms.hooks import Context, MiniBatch
from agentrl.algorithms.recipe import build_recipe
from agentrl.algorithms.reward_model import RewardModel, outcome_metrics
from agentrl.data import Group, StopReason
from agentrl.data.batch import Batch
from agentrl.errors import ConfigError, RequirementError

Build = Callable[..., Algorithm]
GAPS = [0.5, -0.2, 0.1, 0.3, -0.4, 0.1, -0.3]
SUCCESSES = [True, False]
RETURNS = [14.9995, 2.500125, 7.499875, 5, -12.499625, -2.500125, -5]
WHITENED = [1.508366, 0.119103, 0.674808, 0.396956, -1.548067, -0.436657, -0.714510]


def won(groups: Sequence[Group], successes: Sequence[bool]) -> list[Group]:
    """The groups, whose episodes succeed or not in the order of `played`."""
    return [
        replace(
            group,
            episodes=tuple(
                replace(episode, success=successes[int(episode.id[1:])]) for episode in group.episodes
            ),
        )
        for group in groups
    ]


def example(
    turns: Sequence[Sequence[int]] = ((4,), (3,)),
    layout: str = "trajectory",
    gaps: Sequence[float] = GAPS,
    **settings: Any,
) -> Batch:
    """Episodes with the log-probabilities under the reference and, by `gaps` more, the reward model."""
    groups = won(played(turns, **({"returns": [1.0, 0.0]} | settings)), SUCCESSES)
    reference = [-1.0 - 0.1 * index for index in range(len(gaps))]
    batch = scored(groups, reference=reference, layout=layout)
    own = [at + gap for at, gap in zip(reference, gaps, strict=True)]
    return replace(batch, reward_logprobs=at_tokens(batch, own))


@pytest.mark.vector("zoo:1.14a")
@pytest.mark.parametrize("layout", ["trajectory", "turn"])
@pytest.mark.parametrize("turns", [((4,), (3,)), ((1, 3), (2, 1))])
def test_returns_of_outcome_and_process_and_the_advantages(
    build: Build, turns: Sequence[Sequence[int]], layout: str
) -> None:
    batch = example(turns, layout)
    plain = compute_advantages(build("prime", whiten=False), batch, Context())
    assert in_order(batch, plain) == pytest.approx(RETURNS, abs=1e-6)
    whitened = compute_advantages(build("prime"), batch, Context())
    assert in_order(batch, whitened) == pytest.approx(WHITENED, abs=1e-6)


@pytest.mark.vector("zoo:1.14b")
def test_the_steps_on_the_way() -> None:
    gaps = torch.tensor([GAPS[:4], [*GAPS[4:], 0.0]], dtype=torch.float64)
    valid = torch.tensor([[True] * 4, [True] * 3 + [False]])
    rewards = functional.implicit_rewards(gaps, valid, beta=0.05)
    assert rewards.tolist() == [
        pytest.approx([0.025, -0.01, 0.005, 0.0]),
        pytest.approx([-0.02, 0.005, 0.0, 0.0]),
    ]
    normed = functional.over_largest_return(rewards, valid)
    assert normed[0].tolist() == pytest.approx([1.249938, -0.499975, 0.249988, 0], abs=1e-6)
    assert normed[1].tolist() == pytest.approx([-0.99995, 0.249988, 0, 0], abs=1e-6)
    compared = 5 * functional.leave_one_out_rewards(normed, valid, torch.tensor([0, 0]))
    assert compared[0].tolist() == pytest.approx([12.499375, -4.99975, 2.499875, 0], abs=1e-6)
    assert compared[1].tolist() == pytest.approx([-9.9995, 2.499875, 0, 0], abs=1e-6)


@pytest.mark.vector("zoo:1.14c")
@pytest.mark.parametrize("layout", ["trajectory", "turn"])
def test_the_loss_of_the_reward_model(build: Build, layout: str) -> None:
    model, batch = build("prime").reward_model, example(((1, 3), (2, 1)), layout)
    assert model is not None
    assert batch.reward_logprobs is not None
    assert float(model.loss(batch.reward_logprobs, batch, Context())) == pytest.approx(0.677030, abs=5e-7)


def test_a_turn_gets_the_sum_of_its_tokens_at_its_end() -> None:
    """Sums .015, .005 and -.02, .005; the rewards from there on are at most .02; each episode has two."""
    batch = example(((2, 2), (1, 2)))
    settings = {"unit": "turn", "whiten": False, "outcome_coefficient": 0.0, "process_coefficient": 1.0}
    found = in_order(batch, compute_advantages(build_recipe("prime", settings).build(), batch, Context()))
    one, two = [0.015 / 0.020001, 0.005 / 0.020001], [-0.02 / 0.020001, 0.005 / 0.020001]
    shared = (sum(one) + sum(two)) / 2
    first, second = ([2 * value - shared for value in each] for each in (one, two))
    wanted = [sum(first)] * 2 + [first[1]] * 2 + [sum(second)] + [second[1]] * 2
    assert found == pytest.approx(wanted, abs=1e-9)


def test_with_no_weight_of_the_process_rewards_it_is_rloo() -> None:
    batch = example(((4,), (3,)), returns=[0.7, 0.1])
    settings = {"outcome_coefficient": 1.0, "whiten": False}
    rloo = compute_advantages(build_recipe("rloo").build(), batch, Context())
    for process in (0.0, 1e-30):
        algorithm = build_recipe("prime", settings | {"process_coefficient": process}).build()
        assert (algorithm.reward_model is None) is (process == 0)
        found = compute_advantages(algorithm, batch, Context())
        torch.testing.assert_close(found, rloo, rtol=0, atol=1e-12)


def test_an_episode_alone_in_its_group_and_one_without_decisions_get_nothing() -> None:
    alone = example(groups=[0, 1])
    algorithm = build_recipe("prime", {}).build()
    assert not bool(compute_advantages(algorithm, alone, Context()).any())
    rewards = torch.tensor([[1.0, 0.5], [0.0, 0.0], [0.5, 0.0]])
    valid = torch.tensor([[True, True], [False, False], [True, False]])
    found = functional.leave_one_out_rewards(rewards, valid, torch.zeros(3, dtype=torch.int64))
    assert found.tolist() == [[0.75, -0.25], [0.0, 0.0], [-0.25, 0.0]]  # n is 2, the means .75 and .5
    empty = functional.over_largest_return(torch.zeros(0, 0), torch.zeros(0, 0, dtype=torch.bool))
    assert empty.shape == (0, 0)
    assert float(functional.outcome_cross_entropy(torch.zeros(0), torch.zeros(0, dtype=torch.bool))) == 0.0


def test_equal_rewards_give_no_advantage() -> None:
    batch = example(gaps=[0.0] * 7, returns=[1.0, 1.0])
    assert not bool(compute_advantages(build_recipe("prime").build(), batch, Context()).any())


def test_how_well_the_model_judges_is_measured() -> None:
    batch = example()
    found = outcome_metrics(MiniBatch(batch, torch.zeros(batch.tokens.shape)), Context(), beta=0.05)
    assert found["reward_model/accuracy"] == 1.0
    assert found["reward_model/margin"] == pytest.approx(0.035 + 0.03)


@pytest.mark.parametrize(
    ("successes", "kept"),
    [([1, 0, 0, 0, 0], True), ([1, 1, 1, 1, 0], True), ([0] * 5, False), ([1] * 5, False)],
)
def test_groups_of_the_wanted_accuracy_are_kept(successes: list[int], kept: bool) -> None:
    groups = won(played([[1]] * 5), [bool(value) for value in successes])
    select = build_recipe("prime").build().select
    assert list(select(groups, Context())) == (groups if kept else [])


def test_groups_with_a_truncated_episode_are_not_and_the_limit_of_turns_truncates_nothing() -> None:
    (group,) = won(played([[1]] * 2), [True, False])
    select = build_recipe("prime").build().select

    def with_second(**changes: Any) -> list[Group]:
        first, second = group.episodes
        return [replace(group, episodes=(first, replace(second, **changes)))]

    cut = (replace(group.episodes[1].turns[0], finish="length"),)
    assert select(with_second(stop=StopReason.CONTEXT_LIMIT), Context()) == []
    assert select(with_second(turns=cut), Context()) == []
    assert len(select(with_second(stop=StopReason.TRUNCATED), Context())) == 1
    # An aborted episode is neither a success nor a failure.
    assert select(with_second(stop=StopReason.ENV_ERROR), Context()) == []
    assert select([replace(group, episodes=())], Context()) == []


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"accuracy is \[0.8, 0.2\], wanted the lower bound first"):
        build_recipe("prime", {"accuracy": [0.8, 0.2]})
    with pytest.raises(ConfigError, match="max_rounds is 2, and accuracy=null keeps all groups"):
        build_recipe("prime", {"accuracy": None, "max_rounds": 2})


def test_a_learner_without_a_reward_model_is_refused_before_the_first_rollout() -> None:
    provided = {"old_logprobs", "entropy", "entropy:grad", "current", "reference"}
    with pytest.raises(RequirementError, match=r"advantage requires reward_model .*not with learner.lora"):
        check_requirements(build_recipe("prime").build(), provided)
    own = Algorithm(reward_model=RewardModel(lambda logprobs, batch, context: logprobs.sum(), 1e-3, 1.0))
    with pytest.raises(RequirementError, match="reward_model requires reward_model"):
        check_requirements(own, provided)
    check_requirements(own, provided | {"reward_model"})
