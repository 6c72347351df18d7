"""Create the files of a new environment: a working example, its test, and its entry point."""

import keyword
import re
from dataclasses import dataclass
from pathlib import Path

from agentrl.env.registry import GROUP, env_ids
from agentrl.errors import ConfigError
from agentrl.scaffold import EntryPoint, write_files

_TEMPLATES = Path(__file__).with_name("template")
_NAME = re.compile(r"(?:(?P<namespace>[^/]*)/)?(?P<name>.*?)(?:-v(?P<version>\d+))?")


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
        f"{names.module}.py": ("the environment: a game to replace with your own", "environment.py"),
        f"test_{names.module}.py": ("its test, for pytest", "test_environment.py"),
    }
    entry = EntryPoint(GROUP, names.module, f"{names.module}:plug_in")
    return NewEnv(names, *write_files(folder, _TEMPLATES, files, vars(names), entry))
