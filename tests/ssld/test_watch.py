"""Waits that do not end are told of; nothing else is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest

from ssld.errors import StallError
from ssld.watch import Watch


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_wait_that_does_not_end_is_named_with_its_time_and_the_remedy() -> None:
    watch, met, began = Watch(), [], time.monotonic()
    with watch.on(0.4, met.append), watch.awaiting(lambda: "the answer"):
        until(lambda: met)
    assert time.monotonic() - began >= 0.4
    [error] = met
    assert isinstance(error, StallError)
    assert error.exit_code == 69
    assert str(error).startswith("expected the answer within 0.4 s, got nothing;")
    assert "--stall-timeout" in str(error)


def test_waits_that_end_in_time_are_not_told_of_however_many() -> None:
    watch, met, asked = Watch(), [], []
    with watch.on(0.2, met.append):
        for _ in range(12):
            with watch.awaiting(lambda: str(asked.append(1))):
                time.sleep(0.03)
        # between two waits anything may take long: what may hang is inside of one
        time.sleep(0.4)
    assert not met
    # the words are made for an error alone
    assert not asked


def test_a_wait_that_raises_is_over() -> None:
    watch, met = Watch(), []
    with watch.on(0.2, met.append):
        with pytest.raises(KeyError), watch.awaiting(lambda: "it"):
            raise KeyError
        time.sleep(0.6)
    assert not met


def test_of_waits_inside_of_each_other_the_inner_one_is_named() -> None:
    watch, met = Watch(), []
    with watch.on(0.4, met.append), watch.awaiting(lambda: "the whole"), watch.awaiting(lambda: "the part"):
        until(lambda: met)
    assert "expected the part" in str(met[0])


def test_a_thread_that_waits_is_met_while_the_others_go_on() -> None:
    watch, met, over = Watch(), [], threading.Event()

    def wait() -> None:
        with watch.awaiting(lambda: "what the thread reads"):
            over.wait(30)

    thread = threading.Thread(target=wait)
    with watch.on(0.4, met.append):
        thread.start()
        while not met:
            with watch.awaiting(lambda: "a step"):
                time.sleep(0.01)
    over.set()
    thread.join()
    assert "what the thread reads" in str(met[0])


def test_zero_waits_for_ever_and_starts_no_thread() -> None:
    watch, before = Watch(), threading.active_count()
    with watch.on(0, pytest.fail), watch.awaiting(lambda: "it"):
        assert threading.active_count() == before
        time.sleep(0.3)


def test_words_that_cannot_be_found_end_the_wait_all_the_same() -> None:
    def what() -> str:
        raise OSError("gone too")

    watch, met = Watch(), []
    with watch.on(0.2, met.append), watch.awaiting(what):
        until(lambda: met)
    assert "gone too" in str(met[0])


SCRIPT = """
import time
from ssld.watch import Watch

watch = Watch()
with watch.on(0.5, lambda error: print(error, flush=True)), watch.awaiting(lambda: "it"):
    print("begun", flush=True)
    time.sleep(0.2)
print("done", flush=True)
"""


def test_the_time_for_which_a_process_is_suspended_does_not_count() -> None:
    with subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=-1, text=True) as process:
        assert process.stdout.readline() == "begun\n"
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(1)
        os.kill(process.pid, signal.SIGCONT)
        assert process.stdout.read() == "done\n"


def test_another_process_has_longer_to_say_itself_what_is_missing() -> None:
    watch, met, theirs = Watch(), [], Watch()
    with watch.on(0.2, met.append), watch.awaiting(lambda: "the other", 0.8):
        # it began to wait a little later
        time.sleep(0.2)
        with theirs.on(0.2, met.append), theirs.awaiting(lambda: "its disk"):
            until(lambda: len(met) == 2)
    assert ["expected its disk" in str(met[0]), "expected the other" in str(met[1])] == [True, True]
