"""What a stranger meets who installs agentrl without the games' data, or misses an extra."""

import re
import subprocess
import tomllib
import venv
from pathlib import Path

import pytest

from agentrl.errors import missing_extra

ROOT = Path(__file__).resolve().parents[1]
REMEDY = "pip install --no-deps alfworld==0.4.2"


def test_nothing_tells_to_install_the_project_that_the_package_index_has_under_our_name() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    places = (
        "agentrl",
        "configs",
        "docs",
        "envs",
        "scripts",
        "tests",
        "README.md",
        "CONTRIBUTING.md",
        "Makefile",
    )
    named = set()
    for place in places:
        for path in [ROOT / place, *(ROOT / place).rglob("*")]:
            if path.suffix in (".py", ".md", ".yaml", ".j2", ".sbatch", "") and path.is_file():
                text = path.read_text()
                assert not re.search(r"pip install (-\S+ )*['\"]?agentrl\b|agentrl\\?\[[a-z]", text), path
                named |= set(re.findall(r'missing_extra\([^\n]*, "([a-z-]+)"\)', text))
    assert {"lora", "math", "ray", "reasoning-gym", "scienceworld", "webshop"} <= named <= {*extras}


def test_an_extra_is_installed_from_the_checkout() -> None:
    assert str(missing_extra("this needs Ray", "ray")) == (
        "this needs Ray: pip install -e '.[ray]' (in agentrl's checkout)"
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_plain_install_names_the_one_command_that_fetches_the_games(tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", ROOT]
    subprocess.run(install, check=True, cwd=tmp_path)
    agentrl = tmp_path / "venv" / "bin" / "agentrl"
    listed = subprocess.run([agentrl, "envs"], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert "agentrl/ALFWorld-v0" in listed.stdout
    shipped = subprocess.run(
        [agentrl, "config", "quickstart.yaml"], capture_output=True, text=True, cwd=tmp_path
    )
    assert shipped.returncode == 0, shipped.stderr
    played = subprocess.run(
        [agentrl, "play", "agentrl/ALFWorld-v0", "--policy", "random"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert played.returncode == 2
    assert REMEDY in played.stderr
    assert "Traceback" not in played.stderr
