"""Bytes to views, here or in processes that do nothing else: `python -m ssld.data.rendering`.

A thread that decodes holds the interpreter often enough to slow a training step beside it down by an eighth, and stands
nearly still while a frozen network runs; a process costs them next to nothing. It knows neither data nor order: it is
sent bytes and sends back pixels, so it has no state to lose.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import time
import traceback
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from select import select
from subprocess import Popen
from typing import BinaryIO

import numpy as np

from ssld import memory
from ssld.data.images import decode
from ssld.data.transforms import Pipeline
from ssld.errors import DataError, ProcessError, SsldError
from ssld.processes import start
from ssld.seeds import derive

FIRST = 1.0
"""Seconds of work before processes are started: a run that has less of it would only wait for them."""

Views = tuple[tuple[int, tuple[np.ndarray, ...]], ...]
"""The number of each view, and its pixels for every pipeline, uint8 [S, S, 3]."""

Answer = list[Views | DataError] | Exception
"""Of a process: the views of each image, or what was raised."""


@dataclass(frozen=True)
class Work:
    """Views that are wanted of one image.

    data: as from `Samples.read`; key, seed: what a draw depends on; numbers: of the views.
    """

    data: bytes | np.ndarray
    key: str
    seed: int
    numbers: tuple[int, ...]


def render(pipelines: Sequence[Pipeline], work: Work) -> Views | DataError:
    """The views, all drawn by the first pipeline; or what is wrong with the image."""
    try:
        image = decode(work.data)
    except DataError as error:
        return error
    views = ((number, pipelines[0].draw(*image.size, derive(work.seed, work.key, number))) for number in work.numbers)
    return tuple((number, tuple(pipeline.render(image, view) for pipeline in pipelines)) for number, view in views)


class Renderer:
    """Renders in this thread, and once that has taken a while, in processes. Any number of threads may call it at once.

    There are as many processes as there were calls at the same time; they end with this one.
    """

    def __init__(self) -> None:
        self._processes: deque[_Process] = deque()
        self._spent = 0.0

    def __call__(self, pipelines: Sequence[Pipeline], works: Sequence[Work]) -> list[Views | DataError]:
        """What `render` makes of each. Raises ProcessError when a process ends before it has answered."""
        process = self._ready()
        if process is not None:
            answer = process.render(pipelines, works)
            self._processes.append(process)
            if isinstance(answer, Exception):
                raise answer
            return answer
        began = time.thread_time()
        answer = [render(pipelines, work) for work in works]
        self._spent += time.thread_time() - began
        return answer

    def _ready(self) -> _Process | None:
        """A process that is free and has come up, taken out; one more is started where none is free."""
        if self._spent < FIRST:
            return None
        try:
            process = self._processes.popleft()
        except IndexError:
            try:
                process = _Process()
            except OSError:
                # no more processes, memory or files are to be had; rendered here it only takes longer
                return None
        if process.is_up():
            return process
        self._processes.append(process)
        return None


class _Process:
    """One process that renders. It ends with this object, and at the latest with this process."""

    def __init__(self) -> None:
        # the matrix products of numpy are not used there, and each of their threads takes memory
        self._process = start("ssld.data.rendering", text=False, env={"OPENBLAS_NUM_THREADS": "1"})
        self._up = False
        weakref.finalize(self, _end, self._process)

    def is_up(self) -> bool:
        """Whether it has said that it is there, or has ended, which `render` will tell."""
        if not self._up:
            assert self._process.stdout is not None, "made with a pipe"
            self._up = bool(select([self._process.stdout], [], [], 0)[0])
            if self._up:
                self._process.stdout.read(len(UP))
        return self._up

    def render(self, pipelines: Sequence[Pipeline], works: Sequence[Work]) -> Answer:
        assert self._process.stdin is not None, "made with a pipe"
        assert self._process.stdout is not None, "made with a pipe"
        message = pickle.dumps((pipelines, works), pickle.HIGHEST_PROTOCOL)
        try:
            self._process.stdin.write(message)
            self._process.stdin.flush()
            answer: Answer = pickle.load(self._process.stdout)  # noqa: S301, it is this very module that writes it
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            raise self._ended(works) from error
        return answer

    def _ended(self, works: Sequence[Work]) -> ProcessError:
        code = self._process.wait()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        hint = "; where memory was short, lower batch_size or the size of the images" if code == -signal.SIGKILL else ""
        keys = ", ".join(work.key for work in works)
        return ProcessError(
            f"expected the process that decodes (pid {self._process.pid}) to go on, it ended with {how} at one of "
            f"{keys}; what was saved stands{hint}"
        )


def _end(process: Popen[bytes]) -> None:
    process.kill()
    # what was not sent is for nobody
    with suppress(BrokenPipeError):
        process.communicate()


UP = b"+"
"""The first that a process says."""


def serve(wanted: BinaryIO, out: BinaryIO) -> None:
    """Answer until there is nothing more, or nobody to answer to."""
    out.write(UP)
    while True:
        out.flush()
        try:
            pipelines, works = pickle.load(wanted)  # noqa: S301, it is this very module that writes it
        except (EOFError, pickle.UnpicklingError):
            return
        answer: Answer
        try:
            answer = [render(pipelines, work) for work in works]
        except SsldError as error:
            answer = error
        except Exception as error:
            # a traceback does not travel by itself
            error.add_note("".join(traceback.format_exception(error)))
            answer = error
        pickle.dump(answer, out, pickle.HIGHEST_PROTOCOL)


def main() -> None:
    """Whatever else is printed goes where it does no harm."""
    memory.keep(large=False)
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    # nobody is left to answer to
    with suppress(BrokenPipeError), out:
        serve(sys.stdin.buffer, out)


if __name__ == "__main__":
    main()
