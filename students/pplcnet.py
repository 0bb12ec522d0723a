"""PP-LCNet at eight widths: depthwise and 1x1 convolutions in turn, made for CPUs.

Cui et al. 2021, "PP-LCNet: A Lightweight CPU Convolutional Neural Network", in the form that PaddleClas trains
(ppcls/arch/backbone/legendary_models/pp_lcnet.py), whose weights' names it carries. No block has a shortcut, the last
seven filter by 5x5, the last two have squeeze-excite, and dropout scales in evaluation and not in training.

Weights start as there. Convolutions before a batch norm start from KaimingNormal, variance 2 / (kernel area * channels
that each filter reads), which for a depthwise one is more than paddle's default; the others start from that default,
variance 2 / (kernel area * channels in), and the classifier from Xavier's uniform one. Batch norm is never decayed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import paddle
from paddle import nn
from paddle.nn.initializer import KaimingNormal

from ssld.errors import RecipeError
from ssld.train.convolution import Conv2D

from .layers import check_classes, check_count, check_dropout, check_stem_stride, conv_norm  # noqa: TID251
from .mobilenet_v3 import SqueezeExcite, make_divisible  # noqa: TID251

SIXTH = 0.1666667
"""Slope of the gate: paddle's default, to its last digit."""

STRIDES = (2, 2, 2, 2, 2)
FEATURES = 1280


class Row(NamedTuple):
    """One block at width 1.0: side of the depthwise kernel, channels in, channels out, squeeze-excite."""

    kernel: int
    width_in: int
    width: int
    excite: bool = False


BLOCKS2 = (Row(3, 16, 32),)
BLOCKS3 = (Row(3, 32, 64), Row(3, 64, 64))
BLOCKS4 = (Row(3, 64, 128), Row(3, 128, 128))
BLOCKS5 = (Row(3, 128, 256), *[Row(5, 256, 256)] * 5)
BLOCKS6 = (Row(5, 256, 512, excite=True), Row(5, 512, 512, excite=True))


_conv_bn = partial(conv_norm, act=nn.Hardswish, drawn=KaimingNormal(), decayed=False)


class DepthwiseSeparable(nn.Layer):
    """Filter each channel, gate, then mix the channels by 1x1."""

    def __init__(self, row: Row, scale: float, stride: int) -> None:
        super().__init__()
        width_in, width = make_divisible(row.width_in * scale), make_divisible(row.width * scale)
        self.dw_conv = _conv_bn(width_in, width_in, row.kernel, stride, groups=width_in)
        self.se = SqueezeExcite(width_in, SIXTH) if row.excite else nn.Identity()
        self.pw_conv = _conv_bn(width_in, width, 1)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.pw_conv(self.se(self.dw_conv(x)))


def _blocks(rows: tuple[Row, ...], scale: float, stride: int) -> nn.Sequential:
    """Blocks in a row; the stride is on the first."""
    strides = (stride, *[1] * (len(rows) - 1))
    return nn.Sequential(*(DepthwiseSeparable(row, scale, each) for row, each in zip(rows, strides, strict=True)))


class PPLCNet(nn.Layer):
    """Logits [B, num_classes] from float32 [B, 3, H, W], at any H and W.

    scale: factor on all channels but the features, rounded to multiples of 8.
    num_classes: at least 1.
    stem_stride: 2, or 1 for images of 32 px and less, where the first convolution keeps the size; same weights.
    dropout: share of the features dropped in training, in [0, 1); in evaluation they are scaled by 1 - dropout, so
        trained weights need the value that they were trained with (PaddleClas: 0.2).
    class_expand: how many features the classifier reads, at least 1.
    stride_list: 1 or 2 for the first convolution and for the first of blocks3, blocks4, blocks5 and blocks6; same
        weights. A stem_stride of 1 stands in place of the first.

    The last feature map is 1/32 of the image's side, twice as large for each stride that is 1 and not 2. Raises
    RecipeError for other values.
    """

    head = "fc"
    features = "flatten"

    def __init__(
        self,
        scale: float,
        num_classes: int,
        stem_stride: int = 2,
        dropout: float = 0.2,
        class_expand: int = FEATURES,
        stride_list: Sequence[int] = STRIDES,
    ) -> None:
        super().__init__()
        check_classes("PPLCNet", num_classes)
        check_count("PPLCNet", "class_expand", class_expand)
        check_stem_stride("PPLCNet", stem_stride)
        check_dropout("PPLCNet", dropout)
        _check_strides(stride_list)
        strides = (min(stem_stride, stride_list[0]), *stride_list[1:])
        self.conv1 = _conv_bn(3, make_divisible(BLOCKS2[0].width_in * scale), 3, strides[0])
        self.blocks2 = _blocks(BLOCKS2, scale, 1)
        self.blocks3 = _blocks(BLOCKS3, scale, strides[1])
        self.blocks4 = _blocks(BLOCKS4, scale, strides[2])
        self.blocks5 = _blocks(BLOCKS5, scale, strides[3])
        self.blocks6 = _blocks(BLOCKS6, scale, strides[4])
        self.avg_pool = nn.AdaptiveAvgPool2D(1)
        self.last_conv = Conv2D(make_divisible(BLOCKS6[-1].width * scale), class_expand, 1, bias_attr=False)
        self.act = nn.Hardswish()
        self.dropout = nn.Dropout(dropout, mode="downscale_in_infer")
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(class_expand, num_classes)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        x = self.blocks4(self.blocks3(self.blocks2(self.conv1(x))))
        x = self.avg_pool(self.blocks6(self.blocks5(x)))
        x = self.act(self.last_conv(x))
        return self.fc(self.flatten(self.dropout(x)))


def _check_strides(strides: Sequence[int]) -> None:
    if len(strides) != len(STRIDES) or any(stride not in (1, 2) for stride in strides):
        raise RecipeError(
            f"PPLCNet: expected stride_list of {len(STRIDES)} strides, 1 or 2 each, got {list(strides)!r}"
        )


def _constructor(scale: float) -> Callable[..., PPLCNet]:
    def construct(
        num_classes: int,
        stem_stride: int = 2,
        dropout: float = 0.2,
        class_expand: int = FEATURES,
        stride_list: Sequence[int] = STRIDES,
    ) -> PPLCNet:
        return PPLCNet(scale, num_classes, stem_stride, dropout, class_expand, stride_list)

    name = f"PPLCNet_x{scale}".replace(".", "_")
    construct.__name__ = construct.__qualname__ = name
    construct.__doc__ = f"{name}: PP-LCNet with {scale} times the channels; see PPLCNet."
    return construct


PPLCNet_x0_25 = _constructor(0.25)
PPLCNet_x0_35 = _constructor(0.35)
PPLCNet_x0_5 = _constructor(0.5)
PPLCNet_x0_75 = _constructor(0.75)
PPLCNet_x1_0 = _constructor(1.0)
PPLCNet_x1_5 = _constructor(1.5)
PPLCNet_x2_0 = _constructor(2.0)
PPLCNet_x2_5 = _constructor(2.5)
