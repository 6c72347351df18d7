"""Both files that CONTRIBUTING.md shows do what it says they do."""

import re
import subprocess
import sys
import venv
from pathlib import Path
from types import ModuleType

import pytest
import torch
from shell import ROOT, commands, installed, run_all, smaller, working_tree

import agentrl
from agentrl.algorithms.hooks import Context
from agentrl.algorithms.recipe import build_recipe
from agentrl.data import Episode, Group, StopReason, Turn
from agentrl.data.batch import collate
from agentrl.env import check_text_env, make
from agentrl.env.new_env import write_new_env

pytestmark = pytest.mark.usefixtures("undrawn")


def test_the_example_environment_keeps_the_contract(examples: dict[str, ModuleType]) -> None:
    report = check_text_env(examples["hotcold"].HotCold)
    assert report.failed == ()
    env = make("example/HotCold-v0")
    assert [len(env.unwrapped.tasks(split)) for split in ("train", "test")] == [120, 30]
    assert env.reset(options={"task": "test/3"})[0] == "guess a number from 1 to 15"
    assert [env.step(guess)[0] for guess in ("8", "1", "4")] == ["lower", "higher", "right"]


def test_the_example_environment_is_what_new_env_writes(
    examples: dict[str, ModuleType], tmp_path: Path
) -> None:
    write_new_env("tryout/HotCold-v0", tmp_path)
    written = (tmp_path / "hot_cold_env.py").read_text().replace("tryout/", "example/")
    assert Path(str(examples["hotcold"].__file__)).read_text() == written


def test_the_example_recipe_compares_with_the_others(examples: dict[str, ModuleType]) -> None:
    def episode(name: str, reward: float) -> Episode:
        turn = Turn(
            "o", "a", prompt_ids=(1,), action_ids=(2,), logprobs=(-1.0,), entropies=(1.0,), reward=reward
        )
        return Episode(name, "e", "t", 0, (turn,), StopReason.TERMINATED)

    batch = collate([Group("t", tuple(episode(str(i), r) for i, r in enumerate((1.0, 0.0, 0.0, 1.0))))])
    advantage = build_recipe("example_rloo").build().advantage(batch, Context())
    torch.testing.assert_close(
        advantage[:, 1].double(), torch.tensor([2, -2, -2, 2], dtype=torch.float64) / 3
    )


def test_the_examples_train_together(examples: dict[str, ModuleType], tmp_path: Path) -> None:
    config = agentrl.load_config(
        None,
        "env.id=example/HotCold-v0",
        "evaluation.split=test",
        "evaluation.tasks=5",
        "algorithm.name=example_rloo",
        "warm_start.steps=2",
        "warm_start.demonstrations=24",
        "trainer.steps=2",
        "policy.tokenizer_episodes=4",
        f"run.folder={tmp_path}",
    )
    run = agentrl.train(config, quiet=True)
    assert run.summary["policies"]["expert"]["greedy"]["success_rate"] == 1.0
    assert run.summary["algorithm"] == "example_rloo"


DOCUMENT = (ROOT / "CONTRIBUTING.md").read_text()
COMMANDS = commands(DOCUMENT)
PIP = "python -m pip install -e my_agents"


@pytest.mark.timeout(900)
def test_its_commands_run_as_they_are_written(examples: dict[str, ModuleType], tmp_path: Path) -> None:
    folder = working_tree(tmp_path / "agentrl")
    agents = folder / "my_agents"
    agents.mkdir()
    for name, module in examples.items():
        for path in (folder / f"{name}.py", agents / f"{name}.py"):
            path.write_text(Path(str(module.__file__)).read_text())
    project = next(text for text in re.findall(r"```toml\n(.*?)```", DOCUMENT, re.S) if "[project]" in text)
    (agents / "pyproject.toml").write_text(project)
    place = COMMANDS.index(PIP)
    before = run_all(list(map(smaller, COMMANDS[:place])), folder)
    assert "example/HotCold-v0 keeps the contract" in before.replace("\n", " ")
    assert "REINFORCE with the mean return of the other episodes" in before
    assert len(list((folder / "runs").glob("*/summary.json"))) == 3
    for name in examples:
        (folder / f"{name}.py").unlink()
    assert "error: environment 'example/HotCold-v0' is unknown" in run_all(
        ["source .venv/bin/activate", "agentrl check-env example/HotCold-v0 || true"], folder
    )
    after = ["source .venv/bin/activate", *map(smaller, COMMANDS[place:])]
    run_all(after, folder, installed(agents))
    assert len(list((folder / "runs").glob("HotCold-v0-example_rloo*/summary.json"))) == 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_its_pyproject_is_one_that_pip_installs(examples: dict[str, ModuleType], tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    (site,) = (tmp_path / "venv" / "lib").glob("*/site-packages")
    here = [path for path in sys.path if path.endswith("site-packages")]
    (site / "here.pth").write_text("\n".join(f"import site; site.addsitedir({path!r})" for path in here))
    agents = tmp_path / "my_agents"
    agents.mkdir()
    for name, module in examples.items():
        (agents / f"{name}.py").write_text(Path(str(module.__file__)).read_text())
    project = next(text for text in re.findall(r"```toml\n(.*?)```", DOCUMENT, re.S) if "[project]" in text)
    (agents / "pyproject.toml").write_text(project)
    python = str(tmp_path / "venv" / "bin" / "python")
    subprocess.run([python, *PIP.split()[1:]], cwd=tmp_path, check=True)
    for command, wanted in (("envs", "example/HotCold-v0"), ("algorithms", "example_rloo")):
        listed = subprocess.run(
            [python, "-m", "agentrl", command], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        assert wanted in listed.stdout
