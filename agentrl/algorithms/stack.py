"""Stacks of recipes: `compose` lists them from the innermost to the outermost, instead of nested blocks.

    algorithm: {compose: [grpo, empg, {name: epo, entropy_coefficient: 0.001}]}
    algorithm: {name: epo, entropy_coefficient: 0.001, base: {name: empg, base: {name: grpo}}}

are the same algorithm.
"""

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from agentrl.algorithms.recipe import Recipe, build_recipe, recipe_class, recipe_names, recipe_tree
from agentrl.config import Dotted
from agentrl.errors import ConfigError

COMPOSE, BASE = "compose", "base"
_INDEXED = re.compile(rf"{COMPOSE}\[(\d+)\]")


def stackable_names() -> list[str]:
    """Return the sorted names of the recipes that can be put over another one."""
    return [name for name in recipe_names() if _stackable(recipe_class(name))]


def build_stack(block: Mapping[str, Any], where: str = "algorithm") -> Recipe:
    """Make the recipe that a block with the key `compose` lists.

    Each part is the name of a recipe, or a block with its name and its values. The first part is the base of
    the second, and so on; the last part is outermost.

    Args:
        block: The block, with no other key.
        where: The dotted path of the block, for messages.

    Raises:
        ConfigError: The list is malformed, a part cannot stand where it is, or parts contradict each other.
            The message names the part, as in `algorithm.compose[2]`.
    """
    parts, place = block[COMPOSE], f"{where}.{COMPOSE}"
    if not isinstance(parts, list | tuple) or not parts:
        raise ConfigError(f"{place}: got {parts!r}, wanted a list of recipes, as in [grpo, {{name: epo}}]")
    mistakes = [
        f"{where}.{key}: unknown key beside {COMPOSE}, wanted inside a part"
        for key in block
        if key != COMPOSE
    ]
    blocks = [{"name": part} if isinstance(part, str) else part for part in parts]
    mistakes += [fault for index in range(len(blocks)) if (fault := _fault(blocks, index, place))]
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    made = _built(blocks[0], f"{place}[0]")
    for index, part in enumerate(blocks[1:], start=1):
        made = _built({**part, BASE: made}, f"{place}[{index}]")
    return made


def stack_tree(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as plain values: with a base, as the block that `build_stack` reads; else by its name.

    >>> from agentrl.algorithms.recipe import build_recipe
    >>> [part["name"] for part in stack_tree(build_recipe("spear"))["compose"]]
    ['grpo', 'dr_bot', 'spear']
    """
    tree = recipe_tree(recipe)
    parts = [tree]
    while isinstance(below := parts[0].get(BASE), dict):
        parts[0] = {key: value for key, value in parts[0].items() if key != BASE}
        parts.insert(0, below)
    return {COMPOSE: parts} if len(parts) > 1 else tree


def part_path(block: Mapping[str, Any], path: Dotted) -> Dotted:
    """Return the path of a value in an algorithm block, given the path by which a user names it.

    A part is named by its recipe (`compose.empg`), by its index (`compose.1` or `compose[1]`), or as in
    nested blocks: `base` is the part below the outermost. A path that leads to no part is returned unchanged.

    >>> stack = {"compose": ["grpo", "empg", "epo"]}
    >>> part_path(stack, ("compose", "empg", "k")), part_path(stack, ("base", "k"))
    (('compose', '1', 'k'), ('compose', '1', 'k'))
    >>> part_path(stack, ("low",))
    ('compose', '2', 'low')
    >>> part_path({"name": "epo", "base": {"name": "empg"}}, ("compose", "empg", "k"))
    ('base', 'k')
    """
    if not path or path == (COMPOSE,):
        return path
    names, composed = _part_names(block), COMPOSE in block
    if found := _INDEXED.fullmatch(path[0]):
        path = (COMPOSE, found[1], *path[1:])
    if path[0] == COMPOSE:
        found_at = (index for index, name in enumerate(names) if path[1] in (name, str(index)))
        index, rest = next(found_at, len(names)), path[2:]
    elif composed:
        depth = next((place for place, key in enumerate(path) if key != BASE), len(path))
        index, rest = len(names) - 1 - depth, path[depth:]
    else:
        return path
    if not 0 <= index < len(names):
        return path
    above = (COMPOSE, str(index)) if composed else (BASE,) * (len(names) - 1 - index)
    return (*above, *rest)


def parts_by_index(block: Mapping[str, Any]) -> dict[str, Any]:
    """Return a block with its parts as blocks by their index, so that a path can lead into them."""
    parts = block.get(COMPOSE)
    if not isinstance(parts, list):
        return dict(block)
    named = ({"name": part} if isinstance(part, str) else part for part in parts)
    return {**block, COMPOSE: {str(index): part for index, part in enumerate(named)}}


def _part_names(block: Mapping[str, Any]) -> list[str]:
    """Return the names of the parts that a block lists or nests, the innermost first."""
    if COMPOSE in block:
        parts = parts_by_index(block)[COMPOSE]
        listed = parts.values() if isinstance(parts, Mapping) else ()
        return [str(part.get("name")) if isinstance(part, Mapping) else "" for part in listed]
    names: list[str] = []
    inner: Any = block
    while isinstance(inner, Mapping) and "name" in inner:
        names.insert(0, str(inner["name"]))
        inner = inner.get(BASE)
    return names


def _fault(blocks: list[Any], index: int, place: str) -> str | None:
    """Return why a part cannot stand at its place in the list, or None if it can."""
    part, here = blocks[index], f"{place}[{index}]"
    if not isinstance(part, Mapping) or not isinstance(part.get("name"), str):
        return f"{here}: got {part!r}, wanted the name of a recipe, or a block with a name"
    name, below = part["name"], blocks[:index]
    try:
        cls = recipe_class(name, here)
    except ConfigError as error:
        return str(error)
    if BASE in part:
        return f"{here}.{BASE}: the base of a part is the part before it, wanted in the list before {name}"
    first = next(
        (at for at, other in enumerate(below) if isinstance(other, Mapping) and other.get("name") == name),
        None,
    )
    if first is not None:
        return f"{here}: {name} is {COMPOSE}[{first}] already, wanted each recipe at most once"
    if index and not _stackable(cls):
        return (
            f"{here}: {name} cannot be put over another recipe because it has no base, wanted it first; "
            f"these can be stacked: {', '.join(stackable_names())}"
        )
    return None


def _built(part: Mapping[str, Any], where: str) -> Recipe:
    return build_recipe(part["name"], {key: value for key, value in part.items() if key != "name"}, where)


def _stackable(cls: type[Recipe]) -> bool:
    return any(item.name == BASE for item in fields(cls))
