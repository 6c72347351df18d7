"""The engine interface: token ids in, sampled token ids with their logprobs and entropies out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from agentrl.policy.thinking import Thinking

if TYPE_CHECKING:
    from torch import Tensor

ValueT = TypeVar("ValueT")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Parameters of sampling a reply.

    Args:
        temperature: The sampling temperature; 0 takes the most likely token, with the logprobs and entropies
            of temperature 1.
        max_tokens: The largest number of tokens in a free reply, or in one that reasons before its choice; a
            choice alone is not limited.
        next_temperature: The temperature of every decision but the first of a reply, as a function of the
            entropy of the decision before it, in nats; None keeps `temperature`. Only for engines that
            provide `rollout:token_temperature`.
        confidence: The number of most likely tokens whose mean -log p is a decision's confidence; 0 measures
            none. Only for engines that provide `rollout:confidence`, like the next one.
        end_thoughts: (entropies, confidences of the reasoning so far, in nats) -> whether to end it now, as
            if there were no room left. Only for reasoning before a choice.
    """

    temperature: float = 1.0
    max_tokens: int = 64
    next_temperature: Callable[[float], float] | None = None
    confidence: int = 0
    end_thoughts: Callable[[Sequence[float], Sequence[float]], bool] | None = None


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A request to continue a sequence.

    Args:
        sequence: The name of the token sequence (and its KV cache) to extend; it can have one request at a
            time.
        prompt_ids: The tokens to append before generating; the whole prompt when `new_sequence`.
        new_sequence: Whether to discard what the sequence held before.
        choices: The admissible replies as token ids, each ending in a stop id; None generates freely.
        seed: The seed of the sample, which does not depend on the rest of the batch.
        sampling: How to sample.
        parent: The name of a sequence that begins with the same tokens, whose cache a new sequence copies.
            Affects only speed, and may be unknown.
        thinking: How the reply reasons before its choice; None does not. The reasoning takes the room that
            `sampling.max_tokens` and the context leave beside the longest choice. Its opening is part of
            the prompt.
        begun: The reasoning tokens that the end of the prompt already holds.
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
    """The reply to a request, or an `error` and no tokens.

    The fields of tokens, versions and temperatures are those of `agentrl.data.Turn`.
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
    temperatures: tuple[float, ...] = ()
    confidences: tuple[float, ...] = ()  # in nats, 0 at forced tokens; empty if not measured
    intervened: bool = False  # whether `SamplingParams.end_thoughts` ended the reasoning
    lost: bool = False  # the error is of the engine, not of the request, which may be submitted again


@dataclass(frozen=True, slots=True)
class Adapter:
    """Low-rank matrices to add to the weights of linear layers: W + (alpha / rank) B A.

    Args:
        weights: A and B of each layer, by their names in peft's files.
        rank: The number of rows of every A.
        alpha: The scale.
    """

    weights: "Mapping[str, Tensor]"
    rank: int
    alpha: float


def token_values(changes: Sequence[tuple[int, ValueT]], length: int) -> tuple[ValueT, tuple[ValueT, ...]]:
    """Return the value at a reply's first token and, if others differ, at every token.

    >>> token_values([(0, 3)], 4), token_values([(0, 3), (2, 4)], 4), token_values([(0, 3), (0, 4)], 4)
    ((3, ()), (3, (3, 3, 4, 4)), (4, ()))

    Args:
        changes: Pairs of a token index and the value from that token on, such as the version of the weights,
            in order; the first index is 0.
        length: The number of tokens in the reply.
    """
    values = [changes[0][1]] * length or [changes[-1][1]]
    for start, value in changes[1:]:
        values[start:] = [value] * (len(values) - start)
    return values[0], tuple(values) if len(set(values)) > 1 else ()


class Engine(Protocol):
    """Continuous batching: requests join at any time, and `step` advances them all.

    An engine is created with the model whose weights it generates with, either in place or from a copy.
    """

    max_context: int  # the largest number of tokens in a sequence
    provides: frozenset[str]  # features that algorithm components may require, such as `rollout:entropy`

    def submit(self, request: GenerationRequest) -> None:
        """Queue a request; one that cannot be served comes back from the next `step` with an error."""
        ...

    def step(self) -> Sequence[Generation]:
        """Advance every request, and return the replies that finished."""
        ...

    def release(self, sequence: str) -> None:
        """Forget a sequence and its request in flight; unknown names are fine."""
        ...

    def refresh(self, version: int, adapter: Adapter | None = None) -> None:
        """Switch to new weights, of this version; replies in flight continue with them.

        Args:
            version: The version of the new weights.
            adapter: What to add to the weights that the engine took from its model last, for engines of a
                configuration that `takes_adapters`. None takes the model's current weights.
        """
        ...

    def close(self) -> None:
        """Free what the engine holds."""
        ...
