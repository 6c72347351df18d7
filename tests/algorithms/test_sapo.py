"""SAPO: a gate that closes smoothly."""

from collections.abc import Callable
from typing import Any

import pytest
from loss_rows import loss_and_slopes, with_ratios

from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.methods.sapo import SAPO
from agentrl.algorithms.recipe import build_recipe
from agentrl.errors import ConfigError

Build = Callable[..., Algorithm]
TOKEN_MEAN = build_recipe("grpo", {"aggregation": "token"})


@pytest.mark.vector("2026:10a")
@pytest.mark.parametrize("probability", [0.4, 0.01])
def test_the_gradient_fades_on_both_sides(build: Build, probability: float) -> None:
    _, _, slopes = loss_and_slopes(build("sapo", base=TOKEN_MEAN), with_ratios(probability))
    wanted = [0.470007, 1, 1.410022, -0.467070, -1, -1.401210]
    assert slopes == pytest.approx(wanted, abs=5e-7)


def test_each_sign_has_its_own_gate_and_a_flat_one_clips_nothing() -> None:
    flat = SAPO(base=TOKEN_MEAN, tau_positive=1e-6, tau_negative=1e-6).build()
    _, _, slopes = loss_and_slopes(flat, with_ratios(0.1, (0.2, 3.0)))
    assert slopes == pytest.approx([0.2, 3, -0.2, -3], abs=1e-9)
    steep = SAPO(base=TOKEN_MEAN, tau_positive=1e-6, tau_negative=50.0).build()
    _, _, slopes = loss_and_slopes(steep, with_ratios(0.1, (0.2, 3.0)))
    assert slopes == pytest.approx([0.2, 3, 0, 0], abs=1e-9)


def test_no_ratio_is_clipped() -> None:
    algorithm = SAPO().build()
    assert algorithm.clip is None
    objective, _, _ = loss_and_slopes(algorithm, with_ratios(0.1))
    assert objective.bounds is None


@pytest.mark.parametrize(
    ("name", "base", "reason"),
    [
        ("sapo", "gspo", "its gate is that of a single token"),
        ("sapo", "cispo", "'cispo' has no clipped ratio"),
        ("gspo", "sapo", "'sapo' has no clipped ratio"),
        ("bapo", "sapo", "'sapo' has no clipped ratio"),
        ("sapo", "bapo", "it would replace the bounds"),
    ],
)
def test_two_losses_are_refused(name: str, base: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        build_recipe(name, {"base": {"name": base}})
