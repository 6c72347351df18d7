"""Complete, atomic checkpoints: a folder appears whole or not at all, and is verified before it is used."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn

from agentrl.errors import CheckpointError


@dataclass(frozen=True)
class Progress:
    """How far a run has come; together with the seed it fixes every later draw.

    Args:
        stage: `warm_start` or `train`.
        step: completed steps of that stage.
        history: past values of each logged scalar, one per training step that logged it.
        tasks_drawn: training tasks played so far.
    """

    stage: str
    step: int
    history: Mapping[str, list[float]] = field(default_factory=dict)
    tasks_drawn: int = 0


def save_checkpoint(
    folder: Path,
    progress: Progress,
    model: nn.Module,
    learner_state: dict[str, Any],
    score: float | None = None,
) -> Path:
    """Write `folder/STAGE-STEP`; an interrupted or failed write leaves what was there before.

    Keeps the last two and the one of the highest `score`.

    Raises:
        CheckpointError: when it cannot be written, as on a full disk; what was there before is untouched.
    """
    target = folder / f"{progress.stage}-{progress.step:06d}"
    partial = target.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        save_model(model, str(partial / "weights.safetensors"))
        torch.save(learner_state, partial / "learner.pt")
        (partial / "progress.json").write_text(json.dumps(asdict(progress) | {"score": score}))
        hashes = {file.name: _sha256(file) for file in sorted(partial.iterdir())}
        (partial / "hashes.json").write_text(json.dumps(hashes, indent=1))
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"{target}: the checkpoint could not be saved ({error}); make room and continue with --resume. "
            "Those before it are unharmed"
        ) from error
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    _rotate(folder)
    return target


def load_checkpoint(path: Path, model: nn.Module) -> tuple[Progress, dict[str, Any]]:
    """Load weights into `model`; return the progress and the learner's state.

    Raises:
        CheckpointError: when a file is missing or its content is not what was written.
    """
    _verify(path)
    try:
        load_model(model, str(path / "weights.safetensors"))
    except RuntimeError as error:
        raise CheckpointError(f"{path}: its weights do not fit this policy ({error})") from error
    stored = json.loads((path / "progress.json").read_text())
    stored.pop("score")
    state = torch.load(path / "learner.pt", weights_only=True)
    return Progress(**stored), state


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint: training comes after the warm start."""
    return max(_checkpoints(folder), key=_order, default=None)


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*-[0-9]*") if path.suffix != ".partial"]


def _order(path: Path) -> tuple[bool, int]:
    stage, _, step = path.name.rpartition("-")
    return stage == "train", int(step)


def _rotate(folder: Path) -> None:
    ordered = sorted(_checkpoints(folder), key=_order)
    scored = [(score, path) for path in ordered if (score := _score(path)) is not None]
    best = max(scored)[1] if scored else None
    for path in ordered[:-2]:
        if path != best:
            shutil.rmtree(path)


def _score(path: Path) -> float | None:
    score = json.loads((path / "progress.json").read_text()).get("score")
    return None if score is None else float(score)


def _verify(path: Path) -> None:
    try:
        hashes = json.loads((path / "hashes.json").read_text())
        wrong = [name for name, digest in hashes.items() if _sha256(path / name) != digest]
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: not a whole checkpoint ({error}); remove it to resume from an older one"
        ) from error
    if wrong:
        raise CheckpointError(
            f"{path}: {', '.join(wrong)} changed since written; remove it to resume from an older one"
        )


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
