"""The lengths that a configuration leaves open: the context, and the tokens of a forward pass."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import psutil
import torch

from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.methods.cloning import cloning
from agentrl.data.trajectory import Episode
from agentrl.learn.settings import LearnerConfig
from agentrl.planning.env_probe import longest_sequence, tokenize_play
from agentrl.planning.memory import learner_bytes
from agentrl.policy.model import context_length, skeleton
from agentrl.run.settings import RunConfig

_MARGIN = 1.5  # other tasks and a better policy's episodes may be longer than a few random ones
_CONTEXT_STEP = 256
_MEMORY_SHARE = 0.6  # of what is free now; the rest is for the cache, environments and other programs
_MOST_TOKENS = {"cpu": 4096, "cuda": 65536, "mps": 8192}  # beyond, a pass gets no faster
_TOKEN_STEP = 512


def is_open(config: RunConfig) -> bool:
    """Return whether the configuration leaves a length to `resolve_limits`."""
    learners = (config.learner, config.warm_start.learner)
    return config.policy.max_context is None or any(each.micro_batch_tokens is None for each in learners)


def resolve_limits(
    config: RunConfig, algorithm: Algorithm, episodes: Sequence[Episode], device: torch.device, ranks: int = 1
) -> tuple[RunConfig, list[str]]:
    """Return the configuration with the lengths that it left open, and a line for each that says why.

    Args:
        config: The configuration of the run.
        algorithm: Its algorithm.
        episodes: A few episodes of random play.
        device: The device that the policy computes on.
        ranks: The number of processes that learn together on this machine.
    """
    notes = []
    if config.policy.max_context is None:
        limit = context_length(skeleton(config.policy), None)
        longest = longest_sequence(tokenize_play(config, episodes, limit))
        wanted = -(-int(longest * _MARGIN) // _CONTEXT_STEP) * _CONTEXT_STEP
        config = replace(config, policy=replace(config.policy, max_context=min(limit, wanted)))
        notes.append(
            f"policy.max_context={config.policy.max_context}: the longest sequence of {len(episodes)} random "
            f"episodes has {longest} tokens, and the model can read {limit}"
        )
    stages = {"learner": (algorithm, config.learner)}
    if config.warm_start.steps:
        stages["warm_start.learner"] = (cloning(), config.warm_start.learner)
    found = {
        name: _fitted(config, stage, learner, device, ranks)
        for name, (stage, learner) in stages.items()
        if learner.micro_batch_tokens is None
    }
    for name, tokens in found.items():
        notes.append(
            f"{name}.micro_batch_tokens={tokens}: as many as {_MEMORY_SHARE:.0%} of free memory hold"
        )
    cloned = replace(
        config.warm_start.learner,
        micro_batch_tokens=config.warm_start.learner.micro_batch_tokens
        or found.get("warm_start.learner", found.get("learner")),
    )
    learner = replace(
        config.learner, micro_batch_tokens=config.learner.micro_batch_tokens or found["learner"]
    )
    return replace(config, learner=learner, warm_start=replace(config.warm_start, learner=cloned)), notes


def text_misfits(config: RunConfig, episodes: Sequence[Episode], limit: int) -> Iterator[str]:
    """Yield a warning for each length that cuts a measured text or ends a measured episode.

    Args:
        config: The configuration of the run.
        episodes: A few episodes of random play.
        limit: The largest number of tokens that the model can read.
    """
    block, count = config.policy, len(episodes)
    whole = tokenize_play(
        replace(config, policy=replace(block, max_observation_tokens=None)), episodes, limit
    )
    if block.max_observation_tokens is not None:
        cut = tokenize_play(config, episodes, limit)
        firsts = sum(
            len(ours.turns[0].prompt_ids) < len(full.turns[0].prompt_ids)
            for ours, full in zip(cut, whole, strict=True)
        )
        if firsts:
            yield (
                f"policy.max_observation_tokens={block.max_observation_tokens} cuts the first observation of "
                f"{firsts} in {count} episodes, and perhaps the task; wanted more, or null"
            )
    ended = sum(longest_sequence([episode]) > (block.max_context or limit) for episode in whole)
    if ended:
        yield (
            f"policy.max_context={block.max_context} ends {ended} of {count} random episodes; wanted "
            f"{longest_sequence(whole)} or more"
        )


def _fitted(
    config: RunConfig, algorithm: Algorithm, learner: LearnerConfig, device: torch.device, ranks: int
) -> int:
    """Return the tokens of a pass that fit into memory; at least a whole sequence."""
    longest = config.policy.max_context
    assert longest is not None
    few, many = (
        sum(
            size
            for size, _ in learner_bytes(
                config, algorithm, replace(learner, micro_batch_tokens=tokens), ranks
            ).values()
        )
        for tokens in (longest, 2 * longest)
    )
    per_token = max(1.0, (many - few) / longest)
    room = _MEMORY_SHARE * _free_bytes(config, device, ranks) - (few - per_token * longest)
    fitting = int(room / per_token) // _TOKEN_STEP * _TOKEN_STEP
    return max(longest, min(fitting, _MOST_TOKENS[device.type]))


def _free_bytes(config: RunConfig, device: torch.device, ranks: int) -> float:
    """Return the free memory of the device for each process, less what vLLM is going to take."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return psutil.virtual_memory().available / ranks
    free, total = torch.cuda.mem_get_info()
    inside = config.engine.name == "vllm" and config.engine.vllm.url is None and config.engine.actors is None
    return free - inside * config.engine.vllm.gpu_memory_share * total
