"""The other ranks of a run: processes that compute their share of every step, and end with this one.

Rank 0 is the process that the user started. It tells the others what to do by lines of JSON on their standard input,
and is told by lines on their standard output. The end of the input means that rank 0 is gone, however it went.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, Queue
from typing import IO, Any

from ssld import errors
from ssld.contracts import Ranks
from ssld.errors import Interrupted, RankError, SsldError
from ssld.processes import start
from ssld.train.ranks import Meeting, Missed, shared_memory
from ssld.watch import GRACE, watch

PARTING = 10.0
"""Seconds that a rank is given to end by itself, or to say why it has ended."""
GOING_ON = "going on"
"""What a rank says that is at work."""
GLANCE = 0.2
"""Seconds between two looks at whether a signal has come."""


@dataclass(frozen=True, eq=False)
class Follower:
    """One other rank, and what it has said."""

    number: int
    process: subprocess.Popen[str]
    said: Queue[dict[str, Any]] = field(default_factory=Queue)
    goes_on: threading.Event = field(default_factory=threading.Event)
    """Set by each word that it is at work."""

    def listen(self, note: Callable[[str], None]) -> None:
        """Take in what it says until it ends; what is meant for people goes on at once."""
        assert self.process.stdout is not None, "made with a pipe"
        try:
            with self.process.stdout as lines:
                for line in lines:
                    message = _message(line)
                    if "note" in message:
                        note(f"{message['note']} (rank {self.number})")
                    elif message.get("word") == GOING_ON:
                        self.goes_on.set()
                    else:
                        self.said.put(message)
        finally:
            self.said.put({"ended": self.process.wait()})

    def tell(self, **message: Any) -> None:
        """Give it something to do; one that has ended is met where it is missed."""
        assert self.process.stdin is not None, "made with a pipe"
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()

    def hear(self, seconds: float) -> str:
        """The next word that it says. Raises what it met instead, and Empty after so many seconds."""
        message = self.said.get(timeout=seconds)
        if "error" in message:
            kind = getattr(errors, message["error"], SsldError)
            raise kind(f"rank {self.number}: {message['message']}")
        if "ended" in message:
            code = message["ended"]
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            hint = "; where memory was short, lower --nproc or batch_size" if code == -signal.SIGKILL else ""
            raise RankError(
                f"expected rank {self.number} (pid {self.process.pid}) to go on, it ended with {how}; what was saved "
                f"stands{hint}"
            )
        return str(message["word"])


def _message(line: str) -> dict[str, Any]:
    """What a rank says; what something else printed, before the rank could see to it, is a note."""
    try:
        message = json.loads(line)
    except ValueError:
        message = None
    if isinstance(message, dict) and message.keys() & {"note", "error", "word"}:
        return message
    return {"note": line.rstrip()}


class Crew:
    """Starts the other ranks of a run and ends them: `with Crew(directory, count, note, stop) as crew:`.

    directory: the run, whose recipe and options are recorded; count: of all ranks; note: is told what the others note;
    stop(): the signal that asks to end, or None. With one rank there is nobody else, and everything here does nothing.
    """

    def __init__(
        self, directory: Path, count: int, note: Callable[[str], None], stop: Callable[[], int | None] = lambda: None
    ) -> None:
        self.directory, self.count, self.note, self.stop = directory, count, note, stop
        self.followers: list[Follower] = []
        self.listeners: list[threading.Thread] = []
        self.sockets: list[socket.socket] = []
        self.memory: IO[bytes] | None = None
        self.ranks = Ranks()

    def __enter__(self) -> Crew:
        if self.count == 1:
            return self
        self.memory = shared_memory()
        try:
            for number in range(1, self.count):
                self._start(number, self.memory)
        except BaseException:
            self._dismiss(at_once=True)
            raise
        self.ranks = Ranks(0, self.count, Meeting(0, self.sockets, self.memory))
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if isinstance(error, Missed):
                self._blame(error)
        finally:
            self._dismiss(at_once=error is not None)

    def tell(self, **message: Any) -> None:
        """Let the others do something: `train=` a stage as it stands, `attempt=` one on trial, `label=` for one."""
        for follower in self.followers:
            follower.tell(**message)

    def expect(self, word: str, patience: float | None = None) -> None:
        """Wait until each has said the word.

        Raises what one met instead, Interrupted when a signal came, RankError after `patience` seconds.
        """
        until = None if patience is None else time.monotonic() + patience
        for follower in self.followers:
            while not self._said(follower, word, until):
                continue

    def _said(self, follower: Follower, word: str, until: float | None) -> bool:
        """Whether it has said the word; False where it has only told that it is at work."""
        follower.goes_on.clear()
        with watch.awaiting(lambda: f"rank {follower.number} to go on", GRACE):
            while not follower.goes_on.is_set():
                try:
                    if follower.hear(GLANCE) == word:
                        return True
                except Empty:
                    pass
                if number := self.stop():
                    raise Interrupted(f"stopped by {signal.Signals(number).name}", 128 + number)
                if until is not None and time.monotonic() > until:
                    raise RankError(f"expected rank {follower.number} to end, it goes on; train by --nproc 1")
        return False

    def _start(self, number: int, memory: IO[bytes]) -> None:
        own, other = socket.socketpair()
        self.sockets.append(own)
        with other:
            given = (other.fileno(), memory.fileno())
            words = [str(self.directory), *map(str, (number, self.count, *given))]
            process = start("ssld.follower", words, text=True, pass_fds=given)
        follower = Follower(number, process)
        listener = threading.Thread(target=follower.listen, args=(self.note,), daemon=True)
        listener.start()
        self.followers.append(follower)
        self.listeners.append(listener)

    def _blame(self, error: Missed) -> None:
        """Raise what the rank that is gone has met: a sum only tells that one is."""
        until, left = time.monotonic() + PARTING, list(self.followers)
        late = False
        # a last look when the time is up: the machine may have stood still meanwhile
        while left and not late:
            late = time.monotonic() > until
            for follower in list(left):
                try:
                    follower.hear(GLANCE / 10)
                except Empty:
                    continue
                except SsldError as fault:
                    # one that has missed another rank itself has nothing to tell
                    if not isinstance(fault, RankError) or follower.process.poll() != RankError.exit_code:
                        raise fault from error
                    left.remove(follower)

    def _dismiss(self, *, at_once: bool) -> None:
        for follower in self.followers:
            assert follower.process.stdin is not None, "made with a pipe"
            with suppress(BrokenPipeError):
                follower.process.stdin.close()
        for follower in self.followers:
            if at_once:
                follower.process.kill()
            try:
                follower.process.wait(PARTING)
            except subprocess.TimeoutExpired:
                follower.process.kill()
        for listener in self.listeners:
            # what a rank has started may hold its end of the line for as long as it likes
            listener.join(PARTING)
        for opened in (*self.sockets, self.memory):
            if opened is not None:
                opened.close()
