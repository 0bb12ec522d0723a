"""What a file is, how it is named, and what it is known by while a run reads it: its size and its time."""

from __future__ import annotations

import os
import stat

import numpy as np

from ssld.errors import DataError

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def text(name: bytes) -> str:
    """A file or member name for keys and messages; bytes that are not UTF-8 are shown by number."""
    return name.decode("utf-8", "backslashreplace")


def kind(facts: os.stat_result) -> str:
    """What a file is, for messages."""
    return _KINDS.get(stat.S_IFMT(facts.st_mode), "a file")


def expect_file(facts: os.stat_result, where: str) -> None:
    """Raise DataError for what may be read for ever, as a device or a named pipe, and for a folder."""
    if not stat.S_ISREG(facts.st_mode):
        raise DataError(f"{text(os.fsencode(where))}: expected a file, got {kind(facts)}; take it out of the data")


def changed(where: str, size: int, mtime: int, facts: os.stat_result) -> DataError:
    """The error for a file that had this size in bytes and this time in nanoseconds when it was indexed."""
    return DataError(
        f"{where}: expected {_state(size, mtime)} as when it was indexed, got "
        f"{_state(facts.st_size, facts.st_mtime_ns)}; data must not change during a run: restore it with its time, "
        "or start again"
    )


def _state(size: int, mtime: int) -> str:
    return f"{size} bytes written at {np.datetime64(mtime, 'ns')}Z"
