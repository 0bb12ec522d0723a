"""How a process ends whose threads are held: with its code, whatever it cannot write to."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from ssld.ending import going_on, memory_named
from ssld.errors import DataError, Interrupted, RankError, SsldError, StorageError

# The journal is one whose log, or whose screen, behaves as the first word says.
SCRIPT = """\
import sys, threading, time
from types import SimpleNamespace
from ssld import ending
from ssld.errors import StallError
from ssld.processes import start

how = sys.argv[1]

def detail(text):
    print(text, flush=True)
    if how == "a log on a disk that stalls":
        time.sleep(100)
    if how == "a log that is gone":
        raise ValueError("I/O operation on closed file")

class Broken:
    @property
    def is_terminal(self):
        raise AttributeError("no screen any more")

console = Broken() if how == "a screen that is gone" else SimpleNamespace(is_terminal=False)
child = start("timeit", ["-n", "1", "-r", "1", "import time; time.sleep(100)"], text=True)
ending.LAST_WORD = 0.3
error = StallError("expected it within 1 s, got nothing")
journal = SimpleNamespace(console=console, detail=detail)
threading.Thread(target=ending.end, args=(error, journal, "continue: so")).start()
time.sleep(100)
"""


@pytest.mark.parametrize(
    "how",
    ["nothing", "nobody reads", "a log on a disk that stalls", "a log that is gone", "a screen that is gone"],
)
def test_a_stalled_process_ends_with_its_code_whatever_it_cannot_write_to(how):
    reader, writer = os.pipe()
    if how == "nobody reads":
        os.set_blocking(writer, False)
        with suppress(BlockingIOError):
            while True:
                os.write(writer, bytes(2**12))
        os.set_blocking(writer, True)
    began = time.monotonic()
    with subprocess.Popen([sys.executable, "-c", SCRIPT, how], stdout=subprocess.PIPE, stderr=writer, text=True) as ran:
        os.close(writer)
        said = ran.stdout.read()
        assert ran.wait() == 69
    assert said == "Error: expected it within 1 s, got nothing\n"
    with open(reader, "rb") as screen:
        # to the end, which comes when the process that it has started is gone too
        shown = screen.read().lstrip(b"\0").decode()
    assert time.monotonic() - began < 60
    if how not in ("nobody reads", "a screen that is gone"):
        assert shown.startswith("Error: expected it within 1 s, got nothing\ncontinue: so\n")


@pytest.mark.parametrize(
    ("error", "there", "noted"),
    [
        (Interrupted("stopped", 143), True, True),
        (RankError("gone"), True, True),
        (StorageError("full"), True, True),
        (StorageError("full"), False, False),
        (DataError("damaged"), True, False),
    ],
)
def test_how_to_go_on_is_said_where_the_same_command_would(error, there, noted):
    with pytest.raises(type(error)), going_on("continue: so", lambda: there):
        raise error
    assert getattr(error, "__notes__", []) == ["continue: so"] * noted


def test_short_memory_is_no_defect():
    wanted = r"got none \(Unable to allocate 1 GiB\); lower batch_size"
    with pytest.raises(SsldError, match=wanted) as caught, memory_named("continue: so"):
        raise MemoryError("Unable to allocate 1 GiB\nfor an array")
    assert caught.value.__notes__ == ["continue: so"]
