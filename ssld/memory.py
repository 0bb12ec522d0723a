"""Memory that is given back stays with the process, for the next step, or the next image, wants as much."""

from __future__ import annotations

import ctypes

# numbers of parameters in glibc's malloc.h
TRIM_THRESHOLD, MMAP_MAX = -1, -4


def keep() -> None:
    """Let the allocator return nothing to the system, where it is glibc's; elsewhere do nothing.

    Activations and gradients are large blocks, each of which it would take from the system and give back in every step:
    11,000 page faults in one of ResNet18_vd at 32 px, a sixth of its time. So is a photograph: decoded and cropped in a
    process that gives its pixels back, one of 500 × 375 takes a quarter longer. Source: mallopt(3).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(MMAP_MAX, 0)
        mallopt(TRIM_THRESHOLD, -1)
