"""Masks and entropies for the logits of a batch of requests; does not import vLLM."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from agentrl.policy.thinking import Ending, EndingMatcher
from agentrl.policy.trie import ChoiceError, TokenTrie, token_trie

REQUEST = "agentrl"  # the key of our arguments in the `extra_args` of vLLM's sampling parameters
CHUNK_ELEMENTS = 2**24


@dataclass(frozen=True, slots=True)
class Row:
    """One request of the batch.

    Args:
        key: The name under which entropies are recorded; None records none.
        trie: The choices of the reply; None allows every id.
        temperature: The sampling temperature, where 0 has been replaced by 1.
        output_ids: The ids sampled for it so far; vLLM appends to this list.
        thoughts: How its reasoning ends; None for a request without reasoning.
    """

    key: str | None
    trie: TokenTrie | None
    temperature: float
    output_ids: Sequence[int]
    thoughts: Thoughts | None = None


@dataclass(frozen=True, slots=True)
class Thoughts:
    """The end of a request that generates reasoning only; the choice after it is a request of its own.

    Args:
        ending: The text that ends the reasoning.
        begun: The last reasoning tokens of its prompt.
        stop: An id at which vLLM stops.
    """

    ending: Ending
    begun: tuple[int, ...]
    stop: int

    def over(self, output_ids: Sequence[int]) -> bool:
        """Return whether the reasoning has reached its ending."""
        last = len(self.ending.text)  # the most tokens that the ending can span: each has a character or more
        matcher = EndingMatcher(self.ending, self.begun if len(output_ids) < last else ())
        return any(matcher.take(token) is not None for token in output_ids[-last:])


def row(arguments: Mapping[str, Any] | None, temperature: float, output_ids: Sequence[int]) -> Row | None:
    """Build the row of a request; return None for a request that is not agentrl's.

    Args:
        arguments: The `extra_args` of its sampling parameters.
        temperature: Its sampling temperature.
        output_ids: See `Row`.

    Raises:
        ChoiceError: If its choices are invalid; see `TokenTrie`.
    """
    own = (arguments or {}).get(REQUEST)
    if own is None:
        return None
    choices = own.get("choices")
    trie = None if choices is None else token_trie(tuple(tuple(choice) for choice in choices))
    thoughts = None
    if (described := own.get("thoughts")) is not None:
        ending = Ending(described["end"], dict(described["pieces"]))
        thoughts = Thoughts(ending, tuple(described["begun"]), described["stop"])
    return Row(own.get("key"), trie, temperature or 1.0, output_ids, thoughts)


class Decisions:
    """Masks of a batch's rows, and the entropies of what is sampled under them.

    Attributes:
        rows: The rows by their index in the batch.
    """

    def __init__(self) -> None:
        self.rows: dict[int, Row] = {}
        # Entropies that are still on the device; reading them waits for it.
        self._pending: list[tuple[list[tuple[str, int]], Tensor]] = []
        self._entropies: dict[str, list[tuple[int, float]]] = {}

    def apply(self, logits: Tensor) -> Tensor:
        """Mask forbidden ids in logits [R, V] in place, and record the entropies of sampling."""
        free: list[int] = []
        menus: dict[int, tuple[int, ...]] = {}
        for place, each in self.rows.items():
            if place >= len(logits):
                continue
            allowed = _allowed(each)
            if allowed:
                menus[place] = allowed
            elif each.key is not None:
                free.append(place)
        chunk = max(1, CHUNK_ELEMENTS // logits.shape[1])
        for start in range(0, len(free), chunk):
            places = free[start : start + chunk]
            self._record_entropies(places, logits[torch.tensor(places, device=logits.device)])
        if menus:
            self._mask(logits, menus)
        return logits

    def take(self, keys: Collection[str]) -> dict[str, list[tuple[int, float]]]:
        """Return and forget what was recorded for some keys.

        Returns:
            By key, pairs of a token's index in the reply and its entropy in nats.
        """
        for names, entropies in self._pending:
            for (key, place), entropy in zip(names, entropies.tolist(), strict=True):
                self._entropies.setdefault(key, []).append((place, entropy))
        self._pending.clear()
        return {key: self._entropies.pop(key) for key in keys if key in self._entropies}

    def _mask(self, logits: Tensor, menus: Mapping[int, tuple[int, ...]]) -> None:
        width = max(map(len, menus.values()))
        # A shorter menu is padded with its first id, which is then written twice with the same value.
        padded = [(*menu, *menu[:1] * (width - len(menu))) for menu in menus.values()]
        ids = torch.tensor(padded, device=logits.device)
        sizes = torch.tensor([len(menu) for menu in menus.values()], device=logits.device)
        rows = torch.tensor(list(menus), device=logits.device)
        values = logits[rows.unsqueeze(1), ids]
        # A forced token has probability 1 whatever its logit, so nan there must not spread.
        values = values.masked_fill((sizes == 1).unsqueeze(1), 0.0)
        beyond = torch.arange(width, device=logits.device) >= sizes.unsqueeze(1)
        self._record_entropies(list(menus), values.masked_fill(beyond, -torch.inf))
        logits[rows] = -torch.inf
        logits[rows.unsqueeze(1), ids] = values

    def _record_entropies(self, places: Sequence[int], logits: Tensor) -> None:
        rows = [self.rows[place] for place in places]
        temperatures = torch.tensor([each.temperature for each in rows], device=logits.device)
        probabilities = (logits.float() / temperatures.unsqueeze(1)).softmax(-1)
        entropies = torch.special.entr(probabilities).sum(-1)
        named = [
            (number, (each.key, len(each.output_ids)))
            for number, each in enumerate(rows)
            if each.key is not None
        ]
        if len(named) < len(rows):
            entropies = entropies[torch.tensor([number for number, _ in named], dtype=torch.int64)]
        self._pending.append(([name for _, name in named], entropies))


def _allowed(each: Row) -> tuple[int, ...]:
    """Return the ids that may come next; empty where all may, or where the reply has already ended."""
    if each.thoughts is not None:
        return (each.thoughts.stop,) if each.thoughts.over(each.output_ids) else ()
    if each.trie is None:
        return ()
    try:
        return each.trie.allowed(each.output_ids)
    except ChoiceError:
        return ()  # the reply was complete: vLLM ran a step ahead, and discards this token
