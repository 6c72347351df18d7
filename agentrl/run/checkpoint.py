"""Complete, atomic checkpoints: a folder appears whole or not at all, and is verified before it is used."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model
from torch import Tensor

from agentrl.errors import CheckpointError, NonFiniteError
from agentrl.learn.learner import Learner
from agentrl.learn.ranks import ALONE, Ranks
from agentrl.learn.sharding import stored_shards
from agentrl.policy.precision import named_in_short, non_finite


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
    learner: Learner,
    memory: Mapping[str, Any] | None = None,
    score: float | None = None,
    ranks: Ranks = ALONE,
) -> Path:
    """Write `folder/STAGE-STEP`; an interrupted or failed write leaves what was there before.

    Keeps the last two and the one of the highest `score`. Of several ranks, which share the file system, each
    writes what it holds of a learner that is dealt out, and the first all else. Weights are float32, whatever
    the engine generates in, so that a resumed run goes on from exactly what was learned.

    Args:
        folder: of the run's checkpoints.
        progress: of the run.
        learner: with its policy.
        memory: of the algorithm's replay.
        score: of the policy.
        ranks: that call this together.

    Raises:
        CheckpointError: when it cannot be written, as on a full disk; what was there before is untouched.
        NonFiniteError: when weights or states are not finite; nothing is written.
    """
    target = folder / f"{progress.stage}-{progress.step:06d}"
    partial = target.with_suffix(".partial")
    sharded = learner.config.backend == "fsdp"
    lost = learner.non_finite()

    def begin() -> None:
        if lost:
            raise NonFiniteError(
                f"{target}: not written, for nan or inf is in {named_in_short(lost)}; "
                f"{_where_to_go_on(folder)}"
            )
        with _saving(target, partial):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            if not sharded:
                save_model(learner.policy, str(partial / "weights.safetensors"))
            torch.save(learner.state_dict() | {"replay": memory}, partial / "learner.pt")
            (partial / "progress.json").write_text(json.dumps(asdict(progress) | {"score": score}))

    def finish() -> None:
        with _saving(target, partial):
            files = sorted(file for file in partial.rglob("*") if file.is_file())
            hashes = {str(file.relative_to(partial)): _sha256(file) for file in files}
            (partial / "hashes.json").write_text(json.dumps(hashes, indent=1))
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        _rotate(folder)

    ranks.by_first(begin)
    if sharded:
        with _saving(target, partial):
            learner.write_shards(partial / "shards")
    ranks.by_first(finish)
    return target


@contextmanager
def _saving(target: Path, partial: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, CheckpointError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"{target}: the checkpoint could not be saved ({error}); make room and continue with --resume. "
            "Those before it are unharmed"
        ) from error


def load_progress(path: Path, ranks: Ranks = ALONE) -> Progress:
    """How far the run had come.

    Raises:
        CheckpointError: when a file of the checkpoint is missing, its content is not what was written, or
            not all of it is finite.
    """
    ranks.by_first(lambda: _check(path))
    stored = json.loads((path / "progress.json").read_text())
    stored.pop("score")
    return Progress(**stored)


def load_learner(path: Path, learner: Learner) -> Any:
    """Give a learner its weights and state back, whatever the number of ranks; what its replay remembers.

    Raises:
        CheckpointError: when they do not fit.
    """
    state = torch.load(path / "learner.pt", weights_only=True)
    if learner.config.backend == "fsdp":
        learner.read_shards(path / "shards", state)
    else:
        try:
            load_model(learner.policy, str(path / "weights.safetensors"))
        except RuntimeError as error:
            raise CheckpointError(f"{path}: its weights do not fit this policy ({error})") from error
        learner.load_state_dict(state)
    return state["replay"]


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint: training comes after the warm start."""
    return max(_checkpoints(folder), key=_order, default=None)


def latest_finite(folder: Path) -> Path | None:
    """The newest whole checkpoint that holds no nan or inf; they are read from the newest on."""
    for path in sorted(_checkpoints(folder), key=_order, reverse=True):
        with suppress(CheckpointError):
            _verify(path)
            if not _non_finite(path):
                return path
    return None


def _where_to_go_on(folder: Path) -> str:
    good = latest_finite(folder)
    if good is None:
        return "no checkpoint there is finite: start anew, at a lower learning rate"
    return f"the newest checkpoint that is finite is {good.name}"


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


def _check(path: Path) -> None:
    """Refuse what is damaged, and what a run cannot go on from."""
    _verify(path)
    if lost := _non_finite(path):
        raise CheckpointError(
            f"{path}: nan or inf is in {named_in_short(lost)}; {_where_to_go_on(path.parent)}. "
            "Remove those that came after it to resume from there"
        )


def _non_finite(path: Path) -> list[str]:
    """Names of the tensors of a checkpoint that hold nan or inf; they are read one by one."""
    return [name for tensor in _tensors(path) for name in non_finite([tensor])]


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Weights and states of a checkpoint by name; what a replay remembers is none of them."""
    if (path / "weights.safetensors").exists():
        with safe_open(path / "weights.safetensors", framework="pt") as weights:
            yield from ((name, weights.get_tensor(name)) for name in weights.keys())  # noqa: SIM118
    if (path / "shards").exists():
        yield from stored_shards(path / "shards")
    state = torch.load(path / "learner.pt", weights_only=True, mmap=True)
    yield from _within({name: value for name, value in state.items() if name != "replay"})


def _within(tree: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested containers, each by the path that leads to it."""
    if isinstance(tree, Tensor):
        yield name, tree
    elif isinstance(tree, Mapping | list | tuple):
        for key, value in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
            yield from _within(value, f"{name}.{key}".removeprefix("."))


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
