"""The mask and the entropies of the logits processor, tested without vLLM."""

import math

import pytest
import torch

from agentrl.policy.trie import ChoiceError
from agentrl.scale.vllm_decisions import Decisions, Row, row

MENU = ((2, 3, 9), (2, 4, 9), (5, 9))


def decisions(**rows: Row | None) -> Decisions:
    found = Decisions()
    found.rows = {int(place.removeprefix("at")): each for place, each in rows.items() if each is not None}
    return found


def own(
    key: str | None, choices: object, output: tuple[int, ...] = (), temperature: float = 1.0
) -> Row | None:
    return row({"agentrl": {"key": key, "choices": choices}}, temperature, output)


def test_only_the_ids_that_may_follow_what_was_sampled_stay_finite() -> None:
    logits = torch.arange(40.0).reshape(4, 10)
    kept = logits.clone()
    decisions(at0=own("a", MENU), at1=own("b", MENU, (2,)), at3=own("c", None)).apply(logits)
    assert [torch.isfinite(each).nonzero().flatten().tolist() for each in logits] == [
        [2, 5],
        [3, 4],
        list(range(10)),
        list(range(10)),
    ]
    assert torch.equal(logits[0, [2, 5]], kept[0, [2, 5]])
    assert torch.equal(logits[1, [3, 4]], kept[1, [3, 4]])
    assert torch.equal(logits[2:], kept[2:])


def test_entropies_are_those_of_the_allowed_ids_after_the_temperature() -> None:
    logits = torch.zeros(3, 8)
    logits[0, 2], logits[0, 5], logits[0, 7] = math.log(3.0), 0.0, 50.0
    logits[1, 0] = math.log(2.0)
    found = decisions(at0=own("a", MENU), at1=own("b", None, (6, 6), temperature=0.5), at2=own("c", None))
    found.apply(logits)
    taken = found.take(["a", "b", "c"])
    quarter = math.log(4.0) - 0.75 * math.log(3.0)  # of 3/4 and 1/4
    sharp = math.log(11.0) - 4 / 11 * math.log(4.0)  # weights 2^(1/0.5) and seven times 1
    assert taken["a"] == [(0, pytest.approx(quarter, abs=1e-6))]
    assert taken["b"] == [(2, pytest.approx(sharp, abs=1e-6))]
    assert taken["c"] == [(0, pytest.approx(math.log(8.0), abs=1e-6))]


def test_a_forced_id_has_no_entropy_whatever_its_logit() -> None:
    logits = torch.full((1, 10), float("nan"))
    found = decisions(at0=own("a", MENU, (5,)))
    found.apply(logits)
    assert logits[0].tolist() == [-math.inf] * 9 + [0.0]
    assert found.take(["a"]) == {"a": [(1, 0.0)]}


def test_logits_that_are_not_finite_have_an_entropy_that_is_not_a_number() -> None:
    logits = torch.full((2, 10), float("nan"))
    found = decisions(at0=own("a", MENU), at1=own("b", None))
    found.apply(logits)
    assert all(math.isnan(pairs[0][1]) for pairs in found.take(["a", "b"]).values())


def test_greedy_draws_are_judged_at_temperature_one() -> None:
    found = decisions(at0=own("a", None, temperature=0.0))
    found.apply(torch.zeros(1, 10))
    assert found.take(["a"])["a"][0][1] == pytest.approx(math.log(10.0), abs=1e-6)


def test_a_reply_that_has_ended_and_a_stranger_are_left_alone() -> None:
    logits = torch.rand(3, 10)
    kept = logits.clone()
    rows = decisions(at0=own("a", MENU, (5, 9)), at1=own("b", MENU, (5, 9, 1)), at2=own("c", MENU, (7,)))
    rows.apply(logits)
    assert torch.equal(logits, kept)
    assert row({"top": 1}, 1.0, ()) is None
    assert row(None, 1.0, ()) is None


def test_what_is_sampled_next_is_read_from_the_list_that_vllm_extends() -> None:
    output: list[int] = []
    found = Decisions()
    own_row = row({"agentrl": {"key": "a", "choices": MENU}}, 1.0, output)
    assert own_row is not None
    found.rows[0] = own_row
    found.apply(torch.zeros(1, 10))
    output.append(2)
    logits = torch.zeros(1, 10)
    found.apply(logits)
    assert torch.isfinite(logits[0]).nonzero().flatten().tolist() == [3, 4]
    assert [place for place, _ in found.take(["a"])["a"]] == [0, 1]


def test_entropies_wait_for_the_one_who_asks_for_their_key() -> None:
    found = decisions(at0=own("a", None), at1=own("b", None), at2=own(None, None))
    found.apply(torch.zeros(3, 10))
    assert found.take(["b", "unknown"]).keys() == {"b"}
    assert found.take(["a", "b"]).keys() == {"a"}


def test_choices_that_begin_one_another_are_refused() -> None:
    with pytest.raises(ChoiceError, match="is a prefix of the choice"):
        own("a", ((1, 2), (1, 2, 3)))


def test_thoughts_are_free_until_their_text_ends_them_and_then_stop() -> None:
    told = {"end": "</t>", "pieces": [[2, "</"], [3, "t"], [4, ">"]], "begun": [], "stop": 9}
    output: list[int] = []
    own_row = row({"agentrl": {"key": "a", "thoughts": told}}, 1.0, output)
    begun_row = row({"agentrl": {"key": "b", "thoughts": told | {"begun": [5, 2]}}}, 1.0, output)
    assert own_row is not None
    assert begun_row is not None
    open_to: list[tuple[int, int]] = []
    for token in (3, 4, 2, 2, 3, 4, 0):
        logits = torch.zeros(2, 10)
        decisions(at0=own_row, at1=begun_row).apply(logits)
        one, other = (int(torch.isfinite(each).sum()) for each in logits)
        open_to.append((one, other))
        output.append(token)
    # "</" "t" ">" is complete after two tokens for the one that has begun, after six for the other.
    assert [one for one, _ in open_to] == [10, 10, 10, 10, 10, 10, 1]
    assert [other for _, other in open_to[:3]] == [10, 10, 1]
