"""The script that a newcomer reads first learns its game."""

import importlib.util
from pathlib import Path
from statistics import fmean

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "minimal_grpo.py"


def test_minimal_grpo_learns_its_game_and_says_so(capsys) -> None:
    spec = importlib.util.spec_from_file_location("minimal_grpo", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rates = module.main(steps=20)
    assert fmean(rates[:5]) < 0.3
    assert fmean(rates[-5:]) > 0.5
    assert len(capsys.readouterr().out.splitlines()) == 20
