"""Write the files of a new plug-in from templates, and its entry point into a pyproject.toml."""

import re
import shutil
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentrl.errors import ConfigError

PROJECT = "pyproject.toml"


@dataclass(frozen=True)
class EntryPoint:
    """Entry point of a plug-in in a pyproject.toml, as in `guess_number_env = "guess_number_env:plug_in"`."""

    group: str
    name: str
    value: str

    @property
    def lines(self) -> tuple[str, str]:
        """Return the header of its table, and its line."""
        return f'[project.entry-points."{self.group}"]', f'{self.name} = "{self.value}"'


def write_files(
    folder: Path,
    templates: Path,
    files: Mapping[str, tuple[str, str]],
    values: Mapping[str, Any],
    entry: EntryPoint,
) -> tuple[dict[Path, str], str | None]:
    """Write rendered templates and the entry point; overwrite no file.

    An existing pyproject.toml gets the entry point only if nothing else in it changes.

    Args:
        folder: The folder to write to; created if missing.
        templates: The folder of the templates; `pyproject.toml.j2` is written if there is no pyproject.toml.
        files: What each file is for and its template, by its name.
        values: What the templates are rendered with.
        entry: The entry point.

    Returns:
        What each written file is for, and the lines to add to a pyproject.toml that could not be edited
        safely, or None.

    Raises:
        ConfigError: If a file exists, or the pyproject.toml cannot be read or has the entry point.
    """
    planned = {folder / name: found for name, found in files.items()}
    project, to_add = folder / PROJECT, None
    changed = _with_entry(project, entry) if project.exists() else None
    if not project.exists():
        planned[project] = ("its package metadata, with the entry point", PROJECT)
    elif changed is None:
        to_add = "\n".join(entry.lines)
    for path in planned:
        if path.exists():
            raise ConfigError(f"{path} already exists and is not overwritten; choose another name or folder")
    folder.mkdir(parents=True, exist_ok=True)
    for path, (_, template) in planned.items():
        with path.open("x", encoding="utf-8") as file:
            file.write(_render(templates, template, values))
    written = {path: what for path, (what, _) in planned.items()}
    if changed is not None:
        _replace(project, changed)
        written[project] = "entry point added"
    return written, to_add


def _render(templates: Path, template: str, values: Mapping[str, Any]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(templates), undefined=StrictUndefined, keep_trailing_newline=True
    )
    return environment.get_template(f"{template}.j2").render(values)


def _with_entry(project: Path, entry: EntryPoint) -> str | None:
    """Return the text of pyproject.toml with the entry point added, or None if more would change."""
    try:
        text = project.read_bytes().decode()
        before = tomllib.loads(text)
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{project} cannot be read: {error}") from error
    project_table = before.get("project", {})
    if "name" not in project_table or "entry-points" in project_table.get("dynamic", ()):
        return None
    entries = project_table.get("entry-points", {}).get(entry.group, {})
    if entry.name in entries:
        raise ConfigError(
            f"{project} already has an entry point {entry.name!r} in {entry.group}; choose another name"
        )
    newline = "\r\n" if "\r\n" in text else "\n"
    header, line = entry.lines
    pattern = (
        rf"""^[ \t]*\[\s*project\s*\.\s*entry-points\s*\.\s*["']{re.escape(entry.group)}["']\s*\][^\r\n]*"""
    )
    found = re.search(pattern, text, re.M)
    if found is not None:
        changed = text[: found.end()] + newline + line + text[found.end() :]
    else:
        changed = newline.join((text.rstrip(), "", header, line, ""))
    wanted: dict[str, Any] = tomllib.loads(text)
    wanted["project"].setdefault("entry-points", {})[entry.group] = entries | {entry.name: entry.value}
    try:
        return changed if tomllib.loads(changed) == wanted else None
    except tomllib.TOMLDecodeError:
        return None


def _replace(path: Path, text: str) -> None:
    path = path.resolve()  # keeps a symbolic link
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(text.encode())
    shutil.copymode(path, partial)
    partial.replace(path)
