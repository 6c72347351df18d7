"""T2PO: ends reasoning that no longer moves, and samples a turn again that is like the one before."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, ClassVar

import torch
from annotated_types import Interval
from torch import Tensor

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.hooks import Context, MiniBatch, ReplyState, SampledReply, Verdict, requires
from agentrl.algorithms.recipe import Base, Presets, Recipe, build_recipe, recipe
from agentrl.config import Count, OptionalCount, Share, Weight
from agentrl.errors import ConfigError


@recipe("t2po")
@dataclass(frozen=True)
class T2PO(Recipe):
    """Token- and turn-level exploration: uncertainty decides when reasoning ends and which turns are played.

        M[t] = entropy_weight H / ln V + (1 - entropy_weight) (1 - C),   C scaled to [0, 1] within the reply
        Phi  = geometric mean of M over the decisions of a turn

    C is the mean -log p of the `top` most likely tokens, high where the policy is confident. Reasoning is
    ended, once it has `least_thoughts` tokens, where M has changed by less than `flat` per token over the
    last `window`: the tokens that end it are forced and not learned from. A reply is discarded, and another
    one sampled in the same state, if its Phi differs by less than `change` from that of the turn before, at
    most `resamples` times. The environment never sees a discarded reply. Training alone does this: evaluation
    plays every reply.

    An accepted turn follows the policy conditioned on its acceptance, while ratios are those of the policy
    itself. Nobody corrects this, and neither do we: ratios are biased where turns were discarded.

    Reasoning is that before a choice among actions (`policy.reply=think_action` with `rollout.constrained`).
    Other replies have none to end, and `t2po/intervened` is 0. It needs the torch engine in this process.

    The released code does not run: nothing computes its scores of turns, nor counts tokens of reasoning. It
    discards where 0 < |difference| < 0.3, at most twice; the preset has these two numbers. How C is scaled is
    not known; here it is by the smallest and the largest of the reply so far, so that a reply does not depend
    on others. The paper's values of the fields below are not known to us; they are ours. It used 500 tokens
    a reply, 450 of them reasoning.

        field       | paper | released | ours
        base.name   | gigpo | gigpo    | gigpo
        base.preset | paper | released | ours
        flat        | 0.02  | 0.0      | 0.02
        change      | 0.05  | 0.3      | 0.05
        resamples   | 2     | 2        | 2

    Args:
        base: The recipe that is modified; it must not branch.
        entropy_weight: The part of the entropy in M.
        top: The number of most likely tokens in C.
        least_thoughts: The number of tokens of reasoning before it can be ended.
        window: The number of tokens over which M must be flat.
        flat: The mean change of M below which reasoning ends; 0 never ends it.
        change: The difference of Phi below which a turn is sampled again; 0 samples none again.
        resamples: The maximum number of discarded replies of a turn.

    Source: arXiv:2605.02178.
    """

    KIND = "rollouts"
    CONFIDENCE = "reconstruction"
    PRESETS: ClassVar[Presets] = {
        "paper": {"base": {"name": "gigpo", "preset": "paper"}},
        "released": {"base": {"name": "gigpo", "preset": "released"}, "flat": 0.0, "change": 0.3},
    }

    base: Base = field(default_factory=lambda: build_recipe("gigpo"))
    entropy_weight: Share = 0.5
    top: Annotated[int, Interval(ge=2, le=1000)] = 10
    least_thoughts: OptionalCount = 32
    window: Count = 16
    flat: Weight = 0.02
    change: Weight = 0.05
    resamples: OptionalCount = 2

    def build(self) -> Algorithm:
        """Build the base with the hooks of its rollout."""
        base = self.base.build()
        plan = base.rollout
        if plan.branch_policy is not None:
            raise ConfigError(
                f"t2po: base {self.base.name!r} branches, wanted one whose turns are all its own"
            )
        if plan.turn_gate is not None or plan.end_thoughts is not None:
            raise ConfigError(
                f"t2po: base {self.base.name!r} decides which replies are played, wanted another"
            )
        measure = partial(uncertainties, weight=self.entropy_weight)
        if self.change and self.resamples:
            gate = partial(changes_enough, measure=measure, least=self.change)
            plan = replace(plan, turn_gate=gate, resamples=self.resamples, confidence=self.top)
        if self.flat:
            ends = partial(
                thoughts_are_flat,
                measure=measure,
                least=self.least_thoughts,
                window=self.window,
                threshold=self.flat,
            )
            plan = replace(plan, end_thoughts=ends, confidence=self.top)
        return replace(base, rollout=plan, diagnostics=(*base.diagnostics, exploration_metrics))


def uncertainties(
    entropies: Sequence[float], confidences: Sequence[float], context: Context, *, weight: float
) -> Tensor:
    """Return M of every decision so far; [T] float64."""
    return functional.token_uncertainty(
        torch.tensor(entropies, dtype=torch.float64),
        torch.tensor(confidences, dtype=torch.float64),
        entropy_weight=weight,
        vocabulary=context.vocabulary,
    )


@requires("rollout:confidence")
def changes_enough(
    state: ReplyState, reply: SampledReply, context: Context, *, measure: partial[Tensor], least: float
) -> Verdict:
    """Accept a reply whose Phi differs by `least` from that of the turn before, and any at the first turn."""
    score = functional.turn_uncertainty(measure(reply.entropies, reply.confidences, context))
    before = None if state.previous is None else state.previous.info.get("gate_score")
    return Verdict(before is None or abs(score - before) >= least, score)


@requires("rollout:confidence")
def thoughts_are_flat(
    entropies: Sequence[float],
    confidences: Sequence[float],
    context: Context,
    *,
    measure: partial[Tensor],
    least: int,
    window: int,
    threshold: float,
) -> bool:
    """Return whether reasoning of at least `least` tokens has become flat."""
    if len(entropies) < max(least, window + 1):
        return False
    return functional.is_flat(measure(entropies, confidences, context), window=window, threshold=threshold)


def exploration_metrics(mini: MiniBatch, context: Context) -> Mapping[str, float]:
    """Measure the shares of turns with ended reasoning and with discarded replies, and count what went.

    Turns are those of the batch; discarded replies and their tokens are per turn.
    """
    turns = [turn.info for episode in mini.batch.episodes for turn in episode.turns]
    if not turns:
        return {}
    refused = [info.get("discarded_replies", 0) for info in turns]
    scores = [info["gate_score"] for info in turns if "gate_score" in info]
    numbers = {
        "t2po/intervened": sum(bool(info.get("intervened")) for info in turns) / len(turns),
        "t2po/resampled": sum(count > 0 for count in refused) / len(turns),
        "t2po/discarded_replies": sum(refused) / len(turns),
        "t2po/discarded_tokens": sum(info.get("discarded_tokens", 0) for info in turns) / len(turns),
    }
    return numbers | ({"t2po/uncertainty": sum(scores) / len(scores)} if scores else {})
