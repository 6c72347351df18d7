"""LaRe: rewards of turns from hand-written factors of what they did, in place of the return."""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, ClassVar

from annotated_types import Interval

from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.hooks import Advantage, declared_like
from agentrl.algorithms.recipe import Base, Presets, Recipe, build_recipe, recipe
from agentrl.algorithms.redistribution import Decomposition, TurnRewards
from agentrl.config import Count, PositiveRate, Steps


@recipe("lare")
@dataclass(frozen=True)
class LaRe(Recipe):
    """Latent reward: a small model spreads the return over turns, and the base learns from its rewards.

        r[k] = MLP(factors of turn k);   loss = mean over episodes of (mean of r - R / T)^2

    Factors are cheap functions of the texts of a turn, such as a new object, a repeated action or a longer
    menu; `agentrl.env.factors` holds the table, to which the plug-in of an environment may add. The paper
    lets a language model write them; here no code of a model is run. Advantages and value targets of the base
    see r as the rewards of its turns; its selection and its penalties come before. The model is fitted after
    each training step to the episodes that were learned from, so during `warmup` steps rewards stay what they
    are; a run of no more steps is its base.

        field       | paper | released | ours
        base.name   | ppo   | ppo      | reinforce_pp
        base.preset | paper | ours     | ours
        warmup      | 0     | 0        | 5

    The published runs are of continuous control, with PPO or SAC.

    Args:
        base: The recipe that learns from the rewards; one whose advantages differ within an episode.
        loss: `rd` compares the mean of all turns; `rrd` that of `sample` turns drawn from each episode, with
            replacement if it has fewer; `rrd_unbiased` subtracts the variance of that mean.
        sample: The number of turns that are drawn.
        layers: The hidden layers of the model.
        width: The width of these layers.
        learning_rate: The learning rate of its Adam.
        updates: The steps of Adam after each training step, on all of its episodes.
        warmup: The number of steps in which the base sees the rewards of the environment.

    Source: Qu et al. 2024, arXiv:2412.11120.
    """

    KIND = "credit"
    CONFIDENCE = "official code read"
    PRESETS: ClassVar[Presets] = {
        "paper": {"base": {"name": "ppo", "preset": "paper"}, "warmup": 0},
        "released": {"base": {"name": "ppo"}, "warmup": 0},
    }

    base: Base = field(default_factory=lambda: build_recipe("reinforce_pp"))
    loss: Decomposition = "rd"
    sample: Count = 64
    layers: Annotated[int, Interval(ge=1, le=16)] = 3
    width: Annotated[int, Interval(ge=1, le=4096)] = 256
    learning_rate: PositiveRate = 3e-4
    updates: Count = 10
    warmup: Steps = 5

    def build(self) -> Algorithm:
        """Build the base with the rewards of the model."""
        base = self.base.build()
        model = TurnRewards(
            self.name,
            loss=self.loss,
            sample=self.sample,
            layers=self.layers,
            width=self.width,
            learning_rate=self.learning_rate,
            updates=self.updates,
            warmup=self.warmup,
        )
        return replace(
            base,
            advantage=_reading(model, base.advantage),
            targets=None if base.targets is None else _reading(model, base.targets),
            diagnostics=(*base.diagnostics, model.metrics),
        )


def _reading(model: TurnRewards, hook: Advantage) -> Advantage:
    """Return the hook on the rewards of the model."""
    return declared_like(hook)(partial(model.read, hook=hook))
