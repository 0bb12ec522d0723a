"""ResNeXt-101 WSL: PaddleClas's names and shapes without memory, and the numbers of a small one in float64."""

from __future__ import annotations

import math
from importlib.metadata import entry_points

import numpy as np
import paddle
import pytest
from paddle import nn

from ssld.errors import RecipeError
from ssld.students import resnext_wsl

# PaddleClas's model list, in millions; the 522 arrays are its state dict
PUBLISHED = {"ResNeXt101_32x8d_wsl": (8, 88.99), "ResNeXt101_32x16d_wsl": (16, 194.36)}
SMALL_DEPTHS = (2, 1, 2, 1)


def paddleclas(group_width, classes, depths=(3, 4, 23, 3)):
    """Names and shapes as ppcls/arch/backbone/model_zoo/resnext101_wsl.py builds them."""
    shapes = {}

    def conv_bn(name, *conv):
        shapes[f"{name}._conv.weight"] = conv
        for part in ("weight", "bias", "_mean", "_variance"):
            shapes[f"{name}._bn.{part}"] = conv[:1]

    conv_bn("_conv_stem", 64, 3, 7, 7)
    last = 64
    for stage, depth in enumerate(depths, 1):
        inner, out = 32 * group_width * 2 ** (stage - 1), 256 * 2 ** (stage - 1)
        for block in range(depth):
            name = f"_conv{stage}_{block}"
            conv_bn(f"{name}._conv0", inner, last, 1, 1)
            conv_bn(f"{name}._conv1", inner, inner // 32, 3, 3)
            conv_bn(f"{name}._conv2", out, inner, 1, 1)
            if block == 0:
                conv_bn(f"{name}._short._conv", out, last, 1, 1)
            last = out
    return shapes | {"_out.weight": (2048, classes), "_out.bias": (classes,)}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("classes", [1000, 5])
def test_names_and_shapes_are_those_of_paddleclas(name, classes):
    group_width, millions = PUBLISHED[name]
    (found,) = entry_points(group="ssld.students", name=name)
    with paddle.LazyGuard():  # shapes without memory
        layer = found.load()(classes)
    shapes = {key: tuple(value.shape) for key, value in layer.state_dict().items()}
    assert shapes == paddleclas(group_width, classes)
    assert len(shapes) == 522
    total = sum(math.prod(shape) for shape in shapes.values()) - (classes - 1000) * 2049
    assert round(total / 1e6, 2) == millions
    assert isinstance(getattr(layer, layer.head), nn.Linear)
    assert isinstance(getattr(layer, layer.features), nn.Flatten)
    assert found.load().__doc__.startswith(name)


def conv(x, weight, stride=1):
    """x [B, C, H, W], weight [O, C / groups, k, k]; padded by k // 2."""
    side, groups = weight.shape[-1], x.shape[1] // weight.shape[1]
    border = (side // 2, side // 2)
    windows = np.lib.stride_tricks.sliding_window_view(
        np.pad(x, ((0, 0), (0, 0), border, border)), (side, side), (2, 3)
    )[:, :, ::stride, ::stride]
    parts = zip(np.split(windows, groups, axis=1), np.split(weight, groups), strict=True)
    return np.concatenate([np.einsum("bchwij,ocij->bohw", part, kernel) for part, kernel in parts], axis=1)


def conv_bn(weights, name, x, stride=1):
    y = conv(x, weights[f"{name}._conv.weight"], stride)
    mean, variance, scale, shift = (
        weights[f"{name}._bn.{key}"][:, None, None] for key in ("_mean", "_variance", "weight", "bias")
    )
    return scale / np.sqrt(variance + 1e-5) * (y - mean) + shift


def max_pool(x):
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
    return np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))[:, :, ::2, ::2].max((-1, -2))


def relu(x):
    return np.maximum(x, 0)


def features(weights, x):
    """The stride of the second, third and fourth stage is on their first 3x3 convolution."""
    x = max_pool(relu(conv_bn(weights, "_conv_stem", x, 2)))
    for stage, depth in enumerate(SMALL_DEPTHS, 1):
        for block in range(depth):
            name, stride = f"_conv{stage}_{block}", 2 if block == 0 and stage > 1 else 1
            y = relu(conv_bn(weights, f"{name}._conv0", x))
            y = relu(conv_bn(weights, f"{name}._conv1", y, stride))
            y = conv_bn(weights, f"{name}._conv2", y)
            x = relu(y + (conv_bn(weights, f"{name}._short._conv", x, stride) if block == 0 else x))
    return x.mean((2, 3))


def drawn(shapes):
    """Weights under which every part matters: convolutions keep the signal's size, statistics are not 0 and 1."""
    draw = np.random.default_rng(0)
    weights = {}
    for key, shape in shapes.items():
        if len(shape) > 1:
            fan_in = shape[0] if len(shape) == 2 else math.prod(shape[1:])
            weights[key] = draw.normal(0, (2 / fan_in) ** 0.5, shape)
        elif key.endswith(("_variance", "_bn.weight")):
            weights[key] = draw.uniform(0.5, 1.5, shape)
        else:
            weights[key] = draw.normal(0, 0.5, shape)
    return {key: value.astype(np.float32) for key, value in weights.items()}


@pytest.mark.parametrize("size", [(33, 65), (64, 32)])
def test_logits_and_features_of_a_small_one(size):
    """Two channels a group and six blocks; odd sizes as well."""
    layer = resnext_wsl.ResNeXtWsl(2, 3, SMALL_DEPTHS)
    weights = drawn(paddleclas(2, 3, SMALL_DEPTHS))
    missing, unexpected = layer.set_state_dict({key: paddle.to_tensor(value) for key, value in weights.items()})
    assert (missing, unexpected) == ([], [])
    images = np.random.default_rng(1).normal(size=(2, 3, *size)).astype(np.float32)
    seen = []
    getattr(layer, layer.features).register_forward_post_hook(lambda _layer, _inputs, output: seen.append(output))
    layer.eval()
    with paddle.no_grad():
        logits = layer(paddle.to_tensor(images)).numpy()
    exact = {key: value.astype(np.float64) for key, value in weights.items()}
    expected = features(exact, images.astype(np.float64))
    np.testing.assert_allclose(seen[0].numpy(), expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    expected = expected @ exact["_out.weight"] + exact["_out.bias"]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_batch_norms_have_paddles_constants():
    with paddle.LazyGuard():
        layer = resnext_wsl.ResNeXtWsl(2, 3, SMALL_DEPTHS)
    norms = [part for part in layer.sublayers() if isinstance(part, nn.BatchNorm)]
    assert len(norms) == 1 + 3 * sum(SMALL_DEPTHS) + 4
    assert {(norm._momentum, norm._epsilon) for norm in norms} == {(0.9, 1e-5)}


@pytest.mark.parametrize("num_classes", [0, -3, 2.0, "4"])
def test_a_wrong_number_of_classes_is_named(num_classes):
    with pytest.raises(RecipeError, match=f"num_classes of at least 1, got {num_classes!r}"):
        resnext_wsl.ResNeXt101_32x8d_wsl(num_classes)
