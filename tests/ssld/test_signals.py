"""Signals: the first is remembered, the second acts as it would without us, and the handlers come back."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from ssld.errors import Interrupted
from ssld.signals import UNTAKEN, Stop, importing, interrupting

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


# Where nobody listens yet ---------------------------------------------------------------------------------------------


@pytest.fixture
def untaken():
    """Handlers as Python has them at its start."""
    before = {number: signal.signal(number, UNTAKEN[number]) for number in NUMBERS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
@pytest.mark.usefixtures("untaken")
def test_what_would_end_the_process_without_a_word_interrupts_it(number, code):
    before = handlers()
    with pytest.raises(Interrupted, match=f"stopped by {number.name}; nothing that was") as caught, interrupting():
        signal.raise_signal(number)
    assert caught.value.exit_code == code
    assert handlers() == before


@pytest.mark.usefixtures("untaken")
def test_a_second_signal_while_the_first_interrupts_acts_as_it_would_without_us():
    before, then = handlers(), []
    with interrupting():
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException:
            then.extend(handlers())
    assert then == before


@pytest.mark.usefixtures("untaken")
def test_who_takes_any_error_for_one_of_a_plug_in_does_not_take_a_signal_for_one():
    def load():
        try:
            signal.raise_signal(signal.SIGTERM)
        except Exception:
            pytest.fail("the plug-in is not at fault")

    with pytest.raises(Interrupted), interrupting(), interrupting():
        load()


def test_a_handler_of_another_and_an_ignored_signal_are_left_alone(arrived):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    before = handlers()
    with interrupting():
        assert handlers() == before
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGHUP)
    assert arrived == [signal.SIGTERM]


@pytest.mark.usefixtures("untaken")
def test_who_listens_in_there_is_not_interrupted_by_the_first_and_ended_at_once_by_the_second():
    stop, before = Stop(), handlers()
    with interrupting(), interrupting():
        with stop.listening():
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.number == signal.SIGTERM
            assert handlers() == before
        assert not set(handlers()) & set(before)
    assert handlers() == before


def test_what_comes_while_something_is_imported_waits_and_reaches_the_handler_that_was_taken(arrived):
    taken, before = [], handlers()
    with importing():
        signal.signal(signal.SIGTERM, lambda number, frame: taken.append(number))
        # to this thread: others of this process, which were there before, would hear it
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert (taken, arrived) == ([], [])
    assert (taken, sorted(arrived)) == ([], [signal.SIGINT, signal.SIGTERM])
    assert handlers() == before


def test_what_is_imported_in_another_thread_leaves_the_handlers_alone():
    before, met = handlers(), []

    def work():
        with interrupting(), importing():
            met.extend(handlers())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert met == before
