"""Other processes of ours: started afresh, never forked, because a fork of a process with threads may hang."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from ssld.signals import held

_started: weakref.WeakSet[subprocess.Popen[Any]] = weakref.WeakSet()


def start(
    module: str, words: Sequence[str] = (), *, text: bool, pass_fds: Sequence[int] = (), env: Mapping[str, str] = {}
) -> subprocess.Popen[Any]:
    """Run a module as `python -m`, with pipes to its standard input and from its standard output.

    Its input ends when this process does, however it goes, and then the module has to end. It never hears what
    asks to end: a signal to the whole group is for this process to act upon.
    """
    with held():
        process = subprocess.Popen(
            # -P: what lies in the current directory is not to be imported
            [sys.executable, "-P", "-m", module, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=text,
            pass_fds=pass_fds,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), **env},
        )
    _started.add(process)
    return process


def kill() -> None:
    """End all that were started here and still run, before this process ends without a word to them.

    They would end by themselves, but for one that stands still.
    """
    for process in tuple(_started):
        process.kill()
