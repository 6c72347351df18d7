"""Fixed sets of tasks that scores are compared on, pinned by the content of each task."""

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
    """Tasks of one environment, with the SHA-256 of each one's content.

    Example: Panel("agentrl/ALFWorld-v0", "valid_unseen", ("valid_unseen-0",), ("9f86d0…",))

    Args:
        env: environment id.
        split: where the tasks are from.
        tasks: task ids, in the order in which they are played; no two equal.
        hashes: the environment's `task_hash` of each.
        env_kwargs: arguments that made the environment; JSON values.
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
                    raise PanelError(f"Panel.{name}: what is named there {fault}") from fault
        if len(set(self.tasks)) != len(self.tasks):
            raise PanelError("Panel.tasks names a task twice")
        _canonical(self.env_kwargs)

    @property
    def hash(self) -> str:
        """SHA-256 over environment, arguments, split and the (task, content) pairs, whatever their order."""
        pairs = sorted(zip(self.tasks, self.hashes, strict=True))
        text = _canonical([self.env, self.env_kwargs, self.split, pairs])
        return hashlib.sha256(text.encode()).hexdigest()

    def first(self, count: int) -> "Panel":
        """The panel of the first `count` tasks, with a hash of its own."""
        if not 1 <= count <= len(self.tasks):
            raise PanelError(f"asked for the first {count} tasks of a panel of {len(self.tasks)}")
        return replace(self, tasks=self.tasks[:count], hashes=self.hashes[:count])

    def save(self, path: str | Path) -> None:
        """Write the panel as JSON, one task a line; a file that is there is replaced whole or not at all."""
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, self._json())
        except (OSError, CheckpointError) as error:
            raise PanelError(f"panel {path} cannot be written: {error}") from error

    def _json(self) -> str:
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
    """Fix the first `tasks` tasks of a split.

    Args:
        env: environment id.
        split: one of the environment's splits.
        tasks: how many.
        env_kwargs: arguments that say what the tasks are; leave out what only concerns who plays them.
        environment: one that was made with them; None makes one.

    Raises:
        ConfigError: the environment, the split or an argument is unknown.
        PanelError: the split has fewer tasks.
    """
    if tasks < 1:
        raise PanelError(f"a panel of {tasks} tasks was asked for, wanted at least 1")
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
    """Read a panel.

    Raises:
        PanelError: the file cannot be read, is no panel, or was edited: its tasks no longer have its hash.
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
            f"panel {path} says that its hash is {tree['hash']}, but its content has {panel.hash}: "
            "it was edited; make it anew instead"
        )
    return panel


def verify(panel: Panel, environment: gymnasium.Env[str, str] | None = None) -> None:
    """Generate the panel's tasks again and refuse it unless every one has the content it was made with.

    Args:
        panel: to be verified.
        environment: where its tasks are from; None makes one from the panel.

    Raises:
        ConfigError: the panel's environment is unknown here.
        PanelError: a task is gone or has other content.
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
            raise PanelError(f"task {task!r} of the panel is not in {panel.env} any more: {error}") from error
        if found != expected:
            changed.append(task)
    if changed:
        raise PanelError(
            f"{len(changed)} of the panel's {len(panel.tasks)} tasks have other content in this version of "
            f"{panel.env}, first {changed[0]!r}: scores on it could not be compared; make a new panel"
        )


def _format_fault(tree: Any) -> str | None:
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        return f"is not a file of the format {FORMAT!r}"
    for key, kind in (("env", str), ("split", str), ("hash", str), ("tasks", dict), ("env_kwargs", dict)):
        if not isinstance(tree.get(key), kind):
            return f"has no {key!r}, or one that is no {kind.__name__}"
    if not all(isinstance(content, str) for content in tree["tasks"].values()):
        return "has a task whose hash is no str"
    return None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"it names {next(key for key in keys if keys.count(key) > 1)!r} twice")
    return tree


def _canonical(value: Any) -> str:
    try:
        text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        text.encode()
        return text
    except (TypeError, ValueError, RecursionError) as error:
        raise PanelError(f"Panel.env_kwargs must be JSON values: {error}") from error
