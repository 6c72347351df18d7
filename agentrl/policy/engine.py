"""Engines: token ids in, sampled token ids with their logprobs and entropies out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from agentrl.policy.thinking import Thinking


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How replies are drawn.

    Args:
        temperature: 0 takes the most likely token; logprobs and entropies are then those at temperature 1.
        max_tokens: limit on a reply that is free, or thinks before its choice; a choice alone ends where it
            ends.
    """

    temperature: float = 1.0
    max_tokens: int = 64


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """Continue a sequence.

    Args:
        sequence: names the token sequence (and its KV cache) to extend; one request per sequence at a time.
        prompt_ids: tokens to append before generating; the whole prompt when `new_sequence`.
        new_sequence: forget what the sequence held.
        choices: the admissible replies as token ids, each ending in a stop id; None generates freely.
        seed: fixes the draw, whatever else is in the batch.
        sampling: how to draw.
        parent: a sequence that begins with the same tokens, for a new one: what is known of those is not
            computed again. Changes nothing else, and may be unknown.
        thinking: what comes before the choice: thoughts, as far as `sampling.max_tokens` and the context
            leave room for them beside the longest choice. Its opening is part of the prompt.
        begun: thoughts that are there already, at the end of the prompt.
    """

    sequence: str
    prompt_ids: tuple[int, ...]
    new_sequence: bool
    choices: tuple[tuple[int, ...], ...] | None
    seed: int
    sampling: SamplingParams
    parent: str | None = None
    thinking: Thinking | None = None
    begun: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Generation:
    """What was sampled; with an `error` nothing was.

    The fields of tokens and of versions are those of `agentrl.data.Turn`.
    """

    sequence: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    entropies: tuple[float, ...] = ()
    allowed: tuple[tuple[int, ...] | None, ...] | None = None
    finish: str = "stop"  # stop | length
    policy_version: int = 0
    policy_versions: tuple[int, ...] = ()
    error: str | None = None
    lost: bool = False  # with an error: the engine failed, whatever the request was; it may be asked again


def token_versions(changes: Sequence[tuple[int, int]], length: int) -> tuple[int, tuple[int, ...]]:
    """Tell `Generation.policy_version` and `policy_versions` of a reply.

    >>> token_versions([(0, 3)], 4), token_versions([(0, 3), (2, 4)], 4), token_versions([(0, 3), (0, 4)], 4)
    ((3, ()), (3, (3, 3, 4, 4)), (4, ()))

    Args:
        changes: from which of its tokens on, which version; in order, the first from 0 on.
        length: tokens of the reply.
    """
    versions = [changes[0][1]] * length or [changes[-1][1]]
    for start, version in changes[1:]:
        versions[start:] = [version] * (len(versions) - start)
    return versions[0], tuple(versions) if len(set(versions)) > 1 else ()


class Engine(Protocol):
    """Continuous batching: requests join at any time, `step` advances all and returns those that finished.

    An engine is made with the model whose weights it generates with; `refresh` takes up those of now, between
    two steps, whether it reads them in place or holds a copy. Replies that are in flight go on with them.
    """

    max_context: int  # tokens a sequence may hold
    provides: frozenset[str]  # what components of an algorithm may require of it: `rollout:entropy`

    def submit(self, request: GenerationRequest) -> None: ...

    def step(self) -> Sequence[Generation]: ...

    def release(self, sequence: str) -> None: ...

    def refresh(self, version: int) -> None: ...

    def close(self) -> None: ...
