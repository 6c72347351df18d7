"""Read YAML and `key=value` overrides into any frozen dataclass. This file knows no schema.

    tree = merge(read_yaml("configs/quickstart.yaml"), ["seed=1", "learner.learning_rate=1e-5"])
    config = build(RunConfig, tree)

Scalars follow YAML 1.2: `1e-5` is a number, `yes` and `2024-01-01` are text, `010` is ten.
"""

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_json

from agentrl.errors import ConfigError

Tree = dict[str, Any]
Dotted = tuple[str, ...]
T = TypeVar("T")

_MOST_DIGITS = 100  # of an integer
_DEEPEST = 100  # blocks and lists inside each other
_MOST_VALUES = 100_000  # of a file, with each alias counted as all that it stands for

_SCALARS = (
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf", "-+.0123456789"),
)


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars; a key written twice in one block is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:str":
                raise yaml.MarkedYAMLError(None, None, "a key must be text", key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(None, None, f"the key {key.value!r} stands twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes exactly the text that `_Loader` would take for something else."""

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
    """PyYAML's own constructor reads a leading zero as octal."""
    digits = len(node.value.lstrip("+-"))
    if digits > _MOST_DIGITS:
        fault = f"an integer of {digits} digits, wanted at most {_MOST_DIGITS}"
        raise yaml.MarkedYAMLError(None, None, fault, node.start_mark)
    return int(node.value)


# Nothing but the kinds of values that a configuration holds: no dates, bytes or sets, and no Python objects.
_Loader.yaml_constructors = {
    tag: constructor
    for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or str(tag).rpartition(":")[2] in ("null", "bool", "float", "str", "seq", "map")
}
_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


def read_yaml(path: str | Path) -> Tree:
    """Read a YAML file whose top level is a block of keys; an empty file is an empty block.

    Raises:
        ConfigError: naming the file, and the line where one is to blame.
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
        raise ConfigError(f"{path}: the top level is {_shown(tree)}, wanted a block of `key: value` lines")
    return tree


def parse_overrides(overrides: Iterable[str]) -> list[tuple[Dotted, Any]]:
    """Split each `dotted.key=value`, the value read as YAML.

    >>> parse_overrides(["learner.learning_rate=1e-5"])
    [(('learner', 'learning_rate'), 1e-05)]

    Raises:
        ConfigError: with one line for each override that is none.
    """
    parsed: list[tuple[Dotted, Any]] = []
    mistakes: list[str] = []
    for text in overrides:
        name, equals, value = text.partition("=")
        dotted = tuple(part.strip() for part in name.split("."))
        if not equals or not all(dotted):
            mistakes.append(f"{text!r} is not an override (wanted key=value, as in learner.clip=0.5)")
        elif not value.strip():
            mistakes.append(f"{text!r} has no value ({name}=null means none, {name}='\"\"' empty text)")
        else:
            try:
                parsed.append((dotted, _parse(value, f"override {text!r}")))
            except ConfigError as error:
                mistakes.append(str(error))
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return parsed


def merge(tree: Mapping[str, Any], overrides: Iterable[str]) -> Tree:
    """Return a copy of `tree` with the overrides set in order; missing levels are made.

    Raises:
        ConfigError: for a malformed override, or one that goes through a plain value as if it were a block.
    """
    result = deepcopy(dict(tree))
    mistakes = []
    for dotted, value in parse_overrides(overrides):
        block = result
        for depth, part in enumerate(dotted[:-1], start=1):
            if block.get(part) is None:
                block[part] = {}
            if not isinstance(block[part], dict):
                path = ".".join(dotted[:depth])
                mistakes.append(f"{'.'.join(dotted)}: {path} is {_shown(block[part])}, not a block of keys")
                break
            block = block[part]
        else:
            block[dotted[-1]] = value
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return result


def build(cls: type[T], tree: Mapping[str, Any], where: str = "") -> T:
    """Make the dataclass `cls`, and those nested in it, from a tree of plain values.

    Unknown keys are refused and types are strict: `true` and `"8"` are no integers, an integer is a number.

    Args:
        cls: a dataclass; a ValueError of its `__post_init__` counts as a mistake of its block.
        tree: keys are field names; missing ones take their defaults; a value of the top level that already is
            a dataclass is taken as it is.
        where: dotted path of the block, put in front of every path in the message.

    Raises:
        ConfigError: with one line for each mistake, `path: what is wrong (got X, wanted Y)`.
    """
    made = {name: value for name, value in tree.items() if dataclasses.is_dataclass(value)}
    plain = {name: value for name, value in tree.items() if name not in made}
    try:
        # As JSON, a list may fill a tuple and a text an enum or a path, while all else stays strict.
        content = to_json(plain, inf_nan_mode="constants", fallback=repr)
        given: Any = TypeAdapter(_given_fields(cls, plain, made)).validate_json(
            content, strict=True, extra="forbid", context=where
        )
    except ValidationError as error:
        raise ConfigError("\n".join(_describe(error, cls, plain, where))) from error
    try:
        return cls(**vars(given), **made)
    except ValueError as error:
        raise ConfigError(_placed(where, str(error))) from error


def _given_fields(cls: type, plain: Mapping[str, Any], made: Mapping[str, Any]) -> type:
    """The fields of `cls` to be checked, as a dataclass: those in `plain`, and those that must be there."""
    hints = typing.get_type_hints(cls, include_extras=True)  # a field may bring its own validator
    return dataclasses.make_dataclass(
        cls.__name__,
        [
            (field.name, hints[field.name])
            for field in dataclasses.fields(cls)
            if field.name in plain or (_required(field) and field.name not in made)
        ],
    )


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def to_tree(value: Any) -> Any:
    """Turn a dataclass, and all inside it, into what YAML and JSON hold; `build` turns it back."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_tree(getattr(value, field.name)) for field in dataclasses.fields(value)}
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
    """Write a tree in its own key order; `read_yaml` of the text gives the tree back."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def suggestion(unknown: str, known: Iterable[str]) -> str:
    """Say which known name was probably meant, or list them all.

    >>> suggestion("sede", ["seed", "env"])
    'did you mean seed?'
    """
    names = sorted(known)
    close = difflib.get_close_matches(unknown, names, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(names) or 'none'}"


def _check_size(text: str) -> None:
    """Refuse YAML that refers to itself, or is deeper or larger than any configuration; in one pass."""
    sizes: dict[str, int] = {}
    opened: list[tuple[str | None, int]] = []  # anchor and size so far of each block or list that is open

    def refuse(event: yaml.Event, fault: str) -> NoReturn:
        raise yaml.MarkedYAMLError(problem=fault, problem_mark=cast(Any, event.start_mark))

    for event in yaml.parse(text, Loader=_Loader):
        size = 0
        if isinstance(event, yaml.CollectionStartEvent):
            if len(opened) == _DEEPEST:
                refuse(event, f"more than {_DEEPEST} blocks inside each other")
            opened.append((event.anchor, 1))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = opened.pop()
            sizes |= {} if anchor is None else {anchor: size}
        elif isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in opened):
                refuse(event, f"*{event.anchor} stands inside what it refers to")
            size = sizes.get(event.anchor or "", 1)
        elif isinstance(event, yaml.ScalarEvent):
            size = 1
            sizes |= {} if event.anchor is None else {event.anchor: 1}
        if opened and size:
            opened[-1] = (opened[-1][0], opened[-1][1] + size)
        if sum(inner for _, inner in opened) > _MOST_VALUES:
            refuse(event, f"more than {_MOST_VALUES:,} values, aliases included")


def _parse(text: str, place: str) -> Any:
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
}


def _describe(error: ValidationError, cls: type, tree: Mapping[str, Any], where: str) -> list[str]:
    """One line per path: the branches of a union complain about the same value and are joined by "or"."""
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
            lines.append(f"{path}: unknown key (got {_shown(got[loc[-1]])}; {hint})")
        elif kind in ("value_error", "assertion_error"):
            lines.append(_placed(path, message))
        else:
            wrong.setdefault(path, (got, []))[1].append(_WRONG_TYPE.get(kind, message))
    for path, (got, wanted) in wrong.items():
        wish = " or ".join(dict.fromkeys(wanted))
        lines.append(f"{path or 'here'}: wrong value (got {_shown(got)}, wanted {wish})")
    return lines


def _placed(path: str, message: str) -> str:
    """Put the path in front, unless the block's own check has already named it."""
    return message if not path or message.startswith(path) else f"{path}: {message}"


def _locate(tree: Any, loc: Sequence[int | str]) -> tuple[list[str], Any]:
    """Follow pydantic's location through the tree, skipping the parts that name a branch of a union."""
    keys = []
    for part in loc:
        inside = part in tree if isinstance(tree, Mapping) else isinstance(tree, list | tuple)
        if inside and (isinstance(tree, Mapping) or isinstance(part, int)):
            tree = tree[part]
            keys.append(str(part))
    return keys, tree


def _fields(cls: Any, keys: Sequence[str]) -> set[str]:
    """Names of the fields that the dataclass at the path `keys` below `cls` has."""
    found = _dataclasses_in(cls)
    for key in keys:
        if not key.isdigit():  # a place in a list: its members have the type already found
            hints = [typing.get_type_hints(outer).get(key) for outer in found]
            found = [inner for hint in hints for inner in _dataclasses_in(hint)]
    return {field.name for outer in found for field in dataclasses.fields(outer)}


def _dataclasses_in(kind: Any) -> list[Any]:
    if dataclasses.is_dataclass(kind):
        return [kind]
    return [inner for part in typing.get_args(kind) for inner in _dataclasses_in(part)]


def _shown(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
