"""The learner: one scoring pass over a rollout batch, then optimiser steps."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from agentrl.algorithms.algorithm import AFTER_UPDATE, LOSS_SLOTS, Algorithm, ReplayBatch
from agentrl.algorithms.credit import compute_advantages, with_mask, with_targets
from agentrl.algorithms.hooks import Context, MiniBatch, Outputs, require_tensor
from agentrl.algorithms.named_features import with_features, with_mini_batch_features
from agentrl.algorithms.observation_view import OBSERVATION_KL, ObservationView
from agentrl.algorithms.token_statistics import STATISTICS, TEACHER, reads_teacher, scored_statistics
from agentrl.data.batch import Batch, collate
from agentrl.data.trajectory import Episode, Group
from agentrl.errors import RequirementError
from agentrl.learn.allocator import return_freed_memory
from agentrl.learn.diagnostics import batch_metrics, diagnose, step_counts, step_means
from agentrl.learn.forward import Forward, in_bfloat16
from agentrl.learn.lora import adapter_weights, add_adapters, base_weights, merged_weights
from agentrl.learn.optimizer import build_optimizers, rate_factor, set_rates
from agentrl.learn.packing import mini_batches
from agentrl.learn.ranks import ALONE, Ranks
from agentrl.learn.reward_model import RewardLearner, check_presence
from agentrl.learn.scoring import Scorer, empty_outputs, scored_outputs, write_rows, zero_unsampled
from agentrl.learn.settings import LearnerConfig
from agentrl.learn.sharding import ScoringModule, recompute_activations, shard
from agentrl.learn.state import LearnerState
from agentrl.learn.step import LossPart, optimizer_step
from agentrl.learn.teacher import Teacher
from agentrl.learn.views import PerturbFactory, ViewRows, view_rows
from agentrl.policy.engine import Adapter

_Numbers = dict[str, float]


def provided(
    *,
    reference: bool,
    critic: bool,
    teacher: bool = False,
    reward_model: bool = False,
    views: bool = False,
) -> frozenset[str]:
    """Return what components of an algorithm may require of a learner with these parts."""
    own = {"old_logprobs", "entropy", "entropy:grad", "current", STATISTICS}
    if reference:
        own.add("reference")
    if teacher:
        own.add(TEACHER)
    if critic:
        own |= {"values", "last_values", "values:grad"}
    if views:
        own.add("observation_kl")
    if reward_model:
        own.add("reward_model")
    return frozenset(own)


class Learner:
    """Learner that improves a policy in place.

    Several ranks hold the same batches and the same masks, weights and denominators. Only the forward and
    backward passes are split over the ranks, and their results are summed.

    Args:
        policy: The model to train. Parameters that do not require gradients keep their values. Under `fsdp`
            its parameters are sharded over the ranks, and with `lora` adapters are added; `export` returns
            the weights in their original form.
        config: The optimiser and batching.
        reference: A frozen policy of the same vocabulary, for algorithms that require `reference`.
        critic: Whether to add a value head on the policy's states, for algorithms that require `values`. Its
            output is 0 at first, and its gradient reaches the policy's own parameters.
        teacher: A frozen model of the same vocabulary, for algorithms that require `teacher`.
        reward_model: A copy of the policy to train as `Algorithm.reward_model`, for algorithms with one.
        forward: How to read hidden states; None reads a Hugging Face causal language model.
        ranks: The ranks that learn together; more than one only under `fsdp`.
        perturb: Makes the change of observations that `Algorithm.view` asks for, for algorithms that require
            `observation_kl`.
        longest: The largest number of tokens of a row with a changed observation; None for no limit.
    """

    def __init__(
        self,
        policy: nn.Module,
        config: LearnerConfig,
        *,
        reference: nn.Module | None = None,
        teacher: nn.Module | None = None,
        critic: bool = False,
        reward_model: nn.Module | None = None,
        forward: Forward | None = None,
        ranks: Ranks = ALONE,
        perturb: PerturbFactory | None = None,
        longest: int | None = None,
    ) -> None:
        self.policy = policy
        self.config = config
        self.reference = reference
        self.forward = plain = forward or Forward()
        # Under fsdp the mixed-precision policy of the shards rounds instead.
        if config.backend == "single" and config.compute_dtype == "bfloat16":
            self.forward = replace(self.forward, hidden_states=in_bfloat16(self.forward.hidden_states))
        self.ranks = ranks
        self.perturb, self.longest = perturb, longest
        self.value_head = self._new_value_head() if critic else None
        if config.lora is not None:  # before sharding, so that the adapters are sharded too
            add_adapters(policy, config.lora)
        learned = ScoringModule(policy, self.value_head)
        frozen, taught = (None if each is None else ScoringModule(each) for each in (reference, teacher))
        if config.recompute_activations:
            recompute_activations(policy)
        if config.backend == "fsdp":
            for module in (learned, frozen, taught):
                if module is not None:
                    shard(module, config)
        # Sharding replaces the parameters, so the optimisers are built after it.
        optimizers = build_optimizers(policy, config, self.value_head)
        self._state = LearnerState(config, learned, frozen, optimizers, ranks)
        assert config.micro_batch_tokens is not None, "a session chooses the tokens of a pass"
        self._reward_learner = None if reward_model is None else RewardLearner(reward_model, config)
        self._scorer = Scorer(self.forward, config.micro_batch_tokens, ranks, self._teacher(taught, plain))

    def _new_value_head(self) -> nn.Linear:
        weight = self.forward.output_weight(self.policy)
        head = nn.Linear(weight.shape[1], 1, device=weight.device, dtype=weight.dtype)
        # Random values would add noise to the first advantages.
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        return head

    def _teacher(self, module: ScoringModule | None, plain: Forward) -> Teacher | None:
        if module is None:
            return None
        module.requires_grad_(False)
        narrow = next(module.parameters()).dtype in (torch.bfloat16, torch.float16)
        # One in half precision computes in its own; any other is rounded just where the policy is.
        return Teacher(module, plain if narrow else self.forward)

    @property
    def provides(self) -> frozenset[str]:
        """Return what components of an algorithm may require of this learner."""
        return provided(
            reference=self.reference is not None,
            critic=self.value_head is not None,
            teacher=self._scorer.teacher is not None,
            reward_model=self._reward_learner is not None,
            views=self.perturb is not None,
        )

    @property
    def reward_model(self) -> nn.Module | None:
        """Return the model that is trained as `Algorithm.reward_model`, if there is one."""
        return None if self._reward_learner is None else self._reward_learner.model

    @property
    def skipped_updates(self) -> int:
        """Return how many optimiser steps were skipped because a loss or gradient was not finite."""
        return self._state.skipped_updates

    @property
    def updates(self) -> int:
        """Return a number that changes whenever the weights may have changed."""
        return self._state.updates

    def score(
        self,
        batch: Batch,
        requires: Collection[str] = (),
        view: ObservationView | None = None,
        context: Context | None = None,
    ) -> Batch:
        """Fill in the policy's scores before the update, and what else is required; no gradient.

        Args:
            batch: The rows.
            requires: The requirements of the algorithm.
            view: The algorithm's view, if `observation_kl` is among them.
            context: The context of the step, which a view reads.

        Raises:
            RequirementError: If `reference`, `teacher` or `observation_kl` is required, and the learner was
                not given what it needs.
        """
        if reads_teacher(requires) and self._scorer.teacher is None:
            raise RequirementError("algorithm: requires a teacher, and the learner was given none")
        batch = batch.to(self._device)
        rows = self._view_rows(batch, view, context or Context()) if OBSERVATION_KL in requires else None
        own = self._scorer.score(self._state.learned, batch, scored_statistics(requires), rows)
        batch = replace(
            batch,
            old_logprobs=own.logprobs,
            old_entropies=own.entropies,
            values=own.values,
            extras=own.extras,
        )
        if "last_values" in requires:
            batch = replace(batch, last_values=self._scorer.last_values(self._state.learned, batch))
        if TEACHER in requires:
            batch = replace(batch, teacher_logprobs=self._scorer.teacher_logprobs(batch))
        if "reference" not in requires:
            return batch
        if self._state.reference is None:
            raise RequirementError("algorithm: requires a reference policy, and the learner was given none")
        return replace(batch, reference_logprobs=self._scorer.score(self._state.reference, batch).logprobs)

    def score_replies(self, episode: Episode) -> list[list[float]]:
        """Return the log-probability of each reply token of an episode, by turn; 0 where not sampled."""
        scored = self.score(collate([Group(episode.task, (episode,))]))
        logprobs = require_tensor(scored.old_logprobs, "old_logprobs")
        return [logprobs[scored.turns == turn].tolist() for turn in range(len(episode.turns))]

    def _view_rows(self, batch: Batch, view: ObservationView | None, context: Context) -> ViewRows:
        if view is None or self.perturb is None:
            raise RequirementError(
                "algorithm: requires observation_kl, and the learner was given no "
                f"{'Algorithm.view' if view is None else 'change of observations (perturb)'}"
            )
        perturb = self.perturb(view.perturbation, view.amount, context.seed)
        return view_rows(batch, view, perturb, context, self.longest)

    def update(self, batch: Batch, algorithm: Algorithm, context: Context) -> _Numbers:
        """Learn from a rollout batch, which is scored first if it is not yet and the scores matter.

        With one optimiser step per batch, the policy that is updated is the one that would be scored, so the
        separate pass is left out unless a component reads it.

        Returns:
            The metrics to log: as `learner/NAME` means over the optimiser steps (loss, grad_norm, clip_ratio,
            ...) and over the batch (entropy/token, ...), as `algorithm/NAME` what the algorithm's diagnostics
            and replay report. A step whose loss or gradient is not finite is not applied, and is counted in
            `learner/skipped_updates`. `learner/weights_moved` is the share of the weights with a gradient
            that a step changed; the changes of the others were rounded away.

        Raises:
            NonFiniteError: After `max_skipped_updates` skipped steps in a row, or if a step left weights or
                optimiser states that are not finite; `non_finite` then names them.
        """
        scored = batch.old_logprobs is None and (self.config.updates_per_step > 1 or algorithm.reads_scores)
        if scored:
            batch = self.score(batch, algorithm.requires, algorithm.view, context)
        batch, judged = self._train_reward_model(zero_unsampled(batch.to(self._device)), algorithm, context)
        batch = with_features(batch, algorithm.requires)
        batch = with_targets(algorithm, batch, context)
        rollout = MiniBatch(batch, compute_advantages(algorithm, batch, context))

        # Read before this batch is added, so that it holds earlier steps only.
        replay = None if algorithm.replay is None else algorithm.replay.sample(context)
        mixed, separate = (replay, None) if replay is not None and replay.mixed else (None, replay)
        steps, outputs = self._learn_rollout(rollout, mixed, algorithm, context, scored=scored)
        replay_steps = self._learn_replay(separate, algorithm, context)

        if batch.old_logprobs is None:  # its only step scored it on the way
            batch = replace(batch, old_logprobs=outputs.logprobs, old_entropies=outputs.entropies)
        rollout = replace(rollout, batch=batch)
        if "current" in algorithm.requires_of("masks"):  # the policy that the step began with
            rollout = replace(rollout, current=_before_update(batch))
        rollout = with_mask(algorithm, rollout, context)
        rollout = with_mini_batch_features(rollout, algorithm.requires_of(*AFTER_UPDATE))
        own = step_means(steps) | batch_metrics(rollout) | step_counts(steps + replay_steps) | judged
        for component in algorithm.find_stateful().values():
            component.update(rollout, context)
        method = diagnose(rollout, algorithm, context)
        if algorithm.replay is not None:
            replayed = {**step_means(replay_steps), **algorithm.replay.metrics()}
            method |= {f"replay/{name}": value for name, value in replayed.items()}
        return_freed_memory()
        return {f"learner/{name}": value for name, value in own.items()} | {
            f"algorithm/{name}": value for name, value in method.items()
        }

    def _train_reward_model(
        self, batch: Batch, algorithm: Algorithm, context: Context
    ) -> tuple[Batch, _Numbers]:
        """Train the algorithm's reward model, if it has one, and score the batch under it."""
        if algorithm.reward_model is None:
            return batch, {}
        if self._reward_learner is None:
            raise RequirementError("algorithm: has a reward model, and the learner was given none to train")
        return self._reward_learner.train_and_score(batch, algorithm.reward_model, context, self._scorer)

    def _learn_rollout(
        self,
        rollout: MiniBatch,
        mixed: ReplayBatch | None,
        algorithm: Algorithm,
        context: Context,
        *,
        scored: bool,
    ) -> tuple[list[_Numbers], Outputs]:
        """Take the optimiser steps of a rollout batch, each with its part of what is replayed along.

        Args:
            rollout: The batch and its advantages.
            mixed: Replayed rows to split over the same steps.
            algorithm: The algorithm that defines the loss.
            context: The state of training.
            scored: Whether the batch holds the scores of the policy as it is now.

        Returns:
            The numbers of each step that was taken, and every row's latest outputs.
        """
        outputs = empty_outputs(rollout.batch)
        steps: list[_Numbers] = []
        for epoch in range(self.config.epochs):
            splits = list(
                mini_batches(
                    rollout.batch,
                    self.config.mini_batches,
                    context.step,
                    epoch,
                    whole_groups=bool(algorithm.group_terms),
                )
            )
            replayed = self._split_replay(mixed, algorithm, len(splits), context, epoch)
            for index, rows in enumerate(splits):
                rate = self._set_learning_rate(context, len(steps))
                mini = rollout.select(rows)
                if scored and not steps:  # the policy has not changed since the scoring pass
                    mini = replace(mini, current=scored_outputs(mini.batch))
                parts = [LossPart(mini, algorithm), *replayed[index : index + 1]]
                numbers, found = optimizer_step(parts, context, self._state, self._scorer)
                write_rows(outputs, rows, found)
                if numbers:  # a mini-batch without a signal takes no step
                    steps.append(numbers | {"learning_rate": rate})
        return steps, outputs

    def _learn_replay(
        self, replay: ReplayBatch | None, algorithm: Algorithm, context: Context
    ) -> list[_Numbers]:
        """Take optimiser steps on replayed rows alone, at the learning rate of the step before."""
        # The epoch after the last one: an order of its own for the split.
        parts = self._split_replay(replay, algorithm, self.config.mini_batches, context, self.config.epochs)
        steps = [optimizer_step([part], context, self._state, self._scorer)[0] for part in parts]
        return [numbers for numbers in steps if numbers]

    def _split_replay(
        self, replay: ReplayBatch | None, algorithm: Algorithm, count: int, context: Context, epoch: int
    ) -> list[LossPart]:
        """Split replayed rows over `count` optimiser steps; without any, return no part."""
        if replay is None:
            return []
        loss = replace(replay.algorithm(algorithm), group_terms=())
        batch = with_features(replay.batch.to(self._device), loss.requires_of(*LOSS_SLOTS))
        rows_of_all = MiniBatch(batch, replay.advantages.to(self._device))
        return [
            LossPart(rows_of_all.select(rows), loss, replay.coefficient)
            for rows in mini_batches(batch, count, context.step, epoch)
        ]

    def _set_learning_rate(self, context: Context, done: int) -> float:
        per_step = self.config.updates_per_step
        index = context.step * per_step + done
        # The schedule counts the planned steps: a step without a signal does not stretch it.
        factor = rate_factor(self.config, index, context.total_steps * per_step)
        set_rates(self._state.optimizers, factor)
        return self.config.learning_rate * factor

    @property
    def _device(self) -> torch.device:
        return next(self.policy.parameters()).device

    def export(self, model: nn.Module, *, merged: bool = True) -> None:
        """Copy the weights into a model of the policy's shape, one at a time; every rank must call it.

        They are rounded to the dtype of that model. If the model is the policy itself, nothing is copied.

        Args:
            model: The model.
            merged: Whether to add the adapters to them, if the learner trains any.
        """
        if model is self.policy:
            return
        targets = dict(model.named_parameters())
        # One at a time, so that no more than one full weight is held beside the shards.
        with torch.no_grad():
            for name, values in (merged_weights if merged else base_weights)(self.policy):
                targets[name].copy_(values)

    def adapter(self, dtype: torch.dtype) -> Adapter:
        """Return the adapters, rounded to a dtype; every rank must call it.

        Raises:
            ValueError: If the learner trains none.
        """
        if (lora := self.config.lora) is None:
            raise ValueError("config.lora is None, wanted adapters")
        weights = {name: values.to(dtype) for name, values in adapter_weights(self.policy).items()}
        return Adapter(weights, lora.rank, lora.alpha)

    def non_finite(self) -> list[str]:
        """Return the names of weights and states that hold nan or inf; every rank must call it."""
        own = self._reward_learner
        return self._state.non_finite() + ([] if own is None else own.non_finite(self.ranks))

    def state_dict(self) -> dict[str, Any]:
        """Return everything but the weights of models; see `LearnerState.state_dict`."""
        own = self._reward_learner
        return self._state.state_dict() | {"reward_model": None if own is None else own.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of a learner of the same policy and configuration.

        Raises:
            CheckpointError: If it does not fit.
        """
        check_presence(self._reward_learner, state)
        self._state.load_state_dict(state)
        if self._reward_learner is not None:
            self._reward_learner.load_state_dict(state["reward_model"])

    def write_shards(self, folder: Path) -> None:
        """Write this rank's part of what is learned; every rank must call it."""
        self._state.write_shards(folder)

    def read_shards(self, folder: Path, state: Mapping[str, Any], *, whole: bool = False) -> None:
        """Restore what any number of ranks wrote, and the `state_dict` that belongs to it.

        Raises:
            CheckpointError: If it does not fit.
        """
        check_presence(self._reward_learner, state)
        self._state.read_shards(folder, state, whole=whole)
        if self._reward_learner is not None:
            self._reward_learner.load_state_dict(state["reward_model"])

    def write_reference(self, folder: Path) -> None:
        """Write this rank's part of the sharded reference; every rank must call it."""
        self._state.write_reference(folder)

    def read_reference(self, folder: Path) -> None:
        """Restore the sharded reference.

        Raises:
            CheckpointError: If it does not fit.
        """
        self._state.read_reference(folder)

    def write_reward_model(self, folder: Path) -> None:
        """Write this rank's part of the reward model and of its optimiser; every rank must call it."""
        assert self._reward_learner is not None
        self._reward_learner.write_shards(folder)

    def read_reward_model(self, folder: Path, state: Mapping[str, Any]) -> None:
        """Restore the sharded reward model and its optimiser, and the `state_dict` that belongs to it.

        Raises:
            CheckpointError: If it does not fit.
        """
        assert self._reward_learner is not None
        self._reward_learner.read_shards(folder, state["reward_model"])


def _before_update(batch: Batch) -> Outputs:
    """Return the scores of a batch as the output of a policy."""
    logprobs = require_tensor(batch.old_logprobs, "old_logprobs")
    entropies = require_tensor(batch.old_entropies, "old_entropies")
    return Outputs(logprobs, entropies, batch.values, extras=batch.extras)
