"""Replies assembled from tokens that vLLM sampled; does not import vLLM."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from uuid import uuid4

from agentrl.policy.engine import Generation, GenerationRequest, token_values
from agentrl.policy.requests import find_request_error, start_thought
from agentrl.policy.thinking import Thought
from agentrl.policy.trie import ChoiceError, Node, TokenTrie, token_trie
from agentrl.scale.vllm_decisions import REQUEST
from agentrl.seeds import derive_seed

TEMPERATURES = (0.01, 2.0)  # besides 0; vLLM silently raises lower ones
NOT_FINITE = "the model's logits are not finite: its weights hold nan or inf"


class PendingReply:
    """The tokens sampled for a request so far, and the forced tokens that follow from them.

    A reply with reasoning takes two requests to vLLM, first for the reasoning and then for the choice: when
    the reasoning ends, `key`, `seed`, `prompt` and `max_tokens` change.

    Args:
        request: The request that is replied to.
        key: The id of the first request to vLLM.
        context: The tokens of its sequence, including those of the request.
        trie: The trie of its choices.
        room: The number of tokens that its sequence may still take.
        stop_ids: The ids that end a free reply, and reasoning.
        version: The version of the weights when it began.

    Attributes:
        key: The id of the current request to vLLM.
        seed: The seed of that request.
        prompt: The tokens that vLLM continues: the context, the reasoning, and the common start of all
            choices.
        max_tokens: The number of tokens that vLLM may add.
        thought: The reasoning under way; None otherwise.
        forced: The number of tokens of every choice that are part of the prompt.
        done: Whether the reply is complete.
    """

    def __init__(
        self,
        request: GenerationRequest,
        key: str,
        context: list[int],
        trie: TokenTrie | None,
        room: int,
        stop_ids: frozenset[int],
        version: int,
    ) -> None:
        self.request, self.key, self.context = request, key, context
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.entropies: list[float] = []
        self.allowed: list[tuple[int, ...] | None] = []
        self.versions = [(0, version)]  # (index of the first token, version of the weights)
        self.received = 0  # tokens from vLLM under this key, forced ones included
        self.finish = "stop"
        self.stop_ids = stop_ids
        self._known = 0  # forced tokens that are already in `ids` and will still come from vLLM
        self._trie = trie
        self._node: Node | None = None
        self.seed, self.forced = request.seed, 0
        self.thought: Thought | None = None
        self.prompt, self.max_tokens, self.done = context, min(request.sampling.max_tokens, room), False
        if trie is not None:
            before = start_thought(request, trie, room=room, stop_ids=stop_ids)
            if isinstance(before, Thought):
                self.thought, self.max_tokens = before, before.left
            else:
                self._begin_choice(before)

    def take(self, token: int, logprob: float, entropy: float, version: int) -> None:
        """Add a token that vLLM sampled; tokens after the end of the reply are dropped.

        Raises:
            ValueError: If the token was not allowed, or its logits were not finite.
        """
        self.received += 1
        if self.done:
            return
        if self._known:
            self._known -= 1
            return
        if entropy != entropy:
            raise ValueError(NOT_FINITE)
        if version != self.versions[-1][1]:
            self.versions.append((len(self.ids), version))
        self.logprobs.append(logprob)
        self.entropies.append(entropy)
        if self.thought is not None:
            self._take_thought(self.thought, token)
        elif self._node is None:
            self._take_free(token)
        else:
            self._take_edge(self._node, token)

    def _take_thought(self, thought: Thought, token: int) -> None:
        self.ids.append(token)
        self.allowed.append(None)
        written = thought.take(token)
        if written is not None:
            self.thought, self.received = None, 0
            self.key = f"{self.key}-choice"
            self.seed = derive_seed(
                self.seed, "choice"
            )  # else the choice would repeat the random numbers of the reasoning
            self._begin_choice(written)

    def _begin_choice(self, written: tuple[int, ...]) -> None:
        assert self._trie is not None
        trie = self._trie
        self._append_forced((*written, *trie.forced))
        self._node, self.forced = trie.root, len(trie.forced)
        self.prompt, self.max_tokens = [*self.context, *self.ids], trie.longest - len(trie.forced)
        self.done = trie.root is None

    def _take_free(self, token: int) -> None:
        self.ids.append(token)
        if token in self.stop_ids:
            self.done = True
        elif len(self.ids) == self.max_tokens:
            self.done, self.finish = True, "length"

    def _take_edge(self, node: Node, token: int) -> None:
        if token not in node.ids:
            raise ValueError(f"vLLM sampled {token}, wanted one of {node.ids}")
        edge = node.edges[node.ids.index(token)]
        self.ids.append(token)
        self.allowed.append(edge.allowed[0])
        self._append_forced(edge.ids[1:])
        self._known = len(edge.ids) - 1
        self._node = edge.node
        self.done = edge.node is None

    def _append_forced(self, ids: tuple[int, ...]) -> None:
        self.ids.extend(ids)
        self.allowed.extend((token,) for token in ids)
        self.logprobs.extend([0.0] * len(ids))
        self.entropies.extend([0.0] * len(ids))


class Sequences:
    """The tokens of every sequence, and the reply that each waits for.

    Args:
        stop_ids: The ids that end a free reply; every choice ends in one of them.
        vocabulary: The number of ids of the model.
        max_context: The largest number of tokens in a sequence.
    """

    def __init__(self, *, stop_ids: Iterable[int], vocabulary: int, max_context: int) -> None:
        self.stop_ids = frozenset(stop_ids)
        self._vocabulary, self._max_context = vocabulary, max_context
        self._held: dict[str, list[int]] = {}
        self._pending: dict[str, PendingReply] = {}
        self._prefix, self._count = (
            f"agentrl-{uuid4().hex[:12]}",
            0,
        )  # unique, since others may use the same server

    def begin(self, request: GenerationRequest, version: int) -> PendingReply | str:
        """Begin a reply with weights of a version; return an error message if it cannot be served."""
        held = self._held.get(request.sequence)
        try:
            trie = None if request.choices is None else token_trie(request.choices)
        except ChoiceError as mistake:
            return str(mistake)
        wrong = find_request_error(
            request,
            trie,
            held=None if held is None else len(held),
            busy=request.sequence in self._pending,
            stop_ids=self.stop_ids,
            vocabulary=self._vocabulary,
            max_context=self._max_context,
        )
        if wrong is not None:
            return wrong
        low, high = TEMPERATURES
        if request.sampling.temperature and not low <= request.sampling.temperature <= high:
            return (
                f"temperature is {request.sampling.temperature}, wanted 0 or within [{low}, {high}], as of "
                "vLLM"
            )
        if request.sampling.next_temperature is not None:
            return "next_temperature is set, wanted None: vLLM samples a whole reply at one temperature"
        context = [*(() if held is None or request.new_sequence else held), *request.prompt_ids]
        self._held[request.sequence] = context
        room = self._max_context - len(context)
        self._count += 1
        key = f"{self._prefix}-{self._count}"
        reply = PendingReply(request, key, context, trie, room, self.stop_ids, version)
        self._pending[request.sequence] = reply
        return reply

    def end(self, reply: PendingReply) -> Generation:
        """Append a finished reply to its sequence, and return it."""
        del self._pending[reply.request.sequence]
        reply.context.extend(reply.ids)
        return Generation(
            reply.request.sequence,
            tuple(reply.ids),
            tuple(reply.logprobs),
            tuple(reply.entropies),
            None if reply.request.choices is None else tuple(reply.allowed),
            reply.finish,
            *token_values(reply.versions, len(reply.ids)),
        )

    def fail(self, reply: PendingReply, error: str, *, lost: bool = False) -> Generation:
        """End a reply with an error, and return it.

        Args:
            reply: The reply that could not be finished.
            error: The reason.
            lost: Whether the engine failed, whatever the request was.
        """
        del self._pending[reply.request.sequence]
        return Generation(
            reply.request.sequence, policy_version=reply.versions[-1][1], error=error, lost=lost
        )

    def release(self, name: str) -> PendingReply | None:
        """Forget a sequence, and return the reply that it was waiting for, if any."""
        self._held.pop(name, None)
        return self._pending.pop(name, None)


def sampling_arguments(reply: PendingReply) -> dict[str, Any]:
    """Return the arguments of vLLM's `SamplingParams` for a reply, as data for JSON."""
    request = reply.request
    own: dict[str, Any] = {"key": reply.key}
    stops = reply.stop_ids
    if reply.thought is not None and request.thinking is not None:
        ending = request.thinking.ending
        own["thoughts"] = {
            "end": ending.text,
            "pieces": list(ending.pieces.items()),
            "begun": request.begun[-len(ending.text) :],
            "stop": min(stops),
        }
    elif request.choices is not None:
        own["choices"] = [choice[reply.forced :] for choice in request.choices]
        # A stop id inside a choice must not end it; `PendingReply` knows where the choice ends.
        stops = stops - {token for choice in request.choices for token in choice[:-1]}
    return {
        "temperature": request.sampling.temperature,
        "max_tokens": reply.max_tokens,
        "seed": reply.seed,
        "stop_token_ids": sorted(stops),
        "ignore_eos": True,
        "detokenize": False,
        "logprobs": 0,
        "extra_args": {REQUEST: own},
    }
