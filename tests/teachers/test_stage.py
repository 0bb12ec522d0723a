"""A finished stage as a teacher."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from ssld import plugins
from ssld.contracts import Model
from ssld.data.transforms import Pipeline
from ssld.errors import CheckpointError
from ssld.train import networks


@pytest.fixture
def model():
    half = {"NormalizeImage": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    pipeline = Pipeline.read(["ResizeImage", "CropImage", half], 24)
    return Model("MobileNetV3_small_x0_35", {}, ("circle", "square", "triangle", "cross"), pipeline)


def teacher(model, weights, **options):
    """As a run makes it: the recipe names the stage, the run hands over what it has finished."""
    supplied = {"model": model, "weights": weights, "device": "cpu", "classes": model.classes, "resolution": 99}
    return plugins.call("teachers", "stage", {"stage": "teach", **options}, supplied)


def test_it_answers_as_the_stage_left_it_at_its_own_resolution(model):
    layer = networks.build(model.network, {}, 4, seed=3)
    made = teacher(model, networks.arrays(layer))
    assert (made.spec.size, made.spec.classes) == (24, model.classes)
    assert made.spec.mean == pytest.approx((0.5,) * 3)
    assert made.spec.std == pytest.approx((0.5,) * 3)
    images = np.random.default_rng(0).normal(size=(3, 3, 24, 24)).astype(np.float32)
    layer.eval()
    with paddle.no_grad():
        expected = layer(paddle.to_tensor(images)).numpy()
    # a new network's logits are tiny
    np.testing.assert_allclose(made.predict(images), expected, atol=1e-3 * np.abs(expected).max())


def test_weights_that_do_not_fit_are_named_by_their_stage(model):
    weights = networks.arrays(networks.build(model.network, {}, 5))
    with pytest.raises(CheckpointError, match=r"(?s)stage teach: expected.*~ fc\.bias \[4\] in the network, \[5\]"):
        teacher(model, weights).predict(np.zeros((1, 3, 24, 24), np.float32))


def test_its_precision_is_the_recipes(model):
    weights = networks.arrays(networks.build(model.network, {}, 4))
    spec = teacher(model, weights, precision="bfloat16").spec
    assert (spec.precision, spec.engine.rpartition(", ")[2]) == ("bfloat16", "bfloat16")
