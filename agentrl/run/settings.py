"""Configuration of a run: the blocks of all packages, read, validated and written as one."""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Interval

from agentrl.algorithms.recipe import Recipe, build_recipe, preset_overrides, recipe_tree
from agentrl.algorithms.stack import COMPOSE, build_stack, part_path, parts_by_index, stack_tree
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
    to_yaml,
)
from agentrl.env.names import split_task, unknown
from agentrl.env.settings import EnvConfig
from agentrl.errors import ConfigError
from agentrl.learn.settings import LearnerConfig, LoraConfig
from agentrl.plugins import load_imports
from agentrl.policy.settings import EngineConfig, PolicyConfig
from agentrl.rollout.settings import RolloutConfig
from agentrl.run.config_files import leaves, read_config_files, with_origins
from agentrl.run.mixture import (
    MixedEnvConfig,
    build_mixture,
    environment_path,
    environments_by_index,
    unknown_environment,
)
from agentrl.run.presets import with_preset
from agentrl.terminal import echo

_log = logging.getLogger(__name__)


def cloning_learner() -> LearnerConfig:
    """Return the default learner of the warm start: higher learning rates, which decay over its steps."""
    return LearnerConfig(
        learning_rate=3e-3,
        matrix_learning_rate=1e-2,
        weight_decay=0.01,
        warmup_steps=20,
        schedule="cosine",
    )


@dataclass(frozen=True)
class WarmStartConfig:
    """Behaviour cloning before reinforcement learning, of the environment's expert or of data of your own.

    Args:
        steps: The number of optimizer steps; 0 starts from random weights (or from `policy.path`).
        batch_size: The number of demonstrations per step.
        demonstrations: The number of demonstrations to play; they are reused if steps * batch_size is larger.
        noise: The share of random actions, which stay in the context and out of the loss.
        noise_prefers: The prefix of actions that most random actions have, if one is admissible.
        data: A file, or a list of files, to clone in place of the expert: chat messages, trajectories of
            AgentGym or ETO, or stored episodes, see docs/own-data.md.
        from_: The folder or name of a run whose stored training episodes are cloned in place of the expert.
            The key is `warm_start.from`.
        only_successes: Whether episodes of `data` and `from` that failed are left out.
        learner: The optimizer settings of this stage.
    """

    steps: Steps = 110
    batch_size: Count = 12
    demonstrations: Annotated[int, Interval(ge=1, le=100_000_000)] = 1320
    noise: Share = 0.15
    noise_prefers: str = "take "
    data: str | tuple[str, ...] | None = None
    from_: str | None = None
    only_successes: bool = True
    learner: LearnerConfig = field(default_factory=cloning_learner)

    @property
    def files(self) -> tuple[str, ...]:
        """Return the files of `data`."""
        return (self.data,) if isinstance(self.data, str) else self.data or ()

    @property
    def own_data(self) -> str:
        """Return the keys that name data to clone in place of the expert; empty without any."""
        named = {"data": self.data is not None, "from": self.from_ is not None}
        return " and ".join(f"warm_start.{key}" for key, given in named.items() if given)

    def __post_init__(self) -> None:
        check_own_numbers(self, "warm_start")
        if self.learner.teacher is not None:
            raise ConfigError(
                f"warm_start.learner.teacher is {self.learner.teacher!r}, wanted null: cloning has no "
                "teacher; set learner.teacher"
            )
        if self.data is not None and not (self.files and all(self.files)):
            raise ConfigError(f"warm_start.data is {self.data!r}, wanted a file, a list of files, or null")
        if self.own_data and not self.steps:
            raise ConfigError(
                f"warm_start.steps is 0, wanted at least 1: {self.own_data} is cloned in these steps"
            )
        if self.steps and not self.own_data and self.demonstrations < self.batch_size:
            raise ConfigError(
                f"warm_start.demonstrations is {self.demonstrations}, wanted at least "
                f"warm_start.batch_size ({self.batch_size})"
            )


_STALE_CAP = 2.0


@dataclass(frozen=True)
class TrainerConfig:
    """Loop of reinforcement learning.

    Args:
        steps: The number of iterations of rollout and update. A run may be resumed with more, as long as no
            schedule changes by it.
        schedule_steps: The number of steps that schedules are computed over, such as the decay of the
            learning rate, after which they keep their last value; null takes `steps`.
        checkpoint_every: The number of steps between checkpoints, in both training stages.
        keep_checkpoints: The number of newest checkpoints to keep, besides the one with the highest success
            rate in training; null keeps all.
        save_episodes_every: The number of steps between stored rollouts; 0 stores none.
        threads: The number of torch threads; None leaves the choice to torch.
        mode: `async` plays the next steps in a thread, with weights that are a few updates old, while the
            learner learns from the previous one; only `sync` runs are exactly reproducible.
        max_staleness: For `async`, the maximum number of updates between the weights that a step starts with
            and those that learn from it; 0 gives the same results as `sync`.
        importance_cap: The cap of the importance weights (truncated importance sampling): tokens sampled with
            other weights or by another engine are weighted by the ratio of the learner's probability to that
            of the sampler. None applies a cap of 2 in `async` mode with a staleness above 0, unless the
            method corrects the mismatch itself, and else no weights.
    """

    steps: Steps = 240
    schedule_steps: Annotated[int, Interval(ge=1, le=1_000_000_000)] | None = None
    checkpoint_every: Annotated[int, Interval(ge=1, le=1_000_000_000)] = 20
    keep_checkpoints: Annotated[int, Interval(ge=1, le=1_000_000_000)] | None = 2
    save_episodes_every: Steps = 20
    threads: Annotated[int, Interval(ge=1, le=1024)] | None = 1
    mode: Literal["sync", "async"] = "sync"
    max_staleness: Annotated[int, Interval(ge=0, le=1000)] = 1
    importance_cap: PositiveWeight | None = None

    def __post_init__(self) -> None:
        check_own_numbers(self, "trainer")

    @property
    def scheduled_steps(self) -> int:
        """Return the number of steps that schedules are computed over."""
        return self.steps if self.schedule_steps is None else self.schedule_steps

    @property
    def correction(self) -> float | None:
        """Return the effective cap of the importance weights, or None if they are not applied."""
        stale = self.mode == "async" and self.max_staleness > 0
        return _STALE_CAP if self.importance_cap is None and stale else self.importance_cap


@dataclass(frozen=True)
class PanelConfig:
    """One of several panels: the first tasks of a split of an environment.

    Args:
        env: The id of the environment.
        split: The split of its tasks; null takes `evaluation.split` if the environment has it, else its last
            split, held out by convention.
        tasks: The number of tasks; null takes `evaluation.tasks`, or all where the split has fewer.
        kwargs: The arguments of the environment.
    """

    env: str
    split: str | None = None
    tasks: Count | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_own_numbers(self)


@dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation of the policies of a run.

    Args:
        split: The split of the held-out tasks.
        tasks: The number of tasks, from the first.
        panel: A panel file to use instead of `split` and `tasks`.
        panels: Several panels to use instead, each with results of its own; an entry is a panel file, or a
            block of `env`, `split`, `tasks` and `kwargs`.
        repeats: The number of episodes per task.
        every: The number of steps between evaluations during training; 0 evaluates only before and after.
        baselines: The policies to evaluate in addition to the trained one.
        instruction_check: Whether to also give the policy another goal for the same initial state, if the
            environment has one.
    """

    split: str = "valid_unseen"
    tasks: Count = 240
    panel: str | None = None
    panels: tuple[str | PanelConfig, ...] = ()
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
        if self.panel is not None and self.panels:
            raise ConfigError(
                f"evaluation.panel is {self.panel!r} beside evaluation.panels; list it there or leave one out"
            )


@dataclass(frozen=True)
class RunFolderConfig:
    """Folder of a run, and the user code that it imports.

    Args:
        name: The name of the folder; None makes a numbered one from the environment and the algorithm.
        folder: The parent folder of the runs.
        imports: Python files and modules that register environments and recipes, in every process. A file is
            relative to the configuration that names it. They must be named again to open the run later.
    """

    name: str | None = None
    folder: str = "runs"
    imports: tuple[str, ...] = ()


DEFAULT_RECIPE = "grpo"


@dataclass(frozen=True)
class RunConfig:
    """Configuration of a run; each field is a top-level key of the file."""

    env: EnvConfig | tuple[MixedEnvConfig, ...] = field(default_factory=EnvConfig)
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
        if self.names and self.evaluation.panel is not None:
            raise ConfigError(
                f"evaluation.panel is {self.evaluation.panel!r}, but env is a list; "
                "wanted evaluation.split and evaluation.tasks, of which a panel of each is made"
            )
        if self.engine.name != "vllm":
            return
        self.check_temperature("rollout.temperature", self.rollout.temperature)
        inside = self.engine.actors is None and self.engine.vllm.url is None
        if inside and "fsdp" in (self.learner.backend, self.warm_start.learner.backend):
            raise ConfigError(
                "engine.name=vllm: in this process, it would destroy the process group of "
                "learner.backend=fsdp; wanted engine.actors, or engine.vllm.url of a server"
            )

    @property
    def largest_adapters(self) -> LoraConfig | None:
        """Return the largest rank and all targets of the adapters that are trained; None if none are."""
        stages = [self.learner, *([self.warm_start.learner] if self.warm_start.steps else [])]
        trained = [stage.lora for stage in stages if stage.lora is not None]
        if not trained:
            return None
        targets = dict.fromkeys(name for lora in trained for name in lora.targets)
        return LoraConfig(rank=max(lora.rank for lora in trained), targets=tuple(targets))

    @property
    def environments(self) -> tuple[EnvConfig, ...]:
        """Return the environments to train on."""
        return (self.env,) if isinstance(self.env, EnvConfig) else self.env

    @property
    def only_env(self) -> EnvConfig:
        """Return the environment of a configuration that has no list of them; see `each_alone`."""
        if not isinstance(self.env, EnvConfig):
            raise TypeError("a configuration of several environments was used as that of one")
        return self.env

    def describe_environments(self) -> str:
        """Return the id of the environment, or the names of several with their shares."""
        if isinstance(self.env, EnvConfig):
            return self.env.id
        total = sum(env.weight for env in self.env)
        return ", ".join(f"{env.name} {env.weight / total:.0%}" for env in self.env)

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of several environments; empty for a single one."""
        return () if isinstance(self.env, EnvConfig) else tuple(env.name for env in self.env)

    def find_environment(self, name: str) -> EnvConfig | None:
        """Return the environment with that name or id, None if there is none."""
        matches = [env for env in self.environments if name in (env.label, env.id)]
        return min(matches, key=lambda env: env.label != name, default=None)

    def each_alone(self) -> "Iterator[RunConfig]":
        """Yield the configuration with each of its environments alone, and with that one's placement."""
        if isinstance(self.env, EnvConfig):
            yield self
            return
        block = self.rollout
        for env in self.env:
            count = env.environments_per_worker or block.workers.environments
            workers = replace(block.workers, environments=count)
            rollout = replace(block, placement=env.placement or block.placement, workers=workers)
            yield replace(self, env=env, rollout=rollout)

    def alone(self, name: str) -> "RunConfig":
        """Return the configuration with one of its environments alone, given by its name or id.

        Raises:
            ConfigError: There is no such environment.
        """
        env = self.find_environment(name)
        if env is None:
            raise unknown(
                "environment of the configuration", name, [each.label for each in self.environments]
            )
        return next(alone for alone in self.each_alone() if alone.only_env is env)

    def environment_of(self, task: str) -> EnvConfig:
        """Return the environment of a training task, whose id begins with the name of one of several."""
        if isinstance(self.env, EnvConfig):
            return self.env
        name, _ = split_task(task)
        return next(env for env in self.env if env.name == name)

    def check_temperature(self, name: str, temperature: float) -> None:
        """Refuse a temperature of training that the engine cannot sample at.

        Raises:
            ConfigError: With the name and the value.
        """
        low, high = _VLLM_TEMPERATURES if self.engine.name == "vllm" else (0.0, _MAX_TEMPERATURE)
        if not low <= temperature <= high or temperature == 0:
            wanted = (
                f"within {[low, high]}, the range of engine.name=vllm"
                if low
                else f"above 0, at most {high:g}"
            )
            raise ConfigError(f"{name} is {temperature}, wanted {wanted}")


_VLLM_TEMPERATURES = (0.01, 2.0)
_MAX_TEMPERATURE = 1000.0

# The key that names the kind of a block: a new value makes the other keys of the block meaningless. The list
# of an algorithm's parts is another such key.
_NAMING_KEYS = {"algorithm": "name", "env": "id"}


def load_config(
    path: str | Path | None = None, *overrides: str, warn: Any = None, imports: Iterable[str] = ()
) -> RunConfig:
    """Read the configuration of a run, and import the modules of its `run.imports`.

    Args:
        path: A YAML file, looked up as given and then among the shipped configs; None takes the defaults.
            With `extends: FILE`, it changes the values of another file.
        overrides: `key=value` overrides with dotted keys, e.g. `learner.learning_rate=3e-4`.
        warn: Called with one line for each key that a new `name` dropped, for the values that
            `policy.preset` sets, and for each value that overrides one of a recipe's `preset`. By default,
            the lines are printed to standard error.
        imports: Python files and modules to import in addition to `run.imports`.

    Raises:
        ConfigError: If there are mistakes; each is listed with its key and its file and line, or override.
    """
    files = [] if path is None else read_config_files(path)
    tree: dict[str, Any] = files[0].tree if files else {}
    dropped: list[str] = []
    try:
        layers = [list(leaves(file.tree)) for file in files[1:]] + [parse_overrides(overrides)]
        tree, preset_line = with_preset(tree, layers, partial(_apply, dropped))
        _log.debug("read %s, then %s", [str(file.path) for file in files], list(overrides))
        for key in dict.fromkeys(dropped):
            (warn or _print)(f"dropped {key}: it belongs to another {_NAMING_KEYS[key.split('.')[0]]}")
        config = config_from_tree(_with_imports(tree, imports))
    except ConfigError as error:
        raise ConfigError(with_origins(str(error), files, overrides, partial(stored_path, tree))) from error
    for line in (*([preset_line] if preset_line else []), *preset_overrides(config.algorithm)):
        (warn or _print)(line)
    return config


def _apply(
    dropped: list[str], tree: Mapping[str, Any], changes: Iterable[tuple[Dotted, Any]]
) -> dict[str, Any]:
    """Apply changes, and append the keys that they drop to `dropped`."""
    changed, lost = apply_changes(tree, changes)
    dropped += lost
    return changed


def _with_imports(tree: dict[str, Any], more: Iterable[str]) -> dict[str, Any]:
    """Import the modules that the tree names and `more`, and add the latter to the tree."""
    block = tree.get("run")
    block = {} if block is None else block
    named = block.get("imports", []) if isinstance(block, dict) else None
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        return tree  # reported together with the other mistakes
    try:
        imported = load_imports(named)
    except ConfigError as error:
        raise ConfigError(f"run.imports: {error}") from error
    imported = tuple(dict.fromkeys((*imported, *load_imports(more))))
    return tree | {"run": block | {"imports": list(imported)}} if imported else tree


def with_changes(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """Return a configuration with the values of `key=value` overrides.

    Raises:
        ConfigError: If a key or a value is wrong.
    """
    if not overrides:
        return config
    return config_from_tree(apply_changes(config_tree(config), parse_overrides(overrides))[0])


def config_from_tree(tree: Mapping[str, Any]) -> RunConfig:
    """Build and validate every block, and report all mistakes at once."""
    blocks = dict(tree)
    algorithm, env = blocks.pop("algorithm", None), blocks.get("env")
    if isinstance(env, dict) and env.get("id", EnvConfig.id) != EnvConfig.id:
        blocks["env"] = {"kwargs": {}} | env
    made: dict[str, Any] = {}
    mistakes: list[str] = []
    try:
        made["algorithm"] = _recipe(algorithm)
    except ConfigError as error:
        mistakes.append(str(error))
    try:
        if isinstance(env, list):
            del blocks["env"]
            made["env"] = build_mixture(env)
    except ConfigError as error:
        mistakes.append(str(error))
    config: RunConfig | None = None
    try:
        config = build(RunConfig, blocks)
    except ConfigError as error:
        mistakes.append(str(error))
    if config is None or mistakes:
        raise ConfigError("\n".join(mistakes))
    return replace(config, **made)


def rank_mistakes(config: RunConfig, ranks: int) -> Iterator[str]:
    """Yield the settings that cannot be shared by this number of training processes."""
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
    """Return plain values, which `config_from_tree` reads back; recipes are nested blocks."""
    tree = {item.name: to_tree(getattr(config, item.name)) for item in fields(config)}
    tree["algorithm"] = recipe_tree(config.algorithm)
    return tree


def tree_by_index(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a configuration with several environments as blocks by their index."""
    return {**tree, "env": environments_by_index(tree["env"])}


def config_yaml(config: RunConfig) -> str:
    """Return the text of a complete configuration file, which `load_config` reads back.

    An algorithm of several recipes is a list, see `agentrl.algorithms.stack`.
    """
    return to_yaml(config_tree(config) | {"algorithm": stack_tree(config.algorithm)})


def _recipe(block: Any) -> Recipe:
    block = {} if block is None else block
    if not isinstance(block, Mapping):
        raise ConfigError(f"algorithm: got {block!r}, wanted a block with a name")
    if COMPOSE in block:
        return build_stack(block)
    name = block.get("name", DEFAULT_RECIPE)
    if not isinstance(name, str):
        raise ConfigError(f"algorithm.name: got {name!r}, wanted the name of a recipe")
    return build_recipe(name, {k: v for k, v in block.items() if k != "name"})


def stored_path(tree: Mapping[str, Any], dotted: Dotted) -> Dotted:
    """Return the path at which a configuration holds the value that a user names.

    See `part_path` for parts of an algorithm, and `environment_path` for one of several environments.
    """
    if dotted[:1] != ("algorithm",):
        return environment_path(tree.get("env"), dotted)
    return ("algorithm", *part_path(_block(tree, ["algorithm"]), dotted[1:]))


def apply_changes(
    tree: Mapping[str, Any], changes: Iterable[tuple[Dotted, Any]]
) -> tuple[dict[str, Any], list[str]]:
    """Change values of a configuration; a new name empties its block first, whatever the order.

    So does a new list of an algorithm's parts. A new name of a part, or a new id of one of several
    environments, empties only that one.

    Args:
        tree: The values to change; it is not modified.
        changes: The paths and new values, see `parse_overrides`. Paths into parts of an algorithm and into
            environments of a list may have any form that `stored_path` reads.

    Returns:
        The changed tree, and the dotted keys that were dropped.

    Raises:
        ConfigError: A path leads through a value that is not a block, or to a part or an environment that is
            not there.
    """
    changed, changes = deepcopy(dict(tree)), list(changes)
    whole = [change for change in changes if change[0] in _WHOLE]
    dropped = [key for change in whole for key in _emptied(changed, *change)]
    changed = set_values(changed, whole)
    inside = [(stored_path(changed, path), value) for path, value in changes if path not in _WHOLE]
    composed, mixed = isinstance(_block(changed, ["algorithm"]).get(COMPOSE), list), _is_mixture(changed)
    if composed:
        changed["algorithm"] = parts_by_index(changed["algorithm"])
    if mixed:
        changed = tree_by_index(changed)
    _check_parts(changed, inside, mixed)
    for change in sorted(inside, key=lambda change: len(change[0])):
        dropped += _emptied(changed, *change)
    changed = set_values(changed, inside)
    if composed and isinstance(parts := _block(changed, ["algorithm"]).get(COMPOSE), dict):
        changed["algorithm"][COMPOSE] = list(parts.values())
    if mixed:
        changed["env"] = list(changed["env"].values())
    return changed, dropped


_WHOLE_ALGORITHM = (("algorithm", "name"), ("algorithm", COMPOSE))
_WHOLE = (*_WHOLE_ALGORITHM, ("env",))


def _is_mixture(tree: Mapping[str, Any]) -> bool:
    return isinstance(tree.get("env"), list)


def _emptied(tree: dict[str, Any], dotted: Dotted, value: Any) -> list[str]:
    """Empty the block that a change names anew, and return the dotted keys that were dropped."""
    *path, key = dotted
    block = _block(tree, path)
    # Blocks inside an algorithm are recipes; an environment's arguments may have any names.
    of_env = path == ["env"] or (path[:1] == ["env"] and len(path) == 2 and path[1].isdigit())
    naming = of_env or path[:1] == ["algorithm"]
    if not naming or value == block.get(key):
        return []
    if key != _NAMING_KEYS[path[0]] and dotted not in _WHOLE_ALGORITHM:
        return []
    kept = {"split", "name", "weight"} if of_env else set()
    dropped = [(*path, old) for old in block if old not in {key, _NAMING_KEYS[path[0]], *kept}]
    for old in set(block) - kept:
        del block[old]
    return [re.sub(rf"\.{COMPOSE}\.(\d+)", rf".{COMPOSE}[\1]", ".".join(names)) for names in dropped]


def _check_parts(tree: Mapping[str, Any], changes: Sequence[tuple[Dotted, Any]], mixed: bool) -> None:
    """Refuse changes of parts or environments that are not there; both are blocks by index.

    Args:
        tree: The values.
        changes: The paths and new values.
        mixed: Whether `env` was a list.
    """
    block = _block(tree, ["algorithm"])
    parts = block.get(COMPOSE)
    known = parts if isinstance(parts, dict) else {}
    mistakes = [
        f"{'.'.join(dotted)}: the configuration names no part {dotted[2]}"
        for dotted, _ in changes
        if dotted[:2] == ("algorithm", COMPOSE) and len(dotted) > 2 and dotted[2] not in known
    ]
    mistakes += [
        unknown_environment(tree["env"], dotted)
        for dotted, _ in changes
        if mixed and dotted[0].partition("[")[0] == "env" and (*dotted[1:2], "")[0] not in tree["env"]
    ]
    if mistakes:
        raise ConfigError("\n".join(mistakes))


def _block(tree: Mapping[str, Any], path: Sequence[str]) -> dict[str, Any]:
    """Return the block at a path, or a new empty one if there is none."""
    found: Any = tree
    for part in path:
        found = found.get(part) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}


def _print(line: str) -> None:
    echo(line, err=True)
