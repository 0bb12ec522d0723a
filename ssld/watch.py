"""Waits that have an end: what a run waits for comes in time, or the run says what did not come, and ends.

A disk, a server or a plug-in that does not answer holds the thread that asked it, often inside of a library where no
exception reaches it. So the watch has a thread of its own, and what it does at the end of the time ends the process;
what was committed stands. A library that does not let go of the interpreter holds the watch as well.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ssld.errors import StallError
from ssld.signals import held

LOOK = 1.0
"""Seconds between two looks, at most. A process that is suspended does not look, so that time does not count."""
GRACE = 5.0
"""Seconds longer that one waits for another process, which has a watch of its own and knows better what is missing."""


@dataclass(frozen=True, eq=False)
class _Wait:
    what: Callable[[], str]
    since: float
    """In seconds of the watch; later than now where there is a grace."""


def _words(what: Callable[[], str]) -> str:
    try:
        return what()
    except Exception as error:
        # it asks what does not answer, and the run is to end in any case
        return f"something that cannot be named ({error!r})"


class Watch:
    """Knows what the threads of this process wait for."""

    def __init__(self) -> None:
        # in the order in which they began
        self._waits: dict[_Wait, None] = {}
        self._now = 0.0

    @contextmanager
    def awaiting(self, what: Callable[[], str], grace: float = 0) -> Iterator[None]:
        """Something that comes in here. what(): it, in words that go on "expected …"; grace: seconds more to wait."""
        wait = _Wait(what, self._now + grace)
        self._waits[wait] = None
        try:
            yield
        finally:
            del self._waits[wait]

    @contextmanager
    def on(self, seconds: float, end: Callable[[StallError], None]) -> Iterator[None]:
        """In here nothing takes longer than so many seconds, 0 for any time; end(error) is called, once, if it does.

        It is called in the thread of the watch and should end the process, since whoever waits cannot.
        """
        done = threading.Event()
        look = min(LOOK, seconds / 4)

        def watch() -> None:
            while not done.wait(look):
                self._now += look
                # a wait that begins between two looks seems longer than it is, by one at most
                late = [wait for wait in tuple(self._waits) if self._now - wait.since > seconds + look]
                if late:
                    what = _words(late[-1].what)
                    end(
                        StallError(
                            f"expected {what} within {seconds:g} s, got nothing; see why it does not come, or raise "
                            f"--stall-timeout where it only takes long"
                        )
                    )
                    return

        thread = threading.Thread(target=watch, name="ssld-watch", daemon=True)
        if seconds:
            with held():
                thread.start()
        try:
            yield
        finally:
            done.set()
            if seconds:
                thread.join()


watch = Watch()
"""Of this process."""
