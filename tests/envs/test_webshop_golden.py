"""WebShop compared with recordings of the original: observations, clickable names, rewards, goals, prices."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from agentrl_envs.webshop.goals import NO_LIMIT, Goals
from agentrl_envs.webshop.nouns import noun_tagger
from agentrl_envs.webshop.pages import as_rich_text, as_text, clickable
from agentrl_envs.webshop.reward import COLOURS
from agentrl_envs.webshop.session import START, State, act, address
from agentrl_envs.webshop.shop import Shop, find_source, open_shop

pytest.importorskip("nltk", reason="the extra webshop is not installed")
pytest.importorskip("rapidfuzz", reason="the extra webshop is not installed")

pytestmark = pytest.mark.reference
PRICE_SEED = 7


def recorded(folder: Path, pattern: str) -> list[dict[str, Any]]:
    files = sorted((folder / "webshop" / "golden").glob(pattern))
    assert files, f"no recordings like {pattern}"
    return [json.loads(file.read_text()) for file in files]


def shop_of(folder: Path, recording: dict[str, Any]) -> Shop:
    assert recording["seed_before_constructor"] == PRICE_SEED
    human = recording["human_goals"]
    return open_shop(
        find_source(folder / "webshop" / "data", None, human),
        "human" if human else "synthetic",
        PRICE_SEED,
        "product",
        noun_tagger("heuristic"),
        "original",
        recording["show_attrs"],
        None,
    )


def transcripts(folder: Path) -> list[dict[str, Any]]:
    found = (each for kind in ("syn", "human", "edge") for each in recorded(folder, f"{kind}_*.json"))
    return [each for each in found if "steps" in each]


def test_every_recorded_episode_is_the_same(reference_folder: Path) -> None:
    count: Counter[str] = Counter()
    for recording in transcripts(reference_folder):
        shop = shop_of(reference_folder, recording)
        goal = shop.goals[recording["goal_index"]]
        session = str(recording["goal_index"])
        state, reward, done = START, 0.0, False
        for step in (recording["reset"], *recording["steps"]):
            where = f"{recording['name']}, {step.get('action', 'reset')}"
            if "action" in step:
                before = state
                moved = act(state, step["action"], clickable(shop.page(goal, state, reward)))
                state = before if moved is None else moved
                done = moved is not None and state.page == "done"
                reward = shop.judge(goal, state).total if done else 0.0
                assert (reward, done) == (step["reward"], step["done"]), where
                # The original returns the int 0 if an action has no effect, else the float 0.0.
                assert (moved is None) == isinstance(step["reward"], int), where
                count["rewards"] += 1
                count["purchases"] += done
            nodes = shop.page(goal, state, reward)
            assert as_text(nodes) == step["text"], where
            assert as_rich_text(nodes) == step["text_rich"], where
            assert list(clickable(nodes)) == step["available"]["clickables"], where
            assert (state.page == "index") == step["available"]["has_search_bar"], where
            assert address(state, session) == step["url"], where
            count["observations"] += 1
        count["episodes"] += 1
    print(f"equal to the original's: {dict(count)}")
    assert count["episodes"] >= 12
    assert count["observations"] >= 100
    assert count["purchases"] >= 8


def test_every_recorded_purchase_has_the_same_parts_whoever_tags(reference_folder: Path) -> None:
    """Compare all parts except `title_score`, which depends on the tagger."""
    compared = 0
    for recording in transcripts(reference_folder):
        shop = shop_of(reference_folder, recording)
        goal = shop.goals[recording["goal_index"]]
        for step in recording["steps"]:
            if "reward_by_tagger" not in step:
                continue
            state = State("item", asin=step["asin"], options=tuple(step["options"].items()))
            judged = shop.judge(goal, state)
            for tagged in step["reward_by_tagger"].values():
                assert judged.total == tagged["reward"], recording["name"]
                wanted = {name: value for name, value in tagged["info"].items() if name != "title_score"}
                found = {name: value for name, value in judged.parts().items() if name != "title_score"}
                assert found == wanted, recording["name"]
                compared += 1
    print(f"rewards compared: {compared}")
    assert compared >= 16


@pytest.mark.parametrize(("kind", "count"), [("synthetic", 6910), ("human", 13)])
def test_prices_and_goals_are_the_recorded_ones_in_their_order(
    reference_folder: Path, kind: str, count: int
) -> None:
    (wanted,) = recorded(reference_folder, f"{kind}_goals_and_prices_seed7.json")
    recording = {"seed_before_constructor": PRICE_SEED, "human_goals": kind == "human", "show_attrs": False}
    goals: Goals = shop_of(reference_folder, recording).goals
    assert goals.prices == wanted["prices"]
    assert list(goals.prices) == list(wanted["prices"])
    assert len(goals) == len(wanted["goals"]) == count
    for goal, right in zip(goals, wanted["goals"], strict=True):
        assert goal.product.asin == right["asin"]
        assert goal.limit == right["price_upper"]
        assert goal.weight == pytest.approx(right["weight"], rel=0, abs=1e-15)
        assert goals.weight(goal.number) == goal.weight
        assert goals.asin(goal.number) == right["asin"]
        assert ("price lower" not in goal.instruction) == (goal.limit == NO_LIMIT)
        if "instruction_text" in right:
            check_content(goal, right)
    print(f"{len(goals)} {kind} goals and {len(goals.prices)} prices compared")


def check_content(goal: Any, right: dict[str, Any]) -> None:
    options = right["goal_options"]
    named = tuple(options.items()) if isinstance(options, dict) else tuple((None, value) for value in options)
    product = goal.product
    assert goal.instruction == right["instruction_text"]
    assert goal.attributes == tuple(right["attributes"])
    assert goal.options == named
    assert product.title == right["name"]
    assert (product.category, product.query) == (right["category"], right["query"])
    assert product.product_category == right["product_category"]


def test_the_goals_of_the_recorded_episodes_have_the_recorded_content(reference_folder: Path) -> None:
    recordings = transcripts(reference_folder)
    for recording in recordings:
        goal = shop_of(reference_folder, recording).goals[recording["goal_index"]]
        check_content(goal, recording["goal"])
        assert goal.limit == recording["goal"]["price_upper"]
    print(f"{len(recordings)} goals compared")
    assert len(recordings) >= 12


def test_colours_are_the_originals_in_their_order(reference_folder: Path) -> None:
    (words,) = recorded(reference_folder, "color_words.json")
    assert list(COLOURS) == words
    assert len(words) == 102
