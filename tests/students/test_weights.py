"""Weights fit PaddleClas: names, shapes, totals, batch-norm constants and what is decayed."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points

import numpy as np
import paddle
import pytest
from paddle import nn

RESNETS = [f"ResNet{depth}_vd" for depth in (18, 34, 50, 101, 152, 200)]
SCALES = ("0_35", "0_5", "0_75", "1_0", "1_25")
MOBILENETS = [f"MobileNetV3_{size}_x{scale}" for size in ("small", "large") for scale in SCALES]

# PaddleClas's model list: parameters and batch-norm statistics, in millions
PUBLISHED = {
    "ResNet34_vd": 21.84,
    "ResNet50_vd": 25.63,
    "ResNet101_vd": 44.67,
    "MobileNetV3_large_x1_0": 5.50,
    "MobileNetV3_small_x1_0": 2.95,
}


@pytest.fixture(scope="module", params=RESNETS + MOBILENETS)
def network(request: pytest.FixtureRequest, build: Callable) -> tuple[str, nn.Layer]:
    return request.param, build(request.param, 1000)


def test_names_and_shapes_are_those_of_paddleclas(network, reference):
    name, layer = network
    shapes = {key: list(value.shape) for key, value in layer.state_dict().items()}
    assert shapes == reference[name]


@pytest.mark.parametrize("network", PUBLISHED, indirect=True)
def test_total_is_the_published_one(network):
    name, layer = network
    total = sum(int(np.prod(value.shape)) for value in layer.state_dict().values())
    assert round(total / 1e6, 2) == PUBLISHED[name]


def test_every_batch_norm_has_paddleclas_constants(network):
    norms = [layer for layer in network[1].sublayers() if isinstance(layer, nn.BatchNorm)]
    means = [key for key in network[1].state_dict() if key.endswith("._mean")]
    assert len(norms) == len(means) > 20
    assert {(norm._momentum, norm._epsilon) for norm in norms} == {(0.9, 1e-5)}


def test_head_is_a_linear_layer_over_the_features(network):
    _, layer = network
    assert isinstance(getattr(layer, layer.head), nn.Linear)
    assert isinstance(getattr(layer, layer.features), nn.Layer)


def test_all_names_are_entry_points_with_a_signature_of_their_own(reference):
    found = {point.name: point.load() for point in entry_points(group="ssld.students")}
    ours = {name: found[name] for name in reference}
    assert sorted(ours) == sorted(RESNETS + MOBILENETS)
    assert {name: constructor.__name__ for name, constructor in ours.items()} == {name: name for name in ours}
    assert all(
        constructor.__doc__.startswith(name) and "\n" not in constructor.__doc__ for name, constructor in ours.items()
    )


def test_momentum_counts_the_old_mean(build):
    """One step from mean 0 and variance 1 moves the statistics a tenth of the way to those of the batch."""
    layer = build("MobileNetV3_small_x0_35", 3)
    images = paddle.to_tensor(np.random.default_rng(0).normal(2, 3, (4, 3, 16, 16)).astype("float32"))
    layer.train()
    layer(images)
    batch = layer.conv.conv(images).numpy().astype("float64").transpose(1, 0, 2, 3).reshape(8, -1)
    norm = layer.conv.bn
    np.testing.assert_allclose(norm._mean.numpy(), 0.1 * batch.mean(1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(norm._variance.numpy(), 0.9 + 0.1 * batch.var(1), rtol=1e-4)


@pytest.mark.parametrize(("name", "decayed"), [("MobileNetV3_small_x0_35", False), ("ResNet18_vd", True)])
def test_decay_spares_batch_norm_only_in_mobilenet(build, name, decayed):
    """With a gradient of zero, a step of rate 0.5 and decay 0.1 shrinks what is decayed by a twentieth."""
    layer = build(name, 2)
    learned = {key: value for key, value in layer.named_parameters() if not value.stop_gradient}
    before = {key: value.numpy().copy() for key, value in learned.items()}
    (layer(paddle.ones([2, 3, 32, 32])).sum() * 0).backward()
    paddle.optimizer.Momentum(0.5, 0.9, parameters=layer.parameters(), weight_decay=0.1).step()
    for key, value in learned.items():
        factor = 0.95 if decayed or ".bn." not in key else 1
        np.testing.assert_allclose(value.numpy(), factor * before[key], rtol=1e-6, atol=1e-12, err_msg=key)


@pytest.mark.parametrize("name", ["ResNet18_vd", "ResNet50_vd"])
def test_resnet_classifier_starts_within_its_bound(build, name):
    weight = build(name, 64).fc.weight.numpy()
    bound = len(weight) ** -0.5
    assert 0.99 * bound < np.abs(weight).max() <= bound * (1 + 1e-6)
    assert weight.std() == pytest.approx(bound / 3**0.5, rel=0.02)
