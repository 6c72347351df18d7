"""Factors of turns: what they read from a turn, and the table that plug-ins extend."""

import math
from dataclasses import replace

import pytest

from agentrl.env import factors as table
from agentrl.env import load_plugins, make
from agentrl.env.factors import COMMON, PlayedTurn, factor_values, factors_of, register_factors
from agentrl.errors import ConfigError

TURN = PlayedTurn(
    "a lamp", (("a lamp", "look"),), "a lamp and a desk", "open desk", "a lamp, a key", True, 4, 5
)


def common(**changes: object) -> dict[str, float]:
    return dict(zip(COMMON, factor_values(COMMON, replace(TURN, **changes)), strict=True))


def test_the_common_factors() -> None:
    assert common() == {
        "new_words": pytest.approx(1 / 3),  # of a, lamp and key
        "seen_answer": 0.0,
        "repeated_action": 0.0,
        "not_understood": 0.0,
        "more_choices": pytest.approx(0.2),
    }
    again = common(observation="a lamp", action="look", answer="a lamp", valid=False, choices_after=2)
    assert again == {
        "new_words": 0.0,
        "seen_answer": 1.0,
        "repeated_action": 1.0,
        "not_understood": 1.0,
        "more_choices": -0.5,
    }
    assert common(answer="", choices=None)["new_words"] == common(choices_after=None)["more_choices"] == 0.0


def test_a_plugin_adds_to_the_table_of_its_environment_and_to_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load_plugins()
    monkeypatch.setattr(table, "_tables", {})
    register_factors("example/Room-v0", {"key": lambda turn: float("key" in turn.answer)})
    assert list(factors_of("example/Room-v0")) == [*COMMON, "key"]
    assert list(factors_of("example/Other-v0")) == list(COMMON)
    with pytest.raises(ConfigError, match="every environment has new_words, wanted other names"):
        register_factors("example/Room-v0", {"new_words": lambda turn: 0.0})


def test_a_factor_that_fails_or_is_not_finite_is_named() -> None:
    with pytest.raises(ConfigError, match="factor 'half' failed: ZeroDivisionError"):
        factor_values({"half": lambda turn: 1 / 0}, TURN)
    with pytest.raises(ConfigError, match="factor 'half' is nan, wanted a finite number"):
        factor_values({"half": lambda turn: math.nan}, TURN)


@pytest.mark.parametrize("text", ["raw", "compact"])
def test_those_of_alfworld_say_the_same_in_both_wordings(text: str) -> None:
    """The expert's steps, by the factors that its own commands explain."""
    env = make("agentrl/ALFWorld-v0", text=text, expert=True)
    opening, info = env.reset(options={"task": "train/0"})
    functions, told, observation, found = factors_of("agentrl/ALFWorld-v0"), [], opening, []
    for _ in range(50):
        action = info["expert"]
        answer, _, terminated, truncated, info = env.step(action)
        turn = PlayedTurn(opening, tuple(told), observation, action, answer)
        found.append((action, dict(zip(functions, factor_values(functions, turn), strict=True))))
        told.append((observation, action))
        observation = answer
        if terminated or truncated:
            break
    assert terminated
    env.close()
    for action, values in found:
        assert values["picked_up"] == {"take": 1.0, "move": -1.0}.get(action.split()[0], 0.0), action
        assert values["changed"] == float(action.split()[0] in ("clean", "heat", "cool", "use")), action
        assert values["opened"] == float(action.startswith("open")), action
        assert all(-1 <= value <= 1 for value in values.values())
    taken = next(values for action, values in found if action.startswith("take"))
    assert taken["goal_words"] > 0
    assert any(values["new_objects"] for _, values in found)


def test_those_of_the_other_environments() -> None:
    shop, lab = factors_of("agentrl/WebShop-v0"), factors_of("agentrl/ScienceWorld-v0")
    opening = "WebShop [SEP] Instruction: [SEP] Find me red shoes with size: 9 [SEP] Search"
    search = PlayedTurn(opening, (), opening, "search[red shoes]", "page")
    assert shop["goal_words"](search) == pytest.approx(2 / 4)  # red, shoes, size and 9
    assert [shop["searched"](search), shop["bought"](search)] == [1.0, 0.0]
    assert shop["bought"](replace(search, action="click[buy now]")) == 1.0
    task = "Your task is to find a living thing.\nThis room is the kitchen."
    focus = PlayedTurn(task, (), task, "focus on living thing", "ok")
    assert lab["goal_words"](focus) == 1.0
    assert lab["focused"](focus) == 1.0
    assert lab["focused"](replace(focus, action="look around")) == 0.0
