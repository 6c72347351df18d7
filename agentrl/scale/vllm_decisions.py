"""Masks and entropies of the logits that a batch of requests is sampled from: loads no vLLM."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from agentrl.policy.thinking import Ending, EndingMatcher
from agentrl.policy.trie import ChoiceError, TokenTrie, token_trie

REQUEST = "agentrl"  # the key of a request's own arguments among those of vLLM's sampling parameters
CHUNK_ELEMENTS = 2**24


@dataclass(frozen=True, slots=True)
class Row:
    """A request's place in the batch.

    Args:
        key: entropies are noted under it; None notes none.
        trie: what it may choose from; None allows every id.
        temperature: of the draw; 0 counts as 1.
        output_ids: what was sampled for it so far, kept up to date by vLLM.
        thoughts: that it has; None for another request.
    """

    key: str | None
    trie: TokenTrie | None
    temperature: float
    output_ids: Sequence[int]
    thoughts: Thoughts | None = None


@dataclass(frozen=True, slots=True)
class Thoughts:
    """Those of a request that ends with them; the choice after them is another request.

    Args:
        ending: of them.
        begun: the last thoughts of its prompt.
        stop: an id that vLLM stops at.
    """

    ending: Ending
    begun: tuple[int, ...]
    stop: int

    def over(self, output_ids: Sequence[int]) -> bool:
        """Whether they have come to their ending."""
        last = len(self.ending.text)  # tokens that it may take, each of a character or more
        matcher = EndingMatcher(self.ending, self.begun if len(output_ids) < last else ())
        return any(matcher.take(token) is not None for token in output_ids[-last:])


def row(arguments: Mapping[str, Any] | None, temperature: float, output_ids: Sequence[int]) -> Row | None:
    """The row of a request; None for one that did not come from here.

    Args:
        arguments: the `extra_args` of its sampling parameters.
        temperature: of its draws.
        output_ids: see `Row`.

    Raises:
        ChoiceError: for choices that cannot be told apart.
    """
    own = (arguments or {}).get(REQUEST)
    if own is None:
        return None
    choices = own.get("choices")
    trie = None if choices is None else token_trie(tuple(tuple(choice) for choice in choices))
    thoughts = None
    if (told := own.get("thoughts")) is not None:
        ending = Ending(told["end"], dict(told["pieces"]))
        thoughts = Thoughts(ending, tuple(told["begun"]), told["stop"])
    return Row(own.get("key"), trie, temperature or 1.0, output_ids, thoughts)


class Decisions:
    """What the rows of a batch may be sampled from.

    Attributes:
        rows: by their index in the batch.
    """

    def __init__(self) -> None:
        self.rows: dict[int, Row] = {}
        self._pending: list[tuple[list[tuple[str, int]], Tensor]] = []  # not yet waited for
        self._entropies: dict[str, list[tuple[int, float]]] = {}

    def apply(self, logits: Tensor) -> Tensor:
        """Mask what is not allowed in logits [R, V], in place, and note entropies under the sampling."""
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
        """What was noted for some keys since the last call: places in the reply, with entropies in nats."""
        for names, entropies in self._pending:
            for (key, place), entropy in zip(names, entropies.tolist(), strict=True):
                self._entropies.setdefault(key, []).append((place, entropy))
        self._pending.clear()
        return {key: self._entropies.pop(key) for key in keys if key in self._entropies}

    def _mask(self, logits: Tensor, menus: Mapping[int, tuple[int, ...]]) -> None:
        width = max(map(len, menus.values()))
        # A menu that is shorter repeats its first id, which is written twice with the same value.
        padded = [(*menu, *menu[:1] * (width - len(menu))) for menu in menus.values()]
        ids = torch.tensor(padded, device=logits.device)
        sizes = torch.tensor([len(menu) for menu in menus.values()], device=logits.device)
        rows = torch.tensor(list(menus), device=logits.device)
        values = logits[rows.unsqueeze(1), ids]
        # What is forced has no logit of its own to be judged by: nan in it must not matter.
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
    """The ids that may come next; none where all may, or where the reply has ended already."""
    if each.thoughts is not None:
        return (each.thoughts.stop,) if each.thoughts.over(each.output_ids) else ()
    if each.trie is None:
        return ()
    try:
        return each.trie.allowed(each.output_ids)
    except ChoiceError:
        return ()  # vLLM ran a step ahead of what it will throw away: the reply was complete before
