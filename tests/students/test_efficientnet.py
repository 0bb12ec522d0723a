"""EfficientNet-B0: its numbers in float64 by name alone, its padding, what is dropped in training, its first values."""

from __future__ import annotations

import doctest
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from paddle import nn

from ssld.errors import RecipeError
from ssld.students import efficientnet
from ssld.students.efficientnet import InvertedResidual, Row, same_padding
from ssld.train.momentum import Momentum

NAME = "EfficientNetB0"
EXACT = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("test_numerics.py"))))

# the paper's table 1: stride and number of the blocks of each stage
STAGES = ((1, 1), (2, 2), (2, 2), (2, 3), (1, 3), (2, 4), (1, 1))


# Numbers -------------------------------------------------------------------------------------------------------------


def conv(x, weight, stride=1):
    """As TensorFlow pads an even side, whatever the side is: as many outputs as side / stride, rounded up."""
    kernel = weight.shape[-1]
    before = (kernel - stride) // 2
    # more than is ever read at the end
    border = (before, kernel)
    windows = np.lib.stride_tricks.sliding_window_view(
        np.pad(x, ((0, 0), (0, 0), border, border)), (kernel, kernel), (2, 3)
    )
    height, width = (-(-side // stride) for side in x.shape[2:])
    windows = windows[:, :, ::stride, ::stride][:, :, :height, :width]
    if weight.shape[1] == 1 < x.shape[1]:
        return np.einsum("bchwij,cij->bchw", windows, weight[:, 0])
    return np.moveaxis(np.tensordot(windows, weight, ([1, 4, 5], [1, 2, 3])), -1, 1)


def conv_bn(weights, name, x, stride=1):
    y = conv(x, weights[f"{name}._conv._conv.weight"], stride)
    mean, variance, scale, shift = (
        weights[f"{name}._bn.{key}"][:, None, None] for key in ("_mean", "_variance", "weight", "bias")
    )
    return scale / np.sqrt(variance + 1e-3) * (y - mean) + shift


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def swish(x):
    return x * sigmoid(x)


def dense(weights, name, x):
    return x @ weights[f"{name}._conv.weight"][:, :, 0, 0].T + weights[f"{name}._conv.bias"]


def block(weights, name, x, stride):
    y = swish(conv_bn(weights, f"{name}._ecn._conv", x)) if f"{name}._ecn._conv._bn.bias" in weights else x
    y = swish(conv_bn(weights, f"{name}._dcn._conv", y, stride))
    gate = dense(weights, f"{name}._se._conv2", swish(dense(weights, f"{name}._se._conv1", y.mean((2, 3)))))
    y = conv_bn(weights, f"{name}._pcn._conv", y * sigmoid(gate)[:, :, None, None])
    return x + y if x.shape == y.shape else y


def features(weights, x, stem_stride):
    x = swish(conv_bn(weights, "_ef._conv_stem._conv", x, stem_stride))
    index = 0
    for stride, count in STAGES:
        for within in range(count):
            name = f"_ef.{'block' if within else '_blocks'}.{index}."
            x = block(weights, name, x, 1 if within else stride)
            index += 1
    return swish(conv_bn(weights, "_conv", x)).mean((2, 3))


@pytest.mark.parametrize(
    ("size", "options", "stem_stride"),
    [((64, 33), {}, 2), ((47, 32), {"stem_stride": 1, "dropout": 0.5, "drop_connect": 0.9}, 1)],
)
def test_features_and_logits(build, size, options, stem_stride):
    layer = build(NAME, 3, **options)
    weights, images = EXACT.randomize(layer), EXACT.drawn(2, 3, *size)
    seen = []
    getattr(layer, layer.features).register_forward_post_hook(lambda _layer, _in, out: seen.append(out.numpy()))
    logits = EXACT.evaluated(layer, images)
    expected = features(weights, images.astype("float64"), stem_stride)
    EXACT.assert_equal_logits(seen[0], expected)
    EXACT.assert_equal_logits(logits, expected @ weights["_fc.weight"] + weights["_fc.bias"])


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("side", [2, 8, 14, 112])
def test_padding_begins_as_tensorflow_does_at_an_even_side(kernel, side):
    """TensorFlow pads so that side / 2 windows fit, and puts the smaller half before the image."""
    needed = (side // 2 - 1) * 2 + kernel - side
    before, after = same_padding(kernel, 2)
    assert before == needed // 2
    assert (side + before + after - kernel) // 2 + 1 == side // 2


def test_examples_run():
    assert doctest.testmod(efficientnet).attempted == 1
    assert doctest.testmod(efficientnet).failed == 0


# Training ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kernel", "size"), [(3, (9, 12)), (5, (12, 9))])
def test_gradients_of_a_strided_block_are_those_by_paddles_layers(monkeypatch, kernel, size):
    layer = InvertedResidual(8, Row(kernel, 2, 6, 16, 1), 2, 0.0)
    EXACT.randomize(layer)
    found = []
    for fast in ("1", "0"):
        monkeypatch.setenv("SSLD_FAST_CONV", fast)
        assert bool(layer._dcn[0][0][0].trial()) == (fast == "1")
        layer.clear_gradients()
        x = paddle.to_tensor(EXACT.drawn(4, 8, *size), stop_gradient=False)
        layer(x).square().mean().backward()
        gradients = {key: value.grad for key, value in layer.named_parameters() if not value.stop_gradient}
        found.append({"x": x.grad.numpy()} | {key: gradient.numpy() for key, gradient in gradients.items()})
    for key, theirs in found[1].items():
        np.testing.assert_allclose(found[0][key], theirs, rtol=0, atol=1e-4 * np.abs(theirs).max(), err_msg=key)


def test_an_image_skips_a_block_or_gets_more_of_it():
    """With a share of 0.4 two images in five pass as they are, the others get 1 / 0.6 of what the block adds."""
    x = EXACT.drawn(200, 8, 2, 2)
    answers = []
    for drop in (0, 0.4):
        layer = InvertedResidual(8, Row(3, 1, 6, 8, 1), 1, drop)
        EXACT.randomize(layer)
        with paddle.no_grad():
            answers.append(layer(paddle.to_tensor(x)).numpy() - x)
    whole, part = answers
    skipped = ~part.any((1, 2, 3))
    np.testing.assert_allclose(part[~skipped], whole[~skipped] / 0.6, rtol=1e-4, atol=1e-4)
    assert skipped.mean() == pytest.approx(0.4, abs=0.1)


def test_the_share_of_skipped_blocks_grows_by_depth(build):
    layer = build(NAME, 2, drop_connect=0.32)
    drops = [part.drop for part in layer.sublayers() if isinstance(part, InvertedResidual)]
    np.testing.assert_allclose(drops, np.arange(16) * 0.02)


def test_features_that_are_kept_in_training_are_scaled(build):
    features = []
    for dropout in (0, 0.3):
        layer = build(NAME, 2, dropout=dropout, drop_connect=0)
        EXACT.randomize(layer)
        layer._flatten.register_forward_post_hook(lambda _layer, _in, out: features.append(out.numpy()))
        with paddle.no_grad():
            layer(paddle.to_tensor(EXACT.drawn(2, 3, 64, 64)))
    whole, part = features
    gone = part == 0
    np.testing.assert_allclose(part[~gone], whole[~gone] / 0.7, rtol=1e-4, atol=1e-5 * np.abs(whole).max())
    assert gone.mean() == pytest.approx(0.3, abs=0.05)


def test_every_layer_trains_by_our_kernels(build):
    layers = [layer for layer in build(NAME, 2).sublayers() if isinstance(layer, nn.Conv2D | nn.BatchNorm)]
    norms = [layer for layer in layers if isinstance(layer, nn.BatchNorm)]
    # two convolutions in each of 16 gates have no batch norm
    assert len(layers) == 2 * len(norms) + 2 * 16
    assert all(layer.trial() for layer in layers)
    assert {(layer._momentum, layer._epsilon) for layer in norms} == {(0.99, 1e-3)}


# Weights -------------------------------------------------------------------------------------------------------------


def test_total_is_the_published_one(build):
    """5.3 million, says the paper's table 2."""
    learned = [weight for weight in build(NAME, 1000).parameters() if not weight.stop_gradient]
    assert round(sum(weight.size for weight in learned) / 1e6, 1) == 5.3


def test_first_values(build):
    """Paddle's default: the variance falls with the channels of the image, also where a filter reads one of them."""
    first = {key: value.numpy() for key, value in build(NAME, 50).state_dict().items()}
    for key, weight in first.items():
        if weight.ndim == 4:
            channels = len(weight) if "_dcn" in key else weight.shape[1]
            expected = (2 / (channels * np.prod(weight.shape[2:]))) ** 0.5
            assert weight.std() == pytest.approx(expected, rel=5 / (2 * weight.size) ** 0.5), key
    bound = (6 / (1280 + 50)) ** 0.5
    assert 0.99 * bound < np.abs(first["_fc.weight"]).max() <= bound * (1 + 1e-6)


def test_everything_is_decayed(build):
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
        np.testing.assert_allclose(weight.numpy(), 0.95 * before[key], rtol=1e-6, atol=1e-12, err_msg=key)


@pytest.mark.parametrize(
    ("num_classes", "options", "got"),
    [
        (0, {}, "EfficientNet: expected num_classes of at least 1, got 0"),
        (2, {"stem_stride": 4}, "EfficientNet: expected stem_stride 2, or 1 .* got 4"),
        (2, {"dropout": 1}, r"EfficientNet: expected dropout in \[0, 1\), got 1;"),
        (2, {"drop_connect": -0.1}, r"EfficientNet: expected drop_connect in \[0, 1\), got -0\.1;"),
        (2, {"drop_connect": None}, r"EfficientNet: expected drop_connect in \[0, 1\), got None;"),
    ],
)
def test_wrong_values_are_named(build, num_classes, options, got):
    with pytest.raises(RecipeError, match=got):
        build(NAME, num_classes, **options)
