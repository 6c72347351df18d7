"""The learner's part of a reward model: its weights and optimiser, one step on a batch, and their storage."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from agentrl.algorithms.hooks import Context
from agentrl.algorithms.reward_model import RewardModel
from agentrl.data.batch import Batch
from agentrl.errors import CheckpointError, ConfigError, NonFiniteError
from agentrl.learn.allocator import LARGE_HEAP, return_freed_memory
from agentrl.learn.forward import needed_lengths
from agentrl.learn.ranks import Ranks
from agentrl.learn.scoring import Scorer
from agentrl.learn.settings import LearnerConfig
from agentrl.learn.sharding import (
    ScoringModule,
    full_tensor,
    local_tensor,
    read_shards,
    recompute_activations,
    shard,
    write_shards,
)
from agentrl.policy.precision import named_in_short, non_finite

_NAME = "reward_model"


class RewardLearner:
    """Trainer of the model that `Algorithm.reward_model` asks for.

    All of its weights are trained. Under `fsdp` they are sharded as the policy's are.

    Args:
        model: The model, a copy of the policy before its training.
        config: The learner's configuration.

    Attributes:
        model: The model.
    """

    def __init__(self, model: nn.Module, config: LearnerConfig) -> None:
        if config.lora is not None:
            raise ConfigError(
                "learner.lora trains adapters, and the algorithm's reward model trains all of its weights, "
                "wanted learner.lora=null"
            )
        self.model = model.requires_grad_(True)
        self._sharded = config.backend == "fsdp"
        self._module = ScoringModule(model)
        if config.recompute_activations:
            recompute_activations(model)
        if self._sharded:
            shard(self._module, config)
        # The learning rate is that of the algorithm, set before each step.
        self._optimizer = AdamW(model.parameters(), weight_decay=0.0)
        self._most_skipped, self._skipped_in_a_row = config.max_skipped_updates, 0

    def train_and_score(
        self, batch: Batch, settings: RewardModel, context: Context, scorer: Scorer
    ) -> tuple[Batch, dict[str, float]]:
        """Take one step on a rollout batch, then fill in its `reward_logprobs`; every rank must call it.

        Returns:
            The batch, and the numbers to log: loss and gradient norm before the step. Without an action token
            there is no step. A step whose loss or gradient is not finite is not applied.

        Raises:
            NonFiniteError: After `max_skipped_updates` skipped steps in a row, or if the step left weights or
                optimiser states that are not finite.
        """
        before = scorer.score(self._module, batch).logprobs
        if not bool(batch.action_mask.any()):
            return replace(batch, reward_logprobs=before), {}
        loss, slopes = _slopes(before, batch, settings, context)
        # Exact for any split of the rows: the loss is differentiated by the tokens of the whole batch.
        for rows, weight in scorer.micro_batches(needed_lengths(batch)):
            found = scorer.score_rows(self._module, batch.select(rows)).logprobs
            part = slopes[rows, : found.shape[1]].to(found)
            ((part * found).sum() * weight).backward()  # type: ignore[no-untyped-call]
            return_freed_memory(above=LARGE_HEAP)
        numbers = self._step(loss, settings, scorer)
        return replace(batch, reward_logprobs=scorer.score(self._module, batch).logprobs), numbers

    def _step(self, loss: float, settings: RewardModel, scorer: Scorer) -> dict[str, float]:
        norm = float(
            full_tensor(nn.utils.clip_grad_norm_(list(self.model.parameters()), settings.clip_gradient))
        )
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            for group in self._optimizer.param_groups:
                group["lr"] = settings.learning_rate
            self._optimizer.step()
        self._optimizer.zero_grad()
        self._skipped_in_a_row = 0 if finite else self._skipped_in_a_row + 1
        if self._skipped_in_a_row >= self._most_skipped:
            raise NonFiniteError(
                f"{self._skipped_in_a_row} steps of the reward model in a row had a loss or gradient that is "
                f"not finite (the last: loss {loss}, gradient norm {norm}); its weights are those before them"
            )
        # All ranks must stop together.
        if lost := self.non_finite(scorer.ranks):
            raise NonFiniteError(
                f"a step of the reward model left nan or inf in {named_in_short(lost)} at a learning rate of "
                f"{settings.learning_rate:.3g}; these weights are not kept"
            )
        return (
            {"reward_model/loss": loss, "reward_model/grad_norm": norm}
            if finite
            else {"reward_model/skipped": 1.0}
        )

    def non_finite(self, ranks: Ranks) -> list[str]:
        """Return the names of weights and states that hold nan or inf; every rank must call it."""
        found = ranks.gather(non_finite(self._local_tensors()))
        return list(dict.fromkeys(name for names in found for name in names))

    def _local_tensors(self) -> Iterator[tuple[str, Tensor]]:
        named = self.model.named_parameters()
        names: dict[Tensor, str] = {value: f"{_NAME}.{name}" for name, value in named}
        for value, name in names.items():
            yield name, local_tensor(value.detach())
        for parameter, state in self._optimizer.state.items():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    yield f"{key} of {names[parameter]}", local_tensor(value)

    def state_dict(self) -> dict[str, Any]:
        """Return the optimiser's state; under `fsdp` it is in the shards, and this says if there is any."""
        return {
            "stepped": bool(self._optimizer.state),
            "optimizer": None if self._sharded else self._optimizer.state_dict(),
            "skipped_in_a_row": self._skipped_in_a_row,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._skipped_in_a_row = int(state["skipped_in_a_row"])
        if not self._sharded:
            self._optimizer.load_state_dict(state["optimizer"])

    def write_shards(self, folder: Path) -> None:
        """Write this rank's part of weights and optimiser; every rank must call it."""
        write_shards(folder, {_NAME: self._module}, [self._optimizer] if self._optimizer.state else [])

    def read_shards(self, folder: Path, state: Mapping[str, Any]) -> None:
        """Restore what any number of ranks wrote of the learner with this `state_dict`."""
        read_shards(folder, {_NAME: self._module}, [self._optimizer] if state["stepped"] else [])


def check_presence(learner: RewardLearner | None, state: Mapping[str, Any]) -> None:
    """Refuse the state of a learner with a reward model for one without, and the other way round.

    Raises:
        CheckpointError: If they differ.
    """
    stored = state.get(_NAME) is not None
    if stored != (learner is not None):
        raise CheckpointError(
            f"learner state: it has {'a' if stored else 'no'} reward model, wanted "
            f"{'none' if stored else 'one'}; resume with the configuration that the run was started with"
        )


def _slopes(logprobs: Tensor, batch: Batch, settings: RewardModel, context: Context) -> tuple[float, Tensor]:
    """Return the loss and its derivative by the log-probability of each action token, [B, T] float64."""
    current = logprobs.double().requires_grad_(True)
    with torch.enable_grad():
        loss = settings.loss(current, batch, context)
        if loss.dim():
            raise ValueError(
                f"algorithm.reward_model returned a loss of shape {tuple(loss.shape)}, wanted a number"
            )
        (slopes,) = torch.autograd.grad(loss + 0 * current.sum(), current)
    return float(loss.detach()), torch.where(batch.action_mask, slopes, 0.0)
