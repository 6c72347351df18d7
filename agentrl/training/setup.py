"""Open everything that a run works with, once."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.importance import with_importance_correction
from agentrl.env.panel import Panel
from agentrl.errors import ConfigError
from agentrl.evaluation.panels import configured_panel
from agentrl.files import remove_leftovers
from agentrl.learn.ranks import ALONE, Ranks
from agentrl.planning.env_probe import play_random
from agentrl.planning.limits import is_open, resolve_limits
from agentrl.planning.preflight import check_run
from agentrl.planning.prompt_probe import check_prompts
from agentrl.policy.engine import Engine
from agentrl.policy.model import context_length, resolve_device, shortened
from agentrl.policy.prompt import Example
from agentrl.policy.sources import resolve
from agentrl.rollout.environments import Environments
from agentrl.rollout.placement import resolve_placement
from agentrl.rollout.players import ExpertPlayer, RandomPlayer
from agentrl.run.env_backend import environment_factory, open_environments
from agentrl.run.examples import find_examples, note_examples
from agentrl.run.folder import Run, changed_wording, create_run, note_wording
from agentrl.run.lock import RunLock
from agentrl.run.policies import Policy, fit_policy, load, names_actions
from agentrl.run.presets import misfits
from agentrl.run.settings import RunConfig
from agentrl.run.signals import Interruption


@dataclass(frozen=True)
class Session:
    """Objects that a run opens once and uses to its end.

    With several ranks, each has a session of its own: they share the episodes to play and the work of
    learning, and the first one writes the folder, which all can read.

    Args:
        config: The configuration, with the placement and the context limit that were found.
        algorithm: The algorithm, with the importance correction that the trainer asks for.
        run: The run on disk.
        lock: Holds the folder against other processes; None on all ranks but the first.
        environments: The training environments.
        tasks: The training tasks.
        panel: The tasks that every policy is evaluated on.
        has_expert: Whether the environment offers an expert.
        policy: The policy as the run begins.
        engine: Generates the replies of the policy.
        interruption: Holds signals back where a stop would do harm.
        ranks: The processes that learn together.
        rollout_ranks: The same processes, for messages between their rollout threads.
        notes: Lines to log at the start: what was decided while the session was opened.
        other_prompts: A warning that prompts differ from those the run was trained on, or None.
    """

    config: RunConfig
    algorithm: Algorithm
    run: Run
    lock: RunLock | None
    environments: Environments
    tasks: Sequence[str]
    panel: Panel
    has_expert: bool
    policy: Policy
    engine: Engine
    interruption: Interruption
    ranks: Ranks
    rollout_ranks: Ranks
    notes: tuple[str, ...] = ()
    other_prompts: str | None = None

    def describe(self, group_size: int) -> str:
        """Return the size of the run in a few lines: parameters, steps, episodes, updates.

        Args:
            group_size: The episodes of each task.
        """
        config, steps, warm = self.config, self.config.trainer.steps, self.config.warm_start
        groups, plays = config.rollout.groups_per_step, len(self.panel.tasks) * config.evaluation.repeats
        episodes, updates = steps * groups * group_size, steps * config.learner.updates_per_step
        served = self.policy.served
        parameters = sum(parameter.numel() for parameter in served.parameters())
        processes = f" of {self.ranks.count} processes" if self.ranks.count > 1 else ""
        source = f" of {warm.own_data}" if warm.own_data else ""
        return (
            f"{self.run.folder}: {config.env.id} with {config.algorithm.name}, "
            f"{parameters:,} parameters on {served.device}{processes}\n"
            f"cloning: {warm.steps} steps x {warm.batch_size} demonstrations{source}\n"
            f"training: {steps} steps x ({groups} tasks x {group_size} episodes) = "
            f"{episodes:,} episodes, {updates:,} updates\n"
            f"evaluation: {plays} episodes of {self.panel.split} per policy and decoding, "
            f"panel {self.panel.hash[:12]}"
        )

    def check_stop(self) -> None:
        """Stop here if any rank was asked to, or if another process owns the folder now.

        Raises:
            KeyboardInterrupt: A rank was asked to stop.
            AgentRLError: The folder is no longer this run's.
        """
        self.ranks.run_on_rank0(self.check_lock)
        if self.ranks.count == 1:
            self.interruption.check_stop()
        # Ranks stop together: one that stopped alone would leave the others waiting for it.
        elif any(self.ranks.gather(self.interruption.pop_request())):
            raise KeyboardInterrupt

    def check_lock(self) -> None:
        """Raise if another process owns the folder now."""
        if self.lock is not None:
            self.lock.check()

    def close(self) -> None:
        """Close the environments and the engine, and give the folder back."""
        try:
            self.environments.close()
            self.engine.close()
        finally:
            if self.lock is not None:
                self.lock.release()


def open_session(
    config: RunConfig,
    active: Run | None = None,
    *,
    interruption: Interruption | None = None,
    ranks: Ranks = ALONE,
) -> Session:
    """Open what a run works with: environments, tasks, panel, policy, engine and folder.

    Whatever is wrong with the configuration is found before a folder is made.

    Args:
        config: The configuration of the run.
        active: The run to continue; None makes a new folder.
        interruption: Holds signals back; None makes one that listens to nothing.
        ranks: The processes that do the run together.

    Raises:
        AgentRLError: The configuration, the environment or a file is wrong.
    """
    # With several ranks, only the first makes the folder; `create_run` then reports its problems to all.
    check_run(config, ranks.count, new_folder=active is None and ranks.count == 1)
    if config.trainer.threads is not None:
        torch.set_num_threads(config.trainer.threads)
    rollout, placement = ranks.run_on_rank0(
        lambda: resolve_placement(environment_factory(config), config.rollout, config.env.split, config.seed)
    )
    config = replace(config, rollout=rollout)
    with ExitStack() as undo:  # closes what is open already if a later part fails
        environments = open_training_environments(config)
        undo.callback(environments.close)
        found = ranks.raise_on_any_rank(partial(_inspect_env, config, environments, ranks.count))
        examples = ranks.run_on_rank0(lambda: find_examples(config, active, found.panel.tasks))
        named = ranks.raise_on_any_rank(partial(_named_policy, config, examples))
        made_from, notes = {}, [placement]
        if named is not None:
            assert named.source is not None
            made_from = {"model": named.source.record()}
            # The folder and every stage get the commit of the model, and the limits that it really has.
            config = replace(config, policy=replace(config.policy, revision=named.source.asked.revision))
        config, limit_notes = ranks.run_on_rank0(
            partial(_with_limits, config, environments, found.tasks, named, ranks.count)
        )
        notes += limit_notes
        if named is not None:
            measure = partial(check_prompts, config, environments, found.tasks[0], named, examples)
            notes.append(ranks.run_on_rank0(measure))
        run = Run(
            ranks.run_on_rank0(
                lambda: (active or create_run(config, placement=placement, **made_from)).folder
            ),
            config,
        )
        lock = RunLock(run.folder) if ranks.first else None
        if lock is not None:
            undo.callback(lock.release)
        ranks.run_on_rank0(partial(_own_folder, run.folder, lock))
        ranks.run_on_rank0(partial(note_examples, run, examples))
        policy = named or _own_policy(config, found, environments, run.folder / "tokenizer", ranks)
        wording = policy.dialogue.wording
        other_prompts = ranks.run_on_rank0(lambda: changed_wording(run, wording))
        ranks.run_on_rank0(lambda: note_wording(run, wording))
        engine = policy.engine(config)
        undo.pop_all()
    return Session(
        config=config,
        algorithm=with_importance_correction(
            config.algorithm.build(), config.trainer.importance_cap, default=config.trainer.correction
        ),
        run=run,
        lock=lock,
        environments=environments,
        tasks=found.tasks,
        panel=found.panel,
        has_expert=found.has_expert,
        policy=policy,
        engine=engine,
        interruption=interruption or Interruption(),
        ranks=ranks,
        rollout_ranks=ranks.new_group(),
        notes=tuple(note for note in notes if note is not None),
        other_prompts=other_prompts,
    )


def open_training_environments(config: RunConfig, *, expert: bool = False) -> Environments:
    """Open environments of the training split; `expert` asks them for the expert's actions."""
    asked = {"expert": True} if expert else {}
    return open_environments(environment_factory(config, **asked), config.rollout)


@dataclass(frozen=True)
class _Found:
    tasks: Sequence[str]
    panel: Panel
    has_expert: bool


def _inspect_env(config: RunConfig, environments: Environments, ranks: int) -> _Found:
    """Ask an environment for its tasks, its panel and its expert."""
    with environments.borrow() as environment:
        known: Any = environment.unwrapped
        tasks: Sequence[str] = known.tasks(config.env.split)
        panel = configured_panel(config, environment)
    if len(panel.tasks) < ranks:
        raise ConfigError(
            f"evaluation.tasks is {len(panel.tasks)}, fewer than the {ranks} processes that share them"
        )
    return _Found(tasks, panel, _offers_expert(config))


def _named_policy(config: RunConfig, examples: Sequence[Example]) -> Policy | None:
    """Load the policy that the configuration names, if it names one."""
    block = config.policy
    return None if block.path is None else load(resolve(block.path, block.revision), block, examples)


def _with_limits(
    config: RunConfig, environments: Environments, tasks: Sequence[str], policy: Policy | None, ranks: int
) -> tuple[RunConfig, list[str]]:
    """Return the configuration with the lengths that the model and the texts give, and why, in lines."""
    notes = []
    if policy is not None and config.policy.max_context is not None:
        block, model = config.policy, policy.model
        if note := shortened(model, config.policy.max_context):
            notes.append(note)
        config = replace(config, policy=replace(block, max_context=context_length(model, block.max_context)))
    if is_open(config):
        episodes = play_random(config, environments, tasks)
        device = resolve_device(config.policy.device)
        config, measured = resolve_limits(config, config.algorithm.build(), episodes, device, ranks)
        notes += measured
    if policy is not None:
        notes += misfits(config, sum(parameter.numel() for parameter in policy.model.parameters()))
    return config, notes


def _offers_expert(config: RunConfig) -> bool:
    steps = 0 if config.warm_start.own_data else config.warm_start.steps
    try:
        with open_training_environments(config, expert=True) as environments, environments.borrow():
            return True
    except ConfigError as error:
        if not steps:
            return False
        raise ConfigError(
            f"warm_start.steps is {steps}, but {config.env.id} has no expert to clone ({error}); "
            "set warm_start.steps=0, name data to clone by warm_start.data, or let the environment take "
            "expert=True"
        ) from error


def _own_folder(folder: Path, lock: RunLock | None) -> None:
    """Lock the folder, and clear what a killed process left in it."""
    assert lock is not None
    lock.acquire()
    for inner in (folder, folder / "episodes", folder / "checkpoints"):
        remove_leftovers(inner)
    (folder / "episodes").mkdir(exist_ok=True)


def _own_policy(
    config: RunConfig, found: _Found, environments: Environments, tokenizer: Path, ranks: Ranks
) -> Policy:
    """Fit a policy; with several ranks, the first fits the tokenizer and the others read it."""

    def fit() -> Policy:
        # A tokenizer must know the replies as well: where these are free text, only an expert writes them.
        if tokenizer.is_dir() or not found.has_expert or names_actions(found.tasks, environments):
            return fit_policy(config, found.tasks, environments, RandomPlayer(), tokenizer)
        with open_training_environments(config, expert=True) as experts:
            return fit_policy(config, found.tasks, experts, ExpertPlayer(), tokenizer)

    fitted = ranks.raise_on_any_rank(lambda: fit() if ranks.first else None)
    return fitted or fit()
