"""SPEAR: imitate what once went well, explore tools early, and hold the entropy by covariance clipping."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from agentrl.algorithms.algorithm import EQUAL_RETURNS, Algorithm
from agentrl.algorithms.hooks import Context
from agentrl.algorithms.methods.clip_cov import Band, with_covariance_clip
from agentrl.algorithms.methods.dr_bot import DrBot, by_shaped_returns
from agentrl.algorithms.recipe import Base, Presets, Recipe, recipe
from agentrl.algorithms.replay import ReplayBuffer
from agentrl.config import Count, OptionalCount, PositiveShare, Share, Weight
from agentrl.data.trajectory import Episode
from agentrl.errors import ConfigError
from agentrl.schedule import cosine

MAX_REWARDED_CALLS = 10  # from so many on, further tool calls earn nothing
ANSWER = "answer"  # what `info["tool"]` calls the turn that ends an episode with an answer


@recipe("spear")
@dataclass(frozen=True)
class Spear(Recipe):
    """SPEAR: replay of good episodes with an advantage of today, a fading tool reward, covariance clipping.

        loss = loss of the base + coefficient_t * loss of the base's surrogate on recalled rows

    A row of a rollout batch is kept if it holds a decision with a positive advantage under the base. Recalled
    with the logprobs of its first time, its decisions get

        A = R - median of recent groups' mean returns

    and count only where that is positive too. R is the return of its trajectory as shaped then, tool reward
    included; a turn-wise part of the base's advantage is not replayed, nor are its terms and weights. Ratios
    are to the policy of then: bounds as narrow as GSPO's leave nothing to learn. For when and how many rows,
    see `ReplayBuffer`. The tool reward is paid to failures as well, and groups are selected with it; it
    helped small models, and cost a 7B model on ALFWorld 5 points (90.6 % without it, 85.2 % with it).

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

    The paper's are the settings in the authors' README, released are the scripts for ALFWorld, where the
    warm-up of 200 is what takes effect. `tool_reward` is ours everywhere: its scale is that of the rewards. A
    buffer of 32 and a warm-up of 30 suit runs of a hundred small steps. The published groups are of 8 (16 in
    mathematics).

    What no field says, the preset `released` takes from the released code for text games: a recalibrated
    advantage of 0 will do; with `advantage_decay` every stored row counts as good enough; rows expire after
    they could be recalled, by their distance from the newest one, after 10 steps at the latest; baselines are
    forgotten by whole steps; the schedules count steps from 1; an entropy bonus of the base acts on recalled
    rows as well. The one for maths has the paper's form of the first of these, and clips recalled rows with
    the settings of the base's loss. Not reproduced: a loss divided by the width of the padding.

    Args:
        base: what is learned from the rollout.
        buffer_size: rows recalled at most; they are recalled when 1.5 times as many are good enough. Rows are
            trajectories, as long as prompts extend each other. Published runs use 2048 turns on text games
            and 32 trajectories in maths.
        baseline_size: mean returns that the median is of.
        tolerate_steps: age up to which a row may be recalled.
        coefficient: of the replay loss; 0 keeps and recalls nothing.
        warmup: training steps over which the coefficient rises from 0 along half a cosine; 0 starts with all.
        advantage_decay: None for the advantage above; else a row keeps that of its first time, times this.
        mode: `burst` takes optimiser steps on recalled rows alone, and starts anew; `mixed` gives every
            optimiser step of the rollout batch a share of them.
        require_tool_call: keep no row of an episode without a tool call.
        tool_reward: the most that calls of tools earn, in reward units, at MAX_REWARDED_CALLS of them; 0 for none. A
            tenth of what success earns on the published text games, as much as it in maths. Calls are turns
            whose `info["tool"]` names one that is no answer; where no turn has such an info, all turns.
        tool_steps: training steps over which that falls to 0 along half a cosine.
        covariance_share: of the decisions that covariance clipping leaves out of the base's loss; 0 for none.
            Where it is on, there is no dual clip.
        covariance_band: covariances among which they are drawn, in nats times reward units (published runs
            earn 10 for a success on the text games).
        replay_covariance_share: the same for recalled rows.
        replay_covariance_band: likewise.
        parity: `official` is the preset `released` without the values of the table, in what no field says.

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

    def __post_init__(self) -> None:
        mistakes = [text for wrong, text in self._contradictions() if wrong]
        if mistakes:
            raise ConfigError("; ".join(mistakes))

    def build(self) -> Algorithm:
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
        return replace(algorithm, replay=self._replay(base))

    @property
    def _first_step(self) -> int:
        """The number of the first training step, by the schedules."""
        return 1 if self.preset == "released" else 0

    def _replay(self, base: Algorithm) -> ReplayBuffer:
        official = self.preset == "released"
        replayed = Algorithm(
            ratio=base.ratio,
            clip=base.clip,
            surrogate=base.surrogate,
            aggregation=base.aggregation,
            terms=tuple(term for term in base.terms if official and term.name == "entropy"),
            diagnostics=(),
        )
        return ReplayBuffer(
            with_covariance_clip(replayed, self.replay_covariance_share, self.replay_covariance_band),
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
            (not low < high, f"{name} is {[low, high]}, wanted the lower bound first")
            for name in ("covariance_band", "replay_covariance_band")
            for low, high in (getattr(self, name),)
        ]


def cosine_warmup(context: Context, *, most: float, steps: int, first: int = 0) -> float:
    """From 0 at step 0 to `most` at step `steps`, along half a cosine: most * (1 - cos(pi t / steps)) / 2.

    `first` is the number t of the first training step.
    """
    return most * (1 - cosine(context.step + first, steps + 1, floor=0.0)) if steps else most


def tool_calls(episode: Episode) -> int:
    """Turns that called a tool; all turns where the environment names none."""
    named = [turn.info["tool"] for turn in episode.turns if "tool" in turn.info]
    return sum(tool not in (None, ANSWER) for tool in named) if named else len(episode.turns)


def calls_tool(episode: Episode) -> bool:
    """Whether a tool was called."""
    return tool_calls(episode) > 0


def tool_bonus(
    episode: Episode, context: Context, *, most: float, steps: int, first: int = 0
) -> Sequence[float]:
    """Add to the reward of the last turn what the calls of tools earn.

        most * min(1, calls / MAX_REWARDED_CALLS) * (1 + cos(pi t / steps)) / 2

    at step t, and 0 from `steps` on; `first` is the number of the first training step.
    """
    rewards = [turn.reward for turn in episode.turns]
    if rewards:
        bonus = most * min(1.0, tool_calls(episode) / MAX_REWARDED_CALLS)
        rewards[-1] += bonus * cosine(context.step + first, steps + 1, floor=0.0)
    return rewards


def recalibrated(advantages: Tensor, episode_return: float, baseline: float) -> Tensor:
    """The return less the baseline, at every token; [T] reward units. Equal up to rounding is equal."""
    gain = episode_return - baseline
    return torch.full_like(advantages, gain if abs(gain) > EQUAL_RETURNS else 0.0)


def decayed(advantages: Tensor, episode_return: float, baseline: float, *, factor: float) -> Tensor:
    """The advantage of the first time, times a factor; [T]."""
    return advantages * factor
