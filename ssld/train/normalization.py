"""The batch norm of students: paddle's layer, which trains on a CPU as one operation with the activation after it.

Each channel is computed alone and in a fixed order, so the bits depend neither on threads nor on the run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import paddle
from paddle import nn
from paddle.autograd import PyLayer

from ssld.train import compiling
from ssld.train.compiling import compiled, empty, view

# Kernels -------------------------------------------------------------------------------------------------------------
#
# images, gradient, out: [B, C, H * W]; weight, bias, to_weight, to_bias: [C]; act: a value of ACTIVATIONS;
# moving: mean and variance, each [C], for evaluation; made: [3, C], of each channel a number near its mean, the rest of
# the mean, and 1 / deviation.
#
# The mean comes in two parts, and is taken from x before anything else is: a small variance may stand beside a mean so
# large that the last place of it is not small. What holds the rest is computed in double precision, also since the
# compiler, which may reorder sums of one precision, would otherwise put the parts together again.
#
# Inner loops count by unsigned numbers, since numba would look for negative ones and the loop would not be vectorized.

NONE, RELU, HARDSWISH = 0, 1, 2
ACTIVATIONS: dict[type, int] = {type(None): NONE, nn.ReLU: RELU, nn.Hardswish: HARDSWISH}
ZERO, THREE, SIX, SIXTH = np.float32(0), np.float32(3), np.float32(6), np.float32(1 / 6)


@compiled
def activated(x: np.float32, act: int) -> np.float32:
    """The activation of a number. NaN stays NaN, unlike in paddle's ReLU: what is broken is not to look sound."""
    if act == RELU:
        return ZERO if x < ZERO else x
    if act == HARDSWISH:
        return x * min(max(x + THREE, ZERO), SIX) * SIXTH
    return x


@compiled
def slope(x: np.float32, act: int) -> np.float32:
    """The derivative of the activation, at its corners as paddle has it."""
    one = np.float32(1)
    if act == RELU:
        return one if x > ZERO else ZERO
    if act == HARDSWISH:
        inner = (x + x + THREE) * SIXTH
        return ZERO if x + THREE <= ZERO else (one if x + THREE >= SIX else inner)
    return one


@compiled
def normalize(
    images: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray,
    epsilon: float,
    act: int,
    momentum: float,
    moving: tuple[np.ndarray, np.ndarray],
    made: np.ndarray,
    out: np.ndarray,
) -> None:
    """Write the activated norm to out, and the statistics to made; what moves, moves by a share of 1 - momentum."""
    count, channels, size = images.shape[0], images.shape[1], np.uint64(images.shape[2])
    total = count * images.shape[2]
    for c in range(channels):
        whole = squares = 0.0
        for i in range(count):
            for p in range(size):
                whole += float(images[i, c, p])
        mean = whole / total
        middle = np.float32(mean)
        rest = mean - middle
        for i in range(count):
            part = ZERO
            for p in range(size):
                off = images[i, c, p] - middle
                part += off * off
            squares += float(part)
        variance = squares / total - rest * rest
        moving[0][c] = moving[0][c] * momentum + mean * (1 - momentum)
        moving[1][c] = moving[1][c] * momentum + variance * (1 - momentum)
        made[0, c], made[1, c], made[2, c] = middle, rest, 1 / np.sqrt(variance + epsilon)
        scale = weight[c] * made[2, c]
        shift = np.float32(bias[c] - rest * scale)
        for i in range(count):
            for p in range(size):
                out[i, c, p] = activated((images[i, c, p] - middle) * scale + shift, act)


@compiled
def differentiate(
    images: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray,
    act: int,
    made: np.ndarray,
    gradient: np.ndarray,
    to_images: np.ndarray,
    to_weight: np.ndarray,
    to_bias: np.ndarray,
) -> None:
    """Carry the gradient on, to images, weight and bias."""
    count, channels, size = images.shape[0], images.shape[1], np.uint64(images.shape[2])
    total = count * images.shape[2]
    for c in range(channels):
        middle, rest, inverse = made[0, c], float(made[1, c]), made[2, c]
        scale = weight[c] * inverse
        shift = np.float32(bias[c] - rest * scale)
        sums = products = 0.0
        for i in range(count):
            part = dots = ZERO
            for p in range(size):
                off = images[i, c, p] - middle
                coming = gradient[i, c, p] * slope(off * scale + shift, act)
                to_images[i, c, p] = coming
                part += coming
                dots += coming * off
            sums += float(part)
            products += float(dots)
        products -= rest * sums
        to_bias[c], to_weight[c] = sums, products * inverse
        linear = np.float32(products * inverse * inverse / total)
        constant = np.float32(sums / total - rest * linear)
        for i in range(count):
            for p in range(size):
                to_images[i, c, p] = scale * (to_images[i, c, p] - constant - (images[i, c, p] - middle) * linear)


# Layers --------------------------------------------------------------------------------------------------------------


class Normalization(PyLayer):
    """Batch norm and activation as one operation of paddle's autograd; kept is what goes in, and the statistics."""

    @staticmethod
    def forward(
        ctx: Any,
        x: paddle.Tensor,
        weight: paddle.Tensor,
        bias: paddle.Tensor,
        epsilon: float,
        act: int,
        momentum: float,
        moving: tuple[np.ndarray, np.ndarray],
    ) -> paddle.Tensor:
        """All after bias as for `normalize`."""
        ctx.kept = images, scale, shift = flat(x), view(weight), view(bias)
        ctx.wanted = [not tensor.stop_gradient for tensor in (x, weight, bias)]
        made, out = np.empty((3, len(scale)), np.float32), empty(x.shape)
        ctx.made = act, made
        normalize(images, scale, shift, epsilon, act, momentum, moving, made, flat(out))
        return out

    @staticmethod
    def backward(ctx: Any, *args: Any) -> Any:
        """Gradients of x, weight and bias; None for those that want none."""
        images, weight, bias = ctx.kept
        act, made = ctx.made
        found = [empty(args[0].shape), empty(weight.shape), empty(bias.shape)]
        to_x, to_weight, to_bias = flat(found[0]), view(found[1]), view(found[2])
        differentiate(images, weight, bias, act, made, flat(args[0]), to_x, to_weight, to_bias)
        return tuple(made if wanted else None for made, wanted in zip(found, ctx.wanted, strict=True))


def flat(x: paddle.Tensor) -> np.ndarray:
    """The memory of [B, C, H, W], each channel of each image as one row."""
    images = view(x)
    return images.reshape(*images.shape[:2], -1)


def code_of(act: nn.Layer | None) -> int | None:
    """How the kernels call an activation; None for one that they do not know, or that a hook waits at."""
    hooked = act is not None and (act._forward_pre_hooks or act._forward_post_hooks)
    return None if hooked else ACTIVATIONS.get(type(act))


class BatchNorm(nn.BatchNorm, compiling.Fast):
    """paddle's BatchNorm: the same parameters and statistics, by the same names, with the same first values.

    In training on a CPU it computes by our kernels, together with the activation that follows it, where numba is
    installed and SSLD_FAST_CONV is not 0. Everything else, and every export, sees paddle's own norm and activation.
    """

    def forward(self, x: paddle.Tensor, act: nn.Layer | None = None) -> paddle.Tensor:
        """The norm of x [B, C, H, W], and of that the activation."""
        code = code_of(act)
        if not (self.training and code is not None and self.trial() and self._takes(x)):
            out = super().forward(x)
            return out if act is None else act(out)
        apply: Callable[..., paddle.Tensor] = Normalization.apply
        moving = view(self._mean), view(self._variance)
        return apply(x, self.weight, self.bias, self._epsilon, code, self._momentum, moving)

    def trial(self) -> Callable[[], None] | None:
        plain = self._act is None and not self._use_global_stats and self._data_layout == "NCHW"
        affine = self.weight is not None and self.bias is not None
        return trial if compiling.wanted() and plain and affine else None

    def _takes(self, x: paddle.Tensor) -> bool:
        """Whether the input is one for the kernels. Of a single number for each channel paddle makes an exception."""
        shape = x.shape
        return (
            compiling.known(x, self._mean)
            and len(shape) == 4
            and shape[1] == self._mean.shape[0]
            and shape[0] * shape[2] * shape[3] > 1
        )


class ConvNorm(nn.Sequential):
    """A convolution, its batch norm and the activation after it, if there is one, which the norm may take along."""

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        conv, norm, *act = self._sub_layers.values()
        return norm(conv(x), *act)


def trial() -> None:
    """Call the kernels once, on next to nothing."""
    images, channel, made = np.zeros((1, 1, 2), np.float32), np.zeros(1, np.float32), np.zeros((3, 1), np.float32)
    normalize(images, channel, channel, 1.0, NONE, 0.5, (channel.copy(), channel.copy()), made, images.copy())
    differentiate(images, channel, channel, NONE, made, images, images.copy(), channel.copy(), channel.copy())
