"""ResNet-D ("vd"): residual networks with a deep stem and shortcuts that pool before they project.

He et al. 2019, "Bag of Tricks", section 4.2, in the form that PaddleClas trains (ppcls/arch/backbone/legendary_models/
resnet.py): the first block of the first stage projects its shortcut too, and the weights carry PaddleClas's names.
Convolutions start from paddle's default, a normal distribution with variance 2 / (kernel area * channels in).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import sqrt

import paddle
from paddle import nn
from paddle.nn import functional as F

from ssld.errors import RecipeError
from ssld.train.convolution import Conv2D
from ssld.train.linear import Linear
from ssld.train.normalization import BatchNorm, ConvNorm

STEM_WIDTH = 64
STAGE_WIDTHS = (64, 128, 256, 512)


def _conv_bn(width_in: int, width: int, kernel: int, stride: int = 1) -> list[tuple[str, nn.Layer]]:
    conv = Conv2D(width_in, width, kernel, stride, padding=kernel // 2, bias_attr=False)
    # not BatchNorm2D: the same numbers, but paddle 3.3.1 warns at every step of training
    return [("conv", conv), ("bn", BatchNorm(width, momentum=0.9, epsilon=1e-5))]


def _conv_bn_relu(width_in: int, width: int, kernel: int, stride: int = 1) -> nn.Sequential:
    return ConvNorm(*_conv_bn(width_in, width, kernel, stride), ("act", nn.ReLU()))


def _shortcut(width_in: int, width: int, stride: int) -> nn.Sequential:
    """Projection by a 1x1 convolution; a strided one averages 2x2 pixels first instead of skipping three of four.

    At odd sizes the last windows hold fewer pixels and are averaged over those alone.
    """
    pool = [("pool", nn.AvgPool2D(2, 2, ceil_mode=True))] if stride == 2 else []
    return nn.Sequential(*pool, *_conv_bn(width_in, width, 1))


class BasicBlock(nn.Layer):
    """Two 3x3 convolutions; the stride is on the first."""

    expansion = 1

    def __init__(self, width_in: int, width: int, stride: int, short: nn.Layer) -> None:
        super().__init__()
        self.conv0 = _conv_bn_relu(width_in, width, 3, stride)
        self.conv1 = nn.Sequential(*_conv_bn(width, width, 3))
        self.short = short

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return F.relu(self.conv1(self.conv0(x)) + self.short(x))


class BottleneckBlock(nn.Layer):
    """1x1, 3x3 and 1x1 convolutions, the last four times as wide; the stride is on the 3x3."""

    expansion = 4

    def __init__(self, width_in: int, width: int, stride: int, short: nn.Layer) -> None:
        super().__init__()
        self.conv0 = _conv_bn_relu(width_in, width, 1)
        self.conv1 = _conv_bn_relu(width, width, 3, stride)
        self.conv2 = nn.Sequential(*_conv_bn(width, width * self.expansion, 1))
        self.short = short

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return F.relu(self.conv2(self.conv1(self.conv0(x))) + self.short(x))


Block = type[BasicBlock] | type[BottleneckBlock]


def _stem(stride: int) -> nn.Sequential:
    half = STEM_WIDTH // 2
    return nn.Sequential(
        _conv_bn_relu(3, half, 3, stride), _conv_bn_relu(half, half, 3), _conv_bn_relu(half, STEM_WIDTH, 3)
    )


def _blocks(block: Block, depths: Sequence[int]) -> nn.Sequential:
    """All blocks in one row, as PaddleClas names them: the first of each stage projects, all but stage 0 halve."""
    blocks: list[nn.Layer] = []
    width_in = STEM_WIDTH
    for stage, (width, depth) in enumerate(zip(STAGE_WIDTHS, depths, strict=True)):
        for index in range(depth):
            stride = 2 if index == 0 and stage > 0 else 1
            width_out = width * block.expansion
            short = _shortcut(width_in, width_out, stride) if index == 0 else nn.Identity()
            blocks.append(block(width_in, width, stride, short))
            width_in = width_out
    return nn.Sequential(*blocks)


class ResNetVd(nn.Layer):
    """Logits [B, num_classes] from float32 [B, 3, H, W], at any H and W.

    depths: blocks in each of the four stages.
    num_classes: at least 1.
    stem_stride: 2, or 1 for images of 32 px and less, where the first convolution keeps the size; same weights.

    The last feature map is 1/32 of the image's side, or 1/16 with stem_stride 1. Raises RecipeError for other values.
    """

    head = "fc"
    features = "flatten"

    def __init__(self, block: Block, depths: Sequence[int], num_classes: int, stem_stride: int = 2) -> None:
        super().__init__()
        _check(num_classes, stem_stride)
        width = STAGE_WIDTHS[-1] * block.expansion
        bound = 1 / sqrt(width)
        self.stem = _stem(stem_stride)
        self.max_pool = nn.MaxPool2D(3, 2, 1)
        self.blocks = _blocks(block, depths)
        self.avg_pool = nn.AdaptiveAvgPool2D(1)
        self.flatten = nn.Flatten()
        self.fc = Linear(
            width, num_classes, weight_attr=paddle.ParamAttr(initializer=nn.initializer.Uniform(-bound, bound))
        )

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        x = self.blocks(self.max_pool(self.stem(x)))
        return self.fc(self.flatten(self.avg_pool(x)))


def _check(num_classes: int, stem_stride: int) -> None:
    if not (isinstance(num_classes, int) and num_classes >= 1):
        raise RecipeError(f"ResNet_vd: expected num_classes of at least 1, got {num_classes!r}")
    if stem_stride not in (1, 2):
        raise RecipeError(f"ResNet_vd: expected stem_stride 2, or 1 for images of 32 px and less, got {stem_stride!r}")


def _constructor(name: str, block: Block, depths: Sequence[int]) -> Callable[..., ResNetVd]:
    def construct(num_classes: int, stem_stride: int = 2) -> ResNetVd:
        return ResNetVd(block, depths, num_classes, stem_stride)

    construct.__name__ = construct.__qualname__ = name
    construct.__doc__ = f"{name}: {' + '.join(map(str, depths))} blocks of the class {block.__name__}; see ResNetVd."
    return construct


ResNet18_vd = _constructor("ResNet18_vd", BasicBlock, (2, 2, 2, 2))
ResNet34_vd = _constructor("ResNet34_vd", BasicBlock, (3, 4, 6, 3))
ResNet50_vd = _constructor("ResNet50_vd", BottleneckBlock, (3, 4, 6, 3))
ResNet101_vd = _constructor("ResNet101_vd", BottleneckBlock, (3, 4, 23, 3))
ResNet152_vd = _constructor("ResNet152_vd", BottleneckBlock, (3, 8, 36, 3))
ResNet200_vd = _constructor("ResNet200_vd", BottleneckBlock, (3, 12, 48, 3))
