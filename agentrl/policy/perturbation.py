"""Changes of an observation in the prompt of a turn that leave everything around it as it is."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

from transformers import PreTrainedTokenizerBase

from agentrl.data.trajectory import Episode, Turn
from agentrl.policy.encoding import plain_encoder
from agentrl.seeds import derive_seed

_ITEM = re.compile(r"[^\n.,;:]*[\n.,;:]?")
_WORD = re.compile(r"[a-z]{3,}")
# Words of tasks that say nothing of what the task is about.
_EMPTY = frozenset({"the", "and", "some", "for", "with", "from", "into", "you", "your", "put", "them"})


@dataclass(frozen=True, slots=True)
class PromptView:
    """The prompt of a turn with its observation changed.

    Args:
        ids: The token ids.
        noisy: The positions in `ids` whose embeddings get noise.
        seed: The seed of the noise.
        changed: Whether anything is changed.
    """

    ids: tuple[int, ...]
    noisy: tuple[int, ...] = ()
    seed: int = 0
    changed: bool = True


class ObservationPerturbation:
    """Change of the observations of episodes that were played.

    An observation is found in the prompt of its own turn by its text, without white space and case, and only
    if it occurs there exactly once; else, for example if it is cut, the prompt is left as it is. So are the
    tokens of the task inside of it, and all of the first observation if the environment does not name the
    task. A random draw depends on seed, episode and turn alone.

    Args:
        tokenizer: The tokenizer of the policy.
        perturbation: `noise`, `tokens`, `items` or `paraphrase`, see `ObservationView`.
        amount: The probability of a token or an item to be left out.
        seed: The seed of the run.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, perturbation: str, amount: float, seed: int
    ) -> None:
        self._perturbation, self._amount, self._seed = perturbation, amount, seed
        self._encode: Callable[[str], tuple[int, ...]] = plain_encoder(tokenizer)

        @lru_cache(2**17)
        def text_of(id: int) -> str:
            return squeeze(cast(str, tokenizer.decode([id], clean_up_tokenization_spaces=False)))

        self._text_of = text_of

    def __call__(self, episode: Episode, index: int) -> PromptView:
        """Return the prompt of a turn of an episode with its observation changed."""
        turn, task = episode.turns[index], _task_of(episode)
        stated = _statement(turn.observation, task)
        seed = derive_seed(self._seed, "observation view", episode.id, index)
        if index == 0 and task is None:
            return PromptView(turn.prompt_ids, changed=False)
        place = self._find(turn, [task or "", stated])
        if place is None:
            return PromptView(turn.prompt_ids, changed=False)
        if self._perturbation == "noise":
            return PromptView(turn.prompt_ids, place.free, seed, changed=bool(place.free))
        if self._perturbation == "paraphrase":
            return self._reworded(turn, stated, place)
        draw = random.Random(seed)
        if self._perturbation == "tokens":
            dropped = {token for token in place.free if draw.random() < self._amount}
        else:
            dropped = {
                token
                for item in place.items(turn.observation, task)
                if draw.random() < self._amount
                for token in item
            }
        ids = tuple(id for token, id in enumerate(turn.prompt_ids) if token not in dropped)
        return PromptView(ids, changed=bool(dropped))

    def _find(self, turn: Turn, kept: Sequence[str]) -> _Place | None:
        """Return where the observation of a turn is in its prompt; None if that is not certain."""
        said, texts = squeeze(turn.observation), [self._text_of(id) for id in turn.prompt_ids]
        prompt = "".join(texts)
        start = prompt.find(said) if said else -1
        if start < 0 or prompt.find(said, start + 1) >= 0:
            return None
        end = start + len(said)
        spans, at = list[tuple[int, int]](), 0
        for text in texts:
            spans.append((at, at + len(text)))
            at += len(text)
        guarded = [span for text in kept for span in _occurrences(prompt, squeeze(text))]
        tokens = [
            token
            for token, (first, last) in enumerate(spans)
            if first < last and start <= first and last <= end
        ]
        free = tuple(
            token
            for token in tokens
            if not any(spans[token][0] < until and since < spans[token][1] for since, until in guarded)
        )
        return _Place(free, {token: spans[token][0] - start for token in free})

    def _reworded(self, turn: Turn, stated: str, place: _Place) -> PromptView:
        """Return the prompt with the environment's paraphrase in place of the observation around the task."""
        other = turn.info.get("paraphrase")
        if not isinstance(other, str) or not place.free or stated not in other:
            return PromptView(turn.prompt_ids, changed=False)
        parts = other.partition(stated) if stated else (other, "", "")
        cut = squeeze(turn.observation).find(squeeze(stated)) if stated else len(turn.observation)
        new, done = list[int](), set[bool]()
        for token, id in enumerate(turn.prompt_ids):
            if token not in place.begins:
                new.append(id)
                continue
            after = place.begins[token] > cut
            if after not in done:  # the first token of a part stands for all of it
                done.add(after)
                new += self._encode(parts[2 if after else 0].strip())
        return PromptView(tuple(new), changed=tuple(new) != turn.prompt_ids)


@dataclass(frozen=True)
class _Place:
    """Where an observation is in a prompt.

    Args:
        free: The positions of its tokens that may be changed.
        begins: The place of the first character of each in the squeezed observation.
    """

    free: tuple[int, ...]
    begins: dict[int, int]

    def items(self, observation: str, task: str | None) -> Iterator[Sequence[int]]:
        """Yield the tokens of each item of an observation that shares no word with the task."""
        wanted = _content(task or "")
        at = 0
        for text in _ITEM.findall(observation):
            end = at + len(squeeze(text))
            if end > at and not wanted & _content(text):
                yield [token for token in self.free if at <= self.begins[token] < end]
            at = end


def squeeze(text: str) -> str:
    """Return a text without case and white space.

    >>> squeeze("A mug 1.")
    'amug1.'
    """
    return "".join(text.casefold().split())


def _content(text: str) -> set[str]:
    return set(_WORD.findall(text.casefold())) - _EMPTY


def _occurrences(text: str, part: str) -> Iterator[tuple[int, int]]:
    at = text.find(part) if part else -1
    while at >= 0:
        yield at, at + len(part)
        at = text.find(part, at + 1)


def _statement(observation: str, task: str | None) -> str:
    """Return the task in an observation with what its sentence says before it; empty if it is not there.

    >>> _statement("There is a desk 1. Your task is to: find a mug. Go.", "find a mug")
    'Your task is to: find a mug'
    """
    if task is None or task not in observation:
        return ""
    end = observation.find(task)
    start = max(observation.rfind(sign, 0, end) for sign in "\n.") + 1
    return observation[start : end + len(task)].lstrip()


def _task_of(episode: Episode) -> str | None:
    """Return the text of the task that the environment named at the reset."""
    named = episode.turns[0].info.get("task_text")
    return named if isinstance(named, str) and named.strip() else None
