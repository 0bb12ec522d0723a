"""ESNet: an enhanced ShuffleNetV2 for phones, the backbone of PP-PicoDet.

Yu et al. 2021, "PP-PicoDet: A Better Real-Time Object Detector on Mobile Devices", section 3.1, in the form that
PaddleClas trains (ppcls/arch/backbone/legendary_models/esnet.py), whose weights' names it carries. Dropout scales in
evaluation and not in training.

Weights start as there. Convolutions before a batch norm start from KaimingNormal, variance 2 / (kernel area * channels
that each filter reads); the others start from paddle's default, variance 2 / (kernel area * channels in), and the
classifier from Xavier's uniform one. Batch norm is never decayed.
"""

from __future__ import annotations

from functools import partial

import paddle
from paddle import nn
from paddle.nn import functional as F
from paddle.nn.initializer import KaimingNormal

from ssld.train.convolution import Conv2D
from ssld.train.linear import Linear

from .layers import check_classes, check_dropout, check_stem_stride, conv_norm  # noqa: TID251
from .mobilenet_v3 import SqueezeExcite  # noqa: TID251
from .pplcnet import SIXTH  # noqa: TID251

STEM_WIDTH = 24
STAGES = ((120, 3), (232, 7), (464, 3))
"""Channels and blocks of each stage. The paper's 116 is rounded to a multiple of 8."""
LAST_WIDTH = 1024
FEATURES = 1280

_conv_bn = partial(conv_norm, drawn=KaimingNormal(), decayed=False)


class Keeping(nn.Layer):
    """A block that keeps the shape: one half of the channels passes, the other is filtered, then both are shuffled.

    What is gated is that half before and after its channels are filtered, side by side.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.pw_1_1 = _conv_bn(half, half, 1, act=nn.Hardswish)
        self.dw_1 = _conv_bn(half, half, 3, groups=half)
        self.se = SqueezeExcite(width, SIXTH)
        self.pw_1_2 = _conv_bn(width, half, 1, act=nn.Hardswish)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        passing, y = paddle.split(x, 2, axis=1)
        y = self.pw_1_1(y)
        y = self.pw_1_2(self.se(paddle.concat([y, self.dw_1(y)], axis=1)))
        return F.channel_shuffle(paddle.concat([passing, y], axis=1), 2)


class Halving(nn.Layer):
    """A block with stride 2: two branches make half of the channels each, which two more convolutions mix."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        half = width // 2
        self.dw_1 = _conv_bn(width_in, width_in, 3, 2, width_in)
        self.pw_1 = _conv_bn(width_in, half, 1, act=nn.Hardswish)
        self.pw_2_1 = _conv_bn(width_in, half, 1, act=nn.Hardswish)
        self.dw_2 = _conv_bn(half, half, 3, 2, half)
        self.se = SqueezeExcite(half, SIXTH)
        self.pw_2_2 = _conv_bn(half, half, 1, act=nn.Hardswish)
        self.concat_dw = _conv_bn(width, width, 3, groups=width, act=nn.Hardswish)
        self.concat_pw = _conv_bn(width, width, 1, act=nn.Hardswish)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        plain = self.pw_1(self.dw_1(x))
        gated = self.pw_2_2(self.se(self.dw_2(self.pw_2_1(x))))
        return self.concat_pw(self.concat_dw(paddle.concat([plain, gated], axis=1)))


def _blocks() -> nn.Sequential:
    """All blocks in one row, as PaddleClas names them; the first of each stage halves."""
    blocks: list[nn.Layer] = []
    width_in = STEM_WIDTH
    for width, depth in STAGES:
        blocks += [Halving(width_in, width), *(Keeping(width) for _ in range(depth - 1))]
        width_in = width
    return nn.Sequential(*blocks)


class ESNet(nn.Layer):
    """Logits [B, num_classes] from float32 [B, 3, H, W], at any H and W.

    num_classes: at least 1.
    stem_stride: 2, or 1 for images of 32 px and less, where the first convolution keeps the size; same weights.
    dropout: share of the features dropped in training, in [0, 1); in evaluation they are scaled by 1 - dropout, so
        trained weights need the value that they were trained with (PaddleClas: 0.2).

    The last feature map is 1/32 of the image's side, or 1/16 with stem_stride 1. Raises RecipeError for other values.
    """

    head = "fc"
    features = "flatten"

    def __init__(self, num_classes: int, stem_stride: int = 2, dropout: float = 0.2) -> None:
        super().__init__()
        check_classes("ESNet", num_classes)
        check_stem_stride("ESNet", stem_stride)
        check_dropout("ESNet", dropout)
        self.conv1 = _conv_bn(3, STEM_WIDTH, 3, stem_stride, act=nn.Hardswish)
        self.max_pool = nn.MaxPool2D(3, 2, 1)
        self.blocks = _blocks()
        self.conv2 = _conv_bn(STAGES[-1][0], LAST_WIDTH, 1, act=nn.Hardswish)
        self.avg_pool = nn.AdaptiveAvgPool2D(1)
        self.last_conv = Conv2D(LAST_WIDTH, FEATURES, 1, bias_attr=False)
        self.hardswish = nn.Hardswish()
        self.dropout = nn.Dropout(dropout, mode="downscale_in_infer")
        self.flatten = nn.Flatten()
        self.fc = Linear(FEATURES, num_classes)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        x = self.conv2(self.blocks(self.max_pool(self.conv1(x))))
        x = self.hardswish(self.last_conv(self.avg_pool(x)))
        return self.fc(self.flatten(self.dropout(x)))


def ESNet_x1_0(num_classes: int, stem_stride: int = 2, dropout: float = 0.2) -> ESNet:
    """ESNet_x1_0: 3 + 7 + 3 blocks; see ESNet."""
    return ESNet(num_classes, stem_stride, dropout)
