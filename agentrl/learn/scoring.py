"""Forward passes over a batch: log-probabilities, entropies and values of its action tokens."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from agentrl.algorithms.hooks import Outputs, require_tensor
from agentrl.algorithms.observation_view import OBSERVATION_KL
from agentrl.algorithms.token_statistics import NOTHING, Statistics, empty_extras
from agentrl.data.batch import Batch
from agentrl.data.trajectory import StopReason
from agentrl.learn.forward import Forward, needed_lengths
from agentrl.learn.packing import rank_micro_batches
from agentrl.learn.ranks import Ranks
from agentrl.learn.sharding import ScoringModule, reshard
from agentrl.learn.teacher import Teacher
from agentrl.learn.views import ViewRows

# Stop reasons after which an episode could have gone on and returned more.
_TRUNCATING = (StopReason.TRUNCATED, StopReason.TURN_LIMIT, StopReason.CONTEXT_LIMIT)


@dataclass(frozen=True)
class Scorer:
    """Scorer of batches in micro-batches, which it splits over the ranks.

    Args:
        forward: How to read the policy.
        micro_batch_tokens: The largest number of tokens in a forward pass.
        ranks: The ranks that share the work. All of them must make the same calls.
        teacher: What statistics compare the policy with, if there is a teacher.
    """

    forward: Forward
    micro_batch_tokens: int
    ranks: Ranks
    teacher: Teacher | None = None

    def micro_batches(self, lengths: Tensor) -> list[tuple[Tensor, float]]:
        """Return this rank's micro-batches as (row numbers, weight); see `rank_micro_batches`."""
        return rank_micro_batches(lengths, self.micro_batch_tokens, self.ranks)

    def score_rows(
        self,
        module: ScoringModule,
        rows: Batch,
        statistics: Statistics = NOTHING,
        view: ViewRows | None = None,
    ) -> Outputs:
        """Score one micro-batch, with gradients where they are enabled."""
        shown = self.teacher.show(rows) if statistics.of_teacher and self.teacher is not None else None

        def read(policy: nn.Module, head: nn.Module | None) -> tuple[Tensor | None, ...]:
            # FSDP2 finds tensors that need a gradient in a tuple, not in a dataclass.
            found = self.forward.score(policy, rows, head, statistics, view, shown)
            return found.logprobs, found.entropies, found.values, *found.extras.values()

        logprobs, entropies, values, *extras = module(read)
        names = (*statistics.of_pass, *([] if view is None else [OBSERVATION_KL]))
        named = dict(zip(names, extras, strict=True))
        return with_sequence_statistics(Outputs(logprobs, entropies, values, extras=named), rows, statistics)

    def score(
        self,
        module: ScoringModule,
        batch: Batch,
        statistics: Statistics = NOTHING,
        view: ViewRows | None = None,
    ) -> Outputs:
        """Score a batch without gradients, and its rows as a view shows them; every rank returns all rows."""
        own = replace(statistics, of_logprobs={})  # a sequence may have rows in several micro-batches
        outputs = empty_outputs(batch, values=module.value_head is not None)
        outputs = replace(outputs, extras=empty_extras(own, outputs.logprobs))
        lengths = needed_lengths(batch)
        if view is not None:
            outputs = replace(
                outputs, extras={**outputs.extras, OBSERVATION_KL: torch.zeros_like(batch.logprobs)}
            )
            # The two are read one after the other, so a micro-batch has room for the longer one.
            lengths = torch.maximum(lengths, view.lengths)
        with torch.no_grad():
            for rows, weight in self.micro_batches(lengths):
                part = None if view is None else view.select(rows)
                found = self.score_rows(module, batch.select(rows), own, part)
                if weight:  # a filler's rows belong to another rank
                    write_rows(outputs, rows, found)
        reshard(module)
        self.release_teacher()
        return with_sequence_statistics(self.sum_over_ranks(outputs), batch, statistics)

    def teacher_logprobs(self, batch: Batch) -> Tensor | None:
        """Return the teacher's log-probabilities of the action tokens; [B, T], None without a teacher."""
        if self.teacher is None:
            return None
        outputs = empty_outputs(batch)
        for rows, weight in self.micro_batches(needed_lengths(batch)):
            found = self.teacher.score(batch.select(rows))
            if weight:
                write_rows(outputs, rows, found)
        self.release_teacher()
        return self.sum_over_ranks(outputs).logprobs

    def release_teacher(self) -> None:
        """Free what reading the teacher has gathered, after a backward pass that needs it."""
        if self.teacher is not None:
            self.teacher.release()

    def last_values(self, module: ScoringModule, batch: Batch) -> Tensor:
        """Return the value after the last reply of each truncated trajectory, 0 for the others; [E]."""
        values = torch.zeros(len(batch.episodes), dtype=batch.logprobs.dtype, device=batch.logprobs.device)
        lengths = _last_row_lengths(batch)
        with torch.no_grad():
            for rows, weight in self.micro_batches(lengths):
                part = batch.select(rows)
                found = module(partial(self._last_values_of, part))
                if weight:
                    values[part.trajectory] = found.to(values)
        reshard(module)
        return self.ranks.all_reduce(values)

    def _last_values_of(self, part: Batch, policy: nn.Module, head: nn.Module | None) -> Tensor:
        assert head is not None
        return self.forward.last_values(policy, part, head)

    def sum_over_ranks(self, outputs: Outputs) -> Outputs:
        """Merge what the ranks scored, in place: each holds its own rows and 0 elsewhere."""
        for values in (outputs.logprobs, outputs.entropies, outputs.values, *outputs.extras.values()):
            if values is not None:
                self.ranks.all_reduce(values)
        return outputs


def _last_row_lengths(batch: Batch) -> Tensor:
    """Return the length of each truncated trajectory's last row, 0 for all other rows; [B]."""
    latest = batch.turns.amax(dim=1) if batch.turns.numel() else batch.lengths
    ends: dict[int, int] = {}
    for row, owner in enumerate(batch.trajectory.tolist()):
        truncated = batch.episodes[owner].stop in _TRUNCATING
        if truncated and (owner not in ends or latest[row] > latest[ends[owner]]):
            ends[owner] = row
    lengths = torch.zeros_like(batch.lengths)  # rows of length 0 are in no micro-batch
    lengths[list(ends.values())] = batch.lengths[list(ends.values())]
    return lengths


def empty_outputs(batch: Batch, *, values: bool = False) -> Outputs:
    """Return outputs of zeros for all rows of a batch."""
    logprobs, entropies = torch.zeros_like(batch.logprobs), torch.zeros_like(batch.logprobs)
    return Outputs(logprobs, entropies, torch.zeros_like(batch.logprobs) if values else None)


def scored_outputs(batch: Batch) -> Outputs:
    """Return the results of the scoring pass as outputs of the policy, which has not changed since."""
    return Outputs(
        require_tensor(batch.old_logprobs, "old_logprobs"),
        require_tensor(batch.old_entropies, "old_entropies"),
        batch.values,
        extras=batch.extras,
    )


def with_sequence_statistics(outputs: Outputs, batch: Batch, statistics: Statistics) -> Outputs:
    """Return outputs with those statistics that are functions of their log-probabilities."""
    found = {name: function(outputs.logprobs, batch) for name, function in statistics.of_logprobs.items()}
    return replace(outputs, extras={**outputs.extras, **found}) if found else outputs


def write_rows(target: Outputs, rows: Tensor, outputs: Outputs) -> None:
    """Write the outputs of some rows into those of the batch, in place and without gradient."""
    width = outputs.logprobs.shape[1]
    for name in ("logprobs", "entropies", "values"):
        kept, found = getattr(target, name), getattr(outputs, name)
        if kept is not None and found is not None:
            kept[rows, :width] = found.detach().to(kept)
    for name, kept in target.extras.items():
        kept[rows, :width] = outputs.extras[name].detach().to(kept)


def zero_unsampled(batch: Batch) -> Batch:
    """Zero the statistics of tokens that were not sampled, so that a NaN among them reaches no sum."""
    names = (
        *("logprobs", "entropies", "old_logprobs", "old_entropies"),
        *("reference_logprobs", "teacher_logprobs", "values"),
    )
    cleaned: dict[str, Any] = {
        name: torch.where(batch.action_mask, values, 0.0)
        for name in names
        if (values := getattr(batch, name)) is not None
    }
    extras = {
        name: torch.where(batch.action_mask.view(*batch.tokens.shape, *[1] * (values.dim() - 2)), values, 0.0)
        for name, values in batch.extras.items()
    }
    return replace(batch, extras=extras, **cleaned)
