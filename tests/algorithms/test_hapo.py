"""HAPO: levels of entropy, and what follows from them."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from token_examples import in_order, mini_batch, played, scored

from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.credit import compute_advantages
from agentrl.algorithms.hooks import Context, MiniBatch, ReplyState, TokenTemperature
from agentrl.algorithms.named_features import with_features
from agentrl.algorithms.recipe import build_recipe
from agentrl.learn.objective import Objective, build_objective

Build = Callable[..., Algorithm]
ENTROPIES = [0.01, 0.05, 0.2, 1.5, 2.0]
ADVANTAGES = [1.0, 1.0, -1.0, 1.0, -1.0]
RATIOS = [1.0, 1.2, 0.95, 1.05, 1.15]
INTENDED = [-1, -0.678796, -0.402125, 0, 1]
TOKEN_MEAN = build_recipe("grpo", {"aggregation": "token"})


def objective_of(algorithm: Algorithm, lengths: list[list[int]], layout: str = "trajectory") -> Objective:
    ratios = torch.tensor(RATIOS, dtype=torch.float64)
    batch = scored(played(lengths), logprobs=(-ratios.log()).tolist(), entropies=ENTROPIES, layout=layout)
    batch = with_features(batch, algorithm.requires)
    return build_objective(mini_batch(batch, ADVANTAGES, logprobs=[0.0] * 5), algorithm, Context())


def bounds_of(objective: Objective) -> tuple[list[float], list[float]]:
    """Half the widths of the bounds of each token."""
    assert objective.bounds is not None
    shape = objective.mask.shape
    lower, upper = (
        torch.as_tensor(bound, dtype=torch.float64).expand(shape)
        for bound in (objective.bounds.lower, objective.bounds.upper)
    )
    batch = objective.mini.batch
    return in_order(batch, 1 - lower), in_order(batch, upper - 1)


@pytest.mark.vector("zoo:1.12a")
@pytest.mark.parametrize("layout", ["trajectory", "turn"])
@pytest.mark.parametrize("lengths", [[[5]], [[2, 1], [2]]])
def test_bounds_and_advantages_follow_the_level(build: Build, lengths: list[list[int]], layout: str) -> None:
    objective = objective_of(build("hapo", base=TOKEN_MEAN), lengths, layout)
    low, high = bounds_of(objective)
    assert low == pytest.approx([0.4, 0.335759, 0.280425, 0.2, 0.2], abs=5e-7)
    assert high == pytest.approx([0.2, 0.2, 0.2, 0.2, 0.4], abs=5e-7)
    changed = in_order(objective.mini.batch, objective.weights * objective.mini.advantages)
    assert changed == pytest.approx([0, 1, -0.597875, 1, -1], abs=5e-7)


@pytest.mark.vector("zoo:1.12b")
def test_the_released_code_raises_certain_tokens_instead(build: Build) -> None:
    objective = objective_of(build("hapo", base=TOKEN_MEAN, sign="released"), [[5]])
    changed = in_order(objective.mini.batch, objective.weights * objective.mini.advantages)
    assert changed == pytest.approx([1, 1.678796, -1, 1, -1], abs=5e-7)
    low, high = bounds_of(objective)
    assert low == pytest.approx([0.2] * 5)
    assert high == pytest.approx([0.4, 0.335759, 0.280425, 0.2, 0.4], abs=5e-7)


def measured(algorithm: Algorithm) -> Context:
    """The context after a step with the entropies of the example."""
    batch = with_features(scored(played([[5]]), logprobs=[-1.0] * 5, entropies=ENTROPIES), algorithm.requires)
    numbers: dict[str, float] = {}
    for diagnostic in algorithm.diagnostics:
        numbers |= diagnostic(MiniBatch(batch, torch.zeros(batch.tokens.shape)), Context())
    return Context(1, history={f"train/algorithm/{name}": [value] for name, value in numbers.items()})


@pytest.mark.vector("zoo:1.12c")
@pytest.mark.parametrize(
    ("sign", "wanted"),
    [
        ("intended", [0.95, 0.966060, 0.979894, 1, 1.05]),
        ("released", [1.05, 1.033940, 1.020106, 1, 1.05]),
    ],
)
def test_the_temperature_follows_the_level_on_the_scale_of_the_step_before(
    build: Build, sign: str, wanted: list[float]
) -> None:
    algorithm = build("hapo", base=TOKEN_MEAN, temperature_change=0.05, sign=sign)
    choose = algorithm.rollout.reply_temperature
    assert choose is not None
    state = ReplyState("t", "e", 0, 0, None, 1.0)
    told = choose(state, measured(algorithm))
    assert isinstance(told, TokenTemperature)
    assert told.first == 1.0
    assert [told.following(entropy) for entropy in ENTROPIES] == pytest.approx(wanted, abs=5e-7)
    first = choose(replace(state, temperature=0.7), Context())
    assert isinstance(first, TokenTemperature)
    assert (first.first, first.following(0.01)) == (0.7, 0.7)


@pytest.mark.vector("zoo:1.12d")
@pytest.mark.parametrize("layout", ["trajectory", "turn"])
def test_returns_are_compared_by_tokens(build: Build, layout: str) -> None:
    batch = scored(
        played([[2], [1, 3], [6]], [1.0, 0.0, 0.0]), logprobs=[-1.0] * 12, entropies=[1.0] * 12, layout=layout
    )
    found = in_order(batch, compute_advantages(build("hapo"), batch, Context()))
    assert found == pytest.approx([2.236062] * 2 + [-0.447212] * 10, abs=5e-7)
    plain = compute_advantages(build_recipe("hapo", {"average": "trajectory"}).build(), batch, Context())
    assert in_order(batch, plain) == pytest.approx([1.154698] * 2 + [-0.577349] * 10, abs=1e-6)


def test_a_group_with_an_outlier_is_compared_by_trajectories() -> None:
    lengths, returns = [[1], [60]], [1.0, 0.0]
    batch = scored(played(lengths, returns), logprobs=[-1.0] * 61, entropies=[1.0] * 61)
    found = in_order(batch, compute_advantages(build_recipe("hapo").build(), batch, Context()))
    assert found == pytest.approx([0.5**0.5] + [-(0.5**0.5)] * 60, abs=2e-6)


def test_equal_entropies_change_nothing() -> None:
    batch = scored(played([[3]]), logprobs=[-0.5] * 3, entropies=[0.4] * 3)
    algorithm = build_recipe("hapo").build()
    mini = mini_batch(with_features(batch, algorithm.requires), 1.0)
    objective = build_objective(mini, algorithm, Context())
    assert in_order(batch, objective.weights) == [1.0] * 3
    for widths in bounds_of(objective):
        assert widths == pytest.approx([0.2] * 3)
