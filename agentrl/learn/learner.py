"""The learner: one scoring pass, then optimiser steps."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import (
    Algorithm,
    Context,
    MiniBatch,
    Outputs,
    compute_advantages,
    given,
)
from agentrl.data.batch import Batch
from agentrl.errors import CheckpointError, RequirementError
from agentrl.learn.forward import Forward, needed_lengths
from agentrl.learn.objective import build_objective
from agentrl.learn.optimizer import build_optimizers, rate_factor, set_rates
from agentrl.learn.packing import micro_batches, mini_batches
from agentrl.learn.settings import LearnerConfig


class Learner:
    """Improves a policy in place.

    Args:
        policy: its parameters are updated; those that do not require gradients stay.
        config: optimiser and batching.
        reference: a frozen policy of the same vocabulary, for algorithms that require `reference`.
        forward: how to read hidden states, and the temperature of sampling; None reads a Hugging Face causal
            language model at temperature 1.
    """

    def __init__(
        self,
        policy: nn.Module,
        config: LearnerConfig,
        *,
        reference: nn.Module | None = None,
        forward: Forward | None = None,
    ) -> None:
        self.policy = policy
        self.config = config
        self.reference = reference
        self.forward = forward or Forward()
        self.skipped_updates = 0
        self._optimizers = build_optimizers(policy, config)
        self._parameters = [value for value in policy.parameters() if value.requires_grad]

    @property
    def provides(self) -> frozenset[str]:
        """What components of an algorithm may require of this learner."""
        own = {"old_logprobs", "entropy", "entropy:grad", "current"}
        return frozenset(own | ({"reference"} if self.reference is not None else set()))

    def score(self, batch: Batch, requires: Iterable[str] = ()) -> Batch:
        """Fill in what the policy says before it is updated, and the reference if required; no gradient.

        Raises:
            RequirementError: when `reference` is required and there is none.
        """
        batch = batch.to(self._device)
        own = self._read(self.policy, batch)
        batch = replace(batch, old_logprobs=own.logprobs, old_entropies=own.entropies)
        if "reference" not in requires:
            return batch
        if self.reference is None:
            raise RequirementError("algorithm: requires a reference policy, and the learner was given none")
        return replace(batch, reference_logprobs=self._read(self.reference, batch).logprobs)

    def update(self, batch: Batch, algorithm: Algorithm, context: Context) -> dict[str, float]:
        """Learn from a rollout batch; it is scored first, where that was not done and makes a difference.

        With one optimiser step per batch, the policy that is updated is the one that would be scored: the
        separate pass is left out unless a component reads it.

        Returns:
            What to log: means over the optimiser steps (loss, grad_norm, clip_share, ...) and over the batch
            (entropy_token, entropy_turn, entropy_trajectory, ...). An optimiser step whose loss or gradient
            is not finite is not applied, and counted in `skipped_updates`.
        """
        if batch.old_logprobs is None and (self.config.updates_per_step > 1 or algorithm.reads_scores):
            batch = self.score(batch, algorithm.requires)
        batch = _without_unsampled(batch.to(self._device))
        rollout = MiniBatch(batch, compute_advantages(algorithm, batch, context))
        seen = _nothing(batch)
        steps: list[dict[str, float]] = []
        for epoch in range(self.config.epochs):
            for rows in mini_batches(batch, self.config.mini_batches, context.step, epoch):
                rate = self._set_rate(context, len(steps))
                numbers, outputs = self._step(rollout.select(rows), algorithm, context)
                _store(seen, rows, outputs)
                steps.append(numbers | {"learning_rate": rate})
        if batch.old_logprobs is None:
            batch = replace(batch, old_logprobs=seen.logprobs, old_entropies=seen.entropies)
        skipped = sum("grad_norm" not in numbers for numbers in steps)
        return (
            _means(steps)
            | _batch_numbers(replace(rollout, batch=batch), algorithm, context)
            | {
                "updates": float(len(steps) - skipped),
                "skipped_updates": float(skipped),
            }
        )

    def state_dict(self) -> dict[str, Any]:
        """All but the policy's weights: optimisers, counters, and the reference's weights."""
        return {
            "optimizer": self.config.optimizer,
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "skipped_updates": self.skipped_updates,
            "reference": None if self.reference is None else self.reference.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the state of another learner of the same policy and configuration.

        Raises:
            CheckpointError: when it does not fit.
        """
        found = (state.get("optimizer"), state.get("reference") is not None)
        wanted = (self.config.optimizer, self.reference is not None)
        if found != wanted:
            raise CheckpointError(
                f"learner state: (optimizer, has a reference) is {found}, wanted {wanted}; "
                "resume with the configuration that the run was started with"
            )
        try:
            for optimizer, stored in zip(self._optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(stored)
            if self.reference is not None:
                self.reference.load_state_dict(state["reference"])
            self.skipped_updates = int(state["skipped_updates"])
        except (KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"learner state: does not fit this policy ({error})") from error

    @property
    def _device(self) -> torch.device:
        return next(self.policy.parameters()).device

    def _set_rate(self, context: Context, done: int) -> float:
        per_step = self.config.updates_per_step
        index = context.step * per_step + done
        factor = rate_factor(self.config, index, context.total_steps * per_step)
        set_rates(self._optimizers, factor)
        return self.config.learning_rate * factor

    def _read(self, policy: nn.Module, batch: Batch) -> Outputs:
        outputs = _nothing(batch)
        with torch.no_grad():
            for rows in micro_batches(needed_lengths(batch), self.config.micro_batch_tokens):
                _store(outputs, rows, self.forward.describe(policy, batch.select(rows)))
        return outputs

    def _step(
        self, mini: MiniBatch, algorithm: Algorithm, context: Context
    ) -> tuple[dict[str, float], Outputs]:
        """Take one optimiser step, whatever the number of forward passes it is made of."""
        if "current" in algorithm.requires:
            mini = replace(mini, current=self._read(self.policy, mini.batch))
        objective = build_objective(mini, algorithm, context)
        seen = _nothing(mini.batch)
        sums: dict[str, float] = defaultdict(float)
        for rows in micro_batches(needed_lengths(mini.batch), self.config.micro_batch_tokens):
            outputs = self.forward.describe(self.policy, mini.batch.select(rows))
            loss, numbers = objective.contribution(rows, outputs)
            loss.backward()  # type: ignore[no-untyped-call]
            _store(seen, rows, outputs)
            for name, value in numbers.items():
                sums[name] += float(value)
        return dict(sums) | self._apply(sums["loss"]), seen

    def _apply(self, loss: float) -> dict[str, float]:
        """Step the optimisers and report the gradient's norm, unless something is not finite."""
        limit = self.config.clip_gradient
        norm = float(nn.utils.clip_grad_norm_(self._parameters, math.inf if limit is None else limit))
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            for optimizer in self._optimizers:
                optimizer.step()
        else:
            self.skipped_updates += 1
        self.policy.zero_grad(set_to_none=True)
        return {"grad_norm": norm} if finite else {}


def _nothing(batch: Batch) -> Outputs:
    return Outputs(torch.zeros_like(batch.logprobs), torch.zeros_like(batch.logprobs))


def _store(target: Outputs, rows: Tensor, outputs: Outputs) -> None:
    width = outputs.logprobs.shape[1]
    target.logprobs[rows, :width] = outputs.logprobs.detach().to(target.logprobs)
    target.entropies[rows, :width] = outputs.entropies.detach().to(target.entropies)


def _without_unsampled(batch: Batch) -> Batch:
    """Zero what must not matter, so that no NaN written there can."""
    names = ("logprobs", "entropies", "old_logprobs", "old_entropies", "reference_logprobs")
    cleaned: dict[str, Any] = {
        name: torch.where(batch.sampled, values, 0.0)
        for name in names
        if (values := getattr(batch, name)) is not None
    }
    return replace(batch, **cleaned)


def _batch_numbers(rollout: MiniBatch, algorithm: Algorithm, context: Context) -> dict[str, float]:
    batch = rollout.batch
    entropies = functional.entropy_means(
        given(batch.old_entropies, "old_entropies"), batch.sampled, batch.turns, batch.trajectory
    )
    numbers = {f"entropy_{level}": float(value) for level, value in entropies.items()}
    for diagnostic in algorithm.diagnostics:
        numbers |= diagnostic(rollout, context)
    return numbers | {
        "trajectories": float(len(batch.episodes)),
        "tokens": float(batch.lengths.sum()),
        "decisions": float(batch.sampled.sum()),
    }


def _means(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each number over the optimiser steps that reported it as finite."""
    found: dict[str, list[float]] = defaultdict(list)
    for numbers in steps:
        for name, value in numbers.items():
            if math.isfinite(value):
                found[name].append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}
