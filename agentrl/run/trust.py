"""Rules for the configuration of a run that someone else may have written."""

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from agentrl.config import Dotted, parse_overrides
from agentrl.env.registry import callers_arguments
from agentrl.errors import ConfigError
from agentrl.run.settings import RunConfig, config_from_tree, config_tree, stored_path, tree_by_index

# Keys that name programs to start, servers to contact, folders to write, and files or models to learn from.
# Only the caller's configuration or command line may set them: a run's folder may come from someone else.
CALLER_ONLY_KEYS = (
    "rollout.workers.interpreter",
    "rollout.ray.address",
    "engine.vllm.weights_folder",
    "engine.vllm.url",
    "warm_start.data",
    "warm_start.from",
    "learner.teacher",
)


def caller_only_values(config: RunConfig) -> dict[str, Any]:
    """Return the values of a configuration that only the caller may set, by dotted key.

    These are the values of `CALLER_ONLY_KEYS` that differ from the defaults, and the arguments that an
    environment declares in `callers_arguments` (see `agentrl.env.TextEnv`). If one of `evaluation.panels` has
    such an argument, they are all the caller's: without it, the panel would be another one.
    """
    tree, usual = config_tree(config), config_tree(RunConfig())
    named = {key: _value(tree, key) for key in CALLER_ONLY_KEYS if _value(tree, key) != _value(usual, key)}
    blocks = (panel for panel in config.evaluation.panels if not isinstance(panel, str))
    if any(callers_arguments(panel.env, panel.kwargs) for panel in blocks):
        named["evaluation.panels"] = _value(tree, "evaluation.panels")
    for env in config.environments:
        own = callers_arguments(env.id, env.kwargs)
        named |= {f"{env.key}.kwargs.{name}": env.kwargs[name] for name in own}
    return named


def drop_caller_only_values(config: RunConfig) -> RunConfig:
    """Return the configuration with every caller-only value reset to its default.

    Without the servers that it named, the policy is played on this machine with the `torch` engine.
    """
    named = caller_only_values(config)
    tree, usual = config_tree(config), config_tree(RunConfig())
    for key in named:
        *path, name = stored_path(tree, tuple(key.split(".")))
        block = _value(tree_by_index(tree), ".".join(path))
        if path[0] == "env":
            del block[name]
        else:
            block[name] = _value(usual, key)
    if "engine.vllm.url" in named:
        tree["engine"] |= {"name": "torch", "actors": None}
    if "rollout.ray.address" in named:
        tree["rollout"] |= {"backend": "local"}
    return config_from_tree(tree)


def check_confirmed(run: str, config: RunConfig, overrides: Sequence[str]) -> None:
    """Refuse to resume a run that sets caller-only values, unless the caller repeats each of them.

    Args:
        run: The run's folder.
        config: The configuration stored in it.
        overrides: The caller's `key=value` overrides.

    Raises:
        ConfigError: If a value is not repeated; the message holds the complete command.
    """
    tree = config_tree(config)
    given = [stored_path(tree, dotted) for dotted, _ in parse_overrides(overrides)]
    missing = {
        key: value
        for key, value in caller_only_values(config).items()
        if not any(_begins(stored_path(tree, tuple(key.split("."))), said) for said in given)
    }
    if missing:
        words = [*overrides, *as_overrides(missing)]
        raise ConfigError(
            f"{run} sets values that start, contact, read or unlock something: {', '.join(missing)}. Values "
            "from a run's folder are not used without your consent; if you trust them, repeat them:\n"
            f"agentrl train --resume {shlex.join([run, *words])}"
        )


def as_overrides(values: Mapping[str, Any]) -> list[str]:
    """Return `key=value` overrides, with each value written as YAML."""
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def _begins(key: Dotted, said: Dotted) -> bool:
    return key[: len(said)] == said


def _value(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree[part]
    return tree
