"""TIS and MIS: what a token counts by how learner and sampler disagree."""

import math
from collections.abc import Callable
from typing import Any

import pytest
from loss_rows import loss_and_slopes, rows

from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.hooks import Context, MiniBatch
from agentrl.algorithms.importance import importance_measure, with_importance_correction
from agentrl.algorithms.recipe import build_recipe
from agentrl.errors import ConfigError

Build = Callable[..., Algorithm]
TOKEN_MEAN = build_recipe("grpo", {"aggregation": "token"})
OLD, SAMPLED = [[-1.0, -2.0, -0.5]], [[-1.1, -1.2, -1.5]]
IMPORTANCE = [1.105171, 0.449329, 2.718282]


def example() -> MiniBatch:
    """The three tokens of the published example before an update, so that every slope is A times a weight."""
    return rows(OLD, OLD, [[1.0] * 3], SAMPLED)


@pytest.mark.vector("2026:10c")
def test_the_measures_of_a_sequence() -> None:
    batch = example().batch
    found = {by: importance_measure(batch, level="turn", by=by)[0, 1] for by in ("ratio", "geometric", "k3")}
    assert [float(value) for value in found.values()] == pytest.approx(
        [1.349859, 1.105171, 0.324261], abs=5e-7
    )
    single = importance_measure(batch, level="token", by="ratio")[0, 1:]
    assert single.tolist() == pytest.approx(IMPORTANCE, abs=5e-7)


@pytest.mark.vector("2026:10c")
@pytest.mark.parametrize(
    ("name", "settings", "wanted"),
    [
        ("tis", {}, [1.105171, 0.449329, 2.0]),
        ("tis", {"level": "turn"}, [1.349859] * 3),
        ("tis", {"level": "trajectory", "cap": 1.2}, [1.2] * 3),
        ("tis", {"level": "turn", "geometric": True}, [1.105171] * 3),
        ("mis", {"low": 0.5, "high": 2.0}, [1.105171, 0, 0]),
        ("mis", {}, [1.105171, 0, 2.718282]),
        ("mis", {"preset": "released"}, [1.105171, 0.449329, 0]),
        ("mis", {"level": "turn", "by": "geometric", "low": 0.99, "high": 1.01, "weighted": False}, [0] * 3),
    ],
)
def test_what_the_tokens_count(
    build: Build, name: str, settings: dict[str, Any], wanted: list[float]
) -> None:
    _, _, slopes = loss_and_slopes(build(name, base=TOKEN_MEAN, **settings), example())
    assert slopes == pytest.approx(wanted, abs=5e-7)


@pytest.mark.vector("2026:10c")
@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"by": "ratio", "low": 0.5, "high": 2.0}, True),
        ({"by": "k3", "low": 0.0, "high": 0.01}, False),
        ({"by": "each", "low": 1e-4, "high": 100.0}, True),
        ({"by": "each", "low": 0.5, "high": 100.0}, False),
    ],
)
def test_a_row_is_kept_or_dropped_as_a_whole(settings: dict[str, Any], kept: bool) -> None:
    algorithm = build_recipe(
        "mis", {"level": "turn", "weighted": False, "base": TOKEN_MEAN, **settings}
    ).build()
    _, _, slopes = loss_and_slopes(algorithm, example())
    assert slopes == pytest.approx([float(kept)] * 3, abs=1e-12)


@pytest.mark.parametrize("level", ["token", "turn", "trajectory"])
@pytest.mark.parametrize("name", ["tis", "mis"])
def test_where_the_sampler_is_the_learner_it_is_its_base(name: str, level: str) -> None:
    mini = rows([[-0.9, -2.1, -0.6], [-1.0]], [*OLD, [-1.1]], [[1.0] * 3, [-1.0]])
    found, wanted = (
        loss_and_slopes(recipe.build(), mini)[1:]
        for recipe in (build_recipe(name, {"level": level, "base": TOKEN_MEAN}), TOKEN_MEAN)
    )
    assert found == wanted


def test_dropped_tokens_stay_in_the_count_unless_it_is_renormalised() -> None:
    for renormalise, wanted in ((False, [1, 0, 1]), (True, [1.5, 0, 1.5])):
        settings = {"base": TOKEN_MEAN, "weighted": False, "renormalise": renormalise}
        objective, _, slopes = loss_and_slopes(build_recipe("mis", settings).build(), example())
        assert slopes == pytest.approx(wanted, abs=1e-12)
        assert objective.metrics()["mask_share"] == pytest.approx(2 / 3 if renormalise else 1)


def test_the_log_has_the_shares_of_capped_and_dropped_tokens() -> None:
    for name, key in (("tis", "mismatch/capped"), ("mis", "mismatch/rejected")):
        numbers = build_recipe(name).build().diagnostics[-1](example(), Context())
        assert numbers == {key: pytest.approx(1 / 3)}


def test_a_ratio_beyond_every_bound_is_held() -> None:
    far = rows([[-1.0]], [[-1.0]], [[1.0]], [[-1e4]])
    assert float(importance_measure(far.batch, level="turn", by="ratio")[0, 1]) == pytest.approx(math.exp(20))


@pytest.mark.parametrize("name", ["tis", "mis"])
def test_the_mismatch_is_not_corrected_twice(name: str) -> None:
    with pytest.raises(
        ConfigError, match=r"weighs by importance itself, wanted trainer\.importance_cap=null"
    ):
        with_importance_correction(build_recipe(name).build(), 2.0)
    with pytest.raises(ConfigError, match="the ratio to the sampler is the importance already"):
        build_recipe(name, {"base": {"name": "dppo"}})
    assert with_importance_correction(build_recipe(name).build(), None, default=2.0)


def test_a_weight_may_be_put_over_a_rejection() -> None:
    stack = build_recipe("tis", {"base": build_recipe("mis", {"weighted": False, "base": TOKEN_MEAN})})
    _, _, slopes = loss_and_slopes(stack.build(), example())
    assert slopes == pytest.approx([1.105171, 0, 2.0], abs=5e-7)


def test_bounds_in_the_wrong_order_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"low is 3\.0, wanted at most high, 2\.0"):
        build_recipe("mis", {"low": 3.0, "high": 2.0})
