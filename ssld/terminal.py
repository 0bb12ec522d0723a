"""What is said: results on standard output, all else on standard error, where either may be closed, full or unread."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import IO, Any

from ssld.errors import StorageError


def occupy() -> None:
    """Let streams that were closed lead nowhere: files of ours would take their numbers, to which libraries print."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # it gets the lowest number that is free
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def plain(text: str) -> str:
    """The text with escapes for what a terminal would act upon, since names in it are whatever the data say.

    >>> plain("\x1b[2Jcät")
    '\\\\x1b[2Jcät'
    """
    return "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)


def mute(stream: IO[str]) -> None:
    """Lead a stream nowhere: what it still holds would be tried again at the end, and change the exit code."""
    with suppress(OSError), open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


# Standard error -------------------------------------------------------------------------------------------------------


class Screen:
    """Standard error as a file that takes everything: a reader that is gone or a full disk changes no exit code."""

    def write(self, text: str) -> int:
        with self._kept() as stream:
            stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._kept() as stream:
            stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(_stderr(), name)

    @contextmanager
    def _kept(self) -> Iterator[IO[str]]:
        stream = _stderr()
        try:
            yield stream
        except OSError:
            mute(stream)


def _stderr() -> IO[str]:
    """What is below a live display, which puts itself in the place of standard error; closed by a shell it is None."""
    stream: IO[str] | None = getattr(sys.stderr, "rich_proxied_file", sys.stderr)
    return io.StringIO() if stream is None else stream


def tell(*lines: str, end: str = "\n") -> None:
    """Lines for people, on standard error."""
    screen = Screen()
    for line in lines:
        screen.write(plain(line) + end)
        screen.flush()


def ask(question: str) -> bool:
    """Whether the answer to a question on standard error is yes; where nobody answers it is no."""
    tell(f"{question} [y/N]: ", end="")
    answer = sys.stdin.readline() if sys.stdin else ""
    return answer.strip().lower() in ("y", "yes")


# Standard output ------------------------------------------------------------------------------------------------------


@contextmanager
def giving() -> Iterator[None]:
    """What is written to standard output in here is written, or a StorageError says why not.

    A reader that wants no more ends the process, without a word.
    """
    try:
        yield
    except BrokenPipeError:
        mute(sys.stdout)
        sys.exit(1)
    except OSError as error:
        mute(sys.stdout)
        raise StorageError(
            f"cannot write standard output: {error.strerror}; free space or lead it elsewhere, what was committed stays"
        ) from error


def give(text: str) -> None:
    """Lines of a result, on standard output."""
    # Python has None for a stream that was closed when it started
    if sys.stdout is not None:
        encoding = sys.stdout.encoding or "utf-8"
        # as Python does on standard error
        text = plain(text).encode(encoding, "backslashreplace").decode(encoding)
        with giving():
            sys.stdout.write(text + "\n")
            sys.stdout.flush()


def show(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table on standard output, columns padded, nothing cut off."""
    lines = [tuple(plain(str(cell)) for cell in line) for line in (header, *rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for line in lines:
        give("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
