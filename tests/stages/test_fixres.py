"""Resolution fixing: the classifier alone, at the higher resolution, on images as they are at test time."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ssld.data.transforms import view
from ssld.settings import Context
from ssld.stages.fixres import Fixres, stage
from ssld.train import loop, networks

START = {"from": "finetune"}


@pytest.fixture
def initial():
    return networks.arrays(networks.build("MobileNetV3_small_x0_35", {}, 4, seed=7))


def settings(**values):
    return Fixres.model_validate({"kind": "fixres", **START, "data": "labeled", "epochs": 5, **values})


def changed(before, after):
    assert before.keys() == after.keys()
    return sorted(name for name in before if not np.array_equal(before[name], after[name]))


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("adapt_bn", [False, True])
def test_only_the_classifier_changes_and_the_last_statistics_if_asked(make_task, initial, adapt_bn):
    outcome = stage.run(make_task("fixres", {**START, "adapt_bn": adapt_bn}, initial=initial))
    adapted = ["last_second_conv.bn._mean", "last_second_conv.bn._variance"] if adapt_bn else []
    assert changed(initial, outcome.state.weights) == ["fc.bias", "fc.weight", *adapted]
    assert sorted(outcome.state.optimizer) == ["fc.bias", "fc.weight"]


@pytest.mark.usefixtures("unmeasured")
def test_images_are_those_of_an_evaluation_at_the_higher_resolution(make_task, initial, monkeypatch):
    seen = {}
    descend = loop.Descent.__call__

    def spy(self, target, rate):
        seen.update(zip(target.keys, target.images, strict=True))
        return descend(self, target, rate)

    monkeypatch.setattr(loop.Descent, "__call__", spy)
    task = make_task("fixres", START, initial=initial)
    stage.run(task)
    assert len(seen) == len(task.data)
    for i in range(len(task.data)):
        pixels = view(Image.fromarray(task.data.read(i)), task.model.pipeline, seed=i)
        assert pixels.shape == (24, 24, 3)
        expected = (pixels.transpose(2, 0, 1) / 255 - np.reshape((0.485, 0.456, 0.406), (3, 1, 1))) / np.reshape(
            (0.229, 0.224, 0.225), (3, 1, 1)
        )
        np.testing.assert_allclose(seen[task.data.key(i)], expected, atol=1e-5)


@pytest.mark.usefixtures("unmeasured")
def test_resume_gives_equal_bits(make_task, initial):
    """Both with statistics that adapt: they are part of the state."""
    chosen = {**START, "adapt_bn": True, "save_steps": 2}
    states = []
    whole = stage.run(make_task("fixres", chosen, initial=initial, save=states.append))
    for state in states:
        again = stage.run(make_task("fixres", chosen, initial=initial, resume=state))
        assert changed(whole.state.weights, again.state.weights) == []
        assert changed(whole.state.optimizer, again.state.optimizer) == []


@pytest.mark.parametrize(("resolution", "higher"), [(224, 320), (32, 48), (16, 24), (160, 232)])
def test_the_resolution_rises_as_in_ssld(resolution, higher):
    """224 to 320, and in that ratio to the nearest multiple of 8."""
    assert settings().resolved(Context(resolution=resolution, samples=9, classes=4)).resolution == higher
    assert settings(resolution=64).resolved(Context(resolution=resolution, samples=9, classes=4)).resolution == 64


def test_the_resolution_is_higher_wherever_it_starts():
    resolved = {
        side: settings().resolved(Context(resolution=side, samples=9, classes=4)).resolution for side in range(8, 500)
    }
    assert {side: higher for side, higher in resolved.items() if higher <= side} == {}


def test_the_rate_is_that_of_fixres_without_a_warmup():
    resolved = settings(batch_size=512).resolved(Context(resolution=224, samples=9, classes=1000))
    assert resolved.learning_rate == pytest.approx(0.008)  # 0.001 * 8 at 512 images
    assert (resolved.warmup_epochs, resolved.weight_decay) == (0, 1e-4)


@pytest.mark.parametrize("resolution", [8, 32])
def test_the_resolution_goes_up(resolution):
    context = Context(resolution=32, samples=9, classes=4)
    with pytest.raises(ValueError, match=rf"expected a resolution above the 32 px .*, got {resolution}; raise it"):
        settings(resolution=resolution).resolved(context).check(context)
    settings(resolution=40).resolved(context).check(context)
    settings().resolved(context).check(context)
