"""Load Python files and modules that register environments and recipes without being installed.

    load_imports(["my_env.py"])

A file calls `agentrl.env.register(...)` or uses `@recipe`, either at import or in a function `plug_in()`.
Only imports that the user names are executed. Imports named in a run folder are recorded as withheld and
never executed, since the folder may come from someone else.
"""

import hashlib
import importlib
import importlib.util
import logging
import os
import re
import shlex
import sys
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from threading import RLock
from types import ModuleType
from typing import Any, Literal

from agentrl.errors import AgentRLError, ConfigError

Kind = Literal["environment", "recipe"]

_log = logging.getLogger(__name__)
_SUFFIXES = (".py", "/__init__.py")  # of a module's file
_MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


@dataclass
class _Imports:
    """The imports that this process has loaded, and those it has withheld."""

    lock: Any = field(default_factory=RLock)
    current: str | None = None  # the import that is being loaded
    registered: dict[str, set[Kind]] = field(default_factory=dict)  # loaded import -> kinds it registered
    by_module: dict[str, set[Kind]] = field(default_factory=dict)  # any module -> kinds it registered
    withheld: dict[str, str] = field(default_factory=dict)  # import -> the run that names it


_imports = _Imports()


def resolve_import(name: str, folder: str | Path = ".") -> str:
    """Return the absolute path of a file, or a dotted module name unchanged.

    Args:
        name: A file such as `my_env.py`, or a module such as `my_package.envs`.
        folder: The folder that a relative file path starts from.

    Raises:
        ConfigError: The name is neither.
    """
    if name.endswith(".py") or "/" in name or os.sep in name:
        return os.path.abspath(Path(folder, Path(name).expanduser()))
    if not _MODULE.fullmatch(name):
        raise ConfigError(f"import {name!r}: wanted a Python file, my_env.py, or a module, my_package.envs")
    return name


def load_imports(names: Iterable[str], folder: str | Path = ".") -> tuple[str, ...]:
    """Import files and modules, each once per process, and check that they register something.

    Args:
        names: Files or modules; see `resolve_import`.
        folder: The folder that relative paths start from.

    Returns:
        The absolute paths and module names, without duplicates.

    Raises:
        ConfigError: An import does not exist, fails, or registers nothing.
    """
    resolved = tuple(dict.fromkeys(resolve_import(name, folder) for name in names))
    with _imports.lock:
        for name in resolved:
            if name not in _imports.registered:
                _load(name)
    return resolved


def loaded_imports(kind: Kind | None = None) -> tuple[str, ...]:
    """Return the imports loaded in this process in order, optionally only those that registered a `kind`."""
    return tuple(name for name, kinds in _imports.registered.items() if kind is None or kind in kinds)


def import_hashes(names: Iterable[str]) -> dict[str, str]:
    """Return the SHA-256 of each import's file, leaving out imports whose file cannot be read."""
    hashes = {}
    for name in names:
        file = name if os.path.isabs(name) else getattr(sys.modules.get(name), "__file__", None)
        if file is not None and os.path.isfile(file):
            hashes[name] = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    return hashes


def current_import() -> str | None:
    """Return the import that is being loaded, if any."""
    return _imports.current


def record_registration(kind: Kind, module: str) -> None:
    """Record that code in `module` registered an environment or a recipe."""
    _imports.by_module.setdefault(module, set()).add(kind)
    if _imports.current is not None:
        _imports.registered.setdefault(_imports.current, set()).add(kind)


def withhold(names: Iterable[str], run: str | Path) -> None:
    """Record imports named in a run folder without executing them, so that errors can mention them."""
    for name in names:
        _imports.withheld.setdefault(name, str(run))


def withheld_imports() -> tuple[str, ...]:
    """Return the withheld imports that have not been loaded."""
    return tuple(name for name in _imports.withheld if name not in _imports.registered)


def withheld_hint() -> str:
    """Return a hint that an unknown name may come from a withheld import; empty if nothing was withheld."""
    missing = withheld_imports()
    if not missing:
        return ""
    runs = ", ".join(dict.fromkeys(_imports.withheld[name] for name in missing))
    options = " ".join(f"--import {shell_quoted(name)}" for name in missing)
    return (
        f". {runs} was made with {options}: code named in a run folder is not executed automatically; if "
        "you trust it, add that option (in Python: agentrl.load_imports)"
    )


def shell_quoted(name: str) -> str:
    """Return a name quoted for the shell, with unprintable characters escaped."""
    return shlex.quote(name) if name.isprintable() else repr(name)


def _load(name: str) -> None:
    """Import a file or module, undo the import if it fails, and check that it registers something."""
    if _imports.current is not None:
        raise ConfigError(
            f"import {name}: requested by {_imports.current} while that is being imported; put code that "
            'starts a run below `if __name__ == "__main__":`'
        )
    modules, path = set(sys.modules), list(sys.path)
    _imports.current = name
    try:
        module = _file(Path(name)) if os.path.isabs(name) else importlib.import_module(name)
        plug_in = getattr(module, "plug_in", None)
        if callable(plug_in):
            plug_in()
        # A program that uses agentrl as a library may have imported the module before.
        below = f"{module.__name__}."
        known = [kinds for other, kinds in _imports.by_module.items() if f"{other}.".startswith(below)]
        if not _imports.registered.setdefault(name, set()).union(*known):
            raise ConfigError(
                "registers nothing; wanted a call of agentrl.env.register(...) or a class with @recipe(...), "
                "at import or in plug_in()"
            )
        _imports.registered[name].update(*known)
    except BaseException as error:
        _imports.registered.pop(name, None)
        for added in set(sys.modules) - modules:  # so that a corrected file is read again
            if os.path.isabs(name) and _is_of(sys.modules[added], Path(name)):
                del sys.modules[added]
        sys.path[:] = path
        if not isinstance(
            error, Exception | SystemExit
        ):  # a module that calls exit() must not end the process
            raise
        raise ConfigError(f"import {_describe_failure(name, error)}") from error
    finally:
        _imports.current = None
    _log.debug("imported %s from %s", name, getattr(module, "__file__", None))


def _file(path: Path) -> ModuleType:
    """Import a file under its own name, or under a name derived from its path if that is taken."""
    if not path.is_file():
        raise ConfigError("is a folder, wanted a file" if path.is_dir() else "no such file")
    if path.suffix != ".py":
        raise ConfigError("wanted a file that ends in .py")
    plain = re.sub(r"\W", "_", path.stem)
    unique = f"{plain}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    for known in (sys.modules.get("__main__"), sys.modules.get(plain), sys.modules.get(unique)):
        if _is_of(known, path):
            assert known is not None
            return known
    name = plain if _is_free(plain, path) else unique
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    names = {name, unique}  # another process may have pickled its classes under either name
    sys.modules.update(dict.fromkeys(names, module))
    beside = str(path.parent)
    if beside not in sys.path:
        sys.path.append(beside)  # lets it import its neighbours; at the end, so that they shadow nothing
    spec.loader.exec_module(module)
    return module


def _is_of(module: ModuleType | None, path: Path) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and os.path.exists(file) and os.path.samefile(file, path)


def _is_free(name: str, path: Path) -> bool:
    """Return whether no other module has this name or would be imported under it."""
    if name in sys.modules:
        return False
    found = importlib.util.find_spec(name)
    return found is None or (found.origin is not None and Path(found.origin).resolve() == path.resolve())


def _describe_failure(name: str, error: BaseException) -> str:
    """Return the name of the import, the line that failed if known, and the error."""
    what = str(error) if isinstance(error, AgentRLError) else f"{type(error).__name__}: {error}"
    ends = (name,) if os.path.isabs(name) else tuple(f"/{name.replace('.', '/')}{end}" for end in _SUFFIXES)
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename.endswith(ends)]
    if isinstance(error, SyntaxError) and (error.filename or "").endswith(ends):
        lines.append(error.lineno)
        what = f"{type(error).__name__}: {error.msg}"
    line = f", line {lines[-1]}" if lines else ""
    beside = Path(f"{name}.py")
    if isinstance(error, ModuleNotFoundError) and error.name == name and beside.is_file():
        what += f"; wanted --import {beside} for the file of that name"
    return f"{name}{line}: {what}"
