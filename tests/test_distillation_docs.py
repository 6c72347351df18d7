"""The commands of docs/distillation.md run as they are written, on smaller numbers."""

from pathlib import Path

import pytest
from shell import ROOT, commands, run_here, smaller, working_tree

from agentrl.run.records import read_manifest

COMMANDS = commands((ROOT / "docs" / "distillation.md").read_text())


def test_a_large_run_is_distilled_into_a_small_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = working_tree(tmp_path / "agentrl")
    monkeypatch.chdir(folder)
    assert len(COMMANDS) == 2
    for line in COMMANDS:
        # The smaller numbers of a tour clone for a step, which the second command goes without.
        run_here(f"{smaller(line)} {'warm_start.steps=0' if 'warm_start.steps=0' in line else ''}".strip())
    large, small = (folder / "runs" / name for name in ("large", "small"))
    assert (large / "summary.json").is_file()
    assert (small / "summary.json").is_file()
    assert (read_manifest(small) or {})["teacher"]["source"] == "runs/large"
    assert '"train/algorithm/distill/kl"' in (small / "metrics.jsonl").read_text()
