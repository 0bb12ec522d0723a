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

    images: [B, C, H, W]; weight: [M, C / groups, kernel height, kernel width]; bias: [M];
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


MODULES: tuple[Kernels, ...] = (dense, depthwise)
TRIALS = {kernels: partial(trial, kernels) for kernels in MODULES}


class Convolution(PyLayer):
    """Kernels as one operation of paddle's autograd. What is kept for the gradient is what goes in, no more."""

    @staticmethod
    def forward(
        ctx: Any,
        x: paddle.Tensor,
        weight: paddle.Tensor,
        bias: paddle.Tensor | None,
        kernels: Kernels,
        stride: int,
        padding: tuple[int, int, int, int],
    ) -> paddle.Tensor:
        """padding: above, below, left and right."""
        ctx.save_for_backward(x, weight)
        ctx.asked = kernels, stride, padding[0], padding[2]
        ctx.wanted = [not tensor.stop_gradient for tensor in (x, weight, bias) if tensor is not None]
        size = out_size(x.shape, weight.shape, stride, padding)
        out = empty([x.shape[0], weight.shape[0], *size])
        shift = np.zeros(weight.shape[0], np.float32) if bias is None else view(bias)
        kernels.convolve(view(x), view(weight), shift, stride, padding[0], padding[2], view(out))
        return out

    @staticmethod
    def backward(ctx: Any, *args: Any) -> Any:
        """Gradients of images, weight and bias; None for those that want none."""
        (x, weight), gradient = ctx.saved_tensor(), view(args[0])
        kernels, stride, top, left = ctx.asked
        want_x, want_weight, *want_bias = ctx.wanted
        to_x = empty(x.shape if want_x else [0] * 4)
        to_weight = empty(weight.shape if want_weight else [0] * 4)
        kernels.differentiate(view(x), view(weight), gradient, stride, top, left, view(to_x), view(to_weight))
        found = [to_x if want_x else None, to_weight if want_weight else None]
        if want_bias:
            sums = gradient.sum((0, 2, 3), np.float64).astype(np.float32)
            found.append(paddle.to_tensor(sums) if want_bias[0] else None)
        return tuple(found)


def out_size(x: Sequence[int], weight: Sequence[int], stride: int, padding: Sequence[int]) -> tuple[int, int]:
    """Height and width of the output, below 1 where the kernel is larger than the padded image."""
    top, bottom, left, right = padding
    return (x[2] + top + bottom - weight[2]) // stride + 1, (x[3] + left + right - weight[3]) // stride + 1


class Conv2D(nn.Conv2D, compiling.Fast):
    """paddle's Conv2D: the same parameters, by the same names, with the same first values.

    In training on a CPU it computes what our kernels know by them, where numba is installed and SSLD_FAST_CONV is not
    0. Everything else, and every export, sees paddle's own convolution.

    Gradients come by backward(): paddle.grad with respect to some of the inputs alone fails for any PyLayer.
    """

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        kernels = self.kernels() if self.training else None
        if not (kernels and self._takes(x)):
            return super().forward(x)
        apply: Callable[..., paddle.Tensor] = Convolution.apply
        return apply(x, self.weight, self.bias, kernels, self._stride[0], self._pads())

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

    def _takes(self, x: paddle.Tensor) -> bool:
        """Whether the input is one for the kernels, on the CPU, and a gradient will be asked for."""
        tensors = [x, self.weight] if self.bias is None else [x, self.weight, self.bias]
        return (
            paddle.is_grad_enabled()
            and not all(tensor.stop_gradient for tensor in tensors)
            and compiling.known(*tensors)
            and x.ndim == 4
            and x.shape[0] > 0
            and x.shape[1] == self._in_channels
            and min(out_size(x.shape, self.weight.shape, self._stride[0], self._pads())) > 0
        )
