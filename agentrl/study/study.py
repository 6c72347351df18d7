"""Studies: several methods trained from the same clone on the same seeds, evaluated on the same panel."""

import fcntl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from agentrl.config import read_yaml, to_tree
from agentrl.errors import ConfigError
from agentrl.files import write_atomic
from agentrl.run.settings import config_from_tree, config_tree, config_yaml
from agentrl.run.signals import Interruption
from agentrl.study.comparison import compare
from agentrl.study.config import CLONE, StudyConfig, StudyRun, differences, plan
from agentrl.study.processes import RunProcesses
from agentrl.study.tables import write_comparison
from agentrl.terminal import Terminal

# Keys that hold paths, which may differ after a study's folder was moved.
_PATH_KEYS = ("policy.path", "run.")


def run_study(
    study: StudyConfig, folder: str | Path, *, jobs: int = 1, console: Console | None = None
) -> dict[str, Any]:
    """Run the missing runs of a study and write the comparison.

    Finished runs are skipped and interrupted ones resumed. A run that fails is reported; the others continue.

    Args:
        study: The configuration of the study.
        folder: The folder of the runs, and of `results.json`, `table.md` and `study.svg`.
        jobs: The number of runs at a time.
        console: The console to print to; standard output by default.

    Returns:
        The content of `results.json`; `failed` lists the runs that have not finished, and why.

    Raises:
        ConfigError: If a configuration is wrong, or the folder holds runs of another one.
        RunInterrupted: After Ctrl-C or SIGTERM, when every run has stopped; the same call continues.
    """
    if jobs < 1:
        raise ConfigError(f"jobs is {jobs}, wanted at least 1")
    runs = plan(study, folder)
    with _exclusive(Path(folder)) as lock, Interruption().listening() as interruption:
        _write_configurations(runs)
        shown = console or Terminal()
        failed = RunProcesses(runs, jobs, lock, interruption, shown).finish()
        finished = {
            seed: {run.name: run.folder for run in runs if run.config.seed == seed and run.finished}
            for seed in study.seeds
        }
        results = compare(finished, tuple(study.methods), study.baseline, CLONE)
        results |= {"failed": failed, "study": to_tree(study)}
        write_comparison(Path(folder), results, shown)
    return results


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


def _write_configurations(runs: Sequence[StudyRun]) -> None:
    """Write the configuration file of each run that was not started yet.

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
    for run in runs:
        if not run.folder.exists():
            run.file.parent.mkdir(exist_ok=True)
            write_atomic(run.file, config_yaml(run.config))
