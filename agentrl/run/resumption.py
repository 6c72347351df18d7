"""Changes with which a run may be resumed: none of what was learned, and more steps."""

import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from agentrl.config import parse_overrides
from agentrl.env.registry import env_ids
from agentrl.errors import ConfigError
from agentrl.files import remove_folder, write_atomic
from agentrl.plugins import import_hashes, withheld_hint
from agentrl.run.config_files import with_origins
from agentrl.run.folder import Run, open_run, value_at
from agentrl.run.records import read_evaluations, read_manifest, write_evaluations
from agentrl.run.settings import (
    RunConfig,
    apply_changes,
    config_from_tree,
    config_tree,
    config_yaml,
    stored_path,
    tree_by_index,
)

_log = logging.getLogger(__name__)

# Keys that may change when a run is resumed: none affects what is learned (but see `rollout.placement`).
_RESUMABLE_KEYS = (
    "run.",
    "trainer.checkpoint_every",
    "trainer.keep_checkpoints",
    "trainer.save_episodes_every",
    "learner.launcher",
    "learner.processes",
    "rollout.placement",
    "rollout.workers.",
    "env.*.placement",
    "env.*.environments_per_worker",
    "rollout.ray.",
    "engine.actor_restarts",
    "engine.vllm.url",
    "engine.vllm.weights_folder",
    "engine.vllm.reply_timeout",
    "engine.vllm.max_restarts",
    "rollout.max_attempts",
    "rollout.max_aborted_share",
)

_ENV_PLACE = re.compile(r"^env\.\d+\.")  # of several environments
_STEP_KEYS = ("trainer.steps", "trainer.schedule_steps")  # of more steps, see `_check_raised`


def with_overrides(run: Run, overrides: tuple[str, ...]) -> Run:
    """Return the run with changed keys, none of which may change what is learned in the steps so far.

    `trainer.steps` may be raised if no schedule changes by it.

    Args:
        run: The stored run.
        overrides: `key=value` overrides.

    Raises:
        ConfigError: If a key may not change (all of them are listed), or the environment was not imported.
    """
    unknown = [env.id for env in run.config.environments if env.id not in env_ids()]
    if run.config.run.imports and unknown:
        raise ConfigError(f"{run.folder} plays {unknown[0]}, which is unknown here{withheld_hint()}")
    _warn_of_changed_imports(run)
    before = config_tree(run.config)
    try:
        config = config_from_tree(apply_changes(before, parse_overrides(overrides))[0])
    except ConfigError as error:
        raise ConfigError(with_origins(str(error), [], overrides, partial(stored_path, before))) from error
    before, after = tree_by_index(before), tree_by_index(config_tree(config))
    if config.run.imports != run.config.run.imports:
        raise ConfigError(
            "run.imports: cannot change when a run is resumed; use --import for further modules"
        )
    raised = _check_raised(run, config)
    free = (*_RESUMABLE_KEYS, *_STEP_KEYS) if raised else _RESUMABLE_KEYS
    keys = _changed_keys(before, after)
    changed = [key for key in keys if not _ENV_PLACE.sub("env.*.", key).startswith(free)]
    if changed:
        lines = "\n".join(f"{key}: {value_at(before, key)!r} -> {value_at(after, key)!r}" for key in changed)
        raise ConfigError(
            f"{run.folder} cannot be resumed with other values; start a new run instead:\n{lines}"
        )
    return Run(run.folder, config)


def _check_raised(run: Run, config: RunConfig) -> bool:
    """Return whether more steps are asked for; refuse fewer, and those that would change a schedule.

    Raises:
        ConfigError: Naming the schedule, and how to go on without changing it.
    """
    before, after = run.config.trainer, config.trainer
    if after.steps < before.steps:
        raise ConfigError(
            f"trainer.steps: {before.steps} -> {after.steps}: the steps of {run.folder} can be raised, not "
            f"lowered; stop it with Ctrl-C and use a checkpoint of it instead (runs/NAME/checkpoints/...)"
        )
    if after.steps > before.steps and after.scheduled_steps != before.scheduled_steps:
        readers = ["learner.schedule=cosine"] if config.learner.schedule == "cosine" else []
        readers += [f"algorithm.name={config.algorithm.name}"] if config.algorithm.build().scheduled else []
        if readers:
            raise ConfigError(
                f"trainer.steps: {before.steps} -> {after.steps} would change the schedule of "
                f"{' and of '.join(readers)}, which {run.folder} has followed over {before.scheduled_steps} "
                f"steps. Add trainer.schedule_steps={before.scheduled_steps} to keep it, with its last value "
                "in the further steps, or start a new run"
            )
    return after.steps > before.steps


def record_more_steps(run: Run) -> None:
    """Make the number of steps that a run was resumed with that of its folder.

    What the end of fewer steps left is kept under other names, such as its scores as those of that step. The
    model or the adapter is removed if the checkpoint of that step holds the same weights.
    """
    stored, trainer = open_run(run.folder).config, run.config.trainer
    if trainer.steps <= stored.trainer.steps:
        return
    name = f"step-{stored.trainer.steps:06d}"
    scores = {each: read_evaluations(run.folder, each) for each in stored.names or (None,)}
    summary = run.folder / "summary.json"
    if summary.exists():
        summary.replace(run.folder / f"summary-{name}.json")
    for environment, found in scores.items():
        if "trained" in found:
            found[name] = found.pop("trained")
        found.pop("instruction_check", None)  # of the policy at the end; the summary holds it
        if found:
            write_evaluations(run.folder, found, environment)
    for path in (run.folder / "episodes").glob("trained-*.parquet"):
        path.replace(path.with_name(path.name.replace("trained", name)))
    for folder in (run.model, run.adapter):
        if folder.is_dir() and (run.checkpoints / f"train-{stored.trainer.steps:06d}").is_dir():
            remove_folder(folder)
        elif folder.is_dir():
            folder.rename(run.folder / f"{folder.name}-{name}")
    raised = replace(stored.trainer, steps=trainer.steps, schedule_steps=trainer.schedule_steps)
    write_atomic(run.folder / "config.yaml", config_yaml(replace(stored, trainer=raised)))


def _warn_of_changed_imports(run: Run) -> None:
    began = (read_manifest(run.folder) or {}).get("imports")
    if not isinstance(began, dict):
        return  # a run without imports
    for name, now in import_hashes(run.config.run.imports).items():
        if began.get(name, now) != now:
            _log.warning("%s has changed since %s began: what the run learns may differ", name, run.folder)


def _changed_keys(before: Mapping[str, Any], after: Mapping[str, Any], path: str = "") -> list[str]:
    keys = []
    for key in {**before, **after}:
        old, new = before.get(key), after.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            keys += _changed_keys(old, new, f"{path}{key}.")
        elif old != new:
            keys.append(f"{path}{key}")
    return keys
