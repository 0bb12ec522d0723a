"""Signals: the first is remembered, the second acts as it would without us, and the handlers come back."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from ssld.errors import Interrupted
from ssld.signals import Stop

NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@pytest.fixture
def arrived():
    """The signals that reached a handler which was there before; the handlers of pytest come back at the end."""
    seen = []
    before = {number: signal.signal(number, lambda number, frame: seen.append(number)) for number in NUMBERS}
    yield seen
    for number, handler in before.items():
        signal.signal(number, handler)


def handlers():
    return [signal.getsignal(number) for number in NUMBERS]


@pytest.mark.parametrize("first", NUMBERS)
@pytest.mark.parametrize("second", NUMBERS)
def test_the_first_is_remembered_and_the_second_acts_at_once(arrived, first, second):
    stop, before = Stop(), handlers()
    with stop.listening():
        assert stop.number is None
        assert not set(handlers()) & set(before)
        os.kill(os.getpid(), first)
        assert (stop.number, arrived) == (first, [])
        assert handlers() == before
        os.kill(os.getpid(), second)
        assert (stop.number, arrived) == (first, [second])
    assert handlers() == before


def test_a_second_ctrl_c_interrupts():
    stop = Stop()
    with stop.listening():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_handlers_come_back_after_an_error(arrived):
    before = handlers()
    with pytest.raises(ZeroDivisionError), Stop().listening():
        raise ZeroDivisionError
    assert handlers() == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.usefixtures("arrived")
def test_a_check_says_what_came_and_where(number, code):
    stop = Stop()
    stop.check("before anything came")
    with stop.listening():
        os.kill(os.getpid(), number)
    with pytest.raises(Interrupted, match=f"stopped by {number.name} after the first stage") as caught:
        stop.check("after the first stage")
    assert caught.value.exit_code == code


def test_another_thread_listens_to_nothing():
    """Python lets only the main thread set handlers; a notebook's worker may run a recipe all the same."""
    before, inside = handlers(), []

    def work():
        with Stop().listening():
            inside.extend(handlers())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert inside == before
