"""Create the files of a new algorithm: a working method over another one, its test, and its entry point."""

import keyword
import re
from dataclasses import dataclass
from pathlib import Path

from agentrl.algorithms.recipe import ENTRY_POINTS, recipe_names
from agentrl.errors import ConfigError
from agentrl.scaffold import EntryPoint, write_files

_TEMPLATES = Path(__file__).with_name("template")


@dataclass(frozen=True)
class Names:
    """Names of a new algorithm: in configurations, of its class and of its module.

    >>> Names.parse("my_method")
    Names(name='my_method', class_name='MyMethod', module='my_method_algorithm')
    """

    name: str
    class_name: str
    module: str

    @classmethod
    def parse(cls, name: str) -> "Names":
        """Derive the other names from the name in configurations.

        Raises:
            ConfigError: The name has another form.
        """
        if not re.fullmatch("[a-z][a-z0-9]*(_[a-z0-9]+)*", name) or keyword.iskeyword(name):
            raise ConfigError(f"name {name!r} is not the name of a recipe; wanted a name such as my_method")
        words = "".join(word.capitalize() for word in name.split("_"))
        return cls(name, words, f"{name.removesuffix('_algorithm')}_algorithm")


@dataclass(frozen=True)
class NewAlgorithm:
    """The files written for a new algorithm.

    Attributes:
        names: The names of the algorithm.
        files: The path and a description of each file.
        to_add: Lines to add to a pyproject.toml that could not be edited safely, or None.
    """

    names: Names
    files: dict[Path, str]
    to_add: str | None


def write_new_algorithm(name: str, folder: str | Path = ".") -> NewAlgorithm:
    """Write a small method that can be trained with immediately, for its author to modify.

    Args:
        name: The name in configurations, such as "my_method".
        folder: The folder to write to; created if missing.

    Raises:
        ConfigError: The name is invalid or already registered, or a file already exists.
    """
    names = Names.parse(name)
    if name in recipe_names():
        raise ConfigError(f"name {name!r}: recipe {name} is already installed; choose another name")
    files = {
        f"{names.module}.py": ("the algorithm: a formula to replace with your own", "algorithm.py"),
        f"test_{names.module}.py": ("its test, for pytest", "test_algorithm.py"),
    }
    entry = EntryPoint(ENTRY_POINTS, names.module, names.module)
    return NewAlgorithm(names, *write_files(Path(folder), _TEMPLATES, files, vars(names), entry))
