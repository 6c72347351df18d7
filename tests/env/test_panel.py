"""Panels: fixed tasks, pinned by their content."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import gymnasium
import pytest
from text_worlds import Corridor

from agentrl.env import Panel, load_panel, make_panel, register, verify
from agentrl.errors import ConfigError, PanelError

ID = "test/PanelDoors-v0"


@pytest.fixture(autouse=True)
def doors() -> Iterator[None]:
    register(ID, Corridor)
    yield
    del gymnasium.registry[ID]


def test_a_panel_is_the_first_tasks_of_a_split_with_their_content() -> None:
    panel = make_panel(ID, "test", 3, {"doors": 4})
    assert panel.tasks == ("test-0", "test-1", "test-2")
    # Goals are 1 + (7 i + 4) % 3 for i = 0, 1, 2: doors 2, 3, 1 of 4.
    contents = ("4 doors, the 2th", "4 doors, the 3th", "4 doors, the 1th")
    assert panel.hashes == tuple(hashlib.sha256(text.encode()).hexdigest() for text in contents)
    assert (panel.env, panel.split, panel.env_kwargs) == (ID, "test", {"doors": 4})


def test_the_hash_is_that_of_a_canonical_text() -> None:
    panel = Panel("e/E-v0", "s", ("b", "a"), ("2", "1"), {"y": [1], "x": "ä"})
    text = '["e/E-v0",{"x":"ä","y":[1]},"s",[["a","1"],["b","2"]]]'
    assert panel.hash == hashlib.sha256(text.encode()).hexdigest()
    assert panel.hash == Panel("e/E-v0", "s", ("a", "b"), ("1", "2"), {"x": "ä", "y": [1]}).hash


def test_everything_that_makes_a_score_another_one_changes_the_hash() -> None:
    panel = make_panel(ID, "test", 2)
    others = [
        replace(panel, env="test/Other-v0"),
        replace(panel, split="train"),
        replace(panel, env_kwargs={"doors": 4}),
        replace(panel, tasks=("test-0", "test-9")),
        replace(panel, hashes=panel.hashes[::-1]),
        panel.first(1),
    ]
    assert len({panel.hash, *(other.hash for other in others)}) == 7


def test_the_first_tasks_of_a_panel_are_the_panel_of_those_tasks() -> None:
    panel = make_panel(ID, "test", 5)
    assert panel.first(2) == make_panel(ID, "test", 2)
    assert panel.first(5) == panel
    for count in (0, 6, -1):
        with pytest.raises(PanelError, match=f"first {count} tasks of a panel of 5"):
            panel.first(count)


@pytest.mark.parametrize(
    ("split", "tasks", "error", "message"),
    [
        ("test", 7, PanelError, "split 'test' of test/PanelDoors-v0 has 6 tasks, wanted 7 for a panel"),
        ("test", 0, PanelError, "a panel of 0 tasks"),
        ("tset", 2, ConfigError, "'tset' is unknown; did you mean 'test'"),
    ],
)
def test_a_panel_that_cannot_be_is_refused(
    split: str, tasks: int, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make_panel(ID, split, tasks)


def test_unknown_environments_and_arguments_are_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'test/PanelDoors-v0'"):
        make_panel("test/PanelDoor-v0", "test", 1)
    with pytest.raises(ConfigError, match="did you mean 'doors'"):
        make_panel(ID, "test", 1, {"dors": 3})


@pytest.mark.parametrize(
    ("tasks", "hashes", "message"),
    [
        ((), (), "at least one"),
        (("a",), (), "1 tasks|wanted 1"),
        (("a", "a"), ("1", "1"), "names a task twice"),
    ],
)
def test_a_panel_of_nothing_or_of_twice_the_same_is_refused(
    tasks: tuple[str, ...], hashes: tuple[str, ...], message: str
) -> None:
    with pytest.raises(PanelError, match=message):
        Panel("e", "s", tasks, hashes)


def test_arguments_that_json_cannot_say_are_refused() -> None:
    with pytest.raises(PanelError, match="must be JSON values"):
        Panel("e", "s", ("a",), ("1",), {"x": {1, 2}})


# Files.


def test_a_panel_survives_its_file_which_a_person_can_read(tmp_path: Path) -> None:
    panel = make_panel(ID, "test", 3, {"doors": 4})
    panel.save(tmp_path / "deep" / "panel.json")
    assert load_panel(tmp_path / "deep" / "panel.json") == panel
    lines = (tmp_path / "deep" / "panel.json").read_text().splitlines()
    assert f'  "test-1": "{panel.hashes[1]}",' in lines
    assert f' "hash": "{panel.hash}",' in lines


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"test-1"', '"test-4"'),
        ('"split": "test"', '"split": "train"'),
        ('"doors": 4', '"doors": 5'),
        ("PanelDoors-v0", "PanelDoors-v1"),
    ],
)
def test_an_edited_file_is_refused(tmp_path: Path, old: str, new: str) -> None:
    path = tmp_path / "panel.json"
    make_panel(ID, "test", 3, {"doors": 4}).save(path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(PanelError, match=r"panel .*panel.json states the hash .* it was edited"):
        load_panel(path)


def test_a_dropped_and_a_repeated_task_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "panel.json"
    make_panel(ID, "test", 3).save(path)
    lines = path.read_text().splitlines()
    place = next(i for i, line in enumerate(lines) if "test-0" in line)
    path.write_text("\n".join(lines[:place] + lines[place + 1 :]))
    with pytest.raises(PanelError, match="edited"):
        load_panel(path)
    path.write_text(
        "\n".join([*lines[: place + 1], lines[place].replace("test-0", "test-1"), *lines[place + 1 :]])
    )
    with pytest.raises(PanelError, match="names 'test-1' twice"):
        load_panel(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("[]", "is not a file of the format 'agentrl panel 1'"),
        ('{"format": "agentrl panel 2"}', "is not a file of the format 'agentrl panel 1'"),
        ('{"format": "agentrl panel 1"}', "has no 'env'"),
        (b"\xff\xfe", "is not JSON"),
    ],
)
def test_what_is_no_panel_is_refused_with_its_place(
    tmp_path: Path, content: str | bytes, message: str
) -> None:
    path = tmp_path / "panel.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(PanelError, match=f"panel {path} {message}"):
        load_panel(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("env", 3),
        ("split", None),
        ("tasks", ["test-0"]),
        ("env_kwargs", []),
        ("hash", 1),
        ("tasks", {"a": 1}),
    ],
)
def test_a_file_with_a_wrong_field_is_refused(tmp_path: Path, key: str, value: object) -> None:
    path = tmp_path / "panel.json"
    make_panel(ID, "test", 3).save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(PanelError, match=r"has no '|has a task whose hash"):
        load_panel(path)


def test_a_missing_file_is_refused_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(PanelError, match=r"none.json cannot be read: .*No such file"):
        load_panel(tmp_path / "none.json")


def test_a_panel_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "panel.json"
    panel = make_panel(ID, "test", 3)
    panel.save(path)

    def full(self: Path, text: str, **_: object) -> None:
        self.write_bytes(text[:20].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(PanelError, match=r"panel.json cannot be written: .*No space left"):
        panel.first(1).save(path)
    assert load_panel(path) == panel
    assert [file.name for file in tmp_path.iterdir()] == ["panel.json"]


# Content.


def test_a_panel_of_the_same_content_is_verified() -> None:
    verify(make_panel(ID, "test", 3, {"doors": 4}))
    verify(make_panel(ID, "test", 3, {"doors": 4}), Corridor(doors=4))


def test_a_panel_is_refused_when_the_environment_makes_other_tasks_now() -> None:
    panel = make_panel(ID, "test", 3, {"doors": 4})

    class Moved(Corridor):
        def goal(self, task: str) -> int:
            return 1 if task == "test-1" else super().goal(task)

    register(ID, Moved)
    with pytest.raises(PanelError, match=r"1 of the panel's 3 tasks have other content .* first 'test-1'"):
        verify(panel)


def test_a_panel_is_refused_when_a_task_is_gone() -> None:
    panel = make_panel(ID, "test", 3)

    class Fewer(Corridor):
        def goal(self, task: str) -> int:
            return super().goal(task if task != "test-2" else "test-99")

    with pytest.raises(PanelError, match=r"panel task 'test-2' no longer exists in test/PanelDoors-v0"):
        verify(panel, Fewer())


def test_making_and_verifying_leave_no_environment_open() -> None:
    made: list[Corridor] = []

    class Watched(Corridor):
        closed = False

        def close(self) -> None:
            self.closed = True

        def __init__(self, **kwargs: object) -> None:
            super().__init__(**kwargs)  # type: ignore[arg-type]
            made.append(self)

    register(ID, Watched)
    verify(make_panel(ID, "test", 3))
    with pytest.raises(PanelError):
        make_panel(ID, "test", 100)
    assert len(made) == 3
    assert all(env.closed for env in made)
