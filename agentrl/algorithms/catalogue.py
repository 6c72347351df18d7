"""List the methods by reading their source, and describe one by building it; the list imports no torch."""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from inspect import cleandoc, getdoc
from pathlib import Path
from typing import Any, get_args

from agentrl.algorithms.recipe import (
    ENTRY_POINTS,
    Confidence,
    Kind,
    Preset,
    Recipe,
    build_recipe,
    preset_values,
    recipe_class,
    recipe_names,
    recipe_tree,
)
from agentrl.config import to_yaml


@dataclass(frozen=True)
class Method:
    """Line of the list of methods.

    Args:
        name: The value of `algorithm.name`.
        summary: The first line of its docstring.
        kind: What it mainly changes; None if it does not say.
        confidence: What its formula was checked against; None if it does not say.
        source: The paper.
    """

    name: str
    summary: str
    kind: Kind | None
    confidence: Confidence | None
    source: str | None


def list_methods(*, imported: bool = False) -> list[Method]:
    """Return all methods in the order of the kinds, then of their names.

    Args:
        imported: Whether user code that may register methods was imported, so that all have to be.
    """
    if imported:
        found = [_described(name, recipe_class(name)) for name in recipe_names()]
    else:
        found = [method for point in entry_points(group=ENTRY_POINTS) for method in _methods_of(point)]
    kinds: list[Kind | None] = [*get_args(Kind), None]
    return sorted(found, key=lambda method: (kinds.index(method.kind), method.name))


def _methods_of(point: EntryPoint) -> list[Method]:
    """Return the methods that the file of an entry point registers; if none is seen, after importing it."""
    path = _source_of(point.module)
    found = [] if path is None else list(_read_methods(path))
    if found or point.name not in recipe_names():
        return found
    return [_described(point.name, recipe_class(point.name))]


def _source_of(module: str) -> Path | None:
    """Return the file of a module, without importing the packages that it is in."""
    package, *rest = module.split(".")
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin)
    if rest:
        path = path.parent.joinpath(*rest).with_suffix(".py")
    return path if path.is_file() else None


def _read_methods(path: Path) -> Iterator[Method]:
    """Yield the methods that a file registers by `@recipe("name")`."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and (name := _registered_name(node)) is not None:
            says = dict(_constants(node))
            yield _method(name, ast.get_docstring(node) or "", says.get("KIND"), says.get("CONFIDENCE"))


def _registered_name(node: ast.ClassDef) -> str | None:
    for each in node.decorator_list:
        match each:
            case ast.Call(func=ast.Name(id="recipe"), args=[ast.Constant(value=str(name))]):
                return name
    return None


def _constants(node: ast.ClassDef) -> Iterator[tuple[str, Any]]:
    for each in node.body:
        match each:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=value)):
                yield name, value


def _described(name: str, cls: type[Recipe]) -> Method:
    return _method(name, cleandoc(cls.__doc__ or ""), cls.KIND, cls.CONFIDENCE)


def _method(name: str, told: str, kind: Any, confidence: Any) -> Method:
    source = next((line for line in told.splitlines() if line.startswith("Source: ")), None)
    return Method(
        name,
        told.partition("\n")[0],
        kind if kind in get_args(Kind) else None,
        confidence if confidence in get_args(Confidence) else None,
        None if source is None else source.removeprefix("Source: ").rstrip("."),
    )


def describe_parts(name: str) -> dict[str, list[str]]:
    """Return, in words, the parts that a method adds to those of its base, and what it needs and excludes.

    Args:
        name: The name of the method, which is built with its defaults.

    Returns:
        Lines under `changes`, `requires` and `refuses`.
    """
    from agentrl.algorithms.algorithm import Algorithm
    from agentrl.algorithms.hooks import EXCLUDES, declarations

    made = build_recipe(name)
    algorithm, base = made.build(), getattr(made, "base", None)
    plain = Algorithm() if base is None else base.build()
    changes, refuses = [], []
    for item in fields(Algorithm):
        own, other = (_as_tuple(getattr(each, item.name)) for each in (algorithm, plain))
        added = [part for part in own if _identity(part) not in {_identity(each) for each in other}]
        if added:
            changes.append(f"{item.name}: {', '.join(map(_part_name, added))}")
        elif other and not own:
            changes.append(f"{item.name}: none")
        for part in added:
            refuses += [f"{what}: {why}" for what, why in dict(declarations(part, EXCLUDES)).items()]
    own_needs = sorted(algorithm.requires - (frozenset() if base is None else plain.requires))
    return {"changes": changes, "requires": own_needs, "refuses": refuses}


def describe(name: str) -> dict[str, Any]:
    """Return what is known of a method, as JSON values: its docstring, parts, presets and defaults."""
    cls = recipe_class(name)
    return {
        "name": name,
        "text": getdoc(cls) or "",
        "kind": cls.KIND,
        "confidence": cls.CONFIDENCE,
        **describe_parts(name),
        "presets": {preset: dict(preset_values(cls, preset)) for preset in get_args(Preset)},
        "defaults": recipe_tree(build_recipe(name)),
    }


def as_text(known: Mapping[str, Any]) -> str:
    """Return the result of `describe` as text to read."""
    parts = {key: [known[key] or "not said"] for key in ("kind", "confidence")}
    parts |= {key: known[key] for key in ("changes", "requires", "refuses")}
    for preset, values in known["presets"].items():
        parts[f"preset {preset}"] = to_yaml(values).rstrip().split("\n") if values else []
    told = [f"{title}:\n    " + "\n    ".join(lines) for title, lines in parts.items() if lines]
    defaults = to_yaml({"algorithm": known["defaults"]})
    return "\n".join([known["text"], "", *told, "", "Defaults:", "", defaults])


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else () if value is None else (value,)


def _identity(part: object) -> object:
    """Return what two builds of the same part have in common."""
    return _part_name(part) if callable(part) else repr(part)


def _part_name(part: object) -> str:
    while isinstance(part, partial):
        part = part.func
    named = getattr(part, "__qualname__", None) or getattr(part, "name", None)
    return str(named if isinstance(named, str) else type(part).__qualname__)
