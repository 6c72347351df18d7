"""Clip-Cov: the published example through the learner, and what the recipe does to its base."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.hooks import Bounds, Context
from agentrl.algorithms.methods.clip_cov import ClipCov
from agentrl.algorithms.methods.grpo import GRPO
from agentrl.algorithms.methods.spear import Spear
from agentrl.algorithms.recipe import build_recipe
from agentrl.data import Episode, Group, StopReason, Turn
from agentrl.data.batch import Batch, Layout, collate
from agentrl.errors import ConfigError
from agentrl.learn.forward import Forward
from agentrl.learn.learner import Learner
from agentrl.learn.settings import LearnerConfig

NOW = torch.tensor([0.9, 0.6, 0.3, 0.05, 0.8, 0.02], dtype=torch.float64)
OLD = torch.tensor([0.85, 0.6, 0.33, 0.06, 0.8, 0.03], dtype=torch.float64)
ADVANTAGES = torch.tensor([1.0, 1.0, 1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
REPLY = 6


class Bigram(nn.Module):
    """After prompt token i, the reply token 6 has the probability NOW[i]."""

    def __init__(self) -> None:
        super().__init__()
        rest = (1 - NOW) / 6
        table = torch.cat([rest[:, None].expand(6, 6), NOW[:, None]], dim=1).log()
        self.table = nn.Parameter(torch.cat([table, torch.zeros(1, 7, dtype=torch.float64)]))
        self.eye = nn.Parameter(torch.eye(7, dtype=torch.float64), requires_grad=False)


def states(policy: Bigram, tokens: Tensor, lengths: Tensor) -> Tensor:
    return policy.table[tokens]


def published(layout: Layout = "trajectory", order: tuple[int, ...] = (0, 1, 2, 3, 4, 5)) -> Batch:
    """Six trajectories of one reply token each."""
    turns = [
        Turn("o", "a", prompt_ids=(place,), action_ids=(REPLY,), logprobs=(-1.0,), new_sequence=True)
        for place in order
    ]
    episodes = (
        Episode(str(place), "env", "t", 0, (turn,), StopReason.TERMINATED)
        for place, turn in zip(order, turns, strict=True)
    )
    batch = collate([Group("t", tuple(episodes))], layout=layout)
    old = torch.where(batch.action_mask, OLD[batch.tokens[:, :1].clamp(max=5)].log(), 0.0)
    return replace(batch, old_logprobs=old, old_entropies=torch.zeros_like(old))


def advantages(batch: Batch, context: Context) -> Tensor:
    return torch.where(batch.action_mask, ADVANTAGES[batch.tokens[:, :1].clamp(max=5)], 0.0)


def update(batch: Batch, algorithm: Algorithm, seed: int = 0, tokens: int = 1000) -> tuple[float, Tensor]:
    """The loss of an update, and the rows of the table that had a gradient."""
    policy, found = Bigram(), []
    policy.table.register_post_accumulate_grad_hook(lambda table: found.append(table.grad.clone()))
    config = LearnerConfig(warmup_steps=0, micro_batch_tokens=tokens)
    learner = Learner(policy, config, forward=Forward(states, lambda policy: policy.eye))
    metrics = learner.update(batch, replace(algorithm, advantage=advantages), Context(seed=seed))
    return metrics["learner/loss"], found[-1].any(1)


BASE = GRPO(clip_high=0.28, aggregation="token")
CLIP_COV = ClipCov(base=BASE, share=0.2, band=(0.5, 5.0))  # floor(.2 * 6) = 1 token


@pytest.mark.vector("zoo:1.8a")
def test_the_published_covariances():
    found = functional.covariance(ADVANTAGES[None], NOW.log()[None], torch.ones(1, 6, dtype=torch.bool))
    wanted = [0.924322, 0.654012, 0.191913, -1.002593, -1.691599, 3.226907]
    assert found[0].tolist() == pytest.approx(wanted, abs=5e-7)


@pytest.mark.vector("zoo:1.8b")
def test_one_of_the_two_candidates_is_left_out_and_the_normaliser_stays(build):
    plain, learned = update(published(), BASE.build())
    assert plain == pytest.approx(-0.333541, abs=5e-7)
    assert learned.tolist() == [True] * 5 + [False] * 2  # the sixth is clipped by its ratio of 2/3
    seen = {}
    for seed in range(12):
        loss, learned = update(published(), build("clip_cov", base=BASE, share=0.2, band=[0.5, 5.0]), seed)
        seen[tuple((~learned[:5]).nonzero().flatten().tolist())] = loss
    # The losses of the two are -.9/.85 and -1.
    wanted = {(0,): pytest.approx(-0.157071, abs=5e-7), (1,): pytest.approx(-0.333541 + 1 / 6, abs=5e-7)}
    assert seen == wanted


@pytest.mark.parametrize("layout", ["trajectory", "turn"])
@pytest.mark.parametrize("tokens", [1, 5, 1000])
@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4, 5), (5, 1, 3, 0, 2, 4)])
def test_the_draw_depends_on_no_layout_micro_batch_or_order_of_rows(layout, tokens, order):
    for seed in range(3):
        loss, learned = update(published(layout, order), CLIP_COV.build(), seed, tokens)
        wanted, same = update(published(), CLIP_COV.build(), seed)
        assert loss == pytest.approx(wanted, abs=1e-12)
        assert learned.tolist() == same.tolist()


def test_without_a_share_or_candidates_it_is_its_base():
    wanted = update(published(), BASE.build())[0]
    assert update(published(), replace(CLIP_COV, share=0.0).build())[0] == wanted
    assert update(published(), replace(CLIP_COV, band=(4.0, 5.0)).build())[0] == wanted


def test_the_published_settings():
    for preset in ("paper", "released"):
        recipe = ClipCov(preset=preset)
        assert (recipe.share, recipe.band, recipe.base.aggregation) == (2e-4, (1.0, 5.0), "token")
        assert recipe.build().clip(None, Context()) == Bounds(0.0, 2.0, None)
    assert ClipCov(preset="released").base.dual_clip == 3.0  # of the base alone: Clip-Cov has none
    assert ClipCov().base == GRPO()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"band": [2.0, 1.0]}, r"algorithm: band is \[2\.0, 1\.0\], wanted the lower bound first"),
        ({"share": 1.5}, r"algorithm\.share: wrong value \(got 1\.5, wanted at least 0 and at most 1"),
        *(
            (
                {"base": {"name": "spear", **more}},
                "algorithm: the base clips by covariance already, wanted it once",
            )
            for more in ({}, {"coefficient": 0.0})
        ),
    ],
)
def test_what_contradicts_it_is_refused(settings, reason):
    with pytest.raises(ConfigError, match=f"^{reason}"):
        build_recipe("clip_cov", settings)
    with pytest.raises(ConfigError, match="clips by covariance already"):
        Spear(base=ClipCov(), coefficient=0.0).build()
    assert Spear(base=ClipCov(), covariance_share=0.0).build().replay is not None
