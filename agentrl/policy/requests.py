"""What is wrong with a request, found before an engine does anything for it."""

from collections.abc import Set

from agentrl.policy.engine import GenerationRequest
from agentrl.policy.trie import TokenTrie


def request_mistake(
    request: GenerationRequest,
    trie: TokenTrie | None,
    *,
    held: int | None,
    busy: bool,
    stop_ids: Set[int],
    vocabulary: int,
    max_context: int,
) -> str | None:
    """Why a request cannot be served; None when it can.

    Args:
        request: to be checked.
        trie: of its choices.
        held: tokens of its sequence so far; None for one that is unknown.
        busy: whether the sequence has a request in flight.
        stop_ids: that choices must end in.
        vocabulary: number of ids of the model.
        max_context: tokens that a sequence may hold.
    """
    prompt = request.prompt_ids
    before = 0 if held is None or request.fresh else held
    if busy:
        return f"sequence {request.sequence!r} has a request in flight; wait for its generation"
    if held is None and not request.fresh:
        return f"sequence {request.sequence!r} is unknown or released; its first request must be fresh"
    if before + len(prompt) == 0:
        return f"sequence {request.sequence!r} is empty; wanted at least one prompt token"
    if prompt and not (min(prompt) >= 0 and max(prompt) < vocabulary):
        return f"prompt_ids hold an id outside the model's vocabulary of {vocabulary}"
    if trie is not None:
        if not trie.ends <= stop_ids:
            return (
                f"a choice does not end in a stop id but in {min(trie.ends - stop_ids)}, "
                f"wanted one of {sorted(stop_ids)}"
            )
        if trie.smallest < 0 or trie.largest >= vocabulary:
            return f"choices hold an id outside the model's vocabulary of {vocabulary}"
    elif request.sampling.max_tokens < 1:
        return f"max_tokens is {request.sampling.max_tokens}, wanted at least 1"
    if request.sampling.temperature < 0:
        return f"temperature is {request.sampling.temperature}, wanted 0 or more"
    needed = 1 if trie is None else trie.longest
    if max_context - before - len(prompt) < needed:
        return (
            f"context overflow: {before + len(prompt)} tokens and a reply of {needed} exceed "
            f"max_context={max_context}"
        )
    return None
