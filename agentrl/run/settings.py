"""The configuration of a run: every room's own block, composed, validated at once, printed and read back."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Interval

from agentrl.algorithms.recipe import Recipe, build_recipe, preset_overrides, recipe_tree
from agentrl.config import (
    Count,
    Dotted,
    PositiveWeight,
    Seed,
    Share,
    Steps,
    build,
    check_own_numbers,
    parse_overrides,
    set_values,
    to_tree,
)
from agentrl.env.settings import EnvConfig
from agentrl.errors import ConfigError
from agentrl.learn.settings import LearnerConfig
from agentrl.plugins import load_imports
from agentrl.policy.settings import EngineConfig, PolicyConfig
from agentrl.rollout.settings import RolloutConfig
from agentrl.run.config_files import leaves, read_config_files, with_origins
from agentrl.terminal import echo

_log = logging.getLogger(__name__)


def cloning_learner() -> LearnerConfig:
    """Larger steps than reinforcement learning takes, decaying over the step budget."""
    return LearnerConfig(
        learning_rate=3e-3,
        matrix_learning_rate=1e-2,
        weight_decay=0.01,
        warmup_steps=20,
        schedule="cosine",
    )


@dataclass(frozen=True)
class WarmStartConfig:
    """Behaviour cloning of the environment's expert before reinforcement learning.

    Args:
        steps: optimiser steps; 0 starts from random weights (or from `policy.path`).
        batch_size: demonstrations per step.
        demonstrations: how many are played; they are reused when steps * batch_size is larger.
        noise: share of random actions, which stay in the context and out of the loss.
        noise_prefers: the prefix of actions that most of the noise takes when one is admissible.
        learner: optimiser of this stage.
    """

    steps: Steps = 110
    batch_size: Count = 12
    demonstrations: Annotated[int, Interval(ge=1, le=100_000_000)] = 1320
    noise: Share = 0.15
    noise_prefers: str = "take "
    learner: LearnerConfig = field(default_factory=cloning_learner)

    def __post_init__(self) -> None:
        check_own_numbers(self, "warm_start")
        if self.steps and self.demonstrations < self.batch_size:
            raise ConfigError(
                f"warm_start.demonstrations is {self.demonstrations}, wanted at least "
                f"warm_start.batch_size ({self.batch_size})"
            )


_STALE_CAP = 2.0


@dataclass(frozen=True)
class TrainerConfig:
    """The loop of reinforcement learning.

    Args:
        steps: iterations of rollout and update.
        checkpoint_every: steps between checkpoints, in both training stages.
        save_episodes_every: steps between stored rollouts; 0 stores none.
        threads: of torch; None leaves torch's own choice.
        mode: async plays the next steps in a thread, from weights that are a few updates old, while the
            learner learns from the last one; only sync repeats a run exactly.
        max_staleness: of async: updates that may lie between the weights that a step is begun with and those
            that learn from it. 0 gives what sync gives.
        importance_cap: decisions that other weights or another engine drew are weighted by the ratio of the
            learner's probability to that one, at most this (truncated importance sampling); None does so only
            in async with a staleness above 0, at most 2.
    """

    steps: Steps = 240
    checkpoint_every: Annotated[int, Interval(ge=1, le=1_000_000_000)] = 20
    save_episodes_every: Steps = 20
    threads: Annotated[int, Interval(ge=1, le=1024)] | None = 1
    mode: Literal["sync", "async"] = "sync"
    max_staleness: Annotated[int, Interval(ge=0, le=1000)] = 1
    importance_cap: PositiveWeight | None = None

    def __post_init__(self) -> None:
        check_own_numbers(self, "trainer")

    @property
    def correction(self) -> float | None:
        """The cap of importance weights that holds; None weighs nothing."""
        stale = self.mode == "async" and self.max_staleness > 0
        return _STALE_CAP if self.importance_cap is None and stale else self.importance_cap


@dataclass(frozen=True)
class EvaluationConfig:
    """What every policy of a run is measured on.

    Args:
        split: the tasks that are held out.
        tasks: how many of them, from the first.
        panel: a panel file instead of `split` and `tasks`.
        repeats: plays of each task.
        every: steps between evaluations while training; 0 evaluates before and after only.
        baselines: policies that are measured beside the trained one.
        instruction_check: also tell the policy another goal of the same room, where the environment can.
    """

    split: str = "valid_unseen"
    tasks: Count = 240
    panel: str | None = None
    repeats: Count = 1
    every: Steps = 0
    baselines: tuple[Literal["random", "expert", "untrained", "cloned"], ...] = (
        "random",
        "expert",
        "untrained",
        "cloned",
    )
    instruction_check: bool = True

    def __post_init__(self) -> None:
        check_own_numbers(self, "evaluation")


@dataclass(frozen=True)
class RunFolderConfig:
    """Where the run is kept, and which code of its user's it imports.

    Args:
        name: of the folder; None counts up from the environment and algorithm names.
        folder: that holds the runs.
        imports: Python files and modules that register environments and recipes, in every process; a file is
            relative to the configuration that names it. Who opens the run later names them again.
    """

    name: str | None = None
    folder: str = "runs"
    imports: tuple[str, ...] = ()


DEFAULT_RECIPE = "grpo"


@dataclass(frozen=True)
class RunConfig:
    """A whole run; each field is a top-level key of the file."""

    env: EnvConfig = field(default_factory=EnvConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    algorithm: Any = field(default_factory=lambda: build_recipe(DEFAULT_RECIPE))  # a Recipe
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    seed: Seed = 0
    run: RunFolderConfig = field(default_factory=RunFolderConfig)

    def __post_init__(self) -> None:
        check_own_numbers(self)
        if self.engine.name != "vllm":
            return
        temperature = self.rollout.temperature
        if not _VLLM_TEMPERATURES[0] <= temperature <= _VLLM_TEMPERATURES[1]:
            raise ConfigError(
                f"rollout.temperature is {temperature}, wanted within {list(_VLLM_TEMPERATURES)}: "
                "engine.name=vllm draws at no other"
            )
        inside = self.engine.actors is None and self.engine.vllm.url is None
        if inside and "fsdp" in (self.learner.backend, self.warm_start.learner.backend):
            raise ConfigError(
                "engine.name=vllm: in this process it would end the process group of learner.backend=fsdp "
                "with its own; wanted engine.actors, or engine.vllm.url of a server"
            )


_VLLM_TEMPERATURES = (0.01, 2.0)

# Keys of a block that a new value of its naming key makes meaningless.
_NAMING_KEYS = {"algorithm": "name", "env": "id"}


def load_config(
    path: str | Path | None = None, *overrides: str, warn: Any = None, imports: Iterable[str] = ()
) -> RunConfig:
    """Read a run's configuration, and import what it names in `run.imports`.

    Args:
        path: a YAML file, looked for as given and then among the shipped configs; None takes the defaults.
            `extends: FILE` in it names another, whose values it changes.
        overrides: `key=value` with dotted keys, e.g. `learner.learning_rate=3e-4`.
        warn: called with one line for each key that a new `name` dropped, and for each value given in the
            place of what a recipe's `preset` has.
        imports: Python files and modules beside those of `run.imports`.

    Raises:
        ConfigError: listing every mistake with its path, and the file and line or the override that made it.
    """
    files = [] if path is None else read_config_files(path)
    tree = files[0].tree if files else {}
    dropped: list[str] = []
    try:
        for change in (*(list(leaves(file.tree)) for file in files[1:]), parse_overrides(overrides)):
            tree, lost = apply_changes(tree, change)
            dropped += lost
        _log.debug("read %s, then %s", [str(file.path) for file in files], list(overrides))
        for key in dropped:
            (warn or _print)(f"dropped {key}: it belongs to another {_NAMING_KEYS[key.split('.')[0]]}")
        config = config_from_tree(_with_imports(tree, imports))
    except ConfigError as error:
        raise ConfigError(with_origins(str(error), files, overrides)) from error
    for line in preset_overrides(config.algorithm):
        (warn or _print)(line)
    return config


def _with_imports(tree: dict[str, Any], more: Iterable[str]) -> dict[str, Any]:
    """Import what the tree names and `more`, and have the tree name all of it."""
    block = tree.get("run")
    block = {} if block is None else block
    named = block.get("imports", []) if isinstance(block, dict) else None
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        return tree  # which is told with the other mistakes
    try:
        imported = load_imports(named)
    except ConfigError as error:
        raise ConfigError(f"run.imports: {error}") from error
    imported = tuple(dict.fromkeys((*imported, *load_imports(more))))
    return tree | {"run": block | {"imports": list(imported)}} if imported else tree


def config_from_tree(tree: Mapping[str, Any]) -> RunConfig:
    """Build and validate every block, reporting all mistakes at once."""
    blocks = dict(tree)
    algorithm = blocks.pop("algorithm", None)
    if isinstance(blocks.get("env"), dict) and blocks["env"].get("id", EnvConfig.id) != EnvConfig.id:
        blocks["env"] = {"kwargs": {}} | blocks["env"]
    mistakes: list[str] = []
    recipe: Recipe | None = None
    try:
        recipe = _recipe(algorithm)
    except ConfigError as error:
        mistakes.append(str(error))
    config: RunConfig | None = None
    try:
        config = build(RunConfig, blocks)
    except ConfigError as error:
        mistakes.append(str(error))
    if config is None or recipe is None:
        raise ConfigError("\n".join(mistakes))
    return replace(config, algorithm=recipe)


def rank_mistakes(config: RunConfig, ranks: int) -> Iterator[str]:
    """What so many processes that learn together could not share."""
    if ranks == 1:
        return
    if config.learner.backend == "single":
        yield f"learner.backend is single, wanted fsdp for {ranks} processes"
    if config.rollout.groups_per_step % ranks:
        yield (
            f"rollout.groups_per_step is {config.rollout.groups_per_step}, wanted a multiple of the "
            f"{ranks} processes"
        )
    if config.evaluation.panel is None and config.evaluation.tasks < ranks:
        yield (
            f"evaluation.tasks is {config.evaluation.tasks}, wanted at least one for each of the "
            f"{ranks} processes"
        )


def config_tree(config: RunConfig) -> dict[str, Any]:
    """Plain values, ready for YAML; `config_from_tree` reads them back."""
    tree = {item.name: to_tree(getattr(config, item.name)) for item in fields(config)}
    tree["algorithm"] = recipe_tree(config.algorithm)
    return tree


def _recipe(block: Any) -> Recipe:
    block = {} if block is None else block
    if not isinstance(block, Mapping):
        raise ConfigError(f"algorithm: got {block!r}, wanted a block with a name")
    name = block.get("name", DEFAULT_RECIPE)
    if not isinstance(name, str):
        raise ConfigError(f"algorithm.name: got {name!r}, wanted the name of a recipe")
    return build_recipe(name, {k: v for k, v in block.items() if k != "name"})


def apply_changes(
    tree: Mapping[str, Any], changes: Iterable[tuple[Dotted, Any]]
) -> tuple[dict[str, Any], list[str]]:
    """Change values; a new name empties its block first, whatever the order of the changes.

    Args:
        tree: to be changed; it stays as it is.
        changes: paths and values, see `parse_overrides`.

    Returns:
        The changed tree, and the dotted keys that were dropped.
    """
    changed, changes = deepcopy(dict(tree)), list(changes)
    dropped: list[str] = []
    for (*path, key), value in sorted(changes, key=lambda change: len(change[0])):
        block = _block(changed, path)
        # An environment's arguments may be called anything; the blocks inside an algorithm are recipes.
        naming = path == ["env"] or path[:1] == ["algorithm"]
        if not naming or key != _NAMING_KEYS[path[0]] or value == block.get(key):
            continue
        kept = {"split"} if path == ["env"] else set()
        dropped += [f"{'.'.join(path)}.{old}" for old in block if old not in {key, *kept}]
        for old in set(block) - kept:
            del block[old]
    return set_values(changed, changes), dropped


def _block(tree: dict[str, Any], path: Sequence[str]) -> dict[str, Any]:
    """The block at a path; an empty one of its own where there is none."""
    found: Any = tree
    for part in path:
        found = found.get(part) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}


def _print(line: str) -> None:
    echo(line, err=True)
