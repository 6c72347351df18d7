"""The searching expert wins although it knows only the observations."""

from collections import Counter
from random import Random
from typing import Any

import pytest

from agentrl.env import make
from agentrl.env.settings import quickstart_kwargs
from agentrl_envs.alfworld.expert import SearchingExpert
from agentrl_envs.alfworld.wording import Wanted

ID = "agentrl/ALFWorld-v0"
TINY = quickstart_kwargs()


def play(count: int, noise: float = 0.0, first: int = 0, **settings: Any) -> tuple[Counter[str], list[int]]:
    """Play the expert on games of the unseen scenes; return wins per task type, and turns of wins."""
    env = make(ID, split="valid_unseen", expert=True, **settings)
    rng, wins, turns = Random(0), Counter[str](), []
    for index in range(first, first + count):
        _, info = env.reset(options={"task": f"valid_unseen/{index}"})
        steps, over = 0, False
        while not over:
            assert info["expert"] in info["actions"]
            command = rng.choice(info["actions"]) if rng.random() < noise else info["expert"]
            _, _, terminated, truncated, info = env.step(command)
            steps, over = steps + 1, terminated or truncated
        assert info["expert"] is None
        if info["success"]:
            wins[info["task_type"]] += 1
            turns.append(steps)
    return wins, turns


def test_it_wins_every_place_and_look_game_in_small_rooms() -> None:
    wins, turns = play(120, **TINY)
    assert wins == {"pick_and_place_simple": 60, "look_at_obj_in_light": 60}
    assert sum(turns) / len(turns) < 6.5


def test_noise_in_between_does_not_confuse_it() -> None:
    wins, _ = play(100, noise=0.2, **TINY)
    assert wins.total() >= 97


def test_it_wins_nearly_always_in_whole_rooms() -> None:
    wins, _ = play(120)
    assert wins.total() >= 114
    assert min(wins.values()) >= 18
    assert len(wins) == 6


def test_with_noise_it_still_wins_in_whole_rooms() -> None:
    wins, _ = play(60, noise=0.1, first=120)
    assert wins.total() >= 54


HOLDS = {"desk": frozenset({"pen", "mug"}), "drawer": frozenset({"pen"}), "shelf": frozenset({"mug"})}
OPENING = "Looking quickly around you, you see a desk 1, a drawer 1, and a shelf 1.\n\n"


@pytest.fixture
def expert() -> SearchingExpert:
    return SearchingExpert(Wanted("pick_and_place_simple", "Pen", "Shelf"), OPENING, HOLDS)


def test_it_looks_first_where_such_an_object_fits(expert: SearchingExpert) -> None:
    rooms = ["go to desk 1", "go to drawer 1", "go to shelf 1"]
    assert expert.next(rooms) == "go to desk 1"
    expert.observe("go to desk 1", "You arrive at desk 1. On the desk 1, you see a mug 1.")
    assert expert.next(rooms) == "go to drawer 1"
    expert.observe("go to drawer 1", "You arrive at drawer 1. The drawer 1 is closed.")
    assert expert.next(["go to desk 1", "go to shelf 1", "open drawer 1"]) == "open drawer 1"
    expert.observe("open drawer 1", "You open the drawer 1. The drawer 1 is open. In it, you see nothing.")
    assert expert.next(["close drawer 1", "go to desk 1", "go to shelf 1"]) == "go to shelf 1"


def test_it_puts_a_wrong_object_down_and_goes_on(expert: SearchingExpert) -> None:
    expert.observe("go to desk 1", "You arrive at desk 1. On the desk 1, you see a mug 1, and a pen 2.")
    expert.observe("take mug 1 from desk 1", "You pick up the mug 1 from the desk 1.")
    assert expert.next(["go to drawer 1", "go to shelf 1", "move mug 1 to desk 1"]) == "move mug 1 to desk 1"
    expert.observe("move mug 1 to desk 1", "You move the mug 1 to the desk 1.")
    assert expert.next(["take mug 1 from desk 1", "take pen 2 from desk 1"]) == "take pen 2 from desk 1"
    expert.observe("take pen 2 from desk 1", "You pick up the pen 2 from the desk 1.")
    assert expert.next(["go to drawer 1", "go to shelf 1", "move pen 2 to desk 1"]) == "go to shelf 1"


def test_heating_undoes_cooling() -> None:
    expert = SearchingExpert(
        Wanted("pick_cool_then_place_in_recep", "Egg", "Table"),
        "Looking quickly around you, you see a fridge 1, a microwave 1, and a table 1.\n",
        {},
    )
    expert.observe("take egg 1 from table 1", "You pick up the egg 1 from the table 1.")
    expert.observe("cool egg 1 with fridge 1", "You cool the egg 1 using the fridge 1.")
    assert expert.next(["cool egg 1 with fridge 1", "go to table 1"]) == "go to table 1"
    expert.observe("heat egg 1 with microwave 1", "You heat the egg 1 using the microwave 1.")
    assert expert.next(["go to fridge 1", "go to table 1"]) == "go to fridge 1"
