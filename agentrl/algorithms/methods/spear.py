"""SPEAR: self-imitation of good episodes, an early reward for tool calls, and covariance clipping."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from agentrl.algorithms.algorithm import EQUAL_RETURNS, Algorithm
from agentrl.algorithms.hooks import Context
from agentrl.algorithms.methods.clip_cov import Band, with_covariance_clip, without_covariance_clip
from agentrl.algorithms.methods.dr_bot import DrBot, by_shaped_returns
from agentrl.algorithms.recipe import Base, Presets, Recipe, recipe
from agentrl.algorithms.replay import ReplayBuffer
from agentrl.config import Count, OptionalCount, PositiveShare, Share, Weight
from agentrl.data.trajectory import Episode
from agentrl.errors import ConfigError
from agentrl.schedule import cosine

MAX_REWARDED_CALLS = 10  # further tool calls earn nothing
ANSWER = "answer"  # value of `info["tool"]` for the turn that gives the final answer


@recipe("spear")
@dataclass(frozen=True)
class Spear(Recipe):
    """SPEAR: replay of good episodes with recomputed advantages, a decaying tool reward, covariance clipping.

        loss = loss of the base + coefficient_t * surrogate loss of the base on replayed rows
        A    = R - median of recent groups' mean returns,   for replayed rows

    A row of a rollout batch is kept if one of its action tokens has a positive advantage under the base.
    Replayed rows keep their original logprobs, get the advantage A above, and count only if A is positive. R
    is the shaped return of the row's trajectory at the time, including the tool reward. The turn-wise part of
    a base's advantage is not replayed, nor are its terms and weights. If another recipe is put over this one,
    replayed rows get its ratio, bounds, surrogate and aggregation too. Ratios are relative to the policy that
    acted, so bounds as narrow as those of `gspo` leave nothing to learn. For when and how many rows are
    replayed, see `ReplayBuffer`.

    The tool reward is also paid to failures, and groups are selected with it. It helped small models, and
    cost a 7B model on ALFWorld 5 points (90.6 % without it, 85.2 % with it).

        field                  | paper       | released    | ours
        base.name              | dr_bot      | dr_bot      | dr_bot
        base.preset            | paper       | released    | ours
        buffer_size            | 2048        | 2048        | 32
        tolerate_steps         | 10          | 5           | 5
        warmup                 | 200         | 200         | 30
        tool_steps             | 100         | 200         | 30
        covariance_share       | 0.02        | 0.0002      | 0.0002
        covariance_band        | [1.0, 40.0] | [1.0, 5.0]  | [1.0, 5.0]
        replay_covariance_band | [1.0, 40.0] | [2.0, 60.0] | [1.0, 40.0]

    `paper` has the settings of the authors' README, `released` those of the scripts for ALFWorld, where the
    warm-up of 200 is the one that takes effect. `tool_reward` is ours in all presets: its scale is that of
    the rewards. A buffer of 32 and a warm-up of 30 suit runs of a hundred small steps. The published groups
    are of 8 (16 in mathematics).

    The preset `released` also follows the released code for text games in what no field describes:
    - a recomputed advantage of 0 also qualifies;
    - with `advantage_decay`, every stored row counts as good enough;
    - rows expire after sampling, by their distance from the newest row, after 10 steps at the latest;
    - baselines are dropped by whole steps;
    - the schedules count steps from 1;
    - an entropy bonus of the base also acts on replayed rows.

    The released code for mathematics has the paper's form of the first of these, and clips replayed rows with
    the settings of the base's loss. A loss divided by the width of the padding is not reproduced.

    Args:
        base: The recipe whose loss on the rollout this extends.
        buffer_size: The maximum number of rows in a sample; rows are sampled once 1.5 times as many are good
            enough. Rows are trajectories, as long as prompts extend each other. Published runs use 2048 turns
            on text games and 32 trajectories in mathematics.
        baseline_size: The number of mean returns in the median.
        tolerate_steps: The maximum age of a sampled row, in steps.
        coefficient: The coefficient of the replay loss; 0 turns replay off.
        warmup: The number of training steps in which the coefficient rises from 0 along half a cosine; 0
            starts at the full value.
        advantage_decay: null for the advantage above; otherwise a row keeps its original advantage, times
            this.
        mode: `burst` takes optimiser steps on replayed rows alone, and then empties the buffer; `mixed` adds
            a part of the replayed rows to every optimiser step of the rollout batch.
        require_tool_call: Whether to keep only rows of episodes with a tool call.
        tool_reward: The maximum reward for tool calls, in reward units, reached at 10 calls; 0 for none. It
            is a tenth of the reward of success in the published text games, and equal to it in mathematics. A
            call is a turn whose `info["tool"]` names a tool other than the answer; if no turn has this info,
            all turns count.
        tool_steps: The number of training steps in which the tool reward falls to 0 along half a cosine.
        covariance_share: The share of action tokens that covariance clipping leaves out of the base's loss; 0
            for none. It replaces the dual clip.
        covariance_band: The range of covariances from which they are drawn, in nats times reward units (a
            success on the published text games earns 10).
        replay_covariance_share: As `covariance_share`, for replayed rows.
        replay_covariance_band: As `covariance_band`, for replayed rows.
        parity: `official` follows the preset `released` in what no field describes, without the values of the
            table; `paper` has no effect.

    Source: Qin et al. 2025, arXiv:2509.22601.
    """

    PRESETS: ClassVar[Presets] = {
        "paper": {
            "base": {"name": "dr_bot", "preset": "paper"},
            "buffer_size": 2048,
            "tolerate_steps": 10,
            "warmup": 200,
            "tool_steps": 100,
            "covariance_share": 0.02,
            "covariance_band": (1.0, 40.0),
        },
        "released": {
            "base": {"name": "dr_bot", "preset": "released"},
            "buffer_size": 2048,
            "warmup": 200,
            "tool_steps": 200,
            "replay_covariance_band": (2.0, 60.0),
        },
    }

    base: Base = field(default_factory=DrBot)
    buffer_size: Count = 32
    baseline_size: Count = 10240
    tolerate_steps: Count = 5
    coefficient: Weight = 1.0
    warmup: OptionalCount = 30
    advantage_decay: PositiveShare | None = None
    mode: Literal["burst", "mixed"] = "burst"
    require_tool_call: bool = False
    tool_reward: Weight = 0.1
    tool_steps: Count = 30
    covariance_share: Share = 0.0002
    covariance_band: Band = (1.0, 5.0)
    replay_covariance_share: Share = 0.02
    replay_covariance_band: Band = (1.0, 40.0)
    parity: Literal["paper", "official"] = "paper"

    def build(self) -> Algorithm:
        """Build the base with the tool reward, covariance clipping and replay."""
        base = self.base.build()
        if base.replay is not None:
            raise ConfigError(f"base is {self.base.name!r}, wanted one without a replay of its own")
        algorithm = with_covariance_clip(base, self.covariance_share, self.covariance_band)
        if self.tool_reward:
            bonus = partial(tool_bonus, most=self.tool_reward, steps=self.tool_steps, first=self._first_step)
            algorithm = replace(
                algorithm,
                select=by_shaped_returns(base.select, (bonus,)),
                shape_reward=(*base.shape_reward, bonus),
            )
        if not self.coefficient:
            return algorithm
        return replace(algorithm, replay=self._replay())

    @property
    def _first_step(self) -> int:
        """Return the number of the first training step in the schedules."""
        return 1 if self.preset == "released" else 0

    def replay_loss(self, algorithm: Algorithm) -> Algorithm:
        """Return the algorithm that defines the loss of replayed rows, from that of the run."""
        released = self.preset == "released"
        replayed = Algorithm(
            ratio=algorithm.ratio,
            # Replayed rows have a covariance clip of their own, or else the dual clip of the base.
            clip=without_covariance_clip(algorithm.clip) if self.covariance_share else algorithm.clip,
            surrogate=algorithm.surrogate,
            aggregation=algorithm.aggregation,
            terms=tuple(term for term in algorithm.terms if released and term.name == "entropy"),
            diagnostics=(),
        )
        return with_covariance_clip(replayed, self.replay_covariance_share, self.replay_covariance_band)

    def _replay(self) -> ReplayBuffer:
        official = self.preset == "released"
        return ReplayBuffer(
            self.replay_loss,
            size=self.buffer_size,
            baselines=self.baseline_size,
            tolerance=self.tolerate_steps,
            coefficient=partial(
                cosine_warmup, most=self.coefficient, steps=self.warmup, first=self._first_step
            ),
            recompute_advantage=recalibrated
            if self.advantage_decay is None
            else partial(decayed, factor=self.advantage_decay),
            episode_filter=calls_tool if self.require_tool_call else None,
            mixed=self.mode == "mixed",
            released=official,
            count_all=official and self.advantage_decay is not None,
        )

    def _contradictions(self) -> Sequence[tuple[bool, str]]:
        return [
            *super()._contradictions(),
            *(
                (not low < high, f"{name} is {[low, high]}, wanted the lower bound first")
                for name in ("covariance_band", "replay_covariance_band")
                for low, high in (getattr(self, name),)
            ),
        ]


def cosine_warmup(context: Context, *, most: float, steps: int, first: int = 0) -> float:
    """Return most * (1 - cos(pi t / steps)) / 2 at step t, and `most` from step `steps` on.

    `first` is the number t of the first training step. With `steps` 0 the result is always `most`.
    """
    return most * (1 - cosine(context.step + first, steps + 1, floor=0.0)) if steps else most


def tool_calls(episode: Episode) -> int:
    """Count the turns that called a tool; all turns if the environment names no tools."""
    named = [turn.info["tool"] for turn in episode.turns if "tool" in turn.info]
    return sum(tool not in (None, ANSWER) for tool in named) if named else len(episode.turns)


def calls_tool(episode: Episode) -> bool:
    """Return whether the episode called a tool."""
    return tool_calls(episode) > 0


def tool_bonus(
    episode: Episode, context: Context, *, most: float, steps: int, first: int = 0
) -> Sequence[float]:
    """Return the rewards, with the reward for tool calls added to the last one.

        most * min(1, calls / MAX_REWARDED_CALLS) * (1 + cos(pi t / steps)) / 2

    at step t, and 0 from `steps` on; `first` is the number of the first training step.
    """
    rewards = [turn.reward for turn in episode.turns]
    if rewards:
        bonus = most * min(1.0, tool_calls(episode) / MAX_REWARDED_CALLS)
        rewards[-1] += bonus * cosine(context.step + first, steps + 1, floor=0.0)
    return rewards


def recalibrated(advantages: Tensor, episode_return: float, baseline: float) -> Tensor:
    """Return the return less the baseline, at every token; [T] reward units, 0 if equal up to rounding."""
    gain = episode_return - baseline
    return torch.full_like(advantages, gain if abs(gain) > EQUAL_RETURNS else 0.0)


def decayed(advantages: Tensor, episode_return: float, baseline: float, *, factor: float) -> Tensor:
    """Return the original advantages, times a factor; [T]."""
    return advantages * factor
