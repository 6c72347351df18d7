"""DCPO: how far the advantage of good tokens is mixed with their weight at another temperature."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from token_examples import in_order, played, scored

from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.hooks import Context, MiniBatch
from agentrl.algorithms.recipe import build_recipe
from agentrl.data.batch import Batch

Build = Callable[..., Algorithm]
LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0], dtype=torch.float64)


def example(share: float = 0.25, entropy: float = 0.42, layout: Any = "trajectory") -> Batch:
    """Four episodes of four tokens, one of each kind; the share of them with a return of 1 is given."""
    extras = {f"logprob_at:{factor}": (LOGITS / factor).log_softmax(0).tolist() * 4 for factor in (1.2, 0.8)}
    rows = played([[4], [1, 3], [4], [4]], [float(index < 4 * share) for index in range(4)])
    logprobs = LOGITS.log_softmax(0).tolist() * 4
    return scored(rows, logprobs=logprobs, entropies=[entropy] * 16, extras=extras, layout=layout)


def steered(algorithm: Algorithm, batch: Batch, advantage: float) -> list[float]:
    """The transformed advantages by episode, turn and token."""
    values = torch.where(batch.action_mask, advantage, 0.0).double()
    for transform in algorithm.transforms:
        values = transform(values, batch, Context())
    return in_order(batch, values)


@pytest.mark.vector("zoo:1.1b")
@pytest.mark.parametrize("layout", ["trajectory", "turn"])
def test_the_advantages_of_a_good_row(build: Build, layout: Any) -> None:
    found = steered(build("dcpo"), example(layout=layout), 1.2)
    assert found[:4] == pytest.approx([1.129831, 1.169865, 1.217159, 1.273030], abs=5e-7)
    assert found[4:] == pytest.approx([1.2 * (1 - 0.242424)] * 12, abs=5e-7)


def test_above_the_target_it_goes_by_the_colder_policy_and_the_distance_is_limited() -> None:
    algorithm = build_recipe("dcpo").build()
    found = steered(algorithm, example(share=0.5, entropy=0.9), 0.0)
    strength = 0.2 / 1.2  # min(.4, .1) / .5 over 1 plus itself
    ratio = (LOGITS / 0.8).softmax(0) / LOGITS.softmax(0)
    assert found[:4] == pytest.approx((strength * ratio).tolist())
    assert found[8:] == [0.0] * 8


@pytest.mark.parametrize(
    ("settings", "batch"),
    [({"reach": 0.0}, example()), ({}, example(share=0.0)), ({}, example(entropy=0.5))],
    ids=["no reach", "nothing good", "at the target"],
)
def test_without_anything_to_do_the_advantages_stay(settings: dict[str, Any], batch: Batch) -> None:
    assert steered(build_recipe("dcpo", settings).build(), batch, -0.5) == [-0.5] * 16


def test_it_logs_what_it_does() -> None:
    batch = example()
    metrics = build_recipe("dcpo").build().diagnostics[-1](MiniBatch(batch, batch.old_logprobs), Context())
    assert metrics == pytest.approx({"dcpo/strength": 0.242424, "dcpo/entropy": 0.42}, abs=5e-7)


def test_it_reads_both_temperatures() -> None:
    assert {"logprob_at:1.5", "logprob_at:0.6"} <= build_recipe(
        "dcpo", {"high": 1.5, "low": 0.6}
    ).build().requires
