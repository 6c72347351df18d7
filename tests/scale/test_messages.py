"""Packed messages are unpacked unchanged, with any field absent; tokens travel in arrays."""

import pickle
from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from agentrl.policy.engine import Generation, GenerationRequest, SamplingParams
from agentrl.policy.thinking import Ending, Thinking
from agentrl.scale.messages import (
    pack_generations,
    pack_requests,
    unpack_generations,
    unpack_requests,
)

THINKING = Thinking((1,), Ending("</t>", {5: "</", 6: "t", 7: ">"}), (5, 6, 7), {"": (8, 9), "\n": (9,)})
REQUESTS = [
    GenerationRequest("a", (1, 2, 3), True, None, 2**60, SamplingParams(0.0, 7)),
    GenerationRequest("b", (), False, ((4, 5), (6,)), 1, SamplingParams(), parent="a"),
    GenerationRequest("c", (9,), False, (), 2, SamplingParams()),
    GenerationRequest("d", (1, 2), True, ((4,),), 3, SamplingParams(), thinking=THINKING, begun=(2,)),
    GenerationRequest("e", (1,), True, ((4,),), 3, SamplingParams(), thinking=THINKING),
]
GENERATIONS = [
    Generation("a", (7, 8), (-0.1, -1e-9), (0.5, 0.25), ((7, 9), None), "length", 3, (2, 3)),
    Generation("b", error="no room", policy_version=1),
    Generation("c", (5,), (0.0,), (0.0,), None),
    Generation("d", error="gone", lost=True),
    Generation("e", (7, 8), (-0.1, -0.2), (0.5, 0.25), temperatures=(1.0, 0.7)),
]


def test_requests_come_out_as_they_went_in() -> None:
    numbered = list(enumerate(REQUESTS, start=5))
    assert unpack_requests(pack_requests(numbered)) == numbered
    assert unpack_requests(pack_requests([])) == []


def test_generations_come_out_as_they_went_in() -> None:
    numbered = list(enumerate(GENERATIONS, start=5))
    assert unpack_generations(pack_generations(numbered)) == numbered


@pytest.mark.parametrize(("kind", "sent"), [(GenerationRequest, REQUESTS), (Generation, GENERATIONS)])
def test_every_field_is_among_what_is_sent(kind: Any, sent: Any) -> None:
    for field in fields(kind):
        if field.name in ("confidences", "intervened"):  # measured by an engine in the same process only
            continue
        assert any(getattr(each, field.name) != field.default for each in sent), field.name


def test_tokens_of_all_lie_in_one_array() -> None:
    _, (values, lengths), _, _ = pack_requests(list(enumerate(REQUESTS)))
    assert isinstance(values, np.ndarray)
    assert (values.tolist(), lengths.tolist()) == ([1, 2, 3, 9, 1, 2, 1], [3, 0, 1, 2, 1])


def test_how_requests_think_is_sent_once_and_read_as_one() -> None:
    alone, together = (
        len(pickle.dumps(pack_requests([*enumerate(some)]))) for some in (REQUESTS[3:4], REQUESTS[3:])
    )
    assert together - alone < len(pickle.dumps(THINKING))
    read = pickle.loads(pickle.dumps(pack_requests([*enumerate(REQUESTS)])))
    third, fourth = (each.thinking for _, each in unpack_requests(read)[3:])
    assert third is fourth
    assert third == THINKING
