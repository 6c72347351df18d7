"""The engine's rules and texts, on a small kitchen and on traces recorded from TextWorld."""

import gzip
import hashlib
import json
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest

from agentrl_envs.alfworld.engine import NOTHING, Game, GameState, display_names
from agentrl_envs.alfworld.generate import Options, generate
from agentrl_envs.alfworld.package_data import load_package_data
from agentrl_envs.alfworld.pddl import GameFileError, PddlError


def play(game: Game, *commands: str) -> list[GameState]:
    states = [game.start]
    for command in commands:
        states.append(game.advance(states[-1], command))
    return states


def test_the_opening_lists_the_room_and_the_task(kitchen: Game) -> None:
    assert kitchen.start.observation == (
        "-= Welcome to TextWorld, ALFRED! =-\n\n"
        "You are in the middle of a room. "
        "Looking quickly around you, you see a fridge 1, a table 2, and a table 1."
        "\n\nYour task is to: put a cool mug on the table."
    )


def test_away_from_everything_one_can_go_and_look_about(kitchen: Game) -> None:
    assert kitchen.start.admissible == (
        "go to fridge 1",
        "go to table 1",
        "go to table 2",
        "help",
        "inventory",
        "look",
    )


def test_the_kitchen_is_won_as_its_rules_say(kitchen: Game) -> None:
    states = play(
        kitchen,
        *("go to fridge 1", "open fridge 1", "take mug 1 from fridge 1", "cool mug 1 with fridge 1"),
        *("go to table 2", "move mug 1 to table 2", "take mug 1 from table 2"),
    )
    assert [state.observation for state in states[1:]] == [
        "You arrive at fridge 1. The fridge 1 is closed.",
        "You open the fridge 1. The fridge 1 is open. In it, you see a mug 1.",
        "You pick up the mug 1 from the fridge 1.",
        "You cool the mug 1 using the fridge 1.",
        "You arrive at table 2. On the table 2, you see a knife 1, and a mug 2.",
        "You move the mug 1 to the table 2.",
        "You pick up the mug 1 from the table 2.",
    ]
    assert [state.won for state in states] == [False] * 6 + [True, False]
    assert [state.moves for state in states] == list(range(8))


def test_receptacles_at_one_view_point_are_here_together(kitchen: Game) -> None:
    at_tables = play(kitchen, "go to table 2")[-1]
    assert [command for command in at_tables.admissible if command.startswith("go to")] == ["go to fridge 1"]
    assert {"take mug 2 from table 2", "take apple 1 from table 1"} <= set(at_tables.admissible)
    assert kitchen.advance(at_tables, "look").observation == "You are facing the table 2, and table 1. " + (
        "Next to it, you see nothing."
    )


def test_what_was_moved_between_two_tables_lies_next_to_them(kitchen: Game) -> None:
    commands = ("go to table 2", "take mug 2 from table 2", "move mug 2 to table 1", "look")
    assert play(kitchen, *commands)[-1].observation.endswith("Next to it, you see a mug 2.")


def test_an_object_can_be_examined_only_while_held(kitchen: Game) -> None:
    before, held = play(kitchen, "go to table 2", "take knife 1 from table 2")[1:]
    assert "examine knife 1" not in before.admissible
    assert kitchen.advance(held, "examine knife 1").observation == "There's nothing special about knife 1."


def test_slicing_needs_a_knife_in_the_hand_and_the_food_here(kitchen: Game) -> None:
    states = play(
        kitchen, "go to table 2", "take knife 1 from table 2", "slice apple 1 with knife 1", "go to fridge 1"
    )
    assert "slice apple 1 with knife 1" not in states[1].admissible
    assert states[3].observation == "You sliced the apple 1 with the knife 1."
    assert "slice apple 1 with knife 1" not in states[4].admissible


@pytest.mark.parametrize(
    "command", ["", "LOOK", "look around", "go to microwave 1", "put mug 1 in fridge 1", "{r}"]
)
def test_anything_else_changes_nothing(kitchen: Game, command: str) -> None:
    after = kitchen.advance(kitchen.start, command)
    assert after == kitchen.start._replace(observation=NOTHING)


def test_blanks_around_a_command_do_not_matter(kitchen: Game) -> None:
    assert kitchen.advance(kitchen.start, "  go to fridge 1\n") == kitchen.advance(
        kitchen.start, "go to fridge 1"
    )


def test_a_snapshot_stays_as_it_was_while_others_go_on(kitchen: Game) -> None:
    fork = play(kitchen, "go to fridge 1", "open fridge 1")[-1]
    kept = pickle.dumps(fork)
    branches = [kitchen.advance(fork, command).observation for command in fork.admissible]
    for command in fork.admissible:
        kitchen.advance(kitchen.advance(fork, command), "close fridge 1")
    assert pickle.dumps(fork) == kept
    assert [kitchen.advance(fork, command).observation for command in fork.admissible] == branches


def test_a_pickled_snapshot_goes_on_in_an_equal_game(kitchen: Game, kitchen_problem: str) -> None:
    data = load_package_data()
    elsewhere = Game(data.domain, kitchen_problem, data.grammar)
    state = pickle.loads(pickle.dumps(play(kitchen, "go to fridge 1", "open fridge 1")[-1]))
    assert elsewhere.advance(state, "take mug 1 from fridge 1").observation.startswith(
        "You pick up the mug 1"
    )


def test_equal_states_have_equal_keys_however_reached(kitchen: Game) -> None:
    there_and_back = play(kitchen, "go to fridge 1", "go to table 1", "look", "go to fridge 1")
    assert there_and_back[1].key == there_and_back[4].key
    opened = play(kitchen, "go to fridge 1", "open fridge 1", "close fridge 1")
    assert opened[1].key == opened[3].key != opened[2].key
    assert len({state.key for state in play(kitchen, "go to table 1", "take mug 2 from table 2")}) == 3


def test_numbers_count_down_in_the_order_of_ids_within_a_class() -> None:
    ids = ["Mug_bar_2", "Mug_bar_1", "Sink_bar_1_bar_SinkBasin", "agent1"]
    assert display_names(ids) == ["mug 1", "mug 2", "sinkbasin 1", "agent1 "]


def test_threads_on_one_game_see_what_a_single_one_sees() -> None:
    made = generate("train", 3, Options())
    data = load_package_data()

    def walk(game: Game, seed: int) -> list[str]:
        rng, state, seen = Random(seed), game.start, []
        for _ in range(60):
            state = game.advance(state, rng.choice(state.admissible))
            seen.append(state.observation)
        return seen

    alone = [walk(Game(data.domain, made.problem, made.grammar), seed) for seed in range(8)]
    shared = Game(data.domain, made.problem, made.grammar)
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda seed: walk(shared, seed), range(8)))
        loaded = list(pool.map(lambda _: Game(data.domain, made.problem, made.grammar).start, range(8)))
    assert together == alone
    assert all(state.observation == shared.start.observation for state in loaded)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("(:goal", "(:aim", "section ':aim' is not supported"),
        ("(define (problem", "(defined (problem", "must start with '(define'"),
        (")))))\n", "", "ends inside"),
        (
            "(openable fridge_bar_1)",
            "(openable oven_bar_1)",
            "'oven_bar_1' in 'openable' is not a declared object",
        ),
        ("(openable fridge_bar_1)", "(opens fridge_bar_1)", "predicate 'opens' is not declared"),
        ("(openable fridge_bar_1)", "(openable fridge_bar_1 here)", "'openable' takes 1 arguments, found 2"),
        ("- receptacle", "- cupboard", "undeclared type 'cupboard'"),
        ("objectType ?o MugType", "objectType ?x MugType", "variable ?x is not declared"),
        ("middle here", "middle middle", "declares object 'middle' twice"),
        ("fridge_bar_1 table", "fridge_bar_é table", "a non-ASCII character"),
    ],
)
def test_a_corrupt_problem_is_refused_by_name(kitchen_problem: str, old: str, new: str, message: str) -> None:
    data = load_package_data()
    assert old in kitchen_problem
    with pytest.raises(PddlError) as caught:
        Game(data.domain, kitchen_problem.replace(old, new), data.grammar)
    assert message in str(caught.value)


def test_a_fact_about_an_object_of_another_type_than_declared_offers_nothing(kitchen_problem: str) -> None:
    odd = "(:init (receptacleAtLocation apple_bar_1 here) (opened apple_bar_1) (openable mug_bar_1)"
    data = load_package_data()
    game = Game(data.domain, kitchen_problem.replace("(:init", odd), data.grammar)
    at_fridge = game.advance(game.start, "go to fridge 1")
    assert not [command for command in (*game.start.admissible, *at_fridge.admissible) if "apple" in command]


def test_derived_predicates_are_refused() -> None:
    domain = load_package_data().domain.rstrip()[:-1] + "(:derived (full ?r - receptacle) (openable ?r)))"
    with pytest.raises(GameFileError, match="':derived' is not supported"):
        Game(domain, "", "")


def test_quantifiers_conditions_and_equality_mean_what_pddl_says(kitchen_problem: str) -> None:
    everything_opened = "(:goal (forall (?r - receptacle) (or (not (openable ?r)) (opened ?r)))))"
    problem = kitchen_problem[: kitchen_problem.index("(:goal")] + everything_opened
    data = load_package_data()
    game = Game(data.domain, problem, data.grammar)
    assert [state.won for state in play(game, "go to fridge 1", "open fridge 1")] == [False, False, True]
    two_mugs_together = """(:goal (exists (?a - object ?b - object ?r - receptacle) (and (not (= ?a ?b))
        (objectType ?a MugType) (objectType ?b MugType) (inReceptacle ?a ?r) (inReceptacle ?b ?r)))))"""
    game = Game(data.domain, problem[: problem.index("(:goal")] + two_mugs_together, data.grammar)
    commands = (
        "go to table 2",
        "take mug 2 from table 2",
        "go to fridge 1",
        "open fridge 1",
        "move mug 2 to fridge 1",
    )
    assert [state.won for state in play(game, *commands)] == [False] * 5 + [True]


def test_a_conditional_effect_fires_only_under_its_condition() -> None:
    domain = """(define (domain lamp) (:types lamp)
      (:predicates (on ?l - lamp) (used ?l - lamp) (dim ?l - lamp))
      (:action press :parameters (?l - lamp) :precondition (and)
       :effect (and (when (on ?l) (not (on ?l))) (when (not (on ?l)) (on ?l)) (used ?l)
                    (forall (?other - lamp) (dim ?other)))))"""
    problem = """(define (problem one) (:domain lamp) (:objects lamp_bar_1 lamp_bar_2 - lamp)
      (:init (on lamp_bar_1) (dim lamp_bar_2))
      (:goal (and (on lamp_bar_2) (not (on lamp_bar_1)) (dim lamp_bar_1) (dim lamp_bar_2))))"""
    grammar = '''grammar :: """{"intro": [{"rhs": "lamps"}]}""";
      action press { template :: "press {l}"; feedback :: "done"; }'''
    game = Game(domain, problem, grammar)
    assert game.start.admissible == ("press lamp 1", "press lamp 2")
    assert [state.won for state in play(game, "press lamp 1", "press lamp 2")] == [False, False, True]
    assert [state.won for state in play(game, "press lamp 1", "press lamp 2", "press lamp 2")][-1] is False


@pytest.mark.reference
def test_recorded_traces_of_textworld_are_met_exactly(
    reference_folder: Path, record_property: Callable[[str, object], None]
) -> None:
    recorded = json.loads(gzip.decompress((reference_folder / "alfworld" / "golden.json.gz").read_bytes()))
    data = load_package_data()
    assert hashlib.sha256(data.domain.encode()).hexdigest() == recorded["domain_sha256"]
    assert hashlib.sha256(data.grammar.encode()).hexdigest() == recorded["grammar_sha256"]
    compared = 0
    for trace in recorded["games"]:
        game = Game(data.domain, trace["pddl_problem"], data.grammar.replace("UNKNOWN GOAL", trace["desc"]))
        state = game.start
        for command, observation, digest in trace["steps"]:
            state = game.start if command is None else game.advance(state, command)
            shown = json.dumps([state.observation, list(state.admissible), state.won])
            assert state.observation == observation
            assert hashlib.sha256(shown.encode()).hexdigest()[:16] == digest, (trace["desc"], command)
            compared += 1
        assert state.won
    record_property("steps_compared", compared)
    print(f"{compared} recorded steps of {len(recorded['games'])} games compared")
    assert compared > 0
