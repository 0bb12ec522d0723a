"""A depthwise convolution that trains fast on a CPU, where paddle's own takes most of a small network's step.

A row of the output is a sum of shifted rows of the input, and each row is taken as one long vector. Two things keep it
long and without gaps: the rows of several small images are interleaved, and for stride 2 even and odd columns are
separated. So a channel is packed, computed, and unpacked.

The kernels are compiled by numba, an extra, and work on paddle's memory without a copy. Each channel is computed alone
and in a fixed order, so the bits depend neither on threads nor on the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import numpy as np
import paddle
from paddle import nn
from paddle.autograd import PyLayer

from ssld.environment import numba_version

Function = TypeVar("Function", bound=Callable[..., Any])

LANES = 128
"""Numbers that a row may have at most where images are interleaved: fewer leave vectors short, more leave the cache."""
NOTED = 2.0
"""Seconds of compiling that are worth a line."""
COMPILED = bool(numba_version())


def compiled(function: Function) -> Function:
    """The function as machine code; without numba as it is, and never called."""
    if not COMPILED:
        return function
    from numba import njit

    def jit(cache: bool) -> Function:
        # sums may be reordered, else nothing would be vectorized; NaN and infinity keep their meaning
        fast = njit(cache=cache, nogil=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz"})(function)
        return cast(Function, fast)

    try:
        return jit(cache=True)
    except RuntimeError:
        # neither the package's folder nor the user's cache can be written
        return jit(cache=False)


# The kernels ---------------------------------------------------------------------------------------------------------
#
# images, gradient: [B, C, H, W]; weight: [C, 1, side, side], side 3 or 5; stride 1 or 2, in both directions.
#
# A packed channel of `count` images is [H, stride * pitch * count]: the pixel in column x of image i stands at
# ((x + left) % stride * pitch + (x + left) // stride) * count + i, so that even and odd columns lie apart at stride 2.
#
# Inner loops index whole arrays, since a slice costs as much as the row that it is cut for, and by unsigned numbers,
# since numba would look for negative ones and the loop would not be vectorized.

ONE, TWO = np.uint64(1), np.uint64(2)


@compiled
def places(width: int, stride: int, left: int, pitch: int) -> tuple[np.uint64, np.uint64, np.uint64, np.uint64]:
    """Where even and odd columns begin in a packed row, and how many of each it has; at stride 1 all are even."""
    even, odd = left % stride * pitch + left // stride, (left + 1) % stride * pitch + (left + 1) // stride
    evens = max(min((width + stride - 1) // stride, pitch - left // stride), 0)
    odds = max(min(width // 2, pitch - (left + 1) // 2), 0) if stride == 2 else 0
    return np.uint64(even), np.uint64(odd), np.uint64(evens), np.uint64(odds)


@compiled
def pack(images: np.ndarray, channel: int, stride: int, left: int, pitch: int, rows: np.ndarray) -> None:
    """Pack a channel; what lies beside the image, and is zero in rows, stays zero."""
    even, odd, evens, odds = places(images.shape[3], stride, left, pitch)
    count, step, pairs = np.uint64(images.shape[0]), np.uint64(stride), min(evens, odds)
    for y in range(images.shape[2]):
        if count == 1 and stride == 2:
            # both in one loop: every second number by itself is not vectorized
            for x in range(pairs):
                rows[y, even + x] = images[0, channel, y, x * TWO]
                rows[y, odd + x] = images[0, channel, y, x * TWO + ONE]
            for x in range(pairs, evens):
                rows[y, even + x] = images[0, channel, y, x * TWO]
            for x in range(pairs, odds):
                rows[y, odd + x] = images[0, channel, y, x * TWO + ONE]
        elif count == 1:
            for x in range(evens):
                rows[y, even + x] = images[0, channel, y, x]
        else:
            for i in range(count):
                for x in range(evens):
                    rows[y, (even + x) * count + i] = images[i, channel, y, x * step]
                for x in range(odds):
                    rows[y, (odd + x) * count + i] = images[i, channel, y, x * step + ONE]


@compiled
def unpack(rows: np.ndarray, channel: int, stride: int, left: int, pitch: int, images: np.ndarray) -> None:
    """Write a packed channel to the images; columns that the rows do not reach become 0."""
    even, odd, evens, odds = places(images.shape[3], stride, left, pitch)
    count, step, pairs = np.uint64(images.shape[0]), np.uint64(stride), min(evens, odds)
    for y in range(images.shape[2]):
        for i in range(count):
            for x in range(pairs * TWO if stride == 2 else evens, np.uint64(images.shape[3])):
                images[i, channel, y, x] = 0
        if count == 1 and stride == 2:
            for x in range(pairs):
                images[0, channel, y, x * TWO] = rows[y, even + x]
                images[0, channel, y, x * TWO + ONE] = rows[y, odd + x]
            for x in range(pairs, evens):
                images[0, channel, y, x * TWO] = rows[y, even + x]
            for x in range(pairs, odds):
                images[0, channel, y, x * TWO + ONE] = rows[y, odd + x]
        elif count == 1:
            for x in range(evens):
                images[0, channel, y, x] = rows[y, even + x]
        else:
            for i in range(count):
                for x in range(evens):
                    images[i, channel, y, x * step] = rows[y, (even + x) * count + i]
                for x in range(odds):
                    images[i, channel, y, x * step + ONE] = rows[y, (odd + x) * count + i]


@compiled
def shifts(side: int, stride: int, pitch: int, count: int) -> np.ndarray:
    """Where in a packed row the pixels begin that each column of a kernel meets."""
    starts = np.empty(side, np.uint64)
    for k in range(side):
        starts[k] = (k % stride * pitch + k // stride) * count
    return starts


@compiled
def add_products(
    kernel: np.ndarray, tap: int, rows: np.ndarray, at: int, starts: np.ndarray, lines: np.ndarray, y: int
) -> None:
    """lines[y, x] += sum over k of kernel[tap, k] * rows[at, starts[k] + x]."""
    size, a, b, c = np.uint64(lines.shape[1]), starts[0], starts[1], starts[2]
    p, q, r = kernel[tap, 0], kernel[tap, 1], kernel[tap, 2]
    if starts.size == 3:
        for x in range(size):
            lines[y, x] += p * rows[at, a + x] + q * rows[at, b + x] + r * rows[at, c + x]
    else:
        d, e, s, t = starts[3], starts[4], kernel[tap, 3], kernel[tap, 4]
        for x in range(size):
            three = p * rows[at, a + x] + q * rows[at, b + x] + r * rows[at, c + x]
            lines[y, x] += three + s * rows[at, d + x] + t * rows[at, e + x]


@compiled
def add_dots(
    lines: np.ndarray, y: int, rows: np.ndarray, at: int, starts: np.ndarray, sums: np.ndarray, tap: int
) -> None:
    """sums[tap, k] += sum over x of lines[y, x] * rows[at, starts[k] + x]."""
    size, a, b, c = np.uint64(lines.shape[1]), starts[0], starts[1], starts[2]
    p = q = r = s = t = np.float32(0)
    if starts.size == 3:
        for x in range(size):
            p += lines[y, x] * rows[at, a + x]
            q += lines[y, x] * rows[at, b + x]
            r += lines[y, x] * rows[at, c + x]
    else:
        d, e = starts[3], starts[4]
        for x in range(size):
            p += lines[y, x] * rows[at, a + x]
            q += lines[y, x] * rows[at, b + x]
            r += lines[y, x] * rows[at, c + x]
            s += lines[y, x] * rows[at, d + x]
            t += lines[y, x] * rows[at, e + x]
        sums[tap, 3] += s
        sums[tap, 4] += t
    sums[tap, 0] += p
    sums[tap, 1] += q
    sums[tap, 2] += r


@compiled
def scatter(
    kernel: np.ndarray, tap: int, lines: np.ndarray, y: int, starts: np.ndarray, rows: np.ndarray, at: int
) -> None:
    """rows[at, starts[k] + x] += kernel[tap, k] * lines[y, x] for all k."""
    for k in range(starts.size):
        value, start = kernel[tap, k], starts[k]
        for x in range(np.uint64(lines.shape[1])):
            rows[at, start + x] += value * lines[y, x]


@compiled
def images_per_row(images: int, width: int) -> int:
    """How many images are interleaved."""
    return max(1, min(images, LANES // width))


@compiled
def convolve(
    images: np.ndarray, weight: np.ndarray, bias: np.ndarray, stride: int, top: int, left: int, out: np.ndarray
) -> None:
    """Write the convolution of images to out [B, C, out height, out width]. bias: [C]."""
    total, channels, height, _ = images.shape
    side, out_height, out_width = weight.shape[2], out.shape[2], out.shape[3]
    pitch, most = out_width + (side - 1) // stride, images_per_row(total, out_width)
    for begin in range(0, total, most):
        block, into = images[begin : begin + most], out[begin : begin + most]
        count = block.shape[0]
        starts = shifts(side, stride, pitch, count)
        rows = np.zeros((height, stride * pitch * count), np.float32)
        lines = np.empty((out_height, out_width * count), np.float32)
        for channel in range(channels):
            kernel = weight[channel, 0]
            pack(block, channel, stride, left, pitch, rows)
            lines[:] = bias[channel]
            for y in range(out_height):
                for tap in range(max(0, top - y * stride), min(side, height + top - y * stride)):
                    add_products(kernel, tap, rows, y * stride + tap - top, starts, lines, y)
            unpack(lines, channel, 1, 0, out_width, into)


@compiled
def differentiate(
    images: np.ndarray,
    weight: np.ndarray,
    gradient: np.ndarray,
    stride: int,
    top: int,
    left: int,
    to_images: np.ndarray,
    to_weight: np.ndarray,
    want_images: bool,
    want_weight: bool,
) -> None:
    """Carry the gradient of the convolution on, to images and to weight where wanted."""
    total, channels, height, _ = images.shape
    side, out_height, out_width = weight.shape[2], gradient.shape[2], gradient.shape[3]
    pitch, most = out_width + (side - 1) // stride, images_per_row(total, out_width)
    sums = np.zeros((channels, side, side), np.float64)
    for begin in range(0, total, most):
        end = begin + most
        block, arriving, into = images[begin:end], gradient[begin:end], to_images[begin:end]
        count = block.shape[0]
        starts = shifts(side, stride, pitch, count)
        rows = np.zeros((height, stride * pitch * count), np.float32)
        carried = np.empty_like(rows)
        lines = np.empty((out_height, out_width * count), np.float32)
        for channel in range(channels):
            kernel, dots = weight[channel, 0], sums[channel]
            pack(arriving, channel, 1, 0, out_width, lines)
            if want_weight:
                pack(block, channel, stride, left, pitch, rows)
            carried[:] = 0
            for y in range(out_height):
                for tap in range(max(0, top - y * stride), min(side, height + top - y * stride)):
                    at = y * stride + tap - top
                    if want_weight:
                        add_dots(lines, y, rows, at, starts, dots, tap)
                    if want_images:
                        scatter(kernel, tap, lines, y, starts, carried, at)
            if want_images:
                unpack(carried, channel, stride, left, pitch, into)
    if want_weight:
        to_weight[:, 0] = sums


# The layer -----------------------------------------------------------------------------------------------------------


def view(tensor: paddle.Tensor) -> np.ndarray:
    """The memory of a tensor on the CPU; a copy where it is not laid out row by row."""
    return np.ascontiguousarray(np.from_dlpack(tensor.detach()))


class Convolution(PyLayer):
    """convolve and differentiate as one operation of paddle's autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        x: paddle.Tensor,
        weight: paddle.Tensor,
        bias: paddle.Tensor | None,
        stride: int,
        padding: tuple[int, int, int, int],
    ) -> paddle.Tensor:
        """padding: above, below, left and right."""
        ctx.save_for_backward(x, weight)
        ctx.place = stride, padding[0], padding[2]
        ctx.wanted = [not tensor.stop_gradient for tensor in (x, weight, bias) if tensor is not None]
        out = paddle.empty([*x.shape[:2], *out_size(x.shape, weight.shape, stride, padding)], "float32")
        shift = np.zeros(x.shape[1], np.float32) if bias is None else view(bias)
        convolve(view(x), view(weight), shift, stride, padding[0], padding[2], view(out))
        return out

    @staticmethod
    def backward(ctx: Any, *args: Any) -> Any:
        """Gradients of images, weight and bias; None for those that want none."""
        (x, weight), gradient = ctx.saved_tensor(), view(args[0])
        stride, top, left = ctx.place
        want_x, want_weight, *want_bias = ctx.wanted
        to_x, to_weight = paddle.empty(x.shape, "float32"), paddle.empty(weight.shape, "float32")
        differentiate(
            view(x), view(weight), gradient, stride, top, left, view(to_x), view(to_weight), want_x, want_weight
        )
        found = [to_x if want_x else None, to_weight if want_weight else None]
        if want_bias:
            sums = gradient.sum((0, 2, 3), np.float64).astype(np.float32)
            found.append(paddle.to_tensor(sums) if want_bias[0] else None)
        return tuple(found)


def out_size(x: Sequence[int], weight: Sequence[int], stride: int, padding: Sequence[int]) -> tuple[int, int]:
    """Height and width of the output, below 1 where the kernel is larger than the padded image."""
    top, bottom, left, right = padding
    return (x[2] + top + bottom - weight[2]) // stride + 1, (x[3] + left + right - weight[3]) // stride + 1


class DepthwiseConv2D(nn.Conv2D):
    """paddle's Conv2D for one group per channel: the same parameters, by the same names, with the same first values.

    In training on a CPU it computes kernels of 3x3 and 5x5 at stride 1 and 2 itself, where numba is installed and
    SSLD_FAST_CONV is not 0. Everything else, and every export, sees paddle's own convolution.

    Gradients come by backward(): paddle.grad with respect to some of the inputs alone fails for any PyLayer.
    """

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        # an export traces the layer outside of dynamic mode
        if not (self.training and paddle.in_dynamic_mode() and self.is_ours() and self._takes(x)):
            return super().forward(x)
        apply: Callable[..., paddle.Tensor] = Convolution.apply
        return apply(x, self.weight, self.bias, self._stride[0], self._pads())

    def _pads(self) -> tuple[int, int, int, int]:
        pads = self._updated_padding
        top, bottom, left, right = pads if len(pads) == 4 else (pads[0], pads[0], pads[1], pads[1])
        return top, bottom, left, right

    def is_ours(self) -> bool:
        """Whether the kernels know this geometry, and are wanted."""
        return (
            COMPILED
            and bool(numba_version())
            and self._in_channels == self._out_channels == self._groups
            and tuple(self._kernel_size) in ((3, 3), (5, 5))
            and tuple(self._stride) in ((1, 1), (2, 2))
            and tuple(self._dilation) == (1, 1)
            and self._padding_algorithm != "SAME"
            and self._padding_mode == "zeros"
            and self._data_format == "NCHW"
        )

    def _takes(self, x: paddle.Tensor) -> bool:
        """Whether the input is one for the kernels, on the CPU, and a gradient will be asked for."""
        tensors = [x, self.weight] if self.bias is None else [x, self.weight, self.bias]
        return (
            paddle.is_grad_enabled()
            and not all(tensor.stop_gradient for tensor in tensors)
            and all(tensor.dtype == paddle.float32 for tensor in tensors)
            and paddle.device.get_device() == "cpu"
            and x.ndim == 4
            and x.shape[0] > 0
            and x.shape[1] == self._in_channels
            and min(out_size(x.shape, self.weight.shape, self._stride[0], self._pads())) > 0
        )


def prepare(network: nn.Layer, note: Callable[[str], None]) -> None:
    """Compile what the network trains with; say so where it took long, which it does once on each kind of processor."""
    if not any(
        isinstance(layer, DepthwiseConv2D) and layer.is_ours() for layer in network.sublayers(include_self=True)
    ):
        return
    began = time.monotonic()
    pixel, kernel = np.zeros((1, 1, 1, 1), np.float32), np.zeros((1, 1, 3, 3), np.float32)
    convolve(pixel, kernel, np.zeros(1, np.float32), 1, 1, 1, pixel.copy())
    differentiate(pixel, kernel, pixel.copy(), 1, 1, 1, pixel.copy(), kernel.copy(), True, True)
    seconds = time.monotonic() - began
    # a busy machine may take as long to load what it finds in the cache
    kernels: tuple[Any, ...] = (convolve, differentiate)
    fresh = any(kernel.stats.cache_misses for kernel in kernels)
    if fresh and seconds > NOTED:
        note(
            f"depthwise convolutions compiled for this processor in {seconds:.0f} s; later runs find them in the cache"
        )
