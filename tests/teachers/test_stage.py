"""A finished stage as a teacher."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import paddle
import pytest

from ssld import plugins
from ssld.data.transforms import Pipeline
from ssld.errors import CheckpointError
from ssld.train import networks


def teacher(model, weights):
    """As a run makes it: the recipe names the stage, the run hands over what it has finished."""
    supplied = {"model": model, "weights": weights, "device": "cpu", "classes": model.classes, "resolution": 99}
    return plugins.call("teachers", "stage", {"stage": "teach"}, supplied)


def test_it_answers_as_the_stage_left_it_at_its_own_resolution(make_task):
    half = {"NormalizeImage": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    model = replace(make_task().model, pipeline=Pipeline.read(["ResizeImage", "CropImage", half], 24))
    layer = networks.build(model.network, {}, 4, seed=3)
    made = teacher(model, networks.arrays(layer))
    assert (made.spec.size, made.spec.classes) == (24, model.classes)
    assert made.spec.mean == pytest.approx((0.5,) * 3)
    assert made.spec.std == pytest.approx((0.5,) * 3)
    images = np.random.default_rng(0).normal(size=(3, 3, 24, 24)).astype(np.float32)
    layer.eval()
    with paddle.no_grad():
        expected = layer(paddle.to_tensor(images)).numpy()
    np.testing.assert_allclose(made.predict(images), expected, rtol=1e-3, atol=1e-4)


def test_weights_that_do_not_fit_are_named_by_their_stage(make_task):
    model = make_task().model
    weights = networks.arrays(networks.build(model.network, {}, 5))
    with pytest.raises(CheckpointError, match=r"(?s)stage teach: expected.*~ fc\.bias \[4\] in the network, \[5\]"):
        teacher(model, weights)
