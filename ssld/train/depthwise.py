"""A depthwise convolution that trains fast on a CPU, where paddle's own takes most of a small network's step.

A row of the output is a sum of shifted rows of the input, and each row is taken as one long vector. Two things keep it
long and without gaps: the rows of several small images are interleaved, and for stride 2 even and odd columns are
separated. So a channel is packed, computed, and unpacked.

The kernels are compiled by numba, an extra, and work on paddle's memory without a copy. Each channel is computed alone
and in a fixed order, so the bits depend neither on threads nor on the run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import paddle
from paddle import nn
from paddle.autograd import PyLayer

from ssld.environment import numba_version

Function = TypeVar("Function", bound=Callable[..., Any])

LANES = 64
"""Numbers that a row should have at least; images are interleaved until it has."""
COMPILED = bool(numba_version())


def compiled(function: Function) -> Function:
    """The function as machine code; without numba as it is, and never called."""
    if not COMPILED:
        return function
    from numba import njit

    options = {"nogil": True, "error_model": "numpy", "fastmath": {"contract", "reassoc", "nsz"}}
    try:
        fast: Function = njit(cache=True, **options)(function)
    except RuntimeError:
        # neither the package's folder nor the user's cache can be written
        fast = njit(**options)(function)
    return fast


# The kernels ---------------------------------------------------------------------------------------------------------
#
# images, gradients: [B, C, H, W]; weight: [C, 1, side, side], side 3 or 5; stride 1 or 2, in both directions.
# A packed channel of `count` images: [H, phases * pitch * count], where the pixel in column x of image i stands at
# ((x + left) % stride * pitch + (x + left) // stride) * count + i.


@compiled
def pack(images: np.ndarray, channel: int, stride: int, left: int, pitch: int, rows: np.ndarray) -> None:
    """Pack a channel; what lies beside the image, and is zero in rows, stays zero."""
    count, _, height, width = images.shape
    for phase in range(stride):
        first = (phase - left) % stride
        skipped = (first + left) // stride
        wide = max(min((width - first + stride - 1) // stride, pitch - skipped), 0)
        start = (phase * pitch + skipped) * count
        for i in range(count):
            for y in range(height):
                if count > 1:
                    for x in range(wide):
                        rows[y, start + x * count + i] = images[i, channel, y, first + x * stride]
                else:
                    copy(images[i, channel, y, first:], stride, rows[y, start:], 1, wide)


@compiled
def unpack(rows: np.ndarray, channel: int, stride: int, left: int, pitch: int, images: np.ndarray) -> None:
    """Write a packed channel to the images; columns that the rows do not reach become 0."""
    count, _, height, width = images.shape
    for phase in range(stride):
        first = (phase - left) % stride
        skipped = (first + left) // stride
        whole = (width - first + stride - 1) // stride
        wide = max(min(whole, pitch - skipped), 0)
        start = (phase * pitch + skipped) * count
        for i in range(count):
            for y in range(height):
                if count > 1:
                    for x in range(wide):
                        images[i, channel, y, first + x * stride] = rows[y, start + x * count + i]
                else:
                    copy(rows[y, start:], 1, images[i, channel, y, first:], stride, wide)
                for x in range(wide, whole):
                    images[i, channel, y, first + x * stride] = 0


@compiled
def copy(source: np.ndarray, step: int, target: np.ndarray, target_step: int, size: int) -> None:
    """target[x * target_step] = source[x * step]; steps 1 and 2 by name, since only then the loop is vectorized."""
    if step == 2:
        for x in range(size):
            target[x] = source[x * 2]
    elif target_step == 2:
        for x in range(size):
            target[x * 2] = source[x]
    else:
        for x in range(size):
            target[x] = source[x]


@compiled
def add_products(weights: np.ndarray, row: np.ndarray, starts: np.ndarray, line: np.ndarray) -> None:
    """line[x] += sum over taps of weights[tap] * row[starts[tap] + x]."""
    a, b, c = row[starts[0] :], row[starts[1] :], row[starts[2] :]
    u, v, w = weights[0], weights[1], weights[2]
    if starts.size == 3:
        for x in range(line.size):
            line[x] += u * a[x] + v * b[x] + w * c[x]
    else:
        d, e, y, z = row[starts[3] :], row[starts[4] :], weights[3], weights[4]
        for x in range(line.size):
            line[x] += u * a[x] + v * b[x] + w * c[x] + y * d[x] + z * e[x]


@compiled
def add_dots(line: np.ndarray, row: np.ndarray, starts: np.ndarray, sums: np.ndarray) -> None:
    """sums[tap] += sum over x of line[x] * row[starts[tap] + x]."""
    a, b, c = row[starts[0] :], row[starts[1] :], row[starts[2] :]
    s = t = u = np.float32(0)
    if starts.size == 3:
        for x in range(line.size):
            s += line[x] * a[x]
            t += line[x] * b[x]
            u += line[x] * c[x]
    else:
        d, e = row[starts[3] :], row[starts[4] :]
        v = w = np.float32(0)
        for x in range(line.size):
            s += line[x] * a[x]
            t += line[x] * b[x]
            u += line[x] * c[x]
            v += line[x] * d[x]
            w += line[x] * e[x]
        sums[3] += v
        sums[4] += w
    sums[0] += s
    sums[1] += t
    sums[2] += u


@compiled
def scatter(weights: np.ndarray, line: np.ndarray, starts: np.ndarray, row: np.ndarray) -> None:
    """row[starts[tap] + x] += weights[tap] * line[x] for all taps."""
    for tap in range(starts.size):
        weight, target = weights[tap], row[starts[tap] :]
        for x in range(line.size):
            target[x] += weight * line[x]


@compiled
def shifts(side: int, stride: int, pitch: int, count: int) -> np.ndarray:
    """Where in a packed row the pixels begin that each tap of a kernel's row meets."""
    starts = np.empty(side, np.int64)
    for tap in range(side):
        starts[tap] = (tap % stride * pitch + tap // stride) * count
    return starts


@compiled
def images_per_row(images: int, width: int) -> int:
    """How many images are interleaved."""
    return max(1, min(images, (LANES + width - 1) // width))


@compiled
def convolve(
    images: np.ndarray, weight: np.ndarray, bias: np.ndarray, stride: int, top: int, left: int, out: np.ndarray
) -> None:
    """Write the convolution of images to out [B, C, out height, out width]. bias: [C]."""
    total, channels, height, _ = images.shape
    side, out_height, out_width = weight.shape[2], out.shape[2], out.shape[3]
    pitch, most = out_width + (side - 1) // stride, images_per_row(total, out_width)
    for begin in range(0, total, most):
        block = images[begin : begin + most]
        count = block.shape[0]
        starts = shifts(side, stride, pitch, count)
        rows = np.zeros((height, stride * pitch * count), np.float32)
        lines = np.empty((out_height, out_width * count), np.float32)
        for channel in range(channels):
            pack(block, channel, stride, left, pitch, rows)
            lines[:] = bias[channel]
            for y in range(out_height):
                for tap in range(max(0, top - y * stride), min(side, height + top - y * stride)):
                    add_products(weight[channel, 0, tap], rows[y * stride + tap - top], starts, lines[y])
            unpack(lines, channel, 1, 0, out_width, out[begin : begin + most])


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
        block = images[begin : begin + most]
        count = block.shape[0]
        starts = shifts(side, stride, pitch, count)
        rows = np.zeros((height, stride * pitch * count), np.float32)
        carried = np.empty_like(rows)
        lines = np.empty((out_height, out_width * count), np.float32)
        for channel in range(channels):
            pack(gradient[begin : begin + most], channel, 1, 0, out_width, lines)
            if want_weight:
                pack(block, channel, stride, left, pitch, rows)
            carried[:] = 0
            for y in range(out_height):
                for tap in range(max(0, top - y * stride), min(side, height + top - y * stride)):
                    at = y * stride + tap - top
                    if want_weight:
                        add_dots(lines[y], rows[at], starts, sums[channel, tap])
                    if want_images:
                        scatter(weight[channel, 0, tap], lines[y], starts, carried[at])
            if want_images:
                unpack(carried, channel, stride, left, pitch, to_images[begin : begin + most])
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
        ctx.wanted = [tensor is not None and not tensor.stop_gradient for tensor in (x, weight, bias)]
        ctx.inputs = 2 if bias is None else 3
        out = paddle.empty([*x.shape[:2], *out_size(x.shape, weight.shape, stride, padding)], "float32")
        shift = np.zeros(x.shape[1], np.float32) if bias is None else view(bias)
        convolve(view(x), view(weight), shift, *ctx.place, view(out))
        return out

    @staticmethod
    def backward(ctx: Any, gradient: paddle.Tensor) -> tuple[paddle.Tensor | None, ...]:
        inputs = ctx.saved_tensor()
        carried = [paddle.empty(tensor.shape, "float32") for tensor in inputs]
        differentiate(*map(view, (*inputs, gradient)), *ctx.place, *map(view, carried), *ctx.wanted[:2])
        found = [*carried, gradient.sum([0, 2, 3]) if ctx.wanted[2] else None]
        return tuple(value if wanted else None for value, wanted in zip(found, ctx.wanted, strict=True))[: ctx.inputs]


def out_size(x: Sequence[int], weight: Sequence[int], stride: int, padding: Sequence[int]) -> tuple[int, int]:
    """Height and width of the output, below 1 where the kernel is larger than the padded image."""
    top, bottom, left, right = padding
    return (x[2] + top + bottom - weight[2]) // stride + 1, (x[3] + left + right - weight[3]) // stride + 1


class DepthwiseConv2D(nn.Conv2D):
    """paddle's Conv2D for one group per channel: the same parameters, by the same names, with the same first values.

    In training on a CPU it computes kernels of 3x3 and 5x5 at stride 1 and 2 itself, where numba is installed and
    SSLD_FAST_CONV is not 0. Everything else, and every export, sees paddle's own convolution. It has no second
    derivative.
    """

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        # an export traces the layer outside of dynamic mode
        if not (self.training and paddle.in_dynamic_mode() and self._is_ours() and self._takes(x)):
            return super().forward(x)
        return Convolution.apply(x, self.weight, self.bias, self._stride[0], self._pads())

    def _pads(self) -> tuple[int, int, int, int]:
        pads = self._updated_padding
        return tuple(pads) if len(pads) == 4 else (pads[0], pads[0], pads[1], pads[1])

    def _is_ours(self) -> bool:
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
