"""VOGUE: bonuses for the uncertainty of a reply and of a reply under a changed observation."""

from collections.abc import Callable

import pytest
import torch
from token_examples import in_order, mini_batch, played, scored

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.credit import compute_advantages
from agentrl.algorithms.hooks import Context
from agentrl.algorithms.recipe import build_recipe
from agentrl.errors import ConfigError
from agentrl.learn.divergence import state_divergence

Build = Callable[..., Algorithm]
P, Q = torch.tensor([[2.0, 1.0, 0.0], [1.0, 1.2, 0.3]], dtype=torch.float64).log_softmax(dim=1)[:, None]


@pytest.mark.vector("zoo:1.25a")
def test_the_symmetric_divergence() -> None:
    kls = [(one.exp() * (one - other)).sum() for one, other in ((P, Q), (Q, P))]
    assert [float(each) for each in kls] == pytest.approx([0.181572, 0.184481], abs=5e-7)
    assert float(functional.symmetric_divergence(P, Q)) == pytest.approx(0.183027, abs=5e-7)
    assert float(functional.taken_divergence(P[:, 0], Q[:, 0])) == pytest.approx(0.088050, abs=5e-7)


@pytest.mark.vector("zoo:1.25b")
def test_the_guided_advantages(build: Build) -> None:
    """The numbers of the changed branch: A of 1.2 and -0.05 with H(q) and the divergence above."""
    entropy = float(-(Q.exp() * Q).sum())
    divergence = float(functional.symmetric_divergence(P, Q))
    algorithm = build("vogue")
    guided = algorithm.transforms[-1] if algorithm.transforms else lambda given, batch, context: given
    batch = scored(
        played([[1], [1]]),
        logprobs=[-1.0] * 2,
        entropies=[entropy] * 2,
        extras={"observation_kl": [divergence] * 2},
    )
    given = torch.where(batch.tokens == 1, 1.2, -0.05).double()
    found = in_order(batch, guided(given, batch, Context()))
    assert found[0] == pytest.approx(1.798190, abs=5e-7)
    assert found[1] == pytest.approx(0, abs=1e-12)


@pytest.mark.vector("zoo:1.25c")
def test_the_mean_of_a_sequence(build: Build) -> None:
    algorithm = build("vogue", unit="turn", output_weight=0.0)
    guided = algorithm.transforms[-1] if algorithm.transforms else lambda given, batch, context: given
    batch = scored(
        played([[3, 1]]),
        logprobs=[-1.0] * 4,
        entropies=[1.0] * 4,
        extras={"observation_kl": [0.18, 0.02, 0.5, 0.1]},
    )
    found = in_order(batch, guided(torch.ones(batch.tokens.shape), batch, Context()))
    assert found == pytest.approx([1.233333] * 3 + [1.1], abs=5e-7)


@pytest.mark.vector("zoo:1.25d")
def test_the_share_that_is_scored_twice_fades(build: Build) -> None:
    view = build("vogue").view
    assert view is not None
    found = [view.probability(Context(step=step, total_steps=200)) for step in (0, 50, 200, 300)]
    assert found == [1, 0.75, 0, 0]


def test_a_fade_of_its_own_does_not_follow_the_run() -> None:
    algorithm = build_recipe("vogue", {"fade_steps": 10, "share": 0.5}).build()
    assert algorithm.view is not None
    assert algorithm.view.probability(Context(step=5, total_steps=1000)) == 0.25
    assert not algorithm.scheduled
    assert build_recipe("vogue").build().scheduled


def test_bonuses_never_turn_the_sign_of_an_advantage_with_bounds_of_2() -> None:
    advantages = torch.linspace(-2, 2, 9)
    bonus = sum(functional.bounded_bonus(advantages, torch.full((9,), 1e6), 1.0, 2.0) for _ in range(2))
    assert bool(((advantages + bonus) * advantages.sign() >= 0).all())


def test_the_divergence_of_states_is_that_of_their_logits_at_the_temperature() -> None:
    draw = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 4, 3, generator=draw, dtype=torch.float64)
    weight = torch.randn(7, 3, generator=draw, dtype=torch.float64)
    targets, temperature = torch.tensor([0, 3, 6, 2]), torch.tensor([0.5, 1.0, 2.0, 1.5])
    p, q = ((each @ weight.T / temperature[:, None]).log_softmax(1) for each in (one, other))
    found = state_divergence(one, other, weight, targets, None, temperature)
    torch.testing.assert_close(found, ((p.exp() - q.exp()) * (p - q)).sum(1) / 2)
    allowed = torch.tensor([[0, 1, -1], [3, -1, -1], [6, 5, 4], [2, 0, -1]])
    found = state_divergence(one, other, weight, targets, allowed, temperature)
    for row, ids in enumerate(allowed):
        own = ids[ids >= 0]
        p, q = ((each[row] @ weight[own].T / temperature[row]).log_softmax(0) for each in (one, other))
        assert float(found[row]) == pytest.approx(float(((p.exp() - q.exp()) * (p - q)).sum() / 2))
    assert float(found[1]) == 0  # a single choice
    assert len(state_divergence(one[:0], other[:0], weight, targets[:0])) == 0


def test_without_weights_it_is_its_base_and_asks_for_nothing() -> None:
    off = build_recipe("vogue", {"input_weight": 0.0, "output_weight": 0.0}).build()
    assert off.view is None
    assert off.requires == build_recipe("grpo").build().requires
    outer = build_recipe("vogue", {"input_weight": 0.0}).build()
    assert outer.view is None
    assert "observation_kl" not in outer.requires


def test_what_it_logs() -> None:
    algorithm = build_recipe("vogue", {"output_weight": 0.0}).build()
    batch = scored(
        played([[2]]), logprobs=[-1.0] * 2, entropies=[0.4, 0.2], extras={"observation_kl": [0.5, 0.0]}
    )
    assert algorithm.diagnostics[-1](mini_batch(batch, 0.0), Context()) == {
        "vogue/input_divergence": pytest.approx(0.25),
        "vogue/output_entropy": pytest.approx(0.3),
        "vogue/changed_share": 0.5,
    }
    empty = scored([], logprobs=[0.0], entropies=[0.0], extras={"observation_kl": [0.0]})
    assert algorithm.diagnostics[-1](mini_batch(empty, 0.0), Context()) == {}
    assert compute_advantages(algorithm, empty, Context()).shape == (0, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"perturbation": "tokens", "amount": 1.5}, "wanted at most 1 with perturbation=tokens"),
        ({"perturbation": "shuffle"}, "perturbation"),
        ({"amount": 0.0}, "amount"),
        ({"fade_steps": 0}, "fade_steps"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_recipe("vogue", settings)


@pytest.mark.parametrize("inner", ["empg", "aem"])
def test_a_method_of_one_number_for_each_turn_is_not_put_over_it(inner: str) -> None:
    with pytest.raises(ConfigError, match="cannot be combined"):
        build_recipe(inner, {"base": {"name": "vogue"}})
