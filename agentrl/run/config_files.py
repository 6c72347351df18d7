"""Configuration files: resolve `extends`, find shipped files, and locate mistakes by file and line."""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import files
from pathlib import Path
from typing import Any

from agentrl.config import Dotted, Tree, key_lines, read_yaml
from agentrl.errors import ConfigError
from agentrl.plugins import resolve_import

EXTENDS = "extends"
_PATH = re.compile(r"[A-Za-z_][\w-]*(?:\.[\w-]+)*")


@dataclass(frozen=True)
class ConfigFile:
    """Content of a YAML file without its `extends` key."""

    path: Path
    tree: Tree


def read_config_files(path: str | Path) -> list[ConfigFile]:
    """Read a configuration file and the files that it extends, base file first.

    `extends: FILE` names another file, relative to the extending file's folder, or a shipped one.

    Raises:
        ConfigError: If a file is missing or not YAML, or the files extend each other in a circle.
    """
    chain: list[ConfigFile] = []
    current = find_config(path)
    while True:
        names = [str(file.path) for file in chain]
        if any(os.path.samefile(current, name) for name in names):
            raise ConfigError(f"{EXTENDS}: a circle: {' -> '.join([*names, str(current)])}")
        tree = read_yaml(current)
        named = EXTENDS in tree
        parent = tree.pop(EXTENDS, None)
        chain.append(ConfigFile(current, _with_absolute_imports(tree, current.parent)))
        if not named:
            return chain[::-1]
        place = f"{current}, line {key_lines(current)[(EXTENDS,)]}: {EXTENDS}"
        if not isinstance(parent, str):
            raise ConfigError(f"{place}: got {parent!r}, wanted the name of one file")
        beside = current.parent / Path(parent).expanduser()
        try:
            current = beside if beside.exists() else find_config(parent)
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from error


def leaves(tree: Mapping[str, Any], above: Dotted = ()) -> Iterator[tuple[Dotted, Any]]:
    """Yield the values of a tree with their paths; an empty block counts as a value."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, (*above, key))
        else:
            yield (*above, key), value


def with_origins(
    message: str,
    files: Sequence[ConfigFile],
    overrides: Iterable[str] = (),
    stored_path: Callable[[Dotted], Dotted] = tuple,
) -> str:
    """Append to each mistake the file and line, or the override, that it comes from.

    Args:
        message: The mistakes, one per line, each starting with the path of a key.
        files: The files that were read; later ones override earlier ones.
        overrides: `key=value` overrides, which override all files.
        stored_path: Returns the path of a key in messages, given its path in a file or override.
    """
    origins: dict[Dotted, str] = {}
    for file in files:
        lines = key_lines(file.path)
        for key, line in lines.items():
            if key[0] != EXTENDS:
                origins |= dict.fromkeys((key, stored_path(key)), f"{file.path}, line {line}")
    for text in overrides:
        named = tuple(part.strip() for part in text.partition("=")[0].split("."))
        for key in (named, stored_path(named)):
            for below in [known for known in origins if known[: len(key)] == key]:
                del origins[below]
            origins[key] = f"override {text}"
    return "\n".join(_with_origin(line, origins) for line in message.splitlines())


def _with_origin(line: str, origins: Mapping[Dotted, str]) -> str:
    """Append the origins of the line's keys, or else those of its content or of the enclosing block."""
    told = re.sub(r"\[(\d+)\]", r".\1", line)  # an item of a list is a key here
    begins = [key for key in origins if re.match(rf"{re.escape('.'.join(key))}(?![\w-]|\.\w)", told)]
    dotted = [tuple(name.split(".")) for name in _PATH.findall(told) if "." in name]
    keys = [*sorted(begins, key=len)[-1:], *(key for key in dotted if key in origins)]
    first = _PATH.match(told)
    if not keys and first is not None:
        path = tuple(first[0].split("."))
        above = [path[:length] for length in range(len(path) - 1, 0, -1) if path[:length] in origins]
        keys = [key for key in origins if key[: len(path)] == path] or above[:1]
    found = list(dict.fromkeys(origins[key] for key in keys))[:3]
    return f"{line} [{'; '.join(found)}]" if found else line


def find_config(path: str | Path) -> Path:
    """Return a config file as given, or the shipped one of that name."""
    given = Path(path)
    if given.exists():
        return given
    for candidate in _shipped():
        if candidate.name == given.name:
            return candidate
    raise ConfigError(f"{path}: no such config file; shipped with agentrl: {', '.join(shipped_configs())}")


def shipped_configs() -> list[str]:
    """Return the names of the configs that come with agentrl."""
    return sorted({candidate.name for candidate in _shipped()})


def _shipped() -> list[Path]:
    # An editable install copies the configs only once; those next to the source are up to date.
    source = Path(__file__).parents[2]
    if (source / "pyproject.toml").is_file():
        return sorted(source.glob("configs/*.yaml"))
    return [
        Path(str(file.locate())).resolve()
        for file in files("agentrl") or ()
        if file.parent.as_posix().endswith("share/agentrl/configs")
    ]


def _with_absolute_imports(tree: Tree, folder: Path) -> Tree:
    """Resolve the entries of `run.imports` against the folder of the configuration file."""
    run = tree.get("run")
    if isinstance(run, dict) and isinstance(run.get("imports"), list):
        run["imports"] = [
            resolve_import(name, folder) if isinstance(name, str) else name for name in run["imports"]
        ]
    return tree
