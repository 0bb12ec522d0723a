"""HRNet-W18-C: maps of four resolutions side by side, which exchange what they found and end in one classifier.

Wang et al. 2019, "Deep High-Resolution Representation Learning for Visual Recognition", section 3 and the classifier of
its appendix, in the form that PaddleClas trains (ppcls/arch/backbone/legendary_models/hrnet.py), whose weights' names
it carries: small maps are enlarged by repeating pixels. Convolutions start from paddle's default, a normal distribution
with variance 2 / (kernel area * channels in), and everything is decayed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import paddle
from paddle import nn
from paddle.nn import functional as F

from .layers import check_classes, check_stem_stride, conv_norm, uniform_linear  # noqa: TID251

STEM_WIDTH = 64
MODULES = (1, 4, 3)
"""How often the stages of two, three and four resolutions exchange."""
BLOCKS = 4
HEAD_WIDTHS = (32, 64, 128, 256)
FEATURES = 2048

Maps = list[paddle.Tensor]


class BasicBlock(nn.Layer):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = conv_norm(width, width, 3, act=nn.ReLU)
        self.conv2 = conv_norm(width, width, 3)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return F.relu(x + self.conv2(self.conv1(x)))


class Bottleneck(nn.Layer):
    """1x1, 3x3 and 1x1 convolutions, the last four times as wide; the shortcut projects where the width changes."""

    expansion = 4

    def __init__(self, width_in: int, inner: int) -> None:
        super().__init__()
        width = inner * self.expansion
        self.conv1 = conv_norm(width_in, inner, 1, act=nn.ReLU)
        self.conv2 = conv_norm(inner, inner, 3, act=nn.ReLU)
        self.conv3 = conv_norm(inner, width, 1)
        self.conv_down = nn.Identity() if width_in == width else conv_norm(width_in, width, 1)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return F.relu(self.conv_down(x) + self.conv3(self.conv2(self.conv1(x))))


def _halvings(width_in: int, width: int, count: int) -> list[nn.Layer]:
    """3x3 convolutions with stride 2; the last alone changes the width, and has no activation."""
    narrow = [conv_norm(width_in, width_in, 3, 2, act=nn.ReLU) for _ in range(count - 1)]
    return [*narrow, conv_norm(width_in, width, 3, 2)]


def _enlarged(x: paddle.Tensor, factor: int, like: paddle.Tensor) -> paddle.Tensor:
    """Each pixel repeated factor times in both directions, cut to the size of the map that it is added to.

    Where every halving was of an even side nothing is cut; PaddleClas's class takes no other images.
    """
    # not by interpolate: paddle 3.3.1 cannot run that by oneDNN in an exported program
    x = x.unsqueeze([3, 5]).expand([-1, -1, -1, factor, -1, factor]).flatten(4, 5).flatten(2, 3)
    height, width = like.shape[2:]
    return x if x.shape[2:] == like.shape[2:] else x[:, :, :height, :width]


class Fusion(nn.Layer):
    """Each resolution becomes the sum of all, brought to its size: by strided convolutions, or enlarged."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.residual_func_list = nn.LayerList()
        self._paths = [[self._add(widths, scale, to) for scale in range(len(widths))] for to in range(len(widths))]

    def _add(self, widths: Sequence[int], scale: int, to: int) -> range:
        """Make the layers from one resolution to another; returns their places in the list, none from one to itself."""
        first = len(self.residual_func_list)
        if scale > to:
            self.residual_func_list.append(conv_norm(widths[scale], widths[to], 1))
        elif scale < to:
            self.residual_func_list.extend(_halvings(widths[scale], widths[to], to - scale))
        return range(first, len(self.residual_func_list))

    def forward(self, maps: Maps) -> Maps:
        return [self._fused(maps, to) for to in range(len(maps))]

    def _fused(self, maps: Maps, to: int) -> paddle.Tensor:
        total = maps[to]
        for scale, path in enumerate(self._paths[to]):
            if scale != to:
                x = maps[scale]
                for place in path:
                    x = self.residual_func_list[place](x)
                total = total + (_enlarged(x, 2 ** (scale - to), total) if scale > to else x)
        return F.relu(total)


class Module(nn.Layer):
    """Four blocks on each map, largest map first, then an exchange between all."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        rows = (nn.Sequential(*(BasicBlock(width) for _ in range(BLOCKS))) for width in widths)
        self.basic_block_list = nn.LayerList(rows)
        self.fuse_func = Fusion(widths)

    def forward(self, maps: Maps) -> Maps:
        return self.fuse_func([row(maps[scale]) for scale, row in enumerate(self.basic_block_list)])


def _stage(widths: Sequence[int], modules: int) -> nn.Sequential:
    return nn.Sequential(("stage_func_list", nn.Sequential(*(Module(widths) for _ in range(modules)))))


class Widening(nn.Layer):
    """A bottleneck on each map: 128, 256, 512 and 1,024 channels for the classifier."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        pairs = zip(widths, HEAD_WIDTHS, strict=True)
        self.func_list = nn.LayerList(Bottleneck(width_in, inner) for width_in, inner in pairs)

    def forward(self, maps: Maps) -> Maps:
        return [block(maps[scale]) for scale, block in enumerate(self.func_list)]


class HRNet(nn.Layer):
    """Logits [B, num_classes] from float32 [B, 3, H, W], at any H and W.

    width: channels of the largest map, at a quarter of the image's side; each further one has half of the side and
        twice the channels.
    num_classes: at least 1.
    stem_stride: 2, or 1 for images of 32 px and less, where the first convolution keeps the size; same weights.
    modules: how often the stages of two, three and four resolutions exchange.

    The last feature map is 1/32 of the image's side, or 1/16 with stem_stride 1. Raises RecipeError for other values.
    """

    head = "fc"
    features = "flatten"

    def __init__(
        self, width: int, num_classes: int, stem_stride: int = 2, modules: tuple[int, int, int] = MODULES
    ) -> None:
        super().__init__()
        check_classes("HRNet", num_classes)
        check_stem_stride("HRNet", stem_stride)
        widths = [width * 2**scale for scale in range(4)]
        first = STEM_WIDTH * Bottleneck.expansion
        self.conv_layer1_1 = conv_norm(3, STEM_WIDTH, 3, stem_stride, act=nn.ReLU)
        self.conv_layer1_2 = conv_norm(STEM_WIDTH, STEM_WIDTH, 3, 2, act=nn.ReLU)
        self.layer1 = nn.Sequential(*(Bottleneck(first if index else STEM_WIDTH, STEM_WIDTH) for index in range(4)))
        self.conv_tr1_1 = conv_norm(first, widths[0], 3, act=nn.ReLU)
        self.conv_tr1_2 = conv_norm(first, widths[1], 3, 2, act=nn.ReLU)
        self.st2 = _stage(widths[:2], modules[0])
        self.conv_tr2 = conv_norm(widths[1], widths[2], 3, 2, act=nn.ReLU)
        self.st3 = _stage(widths[:3], modules[1])
        self.conv_tr3 = conv_norm(widths[2], widths[3], 3, 2, act=nn.ReLU)
        self.st4 = _stage(widths, modules[2])
        self.last_cls = Widening(widths)
        outs = [inner * Bottleneck.expansion for inner in HEAD_WIDTHS]
        self.cls_head_conv_list = nn.LayerList(
            conv_norm(fine, coarse, 3, 2, act=nn.ReLU) for fine, coarse in pairwise(outs)
        )
        self.conv_last = conv_norm(outs[-1], FEATURES, 1, act=nn.ReLU)
        self.avg_pool = nn.AdaptiveAvgPool2D(1)
        self.flatten = nn.Flatten()
        self.fc = uniform_linear(FEATURES, num_classes)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        x = self.layer1(self.conv_layer1_2(self.conv_layer1_1(x)))
        maps = self.st2([self.conv_tr1_1(x), self.conv_tr1_2(x)])
        maps = self.st3([*maps, self.conv_tr2(maps[-1])])
        maps = self.last_cls(self.st4([*maps, self.conv_tr3(maps[-1])]))
        x = maps[0]
        for scale, halve in enumerate(self.cls_head_conv_list):
            x = maps[scale + 1] + halve(x)
        return self.fc(self.flatten(self.avg_pool(self.conv_last(x))))


def HRNet_W18_C(num_classes: int, stem_stride: int = 2) -> HRNet:
    """HRNet_W18_C: 18, 36, 72 and 144 channels at four resolutions; see HRNet."""
    return HRNet(18, num_classes, stem_stride)
