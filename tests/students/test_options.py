"""What a recipe may say of a network: classes, stem stride, dropout; and the features that it names."""

from __future__ import annotations

import doctest
import typing

import numpy as np
import paddle
import pytest

from ssld.errors import RecipeError
from ssld.students import ghostnet, mobilenet_v1, mobilenet_v2, mobilenet_v3, res2net_vd, resnet, resnet_vd

# one of every block, and the layer that makes its last feature map
FAMILIES = {
    "GhostNet_x1_0": "conv_last",
    "MobileNetV1": "blocks",
    "MobileNetV2": "conv9",
    "MobileNetV3_large_x0_35": "blocks",
    "MobileNetV3_small_x0_35": "blocks",
    "Res2Net50_vd_26w_4s": "bb_3_2",
    "ResNet18": "blocks",
    "ResNet18_vd": "blocks",
    "ResNet50_vd": "blocks",
}


def shapes(layer):
    return {key: tuple(value.shape) for key, value in layer.state_dict().items()}


def captured(layer, name, images):
    """The output of a sublayer and that of the whole, in evaluation."""
    seen = []
    handle = getattr(layer, name).register_forward_post_hook(lambda _layer, _inputs, output: seen.append(output))
    layer.eval()
    with paddle.no_grad():
        logits = layer(images)
    handle.remove()
    return seen[0].numpy(), logits.numpy()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("num_classes", [1, 7])
def test_classes_change_the_head_alone(build, reference, name, num_classes):
    with paddle.LazyGuard():  # shapes without memory
        layer = build(name, num_classes)
    expected = {key: tuple(shape) for key, shape in reference[name].items()}
    expected[f"{layer.head}.weight"] = (expected[f"{layer.head}.weight"][0], num_classes)
    expected[f"{layer.head}.bias"] = (num_classes,)
    assert shapes(layer) == expected


@pytest.mark.parametrize(("name", "last"), FAMILIES.items())
def test_stem_stride_changes_no_name_and_doubles_the_feature_map(build, name, last):
    coarse, fine = (build(name, 2, stem_stride=stride) for stride in (2, 1))
    assert shapes(coarse) == shapes(fine)
    maps = [captured(layer, last, paddle.ones([1, 3, 48, 32]))[0].shape[2:] for layer in (coarse, fine)]
    assert maps == [(2, 1), (3, 2)]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("size", "stem_stride"), [(64, 2), (32, 1)])
def test_logits_are_the_head_of_the_features(build, name, size, stem_stride):
    layer = build(name, 5, stem_stride=stem_stride)
    images = paddle.to_tensor(np.random.default_rng(size).normal(size=(2, 3, size, size)).astype("float32"))
    features, logits = captured(layer, layer.features, images)
    head = getattr(layer, layer.head)
    assert features.shape == (2, head.weight.shape[0])
    assert logits.shape == (2, 5)
    assert logits.dtype == np.float32
    expected = features.astype("float64") @ head.weight.numpy() + head.bias.numpy()
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    ("num_classes", "options", "got"),
    [
        (0, {}, "num_classes .* got 0"),
        (-1, {}, "num_classes .* got -1"),
        (2.0, {}, r"num_classes .* got 2\.0"),
        (2, {"stem_stride": 0}, "stem_stride 2, or 1 .* got 0"),
        (2, {"stem_stride": 4}, "stem_stride 2, or 1 .* got 4"),
        (2, {"stem_stride": "1"}, "stem_stride 2, or 1 .* got '1'"),
    ],
)
def test_wrong_values_are_named(build, name, num_classes, options, got):
    with pytest.raises(RecipeError, match=got):
        build(name, num_classes, **options)


@pytest.mark.parametrize("name", ["GhostNet_x1_0", "MobileNetV3_small_x0_35"])
@pytest.mark.parametrize("dropout", [-0.1, 1, 1.5, float("nan"), "0.2", None])
def test_wrong_dropout_is_named(build, name, dropout):
    with pytest.raises(RecipeError, match=rf"dropout in \[0, 1\), got {dropout!r}"):
        build(name, 2, dropout=dropout)


@pytest.mark.parametrize(
    ("constructor", "options"),
    [
        (ghostnet.GhostNet_x1_3, {"stem_stride": int, "dropout": float}),
        (mobilenet_v1.MobileNetV1.__init__, {"stem_stride": int}),
        (mobilenet_v2.MobileNetV2.__init__, {"stem_stride": int}),
        (mobilenet_v3.MobileNetV3_large_x1_0, {"stem_stride": int, "dropout": float}),
        (res2net_vd.Res2Net101_vd_26w_4s, {"stem_stride": int}),
        (resnet.ResNet34, {"stem_stride": int}),
        (resnet_vd.ResNet50_vd, {"stem_stride": int}),
    ],
)
def test_constructors_declare_the_types_of_their_options(constructor, options):
    hints = typing.get_type_hints(constructor)
    del hints["return"]
    assert hints == {"num_classes": int, **options}


@pytest.mark.parametrize("divisor", [4, 8])
@pytest.mark.parametrize("channels", [1, 4, 5.9, 6, 11.9, 12, 17.9, 18.9, 20, 33.6, 72 * 0.35, 72 * 1.3, 1200])
def test_make_divisible_is_the_nearest_multiple_not_below_nine_tenths(channels, divisor):
    """The smallest distance among the multiples that lose at most a tenth; of two as near, the larger."""
    allowed = [width for width in range(divisor, 2000, divisor) if width >= 0.9 * channels]
    expected = min(allowed, key=lambda width: (abs(width - channels), -width))
    assert mobilenet_v3.make_divisible(channels, divisor) == expected


def test_examples_run():
    assert doctest.testmod(mobilenet_v3).attempted == 1
    assert doctest.testmod(mobilenet_v3).failed == 0
