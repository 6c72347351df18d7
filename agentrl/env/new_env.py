"""Create the files of a new environment: a working example, its test, and its entry point."""

import keyword
import re
import shutil
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentrl.env.registry import GROUP, env_ids
from agentrl.errors import ConfigError

_TEMPLATES = Path(__file__).with_name("template")
_NAME = re.compile(r"(?:(?P<namespace>[^/]*)/)?(?P<name>.*?)(?:-v(?P<version>\d+))?")
_HEADER = re.compile(
    rf"""^[ \t]*\[\s*project\s*\.\s*entry-points\s*\.\s*["']{re.escape(GROUP)}["']\s*\][^\r\n]*""", re.M
)


@dataclass(frozen=True)
class Names:
    """Names of a new environment: its id, class and module.

    >>> Names.parse("my_lab/GuessNumber-v1")
    Names(id='my_lab/GuessNumber-v1', class_name='GuessNumber', module='guess_number_env')
    """

    id: str
    class_name: str
    module: str

    @classmethod
    def parse(cls, name: str) -> "Names":
        """Parse "my_lab/GuessNumber-v1", or "GuessNumber" with a default namespace and version.

        Raises:
            ConfigError: The name has another form.
        """
        found = _NAME.fullmatch(name)
        namespace, plain, version = (
            found.group("namespace", "name", "version") if found else (None, name, None)
        )
        if (
            not re.fullmatch("[A-Z][A-Za-z0-9]*", plain)
            or keyword.iskeyword(plain)
            or plain == "MultiTurnEnv"
        ):
            raise ConfigError(
                f"name {name!r}: {plain!r} is not a class name; wanted a name such as GuessNumber"
            )
        if namespace is not None and not re.fullmatch(r"[A-Za-z][\w-]*", namespace, re.A):
            raise ConfigError(
                f"name {name!r}: {namespace!r} is not a namespace; wanted letters, digits, '_' and '-'"
            )
        words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", plain).lower()
        return cls(
            f"{namespace or 'my'}/{plain}-v{int(version or 0)}", plain, f"{words.removesuffix('_env')}_env"
        )


@dataclass(frozen=True)
class NewEnv:
    """The files written for a new environment.

    Attributes:
        names: The names of the environment.
        files: The path and a description of each file.
        to_add: Lines to add to a pyproject.toml that could not be edited safely, or None.
    """

    names: Names
    files: dict[Path, str]
    to_add: str | None


def write_new_env(name: str, folder: str | Path = ".") -> NewEnv:
    """Write a small environment that can be trained on immediately, for its author to modify.

    No file is overwritten. An existing pyproject.toml gets the entry point only if nothing else in it
    changes.

    Args:
        name: A name such as "GuessNumber" or "my_lab/GuessNumber-v0".
        folder: The folder to write to; created if missing.

    Raises:
        ConfigError: The name is invalid or already registered, or a file already exists.
    """
    names, folder = Names.parse(name), Path(folder)
    if names.id in env_ids():
        raise ConfigError(f"name {name!r}: environment {names.id} is already installed; choose another name")
    files = {
        folder / f"{names.module}.py": ("the environment: a game to replace with your own", "environment.py"),
        folder / f"test_{names.module}.py": ("its test, for pytest", "test_environment.py"),
    }
    project, to_add = folder / "pyproject.toml", None
    changed = _with_entry(project, names.module) if project.exists() else None
    if not project.exists():
        files[project] = ("its package metadata, with the entry point", "pyproject.toml")
    elif changed is None:
        to_add = "\n".join(_entry(names.module))
    for path in files:
        if path.exists():
            raise ConfigError(f"{path} already exists and is not overwritten; choose another name or folder")
    folder.mkdir(parents=True, exist_ok=True)
    for path, (_, template) in files.items():
        with path.open("x", encoding="utf-8") as file:
            file.write(_render(template, names))
    written = {path: what for path, (what, _) in files.items()}
    if changed is not None:
        _replace(project, changed)
        written[project] = "entry point added"
    return NewEnv(names, written, to_add)


def _render(template: str, names: Names) -> str:
    """Render a template with the names of the environment."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), undefined=StrictUndefined, keep_trailing_newline=True
    )
    return environment.get_template(f"{template}.j2").render(vars(names))


def _entry(module: str) -> tuple[str, str]:
    return f'[project.entry-points."{GROUP}"]', f'{module} = "{module}:plug_in"'


def _with_entry(project: Path, module: str) -> str | None:
    """Return the text of pyproject.toml with the entry point added, or None if more would change."""
    try:
        text = project.read_bytes().decode()
        before = tomllib.loads(text)
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{project} cannot be read: {error}") from error
    project_table = before.get("project", {})
    if "name" not in project_table or "entry-points" in project_table.get("dynamic", ()):
        return None
    entries = project_table.get("entry-points", {}).get(GROUP, {})
    if module in entries:
        raise ConfigError(f"{project} already has an entry point {module!r} in {GROUP}; choose another name")
    newline = "\r\n" if "\r\n" in text else "\n"
    header, line = _entry(module)
    found = _HEADER.search(text)
    if found is not None:
        changed = text[: found.end()] + newline + line + text[found.end() :]
    else:
        changed = newline.join((text.rstrip(), "", header, line, ""))
    wanted: dict[str, Any] = tomllib.loads(text)
    wanted["project"].setdefault("entry-points", {})[GROUP] = entries | {module: f"{module}:plug_in"}
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
