"""A network with a weights file as a teacher."""

from __future__ import annotations

from functools import partial

import numpy as np
import paddle
import pytest
import safetensors.numpy
from paddle.base import core

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
    """An export costs seconds."""
    monkeypatch.setattr("ssld.train.frozen.Frozen", lambda layer, size, **_: partial(answer, layer))


def answer(layer, batch):
    layer.eval()
    with paddle.no_grad():
        return layer(paddle.to_tensor(batch)).numpy()


def off(got, expected):
    """The largest difference, as a share of the largest logit: those of a new network are tiny."""
    return np.abs(got - expected).max() / np.abs(expected).max()


def images(count):
    return np.random.default_rng(0).normal(size=(count, 3, 16, 16)).astype(np.float32)


def teacher(file, **options):
    """As a run makes it of a recipe's keys."""
    return plugins.call("teachers", "network", {"network": NAME, "weights": str(file), **options}, SUPPLIED)


def test_it_answers_as_the_network_does(weights):
    file, layer = weights
    made = teacher(file)
    assert off(made.predict(images(3)), answer(layer, images(3))) < 1e-4
    assert (made.spec.size, made.spec.resize_short, made.spec.classes) == (16, None, CLASSES)
    assert made.spec.mean == (0.485, 0.456, 0.406)


@pytest.mark.skipif(not core.supports_bfloat16(), reason="bfloat16 needs a CPU with AVX-512")
def test_bfloat16_gives_other_answers_of_the_same_weights(weights):
    file, layer = weights
    rough = teacher(file, precision="bfloat16")
    assert 1e-3 < off(rough.predict(images(3)), answer(layer, images(3))) < 0.05
    assert rough.spec.fingerprint == teacher(file).spec.fingerprint
    assert (rough.spec.precision, teacher(file).spec.precision) == ("bfloat16", "float32")


@pytest.mark.parametrize(
    ("options", "supplied", "engine"),
    [
        ({}, {}, "paddle.inference {} with oneDNN, float32"),
        ({"precision": "bfloat16"}, {}, "paddle.inference {} with oneDNN, bfloat16"),
        ({}, {"device": "gpu"}, "paddle {}, eager, on gpu, float32"),
    ],
)
def test_the_spec_says_what_computes(weights, options, supplied, engine):
    keys = {"network": NAME, "weights": str(weights[0]), **options}
    made = plugins.call("teachers", "network", keys, {**SUPPLIED, **supplied})
    assert made.spec.engine == engine.format(paddle.__version__)


def test_a_precision_that_does_not_exist_is_refused(weights):
    with pytest.raises(RecipeError, match="precision: expected float32 or bfloat16, got 'float16'"):
        teacher(weights[0], precision="float16")


def test_the_recipe_may_say_how_its_images_are_prepared(weights):
    spec = teacher(weights[0], resolution=24, resize_short=28, mean=[0.5, 0.5, 0.5], std=[0.2, 0.2, 0.2]).spec
    assert (spec.size, spec.resize_short, spec.mean, spec.std) == (24, 28, (0.5,) * 3, (0.2,) * 3)


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
        teacher(file, network="MobileNetV3_small_x0_5").predict(images(1))
    assert f"{file} for the teacher MobileNetV3_small_x0_5: expected" in str(caught.value)
    assert "~ blocks.1.expand_conv.conv.weight [40, 8, 1, 1] in the network, [24, 8, 1, 1] in the file" in str(
        caught.value
    )


@pytest.mark.parametrize("classes", [CLASSES[:3], 3])
def test_other_classes_do_not_fit(weights, classes):
    supplied = {**SUPPLIED, "classes": classes}
    made = plugins.call("teachers", "network", {"network": NAME, "weights": str(weights[0])}, supplied)
    with pytest.raises(CheckpointError, match=r"fc\.weight \[1280, 3\] in the network, \[1280, 4\] in the file"):
        made.predict(images(1))


@pytest.mark.usefixtures("unexported")
def test_a_teacher_with_classes_of_its_own_may_say_their_names_or_how_many(weights):
    assert teacher(weights[0], classes=["a", "b", "c", "d"]).spec.classes == ("a", "b", "c", "d")
    counted = teacher(weights[0], classes=4)
    assert counted.spec.classes is None
    assert counted.predict(images(2)).shape == (2, 4)


def test_an_unknown_network_is_named_when_the_teacher_is_asked(weights):
    made = teacher(weights[0], network="MobileNetV3_smal_x0_35")
    with pytest.raises(RecipeError, match="unknown student 'MobileNetV3_smal_x0_35', did you mean MobileNetV3_small"):
        made.predict(images(1))


def test_a_missing_file_and_an_unknown_key_are_named(weights, tmp_path):
    with pytest.raises(CheckpointError, match=r"gone\.safetensors: No such file"):
        teacher(tmp_path / "gone.safetensors")
    with pytest.raises(RecipeError, match="resize: unknown option, did you mean resize_short"):
        teacher(weights[0], resize=28)


@pytest.mark.usefixtures("unexported")
def test_options_are_those_of_the_network(weights):
    """With another dropout, what is scaled in evaluation is scaled by another share."""
    kept, dropped = (teacher(weights[0], options={"dropout": dropout}).predict(images(2)) for dropout in (0.0, 0.5))
    bias = networks.arrays(weights[1])["fc.bias"]
    assert off(dropped - bias, (kept - bias) / 2) < 1e-3
