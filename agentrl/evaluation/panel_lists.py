"""Several panels to evaluate on: chosen, named, and checked against their environments."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gymnasium

from agentrl.env.panel import Panel, load_panel, verify
from agentrl.env.registry import Factory, check_id
from agentrl.errors import AgentRLError, ConfigError, PanelError
from agentrl.evaluation.evaluate import player_config
from agentrl.evaluation.fingerprint import SCRIPTED
from agentrl.evaluation.panels import PanelSource, configured_panel_file, held_out_split, read_data_label
from agentrl.evaluation.suites import read_suite
from agentrl.rollout.settings import RolloutConfig
from agentrl.run.env_backend import open_one_environment
from agentrl.run.settings import PanelConfig, RunConfig
from agentrl.run.trust import caller_only_values
from agentrl.run.weights import find_policy

_log = logging.getLogger(__name__)

PanelEntry = Panel | PanelConfig


@dataclass(frozen=True)
class OpenedPanel:
    """One of several panels, checked against its environment; or the reason why it cannot be played.

    Args:
        label: The name of its row: the environment's id, with what tells it from other panels of the list.
        env: The id of the environment.
        panel: The panel; None if it cannot be played.
        data: The environment's label of the data behind its tasks.
        error: Why there is no panel.
    """

    label: str
    env: str
    panel: Panel | None = None
    data: str | None = None
    error: str | None = None


def configured_panels(config: RunConfig) -> tuple[PanelEntry, ...]:
    """Return the entries of `evaluation.panels`, with panel files read.

    Raises:
        ConfigError: If a file sets an argument that only the caller may set.
        PanelError: If a file cannot be read.
    """
    return tuple(
        configured_panel_file(config, entry, "evaluation.panels") if isinstance(entry, str) else entry
        for entry in config.evaluation.panels
    )


def lists_panels(policy: str, config: str | Path | None, overrides: Sequence[str]) -> bool:
    """Return whether the configuration of a policy lists several panels, or environments, to evaluate it on.

    Raises:
        ConfigError: If it is that of a run and sets arguments that only the caller may set.
    """
    saved = None if policy in SCRIPTED else find_policy(policy)
    if saved is not None and "evaluation.panels" in caller_only_values(saved.run.config):
        raise ConfigError(
            f"evaluation.panels of {saved.run.folder} sets arguments that only the caller of an environment "
            "may set; name the panels yourself, by --env, --panel or --suite"
        )
    settings = player_config(policy, config, overrides)
    return bool(settings.evaluation.panels or settings.names)


def choose_panels(
    config: RunConfig,
    panels: Sequence[PanelEntry | str | Path] = (),
    *,
    suite: str | Path | None = None,
    envs: Sequence[str] = (),
    split: str | None = None,
    tasks: int | None = None,
    env_kwargs: Mapping[str, Any] | None = None,
) -> list[PanelEntry]:
    """Return the panels that a caller names, else those that a configuration does; see `evaluate_panels`.

    Raises:
        ConfigError: If the arguments contradict each other, or a suite or a file is malformed.
        PanelError: If a panel file cannot be read.
    """
    if sum(map(bool, (panels, suite, envs))) > 1:
        raise ConfigError("panels, a suite and environments were given together: wanted one of them")
    if split is not None and (panels or suite):
        raise ConfigError(
            f"split is {split}, but panels and suites name their own: wanted it with environments"
        )
    if env_kwargs is not None and len(envs) != 1:
        raise ConfigError(
            f"{', '.join(env_kwargs)}: arguments of an environment need exactly one environment; write a "
            "suite file to give them to several"
        )
    entries: list[PanelEntry]
    if suite:
        entries = list(read_suite(suite))
    elif panels:
        entries = [load_panel(Path(each)) if isinstance(each, str | Path) else each for each in panels]
    elif envs or split is not None:
        named = envs or [env.label for env in config.environments]
        entries = [_panel_of(config, name, split, env_kwargs or {}) for name in named]
    elif config.evaluation.panels:
        entries = list(configured_panels(config))
    elif config.evaluation.panel is not None:
        entries = [configured_panel_file(config, config.evaluation.panel, "evaluation.panel")]
    else:
        entries = [_panel_of(config, env.label, None, {}) for env in config.environments]
    return [_shortened(entry, tasks) for entry in entries]


def _panel_of(config: RunConfig, name: str, split: str | None, kwargs: Mapping[str, Any]) -> PanelConfig:
    """Return the panel of an environment by its id, or by its name among those of a configuration."""
    known = config.find_environment(name)
    own = {} if known is None else known.kwargs  # a run is measured in the environments that it knows
    return PanelConfig(name if known is None else known.id, split, None, {**own, **kwargs})


def _shortened(entry: PanelEntry, tasks: int | None) -> PanelEntry:
    """Return a panel of the given number of tasks, or of all that it lists."""
    if tasks is None:
        return entry
    if isinstance(entry, Panel):
        return entry.first(min(tasks, len(entry.tasks)))
    return replace(entry, tasks=tasks)


def open_panels(
    entries: Sequence[PanelEntry],
    config: RunConfig,
    rollout: Callable[[str], RolloutConfig],
    *,
    tolerant: bool = False,
) -> tuple[OpenedPanel, ...]:
    """Check panels against their environments, each opened in turn, and make those that are described.

    An environment that is not installed, or that fails, costs its own panel alone.

    Args:
        entries: The panels.
        config: The configuration, whose `evaluation` block says what an entry leaves open.
        rollout: Returns the rollout settings for the id of an environment.
        tolerant: Whether an unknown environment, split or argument costs its panel alone as well.

    Raises:
        ConfigError: If there are no entries, or an environment, a split or an argument is unknown.
        PanelError: If a panel's tasks are no longer what they were when it was made.
    """
    if not entries:
        raise ConfigError("the list of panels is empty, wanted at least one")
    return tuple(
        _open_entry(label, entry, config, rollout(entry.env), tolerant)
        for label, entry in zip(panel_labels(entries), entries, strict=True)
    )


def panel_labels(entries: Sequence[PanelEntry]) -> list[str]:
    """Return a name for each panel: its environment, and as much more as tells it from the others."""
    words = [[f"{name}={value}" for name, value in _arguments(entry).items()] for entry in entries]
    labels = [entry.env for entry in entries]
    for more in ([[entry.split or ""] for entry in entries], words):
        count = Counter(labels)
        labels = [
            " ".join(filter(None, (label, *extra))) if count[label] > 1 else label
            for label, extra in zip(labels, more, strict=True)
        ]
    count = Counter(labels)
    return [
        f"{label} #{labels[: index + 1].count(label)}" if count[label] > 1 else label
        for index, label in enumerate(labels)
    ]


def describe_failure(error: Exception) -> str:
    """Return in a line why a panel cannot be played; an unexpected error is named with its type."""
    text = str(error) if isinstance(error, AgentRLError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())


def _arguments(entry: PanelEntry) -> Mapping[str, Any]:
    return entry.env_kwargs if isinstance(entry, Panel) else entry.kwargs


def _open_entry(
    label: str, entry: PanelEntry, config: RunConfig, rollout: RolloutConfig, tolerant: bool
) -> OpenedPanel:
    """Open a panel in an environment of its own, which is closed again."""
    refused = () if tolerant else (ConfigError, PanelError)
    try:
        check_id(entry.env)  # before a process is started
        kwargs = _arguments(entry)
        if entry.split is None:
            with _one_environment(Factory(entry.env, **kwargs), rollout) as environment:
                entry = replace(entry, split=held_out_split(environment, config.evaluation.split))
        with _one_environment(Factory(entry.env, split=entry.split, **kwargs), rollout) as environment:
            panel = _checked(entry, config, environment)
            return OpenedPanel(label, entry.env, panel, read_data_label(environment))
    except refused as error:
        raise type(error)(f"panel {label}: {error}") from error
    except Exception as error:
        _log.debug("panel %s cannot be played", label, exc_info=True)
        return OpenedPanel(label, entry.env, error=describe_failure(error))


@contextmanager
def _one_environment(factory: Factory, rollout: RolloutConfig) -> Iterator[gymnasium.Env[str, str]]:
    with open_one_environment(factory, rollout) as environments, environments.borrow() as environment:
        yield environment


def _checked(entry: PanelEntry, config: RunConfig, environment: gymnasium.Env[str, str]) -> Panel:
    """Return the panel of an entry, verified or made."""
    if isinstance(entry, Panel):
        verify(entry, environment)
        return entry
    most_tasks = config.evaluation.tasks
    source = PanelSource(entry.env, entry.split or "", entry.kwargs, None, entry.tasks, most_tasks)
    return source.open_panel(environment)
