"""A customer's way through the shop: the page that is open, and how an action leads to another."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

ADDRESS = "http://127.0.0.1:3000"
SUB_PAGES = {name.lower(): name for name in ("Description", "Features", "Reviews", "Attributes")}
BACK, PREVIOUS, NEXT, BUY, SEARCH = "back to search", "< prev", "next >", "buy now", "search"

_ACTION = re.compile(r"(.+)\[(.+)\]")
_PAGES = ("search_results", "item_page", "item_sub_page", "done")


@dataclass(frozen=True, slots=True)
class State:
    """What is open; a value, so that to keep it is to have a snapshot.

    Attributes:
        page: "index", "results", "item", "done", or the name of a sub-page of an item in lower case.
        keywords: of the search.
        number: of the page of results, from 1.
        asin: of the item.
        options: (name, value) in the order in which the names were first clicked.
        visited: items that were opened since the last search from the index.
    """

    page: str = "index"
    keywords: tuple[str, ...] = ()
    number: int = 1
    asin: str = ""
    options: tuple[tuple[str, str], ...] = ()
    visited: frozenset[str] = frozenset()

    @property
    def query(self) -> str:
        return " ".join(self.keywords)


class Node(NamedTuple):
    """A piece of a page.

    Attributes:
        kind: "plain", "button", "option" (a value to choose) or "link" (to an item).
        text: what is shown.
        clicked: the value is chosen, or the item was visited, as far as the original can tell.
        target: name of the option; asin of the item; "" for others.
    """

    kind: str
    text: str
    clicked: bool = False
    target: str = ""


START: Final = State()


def parse(action: str) -> tuple[str, str] | None:
    """Name and argument of an action such as "click[buy now]"; text behind the last bracket is ignored."""
    found = _ACTION.match(action)
    return None if found is None else (found[1], found[2].lower())


def act(state: State, action: str, clickable: Mapping[str, Node]) -> State | None:
    """Carry out an action.

    Args:
        state: where the customer is.
        action: what was said.
        clickable: what the page offers.

    Returns:
        Where that leads; None where nothing happens, because it was not understood or is not on offer.
    """
    parsed = parse(action)
    if parsed is None:
        return None
    name, argument = parsed
    if name == "search":
        return results(state, tuple(argument.split(" ")), 1)
    if name == "click" and argument in clickable and argument != SEARCH:
        return _click(state, argument, clickable[argument])
    return None


def results(state: State, keywords: tuple[str, ...], number: int) -> State:
    """Open a page of results."""
    return State("results", keywords, number, visited=state.visited)


def _click(state: State, name: str, click: Node) -> State:
    """What the name says goes before what was clicked: a value called "reviews" opens the reviews."""
    if name == BUY:
        return replace(state, page="done")
    if name == BACK:
        return START
    if name in (PREVIOUS, NEXT):
        page = _page_name(address(state, ""))
        if page == "search_results":
            return results(state, state.keywords, state.number + (1 if name == NEXT else -1))
        if name == PREVIOUS and page == "item_page":
            return results(state, state.keywords, state.number)
    elif name in SUB_PAGES:
        return replace(state, page=name)
    if click.kind == "link":
        return replace(state, page="item", asin=click.target, visited=state.visited | {click.target})
    if click.kind == "option":
        return replace(
            state, page="item", options=tuple((dict(state.options) | {click.target: name}).items())
        )
    return replace(state, page="item")


def address(state: State, session: str) -> str:
    """The address that a browser would show; the original reads from it what is open and what was clicked."""
    keywords = "+".join(state.keywords)
    if state.page == "index":
        return f"{ADDRESS}/{session}"
    if state.page == "results":
        return f"{ADDRESS}/search_results/{session}/{keywords}/{state.number}"
    options = dict(state.options)
    if state.page == "item":
        return f"{ADDRESS}/item_page/{session}/{state.asin}/{keywords}/{state.number}/{json.dumps(options)}"
    if state.page == "done":
        return f"{ADDRESS}/done/{session}/{state.asin}/{options}"
    name = SUB_PAGES[state.page]
    return f"{ADDRESS}/item_sub_page/{session}/{state.asin}/{keywords}/{state.number}/{name}/{options}"


def _page_name(url: str) -> str:
    """As the original guesses it; who searches for "search_results" leads it astray."""
    return next((name for name in _PAGES if name in url), "")
