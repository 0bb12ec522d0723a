"""The convolution of students: paddle's layer, which trains by kernels of our own on a CPU, where paddle's are slow.

The kernels work on paddle's memory without a copy, on the thread of the step alone: the other cores belong to decoding
and to other ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import paddle
from paddle import nn
from paddle.autograd import PyLayer

from ssld.train import compiling, dense, depthwise
from ssld.train.compiling import empty, view


class Kernels(Protocol):
    """What computes a convolution and its gradient: the module depthwise, or dense.

    images: [B, C, H, W]; weight: [M, C / groups, kernel height, kernel width]; bias: [M], or empty;
    out, gradient: [B, M, out height, out width]; top, left: rows and columns of zeros before the image.
    """

    def convolve(
        self,
        images: np.ndarray,
        weight: np.ndarray,
        bias: np.ndarray,
        stride: int,
        top: int,
        left: int,
        out: np.ndarray,
    ) -> None:
        """Write the convolution to out."""

    def differentiate(
        self,
        images: np.ndarray,
        weight: np.ndarray,
        gradient: np.ndarray,
        stride: int,
        top: int,
        left: int,
        to_images: np.ndarray,
        to_weight: np.ndarray,
    ) -> None:
        """Carry the gradient on, to images and to weight; an empty array wants none."""


def trial(kernels: Kernels) -> None:
    """Call the kernels once, on next to nothing."""
    images, weight = np.zeros((1, 1, 2, 2), np.float32), np.zeros((1, 1, 3, 3), np.float32)
    kernels.convolve(images, weight, np.zeros(1, np.float32), 1, 1, 1, images.copy())
    kernels.differentiate(images, weight, images.copy(), 1, 1, 1, images.copy(), weight.copy())


NO_BIAS = np.empty(0, np.float32)
MODULES: tuple[Kernels, ...] = (dense, depthwise)
TRIALS = {kernels: partial(trial, kernels) for kernels in MODULES}


class Convolution(PyLayer):
    """Kernels as one operation of paddle's autograd. What is kept for the gradient is what goes in, no more.

    numpy is not to warn of numbers that are not finite: they pass through, and the loss shows them.
    """

    @staticmethod
    @np.errstate(all="ignore")
    def forward(
        ctx: Any,
        x: paddle.Tensor,
        weight: paddle.Tensor,
        bias: paddle.Tensor | None,
        kernels: Kernels,
        stride: int,
        top: int,
        left: int,
        shape: list[int],
    ) -> paddle.Tensor:
        """shape: that of the output."""
        ctx.kept = images, factors = view(x), view(weight)
        ctx.asked = kernels, stride, top, left
        ctx.wanted = [not tensor.stop_gradient for tensor in (x, weight, bias) if tensor is not None]
        out = empty(shape)
        kernels.convolve(images, factors, NO_BIAS if bias is None else view(bias), stride, top, left, view(out))
        return out

    @staticmethod
    @np.errstate(all="ignore")
    def backward(ctx: Any, *args: Any) -> Any:
        """Gradients of images, weight and bias; None for those that want none."""
        (images, weight), gradient = ctx.kept, view(args[0])
        kernels, stride, top, left = ctx.asked
        want_x, want_weight, *want_bias = ctx.wanted
        to_x = empty(images.shape if want_x else [0] * 4)
        to_weight = empty(weight.shape if want_weight else [0] * 4)
        kernels.differentiate(images, weight, gradient, stride, top, left, view(to_x), view(to_weight))
        found = [to_x if want_x else None, to_weight if want_weight else None]
        if want_bias:
            to_bias = empty(gradient.shape[1:2])
            view(to_bias)[:] = gradient.sum((0, 2, 3), np.float64)
            found.append(to_bias if want_bias[0] else None)
        return tuple(found)


def out_size(image: Sequence[int], kernel: Sequence[int], stride: int, padding: Sequence[int]) -> tuple[int, int]:
    """Height and width of the output, below 1 where the kernel is larger than the padded image."""
    top, bottom, left, right = padding
    return (image[-2] + top + bottom - kernel[0]) // stride + 1, (image[-1] + left + right - kernel[1]) // stride + 1


class Conv2D(nn.Conv2D, compiling.Fast):
    """paddle's Conv2D: the same parameters, by the same names, with the same first values.

    In training on a CPU it computes what our kernels know by them, where numba is installed and SSLD_FAST_CONV is not
    0. Everything else, and every export, sees paddle's own convolution.

    Gradients come by backward(): paddle.grad with respect to some of the inputs alone fails for any PyLayer.
    """

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        kernels = self.kernels() if self.training else None
        shape = self._shape(x) if kernels else None
        if shape is None:
            return super().forward(x)
        apply: Callable[..., paddle.Tensor] = Convolution.apply
        top, _, left, _ = self._pads()
        return apply(x, self.weight, self.bias, kernels, self._stride[0], top, left, shape)

    def kernels(self) -> Kernels | None:
        """What computes this geometry, if it is wanted; None where paddle does."""
        stride = self._stride[0]
        ours = (
            compiling.wanted()
            and tuple(self._stride) == (stride, stride)
            and tuple(self._dilation) == (1, 1)
            and self._padding_algorithm != "SAME"
            and self._padding_mode == "zeros"
            and self._data_format == "NCHW"
        )
        if not ours:
            return None
        if self._groups == 1 or self._groups < self._in_channels:
            return dense
        square = tuple(self._kernel_size) in ((3, 3), (5, 5))
        return depthwise if square and self._groups == self._out_channels and stride in (1, 2) else None

    def trial(self) -> Callable[[], None] | None:
        kernels = self.kernels()
        return TRIALS[kernels] if kernels else None

    def _pads(self) -> tuple[int, int, int, int]:
        pads = self._updated_padding
        top, bottom, left, right = pads if len(pads) == 4 else (pads[0], pads[0], pads[1], pads[1])
        return top, bottom, left, right

    def _shape(self, x: paddle.Tensor) -> list[int] | None:
        """The shape of the output; None unless x is one for the kernels, and a gradient will be asked for."""
        if not compiling.learns(x, self.weight, self.bias):
            return None
        shape = x.shape
        if len(shape) != 4 or shape[0] == 0 or shape[1] != self._in_channels:
            return None
        height, width = out_size(shape, self._kernel_size, self._stride[0], self._pads())
        return [shape[0], self._out_channels, height, width] if min(height, width) > 0 else None
