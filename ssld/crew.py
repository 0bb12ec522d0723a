"""The other ranks of a run: processes that compute their share of every step, write nothing, and end with this one.

Rank 0 is the process that the user started. It tells the others what to do by lines of JSON on their standard input,
and is told by lines on their standard output. The end of the input means that rank 0 is gone, however it went.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, Queue
from typing import Any

from ssld import errors
from ssld.contracts import Ranks
from ssld.environment import RANKS
from ssld.errors import RankError, SsldError
from ssld.train.ranks import Meeting, shared_memory

PARTING = 10.0
"""Seconds that a rank is given to end by itself, or to say why it has ended."""


@dataclass(frozen=True, eq=False)
class Member:
    """One other rank, and what it has said."""

    number: int
    process: subprocess.Popen[str]
    said: Queue[dict[str, Any]] = field(default_factory=Queue)

    def listen(self, note: Callable[[str], None]) -> None:
        """Take in what it says until it ends; what is meant for people goes on at once."""
        assert self.process.stdout is not None, "made with a pipe"
        with self.process.stdout as lines:
            for message in map(json.loads, lines):
                if "note" in message:
                    note(f"{message['note']} (rank {self.number})")
                else:
                    self.said.put(message)
        self.said.put({"ended": self.process.wait()})

    def tell(self, **message: Any) -> None:
        """Give it something to do; one that has ended is met where it is missed."""
        assert self.process.stdin is not None, "made with a pipe"
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()

    def expect(self, word: str, seconds: float | None = None) -> None:
        """Wait until it says the word; raises what it met instead, or Empty after so many seconds."""
        while True:
            message = self.said.get(timeout=seconds)
            if word in message:
                return
            if "error" in message:
                kind = getattr(errors, message["error"], SsldError)
                raise kind(f"rank {self.number}: {message['message']}")
            if "ended" in message:
                code = message["ended"]
                how = f"signal {-code}" if code < 0 else f"exit code {code}"
                raise RankError(
                    f"expected rank {self.number} (pid {self.process.pid}) to go on, it ended with {how}; what was "
                    f"saved stands"
                )

    def fault(self, seconds: float) -> SsldError | None:
        """What it met, where it says so within these seconds."""
        try:
            self.expect("no word that it says", seconds)
        except SsldError as error:
            return error
        except Empty:
            pass
        return None


class Crew:
    """Starts the other ranks of a run and ends them: `with Crew(directory, count, note) as crew:`.

    directory: the run, whose recipe and options are recorded; count: of all ranks; note: is told what the others note.
    With one rank there is nobody else, and everything here does nothing.
    """

    def __init__(self, directory: Path, count: int, note: Callable[[str], None]) -> None:
        self.directory, self.count, self.note = directory, count, note
        self.members: list[Member] = []
        self.listeners: list[threading.Thread] = []
        self.lines: list[socket.socket] = []
        self.ranks = Ranks()
        self.before = os.environ.get(RANKS)

    def __enter__(self) -> Crew:
        if self.count == 1:
            return self
        os.environ[RANKS] = str(self.count)
        self.memory = shared_memory()
        try:
            for number in range(1, self.count):
                self._start(number)
        except BaseException:
            self._dismiss(at_once=True)
            raise
        self.ranks = Ranks(0, self.count, Meeting(0, self.lines, self.memory))
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if isinstance(error, RankError):
                self._blame(error)
        finally:
            self._dismiss(at_once=error is not None)

    def train(self, stage: str) -> None:
        """Let the others train a stage from where it stands; the sums in its steps keep all together."""
        for member in self.members:
            member.tell(train=stage)

    def attempt(self, stage: str, batch: int) -> None:
        """Let the others train a stage on trial, with such batches, until rank 0 stops."""
        for member in self.members:
            member.tell(attempt=stage, batch=batch)

    def label(self, stage: str, own: Callable[[int, int], object]) -> None:
        """Make a stage's soft labels together; own(number from 1, of how many) makes rank 0's part."""
        for member in self.members:
            member.tell(label=stage)
        own(1, self.count)
        for member in self.members:
            member.expect("labelled")

    def _start(self, number: int) -> None:
        own, other = socket.socketpair()
        with other:
            given = (other.fileno(), self.memory.fileno())
            words = [str(self.directory), *map(str, (number, self.count, *given))]
            process = subprocess.Popen(
                [sys.executable, "-m", "ssld.follower", *words],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                pass_fds=given,
            )
        member = Member(number, process)
        listener = threading.Thread(target=member.listen, args=(self.note,), daemon=True)
        listener.start()
        self.members.append(member)
        self.lines.append(own)
        self.listeners.append(listener)

    def _blame(self, error: RankError) -> None:
        """Raise what the rank that is gone has met: a sum only tells that one is."""
        faults = [(member, fault) for member in self.members if (fault := member.fault(PARTING / len(self.members)))]
        # a rank that ended because it missed another one comes last
        faults.sort(key=lambda found: found[0].process.poll() == RankError.exit_code)
        if faults:
            raise faults[0][1] from error

    def _dismiss(self, *, at_once: bool) -> None:
        for member in self.members:
            assert member.process.stdin is not None, "made with a pipe"
            with suppress(BrokenPipeError):
                member.process.stdin.close()
        for member in self.members:
            if at_once:
                member.process.kill()
            try:
                member.process.wait(PARTING)
            except subprocess.TimeoutExpired:
                member.process.kill()
        for listener in self.listeners:
            listener.join()
        for line in self.lines:
            line.close()
        if self.count > 1:
            os.environ.pop(RANKS, None)
            if self.before is not None:
                os.environ[RANKS] = self.before
