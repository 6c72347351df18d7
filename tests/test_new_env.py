"""`agentrl new-env` writes an environment that works at once, and never spoils a file that is there."""

import subprocess
import sys
import tomllib
import venv
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner

from agentrl.cli import app
from agentrl.env import check_text_env, register
from agentrl.env.new_env import Names, write_new_env
from agentrl.errors import ConfigError

ENTRY = '[project.entry-points."agentrl.envs"]'
LINE = 'guess_number_env = "guess_number_env:plug_in"'


def new_env(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["new-env", *arguments], prog_name="agentrl")


def load(path: Path) -> ModuleType:
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_it_writes_keeps_the_contract_and_passes_its_own_test(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = write_new_env("GuessNumber", tmp_path / "new")
    assert [path.name for path in made.files] == [
        "guess_number_env.py",
        "test_guess_number_env.py",
        "pyproject.toml",
    ]
    monkeypatch.syspath_prepend(tmp_path / "new")
    report = check_text_env(load(tmp_path / "new" / "guess_number_env.py").GuessNumber)
    assert report.failed == (), str(report)
    assert (report.proven, report.thread_safe, report.declares) == (
        "episode",
        True,
        ("snapshot", "expert", "instructions"),
    )
    assert {check.name for check in report.checks if check.status == "skipped"} == set()
    test = load(tmp_path / "new" / "test_guess_number_env.py")
    test.test_it_keeps_the_contract()
    test.test_an_episode_by_hand()


def test_the_file_is_short(tmp_path: Path) -> None:
    write_new_env("GuessNumber", tmp_path)
    lines = (tmp_path / "guess_number_env.py").read_text().splitlines()
    assert sum(bool(line.strip()) for line in lines) <= 31


def test_the_pyproject_has_the_entry_point_and_depends_on_no_stranger(tmp_path: Path) -> None:
    write_new_env("my_lab/GuessNumber-v2", tmp_path)
    tree = tomllib.loads((tmp_path / "pyproject.toml").read_text())
    assert tree["project"]["entry-points"] == {
        "agentrl.envs": {"guess_number_env": "guess_number_env:plug_in"}
    }
    assert tree["project"]["name"] == "guess-number-env"
    assert tree["project"]["dependencies"] == []
    assert 'register("my_lab/GuessNumber-v2", GuessNumber)' in (tmp_path / "guess_number_env.py").read_text()


@pytest.mark.parametrize(
    ("name", "id", "class_name", "module"),
    [
        ("GuessNumber", "my/GuessNumber-v0", "GuessNumber", "guess_number_env"),
        ("GuessNumber-v3", "my/GuessNumber-v3", "GuessNumber", "guess_number_env"),
        ("my-lab/Go9-v12", "my-lab/Go9-v12", "Go9", "go9_env"),
        ("a_b/MyLLMGame", "a_b/MyLLMGame-v0", "MyLLMGame", "my_llm_game_env"),
        ("RandomEnv", "my/RandomEnv-v0", "RandomEnv", "random_env"),
    ],
)
def test_a_name_gives_the_others(name: str, id: str, class_name: str, module: str) -> None:
    assert Names.parse(name) == Names(id, class_name, module)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("guess_number", "'guess_number' is not a class name; wanted a name such as GuessNumber"),
        ("Guess Number", "'Guess Number' is not a class name"),
        ("lab/sub/Guess", "'sub/Guess' is not a class name"),
        ("Guess-v", "'Guess-v' is not a class name"),
        ("Guess\n", "is not a class name"),
        ("Größe", "'Größe' is not a class name"),
        ("", "'' is not a class name"),
        ("None", "'None' is not a class name"),
        ("MultiTurnEnv", "'MultiTurnEnv' is not a class name"),
        ("../Guess", "'..' is not a namespace; wanted letters"),
        ("/Guess", "'' is not a namespace"),
    ],
)
def test_a_name_that_will_not_do_is_refused_with_the_reason(name: str, reason: str, tmp_path: Path) -> None:
    result = new_env(name, "--folder", str(tmp_path / "new"))
    assert result.exit_code == 2
    assert reason in result.stderr
    assert not (tmp_path / "new").exists()


def test_an_id_that_is_taken_is_refused(tmp_path: Path) -> None:
    register("agentrl-tests/Taken-v0", "no.module:Env")
    with pytest.raises(ConfigError, match="agentrl-tests/Taken-v0 is already installed"):
        write_new_env("agentrl-tests/Taken", tmp_path)


@pytest.mark.parametrize("there", ["guess_number_env.py", "test_guess_number_env.py"])
def test_nothing_is_overwritten(there: str, tmp_path: Path) -> None:
    (tmp_path / there).write_text("mine")
    result = new_env("GuessNumber", "--folder", str(tmp_path))
    assert result.exit_code == 2
    assert f"{there} already exists" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == [there]
    assert (tmp_path / there).read_text() == "mine"


KEPT = '# mine\n[project]\nname = "x"  # short\nversion = "1"\n'


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (KEPT, f"{KEPT}\n{ENTRY}\n{LINE}\n"),
        (KEPT.rstrip(), f"{KEPT}\n{ENTRY}\n{LINE}\n"),
        (f'{KEPT}{ENTRY}  # ours\nold = "old:f"\n', f'{KEPT}{ENTRY}  # ours\n{LINE}\nold = "old:f"\n'),
        (f"{KEPT}\n{ENTRY}", f"{KEPT}\n{ENTRY}\n{LINE}"),
        (
            f"{KEPT}\n{ENTRY}\n\n[tool.x]\na = 1\n",
            f"{KEPT}\n{ENTRY}\n{LINE}\n\n[tool.x]\na = 1\n",
        ),
        (KEPT.replace("\n", "\r\n"), f"{KEPT}\n{ENTRY}\n{LINE}\n".replace("\n", "\r\n")),
    ],
    ids=["no table", "no newline", "a table", "an empty table", "tables after it", "Windows"],
)
def test_a_pyproject_that_is_there_gets_its_entry_and_keeps_the_rest(
    before: str, after: str, tmp_path: Path
) -> None:
    project = tmp_path / "pyproject.toml"
    project.write_bytes(before.encode())
    made = write_new_env("GuessNumber", tmp_path)
    assert project.read_bytes().decode() == after
    assert (made.to_add, len(made.files)) == (None, 3)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".py", ".py", ".toml"]


@pytest.mark.parametrize(
    "before",
    [
        "[tool.poetry]\nname = 'x'\n",
        '[project]\nname = "x"\ndynamic = ["version", "entry-points"]\n',
        '[project]\nname = "x"\nversion = "1"\nentry-points = {"agentrl.envs" = {old = "old:f"}}\n',
        f"[project]\nname = 'x'\nversion = '1'\ndescription = '''\n{ENTRY}\n'''\n",
    ],
    ids=["no project", "dynamic", "inline table", "header within a text"],
)
def test_a_pyproject_that_cannot_be_changed_safely_stays_and_the_lines_are_told(
    before: str, tmp_path: Path
) -> None:
    project = tmp_path / "pyproject.toml"
    project.write_text(before)
    result = new_env("GuessNumber", "--folder", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert f"is left unchanged; add to it:\n\n{ENTRY}\n{LINE}\n" in result.stdout
    assert project.read_text() == before
    assert (tmp_path / "guess_number_env.py").exists()


@pytest.mark.parametrize(
    ("before", "reason"),
    [
        (f"{KEPT}{ENTRY}\n{LINE}\n", "already has an entry point 'guess_number_env' in agentrl.envs"),
        ("[project\n", "cannot be read"),
    ],
)
def test_a_pyproject_in_the_way_is_refused_before_anything_is_written(
    before: str, reason: str, tmp_path: Path
) -> None:
    (tmp_path / "pyproject.toml").write_text(before)
    with pytest.raises(ConfigError, match=reason):
        write_new_env("GuessNumber", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["pyproject.toml"]


def test_it_says_what_comes_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = new_env("GuessNumber")
    train = "agentrl train env.id=my/GuessNumber-v0 evaluation.split=test evaluation.tasks=30"
    assert result.stdout.splitlines()[-6:] == [
        "Next:",
        "  agentrl check-env my/GuessNumber-v0 --import guess_number_env.py",
        f"  {train} --import guess_number_env.py",
        "",
        "Once installed, it needs no --import:",
        "  python -m pip install -e .",
    ]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_newcomer_installs_it_and_tests_checks_plays_and_trains_it(tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    (site,) = (tmp_path / "venv" / "lib").glob("*/site-packages")
    # Beside its own packages the new environment sees those that are installed here.
    here = [path for path in sys.path if path.endswith("site-packages")]
    (site / "here.pth").write_text("\n".join(f"import site; site.addsitedir({path!r})" for path in here))
    folder = tmp_path / "new"
    folder.mkdir()

    def python(*arguments: str) -> str:
        line = [str(tmp_path / "venv" / "bin" / "python"), *arguments]
        done = subprocess.run(line, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def agentrl(*arguments: str) -> str:
        return python("-c", "from agentrl.cli import main; main()", *arguments)

    agentrl("new-env", "GuessNumber")
    python("-m", "pip", "install", "--quiet", "-e", ".")
    assert "2 passed" in python("-m", "pytest", "-q", ".")
    assert "my/GuessNumber-v0 keeps the contract: 22 passed" in agentrl("check-env", "my/GuessNumber-v0")
    assert "success after" in agentrl("play", "my/GuessNumber-v0", "--policy", "expert")
    small = ("trainer.steps=2", "warm_start.steps=2", "warm_start.demonstrations=24")
    trained = agentrl(
        *("train", "env.id=my/GuessNumber-v0", "evaluation.split=test", "evaluation.tasks=5", *small)
    )
    assert "report.html" in trained
