"""Logits of ResNets and MobileNetV3 against a second derivation: numpy, float64, from weights by name alone."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from ssld.students.mobilenet_v3 import SqueezeExcite

# Howard et al. 2019, tables 1 and 2: blocks that halve the size, and the first one with hard-swish
HALVING = {"small": {0, 1, 3, 8}, "large": {1, 3, 6, 12}}
FIRST_HARD_SWISH = {"small": 3, "large": 6}


def conv(x, weight, stride=1):
    """x [B, C, H, W], weight [O, C or 1, k, k]; padded by k // 2. One input channel each where weight has one."""
    side = weight.shape[-1]
    border = (side // 2, side // 2)
    windows = np.lib.stride_tricks.sliding_window_view(
        np.pad(x, ((0, 0), (0, 0), border, border)), (side, side), (2, 3)
    )
    windows = windows[:, :, ::stride, ::stride]
    if weight.shape[1] == 1 < x.shape[1]:
        return np.einsum("bchwij,cij->bchw", windows, weight[:, 0])
    return np.moveaxis(np.tensordot(windows, weight, ([1, 4, 5], [1, 2, 3])), -1, 1)


def per_channel(values):
    return values[:, None, None]


def conv_bn(weights, name, x, stride=1, names=("conv", "bn")):
    y = conv(x, weights[f"{name}.{names[0]}.weight"], stride)
    mean, variance, scale, shift = (
        weights[f"{name}.{names[1]}.{key}"] for key in ("_mean", "_variance", "weight", "bias")
    )
    return per_channel(scale / np.sqrt(variance + 1e-5)) * (y - per_channel(mean)) + per_channel(shift)


def windows_of(x, top, bottom, fill):
    padded = np.pad(x, ((0, 0), (0, 0), (top, bottom), (top, bottom)), constant_values=fill)
    side = 2 + top
    return np.lib.stride_tricks.sliding_window_view(padded, (side, side), (2, 3))[:, :, ::2, ::2]


def max_pool(x):
    return windows_of(x, 1, 1, -np.inf).max((-1, -2))


def mean_pool(x, border=0):
    """Windows of 2 pixels and the border before them, stride 2; over the image's edge they hold what is left of it."""
    return np.nanmean(windows_of(x, border, 1, np.nan), (-1, -2))


def relu(x):
    return np.maximum(x, 0)


def hard_swish(x):
    return x * np.clip(x + 3, 0, 6) / 6


def squeeze_excite(weights, name, x):
    squeezed = x.mean((2, 3)) @ weights[f"{name}.conv1.weight"][:, :, 0, 0].T + weights[f"{name}.conv1.bias"]
    gate = relu(squeezed) @ weights[f"{name}.conv2.weight"][:, :, 0, 0].T + weights[f"{name}.conv2.bias"]
    return x * np.clip(0.2 * gate + 0.5, 0, 1)[:, :, None, None]


def resnet(weights, x, stem_stride, pooled):
    """pooled: whether strided shortcuts average before they project, or skip pixels while they do."""
    for index in range(sum(key.startswith("stem.") and key.endswith("conv.weight") for key in weights)):
        x = relu(conv_bn(weights, f"stem.{index}", x, stem_stride if index == 0 else 1))
    x = max_pool(x)
    for index in range(1 + max(int(key.split(".")[1]) for key in weights if key.startswith("blocks"))):
        x = residual(weights, f"blocks.{index}", x, index == 0, pooled)
    return x.mean((2, 3)) @ weights["fc.weight"] + weights["fc.bias"]


def residual(weights, name, x, first, pooled):
    last = 2 if f"{name}.conv2.conv.weight" in weights else 1
    projects = f"{name}.short.conv.weight" in weights
    stride = 2 if projects and not first else 1
    y = x
    for index in range(last + 1):
        y = conv_bn(weights, f"{name}.conv{index}", y, stride if index == last - 1 else 1)
        y = relu(y) if index < last else y
    if projects and pooled:
        x = conv_bn(weights, f"{name}.short", mean_pool(x) if stride == 2 else x)
    elif projects:
        x = conv_bn(weights, f"{name}.short", x, stride)
    return relu(x + y)


def mobilenet_v3(weights, x, stem_stride, size, dropout):
    x = hard_swish(conv_bn(weights, "conv", x, stem_stride))
    for index in range({"small": 11, "large": 15}[size]):
        act = hard_swish if index >= FIRST_HARD_SWISH[size] else relu
        x = inverted_residual(weights, f"blocks.{index}", x, 2 if index in HALVING[size] else 1, act)
    x = hard_swish(conv_bn(weights, "last_second_conv", x)).mean((2, 3), keepdims=True)
    features = hard_swish(conv(x, weights["last_conv.weight"]))[:, :, 0, 0]
    return (1 - dropout) * features @ weights["fc.weight"] + weights["fc.bias"]


def inverted_residual(weights, name, x, stride, act):
    y = act(conv_bn(weights, f"{name}.expand_conv", x))
    y = act(conv_bn(weights, f"{name}.bottleneck_conv", y, stride))
    if f"{name}.mid_se.conv1.weight" in weights:
        y = squeeze_excite(weights, f"{name}.mid_se", y)
    y = conv_bn(weights, f"{name}.linear_conv", y)
    return x + y if stride == 1 and x.shape == y.shape else y


def randomize(layer, seed=0):
    """Weights under which every part matters: convolutions keep the signal's size, statistics are not 0 and 1."""
    draw = np.random.default_rng(seed)
    state = {}
    for key, value in layer.state_dict().items():
        shape = tuple(value.shape)
        if len(shape) > 1:
            fan_in = shape[0] if len(shape) == 2 else np.prod(shape[1:])
            state[key] = draw.normal(0, (2 / fan_in) ** 0.5, shape)
        elif key.endswith(("_variance", "weight")):
            state[key] = draw.uniform(0.5, 1.5, shape)
        else:
            state[key] = draw.normal(0, 0.5, shape)
    state = {key: value.astype("float32") for key, value in state.items()}
    layer.set_state_dict({key: paddle.to_tensor(value) for key, value in state.items()})
    return {key: value.astype("float64") for key, value in state.items()}


def evaluated(layer, images):
    layer.eval()
    with paddle.no_grad():
        return layer(paddle.to_tensor(images)).numpy()


def assert_equal_logits(got, expected):
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def drawn(*shape):
    return np.random.default_rng(len(shape) + shape[-1]).normal(size=shape).astype("float32")


@pytest.mark.parametrize("version", ["", "_vd"])
@pytest.mark.parametrize(
    ("name", "size", "stem_stride"),
    [("ResNet18", (33, 49), 2), ("ResNet18", (21, 17), 1), ("ResNet50", (33, 49), 2), ("ResNet50", (32, 32), 2)],
)
def test_resnet_logits(build, name, version, size, stem_stride):
    layer = build(name + version, 4, stem_stride=stem_stride)
    weights, images = randomize(layer), drawn(1, 3, *size)
    expected = resnet(weights, images.astype("float64"), stem_stride, pooled=version == "_vd")
    assert_equal_logits(evaluated(layer, images), expected)


@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize(("side", "stem_stride", "dropout"), [(64, 2, 0.2), (33, 1, 0.2), (32, 2, 0.0), (32, 2, 0.5)])
def test_mobilenet_logits(build, size, side, stem_stride, dropout):
    layer = build(f"MobileNetV3_{size}_x0_35", 4, stem_stride=stem_stride, dropout=dropout)
    weights, images = randomize(layer), drawn(2, 3, side, side)
    expected = mobilenet_v3(weights, images.astype("float64"), stem_stride, size, dropout)
    assert_equal_logits(evaluated(layer, images), expected)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 5), (7, 6), (1, 1)])
def test_strided_shortcut_averages_what_is_left_at_odd_sizes(build, height, width):
    layer = build("ResNet18_vd", 2)
    weights, x = randomize(layer), drawn(2, 64, height, width)
    expected = conv_bn(weights, "blocks.2.short", mean_pool(x.astype("float64")))
    assert expected.shape[2:] == (-(-height // 2), -(-width // 2))
    layer.eval()
    assert_equal_logits(evaluated(layer.blocks[2].short, x), expected)


def test_squeeze_excite_gate_is_clipped_at_both_ends():
    layer = SqueezeExcite(16)
    weights = {f"se.{key}": value * 3 for key, value in randomize(layer).items()}
    layer.set_state_dict(
        {key.removeprefix("se."): paddle.to_tensor(value.astype("float32")) for key, value in weights.items()}
    )
    x = 1 + drawn(8, 16, 3, 3) ** 2
    expected = squeeze_excite(weights, "se", x.astype("float64"))
    gate = expected / x
    assert (gate == 0).any()
    assert (gate == 1).any()
    assert ((gate > 0.05) & (gate < 0.95)).any()
    np.testing.assert_allclose(evaluated(layer, x), expected, rtol=1e-4, atol=1e-4)


def test_dropout_scales_in_evaluation_and_not_in_training(build):
    """In training a feature is dropped or kept as it is; in evaluation all are scaled by the share that is kept."""
    kept, dropped = (build("MobileNetV3_small_x0_35", 2, dropout=dropout) for dropout in (0, 0.2))
    randomize(kept)
    randomize(dropped)
    features = {}
    for layer in (kept, dropped):
        layer.flatten.register_forward_post_hook(lambda _layer, _inputs, output: features.setdefault("last", output))
    images = paddle.to_tensor(drawn(8, 3, 32, 32))

    def of(layer):
        features.clear()
        with paddle.no_grad():
            layer(images)
        return features["last"].numpy()

    kept.eval()
    dropped.eval()
    np.testing.assert_allclose(of(dropped), 0.8 * of(kept), rtol=1e-5, atol=1e-6)
    kept.train()
    dropped.train()
    paddle.seed(0)
    whole, part = of(kept), of(dropped)
    gone = (part == 0) & (whole != 0)
    np.testing.assert_allclose(part[~gone], whole[~gone], rtol=1e-4, atol=1e-5)
    assert gone.mean() == pytest.approx(0.2, abs=0.02)
