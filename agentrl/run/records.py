"""Schemas of the JSON files in a run's folder, and functions that read and validate them."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, cast

from pydantic import Field, FiniteFloat, NonNegativeInt
from typing_extensions import TypedDict  # pydantic reads no other under Python 3.11

from agentrl.errors import CheckpointError
from agentrl.files import check_shape, read_json, write_atomic

CHECKPOINT_FORMAT = 2  # version of the checkpoints that are written; those of version 1 do not name it
SCHEMA = 2  # version of the folders that are written; those of version 1 do not name it

_OLDER_CHECKPOINT = "remove the checkpoint to resume from an older one"

_Interval = Annotated[list[FiniteFloat], Field(min_length=2, max_length=2)]


class _Rate(TypedDict):
    success_rate: FiniteFloat | None
    interval: _Interval
    episodes: NonNegativeInt


class _Entropy(TypedDict, total=False):
    token: FiniteFloat | None
    turn: FiniteFloat | None
    trajectory: FiniteFloat | None
    by_turn: list[FiniteFloat]


class _Score(_Rate):
    by_task_type: dict[str, _Rate]
    aborted: NotRequired[NonNegativeInt]
    aborted_reasons: NotRequired[dict[str, NonNegativeInt]]
    mean_return: NotRequired[float | None]
    mean_turns: NotRequired[FiniteFloat | None]
    stop_reasons: NotRequired[dict[str, NonNegativeInt]]
    entropy: NotRequired[_Entropy]
    panel_hash: NotRequired[str]
    data: NotRequired[str | None]
    repeats: NotRequired[NonNegativeInt]
    retried: NotRequired[NonNegativeInt]


class _Check(TypedDict):
    new_goal: _Rate
    old_goal: _Rate


_Policies = dict[str, dict[str, _Score]]
_Seconds = dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]]


class _Results(TypedDict):
    policies: _Policies
    env: NotRequired[str]
    data: NotRequired[str | None]
    instruction_check: NotRequired[dict[str, _Check] | None]
    panel: NotRequired[dict[str, Any]]


class _Summary(TypedDict):
    policies: NotRequired[_Policies]
    environments: NotRequired[dict[str, _Results]]
    env: NotRequired[str]
    algorithm: NotRequired[str]
    data: NotRequired[str | None]
    instruction_check: NotRequired[dict[str, _Check] | None]
    panel: NotRequired[dict[str, Any]]
    times: NotRequired[_Seconds]


class _Manifest(TypedDict, total=False):
    schema: NonNegativeInt
    versions: dict[str, str]
    prompt: dict[str, Any]
    seed: int
    placement: str | None
    model: dict[str, Any]
    teacher: dict[str, Any]


class _Progress(TypedDict):
    stage: Literal["warm_start", "train"]
    step: NonNegativeInt
    history: dict[str, list[float]]
    tasks_drawn: NonNegativeInt
    score: NotRequired[FiniteFloat | None]
    between: NotRequired[bool]
    format: NotRequired[NonNegativeInt]


def read_summary(folder: Path) -> dict[str, Any]:
    """Read the results of a run; empty until it has finished."""
    path = folder / "summary.json"
    if not _exists(path):
        return {}
    return _read_dict(path, _Summary, f"delete it, and `agentrl train --resume {folder}` writes it again")


def read_evaluations(folder: Path, environment: str | None = None) -> dict[str, Any]:
    """Read the scores so far, by policy and decoding; empty before the first evaluation.

    Args:
        folder: The folder of the run.
        environment: The name of one of several environments.
    """
    path, remedy = folder / "evaluations.json", "restore it from a copy, or start a new run"
    if not _exists(path):
        return {}
    tree = _read_dict(path, dict[str, dict[str, Any]], remedy)
    if environment is not None:
        tree = tree.get(environment, {})
        check_shape(path, tree, dict[str, dict[str, Any]], remedy)
    policies = {name: found for name, found in tree.items() if name != "instruction_check"}
    check_shape(path, policies, _Policies, remedy)
    check_shape(path, tree.get("instruction_check", {}), dict[str, _Check], remedy)
    return tree


def write_evaluations(folder: Path, scores: dict[str, Any], environment: str | None = None) -> None:
    """Write the scores by policy and decoding, of a single environment or one of several.

    Raises:
        CheckpointError: If the file cannot be written.
    """
    path = folder / "evaluations.json"
    if environment is not None:
        others = _read_dict(path, dict[str, Any], "restore it from a copy") if _exists(path) else {}
        scores = others | {environment: scores}
    write_atomic(path, json.dumps(scores, indent=1))


def read_timers(path: Path) -> dict[str, float]:
    """Read the seconds of each activity; empty if there is no file yet."""
    if not _exists(path):
        return {}
    return _read_dict(path, _Seconds, "delete it to restart the timers; nothing else depends on it")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Read what a run was made with; None if it has no manifest, as after moving files by hand."""
    path = folder / "manifest.json"
    if not _exists(path):
        return None
    return _read_dict(path, _Manifest, "restore it, or delete it: it records what the run was made with")


def read_progress(checkpoint: Path) -> dict[str, Any]:
    """Read the progress of a checkpoint."""
    found = _read_dict(checkpoint / "progress.json", _Progress, _OLDER_CHECKPOINT)
    if (version := found.get("format", 1)) > CHECKPOINT_FORMAT:
        raise CheckpointError(
            f"{checkpoint}: written by a newer agentrl (format {version}; this version reads up to "
            f"{CHECKPOINT_FORMAT}); install the version that wrote it, or a later one"
        )
    return found


def read_hashes(checkpoint: Path) -> dict[str, str]:
    """Read the digest of each file of a checkpoint."""
    shape = Annotated[dict[str, str], Field(min_length=1)]
    return _read_dict(checkpoint / "hashes.json", shape, _OLDER_CHECKPOINT)


def _read_dict(path: Path, shape: Any, remedy: str) -> dict[str, Any]:
    return cast(dict[str, Any], read_json(path, shape, remedy))


def _exists(path: Path) -> bool:
    """Return whether the path exists, also as a folder or a dangling link, which cannot be read."""
    return path.exists() or path.is_symlink()
