"""Evaluate a policy on a fixed panel of tasks, each played a fixed number of times."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from agentrl.env.names import unknown
from agentrl.env.panel import Panel
from agentrl.env.registry import Factory
from agentrl.errors import ConfigError
from agentrl.evaluation.fingerprint import SCRIPTED, panel_fingerprint, policy_fingerprint
from agentrl.evaluation.panels import choose_panel, given_panel, open_panel_environments, read_data_label
from agentrl.evaluation.playing import OnEpisode, play_panel, usage_of
from agentrl.evaluation.scores import Evaluation, summarise
from agentrl.rollout.placement import resolve_placement
from agentrl.rollout.settings import Placement, RolloutConfig
from agentrl.run.checkpoint_files import checkpoint_name
from agentrl.run.folder import Run
from agentrl.run.policies import open_player
from agentrl.run.settings import RunConfig, load_config, with_changes
from agentrl.run.trust import drop_caller_only_values
from agentrl.run.weights import find_policy


def evaluate(
    policy: Run | str | Path,
    panel: Panel | str | Path | None = None,
    *,
    env: str | None = None,
    split: str | None = None,
    tasks: int | None = None,
    env_kwargs: Mapping[str, Any] | None = None,
    repeats: int = 1,
    seed: int = 0,
    temperature: float = 1.0,
    placement: Placement | None = None,
    interpreter: str | None = None,
    config: str | Path | None = None,
    overrides: Sequence[str] = (),
    base_url: str | None = None,
    on_episode: OnEpisode | None = None,
) -> Evaluation:
    """Evaluate a policy on a panel and return its scores.

    Args:
        policy: A `Run`, the folder or name of one, a checkpoint RUN/checkpoints/NAME, a model as
            `policy.path` names one, `openai:MODEL` for a model on a chat server, `random` or `expert`. Of a
            run that has not finished, the newest checkpoint is evaluated.
        panel: A panel or its file. None takes the first `tasks` tasks of `split` of `env`, each of which
            defaults to the run's configuration, or to the default one if `policy` is not a run.
        env: The id of an environment.
        split: The split of its tasks; by default the configured one, or the environment's last split if it
            has none of that name.
        tasks: The number of tasks.
        env_kwargs: Arguments of the environment, added to those of a run that was trained on it.
        repeats: The number of episodes per task.
        seed: The seed of the environments and of the policy's sampling.
        temperature: The sampling temperature; 0 is greedy.
        placement: Where the environments run on this machine. None takes the run's placement for the run's
            environment, and `auto` for any other.
        interpreter: Another Python interpreter to run the environments in. One that a run names is not used.
        config: A configuration file with the environment, the panel and the settings for a policy that is not
            a run.
        overrides: `key=value` for keys of the configuration to play with instead of the run's or the file's,
            such as `policy.prompt=literature` or `rollout.constrained=false`.
        base_url: The address of the chat server of `openai:MODEL`; None takes it from OPENAI_BASE_URL.
        on_episode: Called with each episode when it ends.

    Raises:
        ConfigError: If arguments are unknown or contradict each other.
        PanelError: If the panel's tasks are no longer what they were when it was made.
        CheckpointError: If there is no such policy.
    """
    check_options(repeats, placement)
    given = given_panel(panel, env, split, tasks, env_kwargs)
    name = policy_name(policy)
    settings = settings_of_model(name, config, overrides) if config is not None else None
    player, settings = open_player(
        name, temperature=temperature, config=settings, overrides=overrides, base_url=base_url
    )
    source = choose_panel(settings, given, env, split, tasks, env_kwargs)
    rollout = rollout_config(settings, source.env, placement, interpreter)
    factory = Factory(source.env, split=source.split, **source.kwargs)
    rollout, _ = resolve_placement(factory, rollout, source.split, seed)
    with open_panel_environments(
        source.env, source.split, source.kwargs, rollout, expert=name == "expert"
    ) as environments:
        with environments.borrow() as environment:
            fixed = source.open_panel(environment)
            label = read_data_label(environment)
        began = time.perf_counter()
        played = play_panel(
            fixed, player, environments, rollout, repeats=repeats, seed=seed, on_episode=on_episode
        )
        found = summarise(played.episodes, fixed, repeats, data=label)
        seconds = time.perf_counter() - began
    turns = sum(len(episode.turns) for episode in (*played.episodes, *played.failures))
    return replace(
        found,
        retried=len(played.failures),
        checkpoint=None if settings.policy.path is None else checkpoint_name(Path(settings.policy.path)),
        steps_per_second=turns / seconds,
        fingerprint={
            **policy_fingerprint(name, settings, temperature, seed, player),
            **panel_fingerprint(fixed, label, repeats, rollout.max_turns),
        },
        usage=usage_of(player),
    )


def check_options(repeats: int, placement: Placement | None) -> None:
    """Refuse options of an evaluation that make no sense.

    Raises:
        ConfigError: Naming the option and what was wanted.
    """
    if repeats < 1:
        raise ConfigError(f"repeats is {repeats}, wanted at least 1")
    if placement not in (None, *get_args(Placement)):
        raise unknown("placement", placement, get_args(Placement))


def policy_name(policy: Run | str | Path) -> str:
    """Return the name under which a policy is opened."""
    return str(policy.folder) if isinstance(policy, Run) else str(policy)


def player_config(policy: str, config: str | Path | None, overrides: Sequence[str]) -> RunConfig:
    """Return the configuration that `open_player` opens a policy with, without a word or its weights.

    Raises:
        ConfigError: If a key or a value is wrong, or a file is given for a run.
        CheckpointError: If there is no such run or checkpoint.
    """
    if config is not None:
        return settings_of_model(policy, config, overrides, warn=_keep_quiet)
    if policy in SCRIPTED:
        return with_changes(RunConfig(), overrides)
    saved = find_policy(policy)
    if saved is not None:
        return with_changes(drop_caller_only_values(saved.run.config), overrides)
    return load_config(None, f"policy.path={policy}", *overrides, warn=_keep_quiet)


def settings_of_model(
    policy: str, file: str | Path, overrides: Sequence[str], warn: Callable[[str], None] | None = None
) -> RunConfig:
    """Return the configuration of a file for a policy that is not a run.

    Args:
        policy: The policy.
        file: The file.
        overrides: `key=value` overrides.
        warn: Called with each line about the configuration; None prints it.

    Raises:
        ConfigError: If the policy is a run, or a key or a value is wrong.
    """
    if find_policy(policy) is not None:
        raise ConfigError(f"--config {file}: {policy} is a run, which has a configuration; give keys instead")
    named = () if policy in SCRIPTED else (f"policy.path={policy}",)
    return load_config(file, *named, *overrides, warn=warn)


def _keep_quiet(line: str) -> None:
    """Say nothing: the lines are printed when the policy is opened."""


def rollout_config(
    config: RunConfig, env: str, placement: Placement | None, interpreter: str | None
) -> RolloutConfig:
    """Return the rollout settings of a configuration, adapted to the environment and the caller's choices."""
    known = config.find_environment(env) is not None
    rollout = config.alone(env).rollout if known else config.rollout
    if placement is not None or not known:  # its placement suited its own environment
        rollout = replace(rollout, backend="local", placement=placement or "auto")
    if interpreter is not None:
        workers = replace(rollout.workers, interpreter=interpreter)
        rollout = replace(rollout, placement=placement or "process", workers=workers)
    return rollout
