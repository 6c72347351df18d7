"""The folder of an evaluation: what was asked, the episodes as they end, and the results."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import quote

from typing_extensions import TypedDict  # pydantic reads no other under Python 3.11

from agentrl.data.storage import read_episodes, write_episodes
from agentrl.data.trajectory import Episode
from agentrl.errors import ConfigError
from agentrl.evaluation.fingerprint import describe_differences, differences
from agentrl.files import read_json, remove_folder, remove_leftovers, write_atomic
from agentrl.run.lock import RunLock

FORMAT = 1
REQUEST, RESULTS = "evaluation.json", "results.json"  # what was asked, and its results once it is finished
_SECONDS = 1.0  # between two writes of episodes: what a killed process loses at most


class _Asked(TypedDict):
    format: int
    request: dict[str, Any]
    found: dict[str, Any]


class EvaluationFolder:
    """Folder of an evaluation that goes on where it was interrupted.

    `evaluation.json` holds what was asked, `episodes/POLICY/PANEL.parquet` the episodes of a panel, and
    `results.json` and `results.md` the results. While a panel is played, its episodes are in `PANEL.parts`.

    Args:
        path: The folder, which is created if it is missing.
        request: What is asked, as JSON values by name.

    Attributes:
        found: What `note` has recorded.

    Raises:
        ConfigError: If the folder holds an evaluation that was asked for something else, or other files.
        CheckpointError: If another process uses it, or a file in it is damaged.
    """

    def __init__(self, path: Path, request: Mapping[str, Any]) -> None:
        self.path, self._asked = path, path / REQUEST
        self._request, self.found = json.loads(json.dumps(request)), dict[str, Any]()
        known = self._asked.is_file()
        if path.is_dir() and not known and any(not file.name.startswith(".") for file in path.iterdir()):
            raise ConfigError(f"--output {path}: holds other files and no evaluation; wanted a new folder")
        if known:
            stored = read_json(self._asked, _Asked, "remove the folder to evaluate anew")
            self._check(stored["request"], self._request)
            self.found = stored["found"]
        path.mkdir(parents=True, exist_ok=True)
        self._lock = RunLock(path)

    def __enter__(self) -> "EvaluationFolder":
        self._lock.acquire()
        self._save()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def note(self, found: Mapping[str, Any]) -> None:
        """Record what is known only once a policy or an environment is opened.

        Raises:
            ConfigError: If it is not what was found before.
        """
        known = {name: value for name, value in found.items() if name in self.found}
        self._check({name: self.found[name] for name in known}, known)
        self.found |= found
        self._save()

    def played(self, policy: str, panel: str) -> dict[str, Episode]:
        """Return by id the episodes that a policy has played on a panel, without aborted ones."""
        file = self._file(policy, panel)
        remove_leftovers(_parts(file))
        files = [*([file] if file.is_file() else []), *sorted(_parts(file).glob("*.parquet"))]
        episodes = [episode for each in files for episode in read_episodes(each)]
        return {episode.id: episode for episode in episodes if not episode.stop.aborted}

    @contextmanager
    def recording(self, policy: str, panel: str) -> Iterator["EpisodeParts"]:
        """Keep the episodes of a panel as they end, also those before an interruption."""
        parts = EpisodeParts(_parts(self._file(policy, panel)))
        try:
            yield parts
        finally:
            parts.flush()

    def finish(self, policy: str, panel: str, episodes: Sequence[Episode]) -> None:
        """Write all episodes of a panel to its file, and remove the parts."""
        file = self._file(policy, panel)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_episodes(file, episodes)
        with suppress(FileNotFoundError):
            remove_folder(_parts(file))

    def write_results(self, tree: Mapping[str, Any], markdown: str) -> None:
        """Write the results as JSON and as Markdown."""
        write_atomic(self.path / RESULTS, json.dumps(tree, indent=1))
        write_atomic(self.path / "results.md", markdown)

    def _file(self, policy: str, panel: str) -> Path:
        return episodes_file(self.path, policy, panel)

    def _check(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        if found := differences(before, now):
            raise ConfigError(
                f"--output {self.path}: holds an evaluation with other settings: "
                f"{describe_differences(found)}. Give the settings it was begun with, or another folder"
            )

    def _save(self) -> None:
        tree = {"format": FORMAT, "request": self._request, "found": self.found}
        write_atomic(self._asked, json.dumps(tree, indent=1))


class EpisodeParts:
    """Files of the episodes that have ended so far, a new one about every second.

    Args:
        folder: The folder of the files.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._waiting, self._written = folder, list[Episode](), time.monotonic()

    def add(self, episode: Episode) -> None:
        """Keep an episode."""
        self._waiting.append(episode)
        if time.monotonic() - self._written >= _SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write the episodes that are not written yet."""
        if self._waiting:
            self._folder.mkdir(parents=True, exist_ok=True)
            number = len(list(self._folder.glob("*.parquet")))
            write_episodes(self._folder / f"{number:06d}.parquet", self._waiting)
            self._waiting = []
        self._written = time.monotonic()


def episodes_file(folder: Path, policy: str, panel: str) -> Path:
    """Return the file of the episodes that a policy has played on the panel of that label."""
    return folder / "episodes" / _file_name(policy) / f"{_file_name(panel)}.parquet"


def _parts(file: Path) -> Path:
    return file.with_suffix(".parts")


def _file_name(name: str) -> str:
    """Return a name for a file or folder; different names stay different."""
    quoted = quote(name, safe=" =,:")
    return quoted if len(quoted) <= 120 else f"{quoted[:100]}-{sha256(name.encode()).hexdigest()[:12]}"
