"""Methods over methods, through the learner: the order makes no difference where it should make none."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from toy_policy import ToyPolicy, make_groups, toy_forward
from toy_views import toy_perturb

from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.credit import prepare
from agentrl.algorithms.hooks import Context
from agentrl.algorithms.recipe import build_recipe
from agentrl.data import Episode, Group, StopReason, Turn
from agentrl.data.batch import Batch, Layout, collate
from agentrl.learn.learner import Learner
from agentrl.learn.settings import LearnerConfig

NOTHING_ELSE = {"tool_reward": 0.0, "covariance_band": [-1000.0, 1000.0]}
SETTINGS: dict[str, dict[str, Any]] = {
    "gspo": {"clip_low": 0.2, "clip_high": 0.3},
    "dr_bot": {"keep_groups": 1.0},
    "aepo": {"branch": False, "stop_gradient_clip": False},
    "epo": {"entropy_coefficient": 0.0},
}
ORDERS = [
    ("spear", "dr_bot"),
    ("dr_bot", "spear"),
    ("gspo", "dr_bot", "spear"),
    ("gspo", "spear", "dr_bot"),
    ("spear", "gspo", "dr_bot"),
    ("dapo", "dr_bot", "spear"),
    ("spear", "dapo", "dr_bot"),
    ("gspo", "dapo", "dr_bot", "spear"),
    ("spear", "aepo", "dr_bot"),
    ("dr_bot", "aepo", "spear"),
    ("empg", "dr_bot", "spear"),
    ("epo", "gspo", "spear", "dr_bot"),
]


def over(*names: str, **spear: Any) -> Algorithm:
    """Recipes one inside the other over GRPO, the outermost first."""
    made = build_recipe("grpo")
    for name in reversed(names):
        own = NOTHING_ELSE | spear if name == "spear" else SETTINGS.get(name, {})
        made = build_recipe(name, {"base": made, **own})
    return made.build()


def learner_of(**settings: Any) -> Learner:
    config = {"optimizer": "adamw", "warmup_steps": 0, "learning_rate": 0.01, "micro_batch_tokens": 30}
    return Learner(
        ToyPolicy(), LearnerConfig(**config | settings), forward=toy_forward(), perturb=toy_perturb
    )


def weights(learner: Learner) -> torch.Tensor:
    return torch.cat([value.detach().flatten() for value in learner.policy.parameters()])


def episode(name: str, reward: float, ids: Sequence[int], finish: Any = "stop") -> Episode:
    said = {"logprobs": (-1.0,) * len(ids), "entropies": (1.0,) * len(ids)}
    turn = Turn("o", "a", prompt_ids=(1,), action_ids=tuple(ids), reward=reward, finish=finish, **said)
    return Episode(name, "toy", "t", 0, (replace(turn, new_sequence=True),), StopReason.TERMINATED)


def moved(batch: Batch) -> Batch:
    """The batch, scored by another policy, so that some ratios are clipped, and differ within a turn."""
    batch = learner_of().score(batch)
    noise = 0.6 * (2.3 * torch.arange(batch.tokens.numel())).sin().view_as(batch.logprobs)
    return replace(batch, old_logprobs=torch.where(batch.action_mask, batch.old_logprobs + noise, 0.0))


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_half_of_four_decisions_are_two_in_every_order(order: tuple[str, ...]) -> None:
    good = episode("a", 1.0, (3, 5)), episode("b", 0.0, (4, 7))
    faulty = episode("c", 0.0, (2, 3, 4, 5), finish="length")
    algorithm = over(*order, coefficient=0.0, covariance_share=0.5)
    for seed in range(12):
        layout: Layout = "turn" if seed % 2 else "trajectory"
        context = Context(seed=seed, total_steps=10, vocabulary=13)
        batch = prepare(algorithm, [Group("t", (*good, faulty))], context, layout=layout)
        numbers = learner_of().update(batch, algorithm, context)
        assert numbers["learner/mask_share"] == 4 / 8
        assert numbers["learner/weight_mean"] == 2 / 4


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_a_decision_is_left_out_unless_the_loss_itself_clips_it(order: tuple[str, ...]) -> None:
    """Of all candidates none is left, and what the loss clips has no gradient either."""
    algorithm = over(*order, coefficient=0.0, covariance_share=1.0)
    for seed in range(4):
        context = Context(seed=seed, total_steps=10, vocabulary=13)
        batch = moved(collate(make_groups(seed)))
        numbers = learner_of().update(batch, algorithm, context)
        assert 0.01 < numbers["learner/clip_ratio"] < 0.9
        assert numbers["learner/weight_mean"] == pytest.approx(numbers["learner/clip_ratio"], abs=1e-6)
        assert numbers["learner/grad_norm"] == 0


def trained(algorithm: Algorithm, **settings: Any) -> tuple[torch.Tensor, list[dict[str, float]]]:
    learner, logs = learner_of(**settings), []
    for step in range(5):
        context = Context(step, 5, vocabulary=13, tokenizer="toy")
        batch = prepare(algorithm, make_groups(step), context)
        logs.append(learner.update(batch, algorithm, context))
    return weights(learner), logs


@pytest.mark.parametrize("mode", ["burst", "mixed"])
@pytest.mark.parametrize(
    ("inside", "outside"),
    [
        (("spear", "dr_bot"), ("dr_bot", "spear")),
        (("spear", "gspo"), ("gspo", "spear")),
        (("spear", "dapo"), ("dapo", "spear")),
        (("spear", "aepo"), ("aepo", "spear")),
        (("spear", "gspo", "dr_bot"), ("gspo", "spear", "dr_bot")),
        (("spear", "gspo", "dr_bot"), ("gspo", "dr_bot", "spear")),
    ],
    ids="-".join,
)
def test_replayed_rows_are_learned_from_as_others_in_every_order(
    inside: tuple[str, ...], outside: tuple[str, ...], mode: str
) -> None:
    spear = {"buffer_size": 2, "warmup": 0, "mode": mode, "covariance_share": 0.1}
    settings = {"mini_batches": 2, "learning_rate": 0.05}
    one, logs = trained(over(*inside, **spear), **settings)
    other, _ = trained(over(*outside, **spear), **settings)
    base, _ = trained(over("spear", **spear), **settings)
    assert sum(numbers["algorithm/replay/recalled"] for numbers in logs) > 4
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    assert (one - base).abs().max() > 1e-4


def test_replayed_rows_follow_a_loss_that_was_put_over_the_replay() -> None:
    """With a surrogate that has no gradient, the replay moves nothing."""
    spear = {"buffer_size": 2, "warmup": 0, "coefficient": 1.0}

    def norms(algorithm: Algorithm) -> list[float]:
        return [log.get("algorithm/replay/grad_norm", 0.0) for log in trained(algorithm)[1]]

    algorithm = over("spear", "dr_bot", **spear)
    assert max(norms(algorithm)) > 0
    still = replace(algorithm, surrogate=lambda outputs, mini, bounds: 0.0 * outputs.logprobs)
    assert max(norms(still)) == 0
