"""One process at a time in a run directory."""

from __future__ import annotations

import fcntl
import os
import socket
from datetime import datetime
from pathlib import Path

from ssld.errors import BusyError
from ssld.files import reported

# a process that opens the file of a lock it holds, and closes it again, drops the lock
_held: set[Path] = set()


class RunLock:
    """Holds a run directory for this process: `with RunLock(run):`. Raises BusyError naming the process that has it.

    The kernel drops the lock with the process, however that ends; the file `lock` stays. A lock of this kind (lockf,
    not flock) is not kept alive by forked children, but it is lost when this process closes any descriptor of the
    file: nothing else may open it.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self.path = run.resolve() / "run.lock"

    def __enter__(self) -> RunLock:
        # the kernel grants a process what it holds already, and closing the second descriptor would drop the first
        if self.path in _held:
            raise self._busy(f"pid {os.getpid()}, which is this process")
        with reported(self.path, 0):
            self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                self._acquire()
            except (OSError, BusyError):
                os.close(self.descriptor)
                raise
        _held.add(self.path)
        return self

    def __exit__(self, *exception: object) -> None:
        _held.discard(self.path)
        os.close(self.descriptor)

    def _acquire(self) -> None:
        try:
            fcntl.lockf(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            holder = os.pread(self.descriptor, 4096, 0).decode(errors="replace").strip()
            raise self._busy(holder or "another process") from error
        since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        line = f"pid {os.getpid()} on host {socket.gethostname()} since {since}\n".encode()
        os.pwrite(self.descriptor, line, 0)
        os.ftruncate(self.descriptor, len(line))

    def _busy(self, holder: str) -> BusyError:
        return BusyError(f"{self.run} is in use by {holder}; wait for it or choose another --out")


def holder(run: Path) -> str | None:
    """Who holds the lock of a run directory ("pid N on host H since T"), or None."""
    path = run.resolve() / "run.lock"
    # to open and close the file of a lock that this process holds would drop the lock
    if path in _held:
        return f"pid {os.getpid()}, which is this process"
    try:
        with path.open("rb") as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return None
    except (BlockingIOError, PermissionError):
        return path.read_text(errors="replace").strip()
    return None
