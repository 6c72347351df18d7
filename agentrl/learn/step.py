"""One optimiser step: accumulate a gradient over micro-batches, clip it, apply it, check the result."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.hooks import Context, MiniBatch, Outputs, require_tensor
from agentrl.algorithms.token_statistics import current_statistics, loss_statistics
from agentrl.errors import NonFiniteError
from agentrl.learn.allocator import LARGE_HEAP, return_freed_memory
from agentrl.learn.forward import needed_lengths
from agentrl.learn.objective import build_objective
from agentrl.learn.scoring import Scorer, empty_outputs, write_rows
from agentrl.learn.sharding import full_tensor, local_tensor
from agentrl.learn.state import LearnerState
from agentrl.policy.precision import named_in_short, non_finite

_SAMPLED_WEIGHTS = 4096  # of each parameter, enough to estimate the share that a step moves


@dataclass(frozen=True)
class LossPart:
    """Rows of an optimiser step that share a loss.

    Args:
        mini: The rows with their advantages.
        algorithm: The algorithm that defines their loss.
        coefficient: The factor of their loss.
    """

    mini: MiniBatch
    algorithm: Algorithm
    coefficient: float = 1.0


def optimizer_step(
    parts: Sequence[LossPart], context: Context, state: LearnerState, scorer: Scorer
) -> tuple[dict[str, float], Outputs]:
    """Take one optimiser step on the sum of the parts' losses.

    Returns:
        The numbers to log and the outputs of the first part; the other parts only add to the gradient. The
        numbers are empty if no part has a signal. No step is taken then, since momentum alone would move the
        weights.
    """
    found = [_accumulate_gradient(part, context, state, scorer) for part in parts]
    losses = [sums["loss"] for sums, _ in found if sums]
    numbers, outputs = found[0]
    return ({**numbers, **_apply_gradient(sum(losses), state)} if losses else {}), outputs


def _accumulate_gradient(
    part: LossPart, context: Context, state: LearnerState, scorer: Scorer
) -> tuple[dict[str, float], Outputs]:
    """Add the gradient of a part's loss; return its numbers, summed over ranks, and its outputs."""
    mini = part.mini
    # Hooks see the current outputs of the whole mini-batch, so they come before the first micro-batch.
    if "current" in part.algorithm.requires and mini.current is None:
        wanted = current_statistics(part.algorithm.requires)
        mini = replace(mini, current=scorer.score(state.learned, mini.batch, wanted))
    objective = build_objective(mini, part.algorithm, context)
    outputs = empty_outputs(mini.batch)
    if not objective.has_signal:
        # Without a scoring pass these outputs become the batch's old log-probabilities.
        unscored = mini.batch.old_logprobs is None
        return {}, scorer.score(state.learned, mini.batch) if unscored else outputs
    sums = defaultdict[str, float](float, loss=0.0)
    statistics = loss_statistics(part.algorithm.requires)
    for rows, weight in scorer.micro_batches(needed_lengths(mini.batch)):
        found = scorer.score_rows(state.learned, mini.batch.select(rows), statistics)
        loss, numbers = objective.contribution(rows, found)
        # A filler has weight 0 but needs a backward pass too: FSDP2 reduces gradients on all ranks at once.
        (loss * (weight * part.coefficient)).backward()  # type: ignore[no-untyped-call]
        return_freed_memory(above=LARGE_HEAP)
        if weight:
            write_rows(outputs, rows, found)
        for name, value in numbers.items():
            sums[name] += weight * float(value)
    scorer.release_teacher()
    # The objective's own metrics are not summed: every rank has them for the whole mini-batch.
    logged = scorer.ranks.all_reduce_numbers(sums) | objective.metrics()
    return logged, scorer.sum_over_ranks(outputs)


def _apply_gradient(loss: float, state: LearnerState) -> dict[str, float]:
    """Clip the gradient and step the optimisers, unless the loss or the gradient is not finite.

    Raises:
        NonFiniteError: After `max_skipped_updates` skipped steps in a row, or if the step left weights or
            optimiser states that are not finite.
    """
    config = state.config
    limit = math.inf if config.clip_gradient is None else config.clip_gradient
    norm = float(full_tensor(nn.utils.clip_grad_norm_(state.parameters, limit)))
    finite = math.isfinite(loss) and math.isfinite(norm)
    numbers = {"grad_norm": norm, **_step_optimizers(state)} if finite else {}
    # Also after a skipped step, or its NaN would reach the next one.
    for parameter in state.parameters:
        parameter.grad = None
    state.skipped_in_a_row = 0 if finite else state.skipped_in_a_row + 1
    state.skipped_updates += not finite
    if state.skipped_in_a_row >= config.max_skipped_updates:
        raise NonFiniteError(
            f"{state.skipped_in_a_row} optimiser steps in a row had a loss or gradient that is not "
            f"finite (the last: loss {loss}, gradient norm {norm}); the weights are those before them"
        )
    return numbers


def _step_optimizers(state: LearnerState) -> dict[str, float]:
    """Step the optimisers; check every changed tensor for nan and inf, and a sample of weights for moves."""
    samples = [_sample_weights(value) for value in state.parameters if value.grad is not None]
    state.updates += 1
    for optimizer in state.optimizers:
        optimizer.step()
    counts = [sample.counts() for sample in samples]
    pushed, moved = torch.stack(counts).sum(0).tolist() if counts else (0, 0)
    lost = bool(non_finite(state.local_tensors(trained=True)))
    # All ranks must stop together, so the verdict of each is summed with the counts.
    sums = state.ranks.all_reduce_numbers(
        {"lost": float(lost), "pushed": float(pushed), "moved": float(moved)}
    )
    if sums["lost"]:
        rates = {group["lr"] for optimizer in state.optimizers for group in optimizer.param_groups}
        raise NonFiniteError(
            "an optimiser step whose loss and gradient were finite left nan or inf in "
            f"{named_in_short(state.non_finite())} at a learning rate of "
            f"{' and '.join(f'{rate:.3g}' for rate in sorted(rates))}; these weights are not kept"
        )
    return {"weights_moved": sums["moved"] / sums["pushed"]} if sums["pushed"] else {}


@dataclass(frozen=True)
class _WeightSample:
    """Every `stride`-th weight of a parameter before a step, and whether it has a gradient."""

    parameter: nn.Parameter
    stride: int
    before: Tensor
    has_gradient: Tensor

    def counts(self) -> Tensor:
        """Return how many weights have a gradient and how many of those changed, scaled to all weights."""
        changed = self.before != _strided(self.parameter, self.stride)
        return self.stride * torch.stack((self.has_gradient.sum(), (self.has_gradient & changed).sum()))


def _sample_weights(parameter: nn.Parameter) -> _WeightSample:
    stride = max(1, local_tensor(parameter).numel() // _SAMPLED_WEIGHTS)
    has_gradient = _strided(require_tensor(parameter.grad, "grad"), stride) != 0
    return _WeightSample(parameter, stride, _strided(parameter, stride).clone(), has_gradient)


def _strided(values: Tensor, stride: int) -> Tensor:
    return local_tensor(values.detach()).reshape(-1)[::stride]
