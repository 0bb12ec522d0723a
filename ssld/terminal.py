"""What the command line says: tables and messages, on streams that may be closed, full, or read by nobody."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import IO

from ssld.errors import StorageError


def occupy() -> None:
    """Let streams that were closed lead nowhere: files of ours would take their numbers, to which libraries print."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # it gets the lowest number that is free
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def say(line: str) -> None:
    """A line on standard error; that it cannot be written changes no exit code."""
    try:
        _put(sys.stderr, line)
    except OSError:
        mute(sys.stderr)


def mute(stream: IO[str]) -> None:
    """Lead a stream nowhere: what it still holds would be tried again at the end, and change the exit code."""
    with suppress(OSError), open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


def _put(stream: IO[str] | None, line: str) -> None:
    # Python has None for a stream that was closed when it started
    if stream is not None:
        stream.write(line + "\n")
        stream.flush()


def plain(text: str) -> str:
    """The text with escapes for what a terminal would act upon, since names in it are whatever the data say.

    >>> plain("\x1b[2Jcät")
    '\\\\x1b[2Jcät'
    """
    return "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)


def show(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table on standard output, columns padded, nothing cut off."""
    lines = [tuple(header), *(tuple(map(plain, row)) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    try:
        for line in lines:
            _put(sys.stdout, "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    except BrokenPipeError:
        # a reader that wants no more; click ends quietly
        raise
    except OSError as error:
        mute(sys.stdout)
        raise StorageError(f"cannot write standard output: {error.strerror}; what was committed stays") from error
