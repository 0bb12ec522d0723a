"""What families share: layers with their first values, and the checks of what a recipe may say to any of them."""

from __future__ import annotations

from math import sqrt

import paddle
from paddle import nn
from paddle.nn.initializer import Uniform
from paddle.nn.initializer.initializer import Initializer
from paddle.regularizer import L2Decay

from ssld.errors import RecipeError
from ssld.train.convolution import Conv2D
from ssld.train.linear import Linear
from ssld.train.normalization import ACTIVATIONS, BatchNorm, ConvNorm

MODEL_ZOO = ("_conv", "_batch_norm")
"""What PaddleClas's model_zoo calls a convolution and its norm; its legendary_models say "conv" and "bn"."""


def conv_norm(
    width_in: int,
    width: int,
    kernel: int,
    stride: int = 1,
    groups: int = 1,
    act: type[nn.Layer] | None = None,
    *,
    names: tuple[str, str] = ("conv", "bn"),
    drawn: Initializer | None = None,
    decayed: bool = True,
) -> nn.Sequential:
    """[B, width_in, H, W] to [B, width, H / stride, W / stride], rounded up: convolution, batch norm, activation.

    kernel: its side, an odd number; the image is padded by half of it. names: of convolution and norm in the weights.
    drawn: where the first values of the convolution come from; without, paddle's normal distribution with variance
    2 / (kernel area * width_in). decayed: whether weight decay takes the norm's scale and shift as well.
    """
    first = paddle.ParamAttr(initializer=drawn)
    conv = Conv2D(
        width_in, width, kernel, stride, padding=kernel // 2, groups=groups, weight_attr=first, bias_attr=False
    )
    attr = None if decayed else paddle.ParamAttr(regularizer=L2Decay(0.0))
    # not BatchNorm2D: the same numbers, but paddle 3.3.1 warns at every step of training
    norm = BatchNorm(width, momentum=0.9, epsilon=1e-5, param_attr=attr, bias_attr=attr)
    # a norm leaves its kernels when it is to take an activation along that they do not know
    whole = ConvNorm if act is None or act in ACTIVATIONS else nn.Sequential
    return whole((names[0], conv), (names[1], norm), *([("act", act())] if act else []))


def uniform_linear(width_in: int, width: int) -> Linear:
    """[B, width_in] to [B, width]; starts from a uniform distribution within 1 / sqrt(width_in), and a bias of 0."""
    bound = 1 / sqrt(width_in)
    return Linear(width_in, width, weight_attr=paddle.ParamAttr(initializer=Uniform(-bound, bound)))


def check_count(family: str, name: str, count: int) -> None:
    """Raises RecipeError unless there is one at least."""
    if not (isinstance(count, int) and count >= 1):
        raise RecipeError(f"{family}: expected {name} of at least 1, got {count!r}")


def check_classes(family: str, num_classes: int) -> None:
    """Raises RecipeError unless there is a class."""
    check_count(family, "num_classes", num_classes)


def check_stem_stride(family: str, stem_stride: int) -> None:
    """Raises RecipeError unless the first convolution halves the size or keeps it."""
    if stem_stride not in (1, 2):
        raise RecipeError(f"{family}: expected stem_stride 2, or 1 for images of 32 px and less, got {stem_stride!r}")


def check_dropout(family: str, dropout: float) -> None:
    """Raises RecipeError unless it is a share, and something is kept."""
    if not (isinstance(dropout, int | float) and 0 <= dropout < 1):
        raise RecipeError(f"{family}: expected dropout in [0, 1), got {dropout!r}; PaddleClas trains with 0.2")
