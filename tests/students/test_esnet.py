"""ESNet: its numbers in float64 by name alone, the published size, its first values and what is decayed."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from paddle import nn

from ssld.errors import RecipeError
from ssld.train.momentum import Momentum

NAME = "ESNet_x1_0"
EXACT = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("test_numerics.py"))))
conv, conv_bn, relu, hard_swish = EXACT.conv, EXACT.conv_bn, EXACT.relu, EXACT.hard_swish


def active(weights, name, x):
    return hard_swish(conv_bn(weights, name, x))


def gated(weights, name, x):
    squeezed = x.mean((2, 3)) @ weights[f"{name}.conv1.weight"][:, :, 0, 0].T + weights[f"{name}.conv1.bias"]
    gate = relu(squeezed) @ weights[f"{name}.conv2.weight"][:, :, 0, 0].T + weights[f"{name}.conv2.bias"]
    return x * np.clip(gate / 6 + 0.5, 0, 1)[:, :, None, None]


def halving(weights, name, x):
    """The block of stride 2: a depthwise convolution halves in each branch, one more follows where they are joined."""
    plain = active(weights, f"{name}.pw_1", conv_bn(weights, f"{name}.dw_1", x, 2))
    y = conv_bn(weights, f"{name}.dw_2", active(weights, f"{name}.pw_2_1", x), 2)
    y = active(weights, f"{name}.pw_2_2", gated(weights, f"{name}.se", y))
    y = active(weights, f"{name}.concat_dw", np.concatenate([plain, y], 1))
    return active(weights, f"{name}.concat_pw", y)


def keeping(weights, name, x):
    """The block of stride 1: the second half is worked on, and at last the channels of both halves take turns."""
    half = x.shape[1] // 2
    y = active(weights, f"{name}.pw_1_1", x[:, half:])
    y = gated(weights, f"{name}.se", np.concatenate([y, conv_bn(weights, f"{name}.dw_1", y)], 1))
    mixed = np.empty_like(x)
    mixed[:, 0::2], mixed[:, 1::2] = x[:, :half], active(weights, f"{name}.pw_1_2", y)
    return mixed


def features(weights, x, stem_stride):
    x = EXACT.max_pool(hard_swish(conv_bn(weights, "conv1", x, stem_stride)))
    # as in ShuffleNetV2, table 5: 4, 8 and 4 blocks, of each stage one less
    for index in range(3 + 7 + 3):
        x = (halving if index in (0, 3, 10) else keeping)(weights, f"blocks.{index}", x)
    x = active(weights, "conv2", x)
    return hard_swish(conv(x.mean((2, 3), keepdims=True), weights["last_conv.weight"]))[:, :, 0, 0]


@pytest.mark.parametrize(
    ("size", "options", "stem_stride", "dropout"),
    [((64, 33), {}, 2, 0.2), ((32, 21), {"stem_stride": 1, "dropout": 0.5}, 1, 0.5)],
)
def test_features_and_logits(build, size, options, stem_stride, dropout):
    layer = build(NAME, 3, **options)
    weights, images = EXACT.randomize(layer), EXACT.drawn(2, 3, *size)
    seen = []
    getattr(layer, layer.features).register_forward_post_hook(lambda _layer, _in, out: seen.append(out.numpy()))
    logits = EXACT.evaluated(layer, images)
    expected = (1 - dropout) * features(weights, images.astype("float64"), stem_stride)
    EXACT.assert_equal_logits(seen[0], expected)
    EXACT.assert_equal_logits(logits, expected @ weights["fc.weight"] + weights["fc.bias"])


def test_total_is_the_published_one(build):
    """4.64 million for 1,000 classes with the statistics of batch norm, says PaddleClas's model list."""
    assert round(sum(value.size for value in build(NAME, 1000).state_dict().values()) / 1e6, 2) == 4.64


def test_every_layer_trains_by_our_kernels(build):
    layers = [layer for layer in build(NAME, 2).sublayers() if isinstance(layer, nn.Conv2D | nn.BatchNorm)]
    norms = [layer for layer in layers if isinstance(layer, nn.BatchNorm)]
    # two convolutions in each of 13 gates and the last one have no batch norm
    assert len(layers) == 2 * len(norms) + 2 * 13 + 1
    assert all(layer.trial() for layer in layers)
    assert {(layer._momentum, layer._epsilon) for layer in norms} == {(0.9, 1e-5)}


def test_first_values(build):
    """Kaiming's normal before a batch norm, also where that is depthwise; elsewhere paddle's default, here the same."""
    first = {key: value.numpy() for key, value in build(NAME, 50).state_dict().items()}
    convolutions = {key: weight for key, weight in first.items() if weight.ndim == 4}
    for key, weight in convolutions.items():
        expected = (2 / np.prod(weight.shape[1:])) ** 0.5
        assert weight.std() == pytest.approx(expected, rel=5 / (2 * weight.size) ** 0.5), key
    bound = (6 / (1280 + 50)) ** 0.5
    assert 0.99 * bound < np.abs(first["fc.weight"]).max() <= bound * (1 + 1e-6)
    assert not any(value.any() for key, value in first.items() if key.endswith("bias"))


def test_decay_spares_batch_norm_alone(build):
    """With a gradient of zero, a step of rate 0.5 and decay 0.1 shrinks what is decayed by a twentieth."""
    layer = build(NAME, 2)
    EXACT.randomize(layer)
    learned = {key: weight for key, weight in layer.named_parameters() if not weight.stop_gradient}
    before = {key: weight.numpy().copy() for key, weight in learned.items()}
    optimizer = Momentum(layer, weight_decay=0.1)
    for weight in learned.values():
        (weight.sum() * 0).backward()
    optimizer.step(0.5)
    for key, weight in learned.items():
        factor = 1 if ".bn." in key else 0.95
        np.testing.assert_allclose(weight.numpy(), factor * before[key], rtol=1e-6, atol=1e-12, err_msg=key)


def test_a_feature_is_dropped_or_kept_as_it_is_in_training(build):
    features = []
    for dropout in (0, 0.3):
        layer = build(NAME, 2, dropout=dropout)
        EXACT.randomize(layer)
        layer.flatten.register_forward_post_hook(lambda _layer, _in, out: features.append(out.numpy()))
        layer.train()
        with paddle.no_grad():
            layer(paddle.to_tensor(EXACT.drawn(2, 3, 64, 64)))
    whole, part = features
    gone = (part == 0) & (whole != 0)
    np.testing.assert_allclose(part[~gone], whole[~gone], rtol=1e-4, atol=1e-5 * np.abs(whole).max())
    assert gone.mean() == pytest.approx(0.3, abs=0.05)


@pytest.mark.parametrize(
    ("num_classes", "options", "got"),
    [
        (0, {}, "ESNet: expected num_classes of at least 1, got 0"),
        (2, {"stem_stride": 4}, "ESNet: expected stem_stride 2, or 1 .* got 4"),
        (2, {"dropout": 1}, r"ESNet: expected dropout in \[0, 1\), got 1;"),
    ],
)
def test_wrong_values_are_named(build, num_classes, options, got):
    with pytest.raises(RecipeError, match=got):
        build(NAME, num_classes, **options)
