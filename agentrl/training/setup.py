"""Open everything that a run works with, once."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.filesize import decimal

from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.importance import with_importance_correction
from agentrl.env.panel import Panel
from agentrl.env.settings import EnvConfig
from agentrl.errors import ConfigError
from agentrl.evaluation.panels import configured_panel
from agentrl.files import remove_leftovers
from agentrl.learn.ranks import ALONE, Ranks
from agentrl.planning.env_probe import check_paraphrase, play_random
from agentrl.planning.limits import is_open, resolve_limits
from agentrl.planning.memory import sent_bytes
from agentrl.planning.preflight import check_run
from agentrl.planning.prompt_probe import check_prompts
from agentrl.policy.engine import Engine
from agentrl.policy.model import context_length, resolve_device, shortened
from agentrl.policy.prompt import Example
from agentrl.policy.sources import resolve
from agentrl.rollout.environments import Environments
from agentrl.rollout.mixture import MixedEnvironments
from agentrl.rollout.players import ExpertPlayer, RandomPlayer
from agentrl.run.env_backend import open_training_environments, resolve_placements
from agentrl.run.examples import find_examples, note_examples
from agentrl.run.folder import Run, changed_wording, create_run, note_wording
from agentrl.run.lock import RunLock
from agentrl.run.policies import Policy, environment_text, fit_policy, load, names_actions
from agentrl.run.presets import misfits
from agentrl.run.settings import RunConfig
from agentrl.run.signals import Interruption
from agentrl.run.tasks import MixedTasks, tasks_by_environment
from agentrl.run.teachers import LoadedTeacher, check_same_teacher, load_teacher


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
        tasks: The training tasks, see `MixedTasks` for those of several environments.
        panels: The tasks that every policy is evaluated on, by the label of their environment.
        experts: The labels of the environments that offer an expert.
        policy: The policy as the run begins.
        engine: Generates the replies of the policy.
        interruption: Holds signals back where a stop would do harm.
        ranks: The processes that learn together.
        rollout_ranks: The same processes, for messages between their rollout threads.
        notes: Lines to log at the start: what was decided while the session was opened.
        teacher: What the policy is taught by, if anything.
        other_prompts: A warning that prompts differ from those the run was trained on, or None.
    """

    config: RunConfig
    algorithm: Algorithm
    run: Run
    lock: RunLock | None
    environments: Environments
    tasks: Sequence[str]
    panels: Mapping[str, Panel]
    experts: frozenset[str]
    policy: Policy
    engine: Engine
    interruption: Interruption
    ranks: Ranks
    rollout_ranks: Ranks
    notes: tuple[str, ...] = ()
    teacher: LoadedTeacher | None = None
    other_prompts: str | None = None

    def describe(self, group_size: int) -> str:
        """Return the size of the run in a few lines: parameters, steps, episodes, updates.

        Args:
            group_size: The episodes of each task.
        """
        config, steps, warm = self.config, self.config.trainer.steps, self.config.warm_start
        groups, repeats = config.rollout.groups_per_step, config.evaluation.repeats
        episodes, updates = steps * groups * group_size, steps * config.learner.updates_per_step
        served = self.policy.served
        parameters = sum(parameter.numel() for parameter in served.parameters())
        processes = f" of {self.ranks.count} processes" if self.ranks.count > 1 else ""
        source = f" of {warm.own_data}" if warm.own_data else ""
        return (
            f"{self.run.folder}: {config.describe_environments()} with {config.algorithm.name}, "
            f"{parameters:,} parameters on {served.device}{processes}\n"
            f"cloning: {warm.steps} steps x {warm.batch_size} demonstrations{source}\n"
            f"training: {steps} steps x ({groups} tasks x {group_size} episodes) = "
            f"{episodes:,} episodes, {updates:,} updates\n"
            "evaluation: "
            + "; ".join(
                f"{len(panel.tasks) * repeats} episodes of {'' if label == panel.env else f'{label} '}"
                f"{panel.split} per policy and decoding, panel {panel.hash[:12]}"
                for label, panel in self.panels.items()
            )
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
    config, notes = ranks.run_on_rank0(partial(resolve_placements, config))
    placement = "; ".join(notes) or None
    with ExitStack() as undo:  # closes what is open already if a later part fails
        environments = open_training_environments(config)
        undo.callback(environments.close)
        found = ranks.raise_on_any_rank(partial(_inspect_environments, config, environments, ranks.count))
        tasks, panels = _training_tasks(config, found), {each.label: each.panel for each in found}
        experts, expert_notes = _experts(config, found)
        notes += expert_notes
        examples = ranks.run_on_rank0(
            lambda: find_examples(config, active, {label: panel.tasks for label, panel in panels.items()})
        )
        named = ranks.raise_on_any_rank(partial(_named_policy, config, examples))
        teacher = ranks.raise_on_any_rank(partial(load_teacher, config))
        made_from = {}
        if teacher is not None:
            notes += [teacher.describe()]
            made_from["teacher"] = ranks.run_on_rank0(partial(_recorded_teacher, teacher, active))
            config = replace(config, learner=replace(config.learner, teacher_revision=teacher.revision))
        if named is not None:
            assert named.source is not None
            made_from["model"] = named.source.record()
            # The folder and every stage get the commit of the model, and the limits that it really has.
            config = replace(config, policy=replace(config.policy, revision=named.source.asked.revision))
        config, limit_notes = ranks.run_on_rank0(
            partial(_with_limits, config, environments, tasks, named, ranks.count)
        )
        notes += limit_notes
        if named is not None:
            first = [own[0] for own in tasks_by_environment(tasks)]
            measure = partial(check_prompts, config, environments, first, named, examples)
            notes += ranks.run_on_rank0(measure)
        if config.engine.name == "vllm" and config.learner.lora is not None:
            size, what = sent_bytes(config)
            notes.append(f"sent to vLLM in a step: {decimal(size)}, {what}")
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
        policy = named or _own_policy(config, found, run.folder / "tokenizer", ranks)
        if teacher is not None:
            teacher.check(config, policy.model, policy.tokenizer)
        wording = policy.dialogue.wording
        other_prompts = ranks.run_on_rank0(lambda: changed_wording(run, wording))
        ranks.run_on_rank0(lambda: note_wording(run, wording))
        engine = policy.engine(config, config.largest_adapters)
        undo.pop_all()
    return Session(
        config=config,
        algorithm=with_importance_correction(
            config.algorithm.build(), config.trainer.importance_cap, default=config.trainer.correction
        ),
        run=run,
        lock=lock,
        environments=environments,
        tasks=tasks,
        panels=panels,
        experts=experts,
        policy=policy,
        engine=engine,
        interruption=interruption or Interruption(),
        ranks=ranks,
        rollout_ranks=ranks.new_group(),
        notes=tuple(notes),
        teacher=teacher,
        other_prompts=other_prompts,
    )


@dataclass(frozen=True)
class _Found:
    """Properties of one environment of a run.

    Args:
        config: The configuration of the run with this environment alone.
        environments: The training environments.
        tasks: The training tasks, under their own ids.
        panel: The tasks to evaluate on.
        no_expert: Why it offers no expert; None if it does.
    """

    config: RunConfig
    environments: Environments
    tasks: Sequence[str]
    panel: Panel
    no_expert: ConfigError | None

    @property
    def label(self) -> str:
        """Return the label of the environment."""
        return self.config.only_env.label


def _inspect_environments(config: RunConfig, environments: Environments, ranks: int) -> list[_Found]:
    """Ask each environment for its tasks, its panel and its expert."""
    members = environments.members if isinstance(environments, MixedEnvironments) else None
    return [
        _inspect(alone, environments if members is None else members[alone.only_env.label], ranks)
        for alone in config.each_alone()
    ]


def _inspect(config: RunConfig, environments: Environments, ranks: int) -> _Found:
    with environments.borrow() as environment:
        known: Any = environment.unwrapped
        tasks: Sequence[str] = known.tasks(config.only_env.split)
        panel = configured_panel(config, environment)
        check_paraphrase(config, environment, tasks)
    if len(panel.tasks) < ranks:
        raise ConfigError(
            f"evaluation.tasks is {len(panel.tasks)}, fewer than the {ranks} processes that share them"
        )
    return _Found(config, environments, tasks, panel, _missing_expert(config))


def _missing_expert(config: RunConfig) -> ConfigError | None:
    """Return why an environment offers no expert; None if it does."""
    try:
        with open_training_environments(config, expert=True) as environments, environments.borrow():
            return None
    except ConfigError as error:
        return error


def _training_tasks(config: RunConfig, found: Sequence[_Found]) -> Sequence[str]:
    if isinstance(config.env, EnvConfig):
        return found[0].tasks
    weights = {env.name: env.weight for env in config.env}
    return MixedTasks({each.label: each.tasks for each in found}, weights)


def _experts(config: RunConfig, found: Sequence[_Found]) -> tuple[frozenset[str], list[str]]:
    """Return the environments that offer an expert, and lines on those whose expert is missed.

    Raises:
        ConfigError: There is a warm start, and no expert to clone.
    """
    steps = 0 if config.warm_start.own_data else config.warm_start.steps
    missing = {each.label: each.no_expert for each in found if each.no_expert is not None}
    experts = frozenset(each.label for each in found) - missing.keys()
    if steps and not experts:
        names, reasons = " and ".join(missing), "; ".join(dict.fromkeys(map(str, missing.values())))
        raise ConfigError(
            f"warm_start.steps is {steps}, but {names} has no expert to clone ({reasons}); "
            "set warm_start.steps=0, name data to clone by warm_start.data, or let the environment take "
            "expert=True"
        ) from next(iter(missing.values()))
    return experts, [
        f"warm start: no demonstrations of {label}, which has no expert ({reason})"
        for label, reason in missing.items()
        if steps
    ]


def _recorded_teacher(teacher: LoadedTeacher, active: Run | None) -> dict[str, Any]:
    """Return the record of the teacher, which must be that of the run to continue."""
    found = teacher.record()
    if active is not None:
        check_same_teacher(active, found)
    return found


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


def _own_folder(folder: Path, lock: RunLock | None) -> None:
    """Lock the folder, and clear what a killed process left in it."""
    assert lock is not None
    lock.acquire()
    for inner in (folder, folder / "episodes", folder / "checkpoints"):
        remove_leftovers(inner)
    (folder / "episodes").mkdir(exist_ok=True)


def _own_policy(config: RunConfig, found: Sequence[_Found], tokenizer: Path, ranks: Ranks) -> Policy:
    """Fit a policy; with several ranks, the first fits the tokenizer and the others read it."""

    def texts() -> list[str]:
        return [text for each in found for text in _text(each, len(found))]

    fitted = ranks.raise_on_any_rank(lambda: fit_policy(config, texts, tokenizer) if ranks.first else None)
    return fitted or fit_policy(config, texts, tokenizer)


def _text(found: _Found, among: int) -> list[str]:
    """Return text of an environment to fit a tokenizer on."""
    config, tasks, environments = found.config, found.tasks, found.environments
    # A tokenizer must know the replies as well: where these are free text, only an expert writes them.
    if found.no_expert is not None or names_actions(tasks, environments):
        return environment_text(config, tasks, environments, RandomPlayer(), among)
    with open_training_environments(config, expert=True) as experts:
        return environment_text(config, tasks, experts, ExpertPlayer(), among)
