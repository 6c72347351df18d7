"""Prefix trees over token ids of admissible replies; standard library only."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby, pairwise
from operator import itemgetter
from weakref import WeakKeyDictionary

from agentrl.errors import AgentRLError
from agentrl.policy.text_cache import TextCache

Choices = tuple[tuple[int, ...], ...]
Encode = Callable[[str], tuple[int, ...]]

MOST_WARNINGS = 5  # per dialogue, about actions that have the same tokens
_WARNED: WeakKeyDictionary[Encode, set[tuple[str, str]]] = WeakKeyDictionary()


class ChoiceError(AgentRLError, ValueError):
    """Raised for choices that cannot be decoded: none, an empty one, or one that is a prefix of another."""


class Edge:
    """A decision and the forced tokens after it, up to the next decision (`node`) or the end (None).

    `ids[0]` is the decision, made among `allowed[0]`; every other token has a single allowed id.
    """

    __slots__ = ("_branches", "_depth", "_node", "allowed", "ids")

    def __init__(self, ids: tuple[int, ...], allowed: Choices, branches: Choices, depth: int) -> None:
        self.ids = ids
        self.allowed = allowed
        self._branches = branches
        self._depth = depth
        self._node: Node | None = None

    @property
    def node(self) -> Node | None:
        """Return the next decision; None at the end of a reply."""
        # Built when first reached, since most of a menu is never visited.
        if self._node is None and len(self._branches) > 1:
            self._node = Node(self._branches, self._depth)
        return self._node


class Node:
    """A decision: more than one id may follow, and `edges[k]` begins with `ids[k]`."""

    __slots__ = ("edges", "ids")

    def __init__(self, choices: Choices, depth: int) -> None:
        groups = [tuple(group) for _, group in groupby(choices, key=itemgetter(depth))]
        self.ids = tuple(group[0][depth] for group in groups)
        self.edges = tuple(_edge(group, depth, self.ids) for group in groups)


def _edge(choices: Choices, depth: int, allowed: tuple[int, ...]) -> Edge:
    end = _common_length(choices, depth + 1)
    ids = choices[0][depth:end]
    return Edge(ids, (allowed, *((token,) for token in ids[1:])), choices, end)


def _common_length(choices: Choices, start: int) -> int:
    # In a sorted list, a prefix of both the first and the last is a prefix of all.
    first, last = choices[0], choices[-1]
    if first is last:
        return len(first)
    end = start
    while first[end] == last[end]:
        end += 1
    return end


class TokenTrie:
    """Prefix tree of replies, which knows the ids that may follow a prefix of a reply.

    >>> trie = TokenTrie(((5, 7, 1), (5, 8, 1)))
    >>> trie.forced, trie.allowed((5,)), trie.trace((5, 8, 1))
    ((5,), (7, 8), ((5,), (7, 8), (1,)))

    Args:
        choices: The replies; none may be empty or a prefix of another. Duplicates count once.

    Raises:
        ChoiceError: If there is no choice, an empty one, or one that is a prefix of another.
    """

    __slots__ = ("ends", "forced", "largest", "longest", "root", "smallest", "tokens")

    def __init__(self, choices: Iterable[Sequence[int]]) -> None:
        ordered = tuple(sorted({tuple(choice) for choice in choices}))
        if not ordered:
            raise ChoiceError("choices is empty; wanted at least one reply, or None for free generation")
        _check_prefixes(ordered)
        start = _common_length(ordered, 0)
        self.forced = ordered[0][:start]  # the ids with which every choice begins
        self.root = Node(ordered, start) if len(ordered) > 1 else None
        self.longest = max(map(len, ordered))
        self.tokens = sum(map(len, ordered))
        self.ends = frozenset(choice[-1] for choice in ordered)
        self.smallest, self.largest = min(map(min, ordered)), max(map(max, ordered))

    def allowed(self, prefix: Sequence[int]) -> tuple[int, ...]:
        """Return the ids that may follow `prefix`, in ascending order; empty after a complete reply."""
        return self._walk(prefix)[1]

    def run(self, prefix: Sequence[int]) -> tuple[int, ...]:
        """Return the forced ids that follow `prefix`, up to the next decision or the end."""
        forced: list[int] = []
        while len(allowed := self.allowed((*prefix, *forced))) == 1:
            forced.append(allowed[0])
        return tuple(forced)

    def trace(self, ids: Sequence[int]) -> Choices:
        """Return the allowed ids at every token of the (possibly unfinished) reply `ids`."""
        return self._walk(ids)[0]

    def _walk(self, ids: Sequence[int]) -> tuple[Choices, tuple[int, ...]]:
        """Return the allowed ids at every token of `ids`, and those that may follow."""
        run: tuple[int, ...] = self.forced
        allowed: Choices = tuple((token,) for token in run)
        node, done = self.root, 0
        seen: list[tuple[int, ...]] = []
        while True:
            for token, options in zip(run, allowed, strict=True):
                if done == len(ids):
                    return tuple(seen), options
                if ids[done] != token:
                    raise ChoiceError(f"token {ids[done]} at place {done} of {tuple(ids)}: wanted {options}")
                seen.append(options)
                done += 1
            if node is None or done == len(ids):
                break
            if ids[done] not in node.ids:
                raise ChoiceError(f"token {ids[done]} at place {done} of {tuple(ids)}: wanted {node.ids}")
            edge = node.edges[node.ids.index(ids[done])]
            run, allowed, node = edge.ids, edge.allowed, edge.node
        if done < len(ids):
            raise ChoiceError(f"{tuple(ids)} continues after the choice {tuple(ids[:done])}")
        return tuple(seen), () if node is None else node.ids


def _check_prefixes(ordered: Choices) -> None:
    if not ordered[0]:
        raise ChoiceError("one of the choices has no tokens; wanted replies that end in a stop id")
    for first, second in pairwise(ordered):
        # In sorted order, everything between a prefix and its continuation has the same prefix.
        if second[: len(first)] == first:
            raise ChoiceError(
                f"the choice {first} is a prefix of the choice {second}, so the two cannot be told apart"
            )


def admissible_replies(actions: Iterable[str], encode: Encode) -> dict[tuple[int, ...], str]:
    """Return the replies that a policy may give, each with its action.

    Two actions can have the same tokens, such as the composed and decomposed form of a name, or one with a
    leading space. The policy cannot tell them apart, and such a reply means the action that is listed first.
    The first few pairs raise a warning.

    Args:
        actions: The actions of the environment.
        encode: The function that encodes the reply of an action as tokens.
    """
    replies: dict[tuple[int, ...], str] = {}
    for action in actions:
        first = replies.setdefault(encode(action), action)
        if first != action:
            _warn_of_duplicates(first, action, encode)
    return replies


def _warn_of_duplicates(first: str, other: str, encode: Encode) -> None:
    warned = _WARNED.setdefault(encode, set())
    if (first, other) in warned or len(warned) >= MOST_WARNINGS:
        return
    warned.add((first, other))
    warnings.warn(
        f"the actions {first!r} ({first!a}) and {other!r} ({other!a}) are the same tokens to the policy; "
        "choosing them means the first",
        RuntimeWarning,
        stacklevel=3,
    )


def _trie_bytes(trie: TokenTrie) -> int:
    # Counts all nodes, although they are built when first reached; 160 bytes per token were never exceeded.
    return 512 + 160 * trie.tokens


def _new_trie(choices: Choices) -> TokenTrie:
    return TokenTrie(choices)


TRIES = TextCache()
_cached_trie = TRIES.memoize(_new_trie, _trie_bytes)


def token_trie(choices: Choices) -> TokenTrie:
    """Return the trie of a tuple of choices, cached by its choices."""
    return _cached_trie(choices)
