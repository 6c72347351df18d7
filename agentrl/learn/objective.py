"""The loss of one optimiser step: sum(weight * loss), with weights computed from the whole mini-batch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from agentrl.algorithms.algorithm import LOSS_SLOTS, Algorithm, clipped_tokens
from agentrl.algorithms.credit import with_mask
from agentrl.algorithms.hooks import Bounds, Context, MiniBatch, Outputs, Term, Weights, require_tensor
from agentrl.algorithms.named_features import with_mini_batch_features
from agentrl.learn.group_losses import GroupSlopes, group_slopes

TermFactors = tuple[tuple[Term, Tensor], ...]


@dataclass(frozen=True)
class Objective:
    """Loss of a mini-batch as a sum over tokens, with everything fixed that may depend on all of them.

    Args:
        algorithm: The algorithm that defines the surrogate and the losses of the terms.
        context: The state of training, which the losses read.
        mini: All rows of the mini-batch, with mask and bounds.
        factors: The weight of each token's surrogate loss in the sum, [B, T].
        weights: The product of the algorithm's weights, which is a part of `factors`, [B, T].
        terms: Each term with the weights of its tokens [B, T], without its coefficient; 0 where it does not
            act.
        groups: The loss of each group term and its slopes, without its coefficient.
        distances: By the name of a term with a target, how far its mean is above it at the current policy.
    """

    algorithm: Algorithm
    context: Context
    mini: MiniBatch
    factors: Tensor
    weights: Tensor
    terms: TermFactors
    groups: tuple[GroupSlopes, ...] = ()
    distances: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def mask(self) -> Tensor:
        """Return which tokens are in the surrogate; [B, T] bool."""
        return self.mini.counted

    @property
    def bounds(self) -> Bounds | None:
        """Return the bounds of the ratio, or None if nothing is clipped."""
        return self.mini.bounds

    @property
    def has_signal(self) -> bool:
        """Return whether any token counts in the surrogate or in a term with a coefficient other than 0."""
        return (
            bool(self.mask.any())
            or any(term.scale(self.context) and bool(factors.any()) for term, factors in self.terms)
            or any(group.term.scale(self.context) and bool(group.slopes.any()) for group in self.groups)
        )

    def metrics(self) -> dict[str, float]:
        """Return the numbers to log that belong to the whole mini-batch; every rank has the same.

        Returns:
            mask_share, the share of the action tokens that are in the surrogate; over those tokens the means
            weight_mean, bound_lower and bound_upper. A mean that is not finite is left out.
        """
        mask, action_mask = self.mask, self.mini.batch.action_mask
        numbers = {"mask_share": int(mask.sum()) / max(1, int(action_mask.sum()))}
        means: dict[str, Tensor | float] = {"weight_mean": self.weights}
        if self.bounds is not None:
            means |= {"bound_lower": self.bounds.lower, "bound_upper": self.bounds.upper}
        numbers |= {name: _mean(values, mask) for name, values in means.items()}
        return {name: value for name, value in numbers.items() if math.isfinite(value)}

    def contribution(self, rows: Tensor, outputs: Outputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the part of the loss and of the numbers to log that belongs to `rows`.

        The contributions of any partition of the rows add up to those of the mini-batch.

        Args:
            rows: The row numbers.
            outputs: The policy's outputs for these rows, with gradient.
        """
        part = _with_ratio_base(self.mini.select(rows), outputs)
        width = part.batch.tokens.shape[1]
        outputs = replace(outputs, ratio=self.algorithm.ratio(outputs, part))
        loss = self.algorithm.surrogate(outputs, part, part.bounds)
        loss = _masked_sum(loss, part.counted, self.factors[rows, :width])
        logged = {"policy_loss": loss.detach()}
        for term, factors in self.terms:
            factors = factors[rows, :width]
            value = _masked_sum(term.loss(outputs, part, self.context), factors != 0, factors)
            if term.name in self.distances:
                value = self._squared(self.distances[term.name], value, part)
            loss = loss + term.scale(self.context) * value
            logged[f"term/{term.name}"] = value.detach()
        for group in self.groups:
            value = group.contribution(self.mini, rows, outputs)
            loss = loss + group.term.scale(self.context) * value
            logged[f"term/{group.term.name}"] = value.detach()
        if part.bounds is not None:
            logged |= self._ratio_metrics(outputs, part)
        return loss, logged | {"loss": loss.detach()}

    def _squared(self, distance: Tensor, value: Tensor, part: MiniBatch) -> Tensor:
        """Return the rows' part of distance^2, given their part of the mean."""
        share = part.batch.action_mask.sum().double() / self.mini.batch.action_mask.sum().clamp(min=1)
        return distance * (distance * share + 2 * (value - value.detach()))

    def _ratio_metrics(self, outputs: Outputs, part: MiniBatch) -> dict[str, Tensor]:
        mask, held = part.counted, clipped_tokens(part, outputs)
        gap = require_tensor(part.batch.old_logprobs, "old_logprobs") - outputs.logprobs.detach()
        # Of the whole mini-batch, so that contributions add up.
        tokens = self.mask.sum().clamp(min=1)
        return {
            "clip_ratio": (held & mask).sum() / tokens,
            "clip_ratio_high": (held & mask & (part.advantages > 0)).sum() / tokens,
            "kl": torch.where(mask, gap, 0.0).sum() / tokens,
        }


def build_objective(mini: MiniBatch, algorithm: Algorithm, context: Context) -> Objective:
    """Compute mask, current ratio, features, bounds, denominators and weights of a mini-batch, in order.

    Raises:
        ValueError: If a hook returns a shape other than [B, T]; the message names its slot.
    """
    mini = with_mask(algorithm, mini, context)
    with torch.no_grad():
        if mini.current is not None:
            ratio = algorithm.ratio(mini.current, _with_ratio_base(mini, mini.current))
            mini = replace(mini, current=replace(mini.current, ratio=ratio))
        mini = with_mini_batch_features(mini, algorithm.requires_of(*LOSS_SLOTS))
        mini = replace(mini, bounds=None if algorithm.clip is None else algorithm.clip(mini, context))
        factors = _token_weights(algorithm.aggregation(mini.counted, mini.batch.turns, mini.batch.trajectory))
        weights = torch.ones_like(factors)
        # After the aggregation: hooks change a token's weight, not the count that losses are divided by.
        for hook in algorithm.weights:
            values = _check_shape("weights", hook(mini, context), factors)
            factors, weights = factors * values, weights * values
        terms = tuple((term, _term_factors(term, algorithm, mini, context)) for term in algorithm.terms)
        distances = _distances(terms, mini, context)
    groups = tuple(group_slopes(term, mini, context) for term in algorithm.group_terms)
    return Objective(algorithm, context, mini, factors, weights, terms, groups, distances)


def _distances(terms: TermFactors, mini: MiniBatch, context: Context) -> dict[str, Tensor]:
    found = {}
    for term, factors in terms:
        if term.target is not None:
            mean = _masked_sum(term.loss(mini.now, mini, context).double(), factors != 0, factors)
            found[term.name] = term.distance(mean, context)
    return found


def _term_factors(term: Term, algorithm: Algorithm, mini: MiniBatch, context: Context) -> Tensor:
    aggregation = term.aggregation or algorithm.aggregation
    factors = _token_weights(aggregation(mini.batch.action_mask, mini.batch.turns, mini.batch.trajectory))
    factors = torch.where(mini.batch.action_mask, factors, 0.0)
    if term.where is None:
        return factors
    selected = _check_shape(f"terms/{term.name}.where", term.where(mini, context), factors)
    return torch.where(selected, factors, 0.0) if selected.dtype == torch.bool else factors * selected


def _token_weights(weights: Weights) -> Tensor:
    values, count = weights
    return values / count.clamp(min=1)


def _masked_sum(losses: Tensor, mask: Tensor, factors: Tensor) -> Tensor:
    return torch.where(mask, losses * factors.to(losses.dtype), 0.0).sum()


def _mean(values: Tensor | float, mask: Tensor) -> float:
    """Return the mean over a mask, or a number as it is; nan for an empty mask."""
    return float(values.double().expand_as(mask)[mask].mean()) if isinstance(values, Tensor) else values


def _with_ratio_base(part: MiniBatch, outputs: Outputs) -> MiniBatch:
    """Use the outputs as old log-probabilities if there are none: ratios of 1 whose gradient is not 0."""
    if part.batch.old_logprobs is not None:
        return part
    return replace(part, batch=replace(part.batch, old_logprobs=outputs.logprobs.detach()))


def _check_shape(slot: str, values: Tensor, like: Tensor) -> Tensor:
    if values.shape != like.shape:
        raise ValueError(f"algorithm.{slot} returned shape {tuple(values.shape)}, wanted {tuple(like.shape)}")
    return values
