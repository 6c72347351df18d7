"""Pages, clicks and texts of the shop that the recorded episodes do not cover."""

import re

import pytest
from webshop_products import entry, shop, walk

from agentrl_envs.webshop.oracle import click_names, suggested_queries
from agentrl_envs.webshop.pages import as_rich_text, as_text, clickable, on_page, shown
from agentrl_envs.webshop.session import START, Node, State, act, address, parse

pytest.importorskip("rapidfuzz", reason="the extra webshop is not installed")

OPEN = ("search[lamp]", "click[b0lamp]")


@pytest.mark.parametrize(
    ("action", "name", "argument"),
    [
        ("click[Buy Now]", "click", "buy now"),
        ("search[a]b] and so on", "search", "a]b"),
        ("search[a[b]c]", "search[a", "b]c"),
        ("I think click[x]", "i think click", "x"),
        ("click[x] then click[y]", "click[x] then click", "y"),
        ("search[\u00c4 \u0130]", "search", "\u00e4 i\u0307"),
        ("search[ ]", "search", " "),
    ],
)
def test_actions_are_read_greedily(action: str, name: str, argument: str) -> None:
    parsed = parse(action)
    assert parsed is not None
    assert (parsed[0].lower(), parsed[1]) == (name, argument)


@pytest.mark.parametrize("action", ["", "search", "search[]", "[x]", "click[a\nb]", "\nclick[x]", "buy now"])
def test_what_is_no_action_is_not_read(action: str) -> None:
    assert parse(action) is None


def test_names_of_actions_have_their_case_and_nothing_around_them() -> None:
    for action in ("Search[lamp]", " search[lamp]", "CLICK[search]", "click [search]", "go search[lamp]"):
        assert act(START, action, {}) is None


def test_searching_works_from_every_page_and_keeps_what_was_visited() -> None:
    lamp = shop([entry(options={"Color": ["Red"]})])
    for way in (
        (),
        ("search[x]",),
        OPEN,
        (*OPEN, "click[red]", "click[features]"),
        (*OPEN, "click[buy now]"),
    ):
        before, _ = walk(lamp, *way)
        state, _ = walk(lamp, *way, "search[a  Lamp ]")
        assert state == State("results", ("a", "", "lamp", ""), 1, visited=before.visited)
        assert state.query == "a  lamp "


def test_going_back_to_search_forgets_everything_but_the_goal() -> None:
    state, _ = walk(shop([entry()]), *OPEN, "click[back to search]")
    assert state == START


def test_results_go_on_without_end_and_back_to_the_first_page() -> None:
    many = shop([entry(f"B{number:09}") for number in range(23)])
    state, nodes = walk(many, "search[lamp]", *["click[next >]"] * 2)
    assert [node.text for node in nodes if node.kind == "link"] == ["B000000020", "B000000021", "B000000022"]
    assert "Page 3 (Total results: 23)" in as_text(nodes)
    state, nodes = walk(many, "search[lamp]", *["click[next >]"] * 8)
    assert state.number == 9
    assert list(clickable(nodes)) == ["back to search", "< prev", "next >"]
    state, nodes = walk(many, "search[lamp]", *["click[next >]"] * 8, *["click[< prev]"] * 8)
    assert state.number == 1
    assert list(clickable(nodes))[:3] == ["back to search", "next >", "b000000000"]


def test_a_search_for_an_address_confuses_the_way_back_as_it_does_the_original() -> None:
    """Reproduce the original, which detects the kind of the open page in a URL that contains the keywords."""
    lamp = shop([entry()])
    state, nodes = walk(lamp, "search[my search_results]", "click[b0lamp]", "click[< prev]")
    assert (state.page, state.number) == ("results", 0)
    assert "Page 0 (Total results: 1)" in as_text(nodes)
    assert list(clickable(nodes)) == ["back to search", "next >"]
    state, _ = walk(lamp, "search[item_page]", "click[b0lamp]", "click[features]", "click[< prev]")
    assert state.page == "results"
    state, _ = walk(lamp, "search[done]", "click[b0lamp]", "click[features]", "click[< prev]")
    assert state.page == "item"


def test_page_zero_and_those_before_it_are_cut_as_python_cuts() -> None:
    found = [str(number) for number in range(50)]
    assert on_page(found, 0) == []
    assert on_page(found, -1) == found[30:40]
    assert on_page(found, 6) == []


def test_a_second_click_overwrites_an_option_in_its_old_place() -> None:
    lamp = shop([entry(options={"Color": ["Red", "Blue"], "Size": ["S", "M"]})])
    state, nodes = walk(lamp, *OPEN, "click[red]", "click[m]", "click[Blue]", "click[blue]")
    assert state.options == (("color", "blue"), ("size", "m"))
    assert address(state, "4").endswith('/4/B0LAMP/lamp/1/{"color": "blue", "size": "m"}')
    assert as_rich_text(nodes).startswith("You have clicked m.\nYou have clicked blue.\nInstruction:\n")


def test_options_are_kept_on_sub_pages_and_lost_among_the_results() -> None:
    lamp = shop([entry(options={"Color": ["Red"]})])
    for name in ("description", "features", "reviews"):
        state, _ = walk(lamp, *OPEN, "click[red]", f"click[{name}]", "click[< prev]")
        assert state.options == (("color", "red"),)
    state, _ = walk(lamp, *OPEN, "click[red]", "click[< prev]", "click[b0lamp]")
    assert state.options == ()


def test_a_value_of_two_options_is_one_click_on_the_last() -> None:
    lamp = shop([entry(options={"Shade": ["white", "gold"], "Foot": ["oak", "white"]})])
    _, nodes = walk(lamp, *OPEN)
    assert list(clickable(nodes))[-3:] == ["white", "gold", "oak"]
    assert [node.text for node in nodes if node.kind == "option"] == ["white", "gold", "oak", "white"]
    state, nodes = walk(lamp, *OPEN, "click[white]")
    assert state.options == (("foot", "white"),)
    assert as_rich_text(nodes).count("[clicked button] white [clicked button_]") == 2
    assert as_rich_text(nodes).startswith("You have clicked white.\nYou have clicked white.\n")


def test_a_value_that_is_the_name_of_an_option_looks_clicked_with_it() -> None:
    lamp = shop([entry(options={"Color": ["red"], "Part": ["color", "foot"]})])
    _, nodes = walk(lamp, *OPEN, "click[red]")
    assert [node.clicked for node in nodes if node.kind == "option"] == [True, True, False]


def test_values_that_json_escapes_never_look_clicked() -> None:
    lamp = shop([entry(options={"Size": ['10"', "caf\u00e9", "a\\b", "10 | 12"]})])
    for value, clicked in (('10"', False), ("caf\u00e9", False), ("a\\b", False), ("10 | 12", True)):
        state, nodes = walk(lamp, *OPEN, f"click[{value}]")
        assert state.options == (("size", value),)
        assert any(node.clicked for node in nodes) == clicked
        assert ("You have clicked" in as_rich_text(nodes)) == clicked


def test_quoted_keywords_make_a_value_look_clicked() -> None:
    lamp = shop([entry(options={"Color": ["red", "blue"]})])
    state, nodes = walk(lamp, 'search[a "red" lamp]', "click[b0lamp]")
    assert state.options == ()
    assert [node.clicked for node in nodes if node.kind == "option"] == [True, False]


def test_a_value_called_as_a_button_does_what_the_button_does() -> None:
    values = ["reviews", "attributes", "buy now", "back to search", "< prev", "next >", "search"]
    lamp = shop([entry(options={"Word": values})])
    _, nodes = walk(lamp, *OPEN)
    assert list(clickable(nodes)) == [
        *("back to search", "< prev", "description", "features", "reviews", "buy now"),
        *("attributes", "next >", "search"),
    ]
    assert walk(lamp, *OPEN, "click[reviews]")[0].page == "reviews"
    assert walk(lamp, *OPEN, "click[attributes]")[0].page == "attributes"
    assert walk(lamp, *OPEN, "click[buy now]")[0].page == "done"
    assert walk(lamp, *OPEN, "click[back to search]")[0] == START
    assert walk(lamp, *OPEN, "click[< prev]")[0].page == "results"
    assert walk(lamp, *OPEN, "click[next >]")[0].options == (("word", "next >"),)
    state, nodes = walk(lamp, *OPEN)
    assert act(state, "click[search]", clickable(nodes)) is None


def test_values_that_no_action_can_name_are_shown_but_not_offered() -> None:
    lamp = shop([entry(options={"Size": ["a[b", "a]b", "", "two\nlines", "ok"]})])
    state, nodes = walk(lamp, *OPEN)
    assert list(clickable(nodes))[-5:] == ["a[b", "a]b", "", "two\nlines", "ok"]
    assert list(click_names(clickable(nodes)))[-2:] == ["a]b", "ok"]
    assert act(state, "click[a[b]", clickable(nodes)) is None
    assert walk(lamp, *OPEN, "click[a]b]")[0].options == (("size", "a]b"),)
    assert "[SEP] size [SEP] a[b [SEP] a]b [SEP] two\nlines [SEP] ok [SEP]" in as_text(nodes)


def test_clicks_that_are_not_on_the_page_do_nothing() -> None:
    lamp = shop([entry(options={"Color": ["Red"]})])
    state, nodes = walk(lamp, "search[lamp]")
    for name in ("buy now", "red", "< prev", "B0OTHER", "description", "search"):
        assert act(state, f"click[{name}]", clickable(nodes)) is None
    state, nodes = walk(lamp, *OPEN, "click[buy now]")
    assert clickable(nodes) == {}


def test_the_page_of_attributes_is_there_when_asked_for() -> None:
    plain, full = shop([entry()]), shop([entry()], show_attributes=True)
    assert "attributes" not in clickable(walk(plain, *OPEN)[1])
    _, nodes = walk(full, *OPEN, "click[attributes]")
    assert [node.text for node in nodes[4:]] == [" brass", "garden", "table lamps", "Home › Lighting › Lamps"]


def test_empty_texts_have_no_node_and_blanks_alone_one() -> None:
    assert [shown(text) for text in ("", " ", "\t \f", " \n ", "\n", "\x0b", "\u00a0", " a\n")] == [
        *(None, " ", " ", None, None, "\x0b", "\u00a0", " a\n")
    ]
    nodes = [Node("plain", text) for text in ("a", "", " \n", "  ", "\u00a0", " b ")]
    assert as_text(nodes) == "a [SEP]  [SEP]  [SEP] b"
    assert as_rich_text(nodes) == "a\n \n\u00a0\n b \n"


def test_an_empty_bullet_leaves_an_empty_segment() -> None:
    _, nodes = walk(shop([entry()]), *OPEN, "click[features]")
    assert as_text(nodes).endswith("< Prev [SEP] Made of brass [SEP] ")
    _, nodes = walk(shop([entry(full_description="")]), *OPEN, "click[description]")
    assert as_text(nodes).endswith("[SEP] < Prev")


def test_the_receipt_sorts_and_escapes_options_and_shows_the_reward() -> None:
    lamp = shop([entry(options={"Size": ["<b>&'\""], "Color": ["caf\u00e9"]})])
    _, nodes = walk(lamp, *OPEN, "click[<b>&'\"]", "click[caf\u00e9]", "click[buy now]")
    text = as_text(nodes)
    assert r'options [SEP] {"color": "caf\u00e9", "size": "\u003cb\u003e\u0026\u0027\""} [SEP] attrs' in text
    assert "Your score (min 0.0, max 1.0) [SEP] 0.5 [SEP] Reward Details  [SEP]" not in text
    assert "Your score (min 0.0, max 1.0) [SEP] " in text


def test_visited_items_look_so_among_the_results() -> None:
    two = shop([entry(), entry("B0OTHER")])
    _, nodes = walk(two, *OPEN, "click[< prev]")
    assert "\n\n[clicked button] B0LAMP [clicked button_]\n" in as_rich_text(nodes)
    assert "\n\n[button] B0OTHER [button_]\n" in as_rich_text(nodes)
    assert "clicked" not in as_text(nodes)


def test_suggested_searches_are_the_instructions_own_words_and_can_be_said() -> None:
    instruction = (
        "Find me anti slip [new] loafers, slip-ons with rubber sole with color: 2005black, and size: 11, "
        "and price lower than 60.00 dollars"
    )
    found = suggested_queries(instruction, 8)
    assert found[:2] == [
        "anti slip new loafers slip-ons rubber sole 2005black 11",
        "anti slip new loafers slip-ons",
    ]
    assert len(found) == len(set(found)) <= 8
    assert suggested_queries(instruction, 3) == found[:3]
    assert suggested_queries(instruction, 0) == []
    for query in found:
        assert parse(f"search[{query}]") == ("search", query)
        assert set(query.split()) <= set(re.split(r"[][ ,:]+", instruction.lower()))
        assert "60.00" not in query
    assert suggested_queries("", 8) == suggested_queries(", and price lower than 60.00 dollars", 8) == []
