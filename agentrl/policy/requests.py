"""Checks of a request before an engine starts it."""

from collections.abc import Set

from agentrl.policy.engine import GenerationRequest
from agentrl.policy.thinking import Thought
from agentrl.policy.trie import TokenTrie


def find_request_error(
    request: GenerationRequest,
    trie: TokenTrie | None,
    *,
    held: int | None,
    busy: bool,
    stop_ids: Set[int],
    vocabulary: int,
    max_context: int,
) -> str | None:
    """Return why a request cannot be served; None when it can.

    Args:
        request: The request to check.
        trie: The trie of its choices.
        held: The number of tokens in its sequence so far; None for an unknown sequence.
        busy: Whether the sequence has a request in flight.
        stop_ids: The ids of which one must end every choice.
        vocabulary: The number of ids of the model.
        max_context: The largest number of tokens in a sequence.
    """
    prompt = request.prompt_ids
    before = 0 if held is None or request.new_sequence else held
    if busy:
        return f"sequence {request.sequence!r} has a request in flight; wait for its generation"
    if held is None and not request.new_sequence:
        return (
            f"sequence {request.sequence!r} is unknown or released; its first request needs new_sequence=True"
        )
    if before + len(prompt) == 0:
        return f"sequence {request.sequence!r} is empty; wanted at least one prompt token"
    if prompt and not (min(prompt) >= 0 and max(prompt) < vocabulary):
        return f"prompt_ids include an id outside the model's vocabulary of {vocabulary}"
    if trie is not None:
        if not trie.ends <= stop_ids:
            return (
                f"a choice does not end in a stop id but in {min(trie.ends - stop_ids)}, "
                f"wanted one of {sorted(stop_ids)}"
            )
        if trie.smallest < 0 or trie.largest >= vocabulary:
            return f"choices include an id outside the model's vocabulary of {vocabulary}"
        if request.thinking is not None and not request.thinking.within(vocabulary):
            return f"the ids around the reasoning include one outside the model's vocabulary of {vocabulary}"
    elif request.thinking is not None:
        return "thinking is set, but choices is None; wanted at least one choice"
    elif request.sampling.max_tokens < 1:
        return f"max_tokens is {request.sampling.max_tokens}, wanted at least 1"
    if request.sampling.temperature < 0:
        return f"temperature is {request.sampling.temperature}, wanted 0 or more"
    needed = 1 if trie is None else _without_thoughts(request, trie)
    if max_context - before - len(prompt) < needed:
        return (
            f"context overflow: {before + len(prompt)} tokens and a reply of {needed} exceed "
            f"max_context={max_context}"
        )
    return None


def start_thought(
    request: GenerationRequest, trie: TokenTrie, *, room: int, stop_ids: Set[int]
) -> Thought | tuple[int, ...]:
    """Return the reasoning with which a reply begins, or the forced tokens before its choice without any.

    Args:
        request: A request that `find_request_error` has passed.
        trie: The trie of its choices.
        room: The number of tokens that its sequence may still take.
        stop_ids: The ids that end reasoning.
    """
    if request.thinking is None:
        return ()
    limit = min(request.sampling.max_tokens, room) - _without_thoughts(request, trie)
    if limit < 1:
        return request.thinking.cut
    return Thought(request.thinking, limit, stop_ids, request.begun)


def _without_thoughts(request: GenerationRequest, trie: TokenTrie) -> int:
    """Return the largest number of tokens that a reply needs without further reasoning."""
    return trie.longest + (0 if request.thinking is None else request.thinking.written)
