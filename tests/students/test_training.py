"""Every network learns from a step, and every family's export answers as its layers do."""

from __future__ import annotations

import runpy
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import paddle
import pytest

from ssld.students import (
    efficientnet,
    esnet,
    ghostnet,
    mobilenet_v1,
    mobilenet_v2,
    mobilenet_v3,
    pphgnet,
    res2net_vd,
    resnet,
)
from ssld.train import networks
from ssld.train.frozen import Frozen
from ssld.train.momentum import Momentum

EXACT = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("test_numerics.py"))))

# seconds and gigabytes for more of the blocks that others have
DEEP = {"ResNet101_vd", "ResNet152_vd", "ResNet200_vd", "ResNeXt101_32x8d_wsl", "ResNeXt101_32x16d_wsl"}
TRAINED = sorted({point.name for point in entry_points(group="ssld.students") if point.dist.name == "ssld"} - DEEP)
# every kind of block; of HRNet and PPLCNet, whose maps may be cut and whose strides may be changed, in their own tests
EXPORTED = {
    "EfficientNet": efficientnet.EfficientNetB0,
    "ESNet": esnet.ESNet_x1_0,
    "GhostNet": ghostnet.GhostNet_x1_0,
    "MobileNetV1": mobilenet_v1.MobileNetV1,
    "MobileNetV2": mobilenet_v2.MobileNetV2,
    "MobileNetV3": mobilenet_v3.MobileNetV3_small_x0_35,
    "PPHGNet": pphgnet.PPHGNet_tiny,
    "Res2Net_vd": partial(res2net_vd.Res2NetVd, (2, 1, 1, 1)),
    "ResNet": resnet.ResNet18,
}
SIDE = 32


@pytest.mark.parametrize("name", TRAINED)
def test_a_step_moves_every_weight_and_every_statistic(name):
    """With four images, since a batch norm of two numbers hands next to no gradient on."""
    network = networks.build(name, {}, 3, seed=2)
    before, optimizer = networks.arrays(network), Momentum(network)
    network.train()
    network(paddle.to_tensor(EXACT.drawn(4, 3, SIDE, SIDE))).square().mean().backward()
    optimizer.step(0.05)
    after = networks.arrays(network)
    assert [key for key in before if np.array_equal(before[key], after[key])] == []
    assert all(np.isfinite(value).all() for value in after.values())


@pytest.mark.parametrize("family", EXPORTED)
def test_an_export_answers_as_its_layers_do(family):
    network = EXPORTED[family](num_classes=3)
    EXACT.randomize(network)
    images = EXACT.drawn(3, 3, SIDE, SIDE)
    expected = EXACT.evaluated(network, images)
    assert np.ptp(expected, axis=0).min() > 1e-2 * np.abs(expected).max()
    EXACT.assert_equal_logits(Frozen(network, SIDE, threads=1)(images), expected)
