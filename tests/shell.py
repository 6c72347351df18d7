"""The commands of a document, as a newcomer types them: in one shell, which finds nothing but a system's."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from agentrl.cli import app

ROOT = Path(__file__).resolve().parents[1]
SMALL = (
    "warm_start.steps=2",
    "warm_start.demonstrations=24",
    "policy.tokenizer_episodes=4",
    "trainer.steps=2",
    "rollout.groups_per_step=2",
    "rollout.group_size=2",
    "evaluation.tasks=4",
)
TINY = (
    *SMALL,
    "warm_start.steps=1",
    "trainer.steps=1",
    "evaluation.baselines=[]",
    "rollout.placement=inline",
)


def blocks(text: str) -> list[list[str]]:
    """The commands of each block of a document that is for a shell."""
    found = re.findall(r"```bash\n(.*?)```", text, re.S)
    return [
        [line.partition(" #")[0].strip() for line in block.splitlines() if line.strip()] for block in found
    ]


def commands(text: str) -> list[str]:
    return [line for block in blocks(text) for line in block]


def working_tree(folder: Path) -> Path:
    """A checkout to be written into, whose files are ours and whose virtual environment is this one."""
    if not (Path(sys.prefix) / "bin" / "activate").is_file():
        pytest.skip("this Python is in no virtual environment that a shell could activate")
    folder.mkdir()
    for path in ROOT.iterdir():
        if path.name not in (".venv", ".git", "runs"):
            (folder / path.name).symlink_to(path)
    (folder / ".venv").symlink_to(sys.prefix)
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    return folder


def smaller(line: str) -> str:
    """A command that takes seconds in place of one that takes minutes."""
    line = line.replace("runs/NAME", "runs/$(ls runs | head -n 1)").replace("--tasks 100", "--tasks 4")
    if line.startswith("make "):
        return line.replace("make ", "make --dry-run ")
    if line.startswith("torchrun "):
        return "command -v torchrun"
    if line.startswith("python -m pip install -e "):
        return f"{line.replace('python -m pip install -e', 'test -f')}/pyproject.toml"
    return (
        f"{line} {' '.join(TINY)}" if line.startswith("agentrl train ") and "--resume" not in line else line
    )


def run_all(lines: list[str], folder: Path, *site: Path) -> str:
    """Run commands one after another; the first that fails ends them.

    Args:
        lines: of a shell.
        folder: to be in, see `working_tree`.
        site: folders whose distributions are as if they were installed.

    Returns:
        What was printed.
    """
    script = "\n".join(f"echo '$' {line!r}\n{line}" for line in lines)
    done = subprocess.run(
        ["/bin/bash", "-e", "-c", script],
        cwd=folder,
        env={
            "PATH": "/usr/bin:/bin",
            "HOME": str(folder),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": ":".join(map(str, (folder, folder / "envs", *site))),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def run_here(line: str) -> str:
    """Run a command `agentrl ...` in this process, which has loaded torch already."""
    program, *words = shlex.split(line)
    assert program == "agentrl"
    done = CliRunner().invoke(app, words, prog_name="agentrl")
    assert done.exit_code == 0, done.output
    return done.output


def installed(project: Path) -> Path:
    """Have a folder's distribution found as `pip install -e` would have it, by its pyproject.toml."""
    tree = tomllib.loads((project / "pyproject.toml").read_text())
    name, version = tree["project"]["name"], tree["project"]["version"]
    info = project / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    groups = tree["project"]["entry-points"].items()
    text = "".join(
        f"[{group}]\n" + "".join(f"{key} = {value}\n" for key, value in points.items())
        for group, points in groups
    )
    (info / "entry_points.txt").write_text(text)
    for file in tree["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]:
        assert (project / file).is_file()
    return project
