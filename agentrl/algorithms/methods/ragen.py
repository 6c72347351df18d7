"""RAGEN-2's filter: learn from the groups whose returns vary most."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import stdev, variance
from typing import ClassVar, Literal

from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.hooks import COMPARES, Context, Select, trait, traits
from agentrl.algorithms.recipe import Base, Presets, Recipe, build_recipe, recipe
from agentrl.config import PositiveShare
from agentrl.data.trajectory import Group
from agentrl.errors import ConfigError

SLACK = 0.01  # by which the sum of the kept scores may stay below the share, as in the released code
VARIED = "filter by variance"  # a trait of a selection
Measure = Literal["variance", "std"]
Mode = Literal["linear", "softmax"]


@recipe("ragen")
@dataclass(frozen=True)
class RAGEN(Recipe):
    """Reward-variance filter: the groups of highest variance that make up a share of all of it are kept.

        s = variance of the returns of a group,   or exp(variance) / sum of exp(variance)   (softmax)
        keep groups in falling order of s until the kept s add up to  share * sum of s - 0.01

    Groups of little variance move the weights by noise and by terms that ignore the task. A step in which
    nothing is kept is skipped. Returns are those of the environment, without penalties; the variance is the
    unbiased one of the finished episodes, and 0 of a single one. With a share of 1 and `keep_equal`, it is
    its base.

        field      | paper    | released | ours
        measure    | variance | std      | variance
        share      | 0.9      | 0.9      | 0.9
        mode       | linear   | softmax  | linear
        keep_equal | false    | true     | false

    The released code takes the standard deviation, under the name of the variance; its recommended setting
    is `linear` without groups of equal returns, and that of the scripts of its table `softmax` with them. The
    paper also multiplies the loss by the share of groups kept, which the code does not by default and which
    is not reproduced. The diagnosis of collapse by mutual information is not a part of it.

    Args:
        base: The recipe that learns from the groups; its own selection comes first.
        share: The share of the sum of scores that is kept.
        measure: The dispersion of a group: `variance` or `std`.
        mode: Whether scores are the dispersions (`linear`) or their `softmax`, which keeps nearly that share
            of groups.
        keep_equal: Whether groups whose returns are all equal may be kept.

    Source: RAGEN-2 2026, arXiv:2604.06268.
    """

    KIND = "rollouts"
    CONFIDENCE = "official code read"

    PRESETS: ClassVar[Presets] = {
        "released": {"measure": "std", "mode": "softmax", "keep_equal": True},
    }

    base: Base = field(default_factory=lambda: build_recipe("grpo", {"drop_equal_groups": False}))
    share: PositiveShare = 0.9
    measure: Measure = "variance"
    mode: Mode = "linear"
    keep_equal: bool = False

    def build(self) -> Algorithm:
        """Build the base with fewer groups.

        Raises:
            ConfigError: If the base draws tasks again for groups that do not differ.
        """
        base = self.base.build()
        if base.rollout.rounds > 1:
            raise ConfigError(
                f"ragen: base {self.base.name!r} draws tasks until enough groups differ, wanted one filter"
            )
        keep = partial(
            keep_varied,
            select=base.select,
            share=self.share,
            measure=self.measure,
            mode=self.mode,
            keep_equal=self.keep_equal,
        )
        return replace(base, select=trait(VARIED, *(() if self.keep_equal else (COMPARES,)))(keep))


def keep_varied(
    groups: Sequence[Group],
    context: Context,
    *,
    select: Select,
    share: float,
    measure: Measure,
    mode: Mode,
    keep_equal: bool,
) -> Sequence[Group]:
    """Keep, in their order, the groups of highest score that make up the share; ties go to the earlier."""
    played = select(groups, context)
    spreads = [dispersion(group, measure) for group in played]
    scores = softmax(spreads) if mode == "softmax" else spreads
    chosen = sorted(range(len(played)), key=lambda index: -scores[index])
    if not keep_equal:
        chosen = [index for index in chosen if spreads[index] > 0]
    kept, total, wanted = set[int](), 0.0, share * sum(scores) - SLACK
    for index in chosen:
        if share < 1 and total >= wanted:
            break
        kept.add(index)
        total += scores[index]
    return [group for index, group in enumerate(played) if index in kept]


def refuse_second_filter(select: Select, method: str) -> None:
    """Refuse a selection by variance below one that draws tasks until enough groups differ.

    Raises:
        ConfigError: If `select` is one.
    """
    if VARIED in traits(select):
        raise ConfigError(f"{method}: its base filters groups by their variance already, wanted one filter")


def dispersion(group: Group, measure: Measure) -> float:
    """Return the unbiased variance or standard deviation of the returns; 0 without two finished episodes."""
    returns = [episode.episode_return for episode in group.finished]
    if len(returns) < 2:
        return 0.0
    # Rounded, so that equal returns have no dispersion despite floating-point noise.
    return round((variance if measure == "variance" else stdev)(returns), 9)


def softmax(values: Sequence[float]) -> list[float]:
    """Return exp(v) over its sum, for each value."""
    weights = [math.exp(value - max(values)) for value in values]
    return [weight / sum(weights) for weight in weights]
