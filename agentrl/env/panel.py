"""Task panels: fixed sets of tasks that scores are compared on, identified by a hash of each task."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import gymnasium

from agentrl.env.containment import open_env
from agentrl.env.names import unknown
from agentrl.env.registry import make
from agentrl.errors import AgentRLError, CheckpointError, PanelError
from agentrl.files import write_atomic
from agentrl.values import ValueFaultError, as_text

FORMAT = "agentrl panel 1"


@dataclass(frozen=True)
class Panel:
    """Fixed list of tasks of one environment, with the SHA-256 of the content of each task.

    Example: Panel("agentrl/ALFWorld-v0", "valid_unseen", ("valid_unseen-0",), ("9f86d0…",))

    Args:
        env: The environment id.
        split: The split of the tasks.
        tasks: The distinct task ids, in the order of play.
        hashes: The `task_hash` of each task.
        env_kwargs: The arguments of the environment; JSON values.
    """

    env: str
    split: str
    tasks: tuple[str, ...]
    hashes: tuple[str, ...]
    env_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.tasks:
            raise PanelError("a panel needs at least one task")
        if len(self.tasks) != len(self.hashes):
            raise PanelError(
                f"Panel.hashes has {len(self.hashes)} entries, wanted {len(self.tasks)}, one per task"
            )
        for name, texts in (
            ("env", [self.env]),
            ("split", [self.split]),
            ("tasks", self.tasks),
            ("hashes", self.hashes),
        ):
            for text in texts:
                try:
                    as_text(text)
                except ValueFaultError as fault:
                    raise PanelError(f"Panel.{name}: a text {fault}") from fault
        if len(set(self.tasks)) != len(self.tasks):
            raise PanelError("Panel.tasks names a task twice")
        _canonical(self.env_kwargs)

    @property
    def hash(self) -> str:
        """Return the SHA-256 of environment, arguments, split and tasks, independent of the task order."""
        pairs = sorted(zip(self.tasks, self.hashes, strict=True))
        text = _canonical([self.env, self.env_kwargs, self.split, pairs])
        return hashlib.sha256(text.encode()).hexdigest()

    def first(self, count: int) -> "Panel":
        """Return the panel of the first `count` tasks."""
        if not 1 <= count <= len(self.tasks):
            raise PanelError(f"asked for the first {count} tasks of a panel of {len(self.tasks)}")
        return replace(self, tasks=self.tasks[:count], hashes=self.hashes[:count])

    def save(self, path: str | Path) -> None:
        """Write the panel as JSON, atomically."""
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, self._json())
        except (OSError, CheckpointError) as error:
            raise PanelError(f"panel {path} cannot be written: {error}") from error

    def _json(self) -> str:
        """Return the content of the panel file."""
        tree = {
            "format": FORMAT,
            "env": self.env,
            "env_kwargs": self.env_kwargs,
            "split": self.split,
            "hash": self.hash,
            "tasks": dict(zip(self.tasks, self.hashes, strict=True)),
        }
        return json.dumps(tree, indent=1, ensure_ascii=False) + "\n"


def make_panel(
    env: str,
    split: str,
    tasks: int,
    env_kwargs: Mapping[str, Any] | None = None,
    environment: gymnasium.Env[str, str] | None = None,
) -> Panel:
    """Return the panel of the first tasks of a split.

    Args:
        env: The environment id.
        split: A split of the environment.
        tasks: The number of tasks.
        env_kwargs: The arguments that determine the tasks, without those that only affect how they are
            played.
        environment: An environment made with these arguments; None makes one.

    Raises:
        ConfigError: The environment, the split or an argument is unknown.
        PanelError: The split has fewer tasks.
    """
    if tasks < 1:
        raise PanelError(f"a panel of {tasks} tasks was requested, wanted at least 1")
    if environment is None:
        with open_env(lambda: make(env, split=split, **(env_kwargs or {}))) as environment:
            return make_panel(env, split, tasks, env_kwargs, environment)
    known: Any = environment.unwrapped
    if split not in known.splits:
        raise unknown(f"split of {env}", split, known.splits)
    available = known.tasks(split)
    if tasks > len(available):
        raise PanelError(f"split {split!r} of {env} has {len(available)} tasks, wanted {tasks} for a panel")
    chosen = tuple(islice(available, tasks))
    return Panel(env, split, chosen, tuple(map(known.task_hash, chosen)), dict(env_kwargs or {}))


def load_panel(path: str | Path) -> Panel:
    """Read a panel from a file.

    Raises:
        PanelError: The file cannot be read, is not a panel, or was edited, so that its hash does not match.
    """
    try:
        tree = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_without_repeats)
    except OSError as error:
        raise PanelError(f"panel {path} cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise PanelError(f"panel {path} is not JSON: {error}") from error
    fault = _format_fault(tree)
    if fault is not None:
        raise PanelError(f"panel {path} {fault}")
    panel = Panel(
        tree["env"], tree["split"], tuple(tree["tasks"]), tuple(tree["tasks"].values()), tree["env_kwargs"]
    )
    if panel.hash != tree["hash"]:
        raise PanelError(
            f"panel {path} states the hash {tree['hash']}, but its content has {panel.hash}: "
            "it was edited; make a new panel instead"
        )
    return panel


def verify(panel: Panel, environment: gymnasium.Env[str, str] | None = None) -> None:
    """Check that every task of a panel still has the content it had when the panel was made.

    Args:
        panel: The panel to verify.
        environment: The environment of the tasks; None makes one.

    Raises:
        ConfigError: The environment of the panel is unknown.
        PanelError: A task no longer exists or has changed.
    """
    if environment is None:
        with open_env(lambda: make(panel.env, split=panel.split, **panel.env_kwargs)) as environment:
            verify(panel, environment)
        return
    known: Any = environment.unwrapped
    changed = []
    for task, expected in zip(panel.tasks, panel.hashes, strict=True):
        try:
            found = known.task_hash(task)
        except AgentRLError as error:
            raise PanelError(f"panel task {task!r} no longer exists in {panel.env}: {error}") from error
        if found != expected:
            changed.append(task)
    if changed:
        raise PanelError(
            f"{len(changed)} of the panel's {len(panel.tasks)} tasks have other content in this version of "
            f"{panel.env}, first {changed[0]!r}: scores would not be comparable; make a new panel"
        )


def _format_fault(tree: Any) -> str | None:
    """Return what is wrong with the structure of a panel file, or None."""
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        return f"is not a file of the format {FORMAT!r}"
    for key, kind in (("env", str), ("split", str), ("hash", str), ("tasks", dict), ("env_kwargs", dict)):
        if not isinstance(tree.get(key), kind):
            return f"has no {key!r}, or one that is not a {kind.__name__}"
    if not all(isinstance(content, str) for content in tree["tasks"].values()):
        return "has a task whose hash is not a str"
    return None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"it names {next(key for key in keys if keys.count(key) > 1)!r} twice")
    return tree


def _canonical(value: Any) -> str:
    """Return JSON with sorted keys and no white space, so that equal values have equal hashes."""
    try:
        text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        text.encode()
        return text
    except (TypeError, ValueError, RecursionError) as error:
        raise PanelError(f"Panel.env_kwargs must be JSON values: {error}") from error
