"""AEM: turns scaled by their certainty."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from played import batch_of, play

from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.hooks import Context, MiniBatch
from agentrl.algorithms.recipe import build_recipe
from agentrl.errors import ConfigError

Build = Callable[..., Algorithm]


def scaled(algorithm: Algorithm, signs: Any, *groups: Any, layout: Any = "trajectory") -> list[float]:
    """The advantages of the turns in order, given those of the base."""
    batch = batch_of(algorithm, *groups, layout=layout)
    values = torch.zeros(batch.tokens.shape, dtype=torch.float64)
    values[batch.action_mask] = torch.tensor(signs, dtype=torch.float64)
    for transform in algorithm.transforms:
        values = transform(values, batch, Context())
    found: list[float] = values[batch.action_mask].tolist()
    return found


WANTED = [1.519442, -0.921588, 0.558971]


@pytest.mark.vector("2026:6")
@pytest.mark.parametrize("scope", ["trajectory", "group", "batch"])
@pytest.mark.parametrize("layout", ["trajectory", "turn"])
def test_a_certain_turn_counts_more(build: Build, scope: str, layout: Any) -> None:
    episode = play("a", "xyz", entropies=[0.2, 0.5, 0.8])
    assert scaled(build("aem", scope=scope), [1, -1, 1], [episode], layout=layout) == pytest.approx(
        WANTED, abs=1e-6
    )


@pytest.mark.vector("2026:6")
@pytest.mark.parametrize("scope", ["group", "batch"])
def test_and_so_does_a_certain_episode_of_one_turn(build: Build, scope: str) -> None:
    episodes = [play(f"e{value}", "x", entropies=[value]) for value in (0.2, 0.5, 0.8)]
    assert scaled(build("aem", scope=scope), [1, -1, 1], episodes) == pytest.approx(WANTED, abs=1e-6)


def test_the_scope_says_which_turns_are_compared() -> None:
    first = [play("a", "xy", entropies=[0.2, 0.8]), play("b", "xy", entropies=[0.5, 0.5])]
    second = [play("c", "xy", entropies=[1.0, 1.2])]
    found = {
        scope: scaled(build_recipe("aem", {"scope": scope}).build(), [1] * 6, first, second)
        for scope in ("trajectory", "group", "batch")
    }
    for scope, parts in (("trajectory", (2, 2, 2)), ("group", (4, 2)), ("batch", (6,))):
        start = 0
        for size in parts:
            assert sum(found[scope][start : start + size]) == pytest.approx(size, abs=1e-6)
            start += size
    assert found["trajectory"][2:4] == pytest.approx([1, 1], abs=1e-6)  # equally certain
    assert found["trajectory"][:2] == pytest.approx(found["trajectory"][4:], abs=1e-6)
    assert found["group"][2:4] != pytest.approx([1, 1], abs=1e-3)
    assert found["batch"][0] > found["group"][0] > 1


def test_the_log_has_the_range_of_the_factors() -> None:
    algorithm = build_recipe("aem").build()
    batch = batch_of(algorithm, [play("a", "xyz", entropies=[0.2, 0.5, 0.8])])
    mini = MiniBatch(batch, torch.zeros_like(batch.logprobs))
    numbers = algorithm.diagnostics[-1](mini, Context())
    assert numbers == {
        "aem/scale_min": pytest.approx(WANTED[2], abs=1e-6),
        "aem/scale_max": pytest.approx(WANTED[0], abs=1e-6),
    }
    nothing = replace(mini, batch=replace(batch, action_mask=torch.zeros_like(batch.action_mask)))
    assert algorithm.diagnostics[-1](nothing, Context()) == {}


@pytest.mark.parametrize(("name", "base"), [("aem", "empg"), ("empg", "aem")])
def test_the_gate_is_not_applied_twice(name: str, base: str) -> None:
    with pytest.raises(ConfigError, match="it has the gate of AEM already"):
        build_recipe(name, {"base": {"name": base}})
