"""RAGEN-2's filter of groups by the variance of their returns."""

from collections.abc import Callable
from typing import Any

import pytest
from played import play

from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.hooks import Context
from agentrl.algorithms.methods.ragen import dispersion
from agentrl.algorithms.recipe import build_recipe
from agentrl.data import Group
from agentrl.errors import ConfigError

Build = Callable[..., Algorithm]


def group(successes: int, size: int = 8) -> Group:
    return Group(f"t{successes}", tuple(play(f"e{n}", "x", float(n < successes)) for n in range(size)))


GROUPS = [group(count) for count in (1, 2, 4, 8)]


@pytest.mark.vector("2026:5b")
def test_the_dispersion_of_returns() -> None:
    found = [dispersion(each, "variance") for each in GROUPS]
    assert found == pytest.approx([0.125, 0.214286, 0.285714, 0], abs=5e-7)
    found = [dispersion(each, "std") for each in GROUPS]
    assert found == pytest.approx([0.353553, 0.462910, 0.534522, 0], abs=5e-7)


@pytest.mark.vector("2026:5b")
@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"share": 0.8, "keep_equal": True}, ["t2", "t4"]),
        ({"share": 0.8, "keep_equal": True, "measure": "std"}, ["t1", "t2", "t4"]),
    ],
)
def test_the_most_varied_groups_are_kept(build: Build, settings: dict[str, Any], wanted: list[str]) -> None:
    chosen = build("ragen", **settings).select(GROUPS, Context())
    assert [each.task for each in chosen] == wanted


@pytest.mark.vector("2026:5b")
def test_by_softmax_nearly_the_share_of_groups_is_kept() -> None:
    for share, wanted in ((0.9, ["t1", "t2", "t4", "t8"]), (0.5, ["t2", "t4"])):
        algorithm = build_recipe("ragen", {"share": share, "mode": "softmax", "keep_equal": True}).build()
        assert [each.task for each in algorithm.select(GROUPS, Context())] == wanted


def test_a_share_of_one_keeps_every_group_or_every_one_that_differs() -> None:
    for keep_equal, wanted in ((True, GROUPS), (False, GROUPS[:3])):
        algorithm = build_recipe("ragen", {"share": 1.0, "keep_equal": keep_equal}).build()
        assert list(algorithm.select(GROUPS, Context())) == wanted


def test_groups_without_any_variance_are_all_dropped() -> None:
    algorithm = build_recipe("ragen").build()
    assert algorithm.select([group(0), group(8), group(1, size=1)], Context()) == []
    assert algorithm.compares


def test_two_filters_are_refused() -> None:
    with pytest.raises(ConfigError, match="'dapo' draws tasks until enough groups differ"):
        build_recipe("ragen", {"base": {"name": "dapo"}})
    for name in ("dapo", "sampo"):
        with pytest.raises(ConfigError, match=f"{name}: its base filters groups by their variance already"):
            build_recipe(name, {"base": {"name": "ragen"}})
