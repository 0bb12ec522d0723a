"""Ctrl-C, SIGTERM and a closed terminal as a question between two steps, not an end in the middle of one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

from ssld.errors import Interrupted

Handler = Callable[[int, FrameType | None], object]
UNTAKEN: dict[signal.Signals, Handler | signal.Handlers] = {
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGINT: signal.default_int_handler,
    signal.SIGHUP: signal.SIG_DFL,
}
"""What asks a process to end, and what Python does of itself; SIGHUP is a terminal that is closed."""
ASKED = tuple(UNTAKEN)


class Stop:
    """The signal that asked the process to end, if one did."""

    def __init__(self) -> None:
        self.number: int | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Remember the first signal; a second one acts as it would without us, at once."""
        old = _handlers()

        def remember(number: int, frame: FrameType | None) -> None:
            self.number = number
            for other, handler in old.items():
                signal.signal(other, UNTAKEN[other] if handler is _interrupt else handler)

        with _replaced(old, remember):
            yield

    def check(self, where: str) -> None:
        """Raise Interrupted, with the shell's exit code for the signal, when one came. where: what was reached."""
        if self.number is not None:
            raise Interrupted(f"stopped by {signal.Signals(self.number).name} {where}", 128 + self.number)


@contextmanager
def interrupting() -> Iterator[None]:
    """In here the first signal that would end the process without a word is raised as Interrupted, wherever it comes.

    Inside of another one this only takes the signal to be that error earlier.
    """
    untaken = {number: handler for number, handler in _handlers().items() if handler == UNTAKEN[number]}
    with _replaced(untaken, _interrupt):
        try:
            yield
        except _Came as came:
            name = signal.Signals(came.number).name
            raise Interrupted(f"stopped by {name}; nothing that was saved is lost", 128 + came.number) from came


class _Came(KeyboardInterrupt):
    """A signal on its way out: whoever takes errors, of a plug-in or a file say, must not take it for one."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _interrupt(number: int, frame: FrameType | None) -> None:
    for other in ASKED:
        if signal.getsignal(other) is _interrupt:
            signal.signal(other, UNTAKEN[other])
    raise _Came(number)


@contextmanager
def held() -> Iterator[None]:
    """What asks to end waits until the end of this; threads and processes that are started in here never hear it.

    A thread that was started before hears it for all: what is to be held has to be held there as well.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ASKED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def importing() -> Iterator[None]:
    """In here signals wait, and keep their handlers: a library may take them, and half an import cannot be mended.

    paddle takes SIGTERM, to print a trace of its own and die.
    """
    came: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        came.append(number)

    # a thread that was there before hears a signal all the same
    with held():
        try:
            # the handlers come back before the signals are let in
            with _replaced(_handlers(), remember):
                yield
        finally:
            for number in came:
                signal.raise_signal(number)


def _handlers() -> dict[signal.Signals, Any]:
    """The handler of each signal that asks to end, but for those that are ignored, as under nohup, or that C code has.

    None in other threads: Python lets only the main thread set handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    found = {number: signal.getsignal(number) for number in ASKED}
    return {number: handler for number, handler in found.items() if handler not in (signal.SIG_IGN, None)}


@contextmanager
def _replaced(old: Mapping[signal.Signals, Any], handler: Handler) -> Iterator[None]:
    """In here these signals have another handler."""
    for number in old:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, before in old.items():
            signal.signal(number, before)
