"""SIREN: which tokens are peaks, and the squared distance of their entropy from the anchor."""

from collections.abc import Callable

import pytest
import torch
from token_examples import DOUBLE, in_order, loss_of, mini_batch, played, scored

from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.hooks import Context
from agentrl.algorithms.recipe import build_recipe
from agentrl.algorithms.token_statistics import top_p_entropy
from agentrl.learn.objective import build_objective

Build = Callable[..., Algorithm]
NAME = "top_p_entropy:0.8"
PEAKS = [0.0, 0.0, 1.095287, 0.0, 0.0]  # whose .8 quantile is .219057
BASE = build_recipe("dr_grpo")


@pytest.mark.vector("zoo:1.7a")
@pytest.mark.parametrize("layout", ["trajectory", "turn"])
@pytest.mark.parametrize("lengths", [[[5]], [[1, 3, 1]]])
def test_the_squared_distance_of_the_peaks_from_the_anchor(
    build: Build, lengths: list[list[int]], layout: str
) -> None:
    batch = scored(played(lengths), logprobs=[-1.0] * 5, layout=layout)
    mini = mini_batch(batch, 0.0, extras={NAME: PEAKS})
    objective = build_objective(mini, build("siren", base=BASE, anchor=0.9), Context())
    numbers, outputs = loss_of(objective)
    assert numbers.get("term/siren", 0.0) == pytest.approx(0.195287**2, abs=1e-9)
    assert numbers["loss"] == pytest.approx(0.00019069, abs=5e-9)
    slope = outputs.extras[NAME].grad
    assert slope is not None
    assert in_order(batch, slope) == pytest.approx([0, 0, 0.005 * 2 * 0.195287, 0, 0], abs=1e-12)


def test_the_peak_of_five_distributions() -> None:
    """Only of the third do several tokens stay below .8 together."""
    rows = [(2.0, 1.0, 0.0, -1.0), (5.0, 0.0, 0.0, -1.0), (0.2, 0.1, 0.0, -0.1), (2.3, 1.0, 0.0, -0.5)]
    logits = torch.tensor([*rows, (2.5, 1.0, -0.5, -1.0)], dtype=DOUBLE)
    values = top_p_entropy(logits, torch.zeros(5, dtype=torch.int64), 0.8)
    assert (values > 0).tolist() == [False, False, True, False, False]
    batch = scored(played([[5]]), logprobs=[-1.0] * 5)
    mini = mini_batch(batch, 0.0, extras={NAME: values})
    terms = build_objective(mini, build_recipe("siren", {"anchor": 0.9}).build(), Context()).terms
    assert [in_order(batch, factors) for _, factors in terms] == [[0, 0, 1, 0, 0]]


def test_the_mean_is_over_the_peaks_of_a_trajectory_and_then_over_trajectories() -> None:
    values = [0.1, 0.3, 0.5, 0.7, 0.2, 0.9]
    batch = scored(played([[4], [2]]), logprobs=[-1.0] * 6)
    algorithm = build_recipe("siren", {"anchor": 0.0, "quantile": 0.5}).build()
    objective = build_objective(mini_batch(batch, 0.0, extras={NAME: values}), algorithm, Context())
    ((_, factors),) = objective.terms
    assert in_order(batch, factors) == pytest.approx([0, 0, 0.25, 0.25, 0, 0.5])
    numbers, _ = loss_of(objective)
    assert numbers["term/siren"] == pytest.approx((0.5 * 0.6 + 0.5 * 0.9) ** 2)


def test_the_anchor_is_the_entropy_of_the_peaks_in_the_first_step() -> None:
    algorithm = build_recipe("siren").build()
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [3.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.5, 0.0]], dtype=DOUBLE)
    values = top_p_entropy(logits, torch.zeros(3, dtype=torch.int64), 0.8)
    batch = scored(played([[3]]), logprobs=[-1.0] * 3, extras={NAME: values})
    measured = algorithm.diagnostics[-1](mini_batch(batch, 0.0), Context())
    assert measured == {"siren/peak_entropy": pytest.approx(float(values.max()))}
    term = algorithm.terms[-1]
    assert term.scale(Context()) == 0.0
    later = Context(step=2, history={"train/algorithm/siren/peak_entropy": [0.7, 0.4]})
    assert term.scale(later) == 0.005
    assert term.distance(torch.tensor(0.9), later).item() == pytest.approx(0.2)
    batch = scored(played([[3]]), logprobs=[-1.0] * 3, extras={NAME: [0.5] * 3})
    assert algorithm.diagnostics[-1](mini_batch(batch, 0.0), Context()) == {}
