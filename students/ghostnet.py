"""GhostNet at two widths: one half of a 1x1 convolution's channels is made of the other half by cheap 3x3 filters.

Han et al. 2020, "GhostNet: More Features from Cheap Operations", table 1, in the form that PaddleClas trains
(ppcls/arch/backbone/model_zoo/ghostnet.py), whose weights' names it carries. The squeeze-excite gate is clip(x, 0, 1).
Convolutions start from KaimingNormal, variance 2 / (kernel area * channels that each filter reads), fully connected
layers from a uniform distribution within 1 / sqrt(features in). Batch norm is never decayed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import paddle
from paddle import nn
from paddle.nn import functional as F
from paddle.nn.initializer import KaimingNormal

from .layers import (  # noqa: TID251
    MODEL_ZOO,
    check_classes,
    check_dropout,
    check_stem_stride,
    conv_norm,
    uniform_linear,
)
from .mobilenet_v3 import make_divisible  # noqa: TID251

STEM_WIDTH = 16
FEATURES = 1280


class Row(NamedTuple):
    """One block at width 1.0: kernel side, channels inside, channels out, squeeze-excite, stride."""

    kernel: int
    expanded: int
    width: int
    excite: bool
    stride: int


ROWS = (
    Row(3, 16, 16, False, 1),
    Row(3, 48, 24, False, 2),
    Row(3, 72, 24, False, 1),
    Row(5, 72, 40, True, 2),
    Row(5, 120, 40, True, 1),
    Row(3, 240, 80, False, 2),
    Row(3, 200, 80, False, 1),
    Row(3, 184, 80, False, 1),
    Row(3, 184, 80, False, 1),
    Row(3, 480, 112, True, 1),
    Row(3, 672, 112, True, 1),
    Row(5, 672, 160, True, 2),
    Row(5, 960, 160, False, 1),
    Row(5, 960, 160, True, 1),
    Row(5, 960, 160, False, 1),
    Row(5, 960, 160, True, 1),
)


def _scaled(channels: int, scale: float) -> int:
    return make_divisible(channels * scale, 4)


def _conv_bn(
    width_in: int, width: int, kernel: int, stride: int = 1, groups: int = 1, act: type[nn.Layer] | None = None
) -> nn.Sequential:
    return conv_norm(
        width_in, width, kernel, stride, groups, act, names=MODEL_ZOO, drawn=KaimingNormal(), decayed=False
    )


class GhostModule(nn.Layer):
    """[B, width_in, H, W] to [B, width, H, W]: a 1x1 convolution to half of the channels, and a 3x3 filter of each."""

    def __init__(self, width_in: int, width: int, act: type[nn.Layer] | None) -> None:
        super().__init__()
        half = width // 2
        self.primary_conv = _conv_bn(width_in, half, 1, act=act)
        self.cheap_operation = _conv_bn(half, half, 3, groups=half, act=act)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        primary = self.primary_conv(x)
        return paddle.concat([primary, self.cheap_operation(primary)], axis=1)


class SqueezeExcite(nn.Layer):
    """Scales each channel by a gate that is computed from the means of all channels, and cut off at 0 and 1."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.pool2d_gap = nn.AdaptiveAvgPool2D(1)
        self.squeeze = uniform_linear(width, width // 4)
        self.excitation = uniform_linear(width // 4, width)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        gate = self.excitation(F.relu(self.squeeze(self.pool2d_gap(x).flatten(1))))
        return x * gate.clip(0, 1).unsqueeze([2, 3])


class GhostBottleneck(nn.Layer):
    """A ghost module that expands, a filter where the size is halved, a gate, a ghost module that projects.

    The shortcut filters each channel and projects where the shape changes.
    """

    def __init__(self, width_in: int, row: Row, scale: float) -> None:
        super().__init__()
        expanded, width = _scaled(row.expanded, scale), _scaled(row.width, scale)
        halves, keeps = row.stride == 2, row.stride == 1 and width_in == width
        self.ghost_module_1 = GhostModule(width_in, expanded, nn.ReLU)
        self.depthwise_conv = _conv_bn(expanded, expanded, row.kernel, 2, expanded) if halves else nn.Identity()
        self.se_block = SqueezeExcite(expanded) if row.excite else nn.Identity()
        self.ghost_module_2 = GhostModule(expanded, width, None)
        self.shortcut_depthwise = (
            nn.Identity() if keeps else _conv_bn(width_in, width_in, row.kernel, row.stride, width_in)
        )
        self.shortcut_conv = nn.Identity() if keeps else _conv_bn(width_in, width, 1)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        y = self.ghost_module_2(self.se_block(self.depthwise_conv(self.ghost_module_1(x))))
        return y + self.shortcut_conv(self.shortcut_depthwise(x))


def _blocks(scale: float) -> list[tuple[str, nn.Layer]]:
    """Each block is a layer of its own in PaddleClas, not an entry of a row."""
    inputs = (STEM_WIDTH, *(row.width for row in ROWS[:-1]))
    return [
        (f"_ghostbottleneck_{index}", GhostBottleneck(_scaled(width_in, scale), row, scale))
        for index, (width_in, row) in enumerate(zip(inputs, ROWS, strict=True))
    ]


class GhostNet(nn.Sequential):
    """Logits [B, num_classes] from float32 [B, 3, H, W], at any H and W.

    scale: factor on all channels but the 1,280 features, rounded to multiples of 4.
    num_classes: at least 1.
    stem_stride: 2, or 1 for images of 32 px and less, where the first convolution keeps the size; same weights.
    dropout: share of the features dropped in training, in [0, 1), the others are scaled by 1 / (1 - dropout);
        evaluation does not depend on it (PaddleClas: 0.2).

    The last feature map is 1/32 of the image's side, or 1/16 with stem_stride 1. Raises RecipeError for other values.
    """

    head = "fc_1"
    features = "flatten"

    def __init__(self, scale: float, num_classes: int, stem_stride: int = 2, dropout: float = 0.2) -> None:
        check_classes("GhostNet", num_classes)
        check_stem_stride("GhostNet", stem_stride)
        check_dropout("GhostNet", dropout)
        last, squeezed = _scaled(ROWS[-1].width, scale), _scaled(ROWS[-1].expanded, scale)
        super().__init__(
            ("conv1", _conv_bn(3, _scaled(STEM_WIDTH, scale), 3, stem_stride, act=nn.ReLU)),
            *_blocks(scale),
            ("conv_last", _conv_bn(last, squeezed, 1, act=nn.ReLU)),
            ("pool2d_gap", nn.AdaptiveAvgPool2D(1)),
            ("fc_0", _conv_bn(squeezed, FEATURES, 1, act=nn.ReLU)),
            ("dropout", nn.Dropout(dropout)),
            ("flatten", nn.Flatten()),
            ("fc_1", uniform_linear(FEATURES, num_classes)),
        )


def _constructor(scale: float) -> Callable[..., GhostNet]:
    def construct(num_classes: int, stem_stride: int = 2, dropout: float = 0.2) -> GhostNet:
        return GhostNet(scale, num_classes, stem_stride, dropout)

    name = f"GhostNet_x{scale}".replace(".", "_")
    construct.__name__ = construct.__qualname__ = name
    construct.__doc__ = f"{name}: GhostNet with {scale} times the channels; see GhostNet."
    return construct


GhostNet_x1_0 = _constructor(1.0)
GhostNet_x1_3 = _constructor(1.3)
