"""Recipes: named sets of hyper-parameters, and the schema of a configuration's `algorithm` block."""

import warnings
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cache, partial, wraps
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar, get_args

from pydantic import PlainValidator, ValidationInfo

from agentrl.config import build, check_numbers, suggestion, to_tree
from agentrl.errors import ConfigError
from agentrl.plugins import record_registration, withheld_hint

if TYPE_CHECKING:
    from agentrl.algorithms.algorithm import Algorithm

ENTRY_POINTS = "agentrl.algorithms"

Preset = Literal["paper", "released", "ours"]
Presets = Mapping[str, Mapping[str, Any]]
Kind = Literal[
    "credit",
    "clipping",
    "token selection",
    "entropy",
    "rewards",
    "exploration",
    "rollouts",
    "replay",
    "correction",
    "imitation",
]
Confidence = Literal["official code read", "paper read", "reconstruction"]

_recipes: dict[str, type["Recipe"]] = {}
_broken: dict[str, str] = {}


@dataclass(frozen=True)
class Recipe:
    """Base class of recipes: a frozen dataclass that builds an algorithm.

    The type annotation of a number declares its bounds, see `agentrl.config`. A number outside its bounds is
    refused, whether it comes from Python or from a configuration. A subclass lists contradictions between
    fields in `_contradictions`; they are refused with a `ConfigError` that names them.

    PRESETS holds, by preset, the values that differ from the defaults, in addition to those of the base
    classes. An explicit field takes precedence over the preset. An explicit `base` has its own preset. A
    preset cannot set values of other config blocks, such as group size, learning rate and temperature.

    KIND says what the method mainly changes, and CONFIDENCE what its formula was checked against; a
    `reconstruction` is from an abstract or from what others wrote.

    Args:
        preset: `paper`, `released` (the code published with the paper, including behaviour that no field
            describes), or `ours`, the defaults. Where a paper or its code gives no value, ours is used.
    """

    name: ClassVar[str]
    KIND: ClassVar[Kind | None] = None
    CONFIDENCE: ClassVar[Confidence | None] = None
    PRESETS: ClassVar[Presets] = {}
    OFFICIAL: ClassVar[Collection[str]] = ()  # fields that `parity: official` sets; other values are refused
    OPEN: ClassVar[Collection[str]] = ()  # fields in which null means the preset's value

    preset: Preset = field(default="ours", kw_only=True)

    def __post_init__(self) -> None:
        mistakes = [text for wrong, text in self._contradictions() if wrong]
        if mistakes:
            raise ConfigError("; ".join(mistakes))

    @abstractmethod
    def build(self) -> "Algorithm":
        """Build the algorithm. This is cheap and deterministic."""
        raise NotImplementedError

    def _contradictions(self) -> Sequence[tuple[bool, str]]:
        """Return (whether it applies, message) for every contradiction between fields."""
        return []


def range_contradictions(recipe: Recipe, *names: str) -> Sequence[tuple[bool, str]]:
    """Return the contradictions of fields (lower bound, upper bound) whose first value is not the lower."""
    ranges = {name: getattr(recipe, name) for name in names}
    return [
        (not low < high, f"{name} is {[low, high]}, wanted the lower bound first")
        for name, (low, high) in ranges.items()
    ]


R = TypeVar("R", bound=type[Recipe])


def recipe(name: str) -> Callable[[R], R]:
    """Register a recipe class under the name that configurations use.

    Raises:
        ConfigError: If another class has the name.
    """

    def register(cls: R) -> R:
        known = _recipes.get(name)
        if known is not None and _qualified_name(known) != _qualified_name(cls):
            raise ConfigError(
                f"two recipes are named {name!r}: {_qualified_name(known)} and {_qualified_name(cls)}"
            )
        if not is_dataclass(cls):
            raise ConfigError(f"recipe {name!r} ({_qualified_name(cls)}) is not a dataclass")
        record_registration("recipe", cls.__module__)
        cls.name = name
        cls.__init__ = _with_preset(cls)  # type: ignore[method-assign]
        _recipes[name] = cls
        return cls

    return register


def preset_values(cls: type[Recipe], preset: str) -> dict[str, Any]:
    """Return the values that a preset sets, with nested recipes as blocks; empty for `ours`.

    Raises:
        ConfigError: For an unknown preset.
    """
    if preset not in get_args(Preset):
        raise ConfigError(f"preset is {preset!r}, wanted one of {', '.join(get_args(Preset))}")
    values: dict[str, Any] = {}
    for each in reversed(cls.__mro__):
        values |= vars(each).get("PRESETS", {}).get(preset, {})
    return values


def preset_overrides(recipe: Recipe, where: str = "algorithm") -> list[str]:
    """Describe every field, also of nested recipes, whose explicit value replaces the preset's value."""
    lines = []
    wanted = (
        {} if getattr(recipe, "parity", None) == "official" else preset_values(type(recipe), recipe.preset)
    )
    for item in fields(recipe):
        value, path = getattr(recipe, item.name), f"{where}.{item.name}"
        if item.name in wanted and value == _as_recipe(wanted[item.name]):
            continue
        if item.name in wanted:
            shown = "as given" if isinstance(value, Recipe) else repr(value)
            lines.append(f"{path} stays {shown}; preset={recipe.preset} has {wanted[item.name]!r}")
        if isinstance(value, Recipe):
            lines += preset_overrides(value, path)
    return lines


def _with_preset(cls: type[Recipe]) -> Callable[..., None]:
    """Return a constructor that takes the fields that are not given from the preset."""
    plain = cls.__init__
    order = [item.name for item in fields(cls) if item.init and not item.kw_only]

    @wraps(plain)
    def filled(self: Recipe, *args: Any, **given: Any) -> None:
        named = dict(zip(order, args, strict=False))
        if len(args) > len(order) or named.keys() & given.keys():
            plain(self, *args, **given)  # raises the usual TypeError
        values = _resolved_fields(cls, named | given)
        check_numbers(type(self), values)
        plain(self, **values)

    return filled


def _resolved_fields(cls: type[Recipe], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the given fields, completed by the preset and by `parity: official`.

    Raises:
        ConfigError: If a given field contradicts parity.
    """
    stated = _without_open_nulls(cls, given)
    preset = stated.get("preset", "ours")
    if stated.get("parity") != "official":
        return {name: _as_recipe(value) for name, value in preset_values(cls, preset).items()} | stated
    if preset == "paper":
        raise ConfigError("preset is 'paper', but parity=official implies the preset 'released'")
    released = preset_values(cls, "released")
    defaults = {item.name: item.default for item in fields(cls) if item.default is not MISSING}
    overruled = [
        f"{name} is {stated[name]!r}, but parity=official sets it to {released[name]!r}"
        for name in cls.OFFICIAL
        if name in stated and stated[name] not in (released[name], defaults[name])
    ]
    if overruled:
        raise ConfigError("; ".join(overruled))
    filled = {name: released[name] for name in (released if preset == "released" else cls.OPEN)}
    return (
        {name: _as_recipe(value) for name, value in filled.items()}
        | stated
        | {name: released[name] for name in cls.OFFICIAL}
        | {"preset": "released"}
    )


def _without_open_nulls(cls: type[Recipe], given: Mapping[str, Any]) -> dict[str, Any]:
    """Drop the fields in which null means the preset's value."""
    return {name: value for name, value in given.items() if value is not None or name not in cls.OPEN}


def _as_recipe(value: Any) -> Any:
    """Return the recipe of a block, and any other value unchanged."""
    if not isinstance(value, Mapping):
        return value
    return build_recipe(value["name"], {name: item for name, item in value.items() if name != "name"})


def recipe_names() -> list[str]:
    """Return the sorted names of all recipes, including those of installed plug-ins."""
    _load_plugins()
    return sorted(_recipes)


def recipe_class(name: str, where: str = "algorithm") -> type[Recipe]:
    """Return the recipe class with this name; `where` is the config block that names it.

    Raises:
        ConfigError: For an unknown name, with a suggestion and the plug-ins that failed to load.
    """
    _load_plugins()
    if name not in _recipes:
        broken = "".join(f"; plug-in {plugin} failed to load: {why}" for plugin, why in _broken.items())
        place = f"{where}.name" if where else "name"
        raise ConfigError(
            f"{place}: unknown recipe (got {name!r}; {suggestion(name, _recipes)}){broken}{withheld_hint()}"
        )
    return _recipes[name]


def build_recipe(name: str, settings: Mapping[str, Any] | None = None, where: str = "algorithm") -> Recipe:
    """Make the recipe `name` from plain values; missing fields take their defaults.

    Args:
        name: The name of the recipe.
        settings: The values of its fields.
        where: The dotted path of the block, for messages.

    Raises:
        ConfigError: For an unknown name, for invalid settings (one line per mistake), and for components that
            contradict each other.
    """
    cls = recipe_class(name, where)
    made = build(cls, _without_open_nulls(cls, settings or {}), where)
    try:
        _check_temperatures(made, made.build())
        if name in _names_inside(made):
            raise ConfigError(f"{name} is nested in itself, wanted each recipe at most once")
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}" if where else str(error)) from error
    return made


def _check_temperatures(made: Recipe, algorithm: "Algorithm") -> None:
    """Refuse a recipe that drops the temperatures of replies that its base sets.

    Raises:
        ConfigError: Naming both.
    """
    base = getattr(made, "base", None)
    inner = base.build().rollout.reply_temperature if isinstance(base, Recipe) else None
    if inner is not None and not _calls(algorithm.rollout.reply_temperature, inner):
        raise ConfigError(
            f"{made.name} drops the temperatures of replies that base {base.name!r} sets "  # type: ignore[union-attr]
            "(RolloutPlan.reply_temperature); wanted one method that sets them, or one that calls the base's"
        )


def _calls(hook: object, inner: object) -> bool:
    """Return whether a hook is another one, or gets it by `functools.partial`."""
    while isinstance(inner, partial):
        inner = inner.func
    while isinstance(hook, partial):
        if any(_calls(value, inner) for value in (*hook.args, *hook.keywords.values())):
            return True
        hook = hook.func
    return hook == inner


def _names_inside(recipe: Recipe) -> set[str]:
    inner = [value for item in fields(recipe) if isinstance(value := getattr(recipe, item.name), Recipe)]
    return {each.name for each in inner}.union(*map(_names_inside, inner))


def _nested(block: Any, info: ValidationInfo) -> Recipe:
    if isinstance(block, Recipe):
        return block
    if not isinstance(block, Mapping) or not isinstance(block.get("name"), str):
        raise ValueError(f"got {block!r}, wanted a block with the name of a recipe, as in {{name: grpo}}")
    settings = {key: value for key, value in block.items() if key != "name"}
    return build_recipe(block["name"], settings, ".".join(filter(None, (info.context, info.field_name))))


# Type of a field that holds another recipe, `{name: gigpo, ...}` in a configuration.
Base = Annotated[Recipe, PlainValidator(_nested)]


def recipe_tree(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe and its nested recipes as plain values with names; the inverse of `build_recipe`."""
    values = {item.name: getattr(recipe, item.name) for item in fields(recipe)}
    return {"name": recipe.name} | {
        name: recipe_tree(value) if isinstance(value, Recipe) else to_tree(value)
        for name, value in values.items()
    }


def broken_plugins() -> dict[str, str]:
    """Return the plug-ins that failed to load, with the reason."""
    _load_plugins()
    return dict(_broken)


@cache
def _load_plugins() -> None:
    for point in entry_points(group=ENTRY_POINTS):
        _load(point)


def _load(point: EntryPoint) -> None:
    """Import a plug-in. Any exception but a `ConfigError` marks the plug-in as broken."""
    before = dict(_recipes)
    try:
        point.load()
    except Exception as error:
        _recipes.clear()
        _recipes.update(before)
        if isinstance(error, ConfigError):
            raise
        _broken[point.name] = f"{type(error).__name__}: {error}"
        warnings.warn(
            f"algorithm plug-in {point.name!r} ({point.value}) was skipped: {_broken[point.name]}",
            stacklevel=3,
        )


def _qualified_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
