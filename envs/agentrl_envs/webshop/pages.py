"""Content of a page as a sequence of nodes, rendered by the text modes and by the browser version."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from agentrl_envs.webshop.catalogue import Product
from agentrl_envs.webshop.session import Node, State, address

PER_PAGE = 10
SEPARATOR = " [SEP] "
_BLANKS = " \n\t\f\r"


@dataclass(frozen=True, slots=True)
class Content:
    """Content of a page besides the state of the session.

    Attributes:
        instruction: The instruction of the goal.
        products: The products on the page of results, or the open item.
        found: The number of search results.
        show_attributes: Whether items have a page with their attributes.
        reward: The reward of the purchase.
    """

    instruction: str
    products: Sequence[Product] = ()
    found: int = 0
    show_attributes: bool = False
    reward: float = 0.0


def on_page(found: Sequence[str], number: int) -> Sequence[str]:
    """Return the search results on a page; page 0 exists, and is empty."""
    return found[(number - 1) * PER_PAGE : number * PER_PAGE]


def page(state: State, content: Content, session: str = "") -> tuple[Node, ...]:
    """Return the nodes of the open page in order; some may be empty.

    Args:
        state: The state of the session.
        content: The content of the page.
        session: The name of the session, which is part of the page's URL.
    """
    if state.page == "index":
        return (
            Node("plain", "WebShop"),
            Node("plain", "Instruction: "),
            Node("plain", content.instruction),
            Node("button", "Search"),
        )
    if state.page == "done":
        return tuple(_done(state, content.reward))
    head = (
        Node("plain", "Instruction:"),
        Node("plain", content.instruction),
        Node("button", "Back to Search"),
    )
    if state.page == "results":
        return (*head, *_results(state, content))
    if state.page == "item":
        return (*head, Node("button", "< Prev"), *_item(state, content, session))
    return (*head, Node("button", "< Prev"), *_sub_page(state.page, content.products[0]))


def _results(state: State, content: Content) -> Iterator[Node]:
    yield Node("plain", f"Page {state.number} (Total results: {content.found})")
    if state.number > 1:
        yield Node("button", "< Prev")
    yield Node("button", "Next >")
    for product in content.products:
        yield Node("link", product.asin, product.asin in state.visited, product.asin)
        yield Node("plain", product.title)
        yield Node("plain", product.price_tag)


def _item(state: State, content: Content, session: str) -> Iterator[Node]:
    (product,) = content.products
    url = address(state, session)
    for name, values in product.options.items():
        yield Node("plain", name)
        for value in values:
            yield Node("option", value, f'"{value}"' in url, name)
    yield Node("plain", product.title)
    yield Node("plain", f"Price: {product.price_tag}")
    yield Node("plain", "Rating: N.A.")
    for name in ("Description", "Features", "Reviews"):
        yield Node("button", name)
    if content.show_attributes:
        yield Node("button", "Attributes")
    yield Node("button", "Buy Now")


def _sub_page(name: str, product: Product) -> Iterator[Node]:
    if name == "description":
        yield Node("plain", product.description)
    elif name == "features":
        for bullet in product.bullets:
            yield Node("plain", " " + bullet)
    elif name == "attributes":
        for attribute in product.attributes:
            yield Node("plain", " " + attribute)
        yield Node("plain", product.category)
        yield Node("plain", product.query)
        yield Node("plain", product.product_category)


def _done(state: State, reward: float) -> Iterator[Node]:
    options = json.dumps(dict(state.options), sort_keys=True)
    for mark in "<>&'":
        options = options.replace(mark, f"\\u{ord(mark):04x}")
    for text in (
        *("Thank you for shopping with us!", "Your code: ", "None", " (Paste it in your MTurk interface.)"),
        *("Purchased", "asin", state.asin, "options", options, "attrs", "None", "category", "None"),
        *("query", "None", "product category", "None", "Target", "asin", "options", "attrs", "price upper"),
        *("instuction text", "category", "product category", "query", "Goal ", "None", "Reward"),
        *("Your score (min 0.0, max 1.0)", str(reward), "Reward Details ", "None"),
    ):
        yield Node("plain", text)


def clickable(nodes: Sequence[Node]) -> dict[str, Node]:
    """Return the clickable nodes by name: buttons, links, option values; for equal names the last wins."""
    buttons: dict[str, Node] = {}
    links: dict[str, Node] = {}
    options: dict[str, Node] = {}
    for node in nodes:
        if node.kind == "option":
            options[node.text] = node
        elif node.kind == "link":
            links[node.text.lower()] = node
        elif node.kind == "button":
            buttons[node.text.lower()] = node
    return buttons | links | options


def shown(text: str) -> str | None:
    """Return a text as an HTML parser keeps it: only blanks become one blank, or None with a line break."""
    if text.strip(_BLANKS):
        return text
    return None if not text or "\n" in text else " "


def as_text(nodes: Sequence[Node]) -> str:
    """Render a page for the mode "text": the texts, joined by separators."""
    texts = []
    for node in nodes:
        text = node.text.strip()
        if text or shown(node.text) is not None:
            texts.append(text)
    return SEPARATOR.join(texts)


def as_rich_text(nodes: Sequence[Node]) -> str:
    """Render a page for the mode "text_rich": one line per node, marked if it is clickable or was clicked."""
    lines, clicked = [], []
    for node in nodes:
        text = shown(node.text)
        if text is None:
            continue
        if node.kind == "plain":
            lines.append(f"{text}\n")
            continue
        before = {"button": "", "option": "  ", "link": "\n"}[node.kind]
        if node.clicked:
            lines.append(f"{before}[clicked button] {text} [clicked button_]\n")
            if node.kind == "option":
                clicked.append(f"You have clicked {text}.\n")
        else:
            lines.append(f"{before}[button] {text} [button_]\n")
    return "".join((*reversed(clicked), *lines))


RENDERERS = {"text": as_text, "text_rich": as_rich_text}
