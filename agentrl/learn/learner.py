"""The learner: one scoring pass, then optimiser steps."""

import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import Algorithm, ReplayBatch
from agentrl.algorithms.credit import compute_advantages, with_mask, with_targets
from agentrl.algorithms.hooks import Context, MiniBatch, Outputs, require_tensor
from agentrl.data.batch import Batch
from agentrl.data.trajectory import StopReason
from agentrl.errors import CheckpointError, NonFiniteError, RequirementError
from agentrl.learn.forward import Forward, in_bfloat16, needed_lengths
from agentrl.learn.lora import add_adapters, plain_weights
from agentrl.learn.objective import build_objective
from agentrl.learn.optimizer import build_optimizers, rate_factor, set_rates
from agentrl.learn.packing import mini_batches, rank_micro_batches
from agentrl.learn.ranks import ALONE, Ranks
from agentrl.learn.settings import LearnerConfig
from agentrl.learn.sharding import (
    ScoringModule,
    full_tensor,
    own_part,
    read_shards,
    recompute_activations,
    reshard,
    shard,
    write_shards,
)
from agentrl.policy.precision import named_in_short, non_finite

# Where a limit ended an episode that could have gone on, and so could have returned more.
_CUT_SHORT = (StopReason.TRUNCATED, StopReason.TURN_LIMIT, StopReason.CONTEXT_LIMIT)

_WATCHED = 4096  # weights of each parameter that are looked at to see whether they move


def provided(*, reference: bool, critic: bool) -> frozenset[str]:
    """What components of an algorithm may require of a learner with these."""
    own = {"old_logprobs", "entropy", "entropy:grad", "current"}
    if reference:
        own.add("reference")
    if critic:
        own |= {"values", "last_values", "values:grad"}
    return frozenset(own)


@dataclass(frozen=True)
class _Part:
    """Rows that an optimiser step learns from, in their own way."""

    mini: MiniBatch
    algorithm: Algorithm
    coefficient: float = 1.0


class Learner:
    """Improves a policy in place.

    Several ranks hold the same batches and the same masks, weights and denominators; only the work of forward
    and backward passes is dealt out, and what comes of it is summed.

    Args:
        policy: its parameters are updated; those that do not require gradients stay. Under `fsdp` they are
            dealt out to the ranks, and with `lora` others are added: `export` gives them back as they were.
        config: optimiser and batching.
        reference: a frozen policy of the same vocabulary, for algorithms that require `reference`.
        critic: have a value head on the policy's states, for algorithms that require `values`; it says 0 at
            first, and its gradient reaches the policy's own parameters.
        forward: how to read hidden states, and the temperature of sampling; None reads a Hugging Face causal
            language model at temperature 1.
        ranks: that learn together; more than one only under `fsdp`.
    """

    def __init__(
        self,
        policy: nn.Module,
        config: LearnerConfig,
        *,
        reference: nn.Module | None = None,
        critic: bool = False,
        forward: Forward | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.policy = policy
        self.config = config
        self.reference = reference
        self.forward = forward or Forward()
        if config.backend == "single" and config.compute_dtype == "bfloat16":
            self.forward = replace(self.forward, hidden_states=in_bfloat16(self.forward.hidden_states))
        self.ranks = ranks
        self.value_head = self._new_value_head() if critic else None
        if config.lora is not None:
            add_adapters(policy, config.lora)
        self._scoring = ScoringModule(policy, self.value_head)
        self._reference = None if reference is None else ScoringModule(reference)
        if config.recompute_activations:
            recompute_activations(policy)
        if config.backend == "fsdp":
            for module in (self._scoring, self._reference):
                if module is not None:
                    shard(module, config)
        self.skipped_updates = 0
        self._skipped_in_a_row = 0
        self._optimizers = build_optimizers(policy, config, self.value_head)
        self._parameters = [value for value in policy.parameters() if value.requires_grad]
        if self.value_head is not None:
            self._parameters += self.value_head.parameters()

    def _new_value_head(self) -> nn.Linear:
        weight = self.forward.output_weight(self.policy)
        head = nn.Linear(weight.shape[1], 1, device=weight.device, dtype=weight.dtype)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        return head

    @property
    def provides(self) -> frozenset[str]:
        """What components of an algorithm may require of this learner."""
        return provided(reference=self.reference is not None, critic=self.value_head is not None)

    def score(self, batch: Batch, requires: Collection[str] = ()) -> Batch:
        """Fill in what the policy says before it is updated, and what else is required; no gradient.

        Raises:
            RequirementError: when `reference` is required and there is none.
        """
        batch = batch.to(self._device)
        own = self._read(self._scoring, batch)
        batch = replace(batch, old_logprobs=own.logprobs, old_entropies=own.entropies, values=own.values)
        if "last_values" in requires:
            batch = replace(batch, last_values=self._last_values(batch))
        if "reference" not in requires:
            return batch
        if self._reference is None:
            raise RequirementError("algorithm: requires a reference policy, and the learner was given none")
        return replace(batch, reference_logprobs=self._read(self._reference, batch).logprobs)

    def update(self, batch: Batch, algorithm: Algorithm, context: Context) -> dict[str, float]:
        """Learn from a rollout batch; it is scored first, where that was not done and makes a difference.

        With one optimiser step per batch, the policy that is updated is the one that would be scored: the
        separate pass is left out unless a component reads it.

        Returns:
            What to log: means over the optimiser steps (loss, grad_norm, clip_share, ...) and over the batch
            (entropy_token, entropy_turn, entropy_trajectory, ...). An optimiser step whose loss or gradient
            is not finite is not applied, and counted in `skipped_updates`. `weights_moved` is the share of
            the weights with a gradient that an optimiser step changed: the rest of it was rounded away.

        Raises:
            NonFiniteError: after `max_skipped_updates` of those in a row, or when an optimiser step left
                weights or states that are not finite; `non_finite` then names them.
        """
        scored = batch.old_logprobs is None and (self.config.updates_per_step > 1 or algorithm.reads_scores)
        if scored:
            batch = self.score(batch, algorithm.requires)
        batch = with_targets(algorithm, _without_unsampled(batch.to(self._device)), context)
        rollout = MiniBatch(batch, compute_advantages(algorithm, batch, context))
        rehearsal = None if algorithm.replay is None else algorithm.replay.sample(context)
        seen = _nothing(batch)
        steps: list[dict[str, float]] = []
        for epoch in range(self.config.epochs):
            parts = list(mini_batches(batch, self.config.mini_batches, context.step, epoch))
            mixed = rehearsal is not None and rehearsal.mixed
            more = self._deal_out(rehearsal, len(parts), context, epoch) if rehearsal and mixed else []
            for index, rows in enumerate(parts):
                rate = self._set_rate(context, len(steps))
                mini = rollout.select(rows)
                if scored and not steps:  # nothing has changed since the scoring pass
                    mini = replace(mini, current=_scores(mini.batch))
                numbers, outputs = self._step(_Part(mini, algorithm), more[index : index + 1], context)
                _store(seen, rows, outputs)
                if numbers:
                    steps.append(numbers | {"learning_rate": rate})
        rehearsed = self._rehearse(rehearsal, context) if rehearsal and not rehearsal.mixed else []
        if batch.old_logprobs is None:
            batch = replace(batch, old_logprobs=seen.logprobs, old_entropies=seen.entropies)
        rollout = with_mask(algorithm, replace(rollout, batch=batch), context)
        replayed: dict[str, float] = {}
        if algorithm.replay is not None:
            algorithm.replay.add(rollout, context)
            replayed = {**_means(rehearsed), **algorithm.replay.metrics()}
        everything = steps + rehearsed
        skipped = sum("grad_norm" not in numbers for numbers in everything)
        return (
            _means(steps)
            | _batch_numbers(rollout, algorithm, context)
            | {f"replay/{name}": value for name, value in replayed.items()}
            | {
                "updates": float(len(everything) - skipped),
                "skipped_updates": float(skipped),
            }
        )

    def _deal_out(self, rehearsal: ReplayBatch, count: int, context: Context, epoch: int) -> list[_Part]:
        """Deal what is rehearsed out to so many optimiser steps."""
        batch = rehearsal.batch.to(self._device)
        everything = MiniBatch(batch, rehearsal.advantages.to(self._device))
        return [
            _Part(everything.select(rows), rehearsal.algorithm, rehearsal.coefficient)
            for rows in mini_batches(batch, count, context.step, epoch)
        ]

    def _rehearse(self, rehearsal: ReplayBatch, context: Context) -> list[dict[str, float]]:
        """Take optimiser steps on what is rehearsed alone, at the rate of the last one."""
        parts = self._deal_out(rehearsal, self.config.mini_batches, context, self.config.epochs)
        taken = [self._step(part, [], context)[0] for part in parts]
        return [numbers for numbers in taken if numbers]

    def non_finite(self) -> list[str]:
        """Return the names of weights and states that hold nan or inf; all ranks ask together."""
        found = self.ranks.gather(non_finite(self._own_parts()))
        return list(dict.fromkeys(name for names in found for name in names))

    def export(self, model: nn.Module) -> None:
        """Copy the weights into a model of the policy's shape, one at a time; all ranks do it together.

        They are rounded to the numbers of that model. Nothing is to be done where it is the policy itself.
        """
        if model is self.policy:
            return
        targets = dict(model.named_parameters())
        with torch.no_grad():
            for name, values in plain_weights(self.policy):
                targets[name].copy_(values)

    def state_dict(self) -> dict[str, Any]:
        """All but the policy's weights: optimisers, counters, reference and value head.

        Under `fsdp` without what is dealt out to the ranks; `write_shards` writes that.
        """
        sharded = self.config.backend == "fsdp"
        parts = {"reference": self.reference, "value_head": self.value_head}
        return {
            "optimizer": self.config.optimizer,
            "optimizers": [{} if sharded else optimizer.state_dict() for optimizer in self._optimizers],
            "stepped": [bool(optimizer.state) for optimizer in self._optimizers],
            "skipped_updates": self.skipped_updates,
            "skipped_in_a_row": self._skipped_in_a_row,
        } | {
            name: None if part is None else {} if sharded else part.state_dict()
            for name, part in parts.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the state of another learner of the same policy and configuration.

        Raises:
            CheckpointError: when it does not fit.
        """
        parts = (self.reference, self.value_head)
        found = (
            state.get("optimizer"),
            *(state.get(name) is not None for name in ("reference", "value_head")),
        )
        wanted = (self.config.optimizer, *(part is not None for part in parts))
        if found != wanted:
            raise CheckpointError(
                f"learner state: (optimizer, has a reference, has a value head) is {found}, wanted {wanted}; "
                "resume with the configuration that the run was started with"
            )
        try:
            if self.config.backend == "single":
                for optimizer, stored in zip(self._optimizers, state["optimizers"], strict=True):
                    optimizer.load_state_dict(stored)
                if self.reference is not None:
                    self.reference.load_state_dict(state["reference"])
                if self.value_head is not None:
                    self.value_head.load_state_dict(state["value_head"])
            self.skipped_updates = int(state["skipped_updates"])
            self._skipped_in_a_row = int(state["skipped_in_a_row"])
        except (KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"learner state: does not fit this policy ({error})") from error

    def write_shards(self, folder: Path) -> None:
        """Write the weights and all else that is dealt out; every rank must. See `read_shards`."""
        write_shards(folder, self._dealt(), [optimizer for optimizer in self._optimizers if optimizer.state])

    def read_shards(self, folder: Path, state: Mapping[str, Any]) -> None:
        """Take up what any number of ranks wrote, and the `state_dict` that goes with it.

        Raises:
            CheckpointError: when it does not fit.
        """
        self.load_state_dict(state)
        stepped = [
            optimizer for optimizer, had in zip(self._optimizers, state["stepped"], strict=True) if had
        ]
        read_shards(folder, self._dealt(), stepped)

    def _dealt(self) -> dict[str, nn.Module]:
        modules: dict[str, nn.Module] = {"learned": self._scoring}
        return modules if self._reference is None else modules | {"reference": self._reference}

    @property
    def _device(self) -> torch.device:
        return next(self.policy.parameters()).device

    def _set_rate(self, context: Context, done: int) -> float:
        per_step = self.config.updates_per_step
        index = context.step * per_step + done
        factor = rate_factor(self.config, index, context.total_steps * per_step)
        set_rates(self._optimizers, factor)
        return self.config.learning_rate * factor

    def _read(self, module: ScoringModule, batch: Batch) -> Outputs:
        outputs = _nothing(batch, values=module.value_head is not None)
        with torch.no_grad():
            for rows, weight in self._micro_batches(needed_lengths(batch)):
                found = self._describe(module, batch.select(rows))
                if weight:
                    _store(outputs, rows, found)
        reshard(module)
        return self._combined(outputs)

    def _describe(self, module: ScoringModule, part: Batch) -> Outputs:
        def read(policy: nn.Module, head: nn.Module | None) -> tuple[Tensor | None, ...]:
            found = self.forward.describe(policy, part, head)
            return found.logprobs, found.entropies, found.values

        return Outputs(*module(read))

    def _micro_batches(self, lengths: Tensor) -> list[tuple[Tensor, float]]:
        return rank_micro_batches(lengths, self.config.micro_batch_tokens, self.ranks)

    def _combined(self, outputs: Outputs) -> Outputs:
        """What the ranks read, each of its own rows and 0 elsewhere."""
        for values in (outputs.logprobs, outputs.entropies, outputs.values):
            if values is not None:
                self.ranks.total(values)
        return outputs

    def _last_values(self, batch: Batch) -> Tensor:
        """Value after the last reply of trajectories that a limit cut short, else 0; [E]."""
        values = torch.zeros(len(batch.episodes), dtype=batch.logprobs.dtype, device=self._device)
        latest = batch.turns.amax(dim=1) if batch.turns.numel() else batch.lengths
        ends: dict[int, int] = {}
        for row, owner in enumerate(batch.trajectory.tolist()):
            cut_short = batch.episodes[owner].stop in _CUT_SHORT
            if cut_short and (owner not in ends or latest[row] > latest[ends[owner]]):
                ends[owner] = row
        lengths = torch.zeros_like(batch.lengths)
        lengths[list(ends.values())] = batch.lengths[list(ends.values())]
        with torch.no_grad():
            for rows, weight in self._micro_batches(lengths):
                part = batch.select(rows)
                found = self._scoring(partial(self._last_values_of, part))
                if weight:
                    values[part.trajectory] = found.to(values)
        reshard(self._scoring)
        return self.ranks.total(values)

    def _last_values_of(self, part: Batch, policy: nn.Module, head: nn.Module | None) -> Tensor:
        assert head is not None
        return self.forward.last_values(policy, part, head)

    def _step(self, part: _Part, more: Sequence[_Part], context: Context) -> tuple[dict[str, float], Outputs]:
        """Take one optimiser step, whatever the number of forward passes it is made of.

        Returns:
            The numbers and outputs of `part`; those of `more` only add to the gradient. No numbers where
            there was nothing to learn from, and so no step: momentum alone would move the weights.
        """
        found = [self._accumulate(each, context) for each in (part, *more)]
        losses = [sums["loss"] for sums, _ in found if sums]
        numbers, seen = found[0]
        return ({**numbers, **self._apply(sum(losses))} if losses else {}), seen

    def _accumulate(self, part: _Part, context: Context) -> tuple[dict[str, float], Outputs]:
        """Add the gradient of a part's loss to what there is."""
        mini = part.mini
        if "current" in part.algorithm.requires and mini.current is None:
            mini = replace(mini, current=self._read(self._scoring, mini.batch))
        objective = build_objective(mini, part.algorithm, context)
        seen = _nothing(mini.batch)
        if not objective.has_signal:
            unread = mini.batch.old_logprobs is None
            return {}, self._read(self._scoring, mini.batch) if unread else seen
        sums = defaultdict[str, float](float, loss=0.0)
        for rows, weight in self._micro_batches(needed_lengths(mini.batch)):
            outputs = self._describe(self._scoring, mini.batch.select(rows))
            loss, numbers = objective.contribution(rows, outputs)
            (loss * (weight * part.coefficient)).backward()  # type: ignore[no-untyped-call]
            if weight:
                _store(seen, rows, outputs)
            for name, value in numbers.items():
                sums[name] += weight * float(value)
        return self.ranks.totals(sums), self._combined(seen)

    def _apply(self, loss: float) -> dict[str, float]:
        """Step the optimisers and report the gradient's norm, unless something is not finite."""
        limit = math.inf if self.config.clip_gradient is None else self.config.clip_gradient
        norm = float(full_tensor(nn.utils.clip_grad_norm_(self._parameters, limit)))
        finite = math.isfinite(loss) and math.isfinite(norm)
        numbers = {"grad_norm": norm, **self._take_step()} if finite else {}
        for parameter in self._parameters:
            parameter.grad = None
        self._skipped_in_a_row = 0 if finite else self._skipped_in_a_row + 1
        self.skipped_updates += not finite
        if self._skipped_in_a_row >= self.config.max_skipped_updates:
            raise NonFiniteError(
                f"{self._skipped_in_a_row} optimiser steps in a row had a loss or gradient that is not "
                f"finite (the last: loss {loss}, gradient norm {norm}); the weights are those before them"
            )
        return numbers

    def _take_step(self) -> dict[str, float]:
        """Step the optimisers and look at what came of it: all of it for nan and inf, a sample for moves."""
        watched = [(value, *_sample(value)) for value in self._parameters if value.grad is not None]
        for optimizer in self._optimizers:
            optimizer.step()
        counts = [
            step * torch.stack((pushed.sum(), (pushed & (before != _every(value, step))).sum()))
            for value, step, before, pushed in watched
        ]
        pushed, moved = torch.stack(counts).sum(0).tolist() if counts else (0, 0)
        lost = bool(non_finite(self._own_parts(changed=True)))
        sums = self.ranks.totals({"lost": float(lost), "pushed": float(pushed), "moved": float(moved)})
        if sums["lost"]:
            rates = {group["lr"] for optimizer in self._optimizers for group in optimizer.param_groups}
            raise NonFiniteError(
                "an optimiser step whose loss and gradient were finite left nan or inf in "
                f"{named_in_short(self.non_finite())} at a learning rate of "
                f"{' and '.join(f'{rate:.3g}' for rate in sorted(rates))}; these weights are not kept"
            )
        return {"weights_moved": sums["moved"] / sums["pushed"]} if sums["pushed"] else {}

    def _own_parts(self, *, changed: bool = False) -> Iterator[tuple[str, Tensor]]:
        """What this rank holds, by name; `changed` leaves out what no optimiser step changes."""
        head, reference = self.value_head, self.reference
        names: dict[Tensor, str] = {value: name for name, value in self.policy.named_parameters()}
        if head is not None:
            names |= {value: f"value_head.{name}" for name, value in head.named_parameters()}
        if reference is not None and not changed:
            names |= {value: f"reference.{name}" for name, value in reference.named_parameters()}
        for value, name in names.items():
            if value.requires_grad or not changed:
                yield name, own_part(value.detach())
        for optimizer in self._optimizers:
            for parameter, state in optimizer.state.items():
                for key, value in state.items():
                    if isinstance(value, Tensor):
                        yield f"{key} of {names[parameter]}", own_part(value)


def _sample(parameter: nn.Parameter) -> tuple[int, Tensor, Tensor]:
    """Take every so many weights of a parameter: how many, the weights, and which of them have a gradient."""
    step = max(1, own_part(parameter).numel() // _WATCHED)
    return step, _every(parameter, step).clone(), _every(require_tensor(parameter.grad, "grad"), step) != 0


def _every(values: Tensor, step: int) -> Tensor:
    return own_part(values.detach()).reshape(-1)[::step]


def _nothing(batch: Batch, *, values: bool = False) -> Outputs:
    fields = [torch.zeros_like(batch.logprobs) for _ in range(3 if values else 2)]
    return Outputs(*fields)


def _scores(batch: Batch) -> Outputs:
    """What the scoring pass said, as the outputs of the policy that is still the same."""
    return Outputs(
        require_tensor(batch.old_logprobs, "old_logprobs"),
        require_tensor(batch.old_entropies, "old_entropies"),
        batch.values,
    )


def _store(target: Outputs, rows: Tensor, outputs: Outputs) -> None:
    width = outputs.logprobs.shape[1]
    for name in ("logprobs", "entropies", "values"):
        kept, found = getattr(target, name), getattr(outputs, name)
        if kept is not None and found is not None:
            kept[rows, :width] = found.detach().to(kept)


def _without_unsampled(batch: Batch) -> Batch:
    """Zero what must not matter, so that no NaN written there can."""
    names = ("logprobs", "entropies", "old_logprobs", "old_entropies", "reference_logprobs", "values")
    cleaned: dict[str, Any] = {
        name: torch.where(batch.sampled, values, 0.0)
        for name in names
        if (values := getattr(batch, name)) is not None
    }
    return replace(batch, **cleaned)


def _batch_numbers(rollout: MiniBatch, algorithm: Algorithm, context: Context) -> dict[str, float]:
    batch = rollout.batch
    entropies = functional.entropy_means(
        require_tensor(batch.old_entropies, "old_entropies"), batch.sampled, batch.turns, batch.trajectory
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
