"""One update by a method does not depend on layout, micro-batches, order of rows and padding."""

import random
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from toy_policy import VOCABULARY, ToyPolicy, answered, make_groups, toy_forward
from toy_views import toy_perturb

from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.credit import prepare
from agentrl.algorithms.hooks import Context
from agentrl.algorithms.recipe import build_recipe
from agentrl.data.batch import Batch, Layout
from agentrl.learn.learner import Learner
from agentrl.learn.settings import LearnerConfig

PAST = {"train/algorithm/ares/threshold": [0.5], "train/algorithm/ares/target/easy": [0.0]}
CONTEXT = Context(step=3, total_steps=10, vocabulary=VOCABULARY, history=PAST)
METHODS: dict[str, dict[str, Any]] = {
    "steer": {"name": "steer"},
    "steer, exponential": {"name": "steer", "exponential": True, "low": 0.3},
    "steer, exact": {"name": "steer", "metric": "exact"},
    "aem": {"name": "aem"},
    "aem, trajectory": {"name": "aem", "scope": "trajectory"},
    "canon": {"name": "canon", "alpha": 0.7, "beta": 0.1},
    "canon, by length": {"name": "canon", "measure": "length", "mix": 0.8},
    "bapo": {"name": "bapo", "target": 0.7},
    "bapo, released": {"name": "bapo", "contribution": "surrogate", "target": 1.1},
    "cispo": {"name": "cispo"},
    "dppo": {"name": "dppo", "delta": 0.1},
    "dppo, kl": {"name": "dppo", "divergence": "kl", "delta": 0.05, "log_ratio_coefficient": 0.1},
    "graphgpo": {"name": "graphgpo"},
    "hgpo": {"name": "hgpo", "episode": True, "offset": 2},
    "mis": {"name": "mis", "level": "trajectory", "by": "geometric", "low": 0.15, "high": 5.0},
    "mis, renormalised": {
        "name": "mis",
        "level": "turn",
        "by": "k3",
        "high": 0.1,
        "low": 0.0,
        "renormalise": True,
    },
    "maxrl": {"name": "maxrl", "invalid_penalty": 0.1},
    "lare": {"name": "lare", "warmup": 0},
    "lare, unbiased": {"name": "lare", "warmup": 0, "loss": "rrd_unbiased", "sample": 2},
    "prime": {"name": "prime", "accuracy": None},
    "prime, by turn": {"name": "prime", "accuracy": None, "unit": "turn", "normalise": False},
    "ragen": {"name": "ragen", "share": 0.6},
    "sampo": {"name": "sampo", "drift": 0.01},
    "tis": {"name": "tis", "level": "trajectory"},
    "sapo": {"name": "sapo"},
    "forking": {"name": "forking", "share": 0.4},
    "kl_cov": {"name": "kl_cov", "share": 0.2},
    "lp_reg": {"name": "lp_reg", "share": 0.5},
    "siren": {"name": "siren", "anchor": 0.2, "coefficient": 1.0, "quantile": 0.5},
    "hapo": {"name": "hapo"},
    "hicra": {"name": "hicra", "grams": ["a"]},
    "empo": {"name": "empo"},
    "one_shot": {"name": "one_shot", "entropy_coefficient": 0.1},
    "pear": {"name": "pear", "alpha": 0.5},
    "seed_grpo": {"name": "seed_grpo", "alpha": 1.0},
    "light_if": {"name": "light_if"},
    "entropy_sft": {"name": "entropy_sft", "share": 0.4},
    "t1": {"name": "t1", "entropy_coefficient": 0.1},
    "distill": {"name": "distill", "discount": 0.5},
    "distill, by loss": {"name": "distill", "mode": "loss", "interpolation": 0.4},
    "drpo": {"name": "drpo"},
    "drpo, by tokens": {"name": "drpo", "length": "tokens", "trust": 0.0},
    "copo": {"name": "copo"},
    "vogue": {"name": "vogue", "share": 0.7},
    "vogue, tokens": {"name": "vogue", "perturbation": "tokens", "unit": "trajectory", "divergence": "taken"},
    "e3b": {"name": "e3b", "coefficient": 0.1, "divide_by_std": False},
    "arbitrary_entropy": {"name": "arbitrary_entropy", "episodes": 2, "replaced": 2},
    "dcpo": {"name": "dcpo"},
    "cure": {"name": "cure"},
    "ettrl": {"name": "ettrl"},
    "ettrl, of the majority": {"name": "ettrl", "reward": "majority"},
    "ares": {"name": "ares", "window": 1},
    "t2po": {"name": "t2po"},
    "appo": {"name": "appo", "kl_coefficient": 0.1},
}
every_method = pytest.mark.parametrize("block", METHODS.values(), ids=METHODS)


def built(block: dict[str, Any]) -> Algorithm:
    return build_recipe(block["name"], {key: value for key, value in block.items() if key != "name"}).build()


def learner_of(algorithm: Algorithm, policy: ToyPolicy, micro_batch_tokens: int = 10_000) -> Learner:
    config = LearnerConfig(warmup_steps=0, micro_batch_tokens=micro_batch_tokens)
    return Learner(
        policy,
        config,
        reference=ToyPolicy(1) if "reference" in algorithm.requires else None,
        teacher=ToyPolicy(2),
        reward_model=None if algorithm.reward_model is None else ToyPolicy(1),
        forward=toy_forward(),
        perturb=toy_perturb,
    )


def rows_of(block: dict[str, Any], layout: Layout = "trajectory") -> Batch:
    """Scored rows whose ratios are not 1; the old log-probability of a token is the same in both layouts."""
    algorithm = built(block)
    batch = prepare(algorithm, answered(make_groups()), CONTEXT, layout=layout)
    batch = learner_of(algorithm, ToyPolicy()).score(batch, algorithm.requires, algorithm.view, CONTEXT)
    assert batch.old_logprobs is not None
    position = torch.arange(batch.tokens.shape[1], dtype=torch.float64)
    places = 5 * batch.trajectory[:, None] + 3 * batch.turns + position
    old = torch.where(batch.action_mask, batch.old_logprobs + 0.4 * (7 * places).sin(), 0.0)
    return replace(batch, old_logprobs=old)


def padded(batch: Batch) -> Batch:
    shape = batch.tokens.shape
    wider = {
        item.name: torch.nn.functional.pad(value, (0, 3), value=-1 if item.name == "turns" else 0)
        for item in fields(batch)
        if isinstance(value := getattr(batch, item.name), torch.Tensor) and value.shape == shape
    }
    extras = {
        name: torch.nn.functional.pad(value, (*[0, 0] * (value.dim() - 2), 0, 3))
        for name, value in batch.extras.items()
    }
    return replace(batch, extras=extras, **wider)


def slopes(block: dict[str, Any], batch: Batch, **settings: Any) -> tuple[float, torch.Tensor]:
    """The loss and the gradient of one update of the same policy."""
    policy, found = ToyPolicy(), {}
    for name, value in policy.named_parameters():
        value.register_post_accumulate_grad_hook(
            lambda value, name=name: found.update({name: value.grad.flatten().clone()})
        )
    algorithm = built(block)
    numbers = learner_of(algorithm, policy, **settings).update(batch, algorithm, CONTEXT)
    return numbers["learner/loss"], torch.cat([found[name] for name in sorted(found)])


def assert_same(one: tuple[float, torch.Tensor], other: tuple[float, torch.Tensor]) -> None:
    assert one[0] == pytest.approx(other[0], abs=1e-9)
    assert one[1].abs().max() > 1e-3
    torch.testing.assert_close(one[1], other[1], rtol=0, atol=1e-9)


@every_method
def test_both_layouts_give_the_same_gradient(block: dict[str, Any]) -> None:
    assert_same(slopes(block, rows_of(block)), slopes(block, rows_of(block, "turn")))


@every_method
@pytest.mark.parametrize("budget", [1, 17, 60])
def test_the_micro_batches_change_nothing(block: dict[str, Any], budget: int) -> None:
    batch = rows_of(block, "turn")
    assert_same(slopes(block, batch), slopes(block, batch, micro_batch_tokens=budget))


@every_method
def test_the_order_of_rows_changes_nothing(block: dict[str, Any]) -> None:
    batch = rows_of(block, "turn")
    order = random.Random(0).sample(range(len(batch.tokens)), len(batch.tokens))
    assert_same(slopes(block, batch), slopes(block, batch.select(order)))


@every_method
def test_padding_changes_nothing(block: dict[str, Any]) -> None:
    batch = rows_of(block)
    assert_same(slopes(block, batch), slopes(block, padded(batch)))
