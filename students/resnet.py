"""Residual networks: ResNet-18, 34 and 50, and the blocks of all that are built like them.

He et al. 2016, "Deep Residual Learning", table 1 and section 3.3, in the form that PaddleClas trains (ppcls/arch/
backbone/legendary_models/resnet.py), whose weights' names it carries: the stride of a bottleneck is on its 3x3
convolution, not on the first 1x1, and the first block of the first stage projects its shortcut too. Convolutions start
from paddle's default, a normal distribution with variance 2 / (kernel area * channels in).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import paddle
from paddle import nn
from paddle.nn import functional as F

from .layers import check_classes, check_stem_stride, conv_norm, uniform_linear  # noqa: TID251

STEM_WIDTH = 64
STAGE_WIDTHS = (64, 128, 256, 512)
Shortcut = Callable[[int, int, int], nn.Layer]
"""What leads past the first block of a stage, from its channels in, channels out and stride."""


class BasicBlock(nn.Layer):
    """Two 3x3 convolutions; the stride is on the first."""

    expansion = 1

    def __init__(self, width_in: int, width: int, stride: int, short: nn.Layer) -> None:
        super().__init__()
        self.conv0 = conv_norm(width_in, width, 3, stride, act=nn.ReLU)
        self.conv1 = conv_norm(width, width, 3)
        self.short = short

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return F.relu(self.conv1(self.conv0(x)) + self.short(x))


class BottleneckBlock(nn.Layer):
    """1x1, 3x3 and 1x1 convolutions, the last four times as wide; the stride is on the 3x3."""

    expansion = 4

    def __init__(self, width_in: int, width: int, stride: int, short: nn.Layer) -> None:
        super().__init__()
        self.conv0 = conv_norm(width_in, width, 1, act=nn.ReLU)
        self.conv1 = conv_norm(width, width, 3, stride, act=nn.ReLU)
        self.conv2 = conv_norm(width, width * self.expansion, 1)
        self.short = short

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return F.relu(self.conv2(self.conv1(self.conv0(x))) + self.short(x))


Block = type[BasicBlock] | type[BottleneckBlock]


def _blocks(block: Block, depths: Sequence[int], shortcut: Shortcut) -> nn.Sequential:
    """All blocks in one row, as PaddleClas names them: the first of each stage projects, all but stage 0 halve."""
    blocks: list[nn.Layer] = []
    width_in = STEM_WIDTH
    for stage, (width, depth) in enumerate(zip(STAGE_WIDTHS, depths, strict=True)):
        for index in range(depth):
            stride = 2 if index == 0 and stage > 0 else 1
            width_out = width * block.expansion
            short = shortcut(width_in, width_out, stride) if index == 0 else nn.Identity()
            blocks.append(block(width_in, width, stride, short))
            width_in = width_out
    return nn.Sequential(*blocks)


class ResNet(nn.Layer):
    """Logits [B, num_classes] from float32 [B, 3, H, W], at any H and W.

    stem: what makes 64 channels of the image. depths: blocks in each of the four stages. num_classes: at least 1.

    The last feature map is 1/32 of the image's side, or 1/16 where the stem keeps the size.
    """

    head = "fc"
    features = "flatten"

    def __init__(
        self, stem: nn.Sequential, block: Block, depths: Sequence[int], shortcut: Shortcut, num_classes: int
    ) -> None:
        super().__init__()
        self.stem = stem
        self.max_pool = nn.MaxPool2D(3, 2, 1)
        self.blocks = _blocks(block, depths, shortcut)
        self.avg_pool = nn.AdaptiveAvgPool2D(1)
        self.flatten = nn.Flatten()
        self.fc = uniform_linear(STAGE_WIDTHS[-1] * block.expansion, num_classes)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        x = self.blocks(self.max_pool(self.stem(x)))
        return self.fc(self.flatten(self.avg_pool(x)))


def constructor(
    name: str, stem: Callable[[int], nn.Sequential], block: Block, depths: Sequence[int], shortcut: Shortcut
) -> Callable[..., ResNet]:
    """The network of that name, from a number of classes; stem: from its stride."""
    family = "ResNet_vd" if name.endswith("_vd") else "ResNet"

    def construct(num_classes: int, stem_stride: int = 2) -> ResNet:
        check_classes(family, num_classes)
        check_stem_stride(family, stem_stride)
        return ResNet(stem(stem_stride), block, depths, shortcut, num_classes)

    construct.__name__ = construct.__qualname__ = name
    construct.__doc__ = f"{name}: {' + '.join(map(str, depths))} blocks of the class {block.__name__}; see ResNet."
    return construct


def _stem(stride: int) -> nn.Sequential:
    return nn.Sequential(conv_norm(3, STEM_WIDTH, 7, stride, act=nn.ReLU))


def _projection(width_in: int, width: int, stride: int) -> nn.Sequential:
    return conv_norm(width_in, width, 1, stride)


ResNet18 = constructor("ResNet18", _stem, BasicBlock, (2, 2, 2, 2), _projection)
ResNet34 = constructor("ResNet34", _stem, BasicBlock, (3, 4, 6, 3), _projection)
ResNet50 = constructor("ResNet50", _stem, BottleneckBlock, (3, 4, 6, 3), _projection)
