"""Ctrl-C, SIGTERM and a closed terminal as a question between two steps, not an end in the middle of one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ssld.errors import Interrupted

ASKED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""What asks a process to end; SIGHUP is a terminal that is closed."""


class Stop:
    """The signal that asked the process to end, if one did."""

    def __init__(self) -> None:
        self.number: int | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Remember the first signal; a second one acts as it would without us, at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def remember(number: int, frame: object) -> None:
            self.number = number
            for other, handler in old.items():
                signal.signal(other, handler)

        # under nohup the end of the terminal is none of ours
        heard = [number for number in ASKED if signal.getsignal(number) != signal.SIG_IGN]
        old = {number: signal.signal(number, remember) for number in heard}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def check(self, where: str) -> None:
        """Raise Interrupted, with the shell's exit code for the signal, when one came. where: what was reached."""
        if self.number is not None:
            raise Interrupted(f"stopped by {signal.Signals(self.number).name} {where}", 128 + self.number)
