"""Runs of earlier versions go on: stored runs, stopped in the middle, are resumed, reported and evaluated."""

import json
import shutil
from pathlib import Path

import pytest

import agentrl
from agentrl.evaluation.report import write_report
from agentrl.run.logger import read_metrics

OLD_RUNS = Path(__file__).resolve().parents[1] / "data" / "old_runs"


@pytest.mark.parametrize("name", sorted(path.name for path in OLD_RUNS.iterdir() if path.is_dir()))
def test_a_run_of_an_earlier_version_is_reported_and_goes_on_to_its_end(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    shutil.copytree(OLD_RUNS / name, folder)
    before = read_metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in before if row["stage"] == "train"] == [1, 2, 3]
    assert "</html>" in write_report(folder).read_text()
    run = agentrl.resume(folder, quiet=True)
    after = read_metrics(folder / "metrics.jsonl")
    assert after[: len(before)] == before
    assert [row["step"] for row in after if row["stage"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert set(run.summary["policies"]) == {"random", "expert", "untrained", "cloned", "trained"}
    assert "trained, sampled" in write_report(folder).read_text()
    recorded = json.loads((folder / "evaluations.json").read_text())["trained"]["greedy"]
    again = agentrl.evaluate(str(folder), temperature=0.0).to_dict()
    assert again["success_rate"] == recorded["success_rate"]
    assert again["panel_hash"] == recorded["panel_hash"]
