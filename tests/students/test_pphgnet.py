"""PP-HGNet: its numbers in float64 by name alone, the published sizes, its first values and what is decayed."""

from __future__ import annotations

import runpy
from itertools import count, takewhile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from paddle import nn

from ssld.errors import RecipeError
from ssld.train.momentum import Momentum

# PaddleClas's model list, in millions, with the statistics of batch norm
PUBLISHED = {"PPHGNet_tiny": 14.75, "PPHGNet_small": 24.38}
EXACT = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("test_numerics.py"))))
conv, conv_bn, relu = EXACT.conv, EXACT.conv_bn, EXACT.relu


def present(weights, prefix, suffix):
    """prefix.0, prefix.1 and so on, as long as there are weights."""
    return takewhile(lambda name: f"{name}.{suffix}" in weights, (f"{prefix}.{index}" for index in count()))


def block(weights, name, x):
    kept = [x]
    for layer in present(weights, f"{name}.layers", "conv.weight"):
        kept.append(relu(conv_bn(weights, layer, kept[-1])))
    y = relu(conv_bn(weights, f"{name}.aggregation_conv", np.concatenate(kept, 1)))
    gate = y.mean((2, 3)) @ weights[f"{name}.att.conv.weight"][:, :, 0, 0].T + weights[f"{name}.att.conv.bias"]
    return y / (1 + np.exp(-gate))[:, :, None, None]


def features(weights, x, stem_stride):
    for name, stride in zip(present(weights, "stem", "conv.weight"), (stem_stride, 1, 1), strict=True):
        x = relu(conv_bn(weights, name, x, stride))
    x = EXACT.max_pool(x)
    for name in present(weights, "stages", "blocks.0.att.conv.bias"):
        x = conv_bn(weights, f"{name}.downsample", x, 2) if f"{name}.downsample.conv.weight" in weights else x
        first, *others = present(weights, f"{name}.blocks", "att.conv.bias")
        x = block(weights, first, x)
        for other in others:
            x = x + block(weights, other, x)
    return relu(conv(x.mean((2, 3), keepdims=True), weights["last_conv.weight"]))[:, :, 0, 0]


@pytest.fixture(scope="module")
def tiny(build):
    return build("PPHGNet_tiny", 3)


@pytest.mark.parametrize(
    ("name", "size", "stem_stride"),
    [("PPHGNet_tiny", (47, 65), 2), ("PPHGNet_tiny", (20, 32), 1), ("PPHGNet_small", (64, 32), 2)],
)
def test_features_and_logits(build, name, size, stem_stride):
    layer = build(name, 3, stem_stride=stem_stride)
    weights, images = EXACT.randomize(layer), EXACT.drawn(2, 3, *size)
    seen = []
    getattr(layer, layer.features).register_forward_post_hook(lambda _layer, _in, out: seen.append(out.numpy()))
    logits = EXACT.evaluated(layer, images)
    expected = features(weights, images.astype("float64"), stem_stride)
    EXACT.assert_equal_logits(seen[0], expected)
    EXACT.assert_equal_logits(logits, expected @ weights["fc.weight"] + weights["fc.bias"])
    total = sum(value.size for value in weights.values()) + (1000 - 3) * (2048 + 1)
    assert round(total / 1e6, 2) == PUBLISHED[name]


def test_every_layer_trains_by_our_kernels(tiny):
    layers = [layer for layer in tiny.sublayers() if isinstance(layer, nn.Conv2D | nn.BatchNorm)]
    norms = [layer for layer in layers if isinstance(layer, nn.BatchNorm)]
    # one gate in each of five blocks and the last convolution have no batch norm
    assert len(layers) == 2 * len(norms) + 5 + 1
    assert all(layer.trial() for layer in layers)
    assert {(layer._momentum, layer._epsilon) for layer in norms} == {(0.9, 1e-5)}


def test_first_values(build):
    """Kaiming's normal for every convolution: gates, depthwise ones, and the last as well."""
    first = {key: value.numpy() for key, value in build("PPHGNet_tiny", 50).state_dict().items()}
    convolutions = {key: weight for key, weight in first.items() if weight.ndim == 4}
    assert len(convolutions) == 3 + 3 + 5 * 7 + 1
    for key, weight in convolutions.items():
        expected = (2 / np.prod(weight.shape[1:])) ** 0.5
        assert weight.std() == pytest.approx(expected, rel=5 / (2 * weight.size) ** 0.5), key
    bound = (6 / (2048 + 50)) ** 0.5
    assert 0.99 * bound < np.abs(first["fc.weight"]).max() <= bound * (1 + 1e-6)
    assert not any(value.any() for key, value in first.items() if key.endswith("bias"))


def test_decay_spares_batch_norm_alone(tiny):
    """With a gradient of zero, a step of rate 0.5 and decay 0.1 shrinks what is decayed by a twentieth."""
    EXACT.randomize(tiny)
    learned = {key: weight for key, weight in tiny.named_parameters() if not weight.stop_gradient}
    before = {key: weight.numpy().copy() for key, weight in learned.items()}
    optimizer = Momentum(tiny, weight_decay=0.1)
    for weight in learned.values():
        (weight.sum() * 0).backward()
    optimizer.step(0.5)
    for key, weight in learned.items():
        factor = 1 if ".bn." in key else 0.95
        np.testing.assert_allclose(weight.numpy(), factor * before[key], rtol=1e-6, atol=1e-12, err_msg=key)


@pytest.mark.parametrize(
    ("num_classes", "options", "got"),
    [
        (0, {}, "PPHGNet: expected num_classes of at least 1, got 0"),
        (2, {"stem_stride": 4}, "PPHGNet: expected stem_stride 2, or 1 .* got 4"),
    ],
)
@pytest.mark.parametrize("name", PUBLISHED)
def test_wrong_values_are_named(build, name, num_classes, options, got):
    with pytest.raises(RecipeError, match=got):
        build(name, num_classes, **options)
