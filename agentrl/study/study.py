"""Studies: several methods trained from the same clone on the same seeds, evaluated on the same panel."""

import fcntl
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from agentrl.config import read_yaml, suggestion, to_tree
from agentrl.errors import ConfigError
from agentrl.files import write_atomic
from agentrl.run.settings import RunConfig, config_from_tree, config_tree, config_yaml
from agentrl.run.signals import Interruption
from agentrl.study.comparison import compare
from agentrl.study.config import CLONE, StudyConfig
from agentrl.study.processes import RunProcesses
from agentrl.study.runs import StudyRun, plan_runs
from agentrl.study.settings import Setting, all_settings, differences, load_base
from agentrl.study.tables import write_comparison
from agentrl.study.tuning import RULE, Tuning, tune
from agentrl.terminal import Terminal, plain

# Keys that hold paths, which may differ after a study's folder was moved.
_PATH_KEYS = ("policy.path", "run.")


class Study:
    """A study in its folder: the runs of both phases, and what is known from those that have finished.

    In the first phase, every value of a method's knob is run on the tuning seeds, and one is chosen. In the
    second, each method is run on the study's seeds at its own setting, and at the chosen one if that differs.
    The choice reads runs of the first phase only.

    Args:
        config: The configuration of the study.
        folder: The folder of the runs, and of `results.json`, `table.md` and `study.svg`.

    Raises:
        ConfigError: If there are mistakes; each is listed with its method.
    """

    def __init__(self, config: StudyConfig, folder: str | Path) -> None:
        self.config, self.folder = config, Path(folder)
        self.base: RunConfig = load_base(config)
        self.settings: dict[str, list[Setting]] = all_settings(config, self.base)

    def tuning_runs(self, methods: Collection[str]) -> list[StudyRun]:
        """Return the runs of the first phase: every setting of the methods that have a knob."""
        tuned = [one for name in methods for one in self.settings[name] if len(self.settings[name]) > 1]
        return plan_runs(self.base, tuned, self.config.tuning_seeds, self.folder)

    def tunings(self) -> dict[str, Tuning]:
        """Return what the finished runs of the first phase say of each method that has a knob."""
        runs = [run for run in self.tuning_runs(self.config.methods) if run.clone is not None]
        return {
            method: tune(settings, [run for run in runs if run.name in {one.name for one in settings}])
            for method, settings in self.settings.items()
            if len(settings) > 1
        }

    def final_settings(self) -> dict[str, list[Setting]]:
        """Return the settings of the second phase: each method's own, and the chosen one if it differs."""
        chosen = {method: tuning.chosen for method, tuning in self.tunings().items()}
        return {
            method: [
                settings[0],
                *(one for one in settings[1:] if one is chosen.get(method)),
            ]
            for method, settings in self.settings.items()
        }

    def final_runs(self, methods: Collection[str]) -> list[StudyRun]:
        """Return the runs of the second phase, as far as the settings are chosen."""
        found = self.final_settings()
        settings = [one for name in methods for one in found[name]]
        return plan_runs(self.base, settings, self.config.seeds, self.folder)

    def results(self) -> dict[str, Any]:
        """Compare the finished runs.

        Returns:
            What `compare` returns; besides, `settings` says for each name of runs which method and values
            they belong to, `tuning` what was chosen and why, and `missing` which runs have not finished.
        """
        settings = [one for found in self.final_settings().values() for one in found]
        runs = self.final_runs(self.config.methods)
        finished: dict[int, dict[str, Path]] = {seed: {} for seed in self.config.seeds}
        for run in runs:
            if run.finished:
                finished[run.config.seed][run.name] = run.folder
        results = compare(finished, [one.name for one in settings], self.config.baseline, CLONE)
        tunings = self.tunings()
        if any(one.started for one in tunings.values()):
            results["caption"].append(f"chosen: {RULE}; runs of the comparison do not enter.")
        tuning_runs = self.tuning_runs(self.config.methods)
        return results | {
            "settings": {
                one.name: {"method": one.method, "label": one.label, "default": one.default}
                for one in settings
            },
            "tuning": {method: found.as_tree() for method, found in tunings.items()},
            "missing": {"tuning": _missing(tuning_runs), "comparison": _missing(runs)},
            "study": to_tree(self.config),
        }


def run_study(
    config: StudyConfig,
    folder: str | Path,
    *,
    jobs: int = 1,
    only: Sequence[str] | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run the missing runs of a study and write the comparison.

    Finished runs are skipped and interrupted ones resumed. A run that fails is reported; the others continue.

    Args:
        config: The configuration of the study.
        folder: The folder of the runs, and of `results.json`, `table.md` and `study.svg`.
        jobs: The number of runs at a time; 0 runs nothing, and compares what has finished, also while
            another process runs the study.
        only: The methods to run; None runs all. All that have finished are compared.
        console: The console to print to; standard output by default.

    Returns:
        The content of `results.json`; `failed` lists the runs that failed, and why.

    Raises:
        ConfigError: If a configuration is wrong, or the folder holds runs of another one.
        RunInterrupted: After Ctrl-C or SIGTERM, when every run has stopped; the same call continues.
    """
    if jobs < 0:
        raise ConfigError(f"jobs is {jobs}, wanted at least 0")
    study = Study(config, folder)
    methods = list(config.methods) if only is None else list(only)
    unknown = [name for name in methods if name not in config.methods]
    if unknown:
        raise ConfigError(
            f"only: not a method (got {unknown[0]!r}; {suggestion(unknown[0], config.methods)})"
        )
    shown = console or Terminal()
    failed: dict[str, str] = {}
    if jobs:
        with _exclusive(study.folder) as lock, Interruption().listening() as interruption:

            def finish(phase: str, runs: Sequence[StudyRun]) -> None:
                _check_configurations(runs)
                _write_configurations(runs)
                if runs:
                    failed.update(RunProcesses(runs, jobs, lock, interruption, shown).finish(phase))

            finish("tuning", study.tuning_runs(methods))
            _print_choices(study, methods, shown)  # before any run of the second phase is planned
            finish("comparison", study.final_runs(methods))
    else:
        _check_configurations([*study.tuning_runs(methods), *study.final_runs(methods)])
        _print_choices(study, methods, shown)
    results = study.results() | {"failed": failed}
    study.folder.mkdir(parents=True, exist_ok=True)
    write_comparison(study.folder, results, shown)
    return results


def _print_choices(study: Study, methods: Collection[str], console: Console) -> None:
    found = [one for method, one in study.tunings().items() if method in methods and one.started]
    for line in (f"rule of choice: {RULE}", *(one.sentence for one in found)) if found else ():
        console.print(plain(line), highlight=False, soft_wrap=True)


def _missing(runs: Sequence[StudyRun]) -> dict[str, list[int]]:
    """Return the seeds that have not finished, by the name of the runs."""
    found: dict[str, list[int]] = {}
    for run in runs:
        if not run.finished:
            found.setdefault(run.name, []).append(run.config.seed)
    return found


@contextmanager
def _exclusive(folder: Path) -> Iterator[int]:
    """Hold the folder's lock, which the runs inherit, so that a run left behind is noticed."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"{folder}: in use by a study, or by a run that a study left behind; "
                "wait for it, or choose another --folder"
            ) from error
        yield file.fileno()


def _check_configurations(runs: Sequence[StudyRun]) -> None:
    """Check that runs that were started have the values of the study.

    Raises:
        ConfigError: If a run was started with other values; each such run is listed.
    """
    mistakes = []
    for run in runs:
        if not run.folder.exists():
            continue
        try:
            stored = config_tree(config_from_tree(read_yaml(run.file)))
        except ConfigError as error:
            mistakes.append(f"{run.folder} was created with a configuration that cannot be read: {error}")
            continue
        changed = differences(stored, config_tree(run.config))
        if changed := [key for key in changed if not key.startswith(_PATH_KEYS)]:
            mistakes.append(f"{run.folder} was created with other values of {', '.join(changed)}")
    if mistakes:
        mistakes.append("remove the runs to create them again, or choose another --folder")
        raise ConfigError("\n".join(mistakes))


def _write_configurations(runs: Sequence[StudyRun]) -> None:
    """Write the configuration file of each run that was not started yet."""
    for run in runs:
        if not run.folder.exists():
            run.file.parent.mkdir(exist_ok=True)
            write_atomic(run.file, config_yaml(run.config))
