"""How a run ends that does not end well: where a wait is over, where memory is short, and what goes on after it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from ssld.errors import Interrupted, ProcessError, SsldError, StallError, StorageError
from ssld.journal import Journal
from ssld.processes import kill
from ssld.terminal import plain, tell
from ssld.watch import watch

GOES_ON = (Interrupted, ProcessError, StallError, StorageError)
"""After these the same command goes on where it was."""
LAST_WORD = 1.0
"""Seconds that each word at the end of a process is given."""


@contextmanager
def going_on(onward: str, there: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Add to an error after which the same command goes on how it does; there(): whether there is something to."""
    try:
        yield
    except GOES_ON as error:
        if there():
            error.add_note(onward)
        raise


def end(error: StallError, journal: Journal, onward: str) -> None:
    """End the process of a run, with the error on the screen and in the log; what was committed stands."""

    def show() -> None:
        cursor = "\x1b[?25h" if journal.console.is_terminal else ""
        with suppress(OSError):
            os.write(2, (cursor + plain(f"Error: {error}\n{onward}\n")).encode())

    leave(error, show, lambda: journal.detail(f"Error: {error}"))


@contextmanager
def watched(seconds: float) -> Iterator[None]:
    """Nothing that a command waits for, which keeps nothing, takes longer in here; 0 for any time."""
    with watch.on(seconds, lambda error: leave(error, lambda: tell(f"Error: {error}"))):
        yield


def leave(error: StallError, *words: Callable[[], object]) -> None:
    """End the process, and those that it has started, after each of the words was tried for a moment.

    The threads of the process may be held where no exception reaches them, with the locks of the log and the screen;
    the log may lie on the disk that does not answer, and nobody may read the screen.
    """
    try:
        kill()
        for word in words:
            speaker = threading.Thread(target=word, daemon=True)
            speaker.start()
            speaker.join(LAST_WORD)
    finally:
        os._exit(error.exit_code)


@contextmanager
def memory_named(onward: str) -> Iterator[None]:
    """Raise a MemoryError, of numpy or of paddle, as SsldError: a run that wants too much is no defect of ours."""
    try:
        yield
    except MemoryError as error:
        short = SsldError(wanted_memory(error))
        short.add_note(onward)
        raise short from error


def wanted_memory(error: MemoryError) -> str:
    """What was wanted, and what to do."""
    said = str(error).strip().partition("\n")[0]
    return (
        f"expected memory for what the recipe asks for, got none{f' ({said})' if said else ''}; lower batch_size, "
        f"resolution or --nproc; what was saved stands"
    )
