"""Every command and snippet of README.md runs, on smaller numbers where it trains."""

import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from shell import ROOT, SMALL, TINY, blocks, commands, run_all, smaller, working_tree

import agentrl
from agentrl.study.config import load_study

README = (ROOT / "README.md").read_text()
SET_UP, TOUR = blocks(README)
COMMANDS = SET_UP + TOUR
CLUSTER = commands((ROOT / "docs" / "tutorials" / "cluster.md").read_text())


@pytest.mark.timeout(900)
def test_the_tour_of_the_readme_runs_as_it_is_written(tmp_path: Path) -> None:
    folder = working_tree(tmp_path / "agentrl")
    assert SET_UP[:2] == ["make quickstart", "source .venv/bin/activate"]
    printed = run_all(list(map(smaller, SET_UP + TOUR)), folder)
    assert "my/GuessNumber-v0 keeps the contract" in printed.replace("\n", " ")
    assert len(list((folder / "runs").glob("*/summary.json"))) == 1


def test_without_activation_no_command_is_found(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="agentrl: command not found"):
        run_all(["agentrl envs"], working_tree(tmp_path / "agentrl"))


def test_the_tour_names_every_command() -> None:
    named = {line.split()[1] for line in COMMANDS if line.startswith("agentrl ")}
    wanted = {"train", "evaluate", "play", "envs", "algorithms", "config", "plan", "check-env", "new-env"}
    assert named >= wanted


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for line in CLUSTER if line.startswith("torchrun ")])
def test_what_torchrun_starts_on_the_page_on_clusters_trains(line: str, tmp_path: Path) -> None:
    words = [*shlex.split(line), *SMALL, f"run.folder={tmp_path}", "run.name=tiny"]
    command = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
    subprocess.run(command, check=True, cwd=ROOT, timeout=280)
    assert (tmp_path / "tiny" / "report.html").is_file()


def test_the_make_targets_of_the_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.M))
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    told = "\n".join(path.read_text() for path in pages)
    mentioned = re.findall(r"(?m)(?:`|^)make ([a-z0-9-]+)", told)
    assert {"quickstart", "test", "docs", "study"} <= set(mentioned) <= targets


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    load = agentrl.load_config

    def smaller(path: str, *overrides: str) -> Any:
        return load(path, *overrides, *SMALL, f"run.folder={tmp_path}")

    monkeypatch.setattr(agentrl, "load_config", smaller, raising=False)
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.S)
    scope: dict[str, Any] = {}
    exec(snippet.replace("tasks=100", "tasks=3"), scope)
    assert scope["run"].config.seed == 1
    assert len(scope["panel"].tasks) == 3


def test_the_study_of_the_page_of_results_is_the_one_that_was_run() -> None:
    folder = ROOT / "configs" / "studies" / "quickstart_methods"
    verdicts, table, *_ = (folder / "table.md").read_text().split("\n\n")
    results_page = (ROOT / "docs" / "results.md").read_text()
    assert verdicts in results_page
    assert table in results_page
    results = json.loads((folder / "results.json").read_text())
    study = load_study(folder.with_suffix(".yaml"))
    assert results["failed"] == {}
    assert results["study"]["methods"] == study.methods
    assert results["study"]["overrides"] == list(study.overrides)
    assert results["study"]["seeds"] == list(study.seeds) == [0, 1, 2, 3, 4]
    assert results["study"]["tuning_seeds"] == list(study.tuning_seeds)
    for name in study.methods:  # what has not run is said
        played = {int(seed) for seed in results["methods"].get(name, {"runs": {}})["runs"]}
        assert played | set(results["missing"]["comparison"].get(name, [])) == set(study.seeds)
        assert results["tuning"][name]["chosen"] or results["tuning"][name]["scores"][name] == {}


def test_the_scripts_are_the_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    for name, arguments in {
        "train": ("configs/quickstart.yaml", *TINY, f"run.folder={tmp_path}", "run.name=tiny"),
        "evaluate": ("--policy", str(tmp_path / "tiny"), "--tasks", "2"),
    }.items():
        monkeypatch.setattr(sys, "argv", [f"scripts/{name}.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(f"scripts/{name}.py", run_name="__main__")
        assert ended.value.code == 0
    assert "2 tasks" in capsys.readouterr().out
