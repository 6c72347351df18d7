"""Goals, prices and splits, on numbers that can be verified by hand."""

from collections import Counter
from random import Random

import pytest
from webshop_products import catalogue, entry, wants

from agentrl.errors import ConfigError
from agentrl_envs.webshop.catalogue import Catalogue
from agentrl_envs.webshop.goals import LIMITS, NO_LIMIT, SPLITS, Draw, Goals, draw_limit


def goals_of(*products: dict, **attributes: dict) -> Goals:
    return Goals(catalogue(products, attributes or None), "synthetic", 0)


def test_limits_are_two_of_the_next_four_tens_the_higher_one() -> None:
    rng = Random(0)
    assert LIMITS[0] == 10.0
    assert LIMITS[-1] == 990.0
    for price, wanted in ((12.5, {30.0, 40.0, 50.0}), (20.0, {40.0, 50.0, 60.0}), (975.0, {990.0})):
        assert {draw_limit(price, rng) for _ in range(200)} == wanted
    for price in (980.0, 985.0, 990.0, 5000.0):
        assert draw_limit(price, rng) == NO_LIMIT


def test_prices_are_drawn_before_limits_from_one_stream() -> None:
    products = [entry("B0A", pricing="$1 to $9"), entry("B0B"), entry("B0C", pricing="$9 to $1")]
    goals = goals_of(*products)
    rng = Random(0)
    prices = {"B0A": rng.uniform(1.0, 9.0), "B0B": 12.5, "B0C": rng.uniform(9.0, 1.0)}
    assert goals.prices == prices
    limits = {asin: draw_limit(price, rng) for asin, price in prices.items()}
    assert {goal.product.asin: goal.limit for goal in goals} == limits


def test_another_price_seed_changes_prices_and_limits_but_not_the_order() -> None:
    sold = catalogue([entry(f"B{number}", pricing="$1 to $90") for number in range(30)])
    one, other = (Goals(sold, "synthetic", seed) for seed in (1, 2))
    assert [one.asin(number) for number in range(30)] == [other.asin(number) for number in range(30)]
    assert one.prices != other.prices
    assert [goal.limit for goal in one] != [goal.limit for goal in other]


def test_there_is_a_goal_per_combination_of_options_names_sorted() -> None:
    options = {"Size": ["S", "M"], "Color": ["Red", "Blue", "Red"]}
    goals = goals_of(entry(options=options))
    assert len(goals) == 6
    order = list(range(6))
    Random(233).shuffle(order)
    combinations = [
        (("color", color), ("size", size)) for color in ("red", "blue", "red") for size in ("s", "m")
    ]
    assert [goal.options for goal in goals] == [combinations[place] for place in order]
    goal = goals[order.index(3)]
    assert goal.number == order.index(3)
    assert goal.instruction == (
        f"Find me table lamps with color: blue, and size: m, and price lower than {goal.limit:.2f} dollars"
    )
    assert goals[-1] == goals[5]
    assert goals[1:3] == [goals[1], goals[2]]
    with pytest.raises(IndexError):
        goals[6]


def test_a_dear_product_has_no_limit_and_one_without_options_no_with() -> None:
    (goal,) = goals_of(entry(pricing="$985"))
    assert (goal.instruction, goal.limit, goal.options) == ("Find me table lamps", NO_LIMIT, ())


def test_what_gives_no_goal_is_counted_and_draws_what_the_original_draws() -> None:
    products = [entry("B0A"), entry("B0B", options={"Size": []}), entry("B0C"), entry("B0D")]
    attributes = {
        "B0A": wants("brass", instruction=None),
        "B0B": wants("brass"),
        "B0C": {"attributes": [], "instruction": "Find me one"},
        "B0D": wants("brass"),
    }
    goals = Goals(catalogue(products, attributes), "synthetic", 0)
    assert [goal.product.asin for goal in goals] == ["B0D"]
    assert goals.skipped == {"instruction without attributes": 1, "an option without values": 1}
    rng = Random(0)
    draw_limit(12.5, rng)  # for B0B, which has no combination
    assert goals[0].limit == draw_limit(12.5, rng)


def test_weights_are_mean_rarities_of_the_attributes_asked_for() -> None:
    products = [entry("B0A", options={"Size": ["S", "M", "L"]}), entry("B0B")]
    goals = goals_of(*products, B0A=wants("brass"), B0B=wants("brass", "bright"))
    weights = {goal.product.asin: goal.weight for goal in goals}
    assert weights == {"B0A": 1 / 4, "B0B": (1 / 4 + 1) / 2}
    assert [goals.weight(number) for number in range(4)] == [goal.weight for goal in goals]


def test_goals_by_people_name_values_alone_and_weigh_the_same() -> None:
    human = {
        "B0LAMP": [
            {
                "instruction": "...a lamp.",
                "instruction_attributes": ["brass"],
                "instruction_options": ["red"],
            },
            {"instruction": "a lamp", "instruction_attributes": [], "instruction_options": []},
        ]
    }
    goals = Goals(catalogue([entry()], human=human), "human", 0)
    (goal,) = goals
    assert goal.instruction == f"a lamp, and price lower than {goal.limit:.2f} dollars"
    assert (goal.options, goal.weight, goal.attributes) == (((None, "red"),), 1.0, ("brass",))
    assert goals.skipped == {"instruction without attributes": 1}


def many(count: int, sizes: int) -> Goals:
    sold: Catalogue = catalogue(
        [
            entry(f"B{number}", options={"Size": [str(size) for size in range(sizes)]})
            for number in range(count)
        ]
    )
    return Goals(sold, "synthetic", 0)


def test_the_split_by_index_is_the_originals() -> None:
    goals = many(100, 16)
    splits = goals.split("index")
    assert {split: (numbers[0], numbers[-1]) for split, numbers in splits.items()} == {
        "train": (1500, 1599),
        "dev": (500, 1499),
        "test": (0, 499),
    }
    with pytest.raises(ConfigError, match="leaves no training goals: there are 1500"):
        many(100, 15).split("index")


def test_the_split_by_product_shares_no_product_and_loses_no_goal() -> None:
    goals = many(100, 3)
    splits = goals.split("product")
    assert tuple(splits) == SPLITS
    assert sorted(number for numbers in splits.values() for number in numbers) == list(range(300))
    asins = {split: {goals.asin(number) for number in numbers} for split, numbers in splits.items()}
    assert {split: len(each) for split, each in asins.items()} == {"train": 80, "dev": 10, "test": 10}
    assert len(asins["train"] | asins["dev"] | asins["test"]) == 100
    assert all(list(numbers) == sorted(numbers) for numbers in splits.values())
    other = Goals(catalogue([entry(f"B{number}") for number in range(100)]), "synthetic", 5).split("product")
    assert [len(other[split]) for split in SPLITS] == [80, 10, 10]


def test_few_products_are_split_as_far_as_they_go() -> None:
    assert {split: len(numbers) for split, numbers in many(3, 2).split("product").items()} == {
        "train": 2,
        "dev": 2,
        "test": 2,
    }
    with pytest.raises(ConfigError, match="needs goals for 3 products, there are 2"):
        many(2, 2).split("product")


def test_draws_follow_the_weights_and_the_originals_are_one_off() -> None:
    products = [entry("B0A"), entry("B0B"), entry("B0C")]
    goals = goals_of(*products, B0A=wants("x"), B0B=wants("x"), B0C=wants("y"))
    weights = [goal.weight for goal in goals]
    assert sorted(weights) == [0.5, 0.5, 1.0]
    points = [(step + 0.5) / 4000 for step in range(4000)]
    drawn = Counter(map(Draw(goals, range(3)), points))
    assert [drawn[number] / 2000 for number in range(3)] == weights
    drawn = Counter(map(Draw(goals, range(3), faithful=True), points))
    assert [drawn[number] / 2000 for number in range(3)] == [0.0, weights[0], weights[1] + weights[2]]
    assert Counter(map(Draw(goals, [2]), points)) == {2: 4000}
    assert Draw(goals, range(3))(1.0) == 2
