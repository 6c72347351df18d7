"""CISPO: a clipped ratio weighs the log-probability."""

import math
from collections.abc import Callable
from typing import Any

import pytest
from loss_rows import loss_and_slopes, rows, with_ratios

from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.importance import with_importance_correction
from agentrl.algorithms.methods.cispo import CISPO
from agentrl.algorithms.recipe import build_recipe
from agentrl.errors import ConfigError

Build = Callable[..., Algorithm]
TOKEN_MEAN = build_recipe("grpo", {"aggregation": "token"})


@pytest.mark.vector("2026:10a")
@pytest.mark.parametrize("probability", [0.4, 0.01])
def test_no_token_loses_its_gradient(build: Build, probability: float) -> None:
    algorithm = build("cispo", base=TOKEN_MEAN)
    _, _, slopes = loss_and_slopes(algorithm, with_ratios(probability))
    assert slopes == pytest.approx([0.5, 1, 1.28, -0.5, -1, -1.28], abs=1e-12)


@pytest.mark.vector("2026:10a")
def test_the_table_s_row_of_its_base() -> None:
    _, _, slopes = loss_and_slopes(
        build_recipe("grpo", {"aggregation": "token", "clip_high": 0.28}).build(), with_ratios(0.4)
    )
    assert slopes == pytest.approx([0.5, 1, 0, 0, -1, -1.5], abs=1e-12)


def test_the_loss_is_the_weighted_log_probability_and_the_clipped_tokens_are_logged() -> None:
    mini = with_ratios(0.4, (0.5, 2.0), 1.0)
    algorithm = CISPO(base=TOKEN_MEAN, clip_low=0.2).build()
    objective, loss, slopes = loss_and_slopes(algorithm, mini)
    assert slopes == pytest.approx([0.8, 1.28], abs=1e-12)
    assert loss == pytest.approx(-(0.8 * math.log(0.2) + 1.28 * math.log(0.8)) / 2, abs=1e-12)
    assert objective.metrics()["bound_upper"] == 1.28


def test_the_anchor_may_be_the_probability_at_which_the_engine_sampled() -> None:
    mini = rows([[-0.7, -0.7]], [[-0.7, -0.7]], [[1.0, 1.0]], sampled=[[-0.7 - math.log(0.9), -1.7]])
    for anchor, wanted in (("old", [1.0, 1.0]), ("sampler", [0.9, 1.28])):
        algorithm = build_recipe("cispo", {"base": TOKEN_MEAN, "anchor": anchor}).build()
        assert loss_and_slopes(algorithm, mini)[2] == pytest.approx(wanted, abs=1e-12)


def test_the_mismatch_is_not_corrected_twice() -> None:
    algorithm = build_recipe("cispo", {"anchor": "sampler"}).build()
    with pytest.raises(ConfigError, match=r"is the importance already, wanted trainer\.importance_cap=null"):
        with_importance_correction(algorithm, 2.0)
    assert with_importance_correction(CISPO().build(), 2.0).weights


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"name": "cispo", "base": {"name": "sapo"}}, "'sapo' has no clipped ratio"),
        ({"name": "cispo", "base": {"name": "behaviour_cloning"}}, "has no clipped ratio"),
        ({"name": "cispo", "base": {"name": "gspo"}}, "its weight is that of a single token"),
        ({"name": "gspo", "base": {"name": "cispo"}}, "its weight is that of a single token"),
        ({"name": "bapo", "base": {"name": "cispo"}}, "for a loss that drops the tokens outside"),
        ({"name": "kl_cov", "base": {"name": "cispo"}}, "'cispo' has no clipped ratio"),
        ({"name": "aepo", "base": {"name": "cispo"}}, "does not have the clipped loss"),
    ],
)
def test_two_losses_are_refused(settings: dict[str, Any], reason: str) -> None:
    name = settings.pop("name")
    with pytest.raises(ConfigError, match=reason):
        build_recipe(name, settings)
