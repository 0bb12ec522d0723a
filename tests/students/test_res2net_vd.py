"""Res2Net_vd: its numbers in float64, from weights by name alone."""

from __future__ import annotations

import runpy
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

EXACT = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("test_numerics.py"))))
relu = EXACT.relu
conv_bn = partial(EXACT.conv_bn, names=("_conv", "_batch_norm"))


def bottleneck(weights, name, x, filters, stride):
    """Gao et al. 2019, equation 1; filters: names of the 3x3 convolutions."""
    parts = np.split(relu(conv_bn(weights, f"{name}.conv0", x)), len(filters) + 1, axis=1)
    outs = []
    for each in filters:
        part = parts[len(outs)]
        # as in PaddleClas, a block that halves the size adds nothing
        part = part + outs[-1] if outs and stride == 1 else part
        outs.append(relu(conv_bn(weights, f"{name}.{each}", part, stride)))
    outs.append(parts[-1] if stride == 1 else EXACT.mean_pool(parts[-1], border=1))
    y = conv_bn(weights, f"{name}.conv2", np.concatenate(outs, 1))
    if f"{name}.short._conv.weight" in weights:
        x = conv_bn(weights, f"{name}.short", EXACT.mean_pool(x) if stride == 2 else x)
    return relu(x + y)


def res2net(weights, x, stem_stride):
    for index, stride in enumerate((stem_stride, 1, 1), 1):
        x = relu(conv_bn(weights, f"conv1_{index}", x, stride))
    x = EXACT.max_pool(x)
    for stage, depth in enumerate((3, 4, 6, 3)):
        for index in range(depth):
            filters = [f"res{stage + 2}{'abcdef'[index]}_branch2b_{scale}" for scale in (1, 2, 3)]
            x = bottleneck(weights, f"bb_{stage}_{index}", x, filters, 2 if stage and not index else 1)
    return x.mean((2, 3)) @ weights["out.weight"] + weights["out.bias"]


@pytest.mark.parametrize(("size", "stem_stride"), [((65, 33), 2), ((21, 18), 1)])
def test_logits_are_those_of_the_paper(build, size, stem_stride):
    layer = build("Res2Net50_vd_26w_4s", 4, stem_stride=stem_stride)
    weights, images = EXACT.randomize(layer), EXACT.drawn(1, 3, *size)
    expected = res2net(weights, images.astype("float64"), stem_stride)
    EXACT.assert_equal_logits(EXACT.evaluated(layer, images), expected)
