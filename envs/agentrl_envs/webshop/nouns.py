"""Nouns of a title, for the part of the reward that compares kinds of products.

The original uses spaCy. Its models are not on PyPI, so the default is a heuristic; the label of a score names
the tagger.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from typing import Any, Protocol

from agentrl.errors import ConfigError, MissingDependencyError

CACHED_TITLES = 1 << 16  # titles
_NO_NOUNS_TEXT = """
    a about above across after again against all almost along also although always am among an and
    another any are around as at away be because been before behind being below between both but by can
    could did do does doing down during each either else enough etc even ever every few for from further
    get gets give had has have having he her here him his how i if in inside into is it its just keep
    keeps let like made make makes many may me more most much must my near need neither never new no nor
    not now of off on once one only or other our out outside over own per perfect please same she should
    since so some still such than that the their them then there these they this those through to
    together too toward under until up upon us use used uses using very was we well were what when where
    which while who whose why will with within without would yes yet you your two three four five six
    seven eight nine ten adjustable available beautiful best better big bright casual classic clean clear
    comfortable comfy compact cool cute deep different double durable easy elegant extra fashionable fast
    flat flexible foldable free fresh full funny gentle good great hard healthy heavy hidden high hot
    huge ideal large lightweight long low luxurious mini modern multiple natural nice non old open
    organic oversized personalized portable powerful premium professional pure quick quiet rechargeable
    reclining removable reusable rich round safe sexy sharp short simple single skinny slim small smart
    smooth soft solid special square strong stylish suitable super thick thin tiny traditional triple
    ultra unique universal useful versatile warm washable waterproof wet wide wild wireless wonderful
    young black blue brown dark gray green grey light orange pink purple red white yellow
"""
NO_NOUNS = frozenset(_NO_NOUNS_TEXT.split())

_WORDS = re.compile(r"[^\W\d_]{2,}")


class NounTagger(Protocol):
    """Interface of a noun tagger.

    Attributes:
        name: The name that appears in the label of every score.
    """

    name: str

    def __call__(self, title: str) -> Sequence[str]:
        """Return the nouns of a text in lower case, in order and with repeats."""
        ...


class Heuristic:
    """Tagger that takes every word of two letters or more except common words, adjectives and adverbs."""

    name = "heuristic"

    def __call__(self, title: str) -> list[str]:
        """Return the nouns of a text."""
        return [
            word
            for word in _WORDS.findall(title.lower())
            if word not in NO_NOUNS and not (word.endswith("ly") and len(word) > 5)
        ]


class SpacyNouns:
    """Tagger that uses a spaCy model; with the original's model, it gives exactly the original's nouns.

    Args:
        model: The name of the model, such as "en_core_web_sm".

    Raises:
        MissingDependencyError: spaCy or the model is not installed.
    """

    def __init__(self, model: str) -> None:
        try:
            spacy = import_module("spacy")
        except ImportError as error:
            raise MissingDependencyError(
                f"tagger {model!r} needs spaCy: pip install spacy, then python -m spacy download {model}"
            ) from error
        try:
            self._model: Any = spacy.load(model)
        except OSError as error:
            raise MissingDependencyError(
                f"tagger {model!r}: spaCy has no such model: python -m spacy download {model}"
            ) from error
        self.name = model

    def __call__(self, title: str) -> list[str]:
        """Return the nouns of a text."""
        return [token.text.lower() for token in self._model(title) if token.pos_ in ("NOUN", "PROPN")]


class CachedTagger:
    """Tagger with a cache of titles."""

    def __init__(self, tagger: NounTagger) -> None:
        self.name = tagger.name
        self._find = lru_cache(maxsize=CACHED_TITLES)(lambda title: tuple(tagger(title)))

    def __call__(self, title: str) -> Sequence[str]:
        """Return the nouns of a text, from the cache if it is there."""
        return self._find(title)


def noun_tagger(tagger: str | NounTagger) -> NounTagger:
    """Return a tagger by its name, "heuristic" or that of a spaCy model, or wrap the given one."""
    if isinstance(tagger, str):
        return _named(tagger)
    if not callable(tagger) or not isinstance(getattr(tagger, "name", None), str):
        raise ConfigError(f"tagger: {tagger!r}, wanted 'heuristic', a spaCy model, or a NounTagger")
    return CachedTagger(tagger)


@lru_cache(maxsize=2)
def _named(name: str) -> NounTagger:
    return CachedTagger(Heuristic() if name == Heuristic.name else SpacyNouns(name))
