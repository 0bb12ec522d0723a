"""EfficientNet-B0: inverted residuals with gates, which are dropped at random in training.

Tan and Le 2019, "EfficientNet", table 1, in the form that PaddleClas trains (ppcls/arch/backbone/model_zoo/
efficientnet.py), whose weights' names it carries. As in TensorFlow, batch norm has a momentum of 0.99 and an epsilon of
1e-3, and a strided convolution begins as it would at an even side ("same" padding): here at every side, as there.

Weights start from paddle's defaults: convolutions from a normal distribution with variance 2 / (kernel area * channels
in), also where they are depthwise, the classifier from Xavier's uniform one. Everything is decayed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import paddle
from paddle import nn
from paddle.nn import functional as F

from ssld.errors import RecipeError
from ssld.train.convolution import Conv2D
from ssld.train.linear import Linear
from ssld.train.normalization import BatchNorm, ConvNorm

from .layers import check_classes, check_dropout, check_stem_stride  # noqa: TID251

STEM_WIDTH = 32
FEATURES = 1280
SQUEEZE = 4
"""What the channels before a block are divided by, to be those inside of its gate."""


class Row(NamedTuple):
    """One stage: kernel side, stride of its first block, expansion, channels out, blocks."""

    kernel: int
    stride: int
    expansion: int
    width: int
    blocks: int


B0 = (
    Row(3, 1, 1, 16, 1),
    Row(3, 2, 6, 24, 2),
    Row(5, 2, 6, 40, 2),
    Row(3, 2, 6, 80, 3),
    Row(5, 1, 6, 112, 3),
    Row(5, 2, 6, 192, 4),
    Row(3, 1, 6, 320, 1),
)


def same_padding(kernel: int, stride: int) -> tuple[int, int]:
    """Pixels before and after the image, of an odd kernel.

    They keep the size at stride 1. At stride 2 the first kernel begins where TensorFlow's does on an even side.

    >>> [same_padding(kernel, stride) for kernel, stride in ((1, 1), (3, 1), (5, 1), (3, 2), (5, 2))]
    [(0, 0), (1, 1), (2, 2), (0, 2), (1, 3)]
    """
    before = (kernel - stride) // 2
    return before, kernel // 2 if stride == 1 else before + stride


def _conv(width_in: int, width: int, kernel: int, stride: int = 1, groups: int = 1, bias: bool = False) -> nn.Layer:
    """A convolution under the name that PaddleClas wraps it in."""
    padding = [*same_padding(kernel, stride)] * 2
    conv = Conv2D(width_in, width, kernel, stride, padding=padding, groups=groups, bias_attr=None if bias else False)
    return nn.Sequential(("_conv", conv))


def _conv_bn(width_in: int, width: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    # not BatchNorm2D: the same numbers, but paddle 3.3.1 warns at every step of training
    bn = BatchNorm(width, momentum=0.99, epsilon=1e-3)
    return ConvNorm(("_conv", _conv(width_in, width, kernel, stride, groups)), ("_bn", bn))


class Gate(nn.Layer):
    """Scales each channel by a sigmoid that is computed from the means of all channels."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self._pool = nn.AdaptiveAvgPool2D(1)
        self._conv1 = _conv(width, inner, 1, bias=True)
        self._conv2 = _conv(inner, width, 1, bias=True)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return x * F.sigmoid(self._conv2(F.swish(self._conv1(self._pool(x)))))


class InvertedResidual(nn.Layer):
    """Expand by 1x1, filter each channel, gate, project by 1x1 without activation; add the input if the shape is kept.

    drop: share of the images, in [0, 1), whose block adds nothing in a step of training; what the others add is
        divided by 1 - drop (Huang et al. 2016, "Deep Networks with Stochastic Depth", scaled in training instead).
    """

    def __init__(self, width_in: int, row: Row, stride: int, drop: float) -> None:
        super().__init__()
        expanded = width_in * row.expansion
        expand = nn.Sequential(("_conv", _conv_bn(width_in, expanded, 1)), ("_act", nn.Swish()))
        self._ecn = expand if row.expansion > 1 else nn.Identity()
        self._dcn = nn.Sequential(("_conv", _conv_bn(expanded, expanded, row.kernel, stride, expanded)))
        self._se = Gate(expanded, width_in // SQUEEZE)
        self._pcn = nn.Sequential(("_conv", _conv_bn(expanded, row.width, 1)))
        self.residual = stride == 1 and width_in == row.width
        self.drop = drop

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        y = self._pcn(self._se(F.swish(self._dcn(self._ecn(x)))))
        # one draw for each image
        return x + F.dropout(y, self.drop, axis=0, training=self.training) if self.residual else y


class Body(nn.Layer):
    """The first convolution and all blocks; drop_connect is where the share of dropped images would be after the last.

    The names of the blocks are those of PaddleClas: the first of a stage is called otherwise than the rest of it.
    """

    def __init__(self, stem_stride: int, drop_connect: float) -> None:
        super().__init__()
        self._conv_stem = nn.Sequential(("_conv", _conv_bn(3, STEM_WIDTH, 3, stem_stride)))
        count, width_in = sum(row.blocks for row in B0), STEM_WIDTH
        self._order: list[str] = []
        for index, (row, first) in enumerate(_rows()):
            drop = drop_connect * index / count
            block = InvertedResidual(width_in, row, row.stride if first else 1, drop)
            self._order.append(f"{'_blocks' if first else 'block'}.{index}.")
            self.add_sublayer(self._order[-1], block)
            width_in = row.width

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        x = F.swish(self._conv_stem(x))
        for name in self._order:
            x = getattr(self, name)(x)
        return x


def _rows() -> Iterator[tuple[Row, bool]]:
    """The stage of each block, and whether it is the first of that."""
    return ((row, index == 0) for row in B0 for index in range(row.blocks))


class EfficientNet(nn.Layer):
    """Logits [B, num_classes] from float32 [B, 3, H, W], at any H and W.

    num_classes: at least 1.
    stem_stride: 2, or 1 for images of 32 px and less, where the first convolution keeps the size; same weights.
    dropout: share of the features dropped in training, in [0, 1); those that are kept are divided by 1 - dropout, so
        evaluation does not know it.
    drop_connect: share of the images that skip a block in training, in [0, 1), growing from 0 at the first block
        towards this one; evaluation does not know it.

    The last feature map is 1/32 of the image's side, or 1/16 with stem_stride 1. Raises RecipeError for other values.
    """

    head = "_fc"
    features = "_flatten"

    def __init__(self, num_classes: int, stem_stride: int = 2, dropout: float = 0.2, drop_connect: float = 0.2) -> None:
        super().__init__()
        check_classes("EfficientNet", num_classes)
        check_stem_stride("EfficientNet", stem_stride)
        check_dropout("EfficientNet", dropout)
        _check_drop_connect(drop_connect)
        self._ef = Body(stem_stride, drop_connect)
        self._conv = _conv_bn(B0[-1].width, FEATURES, 1)
        self._pool = nn.AdaptiveAvgPool2D(1)
        self._drop = nn.Dropout(dropout)
        self._flatten = nn.Flatten()
        self._fc = Linear(FEATURES, num_classes)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        x = F.swish(self._conv(self._ef(x)))
        return self._fc(self._flatten(self._drop(self._pool(x))))


def _check_drop_connect(share: float) -> None:
    if not (isinstance(share, int | float) and 0 <= share < 1):
        raise RecipeError(f"EfficientNet: expected drop_connect in [0, 1), got {share!r}; PaddleClas trains with 0.2")


def EfficientNetB0(
    num_classes: int, stem_stride: int = 2, dropout: float = 0.2, drop_connect: float = 0.2
) -> EfficientNet:
    """EfficientNetB0: 16 blocks; see EfficientNet."""
    return EfficientNet(num_classes, stem_stride, dropout, drop_connect)
