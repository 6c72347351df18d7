"""Signals are recorded before they are raised, and come up at the next moment that can take them."""

import os
import signal
import time
import weakref
from collections.abc import Callable

import pytest

from agentrl.run.signals import Interruption


def send(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


def wait_for_it() -> None:
    for _ in range(500):
        time.sleep(0.01)


def listened(work: Callable[[Interruption], None]) -> None:
    with Interruption().listening() as interruption:
        work(interruption)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_what_is_going_on(number: int) -> None:
    before = signal.getsignal(number)

    def work(_: Interruption) -> None:
        send(number)
        wait_for_it()

    with pytest.raises(KeyboardInterrupt):
        listened(work)
    assert signal.getsignal(number) is before


def test_a_shield_is_finished_first() -> None:
    done = []

    def work(interruption: Interruption) -> None:
        with interruption.shield():
            with interruption.shield():
                send()
                done.append("inner")
            done.append("outer")
        done.append("after")

    with pytest.raises(KeyboardInterrupt):
        listened(work)
    assert done == ["inner", "outer"]


class Thing:
    pass


class Finalised:
    def __del__(self) -> None:
        send()
        time.sleep(0.001)


def in_a_weakref_callback() -> None:
    thing = Thing()
    reference = weakref.ref(thing, lambda _: (send(), time.sleep(0.001)))
    del thing
    assert reference() is None


def in_a_finalizer() -> None:
    Finalised()


@pytest.mark.parametrize("place", [in_a_weakref_callback, in_a_finalizer])
def test_a_stop_that_python_swallows_is_told_again(place: Callable[[], None]) -> None:
    reached = []

    def work(_: Interruption) -> None:
        place()
        reached.append("swallowed")
        wait_for_it()
        reached.append("lost")

    with pytest.raises(KeyboardInterrupt):
        listened(work)
    assert reached == ["swallowed"]


@pytest.mark.parametrize("place", [in_a_weakref_callback, in_a_finalizer])
def test_a_stop_that_python_swallows_is_heeded_at_the_next_safe_point(place: Callable[[], None]) -> None:
    reached = []

    def work(interruption: Interruption) -> None:
        place()
        reached.append("swallowed")
        interruption.check_stop()
        reached.append("lost")

    with pytest.raises(KeyboardInterrupt):
        listened(work)
    assert reached == ["swallowed"]


def test_a_stop_that_is_swallowed_at_the_very_end_is_not_lost() -> None:
    with pytest.raises(KeyboardInterrupt):
        listened(lambda _: in_a_finalizer())


def test_a_second_signal_does_not_disturb_what_the_first_has_raised() -> None:
    saved = []

    def work(interruption: Interruption) -> None:
        try:
            send()
            wait_for_it()
        except KeyboardInterrupt:
            send(signal.SIGINT)  # as a terminal and a scheduler both do
            with interruption.shield():
                saved.append(interruption.pop_request())

    listened(work)
    assert saved == [True]
