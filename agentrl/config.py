"""Read YAML and `key=value` overrides into any frozen dataclass. This module knows no schema.

    tree = merge(read_yaml("configs/quickstart.yaml"), ["seed=1", "learner.learning_rate=1e-5"])
    config = build(RunConfig, tree)

Scalars follow YAML 1.2: `1e-5` is a number, `yes` and `2024-01-01` are text, `010` is ten.
"""

import dataclasses
import difflib
import math
import re
import typing
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar, cast

import yaml
from annotated_types import Ge, GroupedMetadata, Gt, Interval, Le, Lt
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import to_json

from agentrl.errors import ConfigError

Tree = dict[str, Any]
Dotted = tuple[str, ...]
T = TypeVar("T")

# Number types with bounds, for fields of settings and recipes. A field with other bounds declares its own, as
# in `beam: Annotated[int, Interval(ge=2, le=1000)] = 2`. Values above the upper bounds make no sense, and
# would overflow or exhaust the memory.
# Products of rates in the optimisers, with their corrections for the first steps, still fit into a float32.
MAX_RATE = 1e30

# Integers.
Seed = Annotated[int, Interval(ge=0, le=2**63 - 1)]
Count = Annotated[int, Interval(ge=1, le=1_000_000)]
OptionalCount = Annotated[int, Interval(ge=0, le=1_000_000)]
Steps = Annotated[int, Interval(ge=0, le=1_000_000_000)]
Tokens = Annotated[int, Interval(ge=1, le=2**30)]
ContextTokens = Annotated[int, Interval(ge=1, le=2**24)]
Processes = Annotated[int, Interval(ge=1, le=4096)]

# Numbers.
Share = Annotated[float, Interval(ge=0, le=1)]
PositiveShare = Annotated[float, Interval(gt=0, le=1)]
Decay = Annotated[float, Interval(ge=0, lt=1)]
Weight = Annotated[float, Interval(ge=0, le=1e6)]
PositiveWeight = Annotated[float, Interval(gt=0, le=1e6)]
SignedWeight = Annotated[float, Interval(ge=-1e6, le=1e6)]
Rate = Annotated[float, Interval(ge=0, le=MAX_RATE)]
PositiveRate = Annotated[float, Interval(gt=0, le=MAX_RATE)]
Seconds = Annotated[float, Interval(gt=0, le=1e6)]
Devices = Annotated[float, Interval(ge=0, le=1024)]

_MAX_DIGITS = 4_000  # of an integer: Python converts at most 4,300 digits
_MAX_DEPTH = 100  # of nested blocks and lists
_MAX_VALUES = 100_000  # of a file, with aliases expanded

_SCALARS = (
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf", "-+.0123456789"),
)


class _Loader(yaml.SafeLoader):
    """YAML loader with the scalars of YAML 1.2 that refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Construct a mapping, refusing keys that are not text and duplicate keys."""
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:str":
                raise yaml.MarkedYAMLError(None, None, "a key must be text", key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(None, None, f"duplicate key {key.value!r}", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """YAML dumper that quotes exactly the strings that `_Loader` would read as another type."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _kind in (_Loader, _Dumper):
    _kind.yaml_implicit_resolvers = {}
    for _name, _pattern, _first in _SCALARS:
        _kind.add_implicit_resolver(
            f"tag:yaml.org,2002:{_name}",
            re.compile(f"(?:{_pattern})$"),
            [first.strip("\0") for first in _first],
        )


def _integer(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    """Construct a decimal integer; PyYAML's own constructor reads a leading zero as octal."""
    digits = len(node.value.lstrip("+-"))
    if digits > _MAX_DIGITS:
        fault = f"an integer of {digits} digits, wanted at most {_MAX_DIGITS}"
        raise yaml.MarkedYAMLError(None, None, fault, node.start_mark)
    return int(node.value)


# Construct only the types that a configuration uses: no dates, bytes, sets or Python objects.
_Loader.yaml_constructors = {
    tag: constructor
    for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or str(tag).rpartition(":")[2] in ("null", "bool", "float", "str", "seq", "map")
}
_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


def read_yaml(path: str | Path) -> Tree:
    """Read a YAML file whose top level is a mapping; an empty file gives an empty one.

    Raises:
        ConfigError: The file cannot be read or parsed; the message names the file and, if known, the line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {error.start})") from error
    tree = _parse(text, str(path))
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path}: the top level is {_describe_value(tree)}, wanted a block of `key: value` lines"
        )
    return tree


def key_lines(path: str | Path) -> dict[Dotted, int]:
    """Return the line number of each key of a valid YAML file; list items are numbered from 0."""
    root = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    lines: dict[Dotted, int] = {}
    waiting: list[tuple[Dotted, Any]] = [((), root)]
    seen: set[int] = set()  # an aliased node occurs more than once, possibly inside itself
    while waiting:
        above, node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            inside = [(key.value, key, value) for key, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            inside = [(str(index), value, value) for index, value in enumerate(node.value)]
        else:
            continue
        for name, place, value in inside:
            lines[(*above, name)] = place.start_mark.line + 1
            waiting.append(((*above, name), value))
    return lines


def parse_overrides(overrides: Iterable[str]) -> list[tuple[Dotted, Any]]:
    """Split each `dotted.key=value`, parsing the value as YAML.

    >>> parse_overrides(["learner.learning_rate=1e-5"])
    [(('learner', 'learning_rate'), 1e-05)]

    Raises:
        ConfigError: An override is malformed; the message has one line for each mistake.
    """
    parsed: list[tuple[Dotted, Any]] = []
    mistakes: list[str] = []
    for text in overrides:
        name, equals, value = text.partition("=")
        dotted = tuple(part.strip() for part in name.split("."))
        if not equals or not all(dotted):
            mistakes.append(f"{text!r} is not an override (wanted key=value, as in learner.clip=0.5)")
        elif not value.strip():
            mistakes.append(f"{text!r} has no value ({name}=null sets none, {name}='\"\"' empty text)")
        else:
            try:
                parsed.append((dotted, _parse(value, f"override {_describe_value(text)}")))
            except ConfigError as error:
                mistakes.append(str(error))
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return parsed


def merge(tree: Mapping[str, Any], overrides: Iterable[str]) -> Tree:
    """Return a copy of `tree` with the overrides applied in order, creating missing blocks.

    Raises:
        ConfigError: An override is malformed, or its path leads through a value that is not a block.
    """
    return set_values(tree, parse_overrides(overrides))


def set_values(tree: Mapping[str, Any], changes: Iterable[tuple[Dotted, Any]]) -> Tree:
    """Return a copy of `tree` with the values set in order, creating missing blocks.

    Raises:
        ConfigError: A path leads through a value that is not a block.
    """
    result = deepcopy(dict(tree))
    mistakes = []
    for dotted, value in changes:
        block = result
        for depth, part in enumerate(dotted[:-1], start=1):
            if block.get(part) is None:
                block[part] = {}
            if not isinstance(block[part], dict):
                path = ".".join(dotted[:depth])
                mistakes.append(
                    f"{'.'.join(dotted)}: {path} is {_describe_value(block[part])}, not a block of keys"
                )
                break
            block = block[part]
        else:
            block[dotted[-1]] = value
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return result


def build(cls: type[T], tree: Mapping[str, Any], where: str = "") -> T:
    """Build the dataclass `cls`, and those nested in it, from a tree of plain values.

    Unknown keys are refused and types are strict: `true` and `"8"` are not integers; an integer is a number.

    Args:
        cls: The dataclass. A ValueError from `__post_init__` is reported as a mistake of its block.
        tree: The values by field name; missing fields take their defaults. Top-level values that already are
            dataclasses are used as they are.
        where: The dotted path of the block, prefixed to every path in the message.

    Raises:
        ConfigError: Values are invalid; the message has one line for each mistake,
            `path: what is wrong (got X, wanted Y)`.
    """
    made = {name: value for name, value in tree.items() if dataclasses.is_dataclass(value)}
    plain = {name: value for name, value in tree.items() if name not in made}
    known: Any = cls
    needed = tuple(
        field.name
        for field in dataclasses.fields(known)
        if key_of(field.name) in plain or (_required(field) and field.name not in made)
    )
    given = _validated(cls, needed, plain, where)
    try:
        return cls(**given, **made)
    except ValueError as error:
        raise ConfigError(_with_path(where, str(error))) from error


def key_of(field: str) -> str:
    """Return the key of a field: its name, without the underscore that tells it from a word of Python.

    >>> key_of("from_")
    'from'
    """
    return field.removesuffix("_")


def check_numbers(cls: type, values: Mapping[str, Any], where: str = "") -> None:
    """Check numbers against the types and bounds that the fields of a dataclass declare.

    This is for dataclasses that are not constructed by `build`. Fields that do not hold numbers are ignored.

    Args:
        cls: The dataclass.
        values: The values of some or all of its fields.
        where: The dotted path of the block, prefixed to every path in the message.

    Raises:
        ConfigError: Numbers are invalid; the message has one line for each mistake.
    """
    names = tuple(name for name in _number_fields(cls) if name in values)
    _validated(cls, names, {key_of(name): values[name] for name in names}, where)


def check_own_numbers(settings: Any, where: str = "") -> None:
    """Check all numbers of a dataclass instance against its fields; called in `__post_init__`."""
    names = _number_fields(cast(Hashable, type(settings)))
    check_numbers(type(settings), {name: getattr(settings, name) for name in names}, where)


def number_types(cls: type) -> dict[str, Any]:
    """Return the types, including bounds, of the dataclass fields that hold numbers or tuples of them."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {
        field.name: hints[field.name] for field in dataclasses.fields(cls) if _holds_number(hints[field.name])
    }


def bounds_of(kind: Any) -> str:
    """Return the bounds of a type in words; empty if it has none.

    >>> bounds_of(Annotated[int, Ge(1), Le(8)] | None)
    'at least 1 and at most 8'
    """
    if typing.get_origin(kind) is not Annotated:
        return next(filter(None, map(bounds_of, typing.get_args(kind))), "")
    return " and ".join(
        f"{words} {_number(getattr(bound, name))}"
        for bound in _metadata(kind)
        for type_, name, words in _BOUNDS
        if isinstance(bound, type_)
    )


_BOUNDS = ((Ge, "ge", "at least"), (Gt, "gt", "above"), (Le, "le", "at most"), (Lt, "lt", "below"))


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.15g}"


def _metadata(kind: Any) -> Iterator[Any]:
    for item in kind.__metadata__:
        yield from item if isinstance(item, GroupedMetadata) else (item,)


def _validated(cls: type, names: tuple[str, ...], values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the values of some fields converted to their types; raise `ConfigError` with every mistake."""
    # In JSON mode, a list can fill a tuple and a string an enum or a path, while all else stays strict.
    content = to_json(_without_huge_integers(values), inf_nan_mode="constants", fallback=repr)
    try:
        given: Any = _fields_adapter(cls, names).validate_json(
            content, strict=True, extra="forbid", context=where
        )
    except ValidationError as error:
        raise ConfigError("\n".join(_describe(error, cls, values, where))) from error
    return dict(vars(given))


def _without_huge_integers(value: Any) -> Any:
    """Return `value` with infinity in place of every integer that is too long to be parsed again."""
    if isinstance(value, Mapping):
        return {name: _without_huge_integers(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_huge_integers(item) for item in value]
    too_long = isinstance(value, int) and value.bit_length() > _MAX_BITS
    return math.copysign(math.inf, 1 if value > 0 else -1) if too_long else value


_MAX_BITS = 8192


@cache
def _fields_adapter(cls: Any, names: tuple[str, ...]) -> TypeAdapter[Any]:
    """Return the pydantic adapter of a dataclass that has only the fields `names` of `cls`."""
    hints = typing.get_type_hints(cls, include_extras=True)  # keeps validators in Annotated
    chosen: Any = dataclasses.make_dataclass(cls.__name__, [(name, hints[name]) for name in names])
    # The configuration applies to nested dataclasses too.
    chosen.__pydantic_config__ = ConfigDict(allow_inf_nan=False, alias_generator=key_of)
    return TypeAdapter(chosen)


@cache
def _number_fields(cls: Hashable) -> tuple[str, ...]:
    return tuple(number_types(cast(type, cls)))


def _holds_number(kind: Any) -> bool:
    """Return whether values of a type can be numbers or tuples of numbers."""
    if kind in (int, float):
        return True
    return typing.get_origin(kind) is not Callable and any(map(_holds_number, typing.get_args(kind)))


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def to_tree(value: Any) -> Any:
    """Convert a dataclass, recursively, to values of YAML and JSON; the inverse of `build`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            key_of(field.name): to_tree(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, Mapping):
        return {str(key): to_tree(item) for key, item in value.items()}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [to_tree(item) for item in value]
    return value


def to_yaml(tree: Any) -> str:
    """Return a tree as YAML in its own key order; the inverse of `read_yaml`."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def suggestion(unknown: str, known: Iterable[str]) -> str:
    """Return a hint with the known name that was probably meant, or with all known names.

    >>> suggestion("sede", ["seed", "env"])
    'did you mean seed?'
    """
    names = sorted(known)
    close = difflib.get_close_matches(unknown, names, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(names) or 'none'}"


def _check_size(text: str) -> None:
    """Refuse YAML that contains itself, or is deeper or larger than any configuration, in one pass."""
    sizes: dict[str, int] = {}
    opened: list[tuple[str | None, int]] = []  # anchor and size so far of each open block or list

    def refuse(event: yaml.Event, fault: str) -> NoReturn:
        raise yaml.MarkedYAMLError(problem=fault, problem_mark=cast(Any, event.start_mark))

    for event in yaml.parse(text, Loader=_Loader):
        size = 0
        if isinstance(event, yaml.CollectionStartEvent):
            if len(opened) == _MAX_DEPTH:
                refuse(event, f"more than {_MAX_DEPTH} nested blocks")
            opened.append((event.anchor, 1))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = opened.pop()
            sizes |= {} if anchor is None else {anchor: size}
        elif isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in opened):
                refuse(event, f"alias *{event.anchor} is inside the block that it refers to")
            size = sizes.get(event.anchor or "", 1)
        elif isinstance(event, yaml.ScalarEvent):
            size = 1
            sizes |= {} if event.anchor is None else {event.anchor: 1}
        if opened and size:
            opened[-1] = (opened[-1][0], opened[-1][1] + size)
        if sum(inner for _, inner in opened) > _MAX_VALUES:
            refuse(event, f"more than {_MAX_VALUES:,} values, with aliases expanded")


def _parse(text: str, place: str) -> Any:
    """Parse YAML, naming `place` and the line in errors."""
    try:
        _check_size(text)
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{place}{line}: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{place}: not YAML: {error}") from error


_WRONG_TYPE = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "dataclass_type": "a block of keys",
    "dataclass_exact_type": "a block of keys",
    "dict_type": "a block of keys",
    "mapping_type": "a block of keys",
    "list_type": "a list",
    "tuple_type": "a list",
    "none_required": "null",
    "finite_number": "a finite number",
}
_OUT_OF_BOUNDS = {"greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number"}
_NUMBER_TYPES = {"int_type", "int_from_float", "float_type", *_OUT_OF_BOUNDS}


def _describe(error: ValidationError, cls: type, tree: Mapping[str, Any], where: str) -> list[str]:
    """Return one line per path; the complaints of the members of a union are joined by "or"."""
    wrong: dict[str, tuple[Any, list[str]]] = {}
    lines: list[str] = []
    for item in error.errors(include_url=False):
        kind, loc = item["type"], item["loc"]
        leaf_is_no_value = kind in ("missing", "unexpected_keyword_argument", "extra_forbidden")
        keys, got = _locate(tree, loc[:-1] if leaf_is_no_value else loc)
        path = ".".join((*([where] if where else []), *keys, *([str(loc[-1])] if leaf_is_no_value else [])))
        message = item["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
        if kind == "missing":
            lines.append(f"{path}: is missing")
        elif leaf_is_no_value:
            hint = suggestion(str(loc[-1]), _fields(cls, keys))
            lines.append(f"{path}: unknown key (got {_describe_value(got[loc[-1]])}; {hint})")
        elif kind in ("value_error", "assertion_error"):
            lines.append(_with_path(path, message))
        else:
            expected = _WRONG_TYPE.get(kind, message)
            if kind in _NUMBER_TYPES and not isinstance(got, bool):  # for true and false, the type is enough
                limits = next(filter(None, map(bounds_of, _types_at(cls, keys))), "")
                # A number of the right type only violates the bounds.
                parts = (limits or expected,) if kind in _OUT_OF_BOUNDS else (expected, limits)
                expected = ", ".join(filter(None, parts))
            wrong.setdefault(path, (got, []))[1].append(expected)
    named = [*lines, *wrong]
    for path, (got, wanted) in wrong.items():
        # A union reports a block with a mistake in it as none of its other kinds, too.
        if isinstance(got, Mapping) and any(other.startswith(f"{path}.") for other in named):
            continue
        expected = " or ".join(dict.fromkeys(wanted))
        lines.append(f"{path or 'top level'}: wrong value (got {_describe_value(got)}, wanted {expected})")
    return lines


def _with_path(path: str, message: str) -> str:
    """Return the message prefixed with the path, unless it already begins with it."""
    return message if not path or message.startswith(path) else f"{path}: {message}"


def _locate(tree: Any, loc: Sequence[int | str]) -> tuple[list[str], Any]:
    """Return the keys and the value at a pydantic location, skipping parts that name members of a union."""
    keys = []
    for part in loc:
        inside = part in tree if isinstance(tree, Mapping) else isinstance(tree, list | tuple)
        if inside and (isinstance(tree, Mapping) or isinstance(part, int)):
            tree = tree[part]
            keys.append(str(part))
    return keys, tree


def _fields(cls: Any, keys: Sequence[str]) -> set[str]:
    """Return the names of the fields of the dataclass at the path `keys` below `cls`."""
    found = [outer for kind in _types_at(cls, keys) for outer in _dataclasses_in(kind)]
    return {key_of(field.name) for outer in found for field in dataclasses.fields(outer)}


def _types_at(cls: Any, keys: Sequence[str]) -> list[Any]:
    """Return the types, including bounds, that a value at the path `keys` below `cls` may have."""
    found = [cls]
    for key in keys:
        if key.isdigit():
            found = [item for kind in found for item in _items(kind, int(key))]
        else:
            outer = [inner for kind in found for inner in _dataclasses_in(kind)]
            hints = [typing.get_type_hints(kind, include_extras=True) for kind in outer]
            found = [kind for hint in hints for name, kind in hint.items() if key_of(name) == key]
    return found


def _items(kind: Any, place: int) -> list[Any]:
    """Return the types of the item at index `place` of a sequence type, or of the sequences in a union."""
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        return [inside[0 if inside[-1] is ... else min(place, len(inside) - 1)]]
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return [inside[0]]
    return [item for part in inside for item in _items(part, place)]


def _dataclasses_in(kind: Any) -> list[Any]:
    if dataclasses.is_dataclass(kind):
        return [kind]
    return [inner for part in typing.get_args(kind) for inner in _dataclasses_in(part)]


def _describe_value(value: Any) -> str:
    try:
        text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    except ValueError:  # Python does not convert integers of more than 4,300 digits
        return "a very large integer"
    return text if len(text) <= 60 else f"{text[:57]}..."
