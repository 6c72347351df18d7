"""Registry of environments by id, based on Gymnasium's registry with plug-ins added.

A package provides environments through an entry point in the group `agentrl.envs`: a callable without
arguments that calls `register` for each id. For files that are not installed, see `agentrl.plugins`.
"""

import inspect
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from importlib.machinery import PathFinder
from importlib.metadata import EntryPoint, entry_points
from threading import RLock
from types import MappingProxyType
from typing import Any, cast

import cloudpickle
import gymnasium
from gymnasium.envs.registration import load_env_creator

from agentrl.env.names import unknown
from agentrl.errors import AgentRLError, ConfigError, MissingDependencyError
from agentrl.plugins import current_import, load_imports, loaded_imports, record_registration, withheld_hint

GROUP = "agentrl.envs"
_PLUGIN, _IMPORT = "plug-in", "import"

Creator = Callable[..., gymnasium.Env[str, str]]


class _Plugins:
    """State of the plug-ins of this process."""

    def __init__(self) -> None:
        self.lock = RLock()
        self.loaded = False
        self.loading: str | None = None  # the plug-in that is being loaded
        self.owners: dict[str, str] = {}  # environment id -> plug-in, import or module that registered it
        self.broken: dict[str, str] = {}  # plug-in -> error
        self.conflicts: list[str] = []


_plugins = _Plugins()


def register(id: str, entry_point: str | Creator, **kwargs: Any) -> None:
    """Register an environment.

    Args:
        id: The id, with namespace and version, such as "agentrl/ALFWorld-v0".
        entry_point: A string "module:Class", imported on first use, or a callable.
        kwargs: Default arguments of the constructor.

    Raises:
        ConfigError: The id is malformed, or already registered by another module.
    """
    module, imported = _calling_module(), current_import()
    owner = _plugins.loading or (f"{_IMPORT} {imported}" if imported is not None else f"module {module}")
    previous = _plugins.owners.get(id) or _foreign_owner(id)
    if previous not in (None, owner) and not _repeats(id, entry_point, kwargs):
        raise _DuplicateIdError(f"environment id {id!r} is registered twice: by {previous} and by {owner}")
    gymnasium.registry.pop(id, None)
    try:
        gymnasium.register(id, entry_point, order_enforce=False, disable_env_checker=True, kwargs=kwargs)
    except gymnasium.error.Error as error:
        raise ConfigError(f"environment id {id!r} cannot be registered: {error}") from error
    record_registration("environment", module)
    if not (previous or "").startswith(_PLUGIN):
        _plugins.owners[id] = owner


def _repeats(id: str, entry_point: str | Creator, kwargs: Mapping[str, Any]) -> bool:
    """Return whether a script and a plug-in register the same environment."""
    if _plugins.loading is not None and _plugins.owners.get(id, "").startswith(_PLUGIN):
        return False
    spec = gymnasium.registry[id]
    return spec.entry_point == entry_point and spec.kwargs == kwargs


class _DuplicateIdError(ConfigError):
    """Two registrations of the same id."""


def load_plugins() -> None:
    """Load every entry point of the group `agentrl.envs`, once per process.

    A plug-in that fails is skipped with a warning and listed by `broken_plugins`.

    Raises:
        ConfigError: Two plug-ins register the same id; every later call raises this again.
    """
    with _plugins.lock:
        if not _plugins.loaded:
            _plugins.loaded = True  # set first, since a plug-in may query the registry while it is loaded
            for entry in sorted(entry_points(group=GROUP), key=_origin):
                _load(entry)
            for plugin, error in _plugins.broken.items():
                warnings.warn(f"{plugin} is broken and was skipped: {error}", RuntimeWarning, stacklevel=2)
        if _plugins.conflicts:
            raise ConfigError("; ".join(_plugins.conflicts))


def _load(entry: EntryPoint) -> None:
    """Load a plug-in and record its errors."""
    _plugins.loading = _origin(entry)
    try:
        entry.load()()
    except _DuplicateIdError as error:
        _plugins.conflicts.append(str(error))
    except (Exception, SystemExit) as error:  # a module that calls exit() must not end the process
        _plugins.broken[_plugins.loading] = f"{type(error).__name__}: {error}"
    finally:
        _plugins.loading = None


def _origin(entry: EntryPoint) -> str:
    distribution = f" of {entry.dist.name}" if entry.dist is not None else ""
    return f"{_PLUGIN} {entry.name!r}{distribution} ({entry.value})"


def broken_plugins() -> Mapping[str, str]:
    """Return the error of each plug-in that failed to load."""
    load_plugins()
    return MappingProxyType(_plugins.broken)


def env_ids() -> list[str]:
    """Return the sorted ids of all registered text environments."""
    load_plugins()
    return sorted(id for id in _plugins.owners if id in gymnasium.registry)


def make(id: str, **kwargs: Any) -> gymnasium.Env[str, str]:
    """Make an environment.

    Args:
        id: An id of `env_ids()`, or of a text environment registered with Gymnasium directly.
        kwargs: The arguments of the constructor.

    Raises:
        ConfigError: The id, or the name or value of an argument, is invalid.
        MissingDependencyError: The environment needs a module that is not installed.
    """
    check_id(id)
    try:
        creator = _creator(id)
        _check_arguments(id, creator, kwargs)
        env = gymnasium.make(id, disable_env_checker=True, **kwargs)
    except AgentRLError:
        raise
    except ImportError as error:
        raise MissingDependencyError(f"environment {id!r} cannot be imported: {error}") from error
    except (TypeError, ValueError, gymnasium.error.Error) as error:
        raise ConfigError(f"environment {id!r} refused its arguments {kwargs}: {error}") from error
    missing = [name for name in ("tasks", "task_hash", "splits") if not hasattr(env.unwrapped, name)]
    if missing:
        env.close()
        lacks = ", ".join(missing)
        raise ConfigError(f"{id!r} is not a text environment: it has no {lacks}; see agentrl.env.TextEnv")
    return env


def callers_arguments(id: str, kwargs: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names in `kwargs` that only the user may set, not a run folder.

    The class of the environment declares them in its attribute `callers_arguments`. An unregistered
    environment declares none.
    """
    load_plugins()
    if not kwargs or id not in gymnasium.registry:
        return ()
    try:
        declared = getattr(_creator(id), "callers_arguments", ())
    except Exception:  # making the environment will raise the error
        return ()
    return tuple(name for name in kwargs if name in declared)


class Factory:
    """Picklable factory of environments with one id.

    In another process, it loads the same imports (see `agentrl.plugins`) and repeats a registration that no
    plug-in or import makes.

    Args:
        id: The environment id.
        kwargs: The arguments of the constructor.

    Attributes:
        where: The prefix of argument names in error messages, such as "env.kwargs.".
    """

    def __init__(self, id: str, **kwargs: Any) -> None:
        self.id = id
        self.kwargs = kwargs
        self.where = ""
        self._imports: tuple[str, ...] = ()  # loaded in the process that pickled it

    def __call__(self) -> gymnasium.Env[str, str]:
        """Make the environment, naming arguments with the prefix `where` in errors."""
        load_imports(self._imports)
        try:
            return make(self.id, **self.kwargs)
        except ConfigError as error:
            argument = re.split(r"[:.]", str(error), maxsplit=1)[0]
            if argument not in self.kwargs:
                raise
            raise ConfigError(f"{self.where}{error}") from error

    def __reduce__(self) -> tuple[Any, ...]:
        spec = gymnasium.registry.get(self.id)
        is_registered_there = _plugins.owners.get(self.id, "").startswith((_PLUGIN, _IMPORT))
        registration = None if spec is None or is_registered_there else (spec.entry_point, spec.kwargs)
        if registration is not None:
            _pickle_by_value(registration[0])
        imports = dict.fromkeys((*self._imports, *loaded_imports("environment")))
        return _rebuilt, (self.id, self.kwargs, registration, self.where, tuple(imports))


def _pickle_by_value(entry_point: Any) -> None:
    """Pickle the module of a class by value if other processes cannot import it."""
    module = sys.modules.get(getattr(entry_point, "__module__", ""))
    if module is not None and module.__name__ != "__main__":  # cloudpickle always pickles __main__ by value
        top = module.__name__.partition(".")[0]
        if top not in sys.builtin_module_names and PathFinder.find_spec(top) is None:
            cloudpickle.register_pickle_by_value(module)


def _rebuilt(
    id: str,
    kwargs: dict[str, Any],
    registration: tuple[Any, dict[str, Any]] | None,
    where: str = "",
    imports: tuple[str, ...] = (),
) -> Factory:
    """Rebuild a pickled factory, registering its environment if necessary."""
    load_plugins()
    if registration is not None and id not in gymnasium.registry:
        register(id, registration[0], **registration[1])
    factory = Factory(id, **kwargs)
    factory._imports = imports
    factory.where = where
    return factory


def check_id(id: str) -> None:
    """Check that an environment id is registered.

    Raises:
        ConfigError: It is not; the message suggests similar ids.
    """
    load_plugins()
    if id not in gymnasium.registry:
        raise _unknown_id(id)


def _unknown_id(id: str) -> ConfigError:
    error = ConfigError(f"{unknown('environment', id, env_ids())}{withheld_hint()}")
    if not _plugins.broken:
        return error
    reasons = "; ".join(f"{plugin}: {reason}" for plugin, reason in _plugins.broken.items())
    return ConfigError(f"{error}. Broken plug-ins: {reasons}")


def _creator(id: str) -> Creator:
    entry_point = gymnasium.registry[id].entry_point
    if entry_point is None:
        raise ConfigError(f"environment {id!r} has no entry point for a single environment")
    return cast(Creator, load_env_creator(entry_point) if isinstance(entry_point, str) else entry_point)


def _check_arguments(id: str, creator: Creator, kwargs: Mapping[str, Any]) -> None:
    """Refuse unknown argument names and splits before the environment is constructed."""
    parameters = inspect.signature(creator).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        for name in kwargs:
            if name not in parameters:
                raise unknown(f"argument of {id}", name, parameters)
    splits = getattr(creator, "splits", None)
    if "split" in kwargs and isinstance(splits, tuple) and kwargs["split"] not in splits:
        raise unknown(f"split of {id}", kwargs["split"], splits)


def _foreign_owner(id: str) -> str | None:
    spec = gymnasium.registry.get(id)
    return None if spec is None else f"Gymnasium ({spec.entry_point})"


def _calling_module() -> str:
    frame = inspect.currentframe()
    caller = frame.f_back.f_back if frame is not None and frame.f_back is not None else None
    return caller.f_globals.get("__name__", "?") if caller is not None else "?"
