import ast
import errno
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from coin import ENV, Coin
from typer.testing import CliRunner

import agentrl.evaluation.report
import agentrl.run.settings
import agentrl.training.launch
from agentrl import errors
from agentrl.cli import ExitCode, app
from agentrl.config import read_yaml
from agentrl.env import make_panel
from agentrl.errors import CheckpointError, ConfigError
from agentrl.run.logger import RunLogger
from agentrl.run.signals import RunInterrupted

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: str, **options: Any) -> Any:
    return CliRunner().invoke(app, list(arguments), prog_name="agentrl", **options)


def refused(*arguments: str) -> str:
    """Run a command that must fail as a user's mistake; what it says."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert result.stderr.startswith("error: ")
    return result.stderr


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Records what `train` and `resume` are called with instead of training."""
    calls: list[Any] = []

    def train(config: Any) -> Any:
        calls.append(config)
        return SimpleNamespace(folder=Path("runs/made"))

    def resume(folder: str, *overrides: str) -> Any:
        calls.append((folder, overrides))
        return SimpleNamespace(folder=Path(folder))

    monkeypatch.setattr(agentrl.training.launch, "train", train)
    monkeypatch.setattr(agentrl.training.launch, "resume", resume)
    return calls


# Help and listings.


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["envs"], ["algorithms"]])
def test_help_and_listings_load_no_torch(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom agentrl.cli import main\n"
        f"try: main({arguments!r})\nexcept SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'scipy'} & set(sys.modules)\nassert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


@pytest.mark.parametrize(
    ("command", "example"),
    [
        ("train", "algorithm.name=dr_grpo"),
        ("evaluate", "--policy random"),
        ("play", "--policy expert"),
        ("config", "seed=1"),
        ("check-env", "max_steps=10"),
    ],
)
def test_help_teaches_with_an_example(command: str, example: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert example in result.stdout


def test_installed_environments_and_algorithms_are_listed() -> None:
    assert ENV in run("envs").stdout
    assert "grpo" in run("algorithms").stdout


def test_an_algorithm_is_described_with_its_keys_and_defaults() -> None:
    told = run("algorithms", "epo").stdout
    assert "parity: official" in told
    assert "entropy_coefficient: 0.001" in told
    assert "did you mean epo?" in refused("algorithms", "epoo")


def test_config_prints_a_tree_that_is_read_back(tmp_path: Path) -> None:
    printed = run("config", "quickstart.yaml", "seed=7", "learner.learning_rate=1e-5")
    (tmp_path / "mine.yaml").write_text(printed.stdout)
    tree = read_yaml(tmp_path / "mine.yaml")
    assert (tree["seed"], tree["learner"]["learning_rate"]) == (7, 1e-5)
    assert run("config", str(tmp_path / "mine.yaml")).stdout == printed.stdout
    assert run("config").stdout == run("config", "quickstart.yaml").stdout


def test_the_version_is_printed() -> None:
    assert run("--version").stdout == f"agentrl {agentrl.__version__}\n"


def test_the_module_is_the_command() -> None:
    line = [sys.executable, "-m", "agentrl", "--version"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == (run("--version").stdout, 0)


def test_the_documented_exit_codes_and_errors_are_those_that_there_are() -> None:
    document = (ROOT / "docs" / "errors.md").read_text()
    assert set(re.findall(r"^\| (\d+) \|", document, re.M)) == {str(int(code)) for code in ExitCode}
    classes = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert set(re.findall(r"^\| `(\w+)` \|", document, re.M)) == classes
    rows = [line.split("|") for line in document.splitlines() if re.match(r"\| (`|\d)", line)]
    assert [row for row in rows if not row[2].strip()] == []  # each says what it means
    assert "docs/errors.md" in run("--help").stdout.replace("\n", " ")


def test_a_command_ends_with_a_named_code() -> None:
    exits = [
        ast.unparse(node)
        for path in (ROOT / "agentrl" / "cli.py", *(ROOT / "agentrl" / "commands").glob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("typer.Exit", "sys.exit", "SystemExit")
    ]
    assert len(exits) >= 4
    assert [call for call in exits if not re.fullmatch(r"typer\.Exit\(ExitCode\.[A-Z]+\)", call)] == []


# How much is said.


@pytest.fixture
def speaking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that logs at every level, and whose run logger speaks too."""

    def config(*_: Any, **__: Any) -> Any:
        log = logging.getLogger("agentrl.somewhere")
        log.debug("a detail")
        log.info("a step")
        log.warning("a worry")
        logger = RunLogger("unused")
        logger.say("playing")
        logger.say("warning: nothing was learned")
        logger.show("the table")
        raise ConfigError("that was all")

    monkeypatch.setattr(agentrl.run.settings, "load_config", config)


@pytest.mark.parametrize(
    ("options", "environment", "said"),
    [
        ((), {}, "step worry"),
        (("-v",), {}, "detail step worry"),
        (("--verbose",), {"AGENTRL_LOG_LEVEL": "error"}, "detail step worry"),
        (("-q",), {}, "worry"),
        (("-q",), {"AGENTRL_LOG_LEVEL": "debug"}, "worry"),
        ((), {"AGENTRL_LOG_LEVEL": "debug"}, "detail step worry"),
        ((), {"AGENTRL_LOG_LEVEL": "WARNING"}, "worry"),
        ((), {"AGENTRL_LOG_LEVEL": "error"}, ""),
    ],
)
def test_v_q_and_the_environment_say_how_much_is_said(
    options: tuple[str, ...], environment: dict[str, str], said: str, speaking: None
) -> None:
    before = logging.getLogger("agentrl").level, list(logging.getLogger().handlers)
    for arguments in ((*options, "config"), ("config", *options)):  # before the command's name and behind it
        result = run(*arguments, env={"AGENTRL_LOG_LEVEL": "", **environment})
        assert result.exit_code == 2
        heard = [word for word in ("detail", "step", "worry") if f" {word}" in result.stderr]
        assert " ".join(heard) == said
        assert "error: that was all" in result.stderr
        assert ("playing" in result.stdout) == ("step" in said)
        assert "warning: nothing was learned\nthe table\n" in result.stdout
    assert (logging.getLogger("agentrl").level, list(logging.getLogger().handlers)) == before


def test_v_shows_the_warnings_that_python_hides(tmp_path: Path) -> None:
    game = "from agentrl.env import register\nregister('cli-tests/Old-v0', 'old:Game')\nimport warnings\n"
    (tmp_path / "old.py").write_text(f"{game}warnings.warn('an old name', DeprecationWarning)\n")
    heard = []
    for options in ([], ["-v"]):
        line = [sys.executable, "-m", "agentrl", *options, "envs", "--import", "old.py"]
        done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=True, cwd=tmp_path)
        heard.append("DeprecationWarning: an old name" in done.stderr)
    assert heard == [False, True]


def test_levels_that_are_none_are_refused() -> None:
    assert "-v and -q contradict each other" in refused("-v", "config", "-q")
    result = run("config", env={"AGENTRL_LOG_LEVEL": "loud"})
    assert result.exit_code == 2
    assert "AGENTRL_LOG_LEVEL is 'loud', wanted one of debug, info, warning, error" in result.stderr


def test_what_was_decided_is_a_detail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.yaml").write_text("extends: quickstart.yaml\n")
    monkeypatch.chdir(tmp_path)
    said = run("-v", "config", "mine.yaml", "seed=1").stderr
    assert "debug: agentrl.run.settings: read [" in said
    assert "'mine.yaml'], then ['seed=1']" in said
    assert run("config", "mine.yaml").stderr == ""


# Completion.


def completed(line: str) -> list[str]:
    """What bash is offered at the end of a line, which it has split at "=" as well."""
    words = re.sub("=", " = ", line).split() + ([""] if line.endswith((" ", "=")) else [])
    environment = {
        "_AGENTRL_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(words),
        "COMP_CWORD": str(len(words) - 1),
    }
    return run(env=environment).stdout.split()


def test_a_shell_completes_commands_files_and_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.yaml").write_text("")
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "other.yaml").write_text("")
    (tmp_path / "runs" / "first").mkdir(parents=True)
    (tmp_path / "runs" / "first" / "config.yaml").write_text("")
    monkeypatch.chdir(tmp_path)
    assert completed("agentrl tr") == ["train"]
    assert {"mine.yaml", "lab/", "quickstart.yaml", "algorithm.name="} <= set(completed("agentrl train "))
    assert completed("agentrl train lab/o") == ["lab/other.yaml"]
    assert completed("agentrl train mine.yaml algorithm.name=ep") == ["epo"]
    assert {"epo", "grpo", "spear"} <= set(completed("agentrl train mine.yaml algorithm.name="))
    assert completed("agentrl plan env.id=agentrl/ALF") == ["agentrl/ALFWorld-v0"]
    assert completed("agentrl play agentrl/Web") == ["agentrl/WebShop-v0"]
    assert completed("agentrl evaluate --policy r") == ["random", "runs/first"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_complete_as_well(shell: str) -> None:
    environment = {
        "_AGENTRL_COMPLETE": f"complete_{shell}",
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
        "_TYPER_COMPLETE_ARGS": "agentrl train algorithm.name=ep",
    }
    assert re.findall(r"[\w.]+=\w+", run(env=environment).stdout) == ["algorithm.name=epo"]


def test_the_completion_of_a_shell_can_be_installed() -> None:
    assert {"--install-completion", "--show-completion"} <= set(run("--help").stdout.split())


# Bad input.


def test_every_mistake_in_a_configuration_is_told_at_once() -> None:
    message = refused("config", "sede=1", "trainer.steps=true", "algorithm.name=grop")
    assert "sede: unknown key (got 1; did you mean seed?)" in message
    assert "trainer.steps: wrong value (got true, wanted an integer)" in message
    assert "did you mean grpo?" in message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("config", "nothing.yaml"), ("nothing.yaml", "quickstart.yaml")),
        (("train", "seed="), ("'seed=' has no value",)),
        (("train", "quickstart.yaml", "seed"), ("'seed' is not an override",)),
        (("train", "--resume", "runs/none"), ("runs/none",)),
        (("train", "x.yaml", "--resume", "runs/none"), ("leave out x.yaml",)),
        (("evaluate", "--policy", "runs/none"), ("runs/none",)),
        (("evaluate", "--policy", "random", "--env", "no/Such-v0"), ("no/Such-v0",)),
        (("evaluate", "--policy", "random", "--env", ENV, "--split", "heldout"), ("heldout", "held_out")),
        (("evaluate", "--policy", "random", "--panel", "none.json"), ("none.json",)),
        (("evaluate", "--policy", "random", "--output", "none/x.json"), ("there is no folder none",)),
        (("play", ENV, "max_step=3"), ("max_step", "max_steps")),
        (("play", ENV, "--policy", "runs/none"), ("runs/none",)),
        (("check-env", "no/Such-v0"), ("no/Such-v0",)),
        (("report", "runs/none"), ("runs/none",)),
    ],
)
def test_bad_input_ends_with_one_message_and_exit_code_2(
    arguments: tuple[str, ...], words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    message = refused(*arguments)
    for word in words:
        assert word in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["option", "environment"])
def test_debug_shows_the_traceback_and_keeps_the_exit_code(where: str) -> None:
    result = (
        run("--debug", "config", "none.yaml")
        if where == "option"
        else run("config", "none.yaml", env={"AGENTRL_DEBUG": "1"})
    )
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert "error: none.yaml" in result.stderr


def test_a_full_disk_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/x/summary.json.partial")

    monkeypatch.setattr(agentrl.training.launch, "train", full)
    message = refused("train")
    assert message.startswith("error: runs/x/summary.json: No space left on device")
    assert "agentrl train --resume" in message


def test_an_interrupted_run_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: Any) -> None:
        raise RunInterrupted("stopped; continue with: agentrl train --resume runs/x")

    monkeypatch.setattr(agentrl.training.launch, "train", interrupted)
    result = run("train")
    assert result.exit_code == 130
    assert result.stderr.strip() == "stopped; continue with: agentrl train --resume runs/x"


def test_an_error_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Any) -> None:
        raise KeyError("bug")

    monkeypatch.setattr(agentrl.training.launch, "train", broken)
    assert isinstance(run("train").exception, KeyError)


# Commands.


def test_train_reads_a_configuration_and_its_overrides(trained: list[Any]) -> None:
    result = run("train", "quickstart.yaml", "seed=3", "trainer.steps=2")
    assert result.exit_code == 0, result.output
    assert (trained[0].seed, trained[0].trainer.steps) == (3, 2)
    assert "runs/made" in result.stdout
    assert run("train", "seed=4").exit_code == 0
    assert trained[1].seed == 4


def test_resume_passes_the_run_and_the_changes(trained: list[Any]) -> None:
    assert run("train", "--resume", "runs/old", "trainer.checkpoint_every=5").exit_code == 0
    assert trained == [("runs/old", ("trainer.checkpoint_every=5",))]


def test_evaluate_prints_a_table_and_writes_the_scores(tmp_path: Path) -> None:
    output = tmp_path / "scores.json"
    arguments = (
        "--env",
        ENV,
        "--split",
        "held_out",
        "--tasks",
        "3",
        "--repeats",
        "2",
        "--output",
        str(output),
    )
    result = run("evaluate", "--policy", "expert", *arguments)
    assert result.exit_code == 0, result.output
    assert "100.0 [43.9" in result.stdout.replace("\n", " ")  # Wilson's over 3 tasks
    assert "data: made up" in result.stdout
    scores = json.loads(output.read_text())
    assert (scores["policy"], scores["success_rate"], scores["episodes"]) == ("expert", 1.0, 6)


def test_evaluate_takes_a_panel_file(tmp_path: Path) -> None:
    panel = make_panel(ENV, "train", 2)
    panel.save(tmp_path / "panel.json")
    result = run("evaluate", "--policy", "random", "--panel", str(tmp_path / "panel.json"))
    assert f"panel {panel.hash[:12]}" in result.stdout
    assert "leave" not in result.output
    assert "not both" in refused(
        "evaluate", "--policy", "random", "--panel", str(tmp_path / "panel.json"), "--tasks", "2"
    )


def test_aborted_episodes_are_told_with_their_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Coin, "fails", True)
    result = run("evaluate", "--policy", "random", "--env", ENV, "--split", "train", "--tasks", "2")
    assert result.exit_code == 0
    assert "aborted 2 x env_error: RuntimeError: out of coins" in result.stdout


def test_an_episode_can_be_read() -> None:
    result = run("play", ENV, "--policy", "expert", "--split", "held_out", "--seed", "6")
    assert result.exit_code == 0, result.output
    assert "held_out-2" in result.stdout
    assert "> take coin" in result.stdout
    assert "success after 1 turns (terminated), return 1" in result.stdout
    assert "\x1b" not in result.stdout  # what an environment says does not steer the terminal


def test_a_person_plays_by_number_or_by_text() -> None:
    result = run("play", ENV, "--task", "train-1", "max_steps=9", input="1\n7\n\nsing\n2\n")
    assert result.exit_code == 0, result.output
    assert "1 look" in result.stdout
    assert "there are 2 commands" in result.stdout
    assert "You look." in result.stdout
    assert "You sing." in result.stdout
    assert "success after 3 turns" in result.stdout


def test_a_person_may_leave() -> None:
    result = run("play", ENV, input="1\n")
    assert result.exit_code == 130
    assert "left the game" in result.stderr


def test_an_aborted_episode_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Coin, "fails", True)
    assert "aborted (env_error): RuntimeError: out of coins" in refused("play", ENV, "--policy", "random")


def test_check_env_ends_with_1_when_the_contract_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Coin, "fails", True)
    result = run("check-env", ENV)
    assert result.exit_code == 1
    assert "failed" in result.stdout
    assert "out of coins" in result.stdout


def test_report_writes_the_page_of_a_run(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.yaml").write_text(run("config").stdout)
    result = run("report", str(folder))
    assert result.exit_code == 0, result.output
    assert Path(result.stdout.replace("\n", "")) == folder / "report.html"
    assert "mine" in (folder / "report.html").read_text()


def test_a_report_of_a_damaged_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(_: Path) -> None:
        raise CheckpointError("x: damaged")

    monkeypatch.setattr(agentrl.evaluation.report, "write_report", damaged)
    (tmp_path / "config.yaml").write_text("{}")
    assert "x: damaged" in refused("report", str(tmp_path))


@pytest.mark.parametrize("name", ["train", "evaluate", "play", "report"])
def test_a_script_is_the_command(name: str) -> None:
    script = ROOT / "scripts" / f"{name}.py"
    done = subprocess.run(
        [sys.executable, script, "--help"], capture_output=True, text=True, timeout=60, check=True
    )
    assert f"Usage: agentrl {name}" in done.stdout
