"""`TorchEngine`: batched generation in this process, with keys and values cached between turns."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from random import Random

import numpy as np
import torch
from transformers import PreTrainedModel

from agentrl.policy.attention import KVCache, cached_layout
from agentrl.policy.engine import Adapter, Generation, GenerationRequest, token_values
from agentrl.policy.model import context_length, output_weight, packed_forward
from agentrl.policy.requests import find_request_error, start_thought
from agentrl.policy.sampling import Array, Draws, draw
from agentrl.policy.thinking import Thought
from agentrl.policy.trie import ChoiceError, Edge, Node, TokenTrie, token_trie

SLOT_STEP = 16  # the cache grows by multiples of so many slots
LENGTH_STEP = 64  # and of so many tokens


class _Sequence:
    """The tokens of one sequence, the number of them in the cache, and its request in flight."""

    __slots__ = (
        "allowed",
        "cached",
        "confidences",
        "entropies",
        "ids",
        "intervened",
        "limit",
        "logprobs",
        "name",
        "node",
        "random",
        "request",
        "slot",
        "start",
        "temperatures",
        "thought",
        "trie",
        "used",
        "versions",
    )

    def __init__(self, name: str) -> None:
        self.name = name
        self.ids: list[int] = []
        self.cached = 0
        self.slot = -1
        self.used = 0  # the step of its last request
        self.request: GenerationRequest | None = None
        self.start = 0  # the index in `ids` at which the reply begins
        self.limit = 0  # the largest number of tokens in a free reply
        self.trie: TokenTrie | None = None  # the trie of its choices
        self.thought: Thought | None = None  # the reasoning under way before the choice
        self.node: Node | None = None  # the next decision; None generates freely
        self.random = Random()
        self.logprobs: list[float] = []
        self.entropies: list[float] = []
        self.confidences: list[float] = []
        self.intervened = False  # whether the reasoning was ended by the request's `end_thoughts`
        self.allowed: list[tuple[int, ...] | None] = []
        self.versions: list[tuple[int, int]] = []  # (index of the first reply token, version)
        self.temperatures: list[tuple[int, float]] = []  # likewise


class TorchEngine:
    """Continuous batching over a Hugging Face model that lives in this process.

    Every token is forwarded once: a turn feeds only the tokens appended since the last one, a new sequence
    copies the part of its prompt that its parent's cache holds, and sequences that start with the same prompt
    in the same step share one pass. Forced tokens, which have a single allowed id, are not sampled but
    forwarded with the next chunk. A reply depends on the seed of its request and the weights; the rest of the
    batch changes only the rounding.

    Args:
        model: A model from `build_model` or `load_policy`; call `refresh` after its weights have changed.
        stop_ids: The ids that end a free reply; every choice ends in one of them.
        max_context: The largest number of tokens in a sequence; None takes the model's own limit.
        max_sequences: The number of sequences whose keys and values are kept; further requests wait for a
            release.
        max_step_tokens: The largest number of tokens in one forward pass; longer prompts take several steps.

    Attributes:
        tokens_forwarded: The number of tokens that went through the model so far.
        forwards: The number of forward passes so far.
    """

    provides = frozenset({"rollout:entropy", "rollout:token_temperature", "rollout:confidence"})

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        stop_ids: Iterable[int],
        max_context: int | None = None,
        max_sequences: int = 256,
        max_step_tokens: int = 16384,
    ) -> None:
        self.model = model
        self.stop_ids = frozenset(stop_ids)
        self.max_context = context_length(model, max_context)
        self.max_sequences = max_sequences
        self.max_step_tokens = max_step_tokens
        self.tokens_forwarded = 0
        self.forwards = 0
        self._version = 0
        self._vocabulary = output_weight(model).shape[0]
        self._device = output_weight(model).device
        self._cache = KVCache()
        self._sequences: dict[str, _Sequence] = {}
        self._running: dict[str, _Sequence] = {}
        self._waiting: deque[_Sequence] = deque()
        self._slots: list[_Sequence | None] = []
        self._finished: list[Generation] = []
        self._steps = 0

    def submit(self, request: GenerationRequest) -> None:
        """Queue a request; one that cannot be served comes back from the next `step` with an error."""
        sequence = self._sequences.get(request.sequence)
        trie: TokenTrie | None = None
        error: str | None = None
        try:
            trie = None if request.choices is None else token_trie(request.choices)
        except ChoiceError as mistake:
            error = str(mistake)
        error = error or find_request_error(
            request,
            trie,
            held=None if sequence is None else len(sequence.ids),
            busy=sequence is not None and sequence.request is not None,
            stop_ids=self.stop_ids,
            vocabulary=self._vocabulary,
            max_context=self.max_context,
        )
        if error is not None:
            self._finished.append(Generation(request.sequence, policy_version=self._version, error=error))
            return
        if sequence is None:
            sequence = self._sequences[request.sequence] = _Sequence(request.sequence)
            self._copy_parent_cache(sequence, request)
        elif request.new_sequence:
            # A prompt that starts anew often shares a prefix with the previous one.
            sequence.cached = min(sequence.cached, _common_prefix_length(sequence.ids, request.prompt_ids))
            sequence.ids.clear()
        self._start(sequence, request, trie)

    def step(self) -> Sequence[Generation]:
        """Advance every request by one forward pass and one decision; return those that finished."""
        self._steps += 1
        self._admit()
        if self._running:
            rows = list(self._running.values())
            try:
                self._advance(rows)
            except Exception as error:  # such as out of memory; the caller decides how to go on
                self._fail(rows, f"{type(error).__name__}: {error}")
        finished, self._finished = self._finished, []
        return finished

    def _fail(self, rows: Sequence[_Sequence], error: str) -> None:
        """End the replies of some sequences with an error."""
        for row in rows:
            row.cached = 0  # a failed pass may have written only part of it
            if row.request is not None:
                self._finish(row, error=error)

    def release(self, sequence: str) -> None:
        """Forget a sequence and its request in flight; unknown names are fine."""
        gone = self._sequences.pop(sequence, None)
        if gone is None:
            return
        self._running.pop(sequence, None)
        if gone in self._waiting:
            self._waiting.remove(gone)
        self._release_slot(gone)

    def refresh(self, version: int, adapter: Adapter | None = None) -> None:
        """Record that the weights have changed; keys and values are recomputed when they are needed next.

        Raises:
            ValueError: If there is an adapter, which the model's own weights must hold instead.
        """
        if adapter is not None:
            raise ValueError("adapter is given, wanted None: this engine generates with its model's weights")
        self._version = version
        for sequence in self._sequences.values():
            sequence.cached = 0
            if sequence.request is not None:
                sequence.versions.append((len(sequence.logprobs), version))

    def close(self) -> None:
        """Do nothing: the model belongs to the caller."""

    def _start(self, sequence: _Sequence, request: GenerationRequest, trie: TokenTrie | None) -> None:
        """Append the prompt to a sequence and queue it, unless its reply is forced from start to end."""
        sequence.ids.extend(request.prompt_ids)
        sequence.start = len(sequence.ids)
        # The last prompt token is always forwarded, since its hidden state gives the first logits.
        sequence.cached = min(sequence.cached, sequence.start - 1)
        sequence.request = request
        sequence.used = self._steps
        sequence.logprobs, sequence.entropies, sequence.allowed = [], [], []
        sequence.confidences, sequence.intervened = [], False
        sequence.versions = [(0, self._version)]
        sequence.temperatures = [(0, request.sampling.temperature)]
        sequence.trie, sequence.thought, sequence.node = trie, None, None
        room = self.max_context - sequence.start
        if trie is None:
            sequence.limit = min(request.sampling.max_tokens, room)
        else:
            before = start_thought(request, trie, room=room, stop_ids=self.stop_ids)
            if isinstance(before, Thought):
                sequence.thought = before
            else:
                self._begin_choice(sequence, before)
            if sequence.request is None:
                return
        sequence.random = Random(request.seed)
        if sequence.slot >= 0:
            self._running[sequence.name] = sequence
        else:
            self._waiting.append(sequence)

    @torch.inference_mode()
    def _copy_parent_cache(self, sequence: _Sequence, request: GenerationRequest) -> None:
        """Copy the part of a prompt that the parent's cache holds, if there is an empty slot."""
        parent = None if request.parent is None else self._sequences.get(request.parent)
        if parent is None:
            return
        common = min(parent.cached, _common_prefix_length(parent.ids, request.prompt_ids))
        slot = self._empty_slot() if common else None
        if slot is None:
            return
        sequence.slot, self._slots[slot] = slot, sequence
        self._reserve(self._cache.length)
        self._cache.copy(parent.slot, [slot], common)
        sequence.cached = common

    def _begin_choice(self, sequence: _Sequence, written: tuple[int, ...]) -> None:
        """Append the forced tokens before the first decision, and finish if there is none."""
        assert sequence.trie is not None
        self._append_forced(sequence, (*written, *sequence.trie.forced))
        sequence.thought, sequence.node = None, sequence.trie.root
        if sequence.node is None:
            self._finish(sequence)

    def _append_forced(self, sequence: _Sequence, ids: tuple[int, ...]) -> None:
        sequence.ids.extend(ids)
        sequence.allowed.extend((token,) for token in ids)
        sequence.logprobs.extend([0.0] * len(ids))
        sequence.entropies.extend([0.0] * len(ids))
        sequence.confidences.extend([0.0] * len(ids))

    def _finish(self, sequence: _Sequence, finish: str = "stop", error: str | None = None) -> None:
        request = sequence.request
        assert request is not None
        sequence.request = None
        self._running.pop(sequence.name, None)
        if error is not None:
            self._finished.append(Generation(sequence.name, policy_version=self._version, error=error))
            return
        self._finished.append(
            Generation(
                sequence.name,
                tuple(sequence.ids[sequence.start :]),
                tuple(sequence.logprobs),
                tuple(sequence.entropies),
                None if request.choices is None else tuple(sequence.allowed),
                finish,
                *token_values(sequence.versions, len(sequence.logprobs)),
                temperatures=token_values(sequence.temperatures, len(sequence.logprobs))[1],
                confidences=tuple(sequence.confidences) if request.sampling.confidence else (),
                intervened=sequence.intervened,
            )
        )

    # Slots

    def _admit(self) -> None:
        """Give slots to waiting sequences, first come, first served."""
        while self._waiting:
            slot = self._free_slot()
            if slot is None:
                return
            sequence = self._waiting.popleft()
            sequence.slot, self._slots[slot] = slot, sequence
            self._running[sequence.name] = sequence

    def _empty_slot(self) -> int | None:
        if None in self._slots:
            return self._slots.index(None)
        if len(self._slots) < self.max_sequences:
            self._slots.append(None)
            return len(self._slots) - 1
        return None

    def _free_slot(self) -> int | None:
        empty = self._empty_slot()
        if empty is not None:
            return empty
        # A sequence between two turns loses its cache, and is fed again later, only if nothing else can run.
        idle = [held for held in self._slots if held is not None and held.request is None]
        if self._running or not idle:
            return None
        oldest = min(idle, key=lambda held: held.used)
        slot = oldest.slot
        self._release_slot(oldest)
        return slot

    def _release_slot(self, sequence: _Sequence) -> None:
        if sequence.slot >= 0:
            self._slots[sequence.slot] = None
        sequence.slot, sequence.cached = -1, 0

    def _close_gaps(self) -> None:
        """Move the last sequences into free slots once a quarter are free, so that reads stay in place."""
        while self._slots and self._slots[-1] is None:
            self._slots.pop()
        free = self._slots.count(None)
        if free * 4 < len(self._slots):
            return
        for target in range(len(self._slots)):
            if self._slots[target] is None and target < len(self._slots):
                moved = self._slots[-1]
                assert moved is not None
                self._cache.copy(moved.slot, [target], moved.cached)
                self._slots.pop()
                moved.slot, self._slots[target] = target, moved
                while self._slots and self._slots[-1] is None:
                    self._slots.pop()
            if target + 1 >= len(self._slots):
                return

    # One forward pass

    @torch.inference_mode()
    def _advance(self, rows: list[_Sequence]) -> None:
        """Forward the uncached tokens of some sequences, and sample a token for those that are complete."""
        self._close_gaps()
        rows, duplicates = _deduplicate(sorted(rows, key=lambda row: row.slot))  # as `cached_layout` wants
        tokens: list[int] = []
        counts, ready = [], []
        for row in rows:
            new = row.ids[row.cached :]
            room = self.max_step_tokens - len(tokens)
            ready.append(len(new) <= room)
            tokens.extend(new if ready[-1] else new[:room])
            counts.append(min(len(new), room))
        if not all(ready):
            rows, counts, ready = _without_empty(rows, counts, ready)
        hidden = self._forward(rows, tokens, np.array(counts))
        deciding: list[_Sequence] = []
        ends: list[int] = []
        end = -1
        for row, count, complete in zip(rows, counts, ready, strict=True):
            end += count
            row.cached += count
            if complete:
                alike = [row, *self._copied(row, duplicates.get(row.name, ()))]
                deciding += alike
                ends += [end] * len(alike)
        if deciding:
            self._decide(deciding, hidden[torch.tensor(ends, device=self._device)])

    def _copied(self, row: _Sequence, duplicates: Sequence[_Sequence]) -> Sequence[_Sequence]:
        """Copy the cache of `row` to the sequences with the same tokens, and return them."""
        if duplicates:
            self._cache.copy(row.slot, [duplicate.slot for duplicate in duplicates], row.cached)
            for duplicate in duplicates:
                duplicate.cached = row.cached
        return duplicates

    def _forward(self, rows: list[_Sequence], tokens: list[int], counts: Array) -> torch.Tensor:
        """Run the decoder over the next `counts` tokens of each row; return hidden states [N, d]."""
        slots = np.array([row.slot for row in rows])
        past = np.array([row.cached for row in rows])
        longest = int((past + counts).max())
        if longest > self._cache.length or len(self._slots) > self._cache.slots:
            # A quarter more than needed, so that growing sequences rarely copy the cache.
            self._reserve(min(_rounded(longest * 5 // 4, LENGTH_STEP), self.max_context))
        self.tokens_forwarded += len(tokens)
        self.forwards += 1
        layout = cached_layout(self._cache, slots, past, counts, self._device)
        return packed_forward(self.model, torch.tensor(tokens, device=self._device), layout)

    def _reserve(self, length: int) -> None:
        self._cache.reserve(min(_rounded(len(self._slots), SLOT_STEP), self.max_sequences), length)

    def _decide(self, rows: list[_Sequence], hidden: torch.Tensor) -> None:
        """Sample the next token of every row, separately for rows with and without a menu."""
        constrained = [k for k, row in enumerate(rows) if row.node is not None]
        free = [k for k, row in enumerate(rows) if row.node is None]
        weight = output_weight(self.model)
        for places, menu in ((constrained, True), (free, False)):
            if not places:
                continue
            chosen = [rows[k] for k in places]
            states = hidden if len(places) == len(rows) else hidden[torch.tensor(places, device=self._device)]
            draws = draw(
                states,
                weight,
                [row.node.ids for row in chosen if row.node is not None] if menu else None,
                # One generator per row, so that a reply does not depend on the rest of the batch.
                np.array([row.random.random() for row in chosen]),
                np.array([row.temperatures[-1][1] for row in chosen]),
                max(row.request.sampling.confidence for row in chosen if row.request is not None),
            )
            (self._take_edges if menu else self._take_tokens)(chosen, draws)

    def _take_edges(self, rows: list[_Sequence], draws: Draws) -> None:
        for row, place, logprob, entropy, confidence in zip(
            rows, draws.chosen, draws.logprobs, draws.entropies, draws.confidences, strict=True
        ):
            if entropy != entropy:  # nan
                self._finish(row, error=NOT_FINITE)
                continue
            assert row.node is not None
            edge: Edge = row.node.edges[place]
            rest = [0.0] * (len(edge.ids) - 1)
            row.ids.extend(edge.ids)
            row.allowed.extend(edge.allowed)
            row.logprobs.append(logprob)
            row.logprobs.extend(rest)
            row.entropies.append(entropy)
            row.entropies.extend(rest)
            row.confidences.append(confidence)
            row.confidences.extend(rest)
            _set_next_temperature(row, entropy)
            row.node = edge.node
            if row.node is None:
                self._finish(row)

    def _take_tokens(self, rows: list[_Sequence], draws: Draws) -> None:
        for row, token, logprob, entropy, confidence in zip(
            rows, draws.chosen, draws.logprobs, draws.entropies, draws.confidences, strict=True
        ):
            if entropy != entropy:  # nan
                self._finish(row, error=NOT_FINITE)
                continue
            row.ids.append(token)
            row.logprobs.append(logprob)
            row.entropies.append(entropy)
            row.confidences.append(confidence)
            _set_next_temperature(row, entropy)
            if row.thought is not None:
                row.allowed.append(None)
                written = row.thought.take(token)
                if written is None and _wants_end(row):
                    written, row.intervened = row.thought.cut, True
                if written is not None:
                    self._begin_choice(row, written)
            elif token in self.stop_ids:
                self._finish(row)
            elif len(row.logprobs) == row.limit:
                self._finish(row, "length")


NOT_FINITE = "the model's logits are not finite: its weights hold nan or inf, or it overflows policy.dtype"


def _set_next_temperature(row: _Sequence, entropy: float) -> None:
    """Set the temperature of the next decision, where it follows from the entropy of the last one."""
    follow = None if row.request is None else row.request.sampling.next_temperature
    if follow is None:
        return
    temperature = float(follow(entropy))
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(
            f"the temperature after an entropy of {entropy:g} is {temperature}, wanted a number above 0"
        )
    row.temperatures.append((len(row.logprobs), temperature))


def _wants_end(row: _Sequence) -> bool:
    """Return whether the request ends the reasoning after the tokens so far."""
    ends = None if row.request is None else row.request.sampling.end_thoughts
    return ends is not None and ends(row.entropies, row.confidences)


def _rounded(count: int, step: int) -> int:
    return -(-count // step) * step


def _common_prefix_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the length of the common prefix of two sequences."""
    pairs = zip(first, second, strict=False)
    return next((k for k, (one, other) in enumerate(pairs) if one != other), min(len(first), len(second)))


def _deduplicate(rows: list[_Sequence]) -> tuple[list[_Sequence], dict[str, list[_Sequence]]]:
    """Leave out new sequences with the same tokens as another, as the members of a group have at first.

    Returns:
        The remaining sequences, and by the name of each the sequences that share its result.
    """
    first: dict[tuple[int, ...], str] = {}
    duplicates: dict[str, list[_Sequence]] = {}
    kept = []
    for row in rows:
        name = row.name if row.cached else first.setdefault(tuple(row.ids), row.name)
        if name == row.name:
            kept.append(row)
        else:
            duplicates.setdefault(name, []).append(row)
    return kept, duplicates


def _without_empty(
    rows: list[_Sequence], counts: list[int], ready: list[bool]
) -> tuple[list[_Sequence], list[int], list[bool]]:
    """Leave out rows that got no tokens of this step's budget."""
    kept = [k for k, count in enumerate(counts) if count]
    return [rows[k] for k in kept], [counts[k] for k in kept], [ready[k] for k in kept]
