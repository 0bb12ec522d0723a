"""How many cores there are, and who may use how many of them: said in this one place.

A step of training computes in `of_step` threads, one unless the user asks for more: with another number its sums are
taken in another order, and the other cores belong to decoding and to other ranks. A frozen network answers between
steps, with the same bits for any number of threads, so it takes all cores that are free: a rank's share, or all of them
where the other ranks wait for the answer.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from threadpoolctl import threadpool_limits

from ssld.environment import RANKS

QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""In a container: the microseconds that it may compute in a period, or "max", and those of the period."""


def cores() -> int:
    """Cores that this process may use: those it is bound to, and no more than the quota of its container."""
    # macOS binds no process to cores
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = QUOTA.read_text().split()
    except OSError:
        return bound
    return bound if quota == "max" else min(bound, max(1, math.ceil(int(quota) / int(period))))


@contextmanager
def shared_by(ranks: int) -> Iterator[None]:
    """So many processes compute at once in here, this one and those that it starts."""
    before = os.environ.get(RANKS)
    os.environ[RANKS] = str(ranks)
    try:
        yield
    finally:
        del os.environ[RANKS]
        if before is not None:
            os.environ[RANKS] = before


def share() -> int:
    """Cores of this rank, where all ranks of the run compute at once."""
    return max(1, cores() // int(os.environ.get(RANKS, "1")))


def decoders(free: int) -> int:
    """Processes that decode and render on so many cores, none where no core is free; each takes 50 to 200 MB."""
    return min(16, free)


def of_step() -> int:
    """Threads of paddle in a training step; when imported it sets OMP_NUM_THREADS to 1 unless the user has set it."""
    return int(os.environ.get("MKL_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS") or 1)


def one() -> None:
    """Give the matrix products of numpy, which a training step is made of, one thread."""
    threadpool_limits(limits=1, user_api="blas")
