"""ResNeXt-101 32x8d and 32x16d as trained with weak supervision ("WSL"): the first teachers of SSLD.

Xie et al. 2017, "Aggregated residual transformations", as Mahajan et al. 2018 trained it on tagged photographs. The
shape is torchvision's, with the stride on the 3x3 convolution; the weights carry the names that PaddleClas gives them
(ppcls/arch/backbone/model_zoo/resnext101_wsl.py). Facebook's own weights are for non-commercial use (CC BY-NC 4.0).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import paddle
from paddle import nn
from paddle.nn import functional as F

from ssld.train.linear import Linear

from .layers import check_classes, conv_norm  # noqa: TID251

GROUPS = 32
STEM_WIDTH = 64
STAGE_WIDTHS = (256, 512, 1024, 2048)
DEPTHS = (3, 4, 23, 3)


_conv_bn = partial(conv_norm, names=("_conv", "_bn"))


class Block(nn.Layer):
    """1x1, grouped 3x3 and 1x1 convolutions; the stride is on the 3x3.

    width_in, inner, width: channels before, inside and after the block. The shortcut projects where the shape changes.
    """

    def __init__(self, width_in: int, inner: int, width: int, stride: int) -> None:
        super().__init__()
        self._conv0 = _conv_bn(width_in, inner, 1, act=nn.ReLU)
        self._conv1 = _conv_bn(inner, inner, 3, stride, GROUPS, nn.ReLU)
        self._conv2 = _conv_bn(inner, width, 1)
        projected = width_in != width or stride != 1
        # PaddleClas wraps the projection once more
        short = [("_conv", _conv_bn(width_in, width, 1, stride))] if projected else []
        self._short = nn.Sequential(*short)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return F.relu(self._conv2(self._conv1(self._conv0(x))) + self._short(x))


class ResNeXtWsl(nn.Layer):
    """Logits [B, num_classes] from float32 [B, 3, H, W], at any H and W.

    group_width: channels of each of the 32 groups in the first stage, doubled from stage to stage.
    num_classes: at least 1.
    depths: blocks in each of the four stages.

    The last feature map is 1/32 of the image's side. Raises RecipeError for other values.
    """

    head = "_out"
    features = "_flatten"

    def __init__(self, group_width: int, num_classes: int, depths: Sequence[int] = DEPTHS) -> None:
        super().__init__()
        check_classes("ResNeXt_wsl", num_classes)
        self._conv_stem = _conv_bn(3, STEM_WIDTH, 7, 2, act=nn.ReLU)
        self._max_pool = nn.MaxPool2D(3, 2, 1)
        self._order = self._add_blocks(group_width, depths)
        self._avg_pool = nn.AdaptiveAvgPool2D(1)
        self._flatten = nn.Flatten()
        self._out = Linear(STAGE_WIDTHS[-1], num_classes)

    def _add_blocks(self, group_width: int, depths: Sequence[int]) -> tuple[str, ...]:
        """The names of the blocks, in order; each is a layer of its own in PaddleClas, not an entry of a row."""
        order: list[str] = []
        width_in = STEM_WIDTH
        for stage, (width, depth) in enumerate(zip(STAGE_WIDTHS, depths, strict=True)):
            for index in range(depth):
                stride = 2 if index == 0 and stage > 0 else 1
                order.append(f"_conv{stage + 1}_{index}")
                self.add_sublayer(order[-1], Block(width_in, GROUPS * group_width * 2**stage, width, stride))
                width_in = width
        return tuple(order)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        x = self._max_pool(self._conv_stem(x))
        for name in self._order:
            x = getattr(self, name)(x)
        return self._out(self._flatten(self._avg_pool(x)))


def _constructor(name: str, group_width: int) -> Callable[..., ResNeXtWsl]:
    def construct(num_classes: int) -> ResNeXtWsl:
        return ResNeXtWsl(group_width, num_classes)

    construct.__name__ = construct.__qualname__ = name
    construct.__doc__ = f"{name}: 101 layers, {GROUPS} groups of {group_width} channels; see ResNeXtWsl."
    return construct


ResNeXt101_32x8d_wsl = _constructor("ResNeXt101_32x8d_wsl", 8)
ResNeXt101_32x16d_wsl = _constructor("ResNeXt101_32x16d_wsl", 16)
