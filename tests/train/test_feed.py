"""What a step is fed: full batches from any step on, and the same view for student and teacher."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from ssld.contracts import Soft, TeacherSpec
from ssld.data.loader import Damage, Replay, view_batches
from ssld.data.samples import Samples
from ssld.data.transforms import Pipeline, normalize
from ssld.errors import DataError, TeacherError
from ssld.teaching.asking import Member, OnlineLabels
from ssld.train.feed import feed

SIDE = 96


class Recorder:
    """A teacher that remembers what it was shown, and always says the same."""

    def __init__(self, spec, logits=(0, 0, 0, 0)):
        self.spec = spec
        self.logits = np.array(logits, np.float32)
        self.seen = []

    def predict(self, images):
        self.seen.append(images)
        return np.tile(self.logits, (len(images), 1))


@dataclass
class Kept:
    """Soft labels that are there for some views only; each says which sample and view it is of."""

    replay: Replay
    asked: list = field(default_factory=list)

    def pipelines(self, student):
        return ()

    def of(self, batch):
        self.asked += zip(batch.indices.tolist(), batch.views.tolist(), strict=True)
        return Soft(batch.indices[:, None] % 4, np.stack([batch.indices, batch.views], axis=1).astype(np.float32))


@dataclass(frozen=True)
class Ramps:
    """Images whose red says how far right a pixel is and whose green how far down, in 1/255 of the side."""

    def key(self, row):
        return f"ramp-{row}"

    where = key

    def read(self, row):
        ramp = (np.arange(SIDE) + 0.5) * 255 / SIDE
        red, green = np.meshgrid(ramp, ramp)
        return np.stack([red, green, np.zeros_like(red)], axis=2).astype(np.uint8)


def ramps(count):
    return Samples("ramps", None, "ramps", np.array([count]), None, Ramps(), np.arange(count))


def fed(task, start=0, total=6):
    return list(feed(task, task.train, start, total, Damage(task.damage_budget)))


def test_a_later_start_gives_the_tail(make_task):
    whole, tail = fed(make_task()), fed(make_task(), start=4)
    assert [target.step for target in whole] == [0, 1, 2, 3, 4, 5]
    assert [target.step for target in tail] == [4, 5]
    for one, other in zip(whole[4:], tail, strict=True):
        assert one.keys == other.keys
        assert np.array_equal(one.images, other.images)
        assert np.array_equal(one.hard, other.hard)


def test_images_are_normalized_and_labels_belong_to_their_keys(make_task):
    task = make_task()
    by_key = {task.data.key(i): task.data.labels[i] for i in range(len(task.data))}
    for target in fed(task):
        assert target.images.shape == (8, 3, 16, 16)
        assert target.images.dtype == np.float32
        assert target.labels.numpy().tolist() == [by_key[key] for key in target.keys]
        assert target.taught is None
        pixels = target.images * np.reshape(task.train.std, (3, 1, 1)) + np.reshape(task.train.mean, (3, 1, 1))
        np.testing.assert_allclose(pixels * 255, np.rint(pixels * 255), atol=1e-3)
        assert 0 <= np.rint(pixels * 255).min() < np.rint(pixels * 255).max() <= 255


def test_unlabeled_images_have_no_labels(make_task, shapes):
    (target,) = fed(make_task(data=shapes(22, labeled=False)), total=1)
    with pytest.raises(DataError, match=rf"expected labeled images, got one without a label: {target.keys[0]}"):
        _ = target.labels


def test_soft_labels_are_what_the_teacher_said(make_task):
    (target,) = fed(make_task(teacher=Recorder(TeacherSpec(16, ""), (1, -2, 3, 0.5))), total=1)
    assert (target.soft.ids, target.soft.temperature) == (None, 1)
    assert np.array_equal(target.soft.logits, [[1, -2, 3, 0.5]] * 8)


def test_several_teachers_each_see_the_view_at_their_own_size(make_task):
    """And what they say is the mean of their probabilities, by weight."""
    draw = np.random.default_rng(3)
    teachers = [Recorder(TeacherSpec(size, "", mean=None, std=None), draw.normal(size=4)) for size in (16, 40, 16)]
    weights = (1, 2, 5)
    members = tuple(Member("", teacher, weight) for teacher, weight in zip(teachers, weights, strict=True))
    task = make_task()
    (target,) = fed(replace(task, soft=OnlineLabels(members, task.data, 4)), total=1)
    assert [teacher.seen[0].shape for teacher in teachers] == [(8, size, size, 3) for size in (16, 40, 16)]
    assert np.array_equal(teachers[0].seen[0], teachers[2].seen[0])
    powers = np.exp([teacher.logits.astype(float) for teacher in teachers])
    expected = np.average(powers / powers.sum(1, keepdims=True), axis=0, weights=weights)
    said = np.exp(target.soft.logits.astype(float))
    np.testing.assert_allclose(said / said.sum(1, keepdims=True), [expected] * 8, rtol=1e-5)


def test_kept_labels_are_read_for_the_view_that_the_student_sees(make_task):
    """A third epoch shows the first view again; views are drawn by the seed of the labels, not by the stage's."""
    task = make_task(soft=Kept(Replay(seed=9, views=2)))
    targets = fed(task, total=9)  # 72 slots: three epochs of 22, and six of the fourth
    views = view_batches(task.data, task.train, Replay(9, 2), batch_size=44, indices=range(22), damage=Damage(0))
    (whole,) = views
    images = normalize(whole.images[0], task.train.mean, task.train.std)
    pixels = dict(zip(zip(whole.indices.tolist(), whole.views.tolist(), strict=True), images, strict=True))
    assert [view for _, view in task.soft.asked] == [0] * 22 + [1] * 22 + [0] * 22 + [1] * 6
    for slot, (index, view) in enumerate(task.soft.asked):
        target, row = targets[slot // 8], slot % 8
        assert np.array_equal(target.images[row], pixels[index, view])
        assert target.soft.logits[row].tolist() == [index, view]
        assert target.keys[row] == task.data.key(index)


@pytest.mark.parametrize("size", [16, 40])
def test_a_teacher_without_a_mean_gets_plain_pixels(make_task, size):
    teacher = Recorder(TeacherSpec(size, "", mean=None, std=None))
    (target,) = fed(make_task(teacher=teacher), total=1)
    assert teacher.seen[0].dtype == np.uint8
    assert teacher.seen[0].shape == (8, size, size, 3)
    if size == 16:  # the student's size: the very same pixels, before the student's normalization
        mean, std = (np.reshape(value, (3, 1, 1)) for value in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        expected = (teacher.seen[0].transpose(0, 3, 1, 2) / 255 - mean) / std
        np.testing.assert_allclose(target.images, expected, atol=1e-5)


def test_teacher_and_student_see_the_same_view_each_in_its_own_way(make_task):
    """The crop and the flip can be read off a ramp: its middle, its width, and whether red falls."""
    teacher = Recorder(TeacherSpec(48, "", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)))
    halved = {"NormalizeImage": {"mean": [0, 0, 0], "std": [2, 2, 2]}}
    view = Pipeline.read([{"RandCropImage": {"scale": [0.1, 0.5]}}, "RandFlipImage", halved], 16)
    targets = fed(make_task(teacher=teacher, data=ramps(22), train=view))
    small = np.concatenate([target.images for target in targets]) * 2
    large = np.concatenate(teacher.seen)
    assert small.shape == (48, 3, 16, 16)
    assert large.shape == (48, 3, 48, 48)
    falls = [images[:, 0, 0, 0] > images[:, 0, 0, -1] for images in (small, large)]
    assert np.array_equal(*falls)
    assert 0 < falls[0].sum() < 48
    for channel in (0, 1):
        ramp = [images[:, channel].reshape(48, -1) for images in (small, large)]
        middle = [values.mean(1) for values in ramp]
        # from the middle of the first pixel to the middle of the last
        width = [np.ptp(values, axis=1) * side / (side - 1) for values, side in zip(ramp, (16, 48), strict=True)]
        np.testing.assert_allclose(*middle, atol=0.01)
        np.testing.assert_allclose(*width, atol=0.02)
        assert np.ptp(middle[0]) > 0.2


def test_what_the_teacher_says_is_checked(make_task):
    class Wrong(Recorder):
        def predict(self, images):
            return np.zeros((len(images), 5), np.float32)

    with pytest.raises(
        TeacherError, match=r"the teacher of stage: expected float32 logits \[8, 4\].*got float32 \[8, 5\]"
    ):
        fed(make_task(teacher=Wrong(TeacherSpec(16, ""))))


def test_closing_ends_the_threads(make_task):
    targets = feed(make_task(), make_task().train, 0, 6, Damage(0))
    next(targets)
    assert [thread for thread in threading.enumerate() if thread.name.startswith("ssld-decode")]
    targets.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ssld-decode")]


def test_one_damaged_image_too_many_is_named(make_task):
    class Torn(Ramps):
        def read(self, row):
            return b"no image" if row == 5 else super().read(row)

    torn = replace(ramps(22), store=Torn())
    targets = fed(make_task(data=torn, damage_budget=1))
    assert [len(target.images) for target in targets] == [8] * 6
    assert "ramp-5" not in {key for target in targets for key in target.keys}
    with pytest.raises(DataError, match=r"expected at most 0 damaged images, got 1; the last is ramp-5"):
        fed(make_task(data=torn))
