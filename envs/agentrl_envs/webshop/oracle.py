"""Searches built from an instruction, and an oracle that knows the product to buy."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from agentrl_envs.webshop.goals import Goal
from agentrl_envs.webshop.pages import PER_PAGE, clickable
from agentrl_envs.webshop.reward import Wanted, fits, wanted_options
from agentrl_envs.webshop.session import BACK, BUY, NEXT, PREVIOUS, SEARCH, SUB_PAGES, Node, State
from agentrl_envs.webshop.shop import Shop

_PRICE = re.compile(r",? and price lower than [\d.]+ dollars$|,? and price .*$")
_CLAUSES = re.compile(r"[,.;:?!]+\s|\s+(?:with|and|that|which|for|in)\s+")
_FILLERS_TEXT = """
    a am an and any are as at be buy by can color find for from get give has have i i'd i'm im in is it like
    looking me my need of on or pair please price purchase set should show size so some that the them
    these to want which will with would you
"""
_FILLERS = frozenset(_FILLERS_TEXT.split())


def suggested_queries(instruction: str, count: int) -> list[str]:
    """Return at most `count` searches made of an instruction's words: all of it, its head, its clauses."""
    text = _PRICE.sub("", instruction.lower())
    head = text.partition(" with ")[0]
    found: dict[str, None] = {}
    for query in (_content(text), _content(head), *map(_content, _CLAUSES.split(text)), _plain(text)):
        if query:
            found[query] = None
    return list(found)[:count]


def _content(text: str) -> str:
    return " ".join(word for word in _plain(text).split() if word.strip(".,:;?!") not in _FILLERS)


def _plain(text: str) -> str:
    """Remove brackets, which an action cannot contain, and punctuation at the end of words."""
    return " ".join(re.sub(r"[\[\],:;?!]+(?=\s|$)|[\[\]]", " ", text).split())


def click_names(clicks: Mapping[str, Node]) -> Iterator[str]:
    """Yield the names that a click action can express: not "search", and no "[" or line break."""
    for name in clicks:
        if name and name != SEARCH and "[" not in name and "\n" not in name:
            yield name


@dataclass(frozen=True, slots=True)
class Plan:
    """The oracle's way to buy a product.

    Attributes:
        query: The search that finds the product; "" if no search does.
        number: The page of results that the product is on, from 1.
        options: The (name, value) of the options to click.
    """

    query: str
    number: int
    options: tuple[tuple[str, str], ...]


def plan(shop: Shop, goal: Goal, offered: Sequence[str]) -> Plan:
    """Plan how to buy a goal's product: with one of the offered searches, else with the product's words."""
    asin, best = goal.product.asin, ("", 0)
    ranks = [(list(hits).index(asin), query) for query in offered if asin in (hits := shop.search(query))]
    if not ranks:
        product = goal.product
        for query in (product.query, f"{' '.join(product.attributes)} {product.query}", product.title):
            query = _plain(query.lower())
            hits = shop.search(query)
            if asin in hits:
                ranks = [(list(hits).index(asin), query)]
                break
    if ranks:
        rank, query = min(ranks, key=lambda each: each[0] // PER_PAGE)
        best = query, rank // PER_PAGE + 1
    return Plan(*best, choose_options(shop, goal))


def choose_options(shop: Shop, goal: Goal) -> tuple[tuple[str, str], ...]:
    """Return option values that fulfil all wanted options or, if that is impossible, a greedy choice."""
    clicks = clickable(shop.page(goal, State("item", asin=goal.product.asin)))
    values = [
        (clicks[name].target, name)
        for name in click_names(clicks)
        if clicks[name].kind == "option" and name not in (BUY, BACK, PREVIOUS, *SUB_PAGES)
    ]
    wanted = wanted_options(goal, shop.reward)
    exact = set(goal.options) | {value for _, value in goal.options}
    values.sort(key=lambda pair: pair not in exact and pair[1] not in exact)
    fitting = [[pair for pair in values if fits(pair[1], one)] for one in wanted]
    found = _assign(wanted, fitting, {})
    if found is None:
        found = {}
        for pair in (*(pair for pair in values if pair in exact), *(p for fit in fitting for p in fit)):
            found.setdefault(*pair)
    return tuple(found.items())


def _assign(
    wanted: Sequence[Wanted], fitting: Sequence[Sequence[tuple[str, str]]], chosen: dict[str, str]
) -> dict[str, str] | None:
    if not wanted:
        return chosen
    if any(fits(value, wanted[0]) for value in chosen.values()):
        return _assign(wanted[1:], fitting[1:], chosen)
    for name, value in fitting[0]:
        if name not in chosen:
            found = _assign(wanted[1:], fitting[1:], chosen | {name: value})
            if found is not None:
                return found
    return None


def next_action(shop: Shop, goal: Goal, plan: Plan, state: State, clicks: Mapping[str, Node]) -> str | None:
    """Return the plan's next action in a state; None after the purchase or without a plan."""
    asin = goal.product.asin
    if state.page == "done" or not plan.query:
        return None
    if state.page == "index":
        return f"search[{plan.query}]"
    planned = state.query == plan.query
    if state.page == "results":
        if asin.lower() in clicks:
            return f"click[{asin.lower()}]"
        if not planned or state.number == plan.number:
            return f"click[{BACK}]"
        return f"click[{NEXT if state.number < plan.number else PREVIOUS}]"
    if state.asin != asin:
        return f"click[{PREVIOUS if planned and state.page == 'item' else BACK}]"
    if state.page != "item":
        return f"click[{PREVIOUS}]"
    chosen = dict(state.options)
    missing = next((value for name, value in plan.options if chosen.get(name) != value), None)
    return f"click[{BUY if missing is None else missing}]"
