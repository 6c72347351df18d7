"""Messages between a driver and its actors: the tokens of many replies in one array, not one list each."""

from collections.abc import Iterator, Sequence
from dataclasses import astuple
from itertools import chain, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agentrl.policy.engine import Generation, GenerationRequest, SamplingParams

Rows = tuple[NDArray[Any], NDArray[np.int64]]  # concatenated values, and the length of each row; -1 for None
Menus = tuple[Rows, NDArray[np.int64]]  # concatenated rows, and the number of rows of each menu; -1 for None
Requests = tuple[list[Any], Rows, Menus, Rows]
Generations = tuple[list[Any], Rows, Rows, Rows, Menus, Rows, Rows]


def replies_to_await(target: int, owed: int) -> int:
    """Return how many answers to wait for before sending a message, when `owed` are outstanding.

    Waiting for `target` answers saves messages; three quarters of those outstanding keep stragglers from
    delaying the others.
    """
    return max(1, min(target, owed * 3 // 4))


def pack_requests(requests: Sequence[tuple[int, GenerationRequest]]) -> Requests:
    """Pack requests, each with the number that its generation will carry."""
    heads = [
        # pickle sends an object once, however many requests share it.
        (
            number,
            each.sequence,
            each.new_sequence,
            each.seed,
            astuple(each.sampling),
            each.parent,
            each.thinking,
        )
        for number, each in requests
    ]
    asked = [each for _, each in requests]
    return (
        heads,
        _pack_rows([each.prompt_ids for each in asked]),
        _pack_menus([each.choices for each in asked]),
        _pack_rows([each.begun for each in asked]),
    )


def unpack_requests(message: Requests) -> list[tuple[int, GenerationRequest]]:
    """Unpack the message of `pack_requests`."""
    heads, prompts, choices, begun = message
    return [
        (
            number,
            GenerationRequest(
                sequence,
                prompt,
                new_sequence,
                menu,
                seed,
                SamplingParams(*sampling),
                parent,
                thinking,
                thoughts,
            ),
        )
        for (number, sequence, new_sequence, seed, sampling, parent, thinking), prompt, menu, thoughts in zip(
            heads, _unpack_rows(prompts), _unpack_menus(choices), _unpack_rows(begun), strict=True
        )
    ]


def pack_generations(generations: Sequence[tuple[int, Generation]]) -> Generations:
    """Pack generations, each with the number of its request."""
    heads = [
        (number, each.sequence, each.finish, each.policy_version, each.error, each.lost)
        for number, each in generations
    ]
    found = [each for _, each in generations]
    return (
        heads,
        _pack_rows([each.token_ids for each in found]),
        _pack_rows([each.logprobs for each in found], np.float64),
        _pack_rows([each.entropies for each in found], np.float64),
        _pack_menus([each.allowed for each in found]),
        _pack_rows([each.policy_versions for each in found]),
        _pack_rows([each.temperatures for each in found], np.float64),
    )


def unpack_generations(message: Generations) -> list[tuple[int, Generation]]:
    """Unpack the message of `pack_generations`."""
    heads, tokens, logprobs, entropies, allowed, versions, temperatures = message
    return [
        (
            number,
            Generation(
                sequence,
                ids,
                of_tokens,
                spread,
                menus,
                finish,
                version,
                drawn_with,
                error=error,
                temperatures=drawn_at,
                lost=lost,
            ),
        )
        for (
            number,
            sequence,
            finish,
            version,
            error,
            lost,
        ), ids, of_tokens, spread, menus, drawn_with, drawn_at in zip(
            heads,
            _unpack_rows(tokens),
            _unpack_rows(logprobs),
            _unpack_rows(entropies),
            _unpack_menus(allowed),
            _unpack_rows(versions),
            _unpack_rows(temperatures),
            strict=True,
        )
    ]


def _pack_rows(rows: Sequence[Sequence[Any] | None], dtype: Any = np.int64) -> Rows:
    lengths = np.array([-1 if row is None else len(row) for row in rows], np.int64)
    values = np.fromiter(chain.from_iterable(row or () for row in rows), dtype)
    return values, lengths


def _unpack_rows(rows: Rows) -> Iterator[Any]:
    values, lengths = rows
    left = iter(values.tolist())
    return (None if length < 0 else tuple(islice(left, length)) for length in lengths.tolist())


def _pack_menus(menus: Sequence[Sequence[Sequence[int] | None] | None]) -> Menus:
    counts = np.array([-1 if menu is None else len(menu) for menu in menus], np.int64)
    return _pack_rows(list(chain.from_iterable(menu or () for menu in menus))), counts


def _unpack_menus(menus: Menus) -> Iterator[Any]:
    rows, counts = menus
    left = _unpack_rows(rows)
    return (None if count < 0 else tuple(islice(left, count)) for count in counts.tolist())
