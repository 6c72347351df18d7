"""Atomic checkpoints: a folder appears complete or not at all, and is verified before it is loaded."""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn

from agentrl.errors import CheckpointError, NonFiniteError
from agentrl.files import begin_folder, finish_folder, link_or_copy, remove_folder
from agentrl.learn.learner import Learner
from agentrl.learn.lora import adapter_weights, load_adapter_weights
from agentrl.learn.ranks import ALONE, Ranks
from agentrl.policy.precision import named_in_short
from agentrl.run.adapter import Base, read_adapter_weights, write_adapter
from agentrl.run.checkpoint_files import (
    ADAPTER,
    REFERENCE,
    REFERENCE_SHARDS,
    REWARD_MODEL,
    REWARD_MODEL_SHARDS,
    SHARDS,
    WEIGHTS,
    has_adapter,
    non_finite_tensors,
    read_state,
    sha256,
    verify_hashes,
)
from agentrl.run.records import CHECKPOINT_FORMAT, read_hashes, read_progress


@dataclass(frozen=True)
class Saved:
    """A checkpoint that shares files with the next one.

    Args:
        path: The checkpoint.
        updates: `Learner.updates` as it was when the checkpoint was written or loaded.
    """

    path: Path
    updates: int


@dataclass(frozen=True)
class Progress:
    """Progress of a run; together with the seed it determines every later random draw.

    Args:
        stage: The stage, `warm_start` or `train`.
        step: The number of completed steps of that stage.
        history: The past values of each logged metric, one per training step that logged it.
        tasks_drawn: The number of training tasks played so far.
    """

    stage: str
    step: int
    history: Mapping[str, list[float]] = field(default_factory=dict)
    tasks_drawn: int = 0


def save_checkpoint(
    folder: Path,
    progress: Progress,
    learner: Learner,
    states: Mapping[str, Any] | None = None,
    score: float | None = None,
    ranks: Ranks = ALONE,
    *,
    between: bool = False,
    keep: int | None = 2,
    earlier: Saved | None = None,
    base: Base | None = None,
) -> Path:
    """Write the checkpoint `folder/STAGE-STEP` and remove outdated ones.

    The last `keep` checkpoints and the one of the highest `score` are kept. A checkpoint written because of a
    stop (`between`) is kept only until the next one, so that a stopped and resumed run leaves the same
    checkpoints as an uninterrupted one. With several ranks on a shared file system, each rank writes its
    shards and the first one everything else. Weights are written in float32, whatever `policy.dtype` is, so
    that a resumed run continues from exactly what was learned.

    Files whose content is that of an earlier checkpoint are hard links to its files: the reference policy,
    and the weights if no optimiser step was taken since. With LoRA, the frozen weights are not written.

    Args:
        folder: The folder of the run's checkpoints.
        progress: The progress of the run.
        learner: The learner with its policy.
        states: The states of the algorithm's stateful components by name.
        score: The score of the policy.
        ranks: The ranks that call this function together.
        between: Whether the run would not have written this checkpoint without a stop.
        keep: The number of newest checkpoints to keep; None keeps all.
        earlier: The checkpoint of the same stage that the learner was last saved to or loaded from.
        base: With LoRA, the frozen weights that the adapters are added to.

    Returns:
        The path of the checkpoint.

    Raises:
        CheckpointError: If it cannot be written, as on a full disk; older checkpoints are left untouched.
        NonFiniteError: If weights or optimizer states are not finite; nothing is written.
    """
    target = folder / f"{progress.stage}-{progress.step:06d}"
    sharded, adapted = learner.config.backend == "fsdp", learner.config.lora is not None
    lost = learner.non_finite()
    adapters = adapter_weights(learner.policy) if adapted else {}
    shared = ranks.run_on_rank0(lambda: _unchanged_files(learner, earlier))
    has_reference = learner.reference is not None and not adapted  # with adapters, the base is the reference

    def begin() -> Path:
        if lost:
            raise NonFiniteError(
                f"{target}: not written, because nan or inf is in {named_in_short(lost)}; "
                f"{_resume_hint(folder)}"
            )
        with _saving(target):
            folder.mkdir(exist_ok=True)
            partial = begin_folder(target)
        with _saving(target, partial):
            for name, source in shared.items():
                (partial / name).parent.mkdir(exist_ok=True)
                link_or_copy(source, partial / name)
            if not sharded and not adapted and WEIGHTS not in shared:
                save_model(learner.policy, str(partial / WEIGHTS))
            if not sharded and has_reference and REFERENCE not in shared:
                save_model(cast(nn.Module, learner.reference), str(partial / REFERENCE))
            if not sharded and learner.reward_model is not None:
                save_model(learner.reward_model, str(partial / REWARD_MODEL))
            if learner.config.lora is not None:
                assert base is not None
                (partial / ADAPTER).mkdir()
                write_adapter(
                    partial / ADAPTER, learner.policy, learner.config.lora, adapters, base, folder.parent
                )
            own = dict(states or {})
            # The replay's state has a place of its own, as in the checkpoints of older versions.
            stored = {"replay": own.pop("replay", None), "stateful": own}
            torch.save(learner.state_dict() | stored, partial / "learner.pt")
            record = asdict(progress) | {"score": score, "between": between, "format": CHECKPOINT_FORMAT}
            (partial / "progress.json").write_text(json.dumps(record), encoding="utf-8")
        return partial

    def finish() -> None:
        with _saving(target, partial):
            files = sorted(file for file in partial.rglob("*") if file.is_file())
            known = {} if earlier is None or not shared else read_hashes(earlier.path)
            names = {str(file.relative_to(partial)): file for file in files}
            hashes = {name: known[name] if name in shared else sha256(file) for name, file in names.items()}
            (partial / "hashes.json").write_text(json.dumps(hashes, indent=1), encoding="utf-8")
            finish_folder(partial, target)
        _rotate(folder, keep)

    partial = ranks.run_on_rank0(begin)
    if sharded:
        with _saving(target, partial):
            if not any(name.startswith(f"{SHARDS}/") for name in shared):
                learner.write_shards(partial / SHARDS)
            if has_reference and not any(name.startswith(f"{REFERENCE_SHARDS}/") for name in shared):
                learner.write_reference(partial / REFERENCE_SHARDS)
            if learner.reward_model is not None:
                learner.write_reward_model(partial / REWARD_MODEL_SHARDS)
    ranks.run_on_rank0(finish)
    return target


def _unchanged_files(learner: Learner, earlier: Saved | None) -> dict[str, Path]:
    """Return the large files of an earlier checkpoint that the next one would only repeat, by name."""
    if earlier is None or not (earlier.path / "hashes.json").is_file():
        return {}
    same_weights = earlier.updates == learner.updates
    wanted = [WEIGHTS, SHARDS] * same_weights + [REFERENCE, REFERENCE_SHARDS]
    # Adapters are small; a checkpoint of an older version holds them in a file of all weights.
    return {
        name: earlier.path / name
        for name in read_hashes(earlier.path)
        if name.partition("/")[0] in wanted and (earlier.path / name).is_file()
    }


@contextmanager
def _saving(target: Path, partial: Path | None = None) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, CheckpointError) as error:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"{target}: the checkpoint could not be saved ({error}); free some disk space and continue with "
            "--resume. Older checkpoints are unaffected"
        ) from error


def load_progress(path: Path, ranks: Ranks = ALONE) -> Progress:
    """Verify a checkpoint and return its progress.

    Raises:
        CheckpointError: If a file of the checkpoint is missing or was changed, or not all values are finite.
    """
    ranks.run_on_rank0(lambda: _check_checkpoint(path))
    stored = read_progress(path)
    return Progress(**{item.name: stored[item.name] for item in fields(Progress)})


def load_learner(path: Path, learner: Learner) -> dict[str, Any]:
    """Restore the weights and state of a learner, for any number of ranks.

    Returns:
        The states of the algorithm's stateful components by name.

    Raises:
        CheckpointError: If the checkpoint does not fit the learner.
    """
    state = read_state(path)
    adapted = has_adapter(path)
    try:
        if learner.config.backend == "fsdp":
            # Older versions wrote the frozen weights and the reference with the others.
            apart = adapted or (path / REFERENCE_SHARDS).is_dir()
            learner.read_shards(path / SHARDS, state, whole=not apart)
            if (path / REFERENCE_SHARDS).is_dir():
                learner.read_reference(path / REFERENCE_SHARDS)
            if (path / REWARD_MODEL_SHARDS).is_dir():
                learner.read_reward_model(path / REWARD_MODEL_SHARDS, state)
        else:
            if not adapted:
                load_model(learner.policy, str(path / WEIGHTS))
            if (path / REFERENCE).exists():
                load_model(cast(nn.Module, learner.reference), str(path / REFERENCE))
            learner.load_state_dict(state)
            if learner.reward_model is not None:
                load_model(learner.reward_model, str(path / REWARD_MODEL))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{path}: its weights do not fit this policy ({error})") from error
    if adapted:
        try:
            load_adapter_weights(learner.policy, read_adapter_weights(path / ADAPTER))
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error
    replay = {} if state["replay"] is None else {"replay": state["replay"]}
    return {**replay, **state.get("stateful", {})}  # older versions had a replay only


def checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in a folder, oldest first."""
    return sorted(_checkpoints(folder), key=_order)


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint; those of training are newer than those of the warm start."""
    return next(reversed(checkpoints(folder)), None)


def latest_finite(folder: Path) -> Path | None:
    """Return the newest complete checkpoint without nan or inf, or None."""
    for path in reversed(checkpoints(folder)):
        with suppress(CheckpointError):
            verify_hashes(path)
            if not non_finite_tensors(path):
                return path
    return None


def _resume_hint(folder: Path) -> str:
    good = latest_finite(folder)
    if good is None:
        return "no checkpoint there is finite: start a new run with a lower learning rate"
    return f"the newest finite checkpoint is {good.name}"


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*-[0-9]*") if re.fullmatch(r"(warm_start|train)-\d+", path.name)]


def _order(path: Path) -> tuple[bool, int]:
    stage, _, step = path.name.rpartition("-")
    return stage == "train", int(step)


def _rotate(folder: Path, keep: int | None) -> None:
    ordered = checkpoints(folder)
    progress = {path: _stored_progress(path) for path in ordered}
    regular = [path for path in ordered if not progress[path].get("between")]
    scored = [(score, path) for path in regular if (score := progress[path].get("score")) is not None]
    newest = regular if keep is None else regular[-keep:]
    kept = {*newest, *ordered[-1:], *([max(scored)[1]] if scored else [])}
    for path in ordered:
        if path not in kept:
            remove_folder(path)


def _stored_progress(path: Path) -> Mapping[str, Any]:
    """Read the progress of a checkpoint; empty if a kill left it half removed."""
    try:
        return read_progress(path)
    except CheckpointError:
        return {}


def _check_checkpoint(path: Path) -> None:
    """Refuse a damaged or non-finite checkpoint."""
    verify_hashes(path)
    if lost := non_finite_tensors(path):
        raise CheckpointError(
            f"{path}: nan or inf is in {named_in_short(lost)}; {_resume_hint(path.parent)}. "
            "Remove the newer checkpoints to resume from it"
        )
