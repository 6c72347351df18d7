"""Every command and snippet of README.md and CONTRIBUTING.md runs, on smaller numbers where it trains."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import agentrl
from agentrl.cli import app
from agentrl.run.study import load_study, plan

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
SMALL = (
    "warm_start.steps=2",
    "warm_start.demonstrations=24",
    "policy.tokenizer_episodes=4",
    "trainer.steps=2",
    "rollout.groups_per_step=2",
    "rollout.group_size=2",
    "evaluation.tasks=4",
)


def commands(text: str) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    return [line.partition("#")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


AGENTRL = [line for line in commands(README) if line.startswith("agentrl ")]


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> agentrl.Run:
    folder = tmp_path_factory.mktemp("runs")
    return agentrl.train(agentrl.load_config("quickstart.yaml", *SMALL, f"run.folder={folder}"), quiet=True)


@pytest.mark.parametrize("line", AGENTRL)
def test_a_command_of_the_readme_runs(
    line: str, small_run: agentrl.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    line = line.replace("runs/NAME", str(small_run.folder)).replace("guess_number", str(tmp_path / "mine"))
    words = shlex.split(line)[1:]
    if words[0] == "train" and "--resume" not in words:
        words += [*SMALL, f"run.folder={tmp_path}"]
    answer = CliRunner().invoke(app, words)
    assert answer.exit_code == 0, answer.output
    assert answer.output.strip()


def test_the_tour_names_every_command() -> None:
    named = {line.split()[1] for line in AGENTRL}
    wanted = {"train", "evaluate", "play", "envs", "algorithms", "config", "plan", "check-env", "new-env"}
    assert named >= wanted


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for line in commands(README) if line.startswith("torchrun ")])
def test_what_torchrun_starts_in_the_readme_trains(line: str, tmp_path: Path) -> None:
    words = [*shlex.split(line), *SMALL, f"run.folder={tmp_path}", "run.name=tiny"]
    command = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
    subprocess.run(command, check=True, cwd=ROOT, timeout=280)
    assert (tmp_path / "tiny" / "report.html").is_file()


def test_the_make_targets_of_the_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    mentioned = re.findall(r"`?make ([a-z-]+)", README + (ROOT / "CONTRIBUTING.md").read_text())
    assert {"quickstart", "test"} <= set(mentioned) <= targets


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


def test_the_study_of_the_readme_is_the_one_that_was_run() -> None:
    folder = ROOT / "configs" / "studies" / "quickstart_methods"
    table, _, rest = (folder / "table.md").read_text().partition("\n\n")
    assert table in README
    assert "fr3e" in rest
    results = json.loads((folder / "results.json").read_text())
    study = load_study(folder.with_suffix(".yaml"))
    assert results["failed"] == {}
    assert results["study"]["methods"] == study.methods
    assert results["study"]["overrides"] == list(study.overrides)
    runs = plan(study, "runs")
    assert len(runs) == 3 * (1 + 13)
    for name in study.methods:
        assert set(results["methods"][name]["runs"]) == {"0", "1", "2"}


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_the_scripts_are_the_commands(name: str, small_run: agentrl.Run, tmp_path: Path) -> None:
    arguments = {
        "train": ["configs/quickstart.yaml", *SMALL, f"run.folder={tmp_path}"],
        "evaluate": ["--policy", str(small_run.folder), "--tasks", "2"],
    }[name]
    answer = subprocess.run(
        [sys.executable, f"scripts/{name}.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert answer.returncode == 0, answer.stderr
