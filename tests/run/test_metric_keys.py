"""Metric keys are `stage/room/name`, in one table; older keys are read under those of today."""

import json
from pathlib import Path

import pytest

from agentrl.run.logger import read_metrics
from agentrl.run.metric_keys import METRICS, current_key, current_keys, find_metric, metrics_page

ROOT = Path(__file__).resolve().parents[2]
OLD_RUNS = sorted(path for path in (ROOT / "tests" / "data" / "old_runs").iterdir() if path.is_dir())


def test_the_documented_table_is_the_one_in_the_code() -> None:
    assert (ROOT / "docs" / "metrics.md").read_text() == metrics_page()


def test_every_key_has_a_room_and_a_meaning_and_stands_once() -> None:
    for metric in METRICS:
        assert metric.key.split("/")[0] in ("rollout", "learner", "algorithm"), metric
        assert metric.meaning.endswith("."), metric
    assert len({metric.key for metric in METRICS}) == len(METRICS)
    old = [metric.old for metric in METRICS if metric.old is not None]
    assert len(set(old)) == len(old)


@pytest.mark.parametrize(
    ("old", "stage", "new"),
    [
        ("success", "train", "train/rollout/success_rate"),
        ("success/put [*] in", "train", "train/rollout/success_rate/put [*] in"),
        ("entropy/turn", "train", "train/rollout/entropy/turn"),
        ("entropy/turn/heat", "train", "train/rollout/entropy/turn/heat"),
        ("learner/loss_policy", "warm_start", "warm_start/learner/policy_loss"),
        ("learner/entropy_turn", "train", "train/learner/entropy/turn"),
        ("learner/entropy/turn/03", "train", "train/algorithm/entropy/turn/03"),
        ("learner/corridor/low", "train", "train/algorithm/entropy_band/low"),
        ("learner/replay/size", "train", "train/algorithm/replay/size"),
        ("learner/term/kl", "train", "train/learner/term/kl"),
        ("learner/logprob_gap_max", "train", "train/algorithm/mismatch/max"),
        ("learner/drift_max", "train", "train/algorithm/mismatch/max"),
        ("learner/states_kept", "train", "train/algorithm/states_kept"),
        ("stage", "train", "stage"),
        ("step", "train", "step"),
    ],
)
def test_an_older_key_has_one_of_today(old: str, stage: str, new: str) -> None:
    assert current_key(old, stage) == new
    assert current_key(new, stage) == new


@pytest.mark.parametrize("run", OLD_RUNS, ids=lambda run: run.name)
def test_the_rows_and_the_history_of_an_older_run_are_read_under_the_keys_of_today(run: Path) -> None:
    rows = read_metrics(run / "metrics.jsonl")
    assert rows
    for row in rows:
        assert all(find_metric(key) for key in row if key not in ("stage", "step"))
    progress = [json.loads(path.read_text()) for path in run.glob("checkpoints/*/progress.json")]
    for stored in progress:
        history = current_keys(stored["history"], "train")
        assert not stored["history"] or "train/rollout/success_rate" in history
        assert all(find_metric(key) for key in history)
