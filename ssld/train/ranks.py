"""How the ranks of one machine meet: by a word that each says, and by memory that they share.

paddle's gloo sends everything through sockets, which takes several times as long.
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Sequence
from typing import IO

import numpy as np

from ssld.errors import RankError
from ssld.watch import GRACE, watch

WORD = 8
"""Bytes."""
SAME, OTHER = bytes(WORD), b"\xff" * WORD
"""What rank 0 answers."""


class Missed(RankError):
    """Another rank does not take part any more."""


class Meeting:
    """The meeting of rank `number` with all others.

    lines: the ends of its connections: of rank 0 to each other rank, in their order, of any other to rank 0 alone.
    memory: a file that all ranks have open.
    """

    def __init__(self, number: int, lines: Sequence[socket.socket], memory: IO[bytes]) -> None:
        self._number = number
        self._lines = lines
        self._memory = memory

    def agree(self, word: bytes = SAME) -> bool:
        """Wait for all ranks; says whether all have brought the same word. Raises Missed when one is gone."""
        if self._number:
            [leader] = self._lines
            self._say(leader, word)
            return self._hear(leader) == SAME
        # the others wait for rank 0 as long as it takes, for it evaluates and saves alone
        with watch.awaiting(lambda: "the other ranks to take part in the next step", GRACE):
            same = all([self._hear(line) == word for line in self._lines])
        for line in self._lines:
            self._say(line, SAME if same else OTHER)
        return same

    def share(self, rows: int, columns: int) -> np.ndarray:
        """Memory of all ranks, float32 [rows, columns]. They ask for it together, and what they had before is gone.

        Raises RankError where another rank does not ask for as much.
        """
        if not self.agree(int(rows * columns).to_bytes(WORD, "big")):
            raise RankError("expected all ranks to share as much memory, got different wishes; train by --nproc 1")
        if not self._number:
            self._memory.truncate(rows * columns * 4)
        self.agree()
        return np.memmap(self._memory, np.float32, "r+", shape=(rows, columns)).view(np.ndarray)

    def _say(self, line: socket.socket, word: bytes) -> None:
        try:
            line.sendall(word)
        except OSError as error:
            raise self._gone(line) from error

    def _hear(self, line: socket.socket) -> bytes:
        try:
            word = line.recv(WORD, socket.MSG_WAITALL)
        except OSError as error:
            raise self._gone(line) from error
        if len(word) < WORD:
            raise self._gone(line)
        return word

    def _gone(self, line: socket.socket) -> Missed:
        who = 0 if self._number else 1 + self._lines.index(line)
        return Missed(f"expected rank {who} to take part in the next step, it is gone; what was saved stands")


def shared_memory() -> IO[bytes]:
    """A file without a name, for `Meeting`: nothing of it is left when the last rank ends, however that ends."""
    # not in /dev/shm, which is small in a container: what does not fit there ends a process without a word
    return os.fdopen(os.memfd_create("ssld"), "w+b") if hasattr(os, "memfd_create") else tempfile.TemporaryFile()
