"""A study: several methods from the same start, on the same seeds, measured on the same panel."""

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
# What decides how a policy is measured, or where it starts: a method that changed it would not be compared.
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
# Says where something stands, which may differ when a study's folder was moved.
_PATH_KEYS = ("policy.path", "run.")


@dataclass(frozen=True)
class StudyConfig:
    """Which methods are compared, and from where.

    Args:
        base: configuration of a run that all have in common; found beside the study's file too.
        methods: name -> the blocks in which a method differs from `base`, as they stand in a run's file. An
            `algorithm` of another name or preset replaces the whole block.
        baseline: the method that the others are compared with.
        seeds: each method is run once with each.
        overrides: `key=value` changes to `base`.
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
                f"baseline: is no method (got {self.baseline!r}; {suggestion(self.baseline, self.methods)})"
            )
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            mistakes.append(
                f"seeds: wanted at least one, and no two alike (got {', '.join(map(str, self.seeds))})"
            )
        mistakes += [
            f"overrides: {item!r} is for the study to say (seeds, --folder)"
            for item in self.overrides
            if re.match(r"(seed|run)\b", item)
        ]
        if mistakes:
            raise ConfigError("\n".join(mistakes))


@dataclass(frozen=True, eq=False)
class StudyRun:
    """One run of a study: a method on a seed, or the clone that the methods of that seed start from."""

    name: str
    config: RunConfig
    clone: "StudyRun | None" = None  # None for the clone itself

    @property
    def folder(self) -> Path:
        return Path(self.config.run.folder) / self.name

    @property
    def file(self) -> Path:
        """The configuration that it is started with."""
        return self.folder.with_name(f"{self.name}.yaml")

    @property
    def log(self) -> Path:
        """What it printed since it was last started."""
        return self.folder.with_name(f"{self.name}.log")

    @property
    def label(self) -> str:
        return f"{self.name}, seed {self.config.seed}"

    @property
    def finished(self) -> bool:
        return (self.folder / "summary.json").exists()

    @property
    def arguments(self) -> list[str]:
        """Of the `agentrl` command that starts it, or takes it up where it stopped."""
        imports = [f"--import={name}" for name in self.config.run.imports]
        if not self.folder.exists():
            return ["train", str(self.file), *imports]
        again = as_overrides(caller_only_values(self.config))
        return ["train", "--resume", str(self.folder), *again, *imports]


def load_study(path: str | Path, *overrides: str) -> StudyConfig:
    """Read a study's file.

    Args:
        path: of the YAML file.
        overrides: `key=value`; a key of the study changes the study, any other changes every run.

    Raises:
        ConfigError: listing every mistake with its path.
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
    """All runs of a study, seed by seed, each clone before the methods that start from it.

    Raises:
        ConfigError: listing every mistake of every method.
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
    """Run what is missing of a study, and write what came of it.

    Finished runs are left alone and interrupted ones go on; a run that fails is told and the others go on.

    Args:
        study: to run.
        folder: that holds its runs, and then `results.json`, `table.md` and `study.svg`.
        jobs: runs at a time.
        console: where to show; standard output unless told.

    Returns:
        The content of `results.json`; its `failed` says which runs have not finished, and why.

    Raises:
        ConfigError: when a configuration is wrong, or the folder holds a run of another one.
        RunInterrupted: after Ctrl-C or SIGTERM, when every run has stopped; the same call continues.
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
    """Start a run as a process of its own, which holds the open file `lock` as long as it lives."""
    with run.log.open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-P", "-c", "from agentrl.cli import main; main()", *run.arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a terminal's Ctrl-C reaches the study alone, which tells its runs once
            pass_fds=(lock,),
        )


class _Processes:
    """The processes of a study's runs."""

    def __init__(
        self, runs: Sequence[StudyRun], jobs: int, lock: int, interruption: Interruption, console: Console
    ) -> None:
        self._runs, self._jobs, self._lock = runs, jobs, lock
        self._interruption, self._console = interruption, console
        self._running: dict[StudyRun, subprocess.Popen[bytes]] = {}
        self._failed: dict[StudyRun, str] = {}
        self._done = 0

    def finish(self) -> dict[str, str]:
        """Have every run finished that can be; those that failed, with the reason."""
        waiting = [run for run in self._runs if not run.finished]
        self._done = len(self._runs) - len(waiting)
        self._say(f"{len(self._runs)} runs, {self._done} of them finished before; {self._jobs} at a time")
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
        """Start a run if it is its turn, or give it up with the clone that it needs."""
        if run.clone in self._failed:
            self._fail(run, "its clone failed")
            return True
        if len(self._running) >= self._jobs or not (run.clone is None or run.clone.finished):
            return False
        with self._interruption.shield():  # a process that nobody knows of would not be stopped
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
        """Ask every process to save what it has, and wait until it has ended."""
        for process in self._running.values():
            process.terminate()
        for process in self._running.values():
            process.wait()
        self._running.clear()

    def _say(self, line: str) -> None:
        self._console.print(plain(line), highlight=False, soft_wrap=True)


@contextmanager
def _exclusive(folder: Path) -> Iterator[int]:
    """Hold the folder's lock; so do the runs, so that none outlives its study unseen."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"{folder}: a study, or a run that one left behind, is at work in it; "
                "wait for it, or choose another --folder"
            ) from error
        yield file.fileno()


def _method_config(base: RunConfig, block: Mapping[str, Any]) -> RunConfig:
    """The base with a method's blocks on top.

    Raises:
        ConfigError: also where they change what all methods must have in common.
    """
    before = config_tree(base)
    config = config_from_tree(_merge_blocks(before, block))
    changed = [key for key in _differences(before, config_tree(config)) if key.startswith(_SHARED_KEYS)]
    if changed:
        wanted = "must be the same for all methods; change it for all by overrides"
        raise ConfigError("\n".join(f"{key}: {wanted}" for key in changed))
    return config


def _merge_blocks(tree: Mapping[str, Any], block: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(tree)
    for key, value in block.items():
        old = result.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            # A preset fills in what a block leaves open, and nothing is open in the base's.
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
    """Write each run's file, unless it was started with one that says the same.

    Raises:
        ConfigError: naming each run that was started with other values.
    """
    mistakes = []
    for run in runs:
        if not run.folder.exists():
            continue
        try:
            stored = config_tree(config_from_tree(read_yaml(run.file)))
        except ConfigError as error:
            mistakes.append(f"{run.folder} was made with a configuration that cannot be read: {error}")
            continue
        changed = _differences(stored, config_tree(run.config))
        if changed := [key for key in changed if not key.startswith(_PATH_KEYS)]:
            mistakes.append(f"{run.folder} was made with other values of {', '.join(changed)}")
    if mistakes:
        mistakes.append("remove what is to be made anew, or choose another --folder")
        raise ConfigError("\n".join(mistakes))
    for run in runs:
        if not run.folder.exists():
            run.file.parent.mkdir(exist_ok=True)
            write_atomic(run.file, to_yaml(config_tree(run.config)))


def _differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Dotted keys at which two trees differ."""
    if not (isinstance(one, Mapping) and isinstance(other, Mapping)):
        return [] if one == other else [path]
    return [
        key
        for name in {**one, **other}
        for key in _differences(one.get(name), other.get(name), f"{path}.{name}" if path else name)
    ]


def _last_error(log: Path) -> str:
    """The error that ends a log, else its last line."""
    text = log.read_text(encoding="utf-8", errors="replace").strip()
    _, found, words = f"\n{text}".rpartition("\nerror: ")
    return words if found else text.rpartition("\n")[2]


def _format_rate(score: Mapping[str, Any]) -> str:
    rate = score["success_rate"]
    return "unknown (all aborted)" if rate is None else f"{100 * rate:.1f} %"
