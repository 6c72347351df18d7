"""Studies: several methods trained from the same clone on the same seeds, evaluated on the same panel."""

import fcntl
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from agentrl.config import Seed, build, check_own_numbers, merge, read_yaml, suggestion, to_tree, to_yaml
from agentrl.errors import ConfigError
from agentrl.files import write_atomic
from agentrl.run.config_files import ConfigFile, find_config, with_origins
from agentrl.run.records import read_summary
from agentrl.run.settings import (
    RunConfig,
    config_from_tree,
    config_tree,
    load_config,
)
from agentrl.run.signals import Interruption, RunInterrupted
from agentrl.run.trust import as_overrides, caller_only_values
from agentrl.study.comparison import compare
from agentrl.study.tables import write_comparison
from agentrl.terminal import Terminal, plain

CLONE = "clone"
_POLL_SECONDS = 0.1
# Keys that determine how a policy is evaluated or where it starts: methods must not differ in them.
_SHARED_KEYS = (
    "env.",
    "engine.",
    "policy.",
    "warm_start.",
    "evaluation.",
    "seed",
    "run.",
    "rollout.max_turns",
    "rollout.constrained",
)
# Keys that hold paths, which may differ after a study's folder was moved.
_PATH_KEYS = ("policy.path", "run.")


@dataclass(frozen=True)
class StudyConfig:
    """Configuration of a study.

    Args:
        base: The configuration file that all runs share; also looked up next to the study's file.
        methods: For each method, the blocks in which it differs from `base`, as in a run's file. An
            `algorithm` with another name or preset replaces the whole block.
        baseline: The method that the others are compared with.
        seeds: The seeds; each method is run once with each of them.
        overrides: `key=value` overrides of `base`.
    """

    base: str
    methods: Mapping[str, Mapping[str, Any]]
    baseline: str
    seeds: tuple[Seed, ...] = (0, 1, 2)
    overrides: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_own_numbers(self)
        mistakes = [
            f"methods.{name}: wanted a name of letters, digits, '-' and '_', other than {CLONE!r}"
            for name in self.methods
            if name == CLONE or not re.fullmatch(r"[\w-]+", name)
        ]
        if self.baseline not in self.methods:
            mistakes.append(
                f"baseline: not a method (got {self.baseline!r}; {suggestion(self.baseline, self.methods)})"
            )
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            mistakes.append(
                f"seeds: wanted at least one, without duplicates (got {', '.join(map(str, self.seeds))})"
            )
        mistakes += [
            f"overrides: {item!r} is set by the study itself (seeds, --folder)"
            for item in self.overrides
            if re.match(r"(seed|run)\b", item)
        ]
        if mistakes:
            raise ConfigError("\n".join(mistakes))


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


def load_study(path: str | Path, *overrides: str) -> StudyConfig:
    """Read the configuration file of a study.

    Args:
        path: The YAML file.
        overrides: `key=value` overrides; a key of the study changes the study, any other changes every run.

    Raises:
        ConfigError: If there are mistakes; each is listed with its key.
    """
    keys = {item.name for item in fields(StudyConfig)}
    own = [item for item in overrides if re.split(r"[.=]", item, maxsplit=1)[0] in keys]
    file = ConfigFile(Path(path), read_yaml(path))
    try:
        study = build(StudyConfig, merge(file.tree, own))
    except ConfigError as error:
        raise ConfigError(with_origins(str(error), [file], own)) from error
    beside = Path(path).parent / study.base
    return replace(
        study,
        base=str(beside if beside.exists() else find_config(study.base)),
        overrides=(*study.overrides, *(item for item in overrides if item not in own)),
    )


def plan(study: StudyConfig, folder: str | Path) -> list[StudyRun]:
    """Return all runs of a study, seed by seed, each clone before the methods that start from it.

    Args:
        study: The configuration of the study.
        folder: The folder of the study.

    Raises:
        ConfigError: If there are mistakes; each is listed with its method.
    """
    base = load_config(study.base, *study.overrides)
    methods, mistakes = {}, []
    for name, block in study.methods.items():
        try:
            methods[name] = _method_config(base, block)
        except ConfigError as error:
            mistakes += [f"methods.{name}: {line}" for line in str(error).splitlines()]
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    runs = []
    for seed in study.seeds:
        parent = Path(folder).resolve() / f"seed-{seed}"
        clone = _study_run(replace(base, trainer=replace(base.trainer, steps=0)), CLONE, seed, parent)
        runs.append(clone)
        for name, config in methods.items():
            config = replace(
                config,
                policy=replace(config.policy, path=str(clone.folder / "model")),
                warm_start=replace(config.warm_start, steps=0),
            )
            runs.append(_study_run(config, name, seed, parent, clone))
    return runs


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
        failed = _Processes(runs, jobs, lock, interruption, shown).finish()
        finished = {
            seed: {run.name: run.folder for run in runs if run.config.seed == seed and run.finished}
            for seed in study.seeds
        }
        results = compare(finished, tuple(study.methods), study.baseline, CLONE)
        results |= {"failed": failed, "study": to_tree(study)}
        write_comparison(Path(folder), results, shown)
    return results


def start(run: StudyRun, lock: int) -> "subprocess.Popen[bytes]":
    """Start a run in a new process, which holds the open file `lock` as long as it is alive."""
    with run.log.open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-P", "-c", "from agentrl.cli import main; main()", *run.arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches only the study, which stops its runs itself
            pass_fds=(lock,),
        )


class _Processes:
    """Processes of the runs of a study."""

    def __init__(
        self, runs: Sequence[StudyRun], jobs: int, lock: int, interruption: Interruption, console: Console
    ) -> None:
        self._runs, self._jobs, self._lock = runs, jobs, lock
        self._interruption, self._console = interruption, console
        self._running: dict[StudyRun, subprocess.Popen[bytes]] = {}
        self._failed: dict[StudyRun, str] = {}
        self._done = 0

    def finish(self) -> dict[str, str]:
        """Finish all runs that can be finished; return the failed ones with the reasons."""
        waiting = [run for run in self._runs if not run.finished]
        self._done = len(self._runs) - len(waiting)
        self._say(f"{len(self._runs)} runs, {self._done} of them already finished; {self._jobs} at a time")
        try:
            while waiting or self._running:
                waiting = [run for run in waiting if not self._start_or_fail(run)]
                time.sleep(_POLL_SECONDS)
                for run in [run for run, process in self._running.items() if process.poll() is not None]:
                    self._finish_run(run, self._running.pop(run).returncode)
        except KeyboardInterrupt as interrupt:
            self._stop()
            raise RunInterrupted(
                f"stopped with {self._done} of {len(self._runs)} runs finished; the same command continues"
            ) from interrupt
        finally:
            self._stop()
        return {f"seed-{run.config.seed}/{run.name}": why for run, why in self._failed.items()}

    def _start_or_fail(self, run: StudyRun) -> bool:
        """Start the run if a slot is free and its clone has finished; fail it if its clone failed."""
        if run.clone in self._failed:
            self._fail(run, "its clone failed")
            return True
        if len(self._running) >= self._jobs or not (run.clone is None or run.clone.finished):
            return False
        with self._interruption.shield():  # a stop must not come before the process is registered
            self._running[run] = start(run, self._lock)
        return True

    def _finish_run(self, run: StudyRun, code: int) -> None:
        if code or not run.finished:
            self._fail(run, f"exit code {code}: {_last_error(run.log)} (see {run.log})")
            return
        self._done += 1
        trained = read_summary(run.folder)["policies"]["trained"]
        rates = ", ".join(f"{decoding} {_format_rate(score)}" for decoding, score in trained.items())
        self._say(f"{self._done}/{len(self._runs)} {run.label}: success {rates}")

    def _fail(self, run: StudyRun, why: str) -> None:
        self._failed[run] = why
        self._say(f"failed: {run.label}: {why}")

    def _stop(self) -> None:
        """Ask every process to save its state, and wait until all have ended."""
        for process in self._running.values():
            process.terminate()
        for process in self._running.values():
            process.wait()
        self._running.clear()

    def _say(self, line: str) -> None:
        self._console.print(plain(line), highlight=False, soft_wrap=True)


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


def _method_config(base: RunConfig, block: Mapping[str, Any]) -> RunConfig:
    """Return the base configuration with the blocks of a method applied.

    Raises:
        ConfigError: If a block is wrong, or changes a key that all methods must share.
    """
    before = config_tree(base)
    config = config_from_tree(_merge_blocks(before, block))
    changed = [key for key in _differences(before, config_tree(config)) if key.startswith(_SHARED_KEYS)]
    if changed:
        wanted = "must be the same for all methods; use overrides to change it for all"
        raise ConfigError("\n".join(f"{key}: {wanted}" for key in changed))
    return config


def _merge_blocks(tree: Mapping[str, Any], block: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(tree)
    for key, value in block.items():
        old = result.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            # A preset sets only keys that the block omits, and the base's complete block omits none.
            names = {name: old[name] for name in ("name", "preset") if name in old}
            same_recipe = names == names | {name: value[name] for name in names if name in value}
            value = _merge_blocks(old, value) if same_recipe else {"name": old.get("name"), **value}
        result[key] = value
    return result


def _study_run(
    config: RunConfig, name: str, seed: int, parent: Path, clone: StudyRun | None = None
) -> StudyRun:
    quiet = replace(config.evaluation, baselines=(), instruction_check=False)
    config = replace(
        config, evaluation=quiet, seed=seed, run=replace(config.run, name=name, folder=str(parent))
    )
    return StudyRun(name, config, clone)


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
        changed = _differences(stored, config_tree(run.config))
        if changed := [key for key in changed if not key.startswith(_PATH_KEYS)]:
            mistakes.append(f"{run.folder} was created with other values of {', '.join(changed)}")
    if mistakes:
        mistakes.append("remove the runs to create them again, or choose another --folder")
        raise ConfigError("\n".join(mistakes))
    for run in runs:
        if not run.folder.exists():
            run.file.parent.mkdir(exist_ok=True)
            write_atomic(run.file, to_yaml(config_tree(run.config)))


def _differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Return the dotted keys at which two trees differ."""
    if not (isinstance(one, Mapping) and isinstance(other, Mapping)):
        return [] if one == other else [path]
    return [
        key
        for name in {**one, **other}
        for key in _differences(one.get(name), other.get(name), f"{path}.{name}" if path else name)
    ]


def _last_error(log: Path) -> str:
    """Return the error message that ends a log, or else its last line."""
    text = log.read_text(encoding="utf-8", errors="replace").strip()
    _, found, words = f"\n{text}".rpartition("\nerror: ")
    return words if found else text.rpartition("\n")[2]


def _format_rate(score: Mapping[str, Any]) -> str:
    rate = score["success_rate"]
    return "unknown (all aborted)" if rate is None else f"{100 * rate:.1f} %"
