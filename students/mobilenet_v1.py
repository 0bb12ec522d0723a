"""MobileNetV1: depthwise and 1x1 convolutions in turn.

Howard et al. 2017, "MobileNets", table 1, in the form that PaddleClas trains (ppcls/arch/backbone/legendary_models/
mobilenet_v1.py), whose weights' names it carries; the stride of 2 that the table prints for its last depthwise
convolution is 1, as the size of its output wants it. Weights start from KaimingNormal, variance 2 / (kernel area *
channels that each filter reads), those of the classifier too.
"""

from __future__ import annotations

import paddle
from paddle import nn
from paddle.nn.initializer import KaimingNormal

from ssld.train.linear import Linear

from .layers import check_classes, check_stem_stride, conv_norm  # noqa: TID251

STEM_WIDTH = 32
ROWS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))
"""Channels out and stride of each block."""


def _conv_bn(width_in: int, width: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return conv_norm(width_in, width, kernel, stride, groups, nn.ReLU, drawn=KaimingNormal())


def _blocks() -> nn.Sequential:
    """Each block filters each channel by 3x3, then mixes the channels by 1x1."""
    blocks: list[nn.Layer] = []
    width_in = STEM_WIDTH
    for width, stride in ROWS:
        filtered = ("depthwise_conv", _conv_bn(width_in, width_in, 3, stride, groups=width_in))
        mixed = ("pointwise_conv", _conv_bn(width_in, width, 1))
        blocks.append(nn.Sequential(filtered, mixed))
        width_in = width
    return nn.Sequential(*blocks)


class MobileNetV1(nn.Layer):
    """MobileNetV1: logits [B, num_classes] from float32 [B, 3, H, W], at any H and W.

    num_classes: at least 1.
    stem_stride: 2, or 1 for images of 32 px and less, where the first convolution keeps the size; same weights.

    The last feature map is 1/32 of the image's side, or 1/16 with stem_stride 1. Raises RecipeError for other values.
    """

    head = "fc"
    features = "flatten"

    def __init__(self, num_classes: int, stem_stride: int = 2) -> None:
        super().__init__()
        check_classes("MobileNetV1", num_classes)
        check_stem_stride("MobileNetV1", stem_stride)
        self.conv = _conv_bn(3, STEM_WIDTH, 3, stem_stride)
        self.blocks = _blocks()
        self.avg_pool = nn.AdaptiveAvgPool2D(1)
        self.flatten = nn.Flatten()
        self.fc = Linear(ROWS[-1][0], num_classes, weight_attr=paddle.ParamAttr(initializer=KaimingNormal()))

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.fc(self.flatten(self.avg_pool(self.blocks(self.conv(x)))))
