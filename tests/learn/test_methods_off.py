"""With its knob off, a method is its base: the weights after an update of two mini-batches are the same."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from toy_policy import VOCABULARY, ToyPolicy, answered, make_groups, toy_forward
from toy_views import toy_perturb

from agentrl.algorithms.credit import prepare
from agentrl.algorithms.hooks import Context
from agentrl.algorithms.recipe import build_recipe
from agentrl.learn.learner import Learner
from agentrl.learn.settings import LearnerConfig

PAST = {"train/algorithm/ares/threshold": [0.5], "train/algorithm/ares/target/easy": [0.0]}
CONTEXT = Context(step=3, total_steps=10, vocabulary=VOCABULARY, history=PAST)
UNCLIPPED = {"name": "grpo", "clip_low": 1.0, "clip_high": 1e6}
# name -> its settings without effect, the recipe that it then equals, and settings that show on these rows
OFF: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "aem": ({"k": 0.0}, {"name": "grpo"}, {}),
    "steer": ({"low": 1.0, "high": 1.0}, {"name": "grpo"}, {}),
    "canon": ({"mix": 0.5}, {"name": "dr_grpo"}, {}),
    "bapo": ({"lower": [0.8, 0.8], "upper": [1.2, 1.2]}, {"name": "grpo"}, {"upper": [1.0, 1.01]}),
    "cispo": ({"clip_high": 1e6}, UNCLIPPED, {"clip_high": 0.0}),
    "clip_cov": (
        {"share": 0.0},
        {"name": "grpo", "clip_low": 1.0, "clip_high": 1.0},
        {"share": 0.5, "band": [0.0, 9.0]},
    ),
    "dppo": ({"delta": 1.0}, UNCLIPPED, {"delta": 1e-6}),
    "forking": ({"share": 1.0}, {"name": "grpo"}, {}),
    "lp_reg": ({"share": 0.0}, {"name": "grpo"}, {"share": 0.5}),
    "siren": ({"coefficient": 0.0}, {"name": "dr_grpo"}, {"anchor": 0.2, "coefficient": 1.0}),
    "hapo": (
        {"widening": 0.0, "redistribution": 0.0, "average": "trajectory"},
        {"name": "grpo"},
        {},
    ),
    "hicra": ({"alpha": 0.0}, {"name": "dr_grpo"}, {"grams": ["a"]}),
    "distill": ({"beta": 0.0}, {"name": "grpo"}, {}),
    "one_shot": ({"entropy_coefficient": 0.0}, {"name": "grpo"}, {}),
    "seed_grpo": ({"alpha": 0.0}, {"name": "dr_grpo"}, {"answers": "exact"}),
    "light_if": ({"coefficient": 0.0}, {"name": "grpo"}, {}),
    "entropy_sft": ({"share": 1.0}, {"name": "behaviour_cloning"}, {}),
    "t1": ({"entropy_coefficient": 0.0}, {"name": "rloo"}, {}),
    "copo": (
        {"steepness": 1e6, "centre": 0.0},
        {"name": "grpo", "drop_equal_groups": False},
        {},
    ),
    "appo": (  # with fewer first rollouts than episodes it differs in the rollout
        {"influence": 0.0, "dual_clip": None, "clip_high": 0.2, "divide_by_std": False},
        {"name": "grpo", "divide_by_std": False},
        {},
    ),
    "t2po": (  # what it changes is the rollout, so that another base shows on these rows
        {"flat": 0.0, "change": 0.0},
        {"name": "gigpo"},
        {"base": {"name": "gigpo", "step_weight": 0.5}},
    ),
    # All of these groups' members are among the 100 plain ones, or the last two are left out of the batch.
    "arbitrary_entropy": ({"episodes": 100}, {"name": "grpo"}, {"episodes": 2}),
    "dcpo": ({"reach": 0.0}, {"name": "grpo"}, {}),
    # Nothing branches on these rows.
    "cure": ({}, {"name": "dapo"}, {"base": {"name": "dapo", "clip_high": 0.0}}),
    "ettrl": ({"advantage": "plain"}, {"name": "grpo"}, {}),
    "ares": ({"strength": 0.0}, {"name": "grpo"}, {"window": 1}),
    "vogue": ({"input_weight": 0.0, "output_weight": 0.0}, {"name": "grpo"}, {"output_weight": 0.0}),
    "e3b": (
        {"coefficient": 0.0},
        {"name": "grpo", "drop_equal_groups": False},
        {"coefficient": 0.1, "divide_by_std": False},
    ),
    "epo": ({"entropy_coefficient": 0.0}, {"name": "grpo"}, {}),
    "graphgpo": (
        {"step_weight": 0.0},
        {"name": "grpo", "drop_equal_groups": False},
        {"gamma": 0.5},
    ),
    "prime": (
        {
            "process_coefficient": 0.0,
            "outcome_coefficient": 1.0,
            "whiten": False,
            "accuracy": None,
            "aggregation": "sequence",
        },
        {"name": "rloo", "drop_equal_groups": False},
        {"outcome_coefficient": 1.0, "whiten": False, "accuracy": None, "aggregation": "sequence"},
    ),
    "lare": ({"warmup": 4}, {"name": "reinforce_pp"}, {"warmup": 0}),
    "ragen": (
        {"share": 1.0, "keep_equal": True},
        {"name": "grpo", "drop_equal_groups": False},
        {"share": 0.4},
    ),
    "sampo": (
        {"base": {"name": "gigpo", "step_weight": 0.0}},
        {
            "name": "gspo",
            "clip_low": 3e-3,
            "clip_high": 4e-3,
            "base": {"name": "grpo", "drop_equal_groups": False},
        },
        {"drift": 1e-6},
    ),
    "sapo": ({"tau_positive": 1e-6, "tau_negative": 1e-6}, UNCLIPPED, {}),
}


def weights_after(block: dict[str, Any]) -> torch.Tensor:
    """The weights after two updates of the same rows, each of two mini-batches."""
    settings = {key: value for key, value in block.items() if key != "name"}
    algorithm = build_recipe(block["name"], settings).build()
    policy = ToyPolicy()
    learner = Learner(
        policy,
        LearnerConfig(warmup_steps=0, mini_batches=2),
        reference=ToyPolicy(1) if "reference" in algorithm.requires else None,
        teacher=ToyPolicy(2),
        reward_model=None if algorithm.reward_model is None else ToyPolicy(1),
        forward=toy_forward(),
        perturb=toy_perturb,
    )
    for _ in range(2):
        batch = prepare(algorithm, answered(make_groups()), CONTEXT)
        batch = learner.score(batch, algorithm.requires, algorithm.view, CONTEXT)
        assert batch.old_logprobs is not None
        # The sampler is the learner, as in a run with its own engine.
        learner.update(replace(batch, logprobs=batch.old_logprobs), algorithm, CONTEXT)
    return torch.cat([value.detach().flatten() for value in policy.parameters()])


@pytest.mark.parametrize("name", OFF)
def test_without_effect_it_is_its_base(name: str) -> None:
    settings, base, _ = OFF[name]
    off, plain = weights_after({"name": name, **settings}), weights_after(base)
    torch.testing.assert_close(off, plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", OFF)
def test_with_an_effect_it_is_another_method(name: str) -> None:
    _, base, settings = OFF[name]
    assert not torch.equal(weights_after({"name": name, **settings}), weights_after(base))
