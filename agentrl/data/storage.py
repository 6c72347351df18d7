"""Episodes on disk as standard Parquet files with one row per turn."""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from agentrl.data.trajectory import BranchPoint, Episode, StopReason, Turn
from agentrl.errors import CheckpointError
from agentrl.files import replacing
from agentrl.values import ValueFaultError, as_json

VERSION = 3
_READABLE = {b"1", b"2", b"3"}  # 1 has no policy_versions, 1 and 2 have no temperatures
_VERSION_KEY = b"agentrl.episodes"

_IDS = pa.list_(pa.int32())
_EPISODE_COLUMNS = [
    ("number", pa.int32()),  # index of the episode in the file, since ids need not be unique
    ("episode", pa.string()),
    ("env", pa.string()),
    ("task", pa.string()),
    ("seed", pa.int64()),
    ("stop", pa.string()),
    ("success", pa.bool_()),
    ("error", pa.string()),
    ("task_type", pa.string()),
    ("parent", pa.string()),
    ("parent_turn", pa.int32()),
    ("parent_token", pa.int32()),
    ("final_observation", pa.string()),
]
_TURN_COLUMNS = [
    ("turn", pa.int32()),  # null in the single row of an episode that ended before its first turn
    ("observation", pa.string()),
    ("action", pa.string()),
    ("prompt_ids", _IDS),
    ("action_ids", _IDS),
    ("logprobs", pa.list_(pa.float64())),
    ("entropies", pa.list_(pa.float64())),
    ("allowed", pa.list_(_IDS)),
    ("reward", pa.float64()),
    ("fresh", pa.bool_()),
    ("valid", pa.bool_()),
    ("imitable", pa.bool_()),
    ("finish", pa.string()),
    ("policy_version", pa.int32()),
    ("policy_versions", pa.list_(pa.int32())),
    ("temperature", pa.float64()),
    ("temperatures", pa.list_(pa.float64())),
    ("info", pa.string()),  # JSON
]
# Column -> field of `Turn`, where the names differ.
_FIELDS = {"fresh": "new_sequence", "imitable": "trainable"}
SCHEMA = pa.schema(_EPISODE_COLUMNS + _TURN_COLUMNS, metadata={_VERSION_KEY: str(VERSION).encode()})


def write_episodes(path: str | Path, episodes: Sequence[Episode]) -> None:
    """Write episodes to a file atomically; an existing file is replaced only on success.

    Raises:
        CheckpointError: The folder is missing, the disk is full, or an episode contains a value that cannot
            be stored; the message names the file.
    """
    target = Path(path)
    try:
        rows = [row for number, episode in enumerate(episodes) for row in _rows(number, episode)]
        with replacing(target) as partial:
            pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), partial, compression="zstd")
    except OSError as error:
        raise CheckpointError(
            f"{target}: cannot be written ({error.strerror or error}); free some space or choose another "
            "folder. An existing file is unchanged"
        ) from error
    except (ValueFaultError, pa.ArrowException, ValueError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{target}: an episode cannot be stored: {error}") from error


def unpacked_bytes(path: str | Path) -> int:
    """Return the size of a file's content before compression, as the file declares it.

    Raises:
        CheckpointError: The file is missing or no Parquet file.
    """
    try:
        metadata = pq.ParquetFile(path).metadata
    except (OSError, pa.ArrowException) as error:
        raise CheckpointError(f"{path}: not a readable file of episodes ({error})") from error
    return sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))


def read_episodes(path: str | Path, *, turns: bool = True) -> list[Episode]:
    """Read the episodes written by `write_episodes`, equal in every field.

    Args:
        path: The file.
        turns: Whether to read the turns, which are nearly all of the file; else episodes have none.

    Raises:
        CheckpointError: The file is missing, damaged, or of another schema version; the message names it.
    """
    try:
        # Read as a single file: a Parquet dataset would infer columns from the names of parent folders.
        file = pq.ParquetFile(path)
        table = file.read() if turns else file.read(columns=[name for name, _ in _EPISODE_COLUMNS])
        version = (table.schema.metadata or {}).get(_VERSION_KEY)
        if version not in _READABLE:
            found = "none" if version is None else version.decode(errors="replace")
            raise CheckpointError(f"{path}: episode schema version {found}, wanted {VERSION}")
        rows = table.to_pylist()
        return [_episode(list(own)) for _, own in groupby(rows, key=lambda row: row["number"])]
    except (
        *(OSError, pa.ArrowException, KeyError, ValueError, TypeError, AttributeError),
        *(OverflowError, RecursionError),
    ) as error:
        raise CheckpointError(f"{path}: not a readable file of episodes ({error})") from error


def _rows(number: int, episode: Episode) -> Iterator[dict[str, Any]]:
    """Yield one row per turn, or a single row if the episode has no turn."""
    head = {
        "number": number,
        "episode": episode.id,
        "env": episode.env,
        "task": episode.task,
        "seed": episode.seed,
        "stop": episode.stop.value,
        "success": episode.success,
        "error": episode.error,
        "task_type": episode.task_type,
        "final_observation": episode.final_observation,
    }
    if episode.parent is not None:
        head |= {
            "parent": episode.parent.parent,
            "parent_turn": episode.parent.turn,
            "parent_token": episode.parent.token,
        }
    if not episode.turns:
        yield head
    for index, turn in enumerate(episode.turns):
        fields = {
            name: getattr(turn, _FIELDS.get(name, name))
            for name, _ in _TURN_COLUMNS
            if name not in ("turn", "info")
        }
        info = json.dumps(_info(episode, turn), ensure_ascii=False, allow_nan=False)
        yield head | fields | {"turn": index, "info": info}


def _info(episode: Episode, turn: Turn) -> Any:
    try:
        return as_json(turn.info)
    except ValueFaultError as fault:
        raise ValueFaultError(f"info of episode {episode.id!r} {fault}") from fault


def _episode(rows: Sequence[Mapping[str, Any]]) -> Episode:
    """Rebuild an episode from its rows."""
    head = rows[0]
    return Episode(
        id=head["episode"],
        env=head["env"],
        task=head["task"],
        seed=head["seed"],
        turns=tuple(_turn(row) for row in rows if row.get("turn") is not None),
        stop=StopReason(head["stop"]),
        success=head["success"],
        error=head["error"],
        task_type=head["task_type"],
        parent=None
        if head["parent"] is None
        else BranchPoint(head["parent"], head["parent_turn"], head["parent_token"]),
        final_observation=head["final_observation"],
    )


def _turn(row: Mapping[str, Any]) -> Turn:
    """Rebuild a turn from its row; columns missing in older files take empty values."""
    fields: dict[str, Any] = {
        _FIELDS.get(name, name): row.get(name) for name, _ in _TURN_COLUMNS if name != "turn"
    }
    for name in ("prompt_ids", "action_ids", "logprobs", "entropies", "policy_versions", "temperatures"):
        fields[name] = tuple(fields[name] or ())
    if fields["allowed"] is not None:
        fields["allowed"] = tuple(None if ids is None else tuple(ids) for ids in fields["allowed"])
    fields["info"] = json.loads(fields["info"])
    return Turn(**fields)
