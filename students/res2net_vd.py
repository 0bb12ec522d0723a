"""Res2Net-D ("vd"), 26 channels wide at 4 scales: residual networks whose blocks filter a quarter after the other.

Gao et al. 2019, "Res2Net: A New Multi-scale Backbone Architecture", section 3, with the stem and the shortcuts of
ResNet-D, in the form that PaddleClas trains (ppcls/arch/backbone/model_zoo/res2net_vd.py), whose weights' names it
carries. Convolutions start from paddle's default, a normal distribution with variance 2 / (kernel area * channels in).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import paddle
from paddle import nn
from paddle.nn import functional as F

from .layers import MODEL_ZOO, check_classes, check_stem_stride, conv_norm, uniform_linear  # noqa: TID251
from .resnet_vd import shortcut  # noqa: TID251

STEM_WIDTH = 64
STAGE_WIDTHS = (256, 512, 1024, 2048)
SCALES = 4
PART = 26
"""Channels of one scale in the first stage, doubled from stage to stage."""


def _conv_bn(
    width_in: int, width: int, kernel: int, stride: int = 1, act: type[nn.Layer] | None = nn.ReLU
) -> nn.Sequential:
    return conv_norm(width_in, width, kernel, stride, act=act, names=MODEL_ZOO)


class Bottleneck(nn.Layer):
    """1x1, a 3x3 for each scale but the last, and 1x1.

    Each 3x3 but the first filters the sum of its scale and of what the one before it made. In a block that halves the
    size nothing is added, and the last scale is averaged over 3x3 pixels, at the border over those that there are.

    name: what PaddleClas calls the 3x3 convolutions by. part, width_in, width: channels of a scale, before, and after.
    """

    def __init__(self, name: str, width_in: int, part: int, width: int, stride: int, short: nn.Layer) -> None:
        super().__init__()
        self._filters = tuple(f"{name}_branch2b_{scale}" for scale in range(1, SCALES))
        self._chained = stride == 1
        self.conv0 = _conv_bn(width_in, part * SCALES, 1)
        for each in self._filters:
            self.add_sublayer(each, _conv_bn(part, part, 3, stride))
        self.pool2d_avg = nn.Identity() if stride == 1 else nn.AvgPool2D(3, stride, 1)
        self.conv2 = _conv_bn(part * SCALES, width, 1, act=None)
        self.short = short

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        parts = paddle.split(self.conv0(x), SCALES, axis=1)
        made: list[paddle.Tensor] = []
        for index, name in enumerate(self._filters):
            chained = self._chained and index > 0
            made.append(getattr(self, name)(parts[index] + made[-1] if chained else parts[index]))
        return F.relu(self.conv2(paddle.concat([*made, self.pool2d_avg(parts[-1])], axis=1)) + self.short(x))


def _name(stage: int, index: int, depth: int) -> str:
    """Blocks are lettered; in a stage of more than 6 they are numbered from the second on: a, b1, b2, ..."""
    letter = chr(ord("a") + index) if depth <= 6 else f"b{index}" if index else "a"
    return f"res{stage + 2}{letter}"


def _blocks(depths: Sequence[int]) -> list[tuple[str, nn.Layer]]:
    """The first block of each stage projects its shortcut, and halves the size in all stages but the first."""
    blocks: list[tuple[str, nn.Layer]] = []
    width_in = STEM_WIDTH
    for stage, (width, depth) in enumerate(zip(STAGE_WIDTHS, depths, strict=True)):
        for index in range(depth):
            stride = 2 if index == 0 and stage > 0 else 1
            short = shortcut(width_in, width, stride, MODEL_ZOO) if index == 0 else nn.Identity()
            block = Bottleneck(_name(stage, index, depth), width_in, PART * 2**stage, width, stride, short)
            blocks.append((f"bb_{stage}_{index}", block))
            width_in = width
    return blocks


class Res2NetVd(nn.Sequential):
    """Logits [B, num_classes] from float32 [B, 3, H, W], at any H and W.

    depths: blocks in each of the four stages.
    num_classes: at least 1.
    stem_stride: 2, or 1 for images of 32 px and less, where the first convolution keeps the size; same weights.

    The last feature map is 1/32 of the image's side, or 1/16 with stem_stride 1. Raises RecipeError for other values.
    """

    head = "out"
    features = "flatten"

    def __init__(self, depths: Sequence[int], num_classes: int, stem_stride: int = 2) -> None:
        check_classes("Res2Net_vd", num_classes)
        check_stem_stride("Res2Net_vd", stem_stride)
        super().__init__(
            ("conv1_1", _conv_bn(3, STEM_WIDTH // 2, 3, stem_stride)),
            ("conv1_2", _conv_bn(STEM_WIDTH // 2, STEM_WIDTH // 2, 3)),
            ("conv1_3", _conv_bn(STEM_WIDTH // 2, STEM_WIDTH, 3)),
            ("pool2d_max", nn.MaxPool2D(3, 2, 1)),
            *_blocks(depths),
            ("pool2d_avg", nn.AdaptiveAvgPool2D(1)),
            ("flatten", nn.Flatten()),
            ("out", uniform_linear(STAGE_WIDTHS[-1], num_classes)),
        )


def _constructor(name: str, depths: Sequence[int]) -> Callable[..., Res2NetVd]:
    def construct(num_classes: int, stem_stride: int = 2) -> Res2NetVd:
        return Res2NetVd(depths, num_classes, stem_stride)

    construct.__name__ = construct.__qualname__ = name
    construct.__doc__ = f"{name}: {' + '.join(map(str, depths))} blocks, {SCALES} scales of {PART}; see Res2NetVd."
    return construct


Res2Net50_vd_26w_4s = _constructor("Res2Net50_vd_26w_4s", (3, 4, 6, 3))
Res2Net101_vd_26w_4s = _constructor("Res2Net101_vd_26w_4s", (3, 4, 23, 3))
