"""What a stranger meets who installs agentrl without the games' data."""

import subprocess
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
REMEDY = "pip install --no-deps alfworld==0.4.2"


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
