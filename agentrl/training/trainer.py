"""A run from start to finish: baselines, warm start, reinforcement learning, evaluation."""

import copy
import json
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from agentrl.algorithms.algorithm import check_requirements
from agentrl.algorithms.credit import prepare
from agentrl.algorithms.hooks import Context
from agentrl.algorithms.importance import with_importance_correction
from agentrl.algorithms.methods.cloning import cloning
from agentrl.data.storage import write_episodes
from agentrl.data.trajectory import StopReason
from agentrl.env.registry import Factory, check_id
from agentrl.errors import CheckpointError, ConfigError, NonFiniteError, TooManyAbortedError
from agentrl.evaluation.evaluate import configured_panel
from agentrl.evaluation.report import results_table, write_report
from agentrl.evaluation.run_scores import Measurements
from agentrl.files import remove_leftovers, write_atomic
from agentrl.learn.forward import Forward
from agentrl.learn.learner import Learner, provided
from agentrl.learn.lora import check_adapters
from agentrl.learn.ranks import ALONE, Ranks, joined
from agentrl.policy.engine import Engine
from agentrl.policy.model import (
    context_length,
    context_limit,
    output_weight,
    resolve_device,
    save_policy,
    shortened,
    skeleton,
)
from agentrl.policy.precision import engine_copy, named_in_short, non_finite
from agentrl.policy.tokens import ChatDialogue, fingerprint
from agentrl.rollout.environments import Environments
from agentrl.rollout.placement import settle
from agentrl.rollout.players import ExpertPlayer, Player, RandomPlayer
from agentrl.run.checkpoint import (
    Progress,
    latest_checkpoint,
    latest_finite,
    load_learner,
    load_progress,
    save_checkpoint,
)
from agentrl.run.env_backend import open_environments
from agentrl.run.folder import (
    Run,
    changed_wording,
    create_run,
    note_wording,
    open_run,
    with_overrides,
)
from agentrl.run.lock import RunLock
from agentrl.run.logger import Logbook, Row, read_metrics
from agentrl.run.policies import Policy, fit_policy, load
from agentrl.run.settings import RunConfig, check_named_again, rank_mistakes
from agentrl.run.signals import Interruption, RunInterrupted
from agentrl.run.timers import Clocks
from agentrl.scale.engines import check_actors, check_engine, check_server
from agentrl.scale.extras import check_ray
from agentrl.training.metrics import rollout_metrics, staleness
from agentrl.training.prefetch import SharedEngine, SideBySide, TakingTurns
from agentrl.training.rollouts import Played, Rollouts
from agentrl.training.warm_start import cloning_batches, demonstrations, names_actions

_IDLE_STEPS = 10  # without an update before it is said
_ROUNDED_AWAY = 0.2  # of the weights with a gradient: if fewer move, it is said
_FULL_CONTEXTS = 0.1  # share of episodes that end by a full context before it is said


def train(config: RunConfig, *, quiet: bool = False) -> Run:
    """Train as `config` says, from baselines to report.

    Args:
        config: of the run.
        quiet: show no progress.

    Raises:
        AgentRLError: for anything wrong with the configuration, environment or files; what was done is kept.
        RunInterrupted: after Ctrl-C or SIGTERM; `resume(run.folder)` continues.
    """
    return _run(config, None, quiet)


def resume(folder: str | Path, *overrides: str, quiet: bool = False) -> Run:
    """Continue an interrupted run; the result equals that of a run that never stopped.

    Args:
        folder: of the run, or its name below `runs/`.
        overrides: `key=value` of what may change. The programs, servers and folders that the run names, see
            `settings.CALLERS_KEYS`, are used where they are named again here.
        quiet: show no progress.

    Raises:
        ConfigError: something else would change, or is not named again.
        AgentRLError: see `train`.
    """
    stored = open_run(folder)
    check_named_again(str(stored.folder), stored.config, overrides)
    active = with_overrides(stored, overrides)
    return _run(active.config, active, quiet)


def _run(config: RunConfig, active: Run | None, quiet: bool) -> Run:
    if config.learner.launcher == "ray" and "RANK" not in os.environ:
        return _run_on_ray(config, active, quiet)
    device = resolve_device(config.policy.device)
    with joined(device) as ranks, Interruption().listening() as interruption:
        return Trainer(config, active, interruption, quiet=quiet, ranks=ranks).run()


def _run_on_ray(config: RunConfig, active: Run | None, quiet: bool) -> Run:
    check_ray("learner.launcher=ray")
    from agentrl.scale.ray_ranks import run_on_ray

    device, count = config.policy.device, config.learner.processes
    on_gpus = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    assert count is not None
    with Interruption().listening():
        folder = run_on_ray(
            partial(_one_rank, config, active, quiet),
            count,
            address=config.rollout.ray.address,
            gpus=float(on_gpus),
        )
    return Run(folder, config)


def _one_rank(config: RunConfig, active: Run | None, quiet: bool) -> Path:
    return _run(config, active, quiet).folder


class Trainer:
    """The stages of one run. What it must remember is in the run's folder.

    Several ranks go through the stages together, each with environments and an engine of its own: they share
    the episodes to play and the work of learning, and the first one writes the folder, which all can read.

    Args:
        config: of the run; what is wrong with it is found before a folder is made.
        active: the run to continue, None for a new one.
        interruption: holds signals back where a stop would do harm.
        quiet: show no progress.
        ranks: that do the run.
    """

    def __init__(
        self,
        config: RunConfig,
        active: Run | None,
        interruption: Interruption,
        *,
        quiet: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        self.interruption, self.ranks, self.quiet = interruption, ranks, quiet
        _check_shares(config, ranks)
        check_engine(config.engine, ranks=ranks.count)
        check_actors(config.engine, config.rollout.ray.address)
        check_server(config.engine)
        if config.trainer.threads is not None:
            torch.set_num_threads(config.trainer.threads)
        self.algorithm = with_importance_correction(config.algorithm.build(), config.trainer.correction)
        wanted = self.algorithm.requires
        check_requirements(
            self.algorithm,
            provided(reference="reference" in wanted, critic="values" in wanted) | config.engine.provides,
        )
        if config.rollout.workers.interpreter is None:
            check_id(config.env.id)
        rollout, self.settled = ranks.run_on_rank0(
            lambda: settle(_factory(config), config.rollout, config.env.split, config.seed)
        )
        self.config = config = replace(config, rollout=rollout)
        self.lock: RunLock | None = None  # of the first rank
        self.environments = self._training_environments(expert=False)
        try:
            self._get_ready(active)
            self._set_up()
        except BaseException:
            self.environments.close()
            self._let_go()
            raise

    def _set_up(self) -> None:
        """Have what the stages work with."""
        config, ranks = self.config, self.ranks
        self.clocks = Clocks(self.active.folder / "clocks.json", writes=ranks.first)
        self.engine = self.policy.engine(config)
        self.beside = ranks.apart()
        self.rollouts = Rollouts(config, self.algorithm, self.tasks, self.environments, self.beside)
        self.logbook = (
            Logbook(self.active.folder, quiet=self.quiet) if ranks.first else _NoBook(self.active.folder)
        )
        self.measurements = Measurements(
            self.active.folder,
            config,
            self.panel,
            self._player,
            self.logbook,
            self.clocks,
            ranks,
            self.interruption,
        )
        self.history: dict[str, list[float]] = {}
        self.stage, self.step, self.saved = "warm_start" if config.warm_start.steps else "train", 0, -1
        self.learner = self._learner()
        self.restored = False  # whether what is here is what the folder holds, or came after it
        self.tasks_drawn, self.idle_steps, self.warned_of_rounding = 0, 0, False
        self.stops: Counter[str] = Counter()  # of the run's own policy
        self.told_of_full_contexts = False

    def _get_ready(self, active: Run | None) -> None:
        """Ask the environment for its tasks, and have a folder and a policy."""
        config = self.config
        given = self.ranks.raise_on_any_rank(self._look_around)
        self._check_adapters()
        self.shortened = None if given is None else shortened(given.model, config.policy.max_context)
        if given is not None:  # the folder, and every stage, has the limit that holds
            limit = context_length(given.model, config.policy.max_context)
            self.config = config = replace(config, policy=replace(config.policy, max_context=limit))
        folder = self.ranks.run_on_rank0(
            lambda: (active or create_run(config, placement=self.settled)).folder
        )
        self.active = Run(folder, config)
        self.ranks.run_on_rank0(self._take)
        self.policy = given or self._own_policy(folder / "tokenizer")
        wording = self.policy.dialogue.wording
        self.other_prompts = self.ranks.run_on_rank0(lambda: changed_wording(self.active, wording))
        self.ranks.run_on_rank0(lambda: note_wording(self.active, wording))

    def _take(self) -> None:
        """Own the folder, and clear what a kill left in it."""
        folder = self.active.folder
        lock = RunLock(folder)
        lock.take()
        self.lock = lock
        for inner in (folder, folder / "episodes", folder / "checkpoints"):
            remove_leftovers(inner)
        (folder / "episodes").mkdir(exist_ok=True)

    def _let_go(self) -> None:
        if self.lock is not None:
            self.lock.release()

    def _check_adapters(self) -> None:
        for learner in (self.config.warm_start.learner, self.config.learner):
            if learner.lora is not None:
                check_adapters(skeleton(self.config.policy), learner.lora)

    def _look_around(self) -> Policy | None:
        config = self.config
        with self.environments.borrow() as environment:
            known: Any = environment.unwrapped
            self.tasks: Sequence[str] = known.tasks(config.env.split)
            self.panel = configured_panel(config, environment)
        if len(self.panel.tasks) < self.ranks.count:
            raise ConfigError(
                f"evaluation.tasks is {len(self.panel.tasks)}, fewer than the {self.ranks.count} processes "
                "that share them"
            )
        self.has_expert = self._offers_expert()
        return None if config.policy.path is None else load(config.policy.path, config.policy)

    def _own_policy(self, tokenizer: Path) -> Policy:
        """A fitted policy; of several ranks the first fits the tokenizer, and the others read it."""
        fitted = self.ranks.raise_on_any_rank(
            lambda: self._fitted_policy(tokenizer) if self.ranks.first else None
        )
        return fitted or self._fitted_policy(tokenizer)

    def _fitted_policy(self, tokenizer: Path) -> Policy:
        """A policy whose tokenizer knows the replies as well: where they are free text, the expert's."""
        if tokenizer.is_dir() or not self.has_expert or names_actions(self.tasks, self.environments):
            return fit_policy(self.config, self.tasks, self.environments, RandomPlayer(), tokenizer)
        with self._training_environments(expert=True) as environments:
            return fit_policy(self.config, self.tasks, environments, ExpertPlayer(), tokenizer)

    def run(self) -> Run:
        """Do what is left of every stage."""
        try:
            # Ranks stop together, between two steps; one that stopped alone would leave the others waiting.
            held = self.interruption.shield() if self.ranks.count > 1 else nullcontext()
            with held, self.logbook:
                self._restore()
                self.logbook.say(self._arithmetic())
                for line in (self.settled, self.shortened):
                    if line is not None:
                        self.logbook.say(line)
                self._warn_of_other_prompts()
                self._warn_of_cut_openings()
                self._warn_of_no_thoughts()
                self._warn_of_lone_episodes()
                self._serve()
                for name in self.config.evaluation.baselines:
                    if name != "cloned" and (name != "expert" or self.has_expert):
                        self._evaluate(name)
                self._warm_start()
                if "cloned" in self.config.evaluation.baselines and self.config.warm_start.steps:
                    self._evaluate("cloned")
                self._train()
                self._evaluate("trained")
                self.ranks.run_on_rank0(partial(self._finish, self._learned_model()))
        except KeyboardInterrupt as interrupt:
            raise RunInterrupted(
                f"stopped after {self.stage} step {self.step}; {self._kept()}"
            ) from interrupt
        except NonFiniteError as error:
            raise NonFiniteError(f"{self.stage} step {self.step + 1}: {error}\n{self._kept()}") from error
        finally:
            try:
                self.environments.close()
                self.engine.close()
            finally:
                self._let_go()
        return self.active

    # Stages: each looks at what the folder already holds, does the rest and leaves its result there.

    def _warm_start(self) -> None:
        steps = self.config.warm_start.steps
        if self.stage == "train" or self.step >= steps:
            return
        with (
            self.clocks.running("demonstrations"),
            self.logbook.stage("demonstrations"),
            self._training_environments(expert=True) as environments,
        ):
            episodes = demonstrations(
                self.config,
                self.tasks,
                environments,
                self.policy.dialogue,
                ranks=self.ranks,
                say=self.logbook.say,
            )
        algorithm = cloning()
        with self.logbook.stage("cloning", total=steps, done=self.step):
            for batch in cloning_batches(self.config, episodes, first=self.step):
                self._heed()
                with self.interruption.shield(), self.clocks.running("cloning"):
                    learned = self.learner.update(batch, algorithm, Context(self.step, steps, {}))
                    self.step += 1
                    metrics = {f"learner/{key}": value for key, value in learned.items()}
                    self.logbook.write({"stage": "warm_start", "step": self.step} | metrics)
                    self._warn_of_rounding(metrics)
                self._save_now_and_then()
        self._save()
        self._serve()

    def _train(self) -> None:
        if self.stage != "train":
            with self.interruption.shield():  # a stop saves the learner of its stage
                self.stage, self.step, self.saved = "train", 0, -1
                self._change_learner()  # its reference, if any, is the warm-started policy
            self._serve()
        every = self.config.evaluation.every
        with (
            self.logbook.stage("training", total=self.config.trainer.steps, done=self.step),
            self._steps() as steps,
        ):
            while self.step < self.config.trainer.steps:
                if every and self.step and self.step % every == 0:  # a stop may have come before it
                    with steps.paused():
                        self._evaluate(f"step-{self.step:06d}")
                self._heed()
                self._train_step(steps)
                self._save_now_and_then()
        self._save()

    @contextmanager
    def _steps(self) -> Iterator[TakingTurns | SideBySide]:
        """What is to be learned from, step by step."""
        if self.config.trainer.mode == "sync":
            yield TakingTurns(partial(self._play, self.engine), self.tasks_drawn)
            return
        shared = SharedEngine(self.engine)
        steps = SideBySide(
            partial(self._play, shared),
            self.tasks_drawn,
            shared,
            self._context(copied=True),
            self.config.trainer.max_staleness,
            furthest=lambda begun: max(self.ranks.gather(begun)),
            agree=self._context_of_all,
        )
        try:
            yield steps
        finally:
            steps.close()
            for who, seconds in zip(("learning", "rollout"), steps.waited, strict=True):
                self.clocks.add(f"{who}.waited.wall", seconds)
            self.clocks.save()

    def _context_of_all(self, own: Context | None) -> Context | None:
        """That of the first rank, for histories may be a step apart; None if any rank is over."""
        answers = self.beside.gather((own is None, own if self.beside.first else None))
        return None if any(over for over, _ in answers) else answers[0][1]

    def _play(self, engine: Engine, cursor: int, context: Context) -> Played:
        """Play a step's groups; of a run that is not alone in its process, in a thread of its own."""
        player = self.policy.player(engine, self.config, self.rollouts.temperature(context))
        with self.clocks.running("rollout"):
            played = self.rollouts.play(player, cursor, context)
        self.clocks.add("rollout.environment.wall", played.environment_seconds)
        self.clocks.add("rollout.generation.wall", played.player_seconds)
        return played

    def _train_step(self, steps: TakingTurns | SideBySide) -> None:
        context = self._context()
        try:
            step = steps.next(context)
        except TooManyAbortedError as error:
            self._save()
            raise TooManyAbortedError(
                f"training step {self.step + 1}, "
                f"rollout.max_aborted_share={self.config.rollout.max_aborted_share}: {error}\n"
                f"mend the cause and continue with: agentrl train --resume {self.active.folder}"
            ) from error
        played = step.played
        batch = prepare(self.algorithm, played.kept, context, selected=True)
        metrics = rollout_metrics(played.episodes) | {
            "episodes_kept": len(batch.episodes) / len(played.episodes),
            "quarantined_tasks": float(len(self.rollouts.quarantine.tasks)),
            "worker_restarts": float(sum(self.ranks.gather(self.environments.restarts))),
            **played.metrics(),
        }
        if self.config.trainer.mode == "async":
            metrics |= staleness(played.episodes, self.step)
        with self.interruption.shield(), self.clocks.running("learning"):
            if len(batch.lengths):
                temperature = self.rollouts.temperature(step.context)
                self.learner.forward = replace(self.learner.forward, temperature=temperature)
                learned = self.learner.update(batch, self.algorithm, context)
                metrics |= {f"learner/{key}": value for key, value in learned.items()}
            self.step += 1
            self.tasks_drawn += len(played.groups)
            self._warn_of_idleness(learned=bool(len(batch.lengths)))
            self._warn_of_full_contexts(Counter(episode.stop.value for episode in played.episodes))
            for key, value in metrics.items():
                self.history.setdefault(key, []).append(value)
            with steps.new_weights(self._context(copied=self.config.trainer.mode == "async")):
                self._serve()
            self.logbook.write({"stage": "train", "step": self.step} | metrics, seconds=step.seconds)
            self._warn_of_rounding(metrics)
            every = self.config.trainer.save_episodes_every
            if self.ranks.first and every and self.step % every == 0:
                path = self.active.folder / "episodes" / f"train-{self.step:06d}.parquet"
                write_episodes(path, played.episodes)

    def _warn_of_idleness(self, *, learned: bool) -> None:
        """Steps that teach nothing look like progress."""
        self.idle_steps = 0 if learned else self.idle_steps + 1
        if self.idle_steps == _IDLE_STEPS:
            self.logbook.say(
                f"warning: nothing was learned in {_IDLE_STEPS} steps: no group of "
                f"{self.rollouts.group_size} had episodes of different returns"
            )

    def _warn_of_rounding(self, metrics: Row) -> None:
        """Updates that are smaller than the last digit of a weight look like progress, too."""
        moved = metrics.get("learner/weights_moved", 1.0)
        if self.warned_of_rounding or moved >= _ROUNDED_AWAY:
            return
        self.warned_of_rounding = True
        block = "warm_start.learner" if self.stage == "warm_start" else "learner"
        matrices = " and .matrix_learning_rate" if self.learner.config.optimizer == "muon" else ""
        self.logbook.say(
            f"warning: {self.stage} step {self.step} moved {moved:.1%} of the weights that had a gradient, "
            f"at a learning rate of {metrics['learner/learning_rate']:.3g}: the rest of the update was "
            f"smaller than the last digit of a float32; raise {block}.learning_rate{matrices}"
        )

    def _warn_of_full_contexts(self, stops: Mapping[str, int]) -> None:
        """An episode that a full context ended counts as a failure, whatever the policy would have done."""
        self.stops.update(stops)
        share = self.stops[StopReason.CONTEXT_LIMIT] / self.stops.total()
        if self.told_of_full_contexts or share <= _FULL_CONTEXTS:
            return
        self.told_of_full_contexts = True
        block, limit = self.config.policy, context_limit(self.policy.model)
        most = ", which is all that the model can do" if block.max_context == limit else ""
        self.logbook.say(
            f"warning: {self.stops[StopReason.CONTEXT_LIMIT]} of {self.stops.total()} episodes ended by "
            f"context_limit and count as failures: a sequence holds policy.max_context={block.max_context} "
            f"tokens{most}, and one observation takes up to policy.max_observation_tokens="
            f"{block.max_observation_tokens}"
        )

    def _context(self, *, copied: bool = False) -> Context:
        """That of the next step; `copied`, so that steps to come do not change its history."""
        history = {name: list(values) for name, values in self.history.items()} if copied else self.history
        return Context(
            self.step,
            self.config.trainer.steps,
            history,
            self.config.seed,
            vocabulary=len(output_weight(self.policy.served)),
            tokenizer=fingerprint(self.policy.tokenizer),
        )

    def _evaluate(self, name: str) -> None:
        """Measure a policy on the panel, unless the folder says that it was."""
        for decoding in self.measurements.missing(name):
            self._heed()
            found = self.measurements.measure(name, decoding)
            if name not in ("random", "expert"):
                self._warn_of_full_contexts(found.stop_reasons)

    def _finish(self, learned: PreTrainedModel) -> None:
        save_policy(learned, self.policy.tokenizer, self.active.model)
        self.measurements.check_instructions()
        self.clocks.save()
        summary = self.measurements.summary()
        write_atomic(self.active.folder / "summary.json", json.dumps(summary, indent=1))
        write_report(self.active.folder)
        self.logbook.show(results_table(summary))

    # What is shared by the stages.

    def _arithmetic(self) -> str:
        rollout, steps = self.config.rollout, self.config.trainer.steps
        warm, plays = self.config.warm_start, len(self.panel.tasks) * self.config.evaluation.repeats
        size = self.rollouts.group_size
        per_step = rollout.groups_per_step * size
        parameters = sum(parameter.numel() for parameter in self.policy.served.parameters())
        updates = self.config.learner.updates_per_step
        return (
            f"{self.active.folder}: {self.config.env.id} with {self.config.algorithm.name}, "
            f"{parameters:,} parameters on {self.policy.served.device}"
            f"{f' of {self.ranks.count} processes' if self.ranks.count > 1 else ''}\n"
            f"cloning: {warm.steps} steps x {warm.batch_size} demonstrations\n"
            f"training: {steps} steps x ({rollout.groups_per_step} tasks x {size} episodes) = "
            f"{steps * per_step:,} episodes, {steps * updates:,} updates\n"
            f"evaluation: {plays} episodes of {self.panel.split} per policy and decoding, "
            f"panel {self.panel.hash[:12]}"
        )

    def _warn_of_cut_openings(self) -> None:
        """A task whose end the policy never reads cannot be learned, and nothing else would say so."""
        limit, cut = self.config.policy.max_observation_tokens, 0
        tasks = [self.tasks[index] for index in range(min(20, len(self.tasks)))]
        for task in tasks:
            with suppress(Exception), self.environments.borrow() as environment:  # its episode will record it
                text, _ = environment.reset(seed=0, options={"task": task})
                cut += len(self.policy.tokenizer.encode(text, add_special_tokens=False)) > limit
        if cut:
            self.logbook.say(
                f"warning: policy.max_observation_tokens={limit} cuts the first observation of {cut} in "
                f"{len(tasks)} training tasks; what stands behind the cut is never read"
            )

    def _warn_of_no_thoughts(self) -> None:
        """A policy that is asked to think, and cannot."""
        dialogue, most = self.policy.dialogue, self.config.engine.max_tokens
        if self.config.policy.reply != "think_action" or not isinstance(dialogue, ChatDialogue):
            return
        if dialogue.thinking is None:
            self.logbook.say(
                "warning: policy.reply=think_action, but the chat template's prompt has a closed think block "
                "already: replies hold the command alone, and no thoughts"
            )
            return
        if not self.config.rollout.constrained:
            return
        with suppress(Exception), self.environments.borrow() as environment:  # as above
            _, info = environment.reset(seed=0, options={"task": self.tasks[0]})
            choices = [dialogue.encode_choice(action) for action in info.get("actions") or ()]
            room = dialogue.thinking.room(most, choices) if choices else most
            if room < 1:
                self.logbook.say(
                    f"warning: engine.max_tokens={most} leaves no room to think before the first task's "
                    f"commands, wanted at least {most - room + 1}; until then replies hold no thoughts"
                )

    def _warn_of_lone_episodes(self) -> None:
        """Nothing is learned from what is compared with nothing."""
        size = self.algorithm.rollout.episodes or self.config.rollout.group_size
        if size == 1 and self.algorithm.compares and self.config.trainer.steps:
            self.logbook.say(
                f"warning: rollout.group_size is 1, but algorithm.name={self.config.algorithm.name} compares "
                "the episodes of a group, and one alone teaches it little or nothing; wanted at least 2"
            )

    def _warn_of_other_prompts(self) -> None:
        """A policy that reads what it was not trained on is told of even where no progress is shown."""
        if self.other_prompts is not None and self.ranks.first:
            self._warn(self.other_prompts)

    def _warn(self, text: str) -> None:
        if self.quiet:
            warnings.warn(text, RuntimeWarning, stacklevel=2)
        self.logbook.say(f"warning: {text}")

    def _heed(self) -> None:
        """Stop here if any rank was told to, or if the folder is no longer this run's."""
        self.ranks.run_on_rank0(self._check_folder)
        if self.ranks.count == 1:
            self.interruption.heed()
        if self.ranks.count > 1 and any(self.ranks.gather(self.interruption.asked())):
            raise KeyboardInterrupt

    def _check_folder(self) -> None:
        if self.lock is not None:
            self.lock.check()

    def _serve(self) -> None:
        """Have the engine take up the weights of now, rounded to what it generates in."""
        served = self.policy.served
        self.learner.export(served)
        if served is not self.policy.model and (lost := non_finite(served.named_parameters())):
            dtype = self.config.policy.dtype
            raise NonFiniteError(
                f"policy.dtype={dtype} cannot hold {named_in_short(lost)}: weights that are finite in "
                f"float32 are beyond {torch.finfo(getattr(torch, dtype)).max:.3g}; set policy.dtype=float32"
            )
        self.engine.refresh(self.step)

    def _learned_model(self) -> PreTrainedModel:
        """A plain model in float32 with the weights of now; all ranks ask together."""
        model = engine_copy(self.policy.served, torch.float32)
        self.learner.export(model)
        return model

    def _change_learner(self) -> None:
        """Have that of another stage, from the weights of now."""
        self.policy = replace(self.policy, model=self._learned_model())
        del self.learner  # its states may be as large as memory allows
        self.learner = self._learner()

    def _player(self, temperature: float) -> Player:
        return self.policy.player(self.engine, self.config, temperature)

    def _offers_expert(self) -> bool:
        steps = self.config.warm_start.steps
        try:
            with self._training_environments(expert=True) as environments, environments.borrow():
                return True
        except ConfigError as error:
            if not steps:
                return False
            raise ConfigError(
                f"warm_start.steps is {steps}, but {self.config.env.id} has no expert to clone ({error}); "
                "set warm_start.steps=0, or let the environment take expert=True"
            ) from error

    def _learner(self) -> Learner:
        """That of the stage, from the policy's weights."""
        model, shared = self.policy.model, self.policy.model is self.policy.served
        cloning = self.stage == "warm_start"
        config = self.config.warm_start.learner if cloning else self.config.learner
        config = config.beside(self.config.policy.dtype)
        sharded = config.backend == "fsdp"
        # Where weights are dealt out, wrapped, or read while they change, the engine's are others.
        apart = sharded or config.lora is not None or (self.config.trainer.mode == "async" and not cloning)
        wanted = frozenset[str]() if cloning else self.algorithm.requires
        return Learner(
            copy.deepcopy(model) if apart and shared else model,
            config,
            reference=copy.deepcopy(model).requires_grad_(False) if "reference" in wanted else None,
            critic="values" in wanted,
            forward=Forward(temperature=1.0 if cloning else self.config.rollout.temperature),
            ranks=self.ranks if sharded else ALONE,
        )

    def _training_environments(self, *, expert: bool) -> Environments:
        told = {"expert": True} if expert else {}
        return open_environments(_factory(self.config, **told), self.config.rollout)

    def _save_now_and_then(self) -> None:
        if self.step % self.config.trainer.checkpoint_every == 0:
            self._save()

    def _save(self) -> None:
        if self.saved == self.step:
            return
        replay = self.algorithm.replay if self.stage == "train" else None
        every, block = self.config.trainer.checkpoint_every, self.config
        last = block.trainer.steps if self.stage == "train" else block.warm_start.steps
        recent = self.history.get("success", [])[-every:]
        with self.interruption.shield():
            self.ranks.run_on_rank0(self._check_folder)
            self.logbook.sync()
            save_checkpoint(
                self.active.folder / "checkpoints",
                Progress(self.stage, self.step, self.history, self.tasks_drawn),
                self.learner,
                None if replay is None else replay.state_dict(),
                score=sum(recent) / len(recent) if recent else None,
                ranks=self.ranks,
                between=self.step != last and (not self.step or self.step % every != 0),
            )
            self.saved = self.step
            self.clocks.save()

    def _kept(self) -> str:
        """Save what there is, if it is finite, and say where a resumed run goes on."""
        folder = self.active.folder
        resumed = f"continue with: agentrl train --resume {folder}"
        if not self.restored:
            return resumed
        try:
            with self.interruption.shield():
                self._save()
                self.interruption.asked()
        except NonFiniteError:
            good = self.ranks.run_on_rank0(lambda: latest_finite(folder / "checkpoints"))
            if good is None:
                return f"{folder} has no checkpoint that is finite; start anew, at a lower learning rate"
            return f"{resumed}, from {good.name}, the newest checkpoint that is finite"
        return resumed

    def _restore(self) -> None:
        """Take up the newest checkpoint, and forget what was logged after it."""
        path = self.ranks.run_on_rank0(lambda: latest_checkpoint(self.active.folder / "checkpoints"))
        if path is None:
            self.logbook.truncate(self.stage, 0)
            self.restored = True
            return
        progress = load_progress(path, self.ranks)
        another = progress.stage != self.stage
        self.stage, self.step, self.saved = progress.stage, progress.step, progress.step
        self.history = {key: list(values) for key, values in progress.history.items()}
        self.tasks_drawn = progress.tasks_drawn
        if another:
            self._change_learner()
        memory = load_learner(path, self.learner)
        if self.stage == "train" and self.algorithm.replay is not None:
            self.algorithm.replay.load_state_dict(memory, self._context())
        self.ranks.run_on_rank0(self._check_rows)
        self.logbook.truncate(self.stage, self.step)
        self.restored = True
        self.logbook.say(f"continuing {self.active.folder} after {self.stage} step {self.step}")

    def _check_rows(self) -> None:
        """Refuse to go on from a checkpoint with fewer rows, or evaluations, than came before it."""
        path = self.logbook.path
        if not os.path.lexists(path):
            if self.step:
                self._warn(f"{path} is missing: the rows up to {self.stage} step {self.step} are lost")
        else:
            rows, wanted = read_metrics(path), {self.stage: self.step}
            if self.stage == "train":
                wanted["warm_start"] = self.config.warm_start.steps
            for stage, last in wanted.items():
                found = [row.get("step", 0) for row in rows if row.get("stage") == stage]
                if [step for step in found if step <= last] != list(range(1, last + 1)):
                    raise CheckpointError(
                        f"{path}: damaged, it has not one row for each step of {stage} up to {last}; "
                        "restore it from a copy, or delete it to go on without the rows so far"
                    )
        every, steps = self.config.evaluation.every, self.config.trainer.steps
        before = self.stage == "train"
        over = {
            "untrained": self.step > 0 or (before and self.config.warm_start.steps > 0),
            "cloned": before and self.step > 0 and self.config.warm_start.steps > 0,
        }
        results = self.measurements.results()
        lost = [
            name
            for name in self.config.evaluation.baselines
            if over.get(name) and results.get(name, {}).keys() != {"greedy", "sampled"}
        ]
        if lost:
            raise CheckpointError(
                f"{self.active.folder / 'evaluations.json'}: holds no scores of {' and '.join(lost)}, whose "
                "weights are gone, so that they cannot be measured again; restore it from a copy, or start a "
                "new run"
            )
        if before and every:
            passed = [f"step-{step:06d}" for step in range(every, min(self.step, steps), every)]
            if gone := [name for name in passed if name not in results]:
                self._warn(f"evaluations.json holds no scores of {', '.join(gone)}, whose weights are gone")


class _NoBook(Logbook):
    """What ranks have that are not the first: it writes and shows nothing."""

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder, quiet=True)

    def write(self, row: Row, *, seconds: float | None = None) -> None:
        pass

    def truncate(self, stage: str, step: int) -> None:
        pass


def _check_shares(config: RunConfig, ranks: Ranks) -> None:
    """Refuse what several processes cannot share, and others than were asked for."""
    wanted = config.learner.processes
    if wanted not in (None, ranks.count):
        raise ConfigError(
            f"learner.processes is {wanted}, but {ranks.count} were started; learner.launcher=ray starts "
            "them by itself, without torchrun"
        )
    if mistakes := list(rank_mistakes(config, ranks.count)):
        raise ConfigError("\n".join(mistakes))


def _factory(config: RunConfig, **more: Any) -> Factory:
    factory = Factory(config.env.id, split=config.env.split, **{**config.env.kwargs, **more})
    factory.where = "env.kwargs."
    return factory
