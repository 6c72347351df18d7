"""State of a session in the shop, and its transitions: which page is open, and where an action leads."""

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
    """The open page and the choices so far; immutable, so it serves as a snapshot.

    Attributes:
        page: "index", "results", "item", "done", or the lower-case name of a sub-page of an item.
        keywords: The words of the search.
        number: The number of the page of results, from 1.
        asin: The asin of the open item.
        options: The chosen (name, value), in the order in which the names were first clicked.
        visited: The items opened since the last search from the index.
    """

    page: str = "index"
    keywords: tuple[str, ...] = ()
    number: int = 1
    asin: str = ""
    options: tuple[tuple[str, str], ...] = ()
    visited: frozenset[str] = frozenset()

    @property
    def query(self) -> str:
        """Return the search as one string."""
        return " ".join(self.keywords)


class Node(NamedTuple):
    """An element of a page.

    Attributes:
        kind: "plain", "button", "option" (a value to choose) or "link" (to an item).
        text: The text shown.
        clicked: Whether the value is chosen or the item was visited, as the original detects it.
        target: The name of the option or the asin of the item; "" for other kinds.
    """

    kind: str
    text: str
    clicked: bool = False
    target: str = ""


START: Final = State()


def parse(action: str) -> tuple[str, str] | None:
    """Parse an action such as "click[buy now]" into name and argument; text after the last "]" is ignored."""
    found = _ACTION.match(action)
    return None if found is None else (found[1], found[2].lower())


def act(state: State, action: str, clickable: Mapping[str, Node]) -> State | None:
    """Return the state after an action.

    Args:
        state: The current state.
        action: The text of the action.
        clickable: The clickable elements of the open page by name.

    Returns:
        The next state; None if the action is not understood or not available.
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
    """Return the state with a page of results open."""
    return State("results", keywords, number, visited=state.visited)


def _click(state: State, name: str, click: Node) -> State:
    """Return the state after a click; button names win, so an option value "reviews" opens the reviews."""
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
    """Return the URL that a browser would show; the original derives page and clicked options from it."""
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
    """Return the page name that the original finds in a URL; a search for "search_results" misleads it."""
    return next((name for name in _PAGES if name in url), "")
