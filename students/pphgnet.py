"""PP-HGNet, tiny and small: 3x3 convolutions in rows whose every output is kept, made for GPUs.

Each block is an "OSA" module of VoVNet with the gate of VoVNetV2 (Lee and Park 2020, "CenterMask"), and each stage but
the first begins with a learned halving: the form that PaddleClas trains (ppcls/arch/backbone/legendary_models/
pp_hgnet.py), whose weights' names it carries. Every convolution starts from KaimingNormal, variance
2 / (kernel area * channels that each filter reads), and the classifier from Xavier's uniform one. Batch norm is never
decayed.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import paddle
from paddle import nn
from paddle.nn import functional as F
from paddle.nn.initializer import KaimingNormal

from ssld.train.convolution import Conv2D
from ssld.train.linear import Linear

from .layers import check_classes, check_stem_stride, conv_norm  # noqa: TID251

FEATURES = 2048


class Row(NamedTuple):
    """One stage: channels of its convolutions, channels out of each block, blocks."""

    inner: int
    width: int
    blocks: int


class Size(NamedTuple):
    """Channels of the three convolutions before the stages, the four stages, convolutions in each block."""

    stem: tuple[int, int, int]
    stages: tuple[Row, Row, Row, Row]
    layers: int


TINY = Size((48, 48, 96), (Row(96, 224, 1), Row(128, 448, 1), Row(160, 512, 2), Row(192, 768, 1)), 5)
SMALL = Size((64, 64, 128), (Row(128, 256, 1), Row(160, 512, 1), Row(192, 768, 2), Row(224, 1024, 1)), 6)

_conv_bn = partial(conv_norm, drawn=KaimingNormal(), decayed=False)
_pointwise = partial(Conv2D, kernel_size=1, weight_attr=paddle.ParamAttr(initializer=KaimingNormal()))


class Gate(nn.Layer):
    """Scales each channel by a sigmoid that is computed from the means of all channels, in one step."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2D(1)
        self.conv = _pointwise(width, width)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return x * F.sigmoid(self.conv(self.avg_pool(x)))


class Block(nn.Layer):
    """3x3 convolutions in a row; the input and the output of each are mixed by one of 1x1, then gated.

    The input is added where the block keeps the width, which all but the first of a stage do.
    """

    def __init__(self, width_in: int, row: Row, layers: int, residual: bool) -> None:
        super().__init__()
        inputs = (width_in, *[row.inner] * (layers - 1))
        self.layers = nn.LayerList(_conv_bn(width, row.inner, 3, act=nn.ReLU) for width in inputs)
        self.aggregation_conv = _conv_bn(width_in + layers * row.inner, row.width, 1, act=nn.ReLU)
        self.att = Gate(row.width)
        self.residual = residual

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        kept = [x]
        for layer in self.layers:
            kept.append(layer(kept[-1]))
        y = self.att(self.aggregation_conv(paddle.concat(kept, axis=1)))
        return x + y if self.residual else y


class Stage(nn.Layer):
    """Blocks in a row, after a depthwise halving if there is one."""

    def __init__(self, width_in: int, row: Row, layers: int, halve: bool) -> None:
        super().__init__()
        self.downsample = _conv_bn(width_in, width_in, 3, 2, width_in) if halve else nn.Identity()
        inputs = (width_in, *[row.width] * (row.blocks - 1))
        self.blocks = nn.Sequential(*(Block(width, row, layers, index > 0) for index, width in enumerate(inputs)))

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.blocks(self.downsample(x))


def _stem(widths: tuple[int, int, int], stride: int) -> nn.Sequential:
    triples = zip((3, *widths[:-1]), widths, (stride, 1, 1), strict=True)
    return nn.Sequential(*(_conv_bn(width_in, width, 3, each, act=nn.ReLU) for width_in, width, each in triples))


class PPHGNet(nn.Layer):
    """Logits [B, num_classes] from float32 [B, 3, H, W], at any H and W.

    size: channels and blocks.
    num_classes: at least 1.
    stem_stride: 2, or 1 for images of 32 px and less, where the first convolution keeps the size; same weights.

    The last feature map is 1/32 of the image's side, or 1/16 with stem_stride 1. Raises RecipeError for other values.
    """

    head = "fc"
    features = "flatten"

    def __init__(self, size: Size, num_classes: int, stem_stride: int = 2) -> None:
        super().__init__()
        check_classes("PPHGNet", num_classes)
        check_stem_stride("PPHGNet", stem_stride)
        inputs = (size.stem[-1], *(row.width for row in size.stages[:-1]))
        pairs = zip(inputs, size.stages, strict=True)
        self.stem = _stem(size.stem, stem_stride)
        self.pool = nn.MaxPool2D(3, 2, 1)
        self.stages = nn.LayerList(
            Stage(width, row, size.layers, index > 0) for index, (width, row) in enumerate(pairs)
        )
        self.avg_pool = nn.AdaptiveAvgPool2D(1)
        self.last_conv = _pointwise(size.stages[-1].width, FEATURES, bias_attr=False)
        self.act = nn.ReLU()
        self.flatten = nn.Flatten()
        self.fc = Linear(FEATURES, num_classes)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        x = self.pool(self.stem(x))
        for stage in self.stages:
            x = stage(x)
        x = self.act(self.last_conv(self.avg_pool(x)))
        return self.fc(self.flatten(x))


def PPHGNet_tiny(num_classes: int, stem_stride: int = 2) -> PPHGNet:
    """PPHGNet_tiny: five convolutions in each of five blocks; see PPHGNet."""
    return PPHGNet(TINY, num_classes, stem_stride)


def PPHGNet_small(num_classes: int, stem_stride: int = 2) -> PPHGNet:
    """PPHGNet_small: six convolutions in each of five blocks, and more channels; see PPHGNet."""
    return PPHGNet(SMALL, num_classes, stem_stride)
