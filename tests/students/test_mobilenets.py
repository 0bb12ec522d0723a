"""MobileNetV1 and MobileNetV2: their numbers in float64, from weights by name alone."""

from __future__ import annotations

import runpy
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

EXACT = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("test_numerics.py"))))
conv_bn, relu = EXACT.conv_bn, EXACT.relu
zoo_conv_bn = partial(conv_bn, names=("_conv", "_batch_norm"))

SIZES = [((64, 64), 2), ((33, 47), 2), ((21, 17), 1)]
# Howard et al. 2017, table 1: depthwise convolutions of stride 2, counted from 0; the last, misprinted one is not
HALVING = {1, 3, 5, 11}


def mobilenet_v1(weights, x, stem_stride):
    x = relu(conv_bn(weights, "conv", x, stem_stride))
    for index in range(13):
        x = relu(conv_bn(weights, f"blocks.{index}.depthwise_conv", x, 2 if index in HALVING else 1))
        x = relu(conv_bn(weights, f"blocks.{index}.pointwise_conv", x))
    return x.mean((2, 3)) @ weights["fc.weight"] + weights["fc.bias"]


def relu6(x):
    return np.clip(x, 0, 6)


def mobilenet_v2(weights, x, stem_stride):
    """Sandler et al. 2018, table 2: the repeats of each row, and the stride of its first block."""
    x = relu6(zoo_conv_bn(weights, "conv1", x, stem_stride))
    for number, (repeats, stride) in enumerate(((1, 1), (2, 2), (3, 2), (4, 2), (3, 1), (3, 2), (1, 1)), 2):
        x = inverted_residual(weights, f"conv{number}._first_block", x, stride)
        for repeat in range(2, repeats + 1):
            x = inverted_residual(weights, f"conv{number}.conv{number}_{repeat}", x, 1)
    x = relu6(zoo_conv_bn(weights, "conv9", x))
    return x.mean((2, 3)) @ weights["out.weight"] + weights["out.bias"]


def inverted_residual(weights, name, x, stride):
    """The paper's figure 4 and section 4: a shortcut where stride and channels allow one."""
    y = relu6(zoo_conv_bn(weights, f"{name}._expand_conv", x))
    y = relu6(zoo_conv_bn(weights, f"{name}._bottleneck_conv", y, stride))
    y = zoo_conv_bn(weights, f"{name}._linear_conv", y)
    return x + y if stride == 1 and x.shape == y.shape else y


@pytest.mark.parametrize(("name", "exact"), [("MobileNetV1", mobilenet_v1), ("MobileNetV2", mobilenet_v2)])
@pytest.mark.parametrize(("size", "stem_stride"), SIZES)
def test_logits_are_those_of_the_paper(build, name, exact, size, stem_stride):
    layer = build(name, 4, stem_stride=stem_stride)
    # wide enough that ReLU6 cuts off what ReLU would not
    weights, images = EXACT.randomize(layer), 3 * EXACT.drawn(2, 3, *size)
    expected = exact(weights, images.astype("float64"), stem_stride)
    EXACT.assert_equal_logits(EXACT.evaluated(layer, images), expected)
