"""Rewards that can be verified by hand, and the differences of "original" and "fixed"."""

from dataclasses import replace
from typing import Any

import pytest
from webshop_products import entry, shop, wants

from agentrl.errors import ConfigError, MissingDependencyError
from agentrl_envs.webshop.goals import Goal
from agentrl_envs.webshop.nouns import Heuristic, NounTagger, SpacyNouns, noun_tagger
from agentrl_envs.webshop.oracle import choose_options
from agentrl_envs.webshop.reward import COLOURS, Reward, alike, colour, fits, reward

pytest.importorskip("rapidfuzz", reason="the extra webshop is not installed")


class EveryWord:
    name = "words"

    def __call__(self, title: str) -> list[str]:
        return title.lower().split()


def judged(
    bought: dict[str, Any],
    wanted: dict[str, Any],
    options: dict[str, str] | None = None,
    goal_options: tuple[tuple[str | None, str], ...] = (),
    limit: float = 20.0,
    mode: str = "original",
    tagger: NounTagger | None = None,
    attributes: tuple[str, ...] = ("brass",),
) -> Reward:
    sold = shop(
        [entry("B0A", **bought), entry("B0B", **wanted)], {"B0A": wants("steel"), "B0B": wants("brass")}
    )
    product, right = sold.catalogue.products
    goal = Goal(0, right, "", attributes, goal_options, limit, 1.0)
    return reward(product, options or {}, 12.5, goal, mode, tagger or EveryWord())


SAME = {"name": "oak lamp", "query": "lamps", "product_category": "Home › Lamps"}
OTHER = {"name": "pine lamp", "query": "chairs", "product_category": "Garden › Chairs"}
PLAIN = {"small_description": ["no metal"], "full_description": ""}


def test_parts_add_up_to_hits_by_wants_times_type() -> None:
    found = judged(SAME, SAME, {"size": "m"}, ((None, "m"), (None, "xl")))
    assert (found.attributes, found.options, found.price, found.r_type) == (1, 1, True, 1.0)
    assert found.total == 3 / 4
    assert found.parts() == {
        "r_type": 1.0,
        "r_att": 1.0,
        "w_att": 1 / 4,
        "query_match": True,
        "category_match": True,
        "title_score": 1.0,
        "r_option": 0.5,
        "w_option": 1 / 2,
        "r_price": True,
        "w_price": 1 / 4,
    }
    assert "r_option" not in judged(SAME, SAME).parts()


@pytest.mark.parametrize(
    ("bought", "wanted", "score", "r_type"),
    [
        ("a b", "a b", 1.0, 1.0),
        ("a a", "a b c d e", 0.2, 0.5),  # not above 0.2, nothing else matches
        ("a b", "a a b c d", 0.4, 1.0),  # repeats count in the wanted nouns, but not in the shared ones
        ("a", "a b c d e f g h i j", 0.1, 0.5),
        ("a", "a b c d e f g h i j k", 1 / 11, 0.1),
        ("z", "a b", 0.0, 0.0),
        ("z", "", 0.2, 0.5),
    ],
)
def test_the_type_goes_by_shared_nouns(bought: str, wanted: str, score: float, r_type: float) -> None:
    found = judged(OTHER | {"name": bought}, SAME | {"name": wanted})
    assert (found.title_score, found.r_type) == (score, r_type)


def test_query_or_two_categories_help_unless_titles_share_nearly_nothing() -> None:
    few = {"name": "a b c d e f g h i j"}
    for help in ({"query": "lamps"}, {"product_category": "Lamps › X › Home"}):
        assert judged(OTHER | help | {"name": "a"}, SAME | few).r_type == 1.0
        assert judged(OTHER | help | {"name": "z"}, SAME | few).r_type == 0.0
        assert judged(OTHER | help | {"name": "a"}, SAME | {"name": few["name"] + " k"}).r_type == 0.1
    once = judged(OTHER | {"product_category": "Home › Home"}, SAME | {"product_category": "Home › Home"})
    assert not once.category_match


def test_an_attribute_counts_when_alike_or_anywhere_in_the_texts() -> None:
    for fields in (
        {"name": "BRASS lamp"},
        {"full_description": "of Brass"},
        {"small_description": ["so", "brassy"]},
    ):
        assert judged(PLAIN | fields, SAME).attributes == 1
    assert judged(PLAIN, SAME).attributes == 0
    assert judged(PLAIN, SAME, attributes=("Steel!",)).attributes == 1  # similar to its attribute "steel"
    split = PLAIN | {"small_description": ["bra", "ss"]}
    assert judged(split, SAME, attributes=("bra ss",)).attributes == 1  # bullets are joined by blanks


def test_the_price_counts_up_to_the_limit() -> None:
    assert judged(SAME, SAME, limit=12.5).price
    assert not judged(SAME, SAME, limit=12.4).price


def test_the_first_colour_of_the_list_stands_for_a_text() -> None:
    assert colour("dark red") == "dark"
    assert colour("redwood") == "red"
    assert colour("reddish black") == "black"
    assert colour("plain") == "plain"
    assert colour(("color", "black")) == "black"
    assert colour(("gold", "x")) == "gold"
    assert colour(("color", "2005black")) == ("color", "2005black")
    assert colour("titanium") == "tan"
    assert len(set(COLOURS)) == 102


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("xx-large", "xx large", True),
        ("Café au lait", "caf au lait", True),  # non-ASCII characters are dropped
        ("m", ("size", "m"), True),
        ("30 x 40", "40x30", False),
        ("", "", False),
        ("漢字", "漢字", False),
        ("!!", "!!", False),
        ("small", "smalls", True),
        ("small", "smaller", False),
    ],
)
def test_texts_are_compared_as_sets_of_ascii_words(one: Any, other: Any, same: bool) -> None:
    assert alike(one, other) == same


def test_the_original_loses_colours_within_longer_values_and_the_fixed_one_does_not() -> None:
    wanted = (("color", "2005black"),)
    assert not fits("2005black", wanted[0])
    assert judged(SAME, SAME, {"color": "2005black"}, wanted).total == 2 / 3
    assert judged(SAME, SAME, {"color": "2005black"}, wanted, mode="fixed").total == 1.0
    assert judged(SAME, SAME, {"color": "black"}, (("color", "black"),)).total == 1.0


def test_goals_by_people_are_judged_alike_in_both_modes() -> None:
    for options in ({"color": "2005black"}, {"color": "white"}, {}):
        found = [judged(SAME, SAME, options, ((None, "black"),), mode=mode) for mode in ("original", "fixed")]
        assert found[0] == found[1]


def test_any_chosen_value_may_serve_any_wanted_option() -> None:
    found = judged(SAME, SAME, {"size": "m"}, ((None, "m"), (None, "M!")))
    assert found.options == 2


def test_the_oracle_chooses_what_counts_even_where_names_collide() -> None:
    options = {"Shade": ["white", "gold"], "Foot": ["oak", "white"]}
    sold = shop([entry(options=options)], mode="fixed")
    reached = 0
    for goal in sold.goals:
        chosen = dict(choose_options(sold, goal))
        found = reward(goal.product, chosen, 12.5, replace(goal, limit=20.0), "fixed", EveryWord())
        reached += found.total == 1.0
    # "white" selects a value of the last option only, so white with oak is impossible.
    assert {goal.options for goal in sold.goals if goal.options == (("foot", "oak"), ("shade", "white"))}
    assert reached == len(sold.goals) - 1


def test_the_heuristic_drops_what_is_no_noun() -> None:
    title = "The Beautiful 12-Pack Women's Casual T-Shirts, Extremely Soft Cotton & 2 Black Lamps with Lamps"
    assert Heuristic()(title) == ["pack", "women", "shirts", "cotton", "lamps", "lamps"]
    assert Heuristic()("") == []


def test_taggers_are_named_or_given() -> None:
    assert noun_tagger("heuristic").name == "heuristic"
    given = noun_tagger(EveryWord())
    assert (given.name, tuple(given("A b"))) == ("words", ("a", "b"))
    for wrong in (3, None, str.lower):
        with pytest.raises(ConfigError, match="tagger"):
            noun_tagger(wrong)


def test_without_spacy_or_its_model_the_message_says_what_to_run() -> None:
    with pytest.raises(MissingDependencyError, match="python -m spacy download en_core_no_such"):
        SpacyNouns("en_core_no_such")
