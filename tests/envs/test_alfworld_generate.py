"""Properties of every generated game."""

import hashlib
import os
import re
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from agentrl.errors import ConfigError, MissingDependencyError
from agentrl_envs.alfworld import package_data
from agentrl_envs.alfworld.engine import Game
from agentrl_envs.alfworld.games import GeneratedGames, TaskIds
from agentrl_envs.alfworld.generate import (
    SPLITS,
    TASK_TYPES,
    UNSEEN_SCENES,
    GeneratedGame,
    Options,
    generate,
    scenes,
)
from agentrl_envs.alfworld.package_data import load_package_data

SMALL = Options(max_receptacles=6, object_types=8)
ROOMS = {"whole": Options(), "small": SMALL, "smallest": Options(max_receptacles=4, object_types=2)}


def load(made: GeneratedGame) -> Game:
    other = made.other.pddl if made.other else ""
    return Game(load_package_data().domain, made.problem, made.grammar, made.goal.walkthrough, other)


def test_the_twelve_unseen_scenes_occur_in_no_other_split() -> None:
    assert set(scenes("valid_unseen")) == UNSEEN_SCENES
    assert len(scenes("valid_unseen")) == 12
    assert len(scenes("train")) == 108
    assert set(scenes("train")) == set(scenes("valid_seen"))
    played = {split: {generate(split, index, SMALL).scene for index in range(300)} for split in SPLITS}
    assert not played["train"] & played["valid_unseen"]
    assert not played["valid_seen"] & played["valid_unseen"]
    assert played["valid_unseen"] == UNSEEN_SCENES


@pytest.mark.parametrize("rooms", ROOMS)
def test_every_oracle_plan_wins_and_no_goal_holds_at_the_start(rooms: str) -> None:
    types = set()
    for index in range(48):
        for split in ("train", "valid_unseen"):
            made = generate(split, index, ROOMS[rooms])
            for game in [made, made.swapped()] if made.other else [made]:
                loaded = load(game)
                state = loaded.start
                assert not state.won
                assert not loaded.other_reached(state)
                for command in game.goal.walkthrough:
                    assert command in state.admissible
                    assert not state.won
                    state = loaded.advance(state, command)
                assert state.won, (split, index)
                types.add(made.task_type)
    assert types == set(TASK_TYPES)


def test_task_types_take_turns() -> None:
    assert [generate("train", index, SMALL).task_type for index in range(12)] == list(TASK_TYPES) * 2
    two = Options(task_types=("look_at_obj_in_light", "pick_two_obj_and_place"))
    assert [generate("train", index, two).task_type for index in range(4)] == list(two.task_types) * 2


def test_a_small_room_has_one_receptacle_per_type_and_at_most_so_many() -> None:
    for index in range(60):
        names = load(generate("train", index, SMALL)).start.observation.split("you see ")[1].split(".")[0]
        classes = re.findall(r"a (\w+) (\d+)", names)
        assert len(classes) <= 6
        assert {number for _, number in classes} == {"1"}


def test_object_types_limits_how_many_kinds_lie_about() -> None:
    for index in range(30):
        made = generate("train", index, SMALL)
        kinds = {line.split("_bar_")[0] for line in made.room.split("\n") if line.startswith("  (pickupable")}
        assert 2 <= len(kinds) <= 8


def test_the_other_goal_names_another_object_in_the_same_room_and_place() -> None:
    swappable = 0
    for index in range(120):
        made = generate("valid_unseen", index, SMALL)
        if made.other is None:
            continue
        swappable += 1
        other = made.swapped()
        assert other.room == made.room
        assert other.receptacle == made.receptacle
        assert other.goal.object != made.goal.object
        old, new = made.goal.object.lower(), other.goal.object.lower()
        assert other.goal.sentence == made.goal.sentence.replace(f"{old} ", f"{new} ")
        assert other.swapped() == made
    assert swappable >= 110


def test_reaching_one_goal_is_seen_from_the_other() -> None:
    made = generate("train", 0, SMALL)
    told_the_other = load(made.swapped())
    state = told_the_other.start
    for command in made.goal.walkthrough:
        state = told_the_other.advance(state, command)
    assert told_the_other.other_reached(state)
    assert not state.won


def test_sentences_hold_no_character_that_the_grammar_reads() -> None:
    for index in range(60):
        assert not set(generate("train", index, Options()).goal.sentence) & set(';|"<>[]{}#')


def digest() -> str:
    games = [
        generate(split, index, options)
        for split in SPLITS
        for index in range(8)
        for options in ROOMS.values()
    ]
    shown = "".join(game.hash() + repr(game.goal) + repr(game.other) for game in games)
    return hashlib.sha256(shown.encode()).hexdigest()


@pytest.mark.parametrize("hash_seed", ["0", "4242"])
def test_games_do_not_depend_on_the_hash_seed(hash_seed: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", "import test_alfworld_generate as t; print(t.digest())"],
        env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == digest()


def test_games_are_those_of_earlier_releases() -> None:
    # Panels and stored episodes refer to games by index: after a change here they would refer to other games.
    assert generate("train", 0, SMALL).hash().startswith("6440a1b3e01399c3")
    assert generate("valid_unseen", 5, Options()).hash().startswith("e99e3e330f91bcba")


def test_games_and_options_have_hashes_of_their_own() -> None:
    hashes = {
        generate(split, index, o).hash() for split in SPLITS for index in range(6) for o in ROOMS.values()
    }
    assert len(hashes) == 3 * 6 * 3


def test_task_ids_are_made_when_asked_for() -> None:
    ids = GeneratedGames(SMALL).tasks("train")
    assert len(ids) == 1_000_000
    assert ids[0] == "train/0"
    assert ids[-1] == "train/999999"
    assert list(ids[5:8]) == ["train/5", "train/6", "train/7"]
    assert isinstance(ids[5:8], TaskIds)
    assert "train/999999" in ids
    assert [
        task for task in ("train/1000000", "train/07", "valid_seen/1", "train/x", "7") if task in ids
    ] == []
    with pytest.raises(IndexError):
        ids[1_000_000]


@pytest.mark.parametrize(
    "task", ["train/1000000", "train/-1", "train/07", "train", "valid/1", "", "train/1#else"]
)
def test_unknown_tasks_are_refused(task: str) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        GeneratedGames(SMALL).hash(task)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task_types": ("pick",)}, r"task_types: \['pick'\]"),
        ({"task_types": ()}, r"task_types: \[\]"),
        ({"max_receptacles": 3}, "max_receptacles: 3, wanted a whole number of at least 4"),
        ({"object_types": "8"}, "object_types: '8'"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Options(**options)


def test_without_the_package_the_one_command_that_helps_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package_data.importlib.util, "find_spec", lambda name: None)
    load_package_data.cache_clear()
    try:
        with pytest.raises(MissingDependencyError, match=r"run: pip install --no-deps alfworld==0\.4\.2$"):
            GeneratedGames(Options())
    finally:
        load_package_data.cache_clear()


def test_files_of_another_version_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "alfred.pddl").write_text("(define (domain other))")
    spec = ModuleSpec("alfworld", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(package_data.importlib.util, "find_spec", lambda name: spec)
    load_package_data.cache_clear()
    try:
        with pytest.raises(MissingDependencyError, match=r"alfred\.pddl is not the file of alfworld 0\.4\.2"):
            load_package_data()
    finally:
        load_package_data.cache_clear()


def test_the_package_data_are_read_without_importing_the_package() -> None:
    code = (
        "import sys; from agentrl_envs.alfworld.package_data import load_package_data; load_package_data(); "
        "print([m for m in sys.modules if m.split('.')[0] in ('alfworld', 'textworld', 'torch', 'numpy')])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
