"""Runs of a study: each setting of a method on each seed, and the clones that they start from."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from agentrl.run.settings import RunConfig
from agentrl.run.trust import as_overrides, caller_only_values
from agentrl.study.config import CLONE, StudyConfig
from agentrl.study.settings import Setting, all_settings, load_base


@dataclass(frozen=True, eq=False)
class StudyRun:
    """Run of a study: a method on a seed, or the clone that all methods of that seed start from."""

    name: str
    config: RunConfig
    clone: "StudyRun | None" = None  # None if this run is the clone

    @property
    def folder(self) -> Path:
        """Return the run's folder."""
        return Path(self.config.run.folder) / self.name

    @property
    def file(self) -> Path:
        """Return the configuration file that the run is started with."""
        return self.folder.with_name(f"{self.name}.yaml")

    @property
    def log(self) -> Path:
        """Return the file with the output since the last start."""
        return self.folder.with_name(f"{self.name}.log")

    @property
    def label(self) -> str:
        """Return the name and seed for messages."""
        return f"{self.name}, seed {self.config.seed}"

    @property
    def finished(self) -> bool:
        """Return whether the run has finished."""
        return (self.folder / "summary.json").exists()

    @property
    def arguments(self) -> list[str]:
        """Return the arguments of the `agentrl` command that starts or resumes the run."""
        imports = [f"--import={name}" for name in self.config.run.imports]
        if not self.folder.exists():
            return ["train", str(self.file), *imports]
        again = as_overrides(caller_only_values(self.config))
        return ["train", "--resume", str(self.folder), *again, *imports]


def plan(study: StudyConfig, folder: str | Path) -> list[StudyRun]:
    """Return the runs of every method's own setting on the study's seeds.

    Raises:
        ConfigError: If there are mistakes; each is listed with its method.
    """
    base = load_base(study)
    settings = [found[0] for found in all_settings(study, base).values()]
    return plan_runs(base, settings, study.seeds, folder)


def plan_runs(
    base: RunConfig, settings: Sequence[Setting], seeds: Iterable[int], folder: str | Path
) -> list[StudyRun]:
    """Return the runs of some settings, seed by seed, each clone before those that start from it.

    Args:
        base: The configuration that all runs share.
        settings: The settings; without any there are no runs.
        seeds: The seeds.
        folder: The folder of the study.
    """
    runs = []
    for seed in seeds if settings else ():
        parent = Path(folder).resolve() / f"seed-{seed}"
        clone = _study_run(replace(base, trainer=replace(base.trainer, steps=0)), CLONE, seed, parent)
        runs.append(clone)
        for setting in settings:
            config = replace(
                setting.config,
                policy=replace(
                    setting.config.policy,
                    path=str(clone.folder / "model"),
                    revision=None,
                    chat_template=None,
                ),
                warm_start=replace(setting.config.warm_start, steps=0),
            )
            runs.append(_study_run(config, setting.name, seed, parent, clone))
    return runs


def _study_run(
    config: RunConfig, name: str, seed: int, parent: Path, clone: StudyRun | None = None
) -> StudyRun:
    quiet = replace(config.evaluation, baselines=(), instruction_check=False)
    config = replace(
        config, evaluation=quiet, seed=seed, run=replace(config.run, name=name, folder=str(parent))
    )
    return StudyRun(name, config, clone)
