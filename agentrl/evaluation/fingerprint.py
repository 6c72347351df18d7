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
from agentrl.policy.settings import ENDPOINT, PolicyConfig
from agentrl.rollout.players import Player
from agentrl.run.checkpoint_files import ADAPTER, REFERENCE, checkpoint_name, sha256
from agentrl.run.settings import RunConfig
from agentrl.run.weights import find_model, find_policy

Fingerprint = Mapping[str, Any]
Difference = tuple[str, Any, Any]  # dotted key, and its two values

SCRIPTED = ("random", "expert")
# What scores must share to be compared, and the key of a configuration that decides it; the policy is what is
# compared. Scripted policies have no prompt, no dtype, and of the decoding the seed alone.
COMPARED = {
    "agentrl": "agentrl",
    "data": "data",
    "dtype": "policy.dtype",
    "panel.hash": "panel",
    "panel.repeats": "repeats",
    "panel.max_turns": "rollout.max_turns",
    "prompt.text": "text of policy.prompt",
    "prompt.history": "policy.history",
    "prompt.examples": "policy.examples",
    "prompt.system_message": "policy.system_message",
    "prompt.max_observation_tokens": "policy.max_observation_tokens",
    "decoding.seed": "seed",
    "decoding.temperature": "temperature",
    "decoding.constrained": "rollout.constrained",
    "decoding.max_tokens": "engine.max_tokens",
    "decoding.reply": "policy.reply",
}
# What policies that differ by their training alone share as well.
MODEL = {"policy.model": "policy.path", "policy.revision": "policy.revision"}


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
    block = config.policy
    if name in SCRIPTED:
        return {"agentrl": agentrl.__version__, "policy": {"name": name}, "decoding": {"seed": seed}}
    return {
        "agentrl": agentrl.__version__,
        "policy": {"name": name, **_identity(name, block.revision)},
        "prompt": {**_prompt(block), **wording_hash(player)},
        **_decoding(config, temperature, seed, served=name.startswith(ENDPOINT)),
    }


def run_fingerprint(
    name: str, config: RunConfig, manifest: Mapping[str, Any], temperature: float
) -> dict[str, Any]:
    """Return the same part of the scores that a run has measured itself, of its trained policy.

    Args:
        name: The name of the run.
        config: Its configuration.
        manifest: Its manifest, which holds the version of agentrl and the text of the prompt of that time.
        temperature: The sampling temperature.
    """
    block, recorded = config.policy, manifest.get("prompt", {})
    known = "prompt" in recorded
    prompt = _prompt_of(block, recorded["prompt"], recorded.get("history")) if known else _prompt(block)
    version = manifest.get("versions", {}).get("agentrl")
    return {
        **({} if version is None else {"agentrl": version}),
        "policy": {"name": name, "model": block.path, "revision": block.revision},
        "prompt": prompt,
        **_decoding(config, temperature, config.seed),
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


def unlike(
    one: Fingerprint, other: Fingerprint, *, varying: Collection[str] = (), models: bool = False
) -> list[Difference]:
    """Return the differences for which two scores may not be compared.

    Args:
        one: The fingerprint of a score.
        other: The fingerprint of another score.
        varying: The keys of `COMPARED` that are to differ, such as `decoding.temperature`.
        models: Whether the keys of `MODEL` are compared as well.
    """
    old, new = dict(_leaves(one)), dict(_leaves(other))
    keys = (*COMPARED, *MODEL) if models else COMPARED
    shared = [key for key in keys if key in old and key in new and key not in varying]
    return [(key, old[key], new[key]) for key in shared if old[key] != new[key]]


def check_alike(
    fingerprints: Mapping[str, Fingerprint], *, varying: Collection[str] = (), models: bool = False
) -> None:
    """Refuse to compare scores that were not measured alike.

    Args:
        fingerprints: The fingerprint of each score, by the name of its policy.
        varying: The keys of `COMPARED` that are to differ.
        models: Whether the keys of `MODEL` are compared as well.

    Raises:
        ConfigError: Naming what differs.
    """
    names, described = list(fingerprints), COMPARED | MODEL
    lines = [
        f"{described[key]}: {_short(first)} for {one}, {_short(second)} for {other}"
        for index, one in enumerate(names)
        for other in names[index + 1 :]
        for key, first, second in unlike(
            fingerprints[one], fingerprints[other], varying=varying, models=models
        )
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
    if name.startswith(ENDPOINT):  # what a server calls a model is all that is known
        return {"model": name.removeprefix(ENDPOINT), "revision": None, "checkpoint": None, "weights": None}
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


def _decoding(config: RunConfig, temperature: float, seed: int, *, served: bool = False) -> dict[str, Any]:
    """Return how a policy plays; `served` is one on a chat server."""
    return {
        "dtype": None if served else config.policy.dtype,
        "decoding": {
            "seed": seed,
            "temperature": temperature,
            "constrained": config.rollout.constrained and not served,
            "max_tokens": config.engine.max_tokens,
            "reply": config.policy.reply,
        },
    }


def _prompt(block: PolicyConfig) -> dict[str, Any]:
    """Return what prompts say, whatever the chat template and the tokenizer make of it; texts as hashes."""
    template = load_prompt(block.prompt, block.history)
    if template is None:
        return _prompt_of(block, None, None)
    return _prompt_of(block, template.source, template.history)


def _prompt_of(block: PolicyConfig, text: str | None, history: int | None) -> dict[str, Any]:
    """Return what prompts with the text of a template say; None is a growing dialogue without one."""
    system = block.system_message
    shown = {} if text is None else {"history": history, "examples": block.examples}
    return {
        "template": block.prompt,
        "text": None if text is None else _sha256_of(text),
        **shown,
        "system_message": None if system is None else _sha256_of(system),
        "max_observation_tokens": block.max_observation_tokens,
    }


def _sha256_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
