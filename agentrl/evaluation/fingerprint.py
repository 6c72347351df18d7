"""Fingerprints of results: what a score was measured with, and which scores may be compared."""

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import agentrl
from agentrl.env.panel import Panel
from agentrl.errors import ConfigError
from agentrl.policy.prompt import load_prompt
from agentrl.rollout.players import Player
from agentrl.run.checkpoint_files import ADAPTER, REFERENCE, checkpoint_name, sha256
from agentrl.run.settings import RunConfig
from agentrl.run.weights import find_model, find_policy

Fingerprint = Mapping[str, Any]
Difference = tuple[str, Any, Any]  # dotted key, and its two values

SCRIPTED = ("random", "expert")
# What scores must share to be compared; the policy is what is compared. Scripted policies have none of some.
COMPARED = (
    *("agentrl", "data", "dtype", "panel.hash", "panel.repeats", "panel.max_turns", "prompt.sha256"),
    *(f"decoding.{name}" for name in ("seed", "temperature", "constrained", "max_tokens", "reply")),
)
_NULL_COUNTS = {"data", "panel.max_turns"}  # None says something here, and elsewhere that there is nothing
_KEYS = {
    "dtype": "policy.dtype",
    "prompt.sha256": "policy.prompt, policy.history, policy.examples, policy.system_message or "
    "policy.max_observation_tokens",
    "decoding.constrained": "rollout.constrained",
    "decoding.max_tokens": "engine.max_tokens",
    "decoding.reply": "policy.reply",
    "panel.max_turns": "rollout.max_turns",
}


def policy_fingerprint(
    name: str, config: RunConfig, temperature: float, seed: int, player: Player | None = None
) -> dict[str, Any]:
    """Return the part of a fingerprint that is known before a panel is played: the policy, and how it plays.

    Args:
        name: The policy, as `evaluate` takes it.
        config: The configuration that it plays with.
        temperature: The sampling temperature.
        seed: The seed of the evaluation.
        player: The player, once it is open: it knows the tokens around observations and replies.

    Raises:
        CheckpointError: If there is no such policy.
    """
    block, plays = config.policy, name not in SCRIPTED
    decoding = {
        "temperature": temperature,
        "constrained": config.rollout.constrained,
        "max_tokens": config.engine.max_tokens,
        "reply": block.reply,
    }
    return {
        "agentrl": agentrl.__version__,
        "policy": {"name": name, **(_identity(name, block.revision) if plays else {})},
        "prompt": {"template": block.prompt, "sha256": _prompt_hash(config), **wording_hash(player)}
        if plays
        else None,
        "dtype": block.dtype if plays else None,
        "decoding": {"seed": seed, **(decoding if plays else {})},
    }


def panel_fingerprint(panel: Panel, data: str | None, repeats: int, max_turns: int | None) -> dict[str, Any]:
    """Return the part of a fingerprint that says what was played."""
    tasks = {"env": panel.env, "split": panel.split, "tasks": len(panel.tasks), "hash": panel.hash}
    return {"panel": {**tasks, "repeats": repeats, "max_turns": max_turns}, "data": data}


def wording_hash(player: Player | None) -> dict[str, Any]:
    """Return the hash of the token ids around observations and replies; empty for a player without any."""
    wording = getattr(player, "wording", None)
    return {} if wording is None else {"wording": wording.sha256}


def differences(before: Fingerprint, now: Fingerprint) -> list[Difference]:
    """Return the values that differ, by dotted key; a value that one of the two lacks is None there."""
    old, new = dict(_leaves(before)), dict(_leaves(now))
    return [
        (key, old.get(key), new.get(key))
        for key in dict.fromkeys((*old, *new))
        if old.get(key) != new.get(key)
    ]


def unlike(one: Fingerprint, other: Fingerprint, *, varying: Collection[str] = ()) -> list[Difference]:
    """Return the differences for which two scores may not be compared.

    Args:
        one: The fingerprint of a score.
        other: The fingerprint of another score.
        varying: The keys of `COMPARED` that are to differ, such as `decoding.temperature`.
    """
    return [
        (key, first, second)
        for key, first, second in differences(one, other)
        if key in COMPARED
        and key not in varying
        and (key in _NULL_COUNTS or (first is not None and second is not None))
    ]


def check_alike(fingerprints: Mapping[str, Fingerprint], *, varying: Collection[str] = ()) -> None:
    """Refuse to compare scores that were not measured alike.

    Args:
        fingerprints: The fingerprint of each score, by the name of its policy.
        varying: The keys of `COMPARED` that are to differ.

    Raises:
        ConfigError: Naming what differs.
    """
    names = list(fingerprints)
    lines = [
        f"{_KEYS.get(key, key)}: {_short(first)} for {one}, {_short(second)} for {other}"
        for index, one in enumerate(names)
        for other in names[index + 1 :]
        for key, first, second in unlike(fingerprints[one], fingerprints[other], varying=varying)
    ]
    if lines:
        raise ConfigError("these scores cannot be compared, since they differ in\n" + "\n".join(lines))


def describe_differences(found: Sequence[Difference]) -> str:
    """Return a text such as `repeats was 1, is 4`."""
    return "; ".join(f"{key} was {_short(before)}, is {_short(now)}" for key, before, now in found)


def _leaves(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    is_hash = isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")
    return f"{value[:12]}…" if is_hash else text


def _identity(name: str, revision: str | None) -> dict[str, Any]:
    """Return which model a policy is: its id, its revision, and its checkpoint or the hash of its weights."""
    saved = find_policy(name)
    if saved is not None:
        block = saved.run.config.policy
        named = {"model": block.path, "revision": block.revision, "checkpoint": checkpoint_name(saved.path)}
        return named | {"weights": _weights_hash(saved.path)}
    source = find_model(name, revision)
    asked = source.asked
    folders = [source.path, *([source.adapter.path] if source.adapter else [])]
    # A commit of the hub says what the weights are.
    weights = None if asked.revision is not None else _weights_hash(*folders)
    return {"model": asked.name, "revision": asked.revision, "checkpoint": None, "weights": weights}


def _weights_hash(*places: Path) -> str:
    """Return a hash of the weight files of folders, or of a file."""
    files = [
        file
        for place in places
        for file in (
            sorted((*place.glob("*.safetensors"), *(place / ADAPTER).glob("*.safetensors")))
            if place.is_dir()
            else [place]
        )
        if file.name != REFERENCE
    ]
    return _sha256_of([[file.name, sha256(file)] for file in files])


def _prompt_hash(config: RunConfig) -> str:
    """Return a hash of what prompts say, whatever the chat template and the tokenizer make of it."""
    block = config.policy
    template = load_prompt(block.prompt, block.history)
    text = None if template is None else [template.source, template.history, block.examples]
    return _sha256_of([text, block.system_message, block.max_observation_tokens])


def _sha256_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
