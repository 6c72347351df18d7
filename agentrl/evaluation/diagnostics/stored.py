"""Policies and episodes that a run has stored, for diagnostics that play nothing."""

import re
from dataclasses import dataclass
from pathlib import Path

from agentrl.data.storage import read_episodes
from agentrl.data.trajectory import Episode
from agentrl.errors import CheckpointError
from agentrl.run.checkpoint import checkpoints
from agentrl.run.folder import Run
from agentrl.run.weights import SavedPolicy, find_policy, named_checkpoint


@dataclass(frozen=True)
class StoredPolicy:
    """Weights of a run.

    Args:
        name: The name of the checkpoint, or `trained`.
        step: The step of reinforcement learning that they were saved after.
        saved: The weights.
    """

    name: str
    step: int
    saved: SavedPolicy


def stored_policies(run: Run, checkpoint: str | None = None) -> list[StoredPolicy]:
    """Return the checkpoints of training, oldest first, and the policy of a finished run if none holds it.

    Args:
        run: The run.
        checkpoint: The name or training step of a single checkpoint; None for all.

    Raises:
        CheckpointError: If there is none.
    """
    if checkpoint is not None:
        saved = named_checkpoint(run, checkpoint)
        assert saved.checkpoint is not None
        return [StoredPolicy(saved.checkpoint.name, _step(saved.checkpoint), saved)]
    found = [
        StoredPolicy(path.name, _step(path), SavedPolicy(run, path, asked=True))
        for path in checkpoints(run.checkpoints)
        if path.name.startswith("train-")
    ]
    last = run.config.trainer.steps
    if not found or (_finished(run) and found[-1].step != last):
        found.append(trained_policy(run))
    return found


def trained_policy(run: Run, checkpoint: str | None = None) -> StoredPolicy:
    """Return one policy of a run: the checkpoint of that name, else what it learned, else the newest.

    Raises:
        CheckpointError: If there is none.
    """
    if checkpoint is not None:
        return stored_policies(run, checkpoint)[0]
    saved = find_policy(str(run.folder))
    assert saved is not None
    if saved.checkpoint is None:
        return StoredPolicy("trained", run.config.trainer.steps, saved)
    return StoredPolicy(saved.checkpoint.name, _step(saved.checkpoint), saved)


def panel_episodes(run: Run) -> tuple[Path, list[Episode]]:
    """Return the sampled episodes of the trained policy on the panel of its run, without aborted ones.

    Raises:
        CheckpointError: If the run has not stored them.
    """
    path = run.folder / "episodes" / "trained-sampled.parquet"
    if not path.is_file():
        raise CheckpointError(
            f"{path}: missing; a run stores these episodes when it finishes, "
            f"by agentrl train --resume {run.folder}"
        )
    return path, _finished_episodes([path])


def episodes_near(run: Run, step: int) -> tuple[str, list[Episode]]:
    """Return the stored rollout whose step is nearest, else the trained policy's episodes on the panel.

    Raises:
        CheckpointError: If the run has stored neither.
    """
    folder = run.folder / "episodes"
    rollouts = sorted(folder.glob("train-*.parquet"), key=lambda path: (abs(_step(path) - step), path.name))
    files = rollouts[:1] or sorted(folder.glob("trained-sampled*.parquet"))
    if not files:
        raise CheckpointError(
            f"{folder}: holds no episodes of training; wanted a run with trainer.save_episodes_every above 0"
        )
    return ", ".join(path.name for path in files), _finished_episodes(files)


def _finished_episodes(files: list[Path]) -> list[Episode]:
    return [episode for path in files for episode in read_episodes(path) if not episode.stop.aborted]


def _finished(run: Run) -> bool:
    return run.model.is_dir() or run.adapter.is_dir()


def _step(path: Path) -> int:
    found = re.search(r"-(\d+)$", path.stem)
    return int(found[1]) if found else 0
