"""ResNet-D ("vd"): residual networks with a deep stem and shortcuts that pool before they project.

He et al. 2019, "Bag of Tricks", section 4.2, in the form that PaddleClas trains (ppcls/arch/backbone/legendary_models/
resnet.py): all but these two parts, and the weights' names, are those of ResNet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from paddle import nn

from .layers import conv_norm  # noqa: TID251
from .resnet import STEM_WIDTH, BasicBlock, Block, BottleneckBlock, ResNet, constructor  # noqa: TID251


def _stem(stride: int) -> nn.Sequential:
    half = STEM_WIDTH // 2
    widths = ((3, half, stride), (half, half, 1), (half, STEM_WIDTH, 1))
    return nn.Sequential(*(conv_norm(width_in, width, 3, each, act=nn.ReLU) for width_in, width, each in widths))


def shortcut(width_in: int, width: int, stride: int, names: tuple[str, str] = ("conv", "bn")) -> nn.Sequential:
    """Projection by a 1x1 convolution; a strided one averages 2x2 pixels first instead of skipping three of four.

    At odd sizes the last windows hold fewer pixels and are averaged over those alone. names: as for conv_norm.
    """
    pool = [("pool", nn.AvgPool2D(2, 2, ceil_mode=True))] if stride == 2 else []
    return nn.Sequential(*pool, *conv_norm(width_in, width, 1, names=names).named_children())


def _constructor(name: str, block: Block, depths: Sequence[int]) -> Callable[..., ResNet]:
    return constructor(name, _stem, block, depths, shortcut)


ResNet18_vd = _constructor("ResNet18_vd", BasicBlock, (2, 2, 2, 2))
ResNet34_vd = _constructor("ResNet34_vd", BasicBlock, (3, 4, 6, 3))
ResNet50_vd = _constructor("ResNet50_vd", BottleneckBlock, (3, 4, 6, 3))
ResNet101_vd = _constructor("ResNet101_vd", BottleneckBlock, (3, 4, 23, 3))
ResNet152_vd = _constructor("ResNet152_vd", BottleneckBlock, (3, 8, 36, 3))
ResNet200_vd = _constructor("ResNet200_vd", BottleneckBlock, (3, 12, 48, 3))
