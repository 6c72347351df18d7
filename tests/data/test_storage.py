import json
import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from agentrl.data import BranchPoint, Episode, StopReason, Turn
from agentrl.data.storage import VERSION, read_episodes, write_episodes
from agentrl.errors import CheckpointError

EPISODES = [
    Episode(
        id="é→1",
        env="agentrl/ALFWorld-v0",
        task="train:3",
        seed=2**31 - 1,
        turns=(
            Turn(
                "You see a mug 1.\n\tπ ≈ 3, \U0001f642",
                "nehmen",
                prompt_ids=(5, 9),
                action_ids=(7, 3, 2),
                logprobs=(-0.1, 0.0, -1e-17),
                entropies=(0.1 + 0.2, 0.0, 5e-324),
                allowed=((7, 8), (3,), None),
                reward=1 / 3,
                new_sequence=True,
                info={
                    "score": 0.5,
                    "valid": True,
                    "task_type": "look",
                    "state_key": None,
                    "deep": {"a": [1, "ü"]},
                },
            ),
            Turn("", "", action_ids=(1,), valid=False, trainable=False, finish="length", policy_version=7),
            Turn("", "", action_ids=(1, 2), policy_version=7, policy_versions=(7, 8)),
            Turn("", "", action_ids=(1, 2), temperature=0.7, temperatures=(0.7, 1.2)),
        ),
        stop=StopReason.TRUNCATED,
        success=True,
        task_type="look",
        parent=BranchPoint("e0", 2, 1),
        final_observation="ende…",
    ),
    Episode("same", "x", "t", 0, (), StopReason.WORKER_ERROR, error="TimeoutError: 30 s"),
    Episode("same", "x", "t", 1, (), StopReason.ENV_ERROR, error=""),
    Episode("same", "x", "t", 1, (Turn("o", "a"),), StopReason.TERMINATED),
]


def test_episodes_come_back_equal_in_every_field(tmp_path: Path):
    write_episodes(tmp_path / "episodes.parquet", EPISODES)
    assert read_episodes(tmp_path / "episodes.parquet") == EPISODES


def test_no_episodes_come_back_as_none(tmp_path: Path):
    write_episodes(tmp_path / "none.parquet", [])
    assert read_episodes(tmp_path / "none.parquet") == []


def test_the_file_has_one_row_per_turn_for_any_parquet_reader(tmp_path: Path):
    write_episodes(tmp_path / "episodes.parquet", EPISODES)
    table = pq.read_table(tmp_path / "episodes.parquet")
    assert table.column("turn").to_pylist() == [0, 1, 2, 3, None, None, 0]
    assert table.column("action_ids").to_pylist()[0] == [7, 3, 2]
    assert json.loads(table.column("info").to_pylist()[0])["score"] == 0.5


def test_a_file_in_a_folder_that_looks_like_a_partition_is_read_alone(tmp_path: Path):
    folder = tmp_path / "seed=1"
    folder.mkdir()
    write_episodes(folder / "episodes.parquet", EPISODES)
    assert read_episodes(folder / "episodes.parquet") == EPISODES


@pytest.mark.parametrize("damage", [lambda data: data[:-50], lambda data: b"", lambda data: b"PAR1" * 20])
def test_a_damaged_file_is_named(tmp_path: Path, damage):
    path = tmp_path / "episodes.parquet"
    write_episodes(path, EPISODES)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=r"episodes\.parquet: not a readable file of episodes"):
        read_episodes(path)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"absent\.parquet"):
        read_episodes(tmp_path / "absent.parquet")


def test_another_schema_version_is_refused_with_both_versions(tmp_path: Path):
    path = tmp_path / "episodes.parquet"
    write_episodes(path, EPISODES)
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({b"agentrl.episodes": b"99"}), path)
    with pytest.raises(CheckpointError, match=f"schema version 99, wanted {VERSION}"):
        read_episodes(path)


def test_a_file_from_before_tokens_had_versions_is_read(tmp_path: Path):
    path = tmp_path / "episodes.parquet"
    write_episodes(path, EPISODES[1:])
    table = pq.read_table(path).drop_columns(["policy_versions"])
    pq.write_table(table.replace_schema_metadata({b"agentrl.episodes": b"1"}), path)
    assert read_episodes(path) == EPISODES[1:]


def test_a_file_from_before_temperatures_were_recorded_is_read(tmp_path: Path):
    path = tmp_path / "episodes.parquet"
    write_episodes(path, EPISODES[1:])
    table = pq.read_table(path).drop_columns(["temperature", "temperatures"])
    pq.write_table(table.replace_schema_metadata({b"agentrl.episodes": b"2"}), path)
    read = read_episodes(path)
    assert read == EPISODES[1:]
    assert read[-1].turns[0].temperature is None


def test_the_file_is_put_in_place_in_one_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "episodes.parquet"
    write_episodes(path, EPISODES)

    def interrupted(source, target):
        assert len(read_episodes(source)) == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_episodes(path, EPISODES[:1])
    assert read_episodes(path) == EPISODES
    assert [file.name for file in tmp_path.iterdir()] == ["episodes.parquet"]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "episodes.parquet"
    write_episodes(path, EPISODES)

    def full_disk(table, where, **kwargs):
        Path(where).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full_disk)
    with pytest.raises(CheckpointError, match=r"episodes\.parquet: cannot be written \(No space left"):
        write_episodes(path, EPISODES[:1])
    assert [file.name for file in tmp_path.iterdir()] == ["episodes.parquet"]
    assert read_episodes(path) == EPISODES
