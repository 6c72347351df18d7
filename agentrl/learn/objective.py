"""The loss of one optimiser step: sum(weight * loss), the weights fixed over the whole mini-batch before."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from agentrl.algorithms.algorithm import Algorithm, clipped_tokens
from agentrl.algorithms.credit import with_mask
from agentrl.algorithms.hooks import Bounds, Context, MiniBatch, Outputs, Term, Weights, require_tensor


@dataclass(frozen=True)
class Objective:
    """Everything about a mini-batch that may depend on all of it; what is left is a sum over its tokens.

    Args:
        algorithm: the surrogate and the losses of the terms.
        context: for them.
        mini: all rows of the mini-batch, with mask and bounds.
        factors: [B, T], what their losses are multiplied by before they are added up.
        terms: each with its factors [B, T], coefficient not included.
    """

    algorithm: Algorithm
    context: Context
    mini: MiniBatch
    factors: Tensor
    terms: tuple[tuple[Term, Tensor], ...]

    @property
    def mask(self) -> Tensor:
        """[B, T] bool, tokens in the surrogate."""
        return self.mini.counted

    @property
    def bounds(self) -> Bounds | None:
        """Bounds of the ratio."""
        return self.mini.bounds

    @property
    def has_signal(self) -> bool:
        """Whether a token counts in the surrogate, or in a term that is switched on."""
        return bool(self.mask.any()) or any(
            term.scale(self.context) and bool(factors.any()) for term, factors in self.terms
        )

    def contribution(self, rows: Tensor, outputs: Outputs) -> tuple[Tensor, dict[str, Tensor]]:
        """The part of the loss that belongs to `rows` (which `outputs` describes), and of the numbers to log.

        Contributions of any partition of the rows add up to those of the mini-batch.
        """
        part = _with_ratio_base(self.mini.select(rows), outputs)
        width = part.batch.tokens.shape[1]
        outputs = replace(outputs, ratio=self.algorithm.ratio(outputs, part))
        loss = self.algorithm.surrogate(outputs, part, part.bounds)
        loss = _total(loss, part.counted, self.factors[rows, :width])
        logged = {"loss_policy": loss.detach()}
        for term, factors in self.terms:
            sampled = part.batch.sampled
            value = _total(term.loss(outputs, part, self.context), sampled, factors[rows, :width])
            loss = loss + term.scale(self.context) * value
            logged[f"term/{term.name}"] = value.detach()
        if part.bounds is not None:
            logged |= self._ratio_numbers(outputs, part)
        return loss, logged | {"loss": loss.detach()}

    def _ratio_numbers(self, outputs: Outputs, part: MiniBatch) -> dict[str, Tensor]:
        mask, held = part.counted, clipped_tokens(part, outputs)
        gap = require_tensor(part.batch.old_logprobs, "old_logprobs") - outputs.logprobs.detach()
        tokens = self.mask.sum().clamp(min=1)
        return {
            "clip_share": (held & mask).sum() / tokens,
            "clip_share_high": (held & mask & (part.advantages > 0)).sum() / tokens,
            "approx_kl": torch.where(mask, gap, 0.0).sum() / tokens,
        }


def build_objective(mini: MiniBatch, algorithm: Algorithm, context: Context) -> Objective:
    """Fix mask, ratio of now, bounds, denominators and weights from the whole mini-batch, in this order.

    Raises:
        ValueError: when a hook returns another shape than [B, T], naming its slot.
    """
    mini = with_mask(algorithm, mini, context)
    with torch.no_grad():
        if mini.current is not None:
            ratio = algorithm.ratio(mini.current, _with_ratio_base(mini, mini.current))
            mini = replace(mini, current=replace(mini.current, ratio=ratio))
        mini = replace(mini, bounds=None if algorithm.clip is None else algorithm.clip(mini, context))
        factors = _token_weights(algorithm.aggregation(mini.counted, mini.batch.turns, mini.batch.trajectory))
        for hook in algorithm.weights:
            factors = factors * _checked("weights", hook(mini, context), factors)
        terms = tuple((term, _term_factors(term, algorithm, mini)) for term in algorithm.terms)
    return Objective(algorithm, context, mini, factors, terms)


def _term_factors(term: Term, algorithm: Algorithm, mini: MiniBatch) -> Tensor:
    aggregation = term.aggregation or algorithm.aggregation
    return _token_weights(aggregation(mini.batch.sampled, mini.batch.turns, mini.batch.trajectory))


def _token_weights(weights: Weights) -> Tensor:
    values, count = weights
    return values / count.clamp(min=1)


def _total(losses: Tensor, mask: Tensor, factors: Tensor) -> Tensor:
    return torch.where(mask, losses * factors.to(losses.dtype), 0.0).sum()


def _with_ratio_base(part: MiniBatch, outputs: Outputs) -> MiniBatch:
    """Without a scoring pass the policy of now is the old one: ratios are 1, their gradients are not 0."""
    if part.batch.old_logprobs is not None:
        return part
    return replace(part, batch=replace(part.batch, old_logprobs=outputs.logprobs.detach()))


def _checked(slot: str, values: Tensor, like: Tensor) -> Tensor:
    if values.shape != like.shape:
        raise ValueError(f"algorithm.{slot} returned shape {tuple(values.shape)}, wanted {tuple(like.shape)}")
    return values
