"""Scores that a run or an evaluation has left in its folder, read to be compared."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict  # pydantic reads no other under Python 3.11

from agentrl.data.storage import read_episodes
from agentrl.data.trajectory import Episode
from agentrl.errors import CheckpointError, ConfigError
from agentrl.evaluation.fingerprint import Fingerprint, run_fingerprint
from agentrl.evaluation.output import REQUEST, RESULTS, episodes_file
from agentrl.evaluation.results_table import results_by_environment
from agentrl.files import read_json
from agentrl.run.folder import evaluated_episodes, find_run, open_run
from agentrl.run.records import read_manifest, read_summary
from agentrl.run.settings import RunConfig

TEMPERATURES = {"greedy": 0.0, "sampled": 1.0}


class _Score(TypedDict):
    env: str
    error: str | None
    evaluation: dict[str, Any] | None


class _Results(TypedDict):
    decoding: str
    policies: dict[str, dict[str, _Score]]
    agentrl: NotRequired[str]


@dataclass(frozen=True)
class StoredScore:
    """Score of a policy on a panel.

    Args:
        label: The name of the panel's row.
        env: The id of the environment.
        fingerprint: What it was measured with; empty if the panel was not played.
        file: The file of its episodes.
        error: Why the panel was not played.
    """

    label: str
    env: str
    fingerprint: Fingerprint
    file: Path
    error: str | None = None

    @property
    def hash(self) -> str | None:
        """The hash of the panel; None if it was not played."""
        found: str | None = self.fingerprint.get("panel", {}).get("hash")
        return found

    def read(self) -> dict[str, list[Episode]]:
        """Return the episodes of each task, without their turns.

        Raises:
            CheckpointError: If the file is damaged, or does not hold as many episodes as it should.
        """
        episodes, panel = read_episodes(self.file, turns=False), self.fingerprint["panel"]
        found: dict[str, list[Episode]] = defaultdict(list)
        for episode in episodes:
            found[episode.task].append(episode)
        plays = Counter(map(len, found.values()))
        if plays != {panel["repeats"]: panel["tasks"]}:
            raise CheckpointError(
                f"{self.file}: holds {len(episodes)} episodes of {len(found)} tasks, wanted "
                f"{panel['repeats']} of each of {panel['tasks']}; restore it, or evaluate anew"
            )
        return dict(found)


@dataclass(frozen=True)
class ScoreFolder:
    """Folder with scores.

    Args:
        name: Its name, as the caller gave it.
        path: The folder.
        is_run: Whether it is a run's, and not that of an evaluation.
    """

    name: str
    path: Path
    is_run: bool

    @property
    def decoding(self) -> str | None:
        """The decoding of an evaluation; None for a run, which has scores of both."""
        return None if self.is_run else self._results()["decoding"]

    def read(self, decoding: str) -> dict[str, tuple[StoredScore, ...]]:
        """Return the scores of each policy, the trained one of a run, by its name in a comparison.

        Raises:
            CheckpointError: If a file is damaged, or the run or the evaluation is not finished.
            ConfigError: If an evaluation has another decoding.
        """
        return {self.name: self._of_run(decoding)} if self.is_run else self._of_evaluation(decoding)

    def _of_run(self, decoding: str) -> tuple[StoredScore, ...]:
        run, summary = open_run(self.path), read_summary(self.path)
        scores = []
        for name, own in results_by_environment(summary).items():
            score = own.get("policies", {}).get("trained", {}).get(decoding)
            if score is None:
                raise CheckpointError(
                    f"{self.name}: an unfinished run, without {decoding} scores of its trained policy; "
                    f"finish it (agentrl train --resume {self.path}), or evaluate its newest checkpoint "
                    f"(agentrl evaluate --policy {self.path} --output FOLDER) and compare that folder"
                )
            config = run.config.alone(name) if name else run.config
            file = evaluated_episodes(self.path, "trained", decoding, name or None)
            fingerprint = self._fingerprint(config, own, decoding) | {"data": score.get("data")}
            scores.append(StoredScore(name or config.only_env.id, config.only_env.id, fingerprint, file))
        return tuple(scores)

    def _fingerprint(self, config: RunConfig, results: Mapping[str, Any], decoding: str) -> dict[str, Any]:
        manifest = read_manifest(self.path) or {}
        panel = {"env": config.only_env.id, **results["panel"], "max_turns": config.rollout.max_turns}
        return {**run_fingerprint(self.name, config, manifest, TEMPERATURES[decoding]), "panel": panel}

    def _of_evaluation(self, decoding: str) -> dict[str, tuple[StoredScore, ...]]:
        results = self._results()
        if results["decoding"] != decoding:
            raise ConfigError(f"{self.name}: an evaluation that is {results['decoding']}, wanted {decoding}")
        policies = results["policies"]
        return {
            self.name if len(policies) == 1 else f"{self.name}: {policy}": tuple(
                self._panel_score(policy, label, score) for label, score in panels.items()
            )
            for policy, panels in policies.items()
        }

    def _panel_score(self, policy: str, label: str, score: _Score) -> StoredScore:
        fingerprint: Fingerprint = (score["evaluation"] or {}).get("fingerprint", {})
        if score["error"] is None and "panel" not in fingerprint:
            raise CheckpointError(
                f"{self.path / RESULTS}: damaged, {label} has no fingerprint; {self._remedy}"
            )
        file = episodes_file(self.path, policy, label)
        return StoredScore(label, score["env"], fingerprint, file, score["error"])

    def _results(self) -> _Results:
        if not (self.path / RESULTS).is_file():
            raise CheckpointError(f"{self.name}: an unfinished evaluation; {self._remedy}")
        found: _Results = read_json(self.path / RESULTS, _Results, self._remedy)
        return found

    @property
    def _remedy(self) -> str:
        return "give the command of that evaluation again, which goes on and writes the results"


def find_scores(names: Sequence[str]) -> list[ScoreFolder]:
    """Return the folders of runs, given those or their names below `runs/`, and of evaluations.

    Raises:
        CheckpointError: If one is neither.
    """
    return [_find(name) for name in names]


def _find(name: str) -> ScoreFolder:
    path = Path(name)
    if (path / REQUEST).is_file():
        return ScoreFolder(name, path, is_run=False)
    try:
        return ScoreFolder(name, find_run(path), is_run=True)
    except CheckpointError as error:
        lack = "a file" if path.is_file() else "holds neither" if path.exists() else "no such folder"
        raise CheckpointError(
            f"{name}: {lack}, wanted a run, or a folder that `agentrl evaluate --output FOLDER` wrote"
        ) from error
