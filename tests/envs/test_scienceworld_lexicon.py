"""ScienceWorld's action lists, expert and patch, without a JVM."""

from importlib.util import find_spec
from pathlib import Path
from zipfile import ZipFile

import pytest

from agentrl_envs.scienceworld.expert import GoldExpert
from agentrl_envs.scienceworld.hashing import CLASS, with_hash_code
from agentrl_envs.scienceworld.lexicon import MAX_ACTIONS, Meaning, Thing, lexicon, numbers, readings
from agentrl_envs.scienceworld.simulator import Reply

STOVE = Thing(1, "stove", "devices.Stove")
POT = Thing(2, "metal pot", "containers.MetalPot")
KITCHEN = Thing(3, "kitchen", "location.Room")
HALLWAY = Thing(4, "hallway", "location.Room")
AIR = Thing(5, "air", "substance.Air")
BOX = Thing(6, "red box", "taskitems.AnswerBox")


def test_a_lexicon_holds_what_the_things_are_good_for() -> None:
    listed = lexicon([STOVE, POT, KITCHEN, HALLWAY, AIR, BOX], "kitchen", teleports=False, electrical=False)
    assert list(listed) == [
        *("look around", "inventory", "wait", "wait1", "go to hallway"),
        *("look at stove", "look at metal pot", "look at red box"),
        *("focus on stove", "focus on metal pot", "focus on red box"),
        *("pick up metal pot", "put down metal pot", "activate stove", "deactivate stove", "mix metal pot"),
        *("move stove to red box", "move metal pot to red box", "move metal pot to stove"),
    ]
    assert listed["move metal pot to stove"] == Meaning("move", (POT.id, STOVE.id))


def test_teleports_lead_to_every_other_room() -> None:
    listed = lexicon([KITCHEN], "kitchen", teleports=True, electrical=False)
    assert len([action for action in listed if action.startswith("teleport to ")]) == 9
    assert "teleport to kitchen" not in listed


def test_connections_join_a_wire_with_the_ends_of_what_can_be_carried() -> None:
    ends = ("black wire terminal 1", "anode in battery", "table terminal 1", "terminal 2 in yellow wire")
    things = [Thing(n, name, "electricalcomponent.Terminal") for n, name in enumerate(ends)]
    things += [
        Thing(7, "table", "containers.furniture.WoodTable"),
        Thing(8, "battery", "electricalcomponent.Battery"),
    ]
    listed = lexicon(things, "workshop", teleports=False, electrical=True)
    assert [action for action in listed if action.startswith("connect")] == [
        "connect anode in battery to black wire terminal 1",
        "connect anode in battery to terminal 2 in yellow wire",
        "connect black wire terminal 1 to terminal 2 in yellow wire",
    ]


def test_a_lexicon_is_bounded() -> None:
    pots = [Thing(n, f"pot {n}", "containers.MetalPot") for n in range(40)]
    assert len(lexicon(pots, "kitchen", teleports=True, electrical=True)) == MAX_ACTIONS


def test_an_action_is_read_in_every_way_that_its_words_allow() -> None:
    assert list(readings("drop the metal pot")) == [("put down", ["metal pot"])]
    assert list(readings("examine substance in cup")) == [("look at", ["substance in cup"])]
    assert list(readings("move egg to box to kitchen")) == [
        ("move", ["egg", "box to kitchen"]),
        ("move", ["egg to box", "kitchen"]),
    ]
    assert list(readings("dance")) == list(readings("")) == []


def test_a_question_offers_its_numbers() -> None:
    question = "Ambiguous request: Please enter the number:\n0:\tlook at a (in x)\n1:\tlook at a (in y)\n"
    assert list(numbers(question)) == ["0", "1"]
    reply = Reply(question, 0, False, 0)
    assert (reply.asking, reply.valid) == (True, False)


def test_the_expert_answers_questions_as_the_solution_did() -> None:
    expert = GoldExpert(["move seed to pot", "2", "wait1"], "greenhouse", teleports=True)
    assert expert.next() == "move seed to pot"
    expert.observe(True, "Ambiguous request", asking=True)
    assert expert.next() == "2"
    expert.observe(True, "You move the seed.", asking=False)
    assert expert.next() == "wait1"


def test_the_expert_passes_over_answers_to_questions_that_nobody_asked() -> None:
    expert = GoldExpert(["move seed to pot", "2", "look around"], "greenhouse", teleports=True)
    expert.observe(True, "You move the seed.", asking=False)
    assert expert.next() == "look around"


def test_the_expert_answers_zero_to_the_question_of_another() -> None:
    expert = GoldExpert(["look around", "1"], "greenhouse", teleports=True)
    expert.observe(False, "Ambiguous request", asking=True)
    assert expert.next() == "0"
    expert.observe(True, "You look.", asking=False)
    assert expert.next() == "look around"


@pytest.mark.parametrize(("teleports", "wanted"), [(True, "teleport to hallway"), (False, "go to kitchen")])
def test_the_expert_returns_to_its_way(teleports: bool, wanted: str) -> None:
    expert = GoldExpert(["go to kitchen", "open fridge"], "hallway", teleports)
    expert.observe(False, "You move to the outside.", asking=False)
    assert expert.next() == wanted
    if teleports:
        expert.observe(True, "You teleport to the hallway.", asking=False)
        assert expert.next() == "go to kitchen"
        expert.observe(True, "You move to the kitchen.", asking=False)
        assert expert.next() == "open fridge"


def test_after_its_solution_the_expert_waits() -> None:
    expert = GoldExpert(["look around"], "hallway", teleports=True)
    expert.observe(True, "This room is", asking=False)
    assert [expert.next(), expert.next()] == ["wait1", "wait1"]


def test_the_simulators_objects_get_one_hash_code() -> None:
    spec = find_spec("scienceworld")
    if spec is None or spec.origin is None:
        pytest.skip("the extra scienceworld is not installed")
    with ZipFile(Path(spec.origin).with_name("scienceworld.jar")) as jar:
        stock = jar.read(CLASS)
    patched = with_hash_code(stock)
    assert b"hashCode" not in stock
    assert patched.count(b"hashCode") == 1
    assert with_hash_code(patched) == patched
