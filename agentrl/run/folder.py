"""Folder of a run: create it, open it, and note how its prompts were written."""

import errno
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentrl.config import read_yaml
from agentrl.env.settings import EnvConfig
from agentrl.errors import CheckpointError, ConfigError
from agentrl.files import replacing_folder, write_atomic
from agentrl.plugins import import_hashes, withhold
from agentrl.run.config_files import ConfigFile, with_origins
from agentrl.run.records import SCHEMA, read_manifest, read_summary
from agentrl.run.settings import (
    RunConfig,
    config_from_tree,
    config_yaml,
)

if TYPE_CHECKING:  # loads transformers
    from agentrl.policy.dialogue import Wording


@dataclass(frozen=True)
class Run:
    """Run on disk, as `train` returns it and `evaluate` takes it."""

    folder: Path
    config: RunConfig

    @property
    def model(self) -> Path:
        """Return the Hugging Face folder of the trained policy, unless that is adapters."""
        return self.folder / "model"

    @property
    def adapter(self) -> Path:
        """Return the peft folder of the trained adapters, which a run with LoRA has instead of `model`."""
        return self.folder / "adapter"

    @property
    def checkpoints(self) -> Path:
        """Return the folder of the checkpoints."""
        return self.folder / "checkpoints"

    @property
    def summary(self) -> dict[str, Any]:
        """Return the results of the run; empty until it has finished."""
        return read_summary(self.folder)


def evaluated_episodes(folder: Path, policy: str, decoding: str, environment: str | None = None) -> Path:
    """Return the file of the episodes that a policy of a run has played on the held-out panel.

    Args:
        folder: The folder of the run.
        policy: The name of the policy, such as `trained`.
        decoding: `greedy` or `sampled`.
        environment: The name of one of several environments.
    """
    of_environment = "" if environment is None else f"-{environment}"
    return folder / "episodes" / f"{policy}-{decoding}{of_environment}.parquet"


def create_run(config: RunConfig, **measured: Any) -> Run:
    """Create the run's folder with the resolved configuration and the manifest.

    Args:
        config: The configuration of the run.
        measured: Further JSON values for the manifest.

    Raises:
        ConfigError: If `run.name` is invalid or taken, or the folder cannot be created.
    """
    parent, manifest = Path(config.run.folder), _manifest(config) | measured
    if config.run.name is not None:
        name = config.run.name
        if not re.fullmatch(r"[\w.-]+", name):
            raise ConfigError(f"run.name is {name!r}, wanted letters, digits, '-', '_' and '.' only")
        if not _create(parent / name, config, manifest):
            raise ConfigError(
                f"run.name is {name!r}, but {parent / name} exists; "
                f"resume it (agentrl train --resume {parent / name}) or choose another"
            )
        return Run(parent / name, config)
    folders = (parent / name for name in _unused_names(parent, config))
    return Run(next(folder for folder in folders if _create(folder, config, manifest)), config)


def _create(folder: Path, config: RunConfig, manifest: Mapping[str, Any]) -> bool:
    """Create a run's folder with everything a resume needs; return False if its name is taken."""
    if os.path.lexists(folder):
        return False
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with replacing_folder(folder, over=False) as partial:
            (partial / "episodes").mkdir()
            (partial / "config.yaml").write_text(config_yaml(config), encoding="utf-8")
            (partial / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR) and os.path.lexists(folder):
            return False  # another process was faster
        raise ConfigError(f"run.folder is {config.run.folder!r}, which cannot hold runs ({error})") from error
    return True


def open_run(path: str | Path) -> Run:
    """Open a run by its folder, or by its name below `runs/`.

    Nothing that the folder names is executed: import the modules of its `run.imports` first.

    Raises:
        CheckpointError: If there is no such run, or a newer version wrote it.
        ConfigError: If its configuration is damaged, or its recipe was not imported.
    """
    folder = find_run(path)
    return Run(folder, _stored_config(folder))


def find_run(path: str | Path) -> Path:
    """Return a run's folder, given that or its name below `runs/`.

    Raises:
        CheckpointError: If there is no such run.
    """
    for folder in (Path(path), Path(RunConfig().run.folder) / path):
        if (folder / "config.yaml").is_file():
            return folder
    raise CheckpointError(
        f"{path}: not a run (a run's folder holds a config.yaml); list yours with: ls runs/"
    )


def _stored_config(folder: Path) -> RunConfig:
    path, manifest = folder / "config.yaml", read_manifest(folder) or {}
    schema = manifest.get("schema", 1)
    if schema > SCHEMA:
        raise CheckpointError(
            f"{folder}: written by a newer agentrl (schema {schema}; this version reads up to {SCHEMA}); "
            "install the version that wrote it, or a later one"
        )
    remedy = f"restore {path} from a copy, or start a new run"
    try:
        file = ConfigFile(path, read_yaml(path))
    except ConfigError as error:
        raise ConfigError(f"{error}\n{remedy}") from error
    absent = [block for block in _BLOCK_NAMES if block not in file.tree] if manifest else []
    if absent:
        missing = f"{path}: {', '.join(absent)}: missing, but a run's configuration is complete"
        raise ConfigError(f"{missing}\n{remedy}")
    block = file.tree.get("run")
    named = block.get("imports") if isinstance(block, dict) else None
    withhold([name for name in named if isinstance(name, str)] if isinstance(named, list) else [], folder)
    try:
        return config_from_tree(migrate(file.tree, schema))
    except ConfigError as error:
        raise ConfigError(f"{with_origins(str(error), [file])}\n{remedy}") from error


_BLOCK_NAMES = (
    *("env", "rollout", "engine", "policy", "warm_start", "algorithm"),
    *("learner", "trainer", "evaluation", "seed", "run"),
)
# For each schema, the dotted keys that were renamed since, and their new names; None drops a key.
RENAMED_KEYS: dict[int, dict[str, str | None]] = {1: {}}


def migrate(tree: Mapping[str, Any], schema: int) -> dict[str, Any]:
    """Return a stored configuration of an older schema with the keys of this version."""
    result = deepcopy(dict(tree))
    for number in range(schema, SCHEMA):
        for old, new in RENAMED_KEYS.get(number, {}).items():
            *path, key = old.split(".")
            block = value_at(result, ".".join(path)) if path else result
            if not isinstance(block, dict) or key not in block:
                continue
            value = block.pop(key)
            if new is not None:
                *path, key = new.split(".")
                block = result
                for part in path:
                    block = block.setdefault(part, {})
                block.setdefault(key, value)
    return result


def note_wording(run: Run, wording: "Wording") -> None:
    """Record the fixed text of prompts in the manifest, unless it is recorded already."""
    manifest = read_manifest(run.folder)
    if manifest is not None and "prompt" not in manifest:
        write_atomic(
            run.folder / "manifest.json", json.dumps(manifest | {"prompt": asdict(wording)}, indent=1)
        )


def changed_wording(run: Run, wording: "Wording") -> str | None:
    """Describe how prompts differ from the recorded ones; None if they do not, or none are recorded.

    A chat template may write the date, so that prompts differ from day to day.
    """
    manifest = read_manifest(run.folder) or {}
    before, now = manifest.get("prompt"), asdict(wording)
    if not isinstance(before, dict) or before.get("sha256") == now["sha256"]:
        return None
    parts = [name for name in _TEXTS if before.get(name) != now[name]]
    other = [f"policy.{name}" for name in ("prompt", "history", "examples") if _differs(name, before, now)]
    if other and not parts:
        return (
            f"the prompts of {run.folder} have changed since it was made: {', '.join(other)} no longer says "
            "what the policy was trained on"
        )
    if not parts:
        return f"the prompts of {run.folder} are the same text with other token ids: its tokenizer changed"
    then, today = _differing_lines(str(before.get(parts[0])), str(now[parts[0]]))
    return (
        f"the prompts of {run.folder} have changed since it was made: their {parts[0]} had {then!r} and now "
        f"has {today!r}, which the policy was not trained on. To fix a date, pass it to the chat template by "
        "policy.template_arguments (such as policy.template_arguments.date_string), or write it "
        "into the tokenizer's chat_template"
    )


_TEXTS = ("opening", "before_reply", "between")


def _differs(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Return whether a part of the prompts is not the recorded one; it is compared as JSON."""
    recorded = before.get(name, [] if name == "examples" else None)
    return json.dumps(recorded) != json.dumps(now[name])


def _differing_lines(before: str, now: str) -> tuple[str, str]:
    """Return the differing lines of two texts; all lines if only their order differs."""
    old, new = before.splitlines(), now.splitlines()
    lost, come = [line for line in old if line not in new], [line for line in new if line not in old]
    return ("\n".join(lost), "\n".join(come)) if lost or come else (before, now)


def _unused_names(parent: Path, config: RunConfig) -> Iterator[str]:
    env = config.env.id.rpartition("/")[2] if isinstance(config.env, EnvConfig) else "mixture"
    stem = f"{env}-{config.algorithm.name}-seed{config.seed}"
    taken = {path.name for path in parent.glob(f"{stem}*")}
    return (name for count in range(1, 10**6) if (name := f"{stem}-{count}") not in taken)


def _manifest(config: RunConfig) -> dict[str, Any]:
    packages = ("agentrl", "torch", "transformers", "tokenizers", "gymnasium", "numpy", "alfworld")
    return {
        "schema": SCHEMA,
        "versions": {name: version for name in packages if (version := _version(name))},
        "python": platform.python_version(),
        "machine": platform.platform(),
        "cores": os.cpu_count(),
        "git": _git_revision(),
        "seed": config.seed,
        **({"imports": import_hashes(config.run.imports)} if config.run.imports else {}),
    }


@cache
def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def _git_revision() -> str | None:
    here = Path(__file__).parent
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def value_at(tree: Any, key: str) -> Any:
    """Return the value at a dotted key of a configuration's tree, or None."""
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree
