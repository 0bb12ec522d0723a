"""A network with a weights file as a teacher."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
import safetensors.numpy

from ssld import plugins
from ssld.errors import CheckpointError, RecipeError
from ssld.train import networks

NAME = "MobileNetV3_small_x0_35"
CLASSES = ("circle", "square", "triangle", "cross")
SUPPLIED = {"classes": CLASSES, "resolution": 16, "device": "cpu"}


@pytest.fixture
def weights(tmp_path):
    """A weights file, and the layer that it was saved from."""
    layer = networks.build(NAME, {}, 4, seed=3)
    file = tmp_path / "teacher.safetensors"
    safetensors.numpy.save_file(networks.arrays(layer), file)
    return file, layer


@pytest.fixture
def unexported(monkeypatch):
    """An export costs seconds; one test pays for it."""

    def eager(layer, size, device):
        layer.eval()
        return lambda images: layer(paddle.to_tensor(images)).numpy()

    monkeypatch.setattr("ssld.teachers.network.Frozen", eager)


def teacher(file, **options):
    """As a run makes it of a recipe's keys."""
    return plugins.call("teachers", "network", {"network": NAME, "weights": str(file), **options}, SUPPLIED)


def test_it_answers_as_the_network_does(weights):
    file, layer = weights
    layer.eval()
    made = teacher(file)
    images = np.random.default_rng(0).normal(size=(3, 3, 16, 16)).astype(np.float32)
    with paddle.no_grad():
        expected = layer(paddle.to_tensor(images)).numpy()
    np.testing.assert_allclose(made.predict(images), expected, rtol=1e-3, atol=1e-4)
    assert (made.spec.size, made.spec.resize_short, made.spec.classes) == (16, None, CLASSES)
    assert made.spec.mean == (0.485, 0.456, 0.406)


@pytest.mark.usefixtures("unexported")
def test_the_recipe_may_say_how_its_images_are_prepared(weights):
    spec = teacher(weights[0], resolution=24, resize_short=28, mean=[0.5, 0.5, 0.5], std=[0.2, 0.2, 0.2]).spec
    assert (spec.size, spec.resize_short, spec.mean, spec.std) == (24, 28, (0.5,) * 3, (0.2,) * 3)


@pytest.mark.usefixtures("unexported")
def test_the_fingerprint_is_that_of_the_weights(weights, tmp_path):
    file, layer = weights
    arrays = networks.arrays(layer)
    other = tmp_path / "other.safetensors"
    safetensors.numpy.save_file({**arrays, "fc.bias": arrays["fc.bias"] + 1}, other)
    copied = tmp_path / "copied.safetensors"
    copied.write_bytes(file.read_bytes())
    prints = [teacher(path).spec.fingerprint for path in (file, copied, other)]
    assert prints[0] == prints[1] != prints[2]


def test_weights_of_another_network_show_both_sides(weights):
    file, _ = weights
    with pytest.raises(CheckpointError) as caught:
        teacher(file, network="MobileNetV3_small_x0_5")
    assert f"{file} for the teacher MobileNetV3_small_x0_5: expected" in str(caught.value)
    assert "~ blocks.1.expand_conv.conv.weight [40, 8, 1, 1] in the network, [24, 8, 1, 1] in the file" in str(
        caught.value
    )


def test_other_classes_do_not_fit(weights):
    supplied = {**SUPPLIED, "classes": CLASSES[:3]}
    with pytest.raises(CheckpointError, match=r"fc\.weight \[1280, 3\] in the network, \[1280, 4\] in the file"):
        plugins.call("teachers", "network", {"network": NAME, "weights": str(weights[0])}, supplied)


def test_a_missing_file_and_an_unknown_key_are_named(weights, tmp_path):
    with pytest.raises(CheckpointError, match=r"gone\.safetensors: No such file"):
        teacher(tmp_path / "gone.safetensors")
    with pytest.raises(RecipeError, match="resize: unknown option, did you mean resize_short"):
        teacher(weights[0], resize=28)


@pytest.mark.usefixtures("unexported")
def test_options_are_those_of_the_network(weights):
    """With another dropout, what is scaled in evaluation is scaled by another share."""
    images = np.random.default_rng(0).normal(size=(2, 3, 16, 16)).astype(np.float32)
    kept, dropped = (teacher(weights[0], options={"dropout": dropout}).predict(images) for dropout in (0.0, 0.5))
    bias = networks.arrays(weights[1])["fc.bias"]
    np.testing.assert_allclose(dropped - bias, (kept - bias) / 2, rtol=1e-3, atol=1e-4)
