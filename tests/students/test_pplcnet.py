"""PP-LCNet: PaddleClas's weights and first values, the published sizes, and its numbers in float64 by name alone."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from importlib.metadata import entry_points

import numpy as np
import paddle
import pytest
from paddle import nn
from paddle.nn import functional as F

from ssld.errors import RecipeError
from ssld.students import pplcnet
from ssld.train import networks
from ssld.train.convolution import Conv2D
from ssld.train.frozen import Frozen
from ssld.train.momentum import Momentum
from ssld.train.normalization import BatchNorm

# Cui et al. 2021 and PaddleClas's model list: parameters in millions
PUBLISHED = {
    "PPLCNet_x0_25": 1.5,
    "PPLCNet_x0_35": 1.6,
    "PPLCNet_x0_5": 1.9,
    "PPLCNet_x0_75": 2.4,
    "PPLCNet_x1_0": 3.0,
    "PPLCNet_x1_5": 4.5,
    "PPLCNet_x2_0": 6.5,
    "PPLCNet_x2_5": 9.0,
}
SMALL = "PPLCNet_x0_25"
SCALES = ("blocks3", "blocks4", "blocks5", "blocks6")


def shapes(layer):
    return {key: list(value.shape) for key, value in layer.state_dict().items()}


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


# Weights -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_total_is_the_published_one(build, name):
    layer = build(name, 1000)
    learned = sum(weight.size for weight in layer.parameters() if not weight.stop_gradient)
    assert round(learned / 1e6, 1) == PUBLISHED[name]


def test_all_names_are_entry_points_with_a_signature_of_their_own():
    found = {point.name: point.load() for point in entry_points(group="ssld.students") if "PPLCNet" in point.name}
    assert sorted(found) == sorted(PUBLISHED)
    options = {"stem_stride": int, "dropout": float, "class_expand": int, "stride_list": Sequence[int]}
    for name, constructor in found.items():
        assert constructor.__name__ == name
        assert constructor.__doc__.startswith(f"{name}: ")
        hints = typing.get_type_hints(constructor)
        assert hints == {"num_classes": int, **options, "return": pplcnet.PPLCNet}


@pytest.mark.parametrize("num_classes", [1, 7])
def test_classes_change_the_head_alone(build, reference, num_classes):
    expected = {**reference[SMALL], "fc.weight": [1280, num_classes], "fc.bias": [num_classes]}
    assert shapes(build(SMALL, num_classes)) == expected


def test_class_expand_changes_the_width_of_the_features_alone(build, reference):
    expected = {**reference[SMALL], "last_conv.weight": [48, 128, 1, 1], "fc.weight": [48, 1000]}
    assert shapes(build(SMALL, 1000, class_expand=48)) == expected


def test_first_values_are_drawn_as_in_paddleclas():
    """Kaiming's normal before a batch norm, also where that is depthwise; elsewhere paddle's defaults."""
    first = networks.arrays(networks.build("PPLCNet_x1_0", {}, 10, seed=3))
    normed = [f"{key.removesuffix('.bn.bias')}.conv.weight" for key in first if key.endswith(".bn.bias")]
    plain = [key for key in first if key.endswith((".se.conv1.weight", ".se.conv2.weight")) or "last_conv" in key]
    assert (len(normed), len(plain)) == (27, 5)
    for key in normed + plain:
        # a filter of one channel reads that channel alone
        drawn, area = first[key].astype("float64"), np.prod(first[key].shape[1:])
        assert drawn.mean() == pytest.approx(0, abs=5 * drawn.std() / drawn.size**0.5), key
        assert drawn.std() == pytest.approx((2 / area) ** 0.5, rel=5 / (2 * drawn.size) ** 0.5), key
        # normal, not uniform: some lie beyond twice the deviation
        assert np.abs(drawn).max() > 2 * drawn.std(), key
    bound = (6 / (1280 + 10)) ** 0.5
    assert 0.99 * bound < np.abs(first["fc.weight"]).max() <= bound * (1 + 1e-6)
    assert {float(value) for key in first if key.endswith("bias") for value in first[key]} == {0.0}
    assert {float(value) for key in first if key.endswith("bn.weight") for value in first[key]} == {1.0}


# Numbers -------------------------------------------------------------------------------------------------------------


def randomize(layer, seed=0):
    """Weights under which every part matters: convolutions keep the signal's size, statistics are not 0 and 1."""
    draw = np.random.default_rng(seed)
    state = {}
    for key, value in layer.state_dict().items():
        shape = tuple(value.shape)
        if len(shape) > 1:
            fan_in = shape[0] if len(shape) == 2 else np.prod(shape[1:])
            state[key] = draw.normal(0, (2 / fan_in) ** 0.5, shape)
        elif key.endswith(("_variance", "bn.weight")):
            state[key] = draw.uniform(0.5, 1.5, shape)
        else:
            state[key] = draw.normal(0, 0.5, shape)
    state = {key: value.astype("float32") for key, value in state.items()}
    networks.load(layer, state, "random weights")
    return {key: value.astype("float64") for key, value in state.items()}


def hard_swish(x):
    return x * np.clip(x + 3, 0, 6) / 6


def conv(x, weight, stride=1):
    """x [B, C, H, W], weight [O, C or 1, k, k]; padded by k // 2."""
    tensors = [paddle.to_tensor(value, "float64") for value in (x, weight)]
    groups = x.shape[1] // weight.shape[1]
    return F.conv2d(*tensors, stride=stride, padding=weight.shape[-1] // 2, groups=groups).numpy()


def conv_bn(weights, name, x, stride=1):
    y = conv(x, weights[f"{name}.conv.weight"], stride)
    mean, variance, scale, shift = (
        weights[f"{name}.bn.{key}"][:, None, None] for key in ("_mean", "_variance", "weight", "bias")
    )
    return hard_swish(scale / np.sqrt(variance + 1e-5) * (y - mean) + shift)


def squeeze_excite(weights, name, x):
    squeezed = x.mean((2, 3)) @ weights[f"{name}.conv1.weight"][:, :, 0, 0].T + weights[f"{name}.conv1.bias"]
    gate = np.maximum(squeezed, 0) @ weights[f"{name}.conv2.weight"][:, :, 0, 0].T + weights[f"{name}.conv2.bias"]
    return x * np.clip(gate / 6 + 0.5, 0, 1)[:, :, None, None]


def answer(weights, x, strides, dropout):
    """Feature maps of every scale, and logits. strides: of the stem, and of blocks3 to blocks6."""
    x = conv_bn(weights, "conv1", x, strides[0])
    maps = []
    # the paper's figure 2: how many depthwise separable convolutions there are at each scale
    for stage, count, stride in zip((2, 3, 4, 5, 6), (1, 2, 2, 6, 2), (1, *strides[1:]), strict=True):
        for index in range(count):
            name = f"blocks{stage}.{index}"
            x = conv_bn(weights, f"{name}.dw_conv", x, stride if index == 0 else 1)
            x = squeeze_excite(weights, f"{name}.se", x) if stage == 6 else x
            x = conv_bn(weights, f"{name}.pw_conv", x)
        maps.append(x)
    features = hard_swish(conv(x.mean((2, 3), keepdims=True), weights["last_conv.weight"]))[:, :, 0, 0]
    return maps, (1 - dropout) * features @ weights["fc.weight"] + weights["fc.bias"]


@pytest.mark.parametrize(
    ("size", "options", "strides"),
    [
        ((64, 64), {}, (2, 2, 2, 2, 2)),
        ((33, 47), {"stem_stride": 1, "dropout": 0.0}, (1, 2, 2, 2, 2)),
        ((32, 40), {"stride_list": [1, 1, 2, 1, 2], "dropout": 0.5, "class_expand": 40}, (1, 1, 2, 1, 2)),
        ((32, 32), {"stride_list": [2, 2, 1, 2, 1], "stem_stride": 1}, (1, 2, 1, 2, 1)),
    ],
)
def test_maps_features_and_logits_are_those_of_the_paper(size, options, strides):
    layer = networks.build("PPLCNet_x0_35", options, 4)
    weights, images = randomize(layer), noise(2, 3, *size)
    seen = {}
    for name in ("blocks2", *SCALES, layer.features):
        getattr(layer, name).register_forward_post_hook(lambda _layer, _in, out, name=name: seen.update({name: out}))
    layer.eval()
    with paddle.no_grad():
        logits = layer(paddle.to_tensor(images)).numpy()
    maps, expected = answer(weights, images.astype("float64"), strides, options.get("dropout", 0.2))
    features = seen.pop(layer.features).numpy()
    head = getattr(layer, layer.head)
    assert isinstance(head, nn.Linear)
    assert features.shape == (2, options.get("class_expand", 1280))
    for found, right in [
        *zip((value.numpy() for value in seen.values()), maps, strict=True),
        (logits, expected),
        (features @ head.weight.numpy() + head.bias.numpy(), expected),
    ]:
        np.testing.assert_allclose(found, right, rtol=0, atol=1e-4 * np.abs(right).max())


def test_strides_change_no_name_and_the_size_of_the_map_alone(build):
    sides = {}
    for strides in ((2, 2, 2, 2, 2), (1, 2, 2, 2, 2), (1, 1, 1, 1, 2), (2, 1, 2, 1, 2)):
        layer = build(SMALL, 2, stride_list=strides)
        assert shapes(layer) == shapes(build(SMALL, 2))
        layer.blocks6.register_forward_post_hook(
            lambda _layer, _in, out, strides=strides: sides.update({strides: tuple(out.shape[2:])})
        )
        layer.eval()
        layer(paddle.ones([1, 3, 64, 32]))
    assert sides == {strides: (64 // np.prod(strides), 32 // np.prod(strides)) for strides in sides}


def test_the_gate_is_clipped_at_both_ends():
    layer = pplcnet.SqueezeExcite(16, pplcnet.SIXTH)
    weights = {f"se.{key}": value for key, value in randomize(layer).items()}
    for part in (layer.conv1, layer.conv2):
        part.weight.set_value(part.weight * 4)
    weights = {key: value * 4 if key.endswith("weight") else value for key, value in weights.items()}
    x = 1 + noise(8, 16, 3, 3) ** 2
    expected = squeeze_excite(weights, "se", x.astype("float64"))
    gate = expected / x
    assert (gate == 0).any()
    assert (gate == 1).any()
    assert ((gate > 0.05) & (gate < 0.95)).any()
    np.testing.assert_allclose(layer(paddle.to_tensor(x)).numpy(), expected, rtol=1e-4, atol=1e-4)


def test_a_feature_is_dropped_or_kept_as_it_is_in_training(build):
    kept, dropped = (build(SMALL, 2, dropout=dropout) for dropout in (0, 0.2))
    images = paddle.to_tensor(noise(8, 3, 32, 32))
    features = []
    for layer in (kept, dropped):
        randomize(layer)
        layer.flatten.register_forward_post_hook(lambda _layer, _in, out: features.append(out.numpy()))
        layer.train()
        with paddle.no_grad():
            paddle.seed(0)
            layer(images)
    whole, part = features
    gone = (part == 0) & (whole != 0)
    np.testing.assert_allclose(part[~gone], whole[~gone], rtol=1e-4, atol=1e-5)
    assert gone.mean() == pytest.approx(0.2, abs=0.02)


@pytest.mark.parametrize(("size", "options"), [(64, {}), (32, {"stem_stride": 1, "stride_list": [2, 1, 2, 2, 1]})])
def test_frozen_it_answers_as_it_does_eagerly(size, options):
    layer = networks.build(SMALL, options, 5)
    randomize(layer)
    images = noise(6, 3, size, size)
    frozen = Frozen(layer, size, threads=1)
    layer.eval()
    with paddle.no_grad():
        expected = layer(paddle.to_tensor(images)).numpy()
    np.testing.assert_allclose(frozen(images), expected, rtol=0, atol=1e-4 * np.abs(expected).max())


# Training ------------------------------------------------------------------------------------------------------------


def gradients(layer, images):
    layer.train()
    layer(images).square().mean().backward()
    return {key: weight.grad for key, weight in layer.named_parameters() if not weight.stop_gradient}


def test_a_step_changes_every_weight_and_every_statistic():
    layer = networks.build(SMALL, {"stem_stride": 1}, 4, seed=7)
    before = networks.arrays(layer)
    optimizer = Momentum(layer)
    assert all(gradient is not None for gradient in gradients(layer, paddle.to_tensor(noise(8, 3, 32, 32))).values())
    optimizer.step(0.05)
    after = networks.arrays(layer)
    assert [key for key in before if np.array_equal(before[key], after[key])] == []
    assert all(np.isfinite(value).all() for value in after.values())


def test_gradients_are_those_by_paddles_layers(monkeypatch):
    found = []
    for fast in ("1", "0"):
        monkeypatch.setenv("SSLD_FAST_CONV", fast)
        layer = networks.build(SMALL, {"dropout": 0.0}, 4, seed=7)
        found.append(
            {key: value.numpy() for key, value in gradients(layer, paddle.to_tensor(noise(8, 3, 96, 96))).items()}
        )
    largest = max(np.abs(value).max() for value in found[1].values())
    for key, theirs in found[1].items():
        np.testing.assert_allclose(found[0][key], theirs, rtol=0, atol=1e-3 * largest, err_msg=key)


def test_every_convolution_and_norm_is_one_that_trains_by_our_kernels(build):
    layers = build("PPLCNet_x0_35", 2).sublayers()
    convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2D)]
    norms = [layer for layer in layers if isinstance(layer, nn.BatchNorm)]
    assert (len(convolutions), len(norms)) == (32, 27)
    assert {type(layer) for layer in convolutions} == {Conv2D}
    assert {type(layer) for layer in norms} == {BatchNorm}
    assert all(layer.trial() for layer in convolutions + norms)
    assert {(norm._momentum, norm._epsilon) for norm in norms} == {(0.9, 1e-5)}


def test_decay_spares_batch_norm_alone(build):
    """With a gradient of zero, a step of rate 0.5 and decay 0.1 shrinks what is decayed by a twentieth."""
    layer = build(SMALL, 2)
    randomize(layer)
    learned = {key: weight for key, weight in layer.named_parameters() if not weight.stop_gradient}
    before = {key: weight.numpy().copy() for key, weight in learned.items()}
    optimizer = Momentum(layer, weight_decay=0.1)
    (layer(paddle.ones([2, 3, 32, 32])).sum() * 0).backward()
    optimizer.step(0.5)
    for key, weight in learned.items():
        factor = 1 if ".bn." in key else 0.95
        np.testing.assert_allclose(weight.numpy(), factor * before[key], rtol=1e-6, atol=1e-12, err_msg=key)


# Wrong values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_classes", "options", "got"),
    [
        (0, {}, "num_classes of at least 1, got 0"),
        (2.0, {}, r"num_classes of at least 1, got 2\.0"),
        (2, {"class_expand": 0}, "class_expand of at least 1, got 0"),
        (2, {"stem_stride": 4}, "stem_stride 2, or 1 .* got 4"),
        (2, {"stem_stride": "1"}, "stem_stride 2, or 1 .* got '1'"),
        (2, {"dropout": 1}, r"dropout in \[0, 1\), got 1;"),
        (2, {"dropout": -0.1}, r"dropout in \[0, 1\), got -0\.1;"),
        (2, {"dropout": float("nan")}, r"dropout in \[0, 1\), got nan;"),
        (2, {"dropout": None}, r"dropout in \[0, 1\), got None;"),
        (2, {"stride_list": [2, 2, 2, 2]}, r"stride_list of 5 strides, 1 or 2 each, got \[2, 2, 2, 2\]"),
        (2, {"stride_list": [2, 2, 2, 2, 3]}, r"stride_list of 5 strides, 1 or 2 each, got \[2, 2, 2, 2, 3\]"),
    ],
)
def test_wrong_values_are_named(build, num_classes, options, got):
    with pytest.raises(RecipeError, match=got):
        build(SMALL, num_classes, **options)
