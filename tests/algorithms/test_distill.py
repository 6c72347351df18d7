"""Distillation: the teacher's part of the advantage and of the loss, and what is refused."""

from collections.abc import Callable

import pytest
import torch
from token_examples import in_order, loss_of, mini_batch, played, scored

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import Algorithm, check_requirements, drop_equal_returns
from agentrl.algorithms.credit import compute_advantages, prepare
from agentrl.algorithms.hooks import Context
from agentrl.algorithms.recipe import build_recipe
from agentrl.errors import ConfigError, RequirementError
from agentrl.learn.learner import provided
from agentrl.learn.objective import build_objective

Build = Callable[..., Algorithm]
DOUBLE = torch.float64
POLICY = torch.tensor([0.7, 0.2, 0.1], dtype=DOUBLE).log()
TEACHER = torch.tensor([0.5, 0.4, 0.1], dtype=DOUBLE).log()
JENSEN_SHANNON = 0.025362  # KL(q || m) / 2 + KL(p || m) / 2 = (.023912 + .026812) / 2, m = [.6, .3, .1]


@pytest.mark.vector("2026:10.7a")
@pytest.mark.parametrize("layout", ["trajectory", "turn"])
@pytest.mark.parametrize("lengths", [[[3]], [[1, 2]], [[2], [1]]])
def test_the_advantage_of_each_token(build: Build, lengths: list[list[int]], layout: str) -> None:
    batch = scored(played(lengths), logprobs=POLICY, teacher=TEACHER, layout=layout)
    found = compute_advantages(build("distill"), batch, Context())
    assert in_order(batch, found) == pytest.approx([-0.336472, 0.693147, 0], abs=5e-7)


@pytest.mark.vector("2026:10.7b")
def test_the_policy_moves_towards_the_teacher_in_expectation(build: Build) -> None:
    logits = POLICY.clone().requires_grad_()
    tokens = played([[3]])
    batch = scored(tokens, logprobs=POLICY, teacher=TEACHER)
    advantages = torch.tensor(in_order(batch, compute_advantages(build("distill"), batch, Context())))
    probabilities = POLICY.exp()
    (probabilities * advantages.double() * logits.log_softmax(dim=0)).sum().backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == pytest.approx([-0.167700, 0.158010, 0.009690], abs=5e-7)
    assert float(logits.grad.sum()) == pytest.approx(0, abs=1e-12)


@pytest.mark.vector("2026:10.7c")
@pytest.mark.parametrize(
    ("interpolation", "wanted"), [(1.0, 0.096901), (0.0, 0.109023), (0.5, JENSEN_SHANNON)]
)
def test_the_divergences(interpolation: float, wanted: float) -> None:
    found = functional.interpolated_divergence(POLICY[None], TEACHER[None], interpolation)
    assert found.tolist() == pytest.approx([wanted], abs=5e-7)


def test_the_full_divergence_has_the_slope_of_the_expected_push() -> None:
    logits = POLICY[None].clone().requires_grad_()
    functional.interpolated_divergence(logits, TEACHER[None], 1.0).sum().backward()
    assert logits.grad is not None
    assert (-logits.grad[0]).tolist() == pytest.approx([-0.167700, 0.158010, 0.009690], abs=5e-7)


@pytest.mark.parametrize("interpolation", [0.0, 0.3, 0.5, 1.0])
def test_a_divergence_is_zero_and_flat_where_the_two_agree(interpolation: float) -> None:
    logits = torch.randn(4, 9, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    logits[0, 3:] = -torch.inf  # no choices
    leaf = logits.clone().requires_grad_()
    found = functional.interpolated_divergence(leaf, logits + 5, interpolation)
    found.sum().backward()
    assert leaf.grad is not None
    assert found.abs().max() < 1e-15
    assert leaf.grad.abs().max() < 1e-15


@pytest.mark.parametrize("interpolation", [0.0, 0.3, 1.0])
def test_a_divergence_has_the_slope_of_its_value(interpolation: float) -> None:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, dtype=DOUBLE, generator=draw, requires_grad=True)
    teacher = torch.randn(3, 5, dtype=DOUBLE, generator=draw)
    assert torch.autograd.gradcheck(
        lambda values: functional.interpolated_divergence(values, teacher, interpolation), logits
    )
    assert bool((functional.interpolated_divergence(logits, teacher, interpolation) > 0).all())


def test_logits_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(1, 3\) and the teacher's \(1, 2\), wanted the same"):
        functional.interpolated_divergence(POLICY[None], TEACHER[None, :2], 1.0)


@pytest.mark.vector("2026:10.7d")
def test_the_term_is_the_mean_divergence_over_the_tokens(build: Build) -> None:
    name = "teacher_divergence:1.0"
    batch = scored(played([[1, 2], [3]]), logprobs=[-1.0] * 6)
    values = [0.096901, 0.2, 0.0, 0.1, 0.3, 0.4]
    algorithm = build("distill", mode="loss", beta=2.0, reward_coefficient=0.0)
    mini = mini_batch(batch, 0.0, logprobs=[-1.0] * 6, extras={name: values})
    numbers, outputs = loss_of(build_objective(mini, algorithm, Context()))
    assert numbers["loss"] == pytest.approx(2 * sum(values) / 6)
    assert outputs.extras[name].grad is not None
    assert in_order(batch, outputs.extras[name].grad) == pytest.approx([2 / 6] * 6)


def test_the_reward_is_centred_before_the_teachers_part_is_added() -> None:
    batch = scored(played([[1], [1]], returns=[1.0, 0.0]), logprobs=[-1.0, -1.0], teacher=[-3.0, -1.0])
    base = in_order(batch, compute_advantages(build_recipe("grpo").build(), batch, Context()))
    for coefficient in (1.0, 0.5, 0.0):
        algorithm = build_recipe("distill", {"beta": 0.5, "reward_coefficient": coefficient}).build()
        found = in_order(batch, compute_advantages(algorithm, batch, Context()))
        assert found == pytest.approx([coefficient * base[0] - 1.0, coefficient * base[1]])


def test_a_token_answers_for_the_discounted_ones_after_it_in_its_trajectory() -> None:
    groups = played([[1, 2], [1]])
    for layout in ("trajectory", "turn"):
        batch = scored(groups, logprobs=[-1.0] * 4, teacher=[-2.0, -3.0, -1.5, -5.0], layout=layout)
        algorithm = build_recipe("distill", {"reward_coefficient": 0.0, "discount": 0.5}).build()
        found = in_order(batch, compute_advantages(algorithm, batch, Context()))
        assert found == pytest.approx([-(1 + 0.5 * 2 + 0.25 * 0.5), -(2 + 0.5 * 0.5), -0.5, -4.0])


@pytest.mark.parametrize("reward", [0.0, 1.0])
@pytest.mark.parametrize("mode", ["advantage", "loss"])
def test_groups_without_spread_and_single_episodes_are_kept(mode: str, reward: float) -> None:
    groups = played([[2], [2], [1]], returns=[1.0, 1.0, 0.0], groups=[0, 0, 1])
    algorithm = build_recipe("distill", {"mode": mode, "reward_coefficient": reward}).build()
    assert len(prepare(algorithm, groups, Context()).episodes) == 3
    assert algorithm.compares is (reward > 0)
    off = build_recipe("distill", {"beta": 0.0}).build()
    assert off.select is drop_equal_returns


@pytest.mark.parametrize("base", ["gigpo", "ppo", "gspo", "cispo", "empg", "spear"])
@pytest.mark.parametrize("mode", ["advantage", "loss"])
def test_it_stands_over_other_methods(mode: str, base: str) -> None:
    over = build_recipe("distill", {"mode": mode, "base": {"name": base}}).build()
    plain = build_recipe(base).build()
    assert over.surrogate == plain.surrogate
    assert len(over.terms) == len(plain.terms) + (mode == "loss")
    assert len(over.transforms) == len(plain.transforms) + (mode == "advantage")
    assert over.requires >= plain.requires - {"states"}


def test_contradictions_are_refused() -> None:
    for settings, message in (
        ({"beta": 0, "reward_coefficient": 0}, "nothing is learned, wanted one of them above 0"),
        ({"mode": "loss", "discount": 0.5}, r"discount is 0\.5 with mode=loss.* wanted 0"),
        ({"interpolation": 0.5}, r"interpolation is 0\.5 with mode=advantage.* wanted 1"),
        ({"base": {"name": "drpo"}}, "its loss reads no advantage"),
        ({"beta": -1.0}, "algorithm.beta"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_recipe("distill", settings)
    build_recipe("distill", {"base": {"name": "drpo"}, "mode": "loss"})


@pytest.mark.parametrize("mode", ["advantage", "loss"])
def test_without_a_teacher_it_is_refused_with_what_is_wanted(mode: str) -> None:
    algorithm = build_recipe("distill", {"mode": mode}).build()
    check_requirements(algorithm, provided(reference=False, critic=False, teacher=True))
    with pytest.raises(RequirementError, match=r"learner\.teacher is null, wanted the model to learn from"):
        check_requirements(algorithm, provided(reference=False, critic=False))


def test_the_log_ratio_is_logged() -> None:
    batch = scored(played([[2], [1]]), logprobs=[-1.0, -2.0, -3.0], teacher=[-1.5, -2.0, -2.0])
    algorithm = build_recipe("distill").build()
    numbers = {
        name: value
        for diagnostic in algorithm.diagnostics
        for name, value in diagnostic(mini_batch(batch, 0.0), Context()).items()
    }
    assert numbers["distill/kl"] == pytest.approx((0.5 + 0.0 - 1.0) / 3)
