"""A user's file is imported in every process that needs it, and only where its user names it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import agentrl
from agentrl import plugins
from agentrl.algorithms.recipe import build_recipe, recipe_names
from agentrl.cli import app
from agentrl.config import read_yaml, to_yaml
from agentrl.env.registry import Factory, env_ids, make
from agentrl.errors import ConfigError
from agentrl.plugins import load_imports, loaded_imports
from agentrl.rollout.settings import WorkersConfig
from agentrl.rollout.workers import ProcessEnvironments
from agentrl.run.folder import create_run, find_run, open_run
from agentrl.run.resumption import with_overrides
from agentrl.run.settings import config_tree, load_config

GAME = """
from agentrl.env import MultiTurnEnv, register

class Door(MultiTurnEnv):
    splits = ("train", "test")
    max_steps = 2

    def problems(self, split):
        return [1, 2, 3] if split == "train" else [4, 5]

    def start(self, problem):
        return f"door {problem}"

    def actions(self):
        return ["open", "wait"]

    def act(self, action):
        return "it is open", 1.0, True
"""
AT_IMPORT = GAME + "\nregister({id!r}, Door)\n"
PLUG_IN = GAME + "\ndef plug_in():\n    register({id!r}, Door)\n"
RECIPE = """
from dataclasses import dataclass
from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.recipe import Recipe, recipe

@recipe({name!r})
@dataclass(frozen=True)
class Halved(Recipe):
    share: float = 0.5

    def build(self):
        return Algorithm()
"""


@pytest.fixture(autouse=True)
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was withheld or imported for one test is unknown to the next."""
    monkeypatch.setattr(plugins, "_imports", plugins._Imports())
    monkeypatch.setattr(sys, "path", list(sys.path))


def written(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def door(path: Path, text: str = AT_IMPORT) -> tuple[str, str]:
    """A file, and the id that it registers: one of its own, since a process knows an id once."""
    id = f"plugins-tests/Door{abs(hash(str(path)))}-v0"
    return written(path, text.replace("{id!r}", repr(id))), id


def refused(*arguments: str) -> str:
    answer = CliRunner().invoke(app, list(arguments), prog_name="agentrl")
    assert answer.exit_code == 2, answer.output
    assert "Traceback" not in answer.output
    return answer.stderr


# What is imported.


@pytest.mark.parametrize("text", [AT_IMPORT, PLUG_IN], ids=["at import", "plug_in"])
def test_a_file_registers_an_environment(text: str, tmp_path: Path) -> None:
    file, id = door(tmp_path / "my_door.py", text)
    assert load_imports(["my_door.py"], tmp_path) == (file,)
    assert id in env_ids()
    assert make(id).reset(options={"task": "test/1"})[0] == "door 5"
    assert (loaded_imports("environment"), loaded_imports("recipe")) == ((file,), ())


def test_a_file_registers_a_recipe(tmp_path: Path) -> None:
    file = written(tmp_path / "halved.py", RECIPE.format(name="plugins_halved"))
    load_imports([file])
    assert "plugins_halved" in recipe_names()
    assert build_recipe("plugins_halved", {"share": 0.25}).share == 0.25
    assert (loaded_imports("environment"), loaded_imports("recipe")) == ((), (file,))


def test_a_module_is_imported_by_its_name(tmp_path: Path) -> None:
    _, id = door(tmp_path / "plugins_lab" / "games.py")
    written(tmp_path / "plugins_lab" / "__init__.py", "")
    sys.path.append(str(tmp_path))
    assert load_imports(["plugins_lab.games"]) == ("plugins_lab.games",)
    assert id in env_ids()


def test_a_file_is_imported_once_however_it_is_spelled(tmp_path: Path) -> None:
    file, _ = door(tmp_path / "plugins_once.py")
    Path(file).write_text(Path(file).read_text() + f"\nopen({str(tmp_path / 'count')!r}, 'a').write('x')\n")
    load_imports([file, "plugins_once.py", "./plugins_once.py"], tmp_path)
    load_imports([file])
    assert (tmp_path / "count").read_text() == "x"


def test_a_file_that_a_script_has_imported_is_not_run_again(tmp_path: Path) -> None:
    file, id = door(tmp_path / "plugins_library.py", PLUG_IN)
    sys.path.append(str(tmp_path))
    import plugins_library

    load_imports([file])
    assert type(make(id).unwrapped) is plugins_library.Door


def test_a_file_shadows_no_module_and_no_file_of_its_name(tmp_path: Path) -> None:
    files = [door(tmp_path / place / "wave.py") for place in ("one", "two")]
    load_imports([file for file, _ in files])
    assert {id for _, id in files} <= set(env_ids())
    import wave

    assert hasattr(wave, "Wave_read")


def test_a_file_may_use_what_lies_beside_it(tmp_path: Path) -> None:
    written(tmp_path / "plugins_words.py", "WORD = 'open'\n")
    file, id = door(tmp_path / "plugins_user.py", "import plugins_words\n" + AT_IMPORT)
    load_imports([file])
    assert id in env_ids()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("gone.py", None, "{file}: no such file"),
        ("silent.py", "x = 1\n", "{file}: registers nothing; wanted a call of agentrl.env.register"),
        ("raising.py", "import os\nx = {}['key']\n", "{file}, line 2: KeyError: 'key'"),
        ("garbled.py", "x = 1\nif x\n", "{file}, line 2: SyntaxError: expected ':'"),
        ("leaving.py", "import sys\n\nsys.exit(0)\n", "{file}, line 3: SystemExit: 0"),
        ("lacking.py", "import plugins_absent\n", "line 1: ModuleNotFoundError: No module named"),
        ("nested.py", "import agentrl\nagentrl.load_imports(['other.py'])\n", "line 2: import "),
        ("broken_plug_in.py", "def plug_in():\n    1 / 0\n", "line 2: ZeroDivisionError"),
    ],
)
def test_an_import_that_fails_is_named_with_its_line(
    name: str, text: str | None, message: str, tmp_path: Path
) -> None:
    if text is not None:
        written(tmp_path / name, text)
    file = str(tmp_path / name)
    with pytest.raises(ConfigError) as caught:
        load_imports([file])
    assert str(caught.value).startswith(f"import {file}")
    assert message.format(file=file) in str(caught.value).replace("{}", "")
    assert loaded_imports() == ()
    assert Path(name).stem not in sys.modules


@pytest.mark.parametrize("name", ["", "my env", "1.2", "a..b"])
def test_what_is_neither_file_nor_module_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"wanted a Python file, my_env\.py, or a module"):
        load_imports([name])


def test_a_module_that_is_a_file_here_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    door(tmp_path / "plugins_here.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", ".")])
    with pytest.raises(ConfigError, match=r"wanted --import plugins_here\.py"):
        load_imports(["plugins_here"])


def test_a_folder_is_no_import(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder, wanted a file"):
        load_imports([str(tmp_path)])


# In a configuration.


def test_a_configuration_keeps_absolute_paths_of_what_it_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, id = door(tmp_path / "configs" / "plugins_a.py")
    other, _ = door(tmp_path / "plugins_b.py")
    third, _ = door(tmp_path / "plugins_c.py")
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path / "configs/mine.yaml", f"run: {{imports: [plugins_a.py]}}\nenv: {{id: {id}}}")
    assert load_config(path).run.imports == (file,)  # beside the file that names it
    named = load_config(path, "run.imports=[plugins_b.py]", imports=["plugins_c.py"])  # where one is
    assert named.run.imports == (other, third)
    again = written(tmp_path / "elsewhere/again.yaml", to_yaml(config_tree(named)))
    assert load_config(again) == named


def test_a_recipe_of_an_import_is_configured_like_any(tmp_path: Path) -> None:
    written(tmp_path / "plugins_recipe.py", RECIPE.format(name="plugins_third"))
    text = "run: {imports: [plugins_recipe.py]}\nalgorithm: {name: plugins_third, share: 0.3}\n"
    config = load_config(written(tmp_path / "mine.yaml", text))
    assert (config.algorithm.name, config.algorithm.share) == ("plugins_third", 0.3)


def test_a_configuration_names_the_line_of_an_import_that_fails(tmp_path: Path) -> None:
    path = written(tmp_path / "mine.yaml", "seed: 1\nrun:\n  imports:\n    - gone.py\n")
    message = rf"^run\.imports: import .*gone\.py: no such file \[{path}, line 3\]$"
    with pytest.raises(ConfigError, match=message):
        load_config(path)


# In other processes.


@pytest.mark.parametrize("interpreter", [None, sys.executable], ids=["this Python", "another Python"])
def test_a_worker_imports_what_its_environment_needs(interpreter: str | None, tmp_path: Path) -> None:
    file, id = door(tmp_path / "plugins_worker.py")
    name = f"plugins_{bool(interpreter)}"
    recipe = written(tmp_path / "plugins_recipe_only.py", RECIPE.format(name=name))
    mark = f"\nopen({str(tmp_path / 'imported')!r}, 'a').write(str(os.getpid()) + ' ')\n"
    Path(file).write_text(Path(file).read_text() + "\nimport os" + mark)
    Path(recipe).write_text(
        Path(recipe).read_text() + f"\nopen({str(tmp_path / 'recipes')!r}, 'a').write('x')"
    )
    load_imports([file, recipe])
    config = WorkersConfig(count=1, interpreter=interpreter)
    with (
        ProcessEnvironments(Factory(id, split="test"), 1, config) as environments,
        environments.borrow() as env,
    ):
        assert env.reset(seed=0, options={"task": "test/0"})[0] == "door 4"
    own, worker = (tmp_path / "imported").read_text().split()
    assert (int(own) == os.getpid(), own == worker) == (True, False)
    assert (tmp_path / "recipes").read_text() == "x"  # a worker has no need of it, nor of torch


def test_a_worker_says_which_import_failed(tmp_path: Path) -> None:
    file, id = door(tmp_path / "plugins_vanishing.py")
    load_imports([file])
    Path(file).unlink()
    with (
        ProcessEnvironments(Factory(id), 1, WorkersConfig(count=1)) as environments,
        pytest.raises(ConfigError, match=r"plugins_vanishing\.py: no such file"),
        environments.borrow(),
    ):
        pass


# What a run's folder names.


@pytest.fixture
def strange_run(tmp_path: Path) -> Path:
    """A run's folder that names a file which leaves a mark when it is executed."""
    file, id = door(tmp_path / "plugins_strange.py")
    Path(file).write_text(Path(file).read_text() + f"\nopen({str(tmp_path / 'executed')!r}, 'w').close()\n")
    tree = config_tree(load_config("quickstart.yaml"))
    tree["run"]["imports"] = [file]
    tree["env"] = {"id": id, "split": "train", "kwargs": {}}
    written(tmp_path / "runs/strange/config.yaml", to_yaml(tree))
    return tmp_path / "runs/strange"


@pytest.mark.parametrize(
    "command",
    [
        ["evaluate", "--policy", "runs/strange", "--tasks", "1"],
        ["train", "--resume", "runs/strange"],
        ["-q", "train", "--resume", "strange", "seed=0"],
    ],
)
def test_a_run_executes_nothing_that_it_names_and_says_what_to_add(
    command: list[str], strange_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if command[0] == "evaluate":  # its weights are beside the point
        (strange_run / "model").mkdir()
        opened = (None, open_run(strange_run).config)
        monkeypatch.setattr("agentrl.evaluation.evaluate.open_player", lambda *_, **__: opened)
    message = refused(*command)
    file = tmp_path / "plugins_strange.py"
    assert (
        f"was made with --import {file}: code named in a run folder is not executed automatically" in message
    )
    assert message.splitlines()[-1] == f"full command: agentrl {' '.join(command)} --import {file}"
    assert not (tmp_path / "executed").exists()


def test_a_run_is_reported_without_its_imports(strange_run: Path, tmp_path: Path) -> None:
    answer = CliRunner().invoke(app, ["report", str(strange_run)])
    assert answer.exit_code == 0, answer.output
    assert (strange_run / "report.html").is_file()
    assert not (tmp_path / "executed").exists()
    assert find_run(strange_run) == strange_run


def test_a_run_whose_recipe_is_missing_is_no_model_folder(strange_run: Path) -> None:
    tree = read_yaml(strange_run / "config.yaml")
    tree["algorithm"] = {"name": "plugins_unheard_of"}
    (strange_run / "config.yaml").write_text(to_yaml(tree))
    message = refused("evaluate", "--policy", str(strange_run))
    assert "unknown recipe (got 'plugins_unheard_of'" in message
    assert "was made with --import" in message


def test_who_names_the_import_again_goes_on(strange_run: Path, tmp_path: Path) -> None:
    agentrl.load_imports([str(tmp_path / "plugins_strange.py")])
    assert (tmp_path / "executed").exists()
    run = open_run(strange_run)
    assert with_overrides(run, ("trainer.checkpoint_every=5",)).config.trainer.checkpoint_every == 5
    with pytest.raises(ConfigError, match="cannot change when a run is resumed; use --import"):
        with_overrides(run, ("run.imports=[]",))


def test_a_file_that_changed_since_its_run_began_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, id = door(tmp_path / "plugins_changing.py")
    text = f"run: {{imports: [plugins_changing.py], folder: {tmp_path / 'runs'}, name: x}}\nenv: {{id: {id}}}"
    run = create_run(load_config(written(tmp_path / "mine.yaml", text)))
    with_overrides(run, ())
    assert caplog.messages == []
    Path(file).write_text(Path(file).read_text() + "# harder\n")
    with_overrides(run, ())
    (message,) = caplog.messages
    assert message.startswith(f"{file} has changed since {run.folder} began")


def test_a_name_that_steers_a_terminal_is_shown_escaped(strange_run: Path) -> None:
    tree = read_yaml(strange_run / "config.yaml")
    tree["run"]["imports"] = ["/tmp/\x1b[31mred.py", "/tmp/a; rm.py"]
    (strange_run / "config.yaml").write_text(to_yaml(tree))
    message = refused("train", "--resume", str(strange_run))
    assert "\x1b" not in message
    assert "--import '/tmp/\\x1b[31mred.py' --import '/tmp/a; rm.py'" in message


def test_a_script_that_starts_a_run_imports_its_own_file_once(tmp_path: Path) -> None:
    file, id = door(tmp_path / "plugins_script.py", PLUG_IN)
    with Path(file).open("a") as script:
        script.write(
            "\nif __name__ == '__main__':\n"
            "    import agentrl\n"
            f"    config = agentrl.load_config(None, 'env.id={id}', imports=[__file__])\n"
            f"    print(type(agentrl.make({id!r}).unwrapped) is Door, config.run.imports == (__file__,))\n"
        )
    done = subprocess.run([sys.executable, file], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.returncode) == ("True True\n", 0), done.stderr
