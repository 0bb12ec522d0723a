"""MobileNetV3, small and large, at five widths.

Howard et al. 2019, tables 1 and 2, in the form that PaddleClas trains (ppcls/arch/backbone/legendary_models/
mobilenet_v3.py), whose weights' names it carries. It departs from the paper in three places: the squeeze-excite gate
is clip(0.2 x + 0.5, 0, 1), dropout scales in evaluation and not in training, and the small size ends in 1,280 features
too. Weights start from paddle's defaults: convolutions from a normal distribution with variance 2 / (kernel area *
channels in), also where they are depthwise, the classifier from Xavier's uniform one. Batch norm is never decayed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import paddle
from paddle import nn
from paddle.nn import functional as F

from ssld.train.convolution import Conv2D
from ssld.train.linear import Linear

from .layers import check_classes, check_dropout, check_stem_stride, conv_norm  # noqa: TID251

STEM_WIDTH = 16
FEATURES = 1280
Activation = type[nn.ReLU] | type[nn.Hardswish]


class Row(NamedTuple):
    """One block at width 1.0: kernel side, channels inside, channels out, squeeze-excite, activation, stride."""

    kernel: int
    expanded: int
    width: int
    excite: bool
    act: Activation
    stride: int


LARGE = (
    Row(3, 16, 16, False, nn.ReLU, 1),
    Row(3, 64, 24, False, nn.ReLU, 2),
    Row(3, 72, 24, False, nn.ReLU, 1),
    Row(5, 72, 40, True, nn.ReLU, 2),
    Row(5, 120, 40, True, nn.ReLU, 1),
    Row(5, 120, 40, True, nn.ReLU, 1),
    Row(3, 240, 80, False, nn.Hardswish, 2),
    Row(3, 200, 80, False, nn.Hardswish, 1),
    Row(3, 184, 80, False, nn.Hardswish, 1),
    Row(3, 184, 80, False, nn.Hardswish, 1),
    Row(3, 480, 112, True, nn.Hardswish, 1),
    Row(3, 672, 112, True, nn.Hardswish, 1),
    Row(5, 672, 160, True, nn.Hardswish, 2),
    Row(5, 960, 160, True, nn.Hardswish, 1),
    Row(5, 960, 160, True, nn.Hardswish, 1),
)
SMALL = (
    Row(3, 16, 16, True, nn.ReLU, 2),
    Row(3, 72, 24, False, nn.ReLU, 2),
    Row(3, 88, 24, False, nn.ReLU, 1),
    Row(5, 96, 40, True, nn.Hardswish, 2),
    Row(5, 240, 40, True, nn.Hardswish, 1),
    Row(5, 240, 40, True, nn.Hardswish, 1),
    Row(5, 120, 48, True, nn.Hardswish, 1),
    Row(5, 144, 48, True, nn.Hardswish, 1),
    Row(5, 288, 96, True, nn.Hardswish, 2),
    Row(5, 576, 96, True, nn.Hardswish, 1),
    Row(5, 576, 96, True, nn.Hardswish, 1),
)


def make_divisible(channels: float, divisor: int = 8) -> int:
    """The multiple of divisor nearest to channels, at least one of it, and never below 0.9 * channels.

    >>> [make_divisible(16 * scale) for scale in (0.35, 0.5, 0.75, 1.0, 1.25)]
    [8, 8, 16, 16, 24]
    """
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * channels else rounded + divisor


_conv_bn = partial(conv_norm, decayed=False)


class SqueezeExcite(nn.Layer):
    """Scales each channel by a gate in [0, 1] that is computed from the means of all channels.

    The gate is clip(slope * x + 0.5, 0, 1); 0.2 is PaddleClas's slope for MobileNetV3, whose paper has a sixth.
    """

    def __init__(self, width: int, slope: float = 0.2) -> None:
        super().__init__()
        self.slope = slope
        self.avg_pool = nn.AdaptiveAvgPool2D(1)
        self.conv1 = Conv2D(width, width // 4, 1)
        self.conv2 = Conv2D(width // 4, width, 1)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        gate = self.conv2(F.relu(self.conv1(self.avg_pool(x))))
        return x * F.hardsigmoid(gate, slope=self.slope, offset=0.5)


class InvertedResidual(nn.Layer):
    """Expand by 1x1, filter each channel, gate, project by 1x1 without activation; add the input if the shape is kept.

    The expansion is there even where it expands nothing.
    """

    def __init__(self, width_in: int, row: Row, scale: float) -> None:
        super().__init__()
        width, expanded = make_divisible(row.width * scale), make_divisible(row.expanded * scale)
        self.expand_conv = _conv_bn(width_in, expanded, 1, act=row.act)
        self.bottleneck_conv = _conv_bn(expanded, expanded, row.kernel, row.stride, groups=expanded, act=row.act)
        self.mid_se = SqueezeExcite(expanded) if row.excite else nn.Identity()
        self.linear_conv = _conv_bn(expanded, width, 1)
        self.residual = row.stride == 1 and width_in == width

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        y = self.linear_conv(self.mid_se(self.bottleneck_conv(self.expand_conv(x))))
        return x + y if self.residual else y


def _blocks(rows: tuple[Row, ...], scale: float) -> nn.Sequential:
    inputs = (STEM_WIDTH, *(row.width for row in rows[:-1]))
    pairs = zip(inputs, rows, strict=True)
    return nn.Sequential(*(InvertedResidual(make_divisible(width * scale), row, scale) for width, row in pairs))


class MobileNetV3(nn.Layer):
    """Logits [B, num_classes] from float32 [B, 3, H, W], at any H and W.

    rows: the blocks; scale: factor on all channels but the 1,280 features, rounded to multiples of 8.
    num_classes: at least 1.
    stem_stride: 2, or 1 for images of 32 px and less, where the first convolution keeps the size; same weights.
    dropout: share of the features dropped in training, in [0, 1); in evaluation they are scaled by 1 - dropout, so
        trained weights need the value that they were trained with (PaddleClas: 0.2).

    The last feature map is 1/32 of the image's side, or 1/16 with stem_stride 1. Raises RecipeError for other values.
    """

    head = "fc"
    features = "flatten"

    def __init__(
        self, rows: tuple[Row, ...], scale: float, num_classes: int, stem_stride: int = 2, dropout: float = 0.2
    ) -> None:
        super().__init__()
        check_classes("MobileNetV3", num_classes)
        check_stem_stride("MobileNetV3", stem_stride)
        check_dropout("MobileNetV3", dropout)
        stem, last = make_divisible(STEM_WIDTH * scale), make_divisible(rows[-1].width * scale)
        squeezed = make_divisible(rows[-1].expanded * scale)
        self.conv = _conv_bn(3, stem, 3, stem_stride, act=nn.Hardswish)
        self.blocks = _blocks(rows, scale)
        self.last_second_conv = _conv_bn(last, squeezed, 1, act=nn.Hardswish)
        self.avg_pool = nn.AdaptiveAvgPool2D(1)
        self.last_conv = Conv2D(squeezed, FEATURES, 1, bias_attr=False)
        self.hardswish = nn.Hardswish()
        self.dropout = nn.Dropout(dropout, mode="downscale_in_infer")
        self.flatten = nn.Flatten()
        self.fc = Linear(FEATURES, num_classes)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        x = self.last_second_conv(self.blocks(self.conv(x)))
        x = self.hardswish(self.last_conv(self.avg_pool(x)))
        return self.fc(self.flatten(self.dropout(x)))


def _constructor(size: str, scale: float) -> Callable[..., MobileNetV3]:
    rows = {"small": SMALL, "large": LARGE}[size]

    def construct(num_classes: int, stem_stride: int = 2, dropout: float = 0.2) -> MobileNetV3:
        return MobileNetV3(rows, scale, num_classes, stem_stride, dropout)

    name = f"MobileNetV3_{size}_x{scale}".replace(".", "_")
    construct.__name__ = construct.__qualname__ = name
    construct.__doc__ = f"{name}: MobileNetV3 {size} with {scale} times the channels; see MobileNetV3."
    return construct


MobileNetV3_small_x0_35 = _constructor("small", 0.35)
MobileNetV3_small_x0_5 = _constructor("small", 0.5)
MobileNetV3_small_x0_75 = _constructor("small", 0.75)
MobileNetV3_small_x1_0 = _constructor("small", 1.0)
MobileNetV3_small_x1_25 = _constructor("small", 1.25)
MobileNetV3_large_x0_35 = _constructor("large", 0.35)
MobileNetV3_large_x0_5 = _constructor("large", 0.5)
MobileNetV3_large_x0_75 = _constructor("large", 0.75)
MobileNetV3_large_x1_0 = _constructor("large", 1.0)
MobileNetV3_large_x1_25 = _constructor("large", 1.25)
