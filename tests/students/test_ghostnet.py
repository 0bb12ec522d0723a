"""GhostNet: its numbers in float64, from weights by name alone, the rounding of its channels, and its dropout."""

from __future__ import annotations

import runpy
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import paddle
import pytest

from ssld.students import ghostnet

EXACT = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("test_numerics.py"))))
relu = EXACT.relu
conv_bn = partial(EXACT.conv_bn, names=("_conv", "_batch_norm"))

# Han et al. 2020, table 1: blocks of stride 2, counted from 0
HALVING = {1, 3, 5, 11}
BLOCKS = 16


def ghost(weights, name, x, act):
    primary = act(conv_bn(weights, f"{name}.primary_conv", x))
    return np.concatenate([primary, act(conv_bn(weights, f"{name}.cheap_operation", primary))], 1)


def gated(weights, name, x):
    squeezed = relu(x.mean((2, 3)) @ weights[f"{name}.squeeze.weight"] + weights[f"{name}.squeeze.bias"])
    gate = squeezed @ weights[f"{name}.excitation.weight"] + weights[f"{name}.excitation.bias"]
    return x * np.clip(gate, 0, 1)[:, :, None, None]


def bottleneck(weights, name, x, stride):
    y = ghost(weights, f"{name}.ghost_module_1", x, relu)
    if stride == 2:
        y = conv_bn(weights, f"{name}.depthwise_conv", y, 2)
    if f"{name}.se_block.squeeze.weight" in weights:
        y = gated(weights, f"{name}.se_block", y)
    y = ghost(weights, f"{name}.ghost_module_2", y, lambda z: z)
    if stride == 2 or x.shape[1] != y.shape[1]:
        x = conv_bn(weights, f"{name}.shortcut_conv", conv_bn(weights, f"{name}.shortcut_depthwise", x, stride))
    return x + y


def ghostnet_logits(weights, x, stem_stride):
    x = relu(conv_bn(weights, "conv1", x, stem_stride))
    for index in range(BLOCKS):
        x = bottleneck(weights, f"_ghostbottleneck_{index}", x, 2 if index in HALVING else 1)
    x = relu(conv_bn(weights, "conv_last", x)).mean((2, 3), keepdims=True)
    return relu(conv_bn(weights, "fc_0", x))[:, :, 0, 0] @ weights["fc_1.weight"] + weights["fc_1.bias"]


@pytest.mark.parametrize("dropout", [0.2, 0.5])
@pytest.mark.parametrize(("size", "stem_stride"), [((64, 64), 2), ((33, 47), 1)])
def test_logits_are_those_of_the_paper(build, size, stem_stride, dropout):
    layer = build("GhostNet_x1_0", 4, stem_stride=stem_stride, dropout=dropout)
    weights, images = EXACT.randomize(layer), EXACT.drawn(2, 3, *size)
    expected = ghostnet_logits(weights, images.astype("float64"), stem_stride)
    EXACT.assert_equal_logits(EXACT.evaluated(layer, images), expected)


def test_the_gate_is_cut_off_at_both_ends():
    layer = ghostnet.SqueezeExcite(16)
    weights = {f"se.{key}": value for key, value in EXACT.randomize(layer).items()}
    x = 1 + EXACT.drawn(8, 16, 3, 3) ** 2
    expected = gated(weights, "se", x.astype("float64"))
    gate = expected / x
    assert (gate == 0).any()
    assert (gate == 1).any()
    assert ((gate > 0.05) & (gate < 0.95)).any()
    np.testing.assert_allclose(EXACT.evaluated(layer, x), expected, rtol=1e-4, atol=1e-4)


def test_in_training_a_feature_is_dropped_or_scaled_up(build):
    kept, dropped = (build("GhostNet_x1_0", 2, dropout=dropout) for dropout in (0, 0.2))
    images, features = paddle.to_tensor(EXACT.drawn(8, 3, 32, 32)), []
    for layer in (kept, dropped):
        EXACT.randomize(layer)
        layer.flatten.register_forward_post_hook(lambda _layer, _in, out: features.append(out.numpy()))
        layer.train()
        with paddle.no_grad():
            paddle.seed(0)
            layer(images)
    whole, part = features
    gone = (part == 0) & (whole != 0)
    np.testing.assert_allclose(part[~gone], whole[~gone] / 0.8, rtol=1e-4, atol=1e-5)
    assert gone.sum() / (whole != 0).sum() == pytest.approx(0.2, abs=0.02)
