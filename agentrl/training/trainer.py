"""The stages of a run: baselines, warm start, reinforcement learning, evaluation."""

import json
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

from agentrl.algorithms.credit import prepare
from agentrl.algorithms.hooks import Context
from agentrl.data.batch import Batch
from agentrl.data.storage import write_episodes
from agentrl.data.trajectory import Episode
from agentrl.errors import NonFiniteError, TooManyAbortedError
from agentrl.evaluation.report import write_report
from agentrl.evaluation.results_table import results_table
from agentrl.evaluation.run_scores import RunScores, run_summary
from agentrl.files import write_atomic
from agentrl.run.folder import Run
from agentrl.run.logger import RunLogger, SilentRunLogger
from agentrl.run.resumption import record_more_steps
from agentrl.run.signals import RunInterrupted
from agentrl.run.timers import Timers
from agentrl.training.alarms import Alarms
from agentrl.training.metrics import staleness, step_metrics
from agentrl.training.own_demonstrations import own_demonstrations
from agentrl.training.prefetch import AsyncRollouts, StepRollout, SyncRollouts, open_source
from agentrl.training.rollouts import Rollouts
from agentrl.training.setup import Session
from agentrl.training.state import TrainingState
from agentrl.training.warm_start import clone


class Trainer:
    """Do what is left of every stage of a run; each stage leaves its result in the run's folder.

    Args:
        session: What the run works with.
        quiet: Show no progress.
    """

    def __init__(self, session: Session, *, quiet: bool = False) -> None:
        self.session, self.config, self.algorithm = session, session.config, session.algorithm
        self.ranks, self.interruption = session.ranks, session.interruption
        folder = session.run.folder
        self.logger = RunLogger(folder, quiet=quiet) if self.ranks.first else SilentRunLogger(folder)
        self.timers = Timers(folder / "clocks.json", writes=self.ranks.first)
        self.alarms = Alarms(session, self.logger, quiet=quiet)
        self.state = TrainingState(session, self.logger, self.timers, self.alarms.warn)
        self.rollouts = Rollouts(session, self.timers)
        self.scores = [
            RunScores(
                folder,
                alone,
                session.panels[alone.only_env.label],
                partial(session.policy.player, session.engine, self.config),
                self.logger,
                self.timers,
                self.ranks,
                self.interruption,
            )
            for alone in self.config.each_alone()
        ]

    def run(self) -> Run:
        """Run the stages that the folder does not hold yet, and return the run."""
        state, baselines = self.state, self.config.evaluation.baselines
        try:
            # Ranks stop together, between two steps; one that stopped alone would leave the others waiting.
            held = self.interruption.shield() if self.ranks.count > 1 else nullcontext()
            with held, self.logger:
                if state.restore(self.scores):
                    self.logger.say(
                        f"continuing {self.session.run.folder} after {state.stage} step {state.step}"
                    )
                self.ranks.run_on_rank0(partial(record_more_steps, self.session.run))
                for line in (self.session.describe(self.rollouts.group_size), *self.session.notes):
                    self.logger.say(line)
                self.alarms.check_start()
                own = self.own_demonstrations()
                self.state.refresh_engine()
                for name in baselines:
                    if name != "cloned":
                        self.evaluate(name)
                if state.stage == "warm_start":
                    clone(self.session, state, self.logger, self.timers, self.alarms, own)
                    self.state.refresh_engine()
                if "cloned" in baselines and self.config.warm_start.steps:
                    self.evaluate("cloned")
                self.train()
                self.evaluate("trained")
                save_result = state.gather_result()
                self.ranks.run_on_rank0(partial(self._finish, save_result))
        except KeyboardInterrupt as interrupt:
            raise RunInterrupted(
                f"stopped after {state.stage} step {state.step}; {state.save_on_exit()}"
            ) from interrupt
        except TooManyAbortedError as error:
            state.save()
            raise TooManyAbortedError(
                f"training step {state.step + 1}, "
                f"rollout.max_aborted_share={self.config.rollout.max_aborted_share}: {error}\n"
                f"mend the cause and continue with: agentrl train --resume {self.session.run.folder}"
            ) from error
        except NonFiniteError as error:
            raise NonFiniteError(
                f"{state.stage} step {state.step + 1}: {error}\n{state.save_on_exit()}"
            ) from error
        return self.session.run

    def own_demonstrations(self) -> list[Episode] | None:
        """Return what is to be cloned in place of the expert; None if nothing is named, or left to clone."""
        block, state = self.config.warm_start, self.state
        if not block.own_data or state.stage != "warm_start" or state.step >= block.steps:
            return None
        return self.ranks.run_on_rank0(lambda: own_demonstrations(self.session, self.logger.say))

    def train(self) -> None:
        """Learn by reinforcement, for `trainer.steps` steps."""
        state, every = self.state, self.config.evaluation.every
        if state.stage != "train":
            state.start_training()
            state.refresh_engine()
        with (
            self.logger.stage("training", total=self.config.trainer.steps, done=state.step),
            open_source(self.session, self.rollouts, state, self.timers) as source,
        ):
            while state.step < self.config.trainer.steps:
                if every and state.step and state.step % every == 0:  # a stop may have come before it
                    with source.paused():
                        self.evaluate(f"step-{state.step:06d}")
                self.session.check_stop()
                self.step(source)
                state.save_when_due()
        state.save()

    def step(self, source: SyncRollouts | AsyncRollouts) -> None:
        """Take one step of reinforcement learning."""
        context = self.state.context()
        scoring = "rollout:scores" in self.algorithm.requires
        rollout = source.collect(
            replace(context, score=self.state.learner.score_replies) if scoring else context
        )
        with self.interruption.shield(), self.timers.running("learning"):
            batch = self.make_batch(rollout, context)
            metrics = self.update(batch, rollout, context)
            with source.new_weights(self.state.context()):
                self.state.refresh_engine()
            self.log(metrics, rollout)

    def make_batch(self, rollout: StepRollout, context: Context) -> Batch:
        """Return the kept groups as tensors, their rewards shaped by the algorithm."""
        temperature = self.rollouts.temperature(context)
        return prepare(self.algorithm, rollout.result.kept, context, selected=True, temperature=temperature)

    def update(self, batch: Batch, rollout: StepRollout, context: Context) -> dict[str, float]:
        """Learn from the batch, count the step, and return what it logs."""
        learner, result = self.state.learner, rollout.result
        metrics = step_metrics(result, batch, self.config.names)
        if self.config.trainer.mode == "async":
            metrics |= staleness(result.episodes, self.state.step)
        metrics["rollout/quarantined_tasks"] = float(len(self.rollouts.quarantine.tasks))
        metrics["rollout/worker_restarts"] = float(sum(self.ranks.gather(self.session.environments.restarts)))
        learned = bool(len(batch.lengths))
        if learned:
            metrics |= learner.update(batch, self.algorithm, context)
        metrics = {f"train/{key}": value for key, value in metrics.items()}
        self.state.advance(metrics, tasks=len(result.groups))
        self.alarms.check_step(
            learned=learned, stops=Counter(episode.stop.value for episode in result.episodes)
        )
        return metrics

    def log(self, metrics: dict[str, float], rollout: StepRollout) -> None:
        """Write the row of the step, and its episodes when they are due."""
        state, every = self.state, self.config.trainer.save_episodes_every
        self.logger.write({"stage": state.stage, "step": state.step} | metrics, seconds=rollout.seconds)
        self.alarms.check_rounding(state.stage, state.step, metrics, state.learner)
        if self.ranks.first and every and state.step % every == 0:
            path = self.session.run.folder / "episodes" / f"train-{state.step:06d}.parquet"
            write_episodes(path, rollout.result.episodes)

    def evaluate(self, name: str) -> None:
        """Score a policy on the panel of each environment, unless the folder holds its scores."""
        for scores in self.scores:
            if name == "expert" and scores.label not in self.session.experts:
                continue
            for decoding in scores.missing(name):
                self.session.check_stop()
                found = scores.measure(name, decoding)
                if name not in ("random", "expert"):
                    self.alarms.check_contexts(found.stop_reasons)

    def _finish(self, save_result: Callable[[], None]) -> None:
        save_result()
        for scores in self.scores:
            scores.check_instructions()
        self.timers.save()
        summary = run_summary(self.scores, self.config, self.timers.read())
        write_atomic(self.session.run.folder / "summary.json", json.dumps(summary, indent=1))
        write_report(self.session.run.folder)
        self.logger.show(results_table(summary))
