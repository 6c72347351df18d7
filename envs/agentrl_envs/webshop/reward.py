"""Reward of a purchase: how well product, options and price match the goal."""

from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple, TypeAlias

from agentrl_envs.webshop.catalogue import Product
from agentrl_envs.webshop.goals import Goal
from agentrl_envs.webshop.nouns import NounTagger

MODES = ("original", "fixed")
MATCH = 85  # texts match if their similarity, of at most 100, is above this
# The order is part of the reward's definition: of several colours in a text, the first of this list counts.
_COLOURS_TEXT = """
    alabaster apricot aqua ash asphalt azure banana beige black blue blush bordeaux bronze brown burgundy
    camel camo caramel champagne charcoal cheetah chestnut chocolate christmas coffee cognac copper coral
    cranberry cream crystal dark denim eggplant elephant espresso fuchsia gold granite grape graphite
    grass gray green grey heather indigo ivory ivy khaki lavender lemon leopard light lilac lime magenta
    maroon mauve merlot midnight mint mocha multicolor mushroom mustard natural navy nude olive orange
    peach pewter pink plum purple rainbow red rose royal rust sand sapphire seashell silver skull slate
    steel stone stonewash sunflower tan taupe teal tiger turquoise violet walnut wheat white wine yellow
"""
COLOURS = tuple(_COLOURS_TEXT.split())

Wanted: TypeAlias = str | tuple[str, str]


class Reward(NamedTuple):
    """A reward and its parts.

    Attributes:
        total: r_type * (attributes + options + price) / (wanted_attributes + wanted_options + 1).
        r_type: 1, 0.5, 0.1 or 0, by the similarity of the kinds of products.
        query_match: Whether both products have the same query.
        category_match: Whether they share at least two categories.
        title_score: The fraction of the nouns in the goal's title that are in the bought product's title.
        attributes: The number of wanted attributes that the bought product has.
        wanted_attributes: The number of wanted attributes.
        options: The number of wanted options that were chosen.
        wanted_options: The number of wanted options.
        price: Whether the price is within the limit.
    """

    total: float
    r_type: float
    query_match: bool
    category_match: bool
    title_score: float
    attributes: int
    wanted_attributes: int
    options: int
    wanted_options: int
    price: bool

    def parts(self) -> dict[str, float | bool]:
        """Return the parts under the original's names: fractions r_ and weights w_."""
        parts: dict[str, float | bool] = {
            "r_type": self.r_type,
            "r_att": self.attributes / self.wanted_attributes,
            "w_att": self.wanted_attributes / self._wanted,
            "query_match": self.query_match,
            "category_match": self.category_match,
            "title_score": self.title_score,
            "r_price": self.price,
            "w_price": 1 / self._wanted,
        }
        if self.wanted_options:
            parts["r_option"] = self.options / self.wanted_options
            parts["w_option"] = self.wanted_options / self._wanted
        return parts

    @property
    def _wanted(self) -> int:
        return self.wanted_attributes + self.wanted_options + 1


def reward(
    product: Product, options: Mapping[str, str], price: float, goal: Goal, mode: str, tagger: NounTagger
) -> Reward:
    """Compute the reward of a purchase.

    Args:
        product: The bought product.
        options: Name -> chosen value.
        price: The price of the product in dollars.
        goal: The goal.
        mode: "original" or "fixed"; they differ in `wanted_options`.
        tagger: The noun tagger for titles.
    """
    query_match = product.query == goal.product.query
    category_match = (
        len(_categories(product.product_category) & _categories(goal.product.product_category)) >= 2
    )
    title_score = _title_score(product.title, goal.product.title, tagger)
    r_type = 1.0
    if not (query_match or category_match or title_score > 0.2):
        r_type = 0.5
    if title_score < 0.1:  # even if query or category match
        r_type = 0.1
    if title_score == 0.0:
        r_type = 0.0
    attributes = sum(has_attribute(product, wanted) for wanted in goal.attributes)
    wanted = wanted_options(goal, mode)
    chosen = sum(any(fits(value, one) for value in options.values()) for one in wanted)
    within = price <= goal.limit
    count = len(goal.attributes) + len(wanted) + 1
    return Reward(
        (attributes + chosen + within) / count * r_type,
        r_type,
        query_match,
        category_match,
        title_score,
        attributes,
        len(goal.attributes),
        chosen,
        len(wanted),
        within,
    )


def wanted_options(goal: Goal, mode: str) -> tuple[Wanted, ...]:
    """Return the options that chosen values are compared with.

    For synthetic goals the original compares a value with the *pair* of name and value. The value 'black'
    matches ('color', 'black'), but nothing matches ('color', '2005black'), so a few percent of the goals
    cannot be reached. "fixed" compares with the value alone, as the original does for human goals.
    """
    if mode == "original":
        return tuple(value if name is None else (name, value) for name, value in goal.options)
    return tuple(value for _, value in goal.options)


def has_attribute(product: Product, wanted: str) -> bool:
    """Return whether a product has an attribute similar to the wanted one, or its texts contain it."""
    return (
        any(alike(attribute, wanted) for attribute in product.attributes)
        or wanted in product.title.lower()
        or wanted in " ".join(product.bullets).lower()
        or wanted in product.description.lower()
    )


def fits(value: str, wanted: Wanted) -> bool:
    """Return whether a chosen option value counts as a wanted one."""
    return alike(colour(value), colour(wanted))


@lru_cache(maxsize=1 << 16)
def colour(value: Wanted) -> Wanted:
    """Return the first of `COLOURS` in a value (a substring, or a part of a pair), else the value itself."""
    return next((name for name in COLOURS if name in value), value)


@lru_cache(maxsize=1 << 18)
def alike(one: Wanted, other: Wanted) -> bool:
    """Return whether the word sets of two values are similar; a pair is compared by its `str`."""
    from rapidfuzz.fuzz import token_set_ratio
    from rapidfuzz.utils import default_process

    texts = (str(text).encode("ascii", "ignore").decode() for text in (one, other))
    return round(token_set_ratio(*texts, processor=default_process)) > MATCH


def _title_score(bought: str, wanted: str, tagger: NounTagger) -> float:
    nouns = tagger(wanted)
    if not nouns:
        return 0.2
    return len(set(tagger(bought)) & set(nouns)) / len(nouns)


@lru_cache(maxsize=1 << 14)
def _categories(text: str) -> frozenset[str]:
    return frozenset(name.strip() for name in text.split("›"))
