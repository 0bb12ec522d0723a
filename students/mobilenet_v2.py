"""MobileNetV2: blocks that expand, filter each channel and project without activation.

Sandler et al. 2018, table 2, in the form that PaddleClas trains (ppcls/arch/backbone/model_zoo/mobilenet_v2.py), whose
weights' names it carries. Activations are ReLU6, and the first block has its expansion though it expands nothing.
Weights start from paddle's defaults: convolutions from a normal distribution with variance 2 / (kernel area * channels
in), also where they are depthwise, the classifier from Xavier's uniform one.
"""

from __future__ import annotations

import paddle
from paddle import nn

from ssld.train.linear import Linear

from .layers import MODEL_ZOO, check_classes, check_stem_stride, conv_norm  # noqa: TID251

STEM_WIDTH = 32
FEATURES = 1280
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""Factor of the expansion, channels out, blocks, and stride of the first block."""


def _conv_bn(
    width_in: int, width: int, kernel: int, stride: int = 1, groups: int = 1, act: type[nn.Layer] | None = nn.ReLU6
) -> nn.Sequential:
    return conv_norm(width_in, width, kernel, stride, groups, act, names=MODEL_ZOO)


class InvertedResidual(nn.Layer):
    """Expand by 1x1, filter by 3x3, project by 1x1; all blocks of a stage but the first add their input."""

    def __init__(self, width_in: int, expansion: int, width: int, stride: int, residual: bool) -> None:
        super().__init__()
        expanded = width_in * expansion
        self._expand_conv = _conv_bn(width_in, expanded, 1)
        self._bottleneck_conv = _conv_bn(expanded, expanded, 3, stride, groups=expanded)
        self._linear_conv = _conv_bn(expanded, width, 1, act=None)
        self.residual = residual

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        y = self._linear_conv(self._bottleneck_conv(self._expand_conv(x)))
        return x + y if self.residual else y


def _stages() -> list[tuple[str, nn.Sequential]]:
    """conv2 to conv8, with the blocks _first_block, convN_2, convN_3 and so on."""
    stages = []
    width_in = STEM_WIDTH
    for number, (expansion, width, depth, stride) in enumerate(STAGES, 2):
        first = ("_first_block", InvertedResidual(width_in, expansion, width, stride, residual=False))
        rest = [
            (f"conv{number}_{block}", InvertedResidual(width, expansion, width, 1, residual=True))
            for block in range(2, depth + 1)
        ]
        stages.append((f"conv{number}", nn.Sequential(first, *rest)))
        width_in = width
    return stages


class MobileNetV2(nn.Sequential):
    """MobileNetV2: logits [B, num_classes] from float32 [B, 3, H, W], at any H and W.

    num_classes: at least 1.
    stem_stride: 2, or 1 for images of 32 px and less, where the first convolution keeps the size; same weights.

    The last feature map is 1/32 of the image's side, or 1/16 with stem_stride 1. Raises RecipeError for other values.
    """

    head = "out"
    features = "flatten"

    def __init__(self, num_classes: int, stem_stride: int = 2) -> None:
        check_classes("MobileNetV2", num_classes)
        check_stem_stride("MobileNetV2", stem_stride)
        super().__init__(
            ("conv1", _conv_bn(3, STEM_WIDTH, 3, stem_stride)),
            *_stages(),
            ("conv9", _conv_bn(STAGES[-1][1], FEATURES, 1)),
            ("pool2d_avg", nn.AdaptiveAvgPool2D(1)),
            ("flatten", nn.Flatten()),
            ("out", Linear(FEATURES, num_classes)),
        )
