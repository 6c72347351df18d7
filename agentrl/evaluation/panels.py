"""The panel and environments that a policy is evaluated on."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import gymnasium

from agentrl.env.containment import open_env
from agentrl.env.contract.answers import MAX_NAME_CHARS
from agentrl.env.panel import Panel, load_panel, make_panel, verify
from agentrl.env.registry import Factory, callers_arguments, make
from agentrl.errors import ConfigError, EnvironmentContractError
from agentrl.rollout.environments import Environments
from agentrl.rollout.settings import RolloutConfig
from agentrl.run.env_backend import open_environments
from agentrl.run.mixture import MixedEnvConfig
from agentrl.run.settings import RunConfig
from agentrl.values import ValueFaultError, as_text


@dataclass(frozen=True)
class PanelSource:
    """The environment of an evaluation, with its panel or with what one is made from.

    Args:
        env: The id of the environment.
        split: The split of its tasks.
        kwargs: The arguments of the environment.
        panel: The panel; None makes one of the first tasks of the split.
        tasks: How many tasks such a panel has; None takes `most_tasks`, or all where the split has fewer.
        most_tasks: The configured number of tasks.
    """

    env: str
    split: str
    kwargs: Mapping[str, Any]
    panel: Panel | None
    tasks: int | None
    most_tasks: int

    def open_panel(self, environment: gymnasium.Env[str, str]) -> Panel:
        """Return the panel, checked against the environment or made from it.

        Raises:
            PanelError: If the panel's tasks are no longer what they were when it was made.
        """
        if self.panel is not None:
            verify(self.panel, environment)
            return self.panel
        known: Any = environment.unwrapped
        tasks = self.tasks or min(self.most_tasks, len(known.tasks(self.split)))
        return make_panel(self.env, self.split, tasks, self.kwargs, environment)


def given_panel(
    panel: Panel | str | Path | None,
    env: str | None,
    split: str | None,
    tasks: int | None,
    env_kwargs: Mapping[str, Any] | None,
) -> Panel | None:
    """Return the panel that the caller names, read from its file where it is a path; None without one.

    Raises:
        ConfigError: If the arguments contradict each other.
    """
    if tasks is not None and tasks < 1:
        raise ConfigError(f"tasks is {tasks}, wanted at least 1")
    if panel is None:
        return None
    if (env, split, tasks, env_kwargs) != (None, None, None, None):
        raise ConfigError(
            "a panel names its own env, arguments, split and tasks: give the panel or those, not both"
        )
    return panel if isinstance(panel, Panel) else load_panel(Path(panel))


def choose_panel(
    config: RunConfig,
    given: Panel | None,
    env: str | None,
    split: str | None,
    tasks: int | None,
    env_kwargs: Mapping[str, Any] | None,
) -> PanelSource:
    """Choose what to evaluate on: the given panel, else the named tasks, else what is configured."""
    if given is None and (env, split, tasks, env_kwargs) == (None, None, None, None):
        if config.evaluation.panels:
            raise ConfigError(
                f"evaluation.panels names {len(config.evaluation.panels)} panels: evaluate them with "
                "`agentrl evaluate` or agentrl.evaluate_panels, or name one panel"
            )
        given = _configured_file(config)
    most_tasks = config.evaluation.tasks
    if given is not None:
        return PanelSource(given.env, given.split, dict(given.env_kwargs), given, None, most_tasks)
    if env is None and config.names:
        raise ConfigError(
            f"env lists several environments: name one of them, {', '.join(config.names)}, or evaluate all "
            "with `agentrl evaluate` or agentrl.evaluate_panels"
        )
    known = config.only_env if env is None else config.find_environment(env)
    id = (env or "") if known is None else known.id
    kwargs = {**({} if known is None else known.kwargs), **(env_kwargs or {})}
    split = split or find_split(id, kwargs, config.evaluation.split)
    return PanelSource(id, split, kwargs, None, tasks, most_tasks)


def configured_panel(config: RunConfig, environment: gymnasium.Env[str, str] | None = None) -> Panel:
    """Return the panel that a configuration describes.

    That of one of several environments is of its last split if it has none of the configured name, and of all
    tasks if it has fewer than are configured.

    Args:
        config: The configuration of a run, with one environment.
        environment: An environment made for it; None makes one.
    """
    env, block = config.only_env, config.evaluation
    panel = _configured_file(config)
    if panel is not None:
        verify(panel)
        return panel
    if block.panels:
        raise ConfigError(
            f"evaluation.panels names {len(block.panels)} panels for `agentrl evaluate`, but a run measures "
            "its policies on one: wanted evaluation.panel, or evaluation.split and evaluation.tasks"
        )
    if not isinstance(env, MixedEnvConfig):
        return make_panel(env.id, block.split, block.tasks, env.kwargs, environment)
    if environment is None:
        with open_env(lambda: make(env.id, **env.kwargs)) as environment:
            return configured_panel(config, environment)
    split = held_out_split(environment, block.split)
    return PanelSource(env.id, split, env.kwargs, None, None, block.tasks).open_panel(environment)


def open_panel_environments(
    env: str, split: str, kwargs: Mapping[str, Any], rollout: RolloutConfig, *, expert: bool = False
) -> Environments:
    """Open the environments of a panel; with `expert`, they report their expert's next action."""
    extra = {"expert": True} if expert else {}
    return open_environments(Factory(env, split=split, **{**kwargs, **extra}), rollout)


def data_label(environments: Environments) -> str | None:
    """Return the environments' label of the data behind their tasks, e.g. `generated`; None without one."""
    with environments.borrow() as environment:
        return read_data_label(environment)


def read_data_label(environment: gymnasium.Env[str, str]) -> str | None:
    """Return the label of the data in the environment's attribute `data`, or None if it has none.

    Raises:
        EnvironmentContractError: If the attribute is not a short text.
    """
    label = getattr(environment.unwrapped, "data", None)
    try:
        return None if label is None else as_text(label, MAX_NAME_CHARS)
    except ValueFaultError as fault:
        raise EnvironmentContractError(f"the environment's attribute data {fault}") from fault


def _configured_file(config: RunConfig) -> Panel | None:
    path = config.evaluation.panel
    return None if path is None else configured_panel_file(config, path, "evaluation.panel")


def configured_panel_file(config: RunConfig, path: str, key: str) -> Panel:
    """Read a panel file that a configuration names under a key.

    Raises:
        ConfigError: If it sets an argument that only the caller may set.
        PanelError: If it cannot be read.
    """
    panel = load_panel(Path(path))
    env = config.find_environment(panel.env)
    known = {} if env is None else env.kwargs
    for name in callers_arguments(panel.env, panel.env_kwargs):
        if name not in known or known[name] != panel.env_kwargs[name]:
            raise ConfigError(
                f"{key}: {path} sets the argument {name} of {panel.env}, which only its caller "
                "may set; remove it from the panel, set the same value in env.kwargs, or name the panel on "
                "the command line (--panel)"
            )
    return panel


def find_split(env: str, kwargs: Mapping[str, Any], preferred: str) -> str:
    """Return the split of an environment to evaluate on."""
    with open_env(lambda: make(env, **kwargs)) as environment:
        return held_out_split(environment, preferred)


def held_out_split(environment: gymnasium.Env[str, str], preferred: str) -> str:
    """Return the preferred split if the environment has it, else its last one, held out by convention."""
    splits: tuple[str, ...] = cast(Any, environment.unwrapped).splits
    return preferred if preferred in splits else splits[-1]
