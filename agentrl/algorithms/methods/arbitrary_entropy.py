"""Arbitrary-entropy AEPO: good episodes of a hotter or colder second rollout hold the entropy at a target."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Interval
from torch import Tensor

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import Algorithm, mismatch_metrics
from agentrl.algorithms.branching import own_rollout
from agentrl.algorithms.hooks import (
    COMPARES,
    Advantage,
    Context,
    Diagnostic,
    MiniBatch,
    ReplyState,
    excludes,
    require_tensor,
    requirements,
    requires,
    steers_entropy,
    trait,
    traits,
)
from agentrl.algorithms.named_features import feature_of
from agentrl.algorithms.recipe import Base, Presets, Recipe, build_recipe, recipe
from agentrl.config import OptionalCount, Weight
from agentrl.data.batch import Batch

BETTER = 0.05  # by how many standard deviations an episode is better than its group
ENTROPY = "arbitrary_entropy/entropy"
Hotter = Annotated[float, Interval(gt=1, le=10)]
Colder = Annotated[float, Interval(ge=0.01, lt=1)]


@recipe("arbitrary_entropy")
@dataclass(frozen=True)
class ArbitraryEntropy(Recipe):
    """Arbitrary-entropy policy optimisation: good episodes at another temperature steer the entropy.

        T = high if H <= target else low,   times the temperature of the step
        k = min(replaced, kept), half of it (rounded down) while H > target
        the first k plain episodes of the batch make way for the first k kept ones, with advantage 1

    This is arXiv 2510.08141; `aepo` is another AEPO. H is the mean entropy of the plain action tokens in the
    last step, 0 in the first. A task has `episodes` plain episodes and `tempered` ones at T, its second
    rollout. Each of the two is compared within itself: tempered episodes better than their own mean by more
    than 0.05 standard deviations are kept, so that equal ones give nothing, and plain ones have the advantage
    of the base. Other tempered episodes are not learned from; if none is kept, nothing is replaced. The kept
    ones are scored at the temperature of the step, as if they had been sampled there: there is no importance
    correction, by design. That bias moves the entropy: up if they were hotter, down if they were colder.

    All in all a task has episodes + tempered episodes: 8 here, as many as GRPO plays with
    rollout.group_size=8, of which an update learns from 6.

        field       | paper | released | ours
        base.name   | grpo  | grpo     | grpo
        base.preset | ours  | released | ours
        target      | 0.75  | 0.5      | 0.5
        replaced    | 60    | 60       | 4
        episodes    | 5     | 5        | 6
        tempered    | 2     | 2        | 2

    The released code plays a quarter of the tasks again, with 5 episodes each: 6.25 of a task on average, not
    7. Its batches are of 512 tasks, so that at most 60 of 2560 episodes are replaced.

    Args:
        base: The recipe whose batch is changed.
        target: The entropy to reach, in nats.
        high: The factor of the temperature up to the target.
        low: The factor of the temperature above it.
        replaced: The largest number of episodes that are replaced in a step.
        episodes: The number of plain episodes of a task.
        tempered: The number of its episodes at the other temperature; 0 leaves only the base.

    Source: Wang et al. 2025, arXiv:2510.08141.
    """

    KIND = "rollouts"
    CONFIDENCE = "official code read"
    PRESETS: ClassVar[Presets] = {
        "paper": {"target": 0.75, "replaced": 60, "episodes": 5},
        "released": {"base": {"name": "grpo", "preset": "released"}, "replaced": 60, "episodes": 5},
    }

    base: Base = field(default_factory=lambda: build_recipe("grpo"))
    target: Weight = 0.5
    high: Hotter = 1.2
    low: Colder = 0.8
    replaced: OptionalCount = 4
    episodes: Annotated[int, Interval(ge=1, le=10_000)] = 6
    tempered: Annotated[int, Interval(ge=0, le=10_000)] = 2

    def build(self) -> Algorithm:
        """Build the base with a second rollout."""
        base = self.base.build()
        changes: dict[str, Any] = {"episodes": self.episodes + self.tempered}
        if self.tempered:
            told = _ALONE(partial(self.temperature))
            changes |= {"reply_temperature": told, "second": self.tempered}
        compared = partial(self.advantage, base=base.advantage)
        own = requires("episode_tokens", *requirements(base.advantage))
        return replace(
            base,
            rollout=own_rollout(base.rollout, self.name, **changes),
            advantage=trait(COMPARES, *traits(base.advantage))(own(compared)),
            masks=(*base.masks, steers_entropy(requires("episode_tokens")(self.mixed))),
            diagnostics=(*map(self._of_plain, base.diagnostics), self.metrics),
        )

    def temperature(self, state: ReplyState, context: Context) -> float:
        """Return the temperature of a reply: that of the step, or T in the second rollout."""
        if state.member < self.episodes:
            return state.temperature
        return state.temperature * (self.low if self._above(context) else self.high)

    def _above(self, context: Context) -> bool:
        return [0.0, *context.past(ENTROPY)][-1] > self.target

    def second(self, batch: Batch) -> Tensor:
        """Mark the trajectories of the second rollout; [E] bool."""
        if batch.members is None:
            return torch.zeros_like(batch.groups, dtype=torch.bool)
        return batch.members >= self.episodes

    def exchange(self, batch: Batch, context: Context) -> tuple[Tensor, Tensor]:
        """Mark the plain trajectories that make way, and the tempered ones that replace them; [E] bool."""
        second, counted = self.second(batch), feature_of(batch, "episode_tokens") > 0
        better = functional.group_relative_advantage(batch.returns, 2 * batch.groups + second) > BETTER
        kept, plain = second & counted & better, ~second & counted
        count = min(self.replaced, int(kept.sum()), int(plain.sum()))
        count = count // 2 if self._above(context) else count
        return plain & (plain.cumsum(0) <= count), kept & (kept.cumsum(0) <= count)

    def advantage(self, batch: Batch, context: Context, *, base: Advantage) -> Tensor:
        """Return 1 for kept episodes, 0 for other tempered ones, and the base's for plain ones; [B, T]."""
        second = self.second(batch)
        values = base(replace(batch, groups=2 * batch.groups + second), context)
        own = self.exchange(batch, context)[1].to(values.dtype)[batch.trajectory][:, None]
        return torch.where(second[batch.trajectory][:, None], own, values) * batch.action_mask

    def mixed(self, mini: MiniBatch, context: Context) -> Tensor:
        """Mark the action tokens of the update: of plain episodes, with some replaced; [B, T] bool."""
        gone, come = self.exchange(mini.batch, context)
        learned = torch.where(self.second(mini.batch), come, ~gone)
        return mini.batch.action_mask & learned[mini.batch.trajectory][:, None]

    @requires("entropy", "episode_tokens")
    def metrics(self, rollout: MiniBatch, context: Context) -> Mapping[str, float]:
        """Return the mean entropy of the plain action tokens in nats, and how many episodes were replaced."""
        batch = rollout.batch
        plain = batch.action_mask & ~self.second(batch)[batch.trajectory][:, None]
        entropies = require_tensor(batch.old_entropies, "old_entropies").double()
        numbers = {"arbitrary_entropy/replaced": float(self.exchange(batch, context)[1].sum())}
        return numbers | ({ENTROPY: float(entropies[plain].mean())} if bool(plain.any()) else {})

    def _of_plain(self, diagnostic: Diagnostic) -> Diagnostic:
        """Return a diagnostic; that of the mismatch of engine and learner leaves out the second rollout."""
        return requires("old_logprobs")(self.mismatch) if diagnostic is mismatch_metrics else diagnostic

    def mismatch(self, rollout: MiniBatch, context: Context) -> Mapping[str, float]:
        """Return `mismatch_metrics` of the plain episodes, which were sampled as they are scored."""
        batch = rollout.batch
        plain = batch.action_mask & ~self.second(batch)[batch.trajectory][:, None]
        return mismatch_metrics(replace(rollout, batch=replace(batch, action_mask=plain)), context)


_ALONE = excludes(
    branches="a branch would begin with tokens of another temperature",
    importance_weights="the second rollout is learned without importance correction",
    sampler_ratio="the second rollout is learned as if it had been sampled at the temperature of the step",
)
