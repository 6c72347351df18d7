"""COPO: the blend of the comparisons within a group and between groups."""

from collections.abc import Callable
from math import log

import pytest
from token_examples import in_order, mini_batch, played, scored

from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.credit import compute_advantages
from agentrl.algorithms.hooks import Context
from agentrl.algorithms.methods.copo import compare_groups
from agentrl.algorithms.named_features import with_features
from agentrl.algorithms.recipe import build_recipe

Build = Callable[..., Algorithm]
MIXED, EQUAL = ["a", "a", "b", "c"], ["a"] * 4
GROUPS = played(
    [[1]] * 12,
    [1.0, 0.0, 1.0, 0.0, *[1.0] * 4, *[0.0] * 4],
    [number // 4 for number in range(12)],
    [*MIXED, *EQUAL, *MIXED],
)
CENTRE = 1.5 / log(4)  # of a group of 4


@pytest.mark.vector("zoo:1.20a")
@pytest.mark.parametrize("layout", ["trajectory", "turn"])
def test_the_blended_advantage(build: Build, layout: str) -> None:
    batch = scored(GROUPS, logprobs=[-1.0] * 12, layout=layout)
    algorithm = build("copo", centre=CENTRE)
    found = in_order(batch, compute_advantages(algorithm, batch, Context()))
    wanted = [8.7e-5, -8.7e-5, 8.7e-5, -8.7e-5, *[0.999998] * 4, *[-0.999898] * 4]
    assert found == pytest.approx(wanted, abs=6e-7)
    batch = with_features(batch, algorithm.requires)
    assert compare_groups(batch)[::4].tolist() == pytest.approx([0, 0.999998, -0.999998], abs=5e-7)


def test_the_share_of_the_local_advantage_follows_the_entropy_of_the_answers() -> None:
    algorithm = build_recipe("copo", {"centre": CENTRE}).build()
    batch = with_features(scored(GROUPS, logprobs=[-1.0] * 12), algorithm.requires)
    logged = algorithm.diagnostics[-1](mini_batch(batch, 0.0), Context())
    assert logged == {"copo/local_share": pytest.approx(2 / 3 * 1.0e-4, abs=5e-6)}
    centred = build_recipe("copo", {"centre": 0.75}).build()  # 0.75 log 4 is the entropy of the mixed ones
    local = build_recipe("grpo", {"drop_equal_groups": False}).build()
    found, plain = (in_order(batch, compute_advantages(each, batch, Context())) for each in (centred, local))
    assert found[:4] == pytest.approx([value / 2 for value in plain[:4]], abs=1e-7)
