"""Arguments that several commands take, and their completion in a shell."""

import os
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated

import typer


def _complete_configuration(incomplete: str) -> list[str]:
    """Complete config files, and the values of `algorithm.name` and `env.id`."""
    words = os.environ.get("COMP_WORDS", "").split()  # bash splits words at "="
    key, equals, prefix = incomplete.rpartition("=")
    for named, known in (("algorithm.name", recipe_names), ("env.id", known_env_ids)):
        if key == named:
            return [f"{key}={name}" for name in known(prefix)]
        if named in words[-3:] and words[-1] in ("=", incomplete):
            return known(incomplete.removeprefix("="))
    if equals:
        return []
    from agentrl.run.config_files import shipped_configs

    below = Path(incomplete).parent if not incomplete.endswith("/") else Path(incomplete)
    near = [str(path) + "/" * path.is_dir() for path in sorted(below.glob("*"))] if below.is_dir() else []
    files = [path for path in near if path.endswith((".yaml", ".yml", "/"))]
    names = [*files, *shipped_configs(), "algorithm.name=", "env.id=", "seed="]
    return [name for name in dict.fromkeys(names) if name.startswith(incomplete)]


def recipe_names(incomplete: str) -> list[str]:
    """Return the names of the installed algorithms from their entry points, without importing them."""
    found = entry_points(group="agentrl.algorithms")
    return sorted(each.name for each in found if each.name.startswith(incomplete))


def known_env_ids(incomplete: str) -> list[str]:
    """Return the ids of the environments that begin so."""
    from agentrl.env.registry import env_ids

    return [name for name in env_ids() if name.startswith(incomplete)]


def suite_names(incomplete: str) -> list[str]:
    """Return the names of the shipped suites that begin so."""
    from agentrl.evaluation.suites import shipped_suites

    return [name for name in shipped_suites() if name.startswith(incomplete)]


def policy_names(incomplete: str) -> list[str]:
    """Return the scripted policies and the runs below `runs/`."""
    runs = [str(path.parent) for path in sorted(Path("runs").glob("*/config.yaml"))]
    return [name for name in ("human", "random", "expert", *runs) if name.startswith(incomplete)]


Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CONFIG] [KEY=VALUE]...",
        help="A YAML file, and overrides such as seed=1.",
        show_default=False,
        autocompletion=_complete_configuration,
    ),
]


Imports = Annotated[
    list[str] | None,
    typer.Option(
        "--import",
        metavar="FILE|MODULE",
        help="Load a Python file or module with environments or algorithms. Repeatable.",
        show_default=False,
    ),
]


def split_config(arguments: Sequence[str] | None) -> tuple[str | None, list[str]]:
    """Split the arguments into CONFIG, if given, and overrides."""
    given = list(arguments or ())
    if given and "=" not in given[0]:
        return given[0], given[1:]
    return None, given


def split_keys(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split `key=value` into keys of a configuration and arguments of an environment."""
    keys = [text for text in arguments if text.partition(".")[0] in ("policy", "rollout", "engine")]
    return keys, [text for text in arguments if text not in keys]
