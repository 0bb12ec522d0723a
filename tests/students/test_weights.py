"""Every network's weights fit PaddleClas: names, shapes, totals, first values, batch norms and what is decayed."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points

import numpy as np
import paddle
import pytest
from paddle import nn

from ssld.students import ghostnet
from ssld.train import networks
from ssld.train.convolution import Conv2D
from ssld.train.normalization import BatchNorm

OFFERED = sorted(point.name for point in entry_points(group="ssld.students") if point.dist.name == "ssld")

# of the networks whose batch norms have other constants than paddle's: momentum and epsilon
CONSTANTS = {"EfficientNetB0": (0.99, 1e-3)}

# PaddleClas's model list: parameters and batch-norm statistics, in millions
PUBLISHED = {
    "ResNet34_vd": 21.84,
    "ResNet50_vd": 25.63,
    "ResNet101_vd": 44.67,
    "MobileNetV3_large_x1_0": 5.50,
    "MobileNetV3_small_x1_0": 2.95,
}


@pytest.fixture(scope="module", params=OFFERED)
def network(request: pytest.FixtureRequest, build: Callable) -> tuple[str, nn.Layer]:
    with paddle.LazyGuard():  # shapes without memory
        return request.param, build(request.param, 1000)


def test_every_network_of_the_list_is_offered_and_no_other(reference):
    assert sorted(reference) == OFFERED


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
    name, layer = network
    norms = [part for part in layer.sublayers() if isinstance(part, nn.BatchNorm)]
    means = [key for key in layer.state_dict() if key.endswith("._mean")]
    assert len(norms) == len(means) > 19
    assert {(norm._momentum, norm._epsilon) for norm in norms} == {CONSTANTS.get(name, (0.9, 1e-5))}


def test_every_convolution_and_norm_is_one_that_trains_by_our_kernels(network):
    parts = [part for part in network[1].sublayers() if isinstance(part, nn.Conv2D | nn.BatchNorm)]
    assert {type(part) for part in parts} == {Conv2D, BatchNorm}
    assert all(part.trial() for part in parts)


def test_head_is_a_linear_layer_over_the_features(network, reference):
    name, layer = network
    head = getattr(layer, layer.head)
    assert isinstance(head, nn.Linear)
    assert [*head.weight.shape] == reference[name][f"{layer.head}.weight"]
    assert isinstance(getattr(layer, layer.features), nn.Layer)


@pytest.mark.parametrize("name", OFFERED)
def test_constructors_have_a_name_and_a_line_of_their_own(name):
    (point,) = entry_points(group="ssld.students", name=name)
    constructor = point.load()
    assert constructor.__name__ == name
    assert constructor.__doc__.startswith(f"{name}: ")


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


@pytest.mark.parametrize(
    ("name", "decayed"),
    [
        ("ResNet18_vd", True),
        ("MobileNetV1", True),
        ("MobileNetV2", True),
        ("MobileNetV3_small_x0_35", False),
        ("GhostNet_x1_0", False),
        ("Res2Net50_vd_26w_4s", True),
    ],
)
def test_decay_takes_all_or_spares_batch_norm(build, name, decayed):
    """With a gradient of zero, a step of rate 0.5 and decay 0.1 shrinks what is decayed by a twentieth."""
    layer = build(name, 2)
    learned = {key: value for key, value in layer.named_parameters() if not value.stop_gradient}
    before = {key: value.numpy().copy() for key, value in learned.items()}
    sum((value * 0).sum() for value in learned.values()).backward()
    paddle.optimizer.Momentum(0.5, 0.9, parameters=layer.parameters(), weight_decay=0.1).step()
    for key, value in learned.items():
        factor = 1 if not decayed and ("bn." in key or "_batch_norm." in key) else 0.95
        np.testing.assert_allclose(value.numpy(), factor * before[key], rtol=1e-6, atol=1e-12, err_msg=key)


def uniform(width, _classes):
    return width**-0.5 / 3**0.5


def xavier(width, classes):
    return (2 / (width + classes)) ** 0.5


def kaiming(width, _classes):
    return (2 / width) ** 0.5


@pytest.mark.parametrize(
    ("name", "counts_all", "deviation"),
    [
        ("ResNet18", True, uniform),
        ("ResNet18_vd", True, uniform),
        ("MobileNetV1", False, kaiming),
        ("MobileNetV2", True, xavier),
        ("GhostNet_x1_0", False, uniform),
        ("Res2Net50_vd_26w_4s", True, uniform),
    ],
)
def test_first_values_are_drawn_as_in_paddleclas(name, counts_all, deviation):
    """counts_all: the variance of a depthwise filter is that of one that reads all channels."""
    layer = networks.build(name, {}, 64, seed=3)
    for key, part in layer.named_sublayers():
        if isinstance(part, nn.Conv2D):
            values = part.weight.numpy().astype("float64")
            read = part._in_channels if counts_all else values.shape[1]
            assert values.mean() == pytest.approx(0, abs=5 * values.std() / values.size**0.5), key
            expected = (2 / (values[0, 0].size * read)) ** 0.5
            assert values.std() == pytest.approx(expected, rel=5 / (2 * values.size) ** 0.5), key
            # normal, not uniform: some lie beyond twice the deviation
            assert np.abs(values).max() > 2 * values.std(), key
    values, expected = getattr(layer, layer.head).weight.numpy(), deviation(*getattr(layer, layer.head).weight.shape)
    assert values.std() == pytest.approx(expected, rel=0.02)
    assert (np.abs(values).max() > 3**0.5 * (1 + 1e-6) * expected) == (deviation is kaiming)
    first = networks.arrays(layer)
    assert {float(value) for key in first if key.endswith(("bias", "_mean")) for value in first[key]} == {0.0}
    ones = [key for key in first if key.endswith("_variance") or (key.endswith("weight") and first[key].ndim == 1)]
    assert {float(value) for key in ones for value in first[key]} == {1.0}


@pytest.mark.parametrize("width", [1.0, 1.3])
def test_ghostnet_gates_start_within_their_bounds(build, width):
    layer = build(f"GhostNet_x{width}".replace(".", "_"), 2)
    gates = [part for _, part in layer.named_sublayers() if isinstance(part, ghostnet.SqueezeExcite)]
    assert len(gates) == 7
    for part in (linear for gate in gates for linear in (gate.squeeze, gate.excitation)):
        bound = part.weight.shape[0] ** -0.5
        assert 0.9 * bound < np.abs(part.weight.numpy()).max() <= bound * (1 + 1e-6)
