"""Load Python files and modules that register environments and recipes, for who does not package them.

    load_imports(["my_env.py"])

A file registers by `agentrl.env.register(...)` and `@recipe`, as it is imported or in its own `plug_in()`.
Only who starts a run names its imports: what the folder of a run names is withheld, and never executed.
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
_ENDS = (".py", "/__init__.py")  # of a module's file
_MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


@dataclass
class _Imports:
    """What this process has imported, and what it was only told of."""

    lock: Any = field(default_factory=RLock)
    current: str | None = None  # the import whose code runs now
    registered: dict[str, set[Kind]] = field(default_factory=dict)  # by each import that is loaded
    by_module: dict[str, set[Kind]] = field(default_factory=dict)  # by each module, imported here or not
    withheld: dict[str, str] = field(default_factory=dict)  # import -> the run that names it


_imports = _Imports()


def resolve_import(name: str, folder: str | Path = ".") -> str:
    """Return a file's absolute path, or a dotted module name as it is.

    Args:
        name: of a file, `my_env.py`, or of a module, `my_package.envs`.
        folder: that a file's path is relative to.

    Raises:
        ConfigError: it is neither.
    """
    if name.endswith(".py") or "/" in name or os.sep in name:
        return os.path.abspath(Path(folder, Path(name).expanduser()))
    if not _MODULE.fullmatch(name):
        raise ConfigError(f"import {name!r}: wanted a Python file, my_env.py, or a module, my_package.envs")
    return name


def load_imports(names: Iterable[str], folder: str | Path = ".") -> tuple[str, ...]:
    """Import files and modules, each once per process, and check that they register something.

    Args:
        names: of files or modules, see `resolve_import`.
        folder: that paths are relative to.

    Returns:
        Absolute paths and module names, each once.

    Raises:
        ConfigError: one is not there, fails, or registers nothing.
    """
    resolved = tuple(dict.fromkeys(resolve_import(name, folder) for name in names))
    with _imports.lock:
        for name in resolved:
            if name not in _imports.registered:
                _load(name)
    return resolved


def loaded_imports(kind: Kind | None = None) -> tuple[str, ...]:
    """Return what this process has imported, in that order; with `kind`, what registered one of those."""
    return tuple(name for name, kinds in _imports.registered.items() if kind is None or kind in kinds)


def import_hashes(names: Iterable[str]) -> dict[str, str]:
    """Return the SHA-256 of each import's file; an import whose file cannot be read has none."""
    hashes = {}
    for name in names:
        file = name if os.path.isabs(name) else getattr(sys.modules.get(name), "__file__", None)
        if file is not None and os.path.isfile(file):
            hashes[name] = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    return hashes


def current_import() -> str | None:
    """Return the import whose code runs now."""
    return _imports.current


def record_registration(kind: Kind, module: str) -> None:
    """Take note that code of `module` has registered something."""
    _imports.by_module.setdefault(module, set()).add(kind)
    if _imports.current is not None:
        _imports.registered.setdefault(_imports.current, set()).add(kind)


def withhold(names: Iterable[str], run: str | Path) -> None:
    """Take note of what a run's folder names, so that who misses something learns what to import."""
    for name in names:
        _imports.withheld.setdefault(name, str(run))


def withheld_imports() -> tuple[str, ...]:
    """Return what runs name that were opened here, and nobody has imported."""
    return tuple(name for name in _imports.withheld if name not in _imports.registered)


def withheld_hint() -> str:
    """Say what a name that is not known may be missing; empty where nothing was withheld."""
    missing = withheld_imports()
    if not missing:
        return ""
    whose = ", ".join(dict.fromkeys(_imports.withheld[name] for name in missing))
    options = " ".join(f"--import {shell_quoted(name)}" for name in missing)
    return (
        f". {whose} was made with {options}: nothing that a run's folder names is executed unasked; if you "
        "trust it, name it again (in Python: agentrl.load_imports)"
    )


def shell_quoted(name: str) -> str:
    """Return a name as a shell takes it; one that would steer the terminal escaped."""
    return shlex.quote(name) if name.isprintable() else repr(name)


def _load(name: str) -> None:
    if _imports.current is not None:
        raise ConfigError(
            f"import {name}: asked for by {_imports.current} while that is imported itself; what starts a "
            'run belongs below `if __name__ == "__main__":`'
        )
    modules, path = set(sys.modules), list(sys.path)
    _imports.current = name
    try:
        module = _file(Path(name)) if os.path.isabs(name) else importlib.import_module(name)
        plug_in = getattr(module, "plug_in", None)
        if callable(plug_in):
            plug_in()
        # It may have been imported before, by whoever uses agentrl as a library.
        below = f"{module.__name__}."
        known = [kinds for other, kinds in _imports.by_module.items() if f"{other}.".startswith(below)]
        if not _imports.registered.setdefault(name, set()).union(*known):
            raise ConfigError(
                "registers nothing; wanted agentrl.env.register(...) for an environment, or a class with "
                "@recipe(...), as it is imported or in its plug_in()"
            )
        _imports.registered[name].update(*known)
    except BaseException as error:
        _imports.registered.pop(name, None)
        for added in set(sys.modules) - modules:  # so that a mended file is read again
            if os.path.isabs(name) and _is_of(sys.modules[added], Path(name)):
                del sys.modules[added]
        sys.path[:] = path
        if not isinstance(error, Exception | SystemExit):  # a module that exits must not end the process
            raise
        raise ConfigError(f"import {_blamed(name, error)}") from error
    finally:
        _imports.current = None
    _log.debug("imported %s from %s", name, getattr(module, "__file__", None))


def _file(path: Path) -> ModuleType:
    """Import a file under its own name, or where another module has that one, under one made of its path."""
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
    names = {name, unique}  # what another process pickles is found by either
    sys.modules.update(dict.fromkeys(names, module))
    beside = str(path.parent)
    if beside not in sys.path:
        sys.path.append(beside)  # what it imports may lie beside it, and shadows nothing
    spec.loader.exec_module(module)
    return module


def _is_of(module: ModuleType | None, path: Path) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and os.path.exists(file) and os.path.samefile(file, path)


def _is_free(name: str, path: Path) -> bool:
    """Whether no other module has the name, or would get it."""
    if name in sys.modules:
        return False
    found = importlib.util.find_spec(name)
    return found is None or (found.origin is not None and Path(found.origin).resolve() == path.resolve())


def _blamed(name: str, error: BaseException) -> str:
    """The import, the line of it where there is one, and what went wrong."""
    what = str(error) if isinstance(error, AgentRLError) else f"{type(error).__name__}: {error}"
    ends = (name,) if os.path.isabs(name) else tuple(f"/{name.replace('.', '/')}{end}" for end in _ENDS)
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
