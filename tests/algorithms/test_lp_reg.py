"""Lp-Reg: which unlikely tokens are held near the filtered policy, and by how much."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from token_examples import DOUBLE, in_order, loss_of, mini_batch, played, scored

from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.hooks import Context, MiniBatch
from agentrl.algorithms.recipe import build_recipe
from agentrl.algorithms.token_statistics import in_minp, log_minp_mass
from agentrl.errors import ConfigError
from agentrl.learn.objective import build_objective

Build = Callable[..., Algorithm]
LOGITS = torch.tensor([3.0, 2.0, 0.5, -1.0, -3.0], dtype=DOUBLE)
TOKEN_MEAN = build_recipe("grpo", {"aggregation": "token"})


def example(
    tokens: list[int], lengths: list[list[int]], moved: float = 0.0, layout: str = "turn"
) -> MiniBatch:
    """These tokens of the published distribution with advantage -1, after their log-probability moved."""
    taken = torch.tensor(tokens)
    logits = LOGITS.expand(len(tokens), 5)
    old = logits.log_softmax(-1)[torch.arange(len(tokens)), taken]
    kept = {"log_z_minp:0.02": log_minp_mass, "in_minp:0.02": in_minp}
    extras = {name: statistic(logits, taken, 0.02) for name, statistic in kept.items()}
    batch = scored(played(lengths), logprobs=old, extras=extras, layout=layout)
    return mini_batch(batch, -1.0, logprobs=old + moved)


@pytest.mark.vector("zoo:1.22a")
@pytest.mark.parametrize("layout", ["trajectory", "turn"])
@pytest.mark.parametrize("lengths", [[[3]], [[1], [2]], [[1, 1, 1]]])
def test_a_token_that_the_filter_keeps_is_held_and_noise_is_not(
    build: Build, lengths: list[list[int]], layout: str
) -> None:
    mini = example([2, 3, 4], lengths, layout=layout)
    objective = build_objective(mini, build("lp_reg", base=TOKEN_MEAN, share=1.0), Context())
    numbers, outputs = loss_of(objective)
    assert 3 * numbers.get("term/lp_reg", 0.0) == pytest.approx(1.0186e-4, abs=5e-9)
    assert numbers["loss"] == pytest.approx(1 + 1.0186e-4 / 3, abs=2e-9)
    assert outputs.logprobs.grad is not None
    slopes = in_order(mini.batch, outputs.logprobs.grad)
    # A ratio of 1 pulls down by 1; the penalty lets the kept token fall a little less.
    assert [3 * slope - 1 for slope in slopes] == pytest.approx([-0.014341, 0.0, 0.0], abs=5e-7)


def test_only_the_tokens_of_lowest_probability_and_negative_advantage_are_held() -> None:
    mini = example([0, 1, 2, 2], [[4]])
    advantages = torch.where(mini.batch.tokens == 4, 1.0, mini.advantages)
    algorithm = build_recipe("lp_reg", {"base": {"name": "grpo"}, "share": 0.4}).build()
    objective = build_objective(replace(mini, advantages=advantages), algorithm, Context())
    ((_, factors),) = objective.terms
    assert in_order(mini.batch, factors > 0) == [False, False, True, False]


@pytest.mark.parametrize("dual", [None, 2.0])
def test_a_held_token_is_clipped_neither_below_nor_by_the_dual_clip(dual: float | None) -> None:
    base = {"name": "grpo", "aggregation": "token", "dual_clip": dual}
    algorithm = build_recipe("lp_reg", {"base": base, "share": 1.0}).build()
    mini = example([2, 4], [[2]], moved=-1.0)
    numbers, outputs = loss_of(build_objective(mini, algorithm, Context()))
    assert outputs.logprobs.grad is not None
    held, noise = in_order(mini.batch, outputs.logprobs.grad)
    distance = float(log_minp_mass(LOGITS[None], torch.tensor([2]), 0.02)[0])
    ratio = torch.tensor(-1.0, dtype=DOUBLE).exp()
    assert 2 * held == pytest.approx(float(ratio + 1 - torch.tensor(1.0 - distance, dtype=DOUBLE).exp()))
    assert noise == 0.0
    assert numbers["clip_ratio"] == 0.5
    # Above: the dual clip has no effect on a selected token, and selected ones have fallen by definition.
    bounds = build_objective(mini, algorithm, Context()).bounds
    assert bounds is not None
    assert (bounds.dual is None) == (dual is None)


def test_the_released_code_holds_no_single_candidate() -> None:
    mini = example([2], [[1]])
    for preset, count in (("ours", 1), ("released", 0)):
        algorithm = build_recipe("lp_reg", {"preset": preset}).build()
        _, factors = build_objective(mini, algorithm, Context()).terms[-1]
        assert int((factors > 0).sum()) == count


def test_bounds_that_another_method_would_replace_are_refused() -> None:
    with pytest.raises(ConfigError, match="it would replace the bounds that base 'lp_reg' finds"):
        build_recipe("bapo", {"base": {"name": "lp_reg"}})
