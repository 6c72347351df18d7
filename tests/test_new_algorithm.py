"""`agentrl new-algorithm` writes a method that works at once, and refuses a name that will not do."""

import importlib
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from agentrl.algorithms import recipe
from agentrl.algorithms.new_algorithm import Names, write_new_algorithm
from agentrl.cli import app
from agentrl.errors import ConfigError


def test_what_it_writes_passes_its_own_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = write_new_algorithm("tried_method", tmp_path)
    assert [path.name for path in made.files] == [
        "tried_method_algorithm.py",
        "test_tried_method_algorithm.py",
        "pyproject.toml",
    ]
    monkeypatch.syspath_prepend(tmp_path)
    recipe.recipe_names()  # loads the plug-ins before the registry is copied
    monkeypatch.setattr(recipe, "_recipes", dict(recipe._recipes))
    test = importlib.import_module("test_tried_method_algorithm")
    claims = [name for name in vars(test) if name.startswith("test_")]
    assert len(claims) == 3
    for name in claims:
        getattr(test, name)()
    for name in ("tried_method_algorithm", "test_tried_method_algorithm"):
        del sys.modules[name]


def test_the_file_is_short_and_the_pyproject_has_the_entry_point(tmp_path: Path) -> None:
    write_new_algorithm("tried_method", tmp_path)
    lines = (tmp_path / "tried_method_algorithm.py").read_text().splitlines()
    assert sum(bool(line.strip()) for line in lines) <= 35
    tree = tomllib.loads((tmp_path / "pyproject.toml").read_text())
    assert tree["project"]["entry-points"] == {
        "agentrl.algorithms": {"tried_method_algorithm": "tried_method_algorithm"}
    }


def test_a_name_gives_the_others() -> None:
    assert Names.parse("a_2b") == Names("a_2b", "A2b", "a_2b_algorithm")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("MyMethod", "'MyMethod' is not the name of a recipe; wanted a name such as my_method"),
        ("my-method", "is not the name of a recipe"),
        ("class", "is not the name of a recipe"),
        ("", "is not the name of a recipe"),
        ("steer", "recipe steer is already installed"),
    ],
)
def test_a_name_that_will_not_do_is_refused_with_the_reason(name: str, reason: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["new-algorithm", name, "--folder", str(tmp_path / "new")])
    assert result.exit_code == 2
    assert reason in result.stderr
    assert not (tmp_path / "new").exists()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "tried_method_algorithm.py").write_text("mine")
    with pytest.raises(ConfigError, match="already exists and is not overwritten"):
        write_new_algorithm("tried_method", tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_it_says_what_comes_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["new-algorithm", "tried_method"], prog_name="agentrl")
    train = "agentrl train configs/quickstart.yaml algorithm.name=tried_method"
    assert result.stdout.splitlines()[-7:] == [
        "Next:",
        "  python -m pytest test_tried_method_algorithm.py",
        "  agentrl algorithms tried_method --import tried_method_algorithm.py",
        f"  {train} --import tried_method_algorithm.py",
        "",
        "Once installed, it needs no --import:",
        "  python -m pip install -e .",
    ]
