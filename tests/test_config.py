import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, Protocol

import pytest

from agentrl.config import build, merge, parse_overrides, read_yaml, suggestion, to_tree, to_yaml
from agentrl.errors import ConfigError


class Place(StrEnum):
    HERE = "here"
    THERE = "there"


@dataclass(frozen=True, slots=True)
class Optimiser:
    name: Literal["adamw", "muon"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.99)


@dataclass(frozen=True, slots=True)
class Learner:
    learning_rate: float = 1e-3
    steps: int = 10
    fused: bool = False
    clip: float | None = 1.0
    optimiser: Optimiser = field(default_factory=Optimiser)
    second: Optimiser | None = None
    stages: tuple[Optimiser, ...] = ()
    place: Place = Place.HERE
    path: Path | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    either: int | str = 1

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"steps is {self.steps}, wanted at least 1")


@dataclass(frozen=True)
class Whole:
    learner: Learner = field(default_factory=Learner)
    seed: int = 0
    name: str = "x"

    def __post_init__(self) -> None:
        if self.seed == 13:
            raise ConfigError("seed is 13, which brings bad luck")


@dataclass(frozen=True)
class Needy:
    title: str


def mistakes(cls: type, tree: Mapping[str, Any], where: str = "") -> list[str]:
    with pytest.raises(ConfigError) as caught:
        build(cls, tree, where)
    return str(caught.value).splitlines()


def yaml_of(tmp_path: Path, text: str) -> Any:
    path = tmp_path / "a.yaml"
    path.write_text(text, encoding="utf-8")
    return read_yaml(path)


# Reading.


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        (".5", 0.5),
        ("-3", -3),
        ("010", 10),
        (".inf", math.inf),
        ("true", True),
        ("null", None),
        ("~", None),
        ("yes", "yes"),
        ("on", "on"),
        ("2024-01-01", "2024-01-01"),
        ("12:30", "12:30"),
        ("1_000", "1_000"),
        ("0x1f", "0x1f"),
        ("'8'", "8"),
        ("[1, a]", [1, "a"]),
        ("{a: {b: 1}}", {"a": {"b": 1}}),
    ],
)
def test_scalars_are_those_of_yaml_1_2(tmp_path: Path, text: str, value: Any) -> None:
    found = yaml_of(tmp_path, f"key: {text}")["key"]
    assert found == value
    assert type(found) is type(value)


def test_an_empty_file_is_an_empty_block(tmp_path: Path) -> None:
    assert yaml_of(tmp_path, "# nothing\n") == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "a.yaml, line 3: duplicate key 'a'"),
        ("a:\n  b: 1\n  b: 2\n", "a.yaml, line 3: duplicate key 'b'"),
        ("a: 1\nb: [1, 2\n", "a.yaml, line 3: "),
        ("a:\n\t- 1\n", "a.yaml, line 2: "),
        ("1: a\n", "a.yaml, line 1: a key must be text"),
        ("- a\n", "a.yaml: the top level is ['a'], wanted a block"),
        ("a: !!python/object/apply:os.getcwd []\n", "a.yaml, line 1: "),
        ("a: \0", "a.yaml: not YAML"),
    ],
)
def test_a_mistake_in_a_file_is_reported_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        yaml_of(tmp_path, text)
    assert message in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.yaml: cannot be read \(No such file"):
        read_yaml(tmp_path / "gone.yaml")
    with pytest.raises(ConfigError, match=r"cannot be read \(Is a directory"):
        read_yaml(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9\n")
    with pytest.raises(ConfigError, match=r"latin\.yaml: is not UTF-8 text \(byte 3\)"):
        read_yaml(tmp_path / "latin.yaml")


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    texts = [
        "1e-5",
        "yes",
        "null",
        "010",
        "",
        "a: b # c",
        "~",
        ".inf",
        "é\n\tx ",
        "true",
        "-1",
        "- a",
        "<<",
        "&a",
        "2.5",
    ]
    tree = {"texts": texts, "numbers": [1e-5, 1e16, -1, 0.1 + 0.2, math.inf], "none": None, "empty": [{}, []]}
    assert yaml_of(tmp_path, to_yaml(tree)) == tree


# Overrides.


def test_an_override_is_read_as_yaml() -> None:
    assert parse_overrides(["a.b=1e-5", "c=a=b", "d=[1, x]", "e='8'", "f=null"]) == [
        (("a", "b"), 1e-5),
        (("c",), "a=b"),
        (("d",), [1, "x"]),
        (("e",), "8"),
        (("f",), None),
    ]


def test_overrides_make_missing_levels_and_leave_the_original_alone() -> None:
    tree = {"learner": {"steps": 1}, "policy": None}
    assert merge(
        tree, ["learner.optimiser.name=muon", "policy.path=x", "learner.steps=2", "learner.steps=3"]
    ) == {
        "learner": {"steps": 3, "optimiser": {"name": "muon"}},
        "policy": {"path": "x"},
    }
    assert tree == {"learner": {"steps": 1}, "policy": None}


def test_every_malformed_override_is_reported() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_overrides(["seed", "seed=", "=1", "a..b=1", "a=[1", "fine=1", "a={b: 1, b: 2}"])
    lines = str(caught.value).splitlines()
    assert len(lines) == 6
    assert lines[0].startswith("'seed' is not an override (wanted key=value")
    assert lines[1] == "'seed=' has no value (seed=null sets none, seed='\"\"' empty text)"
    assert lines[5] == "override 'a={b: 1, b: 2}', line 1: duplicate key 'b'"


def test_an_override_through_a_plain_value_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^seed\.x\.y: seed is 3, not a block of keys$"):
        merge({"seed": 3}, ["seed.x.y=1"])


# Building.


def test_a_tree_becomes_nested_dataclasses() -> None:
    whole = build(
        Whole,
        {
            "learner": {
                "learning_rate": 1,
                "clip": None,
                "optimiser": {"betas": [0.5, 1]},
                "second": {"name": "muon"},
                "stages": [{"name": "muon"}, {}],
                "place": "there",
                "path": "/a",
                "kwargs": {"deep": [1, {"x": None}], "far": math.inf},
                "either": "word",
            }
        },
    )
    assert whole == Whole(
        Learner(
            learning_rate=1.0,
            clip=None,
            optimiser=Optimiser(betas=(0.5, 1.0)),
            second=Optimiser("muon"),
            stages=(Optimiser("muon"), Optimiser()),
            place=Place.THERE,
            path=Path("/a"),
            kwargs={"deep": [1, {"x": None}], "far": math.inf},
            either="word",
        )
    )
    assert isinstance(whole.learner.learning_rate, float)


def test_a_tree_of_a_dataclass_builds_it_again() -> None:
    whole = Whole(
        Learner(path=Path("/a"), place=Place.THERE, stages=(Optimiser("muon"),), kwargs={"a": (1, 2)}), seed=4
    )
    tree = to_tree(whole)
    assert tree["learner"]["stages"] == [{"name": "muon", "betas": [0.9, 0.99]}]
    assert to_tree(build(Whole, tree)) == tree


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("steps", True, "got true, wanted an integer"),
        ("steps", "8", "got '8', wanted an integer"),
        ("steps", 1.5, "got 1.5, wanted an integer"),
        ("steps", None, "got null, wanted an integer"),
        ("learning_rate", True, "got true, wanted a number"),
        ("learning_rate", "1e-5", "got '1e-5', wanted a number"),
        ("clip", "1", "got '1', wanted a number"),
        ("fused", 1, "got 1, wanted true or false"),
        ("fused", "yes", "got 'yes', wanted true or false"),
        ("path", 3, "got 3, wanted "),
        ("place", "nowhere", "got 'nowhere', wanted 'here' or 'there'"),
        ("optimiser", 3, "got 3, wanted a block of keys"),
        ("either", [1], "got [1], wanted an integer or text"),
    ],
)
def test_types_are_strict(key: str, value: Any, wanted: str) -> None:
    (line,) = mistakes(Whole, {"learner": {key: value}})
    assert line.startswith(f"learner.{key}: wrong value ({wanted}")


def test_every_mistake_is_reported_at_once_with_its_path() -> None:
    tree = {
        "learner": {
            "learning_rat": 1,
            "steps": True,
            "optimiser": {"name": "adam", "beta": 1},
            "stages": [{}, {"nmae": "muon"}],
        },
        "seed": "0",
        "zzz": [1],
    }
    assert sorted(mistakes(Whole, tree)) == [
        "learner.learning_rat: unknown key (got 1; did you mean learning_rate?)",
        "learner.optimiser.beta: unknown key (got 1; did you mean betas?)",
        "learner.optimiser.name: wrong value (got 'adam', wanted 'adamw' or 'muon')",
        "learner.stages.1.nmae: unknown key (got 'muon'; did you mean name?)",
        "learner.steps: wrong value (got true, wanted an integer)",
        "seed: wrong value (got '0', wanted an integer)",
        "zzz: unknown key (got [1]; known: learner, name, seed)",
    ]


def test_paths_begin_with_the_place_of_the_block() -> None:
    assert mistakes(Optimiser, {"nam": 1}, "a.b") == ["a.b.nam: unknown key (got 1; did you mean name?)"]


def test_a_missing_value_is_reported() -> None:
    assert mistakes(Needy, {}) == ["title: is missing"]


def test_a_check_of_the_dataclass_itself_counts_as_a_mistake_of_its_block() -> None:
    assert sorted(mistakes(Whole, {"learner": {"steps": 0}, "seed": "x"})) == [
        "learner: steps is 0, wanted at least 1",
        "seed: wrong value (got 'x', wanted an integer)",
    ]
    assert mistakes(Whole, {"seed": 13}) == ["seed is 13, which brings bad luck"]
    assert mistakes(Learner, {"steps": 0}, "steps") == ["steps is 0, wanted at least 1"]


def test_a_value_that_is_built_already_is_taken_as_it_is() -> None:
    class Recipe(Protocol):
        def build(self) -> int: ...

    @dataclass(frozen=True)
    class Mine:
        rate: float = 1.0

        def build(self) -> int:
            return 3

    @dataclass(frozen=True)
    class Run:
        recipe: Any = None
        other: Recipe = field(default_factory=Mine)
        seed: int = 0

    made = Mine(2.0)
    run = build(Run, {"recipe": made, "seed": 1})
    assert run.recipe is made
    assert run.seed == 1
    assert mistakes(Run, {"recipe": made, "sed": 1}) == ["sed: unknown key (got 1; did you mean seed?)"]


def test_a_suggestion_is_the_nearest_name_or_all_of_them() -> None:
    assert suggestion("grop", ["grpo", "ppo"]) == "did you mean grpo?"
    assert suggestion("zebra", ["grpo", "ppo"]) == "known: grpo, ppo"


@pytest.mark.parametrize(
    ("text", "line", "fault"),
    [
        ("seed: 1\na: &a [1, *a]\n", 2, "is inside the block that it refers to"),
        ("a: &a\n  b: *a\n", 2, "is inside the block that it refers to"),
        ("a: &a " + "[" * 5000 + "]" * 5000, 1, "more than 100 nested blocks"),
        (
            "".join(f"{'  ' * depth}a:\n" for depth in range(300)),
            101,
            "more than 100 nested blocks",
        ),
        (f"seed: 1\nb: {'9' * 4301}\n", 2, "an integer of 4301 digits"),
        (f"b: -{'9' * 4200}\n", 1, "an integer of 4200 digits"),
        ("a: !!timestamp 2024-99-99\n", 1, "could not determine a constructor"),
        ("a: !!python/object:os.system x\n", 1, "could not determine a constructor"),
    ],
)
def test_yaml_beyond_any_configuration_is_refused_with_its_line(
    text: str, line: int, fault: str, tmp_path: Path
) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_yaml(path)
    assert str(caught.value).startswith(f"{path}, line {line}: ")
    assert fault in str(caught.value)


def test_aliases_that_stand_for_a_billion_values_are_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    path = tmp_path / "laughs.yaml"
    path.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=r"laughs\.yaml, line 5: more than 100,000 values"):
        read_yaml(path)
    path.write_text("\n".join(lines[:3]))
    assert len(read_yaml(path)["a2"]) == 10


def test_an_override_is_bounded_as_a_file_is() -> None:
    with pytest.raises(ConfigError, match="is inside the block"):
        merge({}, ["a=&a [*a]"])
    with pytest.raises(ConfigError, match="digits"):
        merge({}, [f"a={'1' * 5000}"])
