"""Helpers that build a few products in the format of WebShop's files, and a shop that sells them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from agentrl_envs.webshop.catalogue import Catalogue
from agentrl_envs.webshop.goals import Goals
from agentrl_envs.webshop.nouns import noun_tagger
from agentrl_envs.webshop.pages import clickable
from agentrl_envs.webshop.session import START, Node, State, act
from agentrl_envs.webshop.shop import Shop


def entry(asin: str = "B0LAMP", **fields: Any) -> dict[str, Any]:
    """Return a product as in the products file; `options` maps names to values."""
    options = fields.pop("options", {})
    return {
        "asin": asin,
        "name": f"Table Lamp {asin}",
        "full_description": "A lamp.",
        "small_description": ["Made of brass", ""],
        "pricing": "$12.50",
        "category": "garden",
        "query": " Table Lamps ",
        "product_category": "Home › Lighting › Lamps",
        "customization_options": {
            name: values if values is None else [{"value": value} for value in values]
            for name, values in options.items()
        },
        "images": ["https://example.org/1.jpg"],
    } | fields


def wants(*attributes: str, instruction: str | None = "Find me table lamps") -> dict[str, Any]:
    """Return an entry of the attributes file."""
    return {
        "attributes": list(attributes),
        "instruction": instruction,
        "instruction_attributes": list(attributes),
    }


def catalogue(
    products: Sequence[Any],
    attributes: Mapping[str, Any] | None = None,
    human: Mapping[str, Any] | None = None,
) -> Catalogue:
    """Return the catalogue of some products; by default their instructions ask for the attribute brass."""
    if attributes is None:
        attributes = {each["asin"]: wants("brass") for each in products}
    return Catalogue(products, attributes.items(), (human or {}).items())


def shop(
    products: Sequence[Any],
    attributes: Mapping[str, Any] | None = None,
    human: Mapping[str, Any] | None = None,
    *,
    mode: str = "original",
    show_attributes: bool = False,
    search: Callable[[str], Sequence[str]] | None = None,
) -> Shop:
    """Return a shop whose search by default finds all products in their order."""
    sold = catalogue(products, attributes, human)
    goals = Goals(sold, "human" if human else "synthetic", 0)
    found = tuple(sold.by_asin)
    return Shop(
        sold, goals, {}, search or (lambda query: found), noun_tagger("heuristic"), mode, show_attributes
    )


def walk(shop: Shop, *actions: str, goal: int = 0) -> tuple[State, tuple[Node, ...]]:
    """Return the state after some actions from the first page; an action without effect is an error."""
    state = START
    nodes = shop.page(shop.goals[goal], state)
    for action in actions:
        after = act(state, action, clickable(nodes))
        assert after is not None, f"{action!r} did nothing; on offer: {list(clickable(nodes))}"
        state = after
        score = shop.judge(shop.goals[goal], state).total if state.page == "done" else 0.0
        nodes = shop.page(shop.goals[goal], state, score)
    return state, nodes
