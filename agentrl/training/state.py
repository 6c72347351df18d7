"""The state of a run that changes as it trains: all that a checkpoint holds."""

import copy
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from agentrl.algorithms.hooks import Context
from agentrl.algorithms.stateful import states_of
from agentrl.errors import CheckpointError, NonFiniteError
from agentrl.evaluation.run_scores import RunScores
from agentrl.files import replacing_folder
from agentrl.learn.learner import Learner
from agentrl.learn.lora import adapter_weights
from agentrl.learn.ranks import ALONE
from agentrl.policy.model import context_length, output_weight, save_policy
from agentrl.policy.perturbation import ObservationPerturbation
from agentrl.policy.precision import engine_copy, named_in_short, non_finite
from agentrl.policy.tokens import fingerprint, token_text
from agentrl.run.adapter import Base, read_base, write_adapter
from agentrl.run.checkpoint import (
    Progress,
    Saved,
    latest_checkpoint,
    latest_finite,
    load_learner,
    load_progress,
    save_checkpoint,
)
from agentrl.run.checkpoint_files import ADAPTER, has_adapter
from agentrl.run.logger import RunLogger, read_metrics
from agentrl.run.metric_keys import current_keys
from agentrl.run.timers import Timers
from agentrl.training.base import describe_base, load_base, save_base
from agentrl.training.setup import Session


class TrainingState:
    """Progress of a run, its learner, and its checkpoints.

    Args:
        session: What the run works with.
        logger: Keeps the rows of past steps.
        timers: Are saved with each checkpoint.
        warn: Called with a warning for the user.

    Attributes:
        stage: "warm_start" or "train".
        step: Steps of the stage that are done.
        history: The values of every logged number of the training steps, oldest first, by its key.
        tasks_drawn: Training tasks drawn so far.
        learner: The learner of the stage.
    """

    def __init__(
        self, session: Session, logger: RunLogger, timers: Timers, warn: Callable[[str], None]
    ) -> None:
        self._session, self._logger, self._timers, self._warn = session, logger, timers, warn
        self._folder = session.run.folder / "checkpoints"
        self.stage = "warm_start" if session.config.warm_start.steps else "train"
        self.step, self.tasks_drawn = 0, 0
        self.history: dict[str, list[float]] = {}
        self._saved_step = 0  # where a stage begins, there is nothing to save
        self._saved: Saved | None = None  # the newest checkpoint of the stage
        self._base: Base | None = None  # with LoRA, what the adapters of the stage are added to
        self._engine_has_base = True  # whether the engine took the weights that the learner began with
        self._restored = False  # whether the state is that of the folder, or newer
        self.learner = self.make_learner(session.policy.model)

    def context(self) -> Context:
        """Return the context of the next step; its history grows as later steps are counted."""
        session = self._session
        return Context(
            self.step,
            session.config.trainer.scheduled_steps,
            self.history,
            session.config.seed,
            vocabulary=len(output_weight(session.policy.served)),
            tokenizer=fingerprint(session.policy.tokenizer),
            token_text=partial(token_text, session.policy.tokenizer),
        )

    def advance(self, metrics: Mapping[str, float], tasks: int) -> None:
        """Count a training step, what it logs, and the tasks that it drew."""
        self.step += 1
        self.tasks_drawn += tasks
        for key, value in metrics.items():
            self.history.setdefault(key, []).append(value)

    def start_training(self) -> None:
        """Go from the warm start to reinforcement learning; the reference is the warm-started policy."""
        with self._session.interruption.shield():  # a checkpoint must hold the learner of its stage
            self.stage, self.step = "train", 0
            self._replace_learner(self.export_model())

    def make_learner(self, model: PreTrainedModel) -> Learner:
        """Return a learner of the stage that starts from the weights of `model`."""
        config, algorithm = self._session.config, self._session.algorithm
        cloning = self.stage == "warm_start"
        block = (config.warm_start.learner if cloning else config.learner).resolve_compute_dtype(
            config.policy.dtype
        )
        sharded = block.backend == "fsdp"
        # The engine needs weights of its own where the learner's are sharded, wrapped, or changed meanwhile.
        apart = sharded or block.lora is not None or (config.trainer.mode == "async" and not cloning)
        teacher = self._session.teacher
        required = frozenset[str]() if cloning else algorithm.requires
        return Learner(
            copy.deepcopy(model) if apart and model is self._session.policy.served else model,
            block,
            reference=copy.deepcopy(model).requires_grad_(False) if "reference" in required else None,
            teacher=teacher.model if teacher is not None and not cloning else None,
            critic="values" in required,
            reward_model=None if cloning or algorithm.reward_model is None else copy.deepcopy(model),
            ranks=self._session.ranks if sharded else ALONE,
            perturb=lru_cache(1)(partial(ObservationPerturbation, self._session.policy.tokenizer)),
            longest=context_length(self._session.policy.served, config.policy.max_context),
        )

    def export_model(self) -> PreTrainedModel:
        """Return a plain float32 model with the present weights; all ranks call it together."""
        model = engine_copy(self._session.policy.served, torch.float32)
        self.learner.export(model)
        return model

    def refresh_engine(self) -> None:
        """Give the engine the present weights, rounded to the precision that it generates in.

        An engine that takes adapters is given the frozen weights once, and then only the adapters.

        Raises:
            NonFiniteError: `policy.dtype` cannot hold them.
        """
        session, served = self._session, self._session.policy.served
        adapted = self.learner.config.lora is not None and session.config.engine.takes_adapters
        if not (adapted and self._engine_has_base):
            self.learner.export(served, merged=not adapted)
            if served is not self.learner.policy:
                self._check_rounded(served.named_parameters())
            session.engine.refresh(self.step)
        if adapted:
            adapter = self.learner.adapter(served.dtype)
            self._check_rounded(adapter.weights.items())
            session.engine.refresh(self.step, adapter)
        self._engine_has_base = adapted

    def _check_rounded(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        if lost := non_finite(weights):
            dtype = self._session.config.policy.dtype
            raise NonFiniteError(
                f"policy.dtype={dtype} cannot hold {named_in_short(lost)}: weights that are finite in "
                f"float32 are beyond {torch.finfo(getattr(torch, dtype)).max:.3g}; set policy.dtype=float32"
            )

    def save_when_due(self) -> None:
        """Save a checkpoint if the step is a multiple of `trainer.checkpoint_every`."""
        if self.step % self._session.config.trainer.checkpoint_every == 0:
            self.save()

    def save(self) -> None:
        """Save a checkpoint, unless the newest one is of this step or the stage has only begun.

        A stage that has only begun is begun again from what was there before it.

        Raises:
            NonFiniteError: A weight or a state is nan or inf; nothing is written.
        """
        if self.step == self._saved_step:
            return
        session, config = self._session, self._session.config
        training = self.stage == "train"
        every = config.trainer.checkpoint_every
        last = config.trainer.steps if training else config.warm_start.steps
        recent = self.history.get("train/rollout/success_rate", [])[-every:]
        with session.interruption.shield():
            session.ranks.run_on_rank0(session.check_lock)
            self._logger.sync()
            path = save_checkpoint(
                self._folder,
                Progress(self.stage, self.step, self.history, self.tasks_drawn),
                self.learner,
                states_of(session.algorithm.find_stateful()) if training else None,
                score=sum(recent) / len(recent) if recent else None,
                ranks=session.ranks,
                between=self.step != last and self.step % every != 0,
                keep=config.trainer.keep_checkpoints,
                earlier=self._saved,
                base=self._keep_base(),
            )
            self._saved, self._saved_step = Saved(path, self.learner.updates), self.step
            self._timers.save()

    def gather_result(self) -> Callable[[], None]:
        """Return a function by which the first rank saves what was learned; all ranks call this together.

        It writes `RUN/adapter` if the learner trains adapters, and else `RUN/model`.
        """
        run, tokenizer, lora = self._session.run, self._session.policy.tokenizer, self.learner.config.lora
        if lora is None:
            return partial(save_policy, self.export_model(), tokenizer, run.model)
        base, weights = self._keep_base(), adapter_weights(self.learner.policy)
        assert base is not None

        def write() -> None:
            with replacing_folder(run.adapter) as folder:
                write_adapter(folder, self.learner.policy, lora, weights, base, run.folder)
                tokenizer.save_pretrained(folder)

        return write

    def _keep_base(self) -> Base | None:
        """Return what the adapters are added to, saved if it is nowhere else; None without adapters."""
        if self.learner.config.lora is None:
            return None
        if self._base is None:
            self._base = describe_base(self._session, self.stage, self.learner.policy)
        save_base(self._session, self._base, self.learner.policy)
        return self._base

    def save_on_exit(self) -> str:
        """Save what there is, if it is finite, and return a line that says how to continue."""
        folder = self._session.run.folder
        advice = f"continue with: agentrl train --resume {folder}"
        if not self._restored:
            return advice
        try:
            with self._session.interruption.shield():
                self.save()
                if self._saved is None and (lost := self.learner.non_finite()):
                    raise NonFiniteError(f"nan or inf is in {named_in_short(lost)}")
                self._session.interruption.pop_request()
        except NonFiniteError:
            good = self._session.ranks.run_on_rank0(lambda: latest_finite(self._folder))
            if good is None:
                return f"{folder} has no checkpoint that is finite; start anew, at a lower learning rate"
            return f"{advice}, from {good.name}, the newest checkpoint that is finite"
        return advice

    def restore(self, scores: Sequence[RunScores]) -> bool:
        """Load the newest checkpoint, if there is one, and drop the rows that were logged after it.

        Args:
            scores: The evaluations of the run in each environment, which must be there for every policy
                before the checkpoint.

        Returns:
            Whether there was a checkpoint.

        Raises:
            CheckpointError: The checkpoint is damaged, or the folder lacks rows or evaluations before it.
        """
        session = self._session
        path = session.ranks.run_on_rank0(lambda: latest_checkpoint(self._folder))
        if path is None:
            self._logger.truncate(self.stage, 0)
            self._restored = True
            return False
        progress = load_progress(path, session.ranks)
        other_stage = progress.stage != self.stage
        self.stage, self.step, self._saved_step = progress.stage, progress.step, progress.step
        stored = read_base(path / ADAPTER) if has_adapter(path) else None
        self.history = {key: list(values) for key, values in current_keys(progress.history, "train").items()}
        self.tasks_drawn = progress.tasks_drawn
        if other_stage:
            own = stored if stored is not None and stored.own else None
            self._replace_learner(self.export_model() if own is None else load_base(session, own, path))
        if stored is not None and (base := self._keep_base()) is not None:
            session.ranks.run_on_rank0(lambda: stored.check(base.sha256, str(path)))
        states = load_learner(path, self.learner)
        self._saved = Saved(path, self.learner.updates)
        if self.stage == "train":
            self._restore_components(path, states)
        session.ranks.run_on_rank0(self._check_rows)
        for each in scores:
            session.ranks.run_on_rank0(partial(self._check_scores, each))
        self._logger.truncate(self.stage, self.step)
        self._restored = True
        return True

    def _restore_components(self, path: Path, states: Mapping[str, Any]) -> None:
        """Give every stateful component of the algorithm its state."""
        components, context = self._session.algorithm.find_stateful(), self.context()
        if unknown := sorted(states.keys() - components.keys()):
            raise CheckpointError(
                f"{path}: holds the state of {', '.join(unknown)}, which the algorithm does not have; resume "
                "with the version of the algorithm that the run was started with"
            )
        for name, component in components.items():
            if name in states:
                component.load_state_dict(states[name], context)
            else:
                self._warn(f"{path.name} holds no state of the algorithm's {name}, which starts anew")

    def _replace_learner(self, model: PreTrainedModel) -> None:
        self._saved, self._saved_step, self._base, self._engine_has_base = None, self.step, None, False
        del self.learner  # its states may be as large as memory allows
        self.learner = self.make_learner(model)

    def _check_scores(self, scores: RunScores) -> None:
        """Refuse to continue without the evaluations that came before the checkpoint."""
        config, training = self._session.config, self.stage == "train"
        cloned = config.warm_start.steps > 0
        passed = {
            "untrained": self.step > 0 or (training and cloned),
            "cloned": training and self.step > 0 and cloned,
        }
        results = scores.results()
        lost = [
            name
            for name in config.evaluation.baselines
            if passed.get(name) and results.get(name, {}).keys() != {"greedy", "sampled"}
        ]
        if lost:
            raise CheckpointError(
                f"{self._session.run.folder / 'evaluations.json'}: holds no scores of {' and '.join(lost)}, "
                "whose weights are gone, so that they cannot be measured again; restore it from a copy, or "
                "start a new run"
            )
        every = config.evaluation.every
        if training and every:
            last = min(self.step, config.trainer.steps)
            names = [f"step-{step:06d}" for step in range(every, last, every)]
            if gone := [name for name in names if name not in results]:
                self._warn(f"evaluations.json holds no scores of {', '.join(gone)}, whose weights are gone")

    def _check_rows(self) -> None:
        """Refuse to continue without the rows that came before the checkpoint."""
        path = self._logger.path
        if not os.path.lexists(path):
            if self.step:
                self._warn(f"{path} is missing: the rows up to {self.stage} step {self.step} are lost")
            return
        rows, wanted = read_metrics(path), {self.stage: self.step}
        if self.stage == "train":
            wanted["warm_start"] = self._session.config.warm_start.steps
        for stage, last in wanted.items():
            found = [row.get("step", 0) for row in rows if row.get("stage") == stage]
            if [step for step in found if step <= last] != list(range(1, last + 1)):
                raise CheckpointError(
                    f"{path}: damaged, it has not one row for each step of {stage} up to {last}; "
                    "restore it from a copy, or delete it to go on without the rows so far"
                )
