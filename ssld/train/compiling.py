"""What our kernels stand on: machine code from Python functions, by numba, an extra, and the memory of tensors.

Without numba functions stand as they are, and are never called.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

import numpy as np
import paddle
from paddle import _C_ops, nn

from ssld.environment import numba_version

Function = TypeVar("Function", bound=Callable[..., Any])

COMPILED = bool(numba_version())
FLOAT, CPU = paddle.float32, paddle.CPUPlace()
NOTED = 2.0
"""Seconds of compiling that are worth a line."""
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


def wanted() -> bool:
    """Whether layers that train on a CPU are to use our kernels; SSLD_FAST_CONV=0 asks for paddle's."""
    return COMPILED and bool(numba_version())


def known(*tensors: paddle.Tensor) -> bool:
    """Whether kernels know these numbers: float32 on a CPU, outside of an export, which traces layers."""
    return (
        paddle.in_dynamic_mode()
        and paddle.device.get_device() == "cpu"
        and all(tensor.dtype == FLOAT for tensor in tensors)
    )


def learns(x: paddle.Tensor, weight: paddle.Tensor, bias: paddle.Tensor | None) -> bool:
    """Whether a gradient will be asked for of any of them, and kernels know their numbers."""
    frozen = x.stop_gradient and weight.stop_gradient and (bias is None or bias.stop_gradient)
    return not frozen and paddle.is_grad_enabled() and known(x, weight)


class Fast:
    """A layer that trains by our kernels."""

    def trial(self) -> Callable[[], None] | None:
        """What calls its kernels once, the same function for the same kernels; None where paddle computes."""
        raise NotImplementedError


def prepare(network: nn.Layer, note: Callable[[str], None]) -> None:
    """Compile what the network trains with; say so where it took long, which it does once on each kind of processor."""
    began, before = time.monotonic(), compilations()
    layers = [layer for layer in network.sublayers(include_self=True) if isinstance(layer, Fast)]
    for trial in filter(None, dict.fromkeys(layer.trial() for layer in layers)):
        trial()
    seconds = time.monotonic() - began
    # a busy machine may take as long to load what it finds in the cache
    if compilations() > before and seconds > NOTED:
        note(f"kernels compiled for this processor in {seconds:.0f} s; later runs find them in the cache")


# Memory of tensors on the CPU ----------------------------------------------------------------------------------------
#
# A small step asks for hundreds of tensors and their memory. paddle's checks cost several times what they guard, and
# the layers have made them already.


class _Memory:
    """What numpy asks a tensor for, without the checks."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: paddle.Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self, **wishes: object) -> Any:
        return self.tensor.get_tensor()._to_dlpack_versioned()

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


def view(tensor: paddle.Tensor) -> np.ndarray:
    """The memory of a tensor on the CPU; a copy where it is not laid out row by row."""
    return np.ascontiguousarray(np.from_dlpack(_Memory(tensor)))


def empty(shape: Iterable[int]) -> paddle.Tensor:
    """A new tensor on the CPU whose numbers are still to be written."""
    return _C_ops.empty(list(shape), FLOAT, CPU)
