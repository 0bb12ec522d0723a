"""A depthwise convolution that trains fast on a CPU, where paddle's own takes most of a small network's step.

A row of the output is a sum of shifted rows of the input, and each row is taken as one long vector. Two things keep it
long and without gaps: the rows of several small images are interleaved, and for stride 2 even and odd columns are
separated. So a channel is packed, computed, and unpacked.

Each channel is computed alone and in a fixed order, so the bits depend neither on threads nor on the run.
"""

from __future__ import annotations

import numpy as np

from ssld.train.compiling import compiled

LANES = 128
"""Numbers that a row may have at most where images are interleaved: fewer leave vectors short, more leave the cache."""

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
    """Write the convolution of images to out [B, C, out height, out width]. bias: [C], or empty."""
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
            lines[:] = bias[channel] if bias.size else 0
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
) -> None:
    """Carry the gradient of the convolution on, to images and to weight; an empty array wants none."""
    want_images, want_weight = to_images.size > 0, to_weight.size > 0
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
