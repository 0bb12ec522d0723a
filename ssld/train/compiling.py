"""Machine code from Python functions, by numba, an extra: without it they stand as they are, and are never called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from ssld.environment import numba_version

Function = TypeVar("Function", bound=Callable[..., Any])

COMPILED = bool(numba_version())
_made: list[Any] = []


def compiled(function: Function) -> Function:
    """The function as machine code; without numba as it is."""
    if not COMPILED:
        return function
    from numba import njit

    def jit(cache: bool) -> Function:
        # sums may be reordered, else nothing would be vectorized; NaN and infinity keep their meaning
        fast = njit(cache=cache, nogil=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz"})(function)
        _made.append(fast)
        return cast(Function, fast)

    try:
        return jit(cache=True)
    except RuntimeError:
        # neither the package's folder nor the user's cache can be written
        return jit(cache=False)


def compilations() -> int:
    """How often this process compiled a function that it did not find in the cache."""
    return sum(sum(fast.stats.cache_misses.values()) for fast in _made)
