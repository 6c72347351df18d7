"""Settings of a study's methods: the default of each, and the other values of its knob."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from agentrl.algorithms.stack import COMPOSE
from agentrl.config import build
from agentrl.errors import ConfigError
from agentrl.run.settings import RunConfig, config_from_tree, config_tree, load_config
from agentrl.study.config import Knob, StudyConfig

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


@dataclass(frozen=True, eq=False)
class Setting:
    """One setting of a method.

    Args:
        method: The name of the method.
        name: The name of its runs: that of the method for the default, else with the value of the knob.
        config: The configuration of its runs, apart from seed, folder and start.
        label: The values that the knob sets, in words; empty without a knob.
    """

    method: str
    name: str
    config: RunConfig
    label: str = ""

    @property
    def default(self) -> bool:
        """Return whether this is the method's own setting."""
        return self.name == self.method


def load_base(study: StudyConfig) -> RunConfig:
    """Return the configuration that all runs of a study share.

    Raises:
        ConfigError: If it is wrong, or has several environments.
    """
    base = load_config(study.base, *study.overrides)
    if base.names:
        raise ConfigError(
            f"env is a list ({', '.join(base.names)}), but a study compares methods on one; wanted "
            "base with a single env, or overrides with env={id: ...}"
        )
    return base


def all_settings(study: StudyConfig, base: RunConfig) -> dict[str, list[Setting]]:
    """Return the settings of each method; its own comes first.

    Args:
        study: The configuration of the study.
        base: What `load_base` returns for it.

    Raises:
        ConfigError: If there are mistakes; each is listed with its method.
    """
    found, mistakes = {}, []
    for method, block in study.methods.items():
        try:
            found[method] = _settings(base, method, block)
        except ConfigError as error:
            mistakes += [f"methods.{method}: {line}" for line in str(error).splitlines()]
    names = Counter(setting.name for settings in found.values() for setting in settings)
    mistakes += [f"methods: two settings are named {name}" for name, count in names.items() if count > 1]
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return found


def _settings(base: RunConfig, method: str, block: Mapping[str, Any]) -> list[Setting]:
    own = {key: value for key, value in block.items() if key != "knob"}
    default = _method_config(base, own)
    if "knob" not in block:
        return [Setting(method, method, default)]
    if not isinstance(block["knob"], Mapping):
        raise ConfigError("knob: wanted a block with `key` and `values`")
    knob = build(Knob, block["knob"], "knob")
    others, labels = [], []
    for value in knob.values:
        config, label = (
            _method_config(base, _merge_blocks(own, _nested(knob.key, value))),
            _label(knob, value),
        )
        if differences(config_tree(default), config_tree(config)):
            others.append(Setting(method, f"{method}-{_slug(label)}", config, label))
        else:
            labels.append(label)
    if len(labels) != 1 or len(knob.values) < 2:
        raise ConfigError(
            f"knob.values: wanted at least two, exactly one of which is the method's own value of {knob.key}"
        )
    return [Setting(method, method, default, labels[0]), *others]


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return dict(value)


def _slug(label: str) -> str:
    """Return a label as a part of a folder's name.

    >>> _slug("clip_high 0.28")
    'clip_high-0_28'
    """
    return re.sub(r"[^\w-]+", "-", label.replace(".", "_")).strip("-")


def _label(knob: Knob, value: Any) -> str:
    """Return the values that a knob sets, in words.

    >>> _label(Knob("algorithm", ()), {"anchors": 0, "continuations": 7})
    'anchors 0, continuations 7'
    """
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return f"{knob.key.rpartition('.')[2]} {value}"


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


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Return the dotted keys at which two trees differ."""
    if not (isinstance(one, Mapping) and isinstance(other, Mapping)):
        return [] if one == other else [path]
    return [
        key
        for name in {**one, **other}
        for key in differences(one.get(name), other.get(name), f"{path}.{name}" if path else name)
    ]
