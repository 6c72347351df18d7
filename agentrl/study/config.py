"""Configuration of a study, and the runs that it consists of."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from agentrl.algorithms.stack import COMPOSE
from agentrl.config import Seed, build, check_own_numbers, merge, read_yaml, suggestion
from agentrl.errors import ConfigError
from agentrl.run.config_files import ConfigFile, find_config, with_origins
from agentrl.run.settings import RunConfig, config_from_tree, config_tree, load_config
from agentrl.run.trust import as_overrides, caller_only_values

CLONE = "clone"
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
    if base.names:
        raise ConfigError(
            f"env is a list ({', '.join(base.names)}), but a study compares methods on one; wanted "
            "base with a single env, or overrides with env={id: ...}"
        )
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
                policy=replace(
                    config.policy, path=str(clone.folder / "model"), revision=None, chat_template=None
                ),
                warm_start=replace(config.warm_start, steps=0),
            )
            runs.append(_study_run(config, name, seed, parent, clone))
    return runs


def _method_config(base: RunConfig, block: Mapping[str, Any]) -> RunConfig:
    """Return the base configuration with the blocks of a method applied.

    Raises:
        ConfigError: If a block is wrong, or changes a key that all methods must share.
    """
    before = config_tree(base)
    config = config_from_tree(_merge_blocks(before, block))
    changed = [key for key in differences(before, config_tree(config)) if key.startswith(_SHARED_KEYS)]
    if changed:
        wanted = "must be the same for all methods; use overrides to change it for all"
        raise ConfigError("\n".join(f"{key}: {wanted}" for key in changed))
    return config


def _merge_blocks(tree: Mapping[str, Any], block: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(tree)
    for key, value in block.items():
        old = result.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping) and COMPOSE not in value:
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


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Return the dotted keys at which two trees differ."""
    if not (isinstance(one, Mapping) and isinstance(other, Mapping)):
        return [] if one == other else [path]
    return [
        key
        for name in {**one, **other}
        for key in differences(one.get(name), other.get(name), f"{path}.{name}" if path else name)
    ]
