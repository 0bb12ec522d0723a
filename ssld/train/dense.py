"""A dense convolution that trains fast on a CPU: products of matrices, by the BLAS that numpy brings.

A kernel of one pixel is such a product as it stands, one for each image. For any other kernel, the pixels that it meets
are laid out as the columns of a matrix, in blocks that stay in the cache. For the gradient they are laid out anew: that
costs a tenth of the products and keeps nothing.

Blocks, and the order of all sums, depend on shapes alone: while the BLAS has one thread, the bits depend neither on
threads nor on the run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import numpy as np

from ssld.train.compiling import compiled

BLOCK = 2**19
"""Numbers in a block of columns, 2 MiB: less reads a large weight too often, and more leaves the cache."""
PIXELS = 1024
"""Columns in a block where they are not laid out; images smaller than that are put together."""

# Columns -------------------------------------------------------------------------------------------------------------
#
# images: [B, C, H, W]; columns: [C, kernel height, kernel width, B, out height, out width], the pixel of each channel
# that each place of the kernel meets, 0 beside the image. top, left: the image's place in the padded one, which may be
# negative where the columns begin below its first row.
#
# Inner loops count by unsigned numbers, since numba would look for negative ones and the loop would not be vectorized.


@compiled
def inside(size: int, out: int, stride: int, shift: int) -> tuple[int, int]:
    """The first x of [0, out), and the first after it, for which x * stride + shift lies not in [0, size)."""
    first = min(max(0, (stride - 1 - shift) // stride), out)
    return first, max(first, min(out, (size - 1 - shift) // stride + 1))


@compiled
def gather(images: np.ndarray, stride: int, top: int, left: int, columns: np.ndarray) -> None:
    """Lay pixels out as columns."""
    channels, tall, wide, count, height, width = columns.shape
    step, end = np.uint64(stride), np.uint64(width)
    for c in range(channels):
        for ky in range(tall):
            low, high = inside(images.shape[2], height, stride, ky - top)
            for kx in range(wide):
                first, last = inside(images.shape[3], width, stride, kx - left)
                a, b, start = np.uint64(first), np.uint64(last), np.uint64(first * stride + kx - left)
                for i in range(count):
                    columns[c, ky, kx, i, :low] = 0
                    for y in range(low, high):
                        row = y * stride + ky - top
                        for x in range(a):
                            columns[c, ky, kx, i, y, x] = 0
                        if stride == 1:
                            for x in range(b - a):
                                columns[c, ky, kx, i, y, a + x] = images[i, c, row, start + x]
                        else:
                            for x in range(b - a):
                                columns[c, ky, kx, i, y, a + x] = images[i, c, row, start + x * step]
                        for x in range(b, end):
                            columns[c, ky, kx, i, y, x] = 0
                    columns[c, ky, kx, i, high:] = 0


@compiled
def scatter(columns: np.ndarray, stride: int, top: int, left: int, images: np.ndarray) -> None:
    """Add each number of the columns to its pixel."""
    channels, tall, wide, count, height, width = columns.shape
    step = np.uint64(stride)
    for c in range(channels):
        for ky in range(tall):
            low, high = inside(images.shape[2], height, stride, ky - top)
            for kx in range(wide):
                first, last = inside(images.shape[3], width, stride, kx - left)
                a, size, start = np.uint64(first), np.uint64(last - first), np.uint64(first * stride + kx - left)
                for i in range(count):
                    for y in range(low, high):
                        row = y * stride + ky - top
                        if stride == 1:
                            for x in range(size):
                                images[i, c, row, start + x] += columns[c, ky, kx, i, y, a + x]
                        else:
                            for x in range(size):
                                images[i, c, row, start + x * step] += columns[c, ky, kx, i, y, a + x]


# Matrices ------------------------------------------------------------------------------------------------------------


@cache
def meeting(side: int, size: int, out: int, stride: int, before: int) -> slice:
    """The places of a kernel, along one axis, that meet a pixel anywhere; where none does, any place adds 0."""
    first, last = max(0, before - (out - 1) * stride), min(side, before + size)
    return slice(first, last) if first < last else slice(0, 1)


class Met(NamedTuple):
    """The part of a kernel that meets a pixel anywhere, and the image's place for it."""

    rows: slice
    columns: slice
    top: int
    left: int

    @classmethod
    def by(cls, images: np.ndarray, weight: np.ndarray, out: np.ndarray, stride: int, top: int, left: int) -> Met:
        """Of an image of one pixel a padded kernel of 3x3 meets one place alone, and eight ninths need no computing."""
        rows = meeting(weight.shape[2], images.shape[2], out.shape[2], stride, top)
        columns = meeting(weight.shape[3], images.shape[3], out.shape[3], stride, left)
        return cls(rows, columns, top - rows.start, left - columns.start)


def pointwise(images: np.ndarray, kernel: np.ndarray, out: np.ndarray, stride: int, met: Met) -> bool:
    """Whether each pixel of out is a sum over the channels of the same pixel of the image."""
    one = kernel.shape[2:] == (1, 1) and images.shape[2:] == out.shape[2:] and met.top == met.left == 0
    return one and (stride == 1 or out.shape[2:] == (1, 1))


def flat(weight: np.ndarray, groups: int) -> np.ndarray:
    """[M, C / groups, kernel height, kernel width] as a matrix for each group: [groups, M / groups, the rest]."""
    return np.ascontiguousarray(weight).reshape(groups, weight.shape[0] // groups, -1)


def matrices(images: np.ndarray, groups: int) -> np.ndarray:
    """[B, C, H, W] as a matrix for each image and group; images of one pixel make one matrix together. A view."""
    count, channels, height, width = images.shape
    if height == width == 1:
        return images.reshape(1, count, groups, channels // groups).transpose(0, 2, 3, 1)
    return images.reshape(count, groups, channels // groups, height * width)


def matrix(images: np.ndarray, groups: int) -> np.ndarray:
    """[B, C, H, W] as one matrix for each group, [groups, C / groups, B * H * W]: of one image a view, else a copy."""
    return images.transpose(1, 0, 2, 3).reshape(groups, images.shape[1] // groups, -1)


def blocks(shape: tuple[int, ...], most: int) -> Iterator[tuple[slice, slice]]:
    """Images and rows of [B, C, H, W], at most so many pixels at once: some whole images, or some rows of one."""
    count, _, height, width = shape
    images, rows = max(1, most // (height * width)), min(height, max(1, most // width))
    for i in range(0, count, images):
        for y in range(0, height, rows):
            yield slice(i, min(i + images, count)), slice(y, min(y + rows, height))


# Products ------------------------------------------------------------------------------------------------------------


def convolve(
    images: np.ndarray, weight: np.ndarray, bias: np.ndarray, stride: int, top: int, left: int, out: np.ndarray
) -> None:
    """Write the convolution to out.

    images: [B, C, H, W]; weight: [M, C / groups, kernel height, kernel width]; bias: [M], or empty;
    out: [B, M, out height, out width]; top, left: rows and columns of zeros before the image.
    """
    groups = images.shape[1] // weight.shape[1]
    met = Met.by(images, weight, out, stride, top, left)
    kernel = weight[:, :, met.rows, met.columns]
    factor = flat(kernel, groups)
    if pointwise(images, kernel, out, stride, met):
        np.matmul(factor, matrices(images, groups), out=matrices(out, groups))
    else:
        for some, rows, columns in laid_out(images, kernel, out):
            gather(images[some], stride, met.top - rows.start * stride, met.left, columns)
            write(factor, columns.reshape(groups, factor.shape[2], -1), out[some, :, rows])
    if bias.size:
        out += bias[:, None, None]


def laid_out(images: np.ndarray, kernel: np.ndarray, out: np.ndarray) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """Images and rows of out, block by block, with room for their columns, which is the same memory each time."""
    places = images.shape[1], *kernel.shape[2:]
    room = np.empty(0, np.float32)
    for some, rows in blocks(out.shape, BLOCK // math.prod(places)):
        shape = (*places, some.stop - some.start, rows.stop - rows.start, out.shape[3])
        # the first block is the largest
        room = room if room.size else np.empty(math.prod(shape), np.float32)
        yield some, rows, room[: math.prod(shape)].reshape(shape)


def write(left: np.ndarray, right: np.ndarray, images: np.ndarray) -> None:
    """The product of left and right, a matrix for each group, as images."""
    if len(images) == 1:
        np.matmul(left, right, out=matrix(images, len(left)))
    else:
        turned = images.transpose(1, 0, 2, 3)
        turned[:] = np.matmul(left, right).reshape(turned.shape)


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
    groups = images.shape[1] // weight.shape[1]
    met = Met.by(images, weight, gradient, stride, top, left)
    kernel = weight[:, :, met.rows, met.columns]
    factor = flat(kernel, groups)
    turned = factor.transpose(0, 2, 1)
    whole = kernel.shape == weight.shape
    sums = Sums(to_weight.reshape(factor.shape) if whole and to_weight.size else np.empty(factor.shape, np.float32))
    if pointwise(images, kernel, gradient, stride, met):
        if to_images.size:
            np.matmul(turned, matrices(gradient, groups), out=matrices(to_images, groups))
        if to_weight.size:
            for some, rows in blocks(gradient.shape, PIXELS):
                sums.add(matrix(gradient[some, :, rows], groups), matrix(images[some, :, rows], groups))
    else:
        to_images[:] = 0
        for some, rows, columns in laid_out(images, kernel, gradient):
            coming, begin = matrix(gradient[some, :, rows], groups), met.top - rows.start * stride
            factors = columns.reshape(groups, factor.shape[2], -1)
            if to_weight.size:
                gather(images[some], stride, begin, met.left, columns)
                sums.add(coming, factors)
            if to_images.size:
                np.matmul(turned, coming, out=factors)
                scatter(columns, stride, begin, met.left, to_images[some])
    if to_weight.size and not whole:
        to_weight[:] = 0
        to_weight[:, :, met.rows, met.columns] = sums.total.reshape(kernel.shape)


class Sums:
    """A sum of products of matrices."""

    def __init__(self, total: np.ndarray) -> None:
        self.total, self.begun = total, False

    def add(self, left: np.ndarray, right: np.ndarray) -> None:
        """Add the product of left [groups, rows, n] and right [groups, columns, n], over n."""
        if self.begun:
            self.total += np.matmul(left, right.transpose(0, 2, 1))
        else:
            np.matmul(left, right.transpose(0, 2, 1), out=self.total)
        self.begun = True
