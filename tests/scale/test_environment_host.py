"""The environments of an actor, tested without Ray: batches go in, and enough answers come out."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import cloudpickle
import pytest
from worker_worlds import Corridor

from agentrl.data.trajectory import StopReason
from agentrl.errors import AgentRLError
from agentrl.rollout.environments import Answered
from agentrl.rollout.play import Reset, Step, Stop, Transition
from agentrl.rollout.settings import WorkersConfig
from agentrl.rollout.workers import EnvironmentLostError
from agentrl.scale.environment_host import EnvironmentHost, Release, Report, pack_call, unpack_result
from agentrl.scale.messages import replies_to_await

ONE = WorkersConfig(count=1)


@pytest.fixture
def host() -> Iterator[EnvironmentHost]:
    host = EnvironmentHost(cloudpickle.dumps(Corridor), 6, ONE, [])
    yield host
    host.close()


def told(host: EnvironmentHost, name: str, *arguments: Any) -> Any:
    return unpack_result(host.call(pack_call(name, arguments)))


def said(report: Report) -> dict[str, str]:
    return {name: answer.observation for name, answer in report.answers if isinstance(answer, Transition)}


class Slow:
    """Stand-in for the environments whose every poll returns one answer, the oldest."""

    restarts = recycled = 0

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.released: list[tuple[str, bool]] = []

    def submit(self, episode: str, effect: Any) -> None:
        self.asked.append(episode)

    def poll(self, *, wait: bool, max_wait: float) -> Sequence[Answered]:
        return [(self.asked.pop(0), Transition("done"))]

    def release(self, episode: str, *, broken: bool) -> None:
        self.released.append((episode, broken))

    def close(self) -> None:
        pass


@pytest.fixture
def slow(host: EnvironmentHost, monkeypatch: pytest.MonkeyPatch) -> Slow:
    host.close()
    environments = Slow()
    monkeypatch.setattr(host, "_environments", environments)
    return environments


def test_episodes_are_played_by_messages(host: EnvironmentHost) -> None:
    assert told(host, "capacity") == 6
    begin = [("a", Reset("2", 0)), ("b", Reset("5", 0))]
    first = said(told(host, "exchange", begin, 1, math.inf))
    if len(first) == 1:
        first |= said(told(host, "exchange", [], 1, math.inf))
    assert first == {"a": "2 shelves", "b": "5 shelves"}
    assert said(told(host, "exchange", [("b", Step("go"))], 1, math.inf)) == {"b": "go: 4 left"}


@pytest.mark.parametrize(
    ("target", "playing", "wanted"), [(9, 1, 1), (9, 2, 1), (9, 3, 2), (9, 8, 6), (9, 12, 9), (9, 64, 9)]
)
def test_so_many_are_company_or_three_of_four(target: int, playing: int, wanted: int) -> None:
    assert replies_to_await(target, playing) == wanted


def test_an_exchange_ends_with_enough_answers_and_the_next_brings_the_others(
    host: EnvironmentHost, slow: Slow
) -> None:
    eight = [(str(number), Reset("1", 0)) for number in range(8)]
    assert [name for name, _ in host.exchange(eight, 10, math.inf).answers] == list("012345")
    assert [name for name, _ in host.exchange([], 10, math.inf).answers] == list("67")
    assert host.exchange([], 10, math.inf).answers == []


def test_an_exchange_that_may_not_wait_takes_messages_and_waits_for_nothing(
    host: EnvironmentHost, slow: Slow
) -> None:
    assert host.exchange([("a", Reset("1", 0))], 1, 0.0).answers == []
    assert [name for name, _ in host.exchange([], 1, math.inf).answers] == ["a"]


def test_who_is_released_counts_no_more(host: EnvironmentHost, slow: Slow) -> None:
    three = [(name, Reset("1", 0)) for name in "abc"]
    assert len(host.exchange(three, 3, math.inf).answers) == 2  # of three
    host.exchange([], 3, math.inf)
    two = [("a", Release(True)), ("b", Step("x")), ("c", Step("x"))]
    assert len(host.exchange(two, 3, math.inf).answers) == 1  # of two
    assert slow.released == [("a", True)]


def test_a_crash_in_a_worker_is_an_answer_and_is_counted(host: EnvironmentHost) -> None:
    host.exchange([("a", Reset("3 exit", 0))], 1, math.inf)
    host.exchange([("a", Step("go"))], 1, math.inf)
    report = host.exchange([("a", Step("go"))], 1, math.inf)
    ((name, answer),) = report.answers
    assert isinstance(answer, Stop)
    assert (name, answer.reason, answer.bystander) == ("a", StopReason.WORKER_ERROR, False)
    assert "exited with 3; its last output: the last thing I say" in str(answer.error)
    assert report.restarts == 1


def test_one_that_is_set_aside_answers_and_what_it_raises_comes_back(host: EnvironmentHost) -> None:
    told(host, "borrow", 1)
    assert told(host, "ask", 1, "splits", None, {}) == ("train",)
    assert told(host, "ask", 1, "task_hash", None, {}) is ...
    assert told(host, "ask", 1, "task_hash", ("5",), {}) == f"{5:064x}"
    assert told(host, "ask", 1, "reset", (), {"options": {"task": "4"}})[0] == "4 shelves"
    with pytest.raises(ValueError, match="invalid literal"):
        told(host, "ask", 1, "task_hash", ("x",), {})
    told(host, "give_back", 1, False)
    with pytest.raises(KeyError):
        told(host, "ask", 1, "splits", None, {})


def test_who_has_set_one_aside_is_told_of_its_death(host: EnvironmentHost) -> None:
    told(host, "borrow", 1)
    told(host, "ask", 1, "reset", (), {"options": {"task": "3 exit"}})
    told(host, "ask", 1, "step", ("go",), {})
    with pytest.raises(EnvironmentLostError, match="exited with 3"):
        told(host, "ask", 1, "step", ("go",), {})
    told(host, "give_back", 1, True)
    told(host, "borrow", 2)
    assert told(host, "ask", 2, "reset", (), {"options": {"task": "2"}})[0] == "2 shelves"
    told(host, "give_back", 2, False)


def test_what_makes_environments_is_opened_in_the_workers_only() -> None:
    host = EnvironmentHost(cloudpickle.dumps(Trap()), 1, ONE, [])
    with pytest.raises(AgentRLError, match="RuntimeError: sprung"):
        told(host, "borrow", 1)
    host.close()


class Trap:
    def __reduce__(self) -> Any:
        return _spring, ()


def _spring() -> Any:
    raise RuntimeError("sprung")
