"""Configuration of a study."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from agentrl.config import Seed, build, check_own_numbers, merge, read_yaml, suggestion
from agentrl.errors import ConfigError
from agentrl.run.config_files import ConfigFile, find_config, with_origins

CLONE = "clone"


@dataclass(frozen=True)
class Knob:
    """The key of a method that is tuned.

    Args:
        key: The dotted key, as in `algorithm.clip_high`.
        values: The values that are compared, one of which is that of the method's block. A value that is a
            block is laid over the key's block, so that keys can change together.
    """

    key: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class StudyConfig:
    """Configuration of a study.

    Args:
        base: The configuration file that all runs share; also looked up next to the study's file.
        methods: For each method, the blocks in which it differs from `base`, as in a run's file. An
            `algorithm` with another name or preset replaces the whole block. Besides, a `knob` may hold the
            `key` and `values` to tune; see `Knob`.
        baseline: The method that the others are compared with.
        seeds: The seeds; each method is run once with each of them, and once more with the value that was
            chosen for its knob, if that is not its own.
        tuning_seeds: The seeds that the values of the knobs are compared on; none of `seeds`.
        overrides: `key=value` overrides of `base`.
    """

    base: str
    methods: Mapping[str, Mapping[str, Any]]
    baseline: str
    seeds: tuple[Seed, ...] = (0, 1, 2)
    tuning_seeds: tuple[Seed, ...] = ()
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
        mistakes += self._seed_mistakes()
        mistakes += [
            f"overrides: {item!r} is set by the study itself (seeds, --folder)"
            for item in self.overrides
            if re.match(r"(seed|run)\b", item)
        ]
        if mistakes:
            raise ConfigError("\n".join(mistakes))

    def _seed_mistakes(self) -> list[str]:
        wanted = {
            "seeds": "wanted at least one, without duplicates",
            "tuning_seeds": "wanted none that is in seeds, without duplicates",
        }
        tuned = [name for name, block in self.methods.items() if "knob" in block]
        wrong = {
            "seeds": not self.seeds or len(set(self.seeds)) != len(self.seeds),
            "tuning_seeds": len({*self.tuning_seeds} - {*self.seeds}) != len(self.tuning_seeds),
        }
        mistakes = [
            f"{key}: {wanted[key]} (got {', '.join(map(str, getattr(self, key)))})"
            for key in wrong
            if wrong[key]
        ]
        if tuned and not self.tuning_seeds:
            mistakes.append(f"tuning_seeds: wanted at least one, since {tuned[0]} has a knob")
        return mistakes


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
