"""Every pair of methods takes a step of the learner, or is refused with the reason."""

from dataclasses import replace

import pytest
import torch
from toy_policy import VOCABULARY, ToyPolicy, answered, make_groups, toy_forward
from toy_views import toy_perturb

from agentrl.algorithms.credit import prepare
from agentrl.algorithms.hooks import Context
from agentrl.algorithms.recipe import recipe_names
from agentrl.algorithms.stack import build_stack, stackable_names
from agentrl.algorithms.token_statistics import reads_teacher
from agentrl.errors import ConfigError
from agentrl.learn.learner import Learner
from agentrl.learn.settings import LearnerConfig

CONTEXT = Context(step=3, total_steps=10, vocabulary=VOCABULARY)


def step_of(*names: str) -> str | None:
    """Take a step with methods over one another, the innermost first; return the reason of a refusal."""
    try:
        algorithm = build_stack({"compose": list(names)}).build()
    except ConfigError as error:
        return str(error)
    policy = ToyPolicy()
    reference = ToyPolicy(1) if "reference" in algorithm.requires else None
    config = LearnerConfig(optimizer="adamw", warmup_steps=0, mini_batches=2)
    critic = "values" in algorithm.requires
    teacher = ToyPolicy(2) if reads_teacher(algorithm.requires) else None
    judge = None if algorithm.reward_model is None else ToyPolicy(1)
    given = {"reference": reference, "teacher": teacher, "critic": critic, "reward_model": judge}
    learner = Learner(policy, config, forward=toy_forward(), perturb=toy_perturb, **given)
    batch = prepare(algorithm, answered(make_groups()), CONTEXT)
    batch = learner.score(batch, algorithm.requires, algorithm.view, CONTEXT)
    learner.update(replace(batch, logprobs=batch.old_logprobs), algorithm, CONTEXT)
    assert all(bool(value.isfinite().all()) for value in policy.parameters())
    assert learner.skipped_updates == 0
    return None


@pytest.mark.parametrize("outer", stackable_names())
def test_a_pair_learns_or_is_refused_with_the_reason(outer: str) -> None:
    torch.manual_seed(0)
    refused = {}
    for inner in recipe_names():
        reason = step_of(inner, outer)
        if reason is not None:
            refused[inner] = reason
            assert len(reason.split()) > 4, (inner, outer, reason)
    assert set(refused) >= {outer}  # no method stands over itself
    assert len(refused) < len(recipe_names())
