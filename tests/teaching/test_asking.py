"""Asking a teacher: what it is shown, what is refused of its answer, and how good it is found."""

from __future__ import annotations

import threading
import time
from contextlib import nullcontext
from itertools import permutations

import numpy as np
import pytest
from PIL import Image

from ssld.contracts import Soft, Teacher, TeacherSpec
from ssld.data.loader import Batch
from ssld.data.transforms import Pipeline, view
from ssld.errors import RecipeError, TeacherError
from ssld.teaching.asking import (
    Deferred,
    Member,
    OnlineLabels,
    Quality,
    ask,
    at_test_time,
    expect_better_than_chance,
    prepare,
    quality,
    together,
)

EVAL = Pipeline.read(["ResizeImage", "CropImage", "NormalizeImage"], 16)
PIXELS = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
NAMES = ("first.jpg", "second.jpg", "third.jpg")


class Fake:
    """Answers with what a function makes of the images, and remembers them."""

    def __init__(self, answer, **spec):
        self.spec = TeacherSpec(**{"size": 16, "fingerprint": "", **spec})
        self.answer = answer
        self.seen = []

    def predict(self, images):
        self.seen.append(images)
        return self.answer(images)


def zeros(images):
    return np.zeros((len(images), 4), np.float32)


def test_pixels_are_normalized_by_the_teachers_own_mean_and_std():
    spec = TeacherSpec(16, "", mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    expected = (PIXELS / 255 - (0.1, 0.2, 0.3)) / (0.5, 0.6, 0.7)
    got = prepare(PIXELS, spec)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected.transpose(0, 3, 1, 2), atol=1e-5)


def test_a_teacher_without_mean_and_std_gets_the_pixels_as_they_are():
    teacher = Fake(zeros, mean=None, std=None)
    ask(teacher, PIXELS, 4, "t", NAMES)
    assert teacher.seen[0].dtype == np.uint8
    assert np.array_equal(teacher.seen[0], PIXELS)


@pytest.mark.parametrize("spec", [{"mean": None, "std": None}, {}], ids=["pixels", "normalized"])
def test_a_teacher_that_writes_into_its_input_does_not_change_what_the_student_sees(spec):
    images = PIXELS.copy()

    def scribble(seen):
        seen[:] = 0
        return zeros(seen)

    if spec:
        with pytest.raises(TeacherError, match=r"t raised ValueError on a batch of 3 images .*read-only"):
            ask(Fake(scribble, **spec), images, 4, "t", NAMES)
    else:
        ask(Fake(scribble), images, 4, "t", NAMES)
    assert np.array_equal(images, PIXELS)
    assert images.flags.writeable


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_any_float_is_taken_and_becomes_float32(dtype):
    got = ask(Fake(lambda images: np.full((3, 4), 0.5, dtype)), PIXELS, 4, "t", NAMES)
    assert got.dtype == np.float32
    assert np.array_equal(got, np.full((3, 4), 0.5))


@pytest.mark.parametrize(
    ("answer", "got"),
    [
        (np.zeros((3, 5), np.float32), r"float32 \[3, 5\]"),
        (np.zeros((4, 4), np.float32), r"float32 \[4, 4\]"),
        (np.zeros(3, np.float32), r"float32 \[3\]"),
        (np.zeros((3, 4, 1), np.float32), r"float32 \[3, 4, 1\]"),
        (np.zeros((3, 4), np.int64), r"int64 \[3, 4\]"),
        (np.zeros((3, 4), np.complex64), r"complex64 \[3, 4\]"),
        ([[0.0] * 4] * 3, "list"),
        (None, "NoneType"),
    ],
)
def test_an_answer_of_the_wrong_form_is_refused(answer, got):
    message = rf"the teacher t: expected float32 logits \[3, 4\] \(\[images, classes of the data\]\), got {got} .*first"
    with pytest.raises(TeacherError, match=message):
        ask(Fake(lambda images: answer), PIXELS, 4, "the teacher t", NAMES)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_refused_with_their_image(value):
    logits = np.zeros((3, 4), np.float32)
    logits[1, 2] = value
    with pytest.raises(TeacherError, match=rf"t: expected finite logits, got \[0.0, 0.0, {value}, 0.0\] for second"):
        ask(Fake(lambda images: logits), PIXELS, 4, "t", NAMES)


def test_logits_beyond_float32_are_refused():
    with pytest.raises(TeacherError, match="expected finite logits"), np.errstate(over="ignore"):
        ask(Fake(lambda images: np.full((3, 4), 1e300)), PIXELS, 4, "t", NAMES)


def test_a_teacher_that_raises_is_named_with_its_cause():
    def fall(images):
        raise KeyError("session")

    message = r"t raised KeyError on a batch of 3 images from first\.jpg on: 'session'"
    with pytest.raises(TeacherError, match=message) as caught:
        ask(Fake(fall), PIXELS, 4, "t", NAMES)
    assert isinstance(caught.value.__cause__, KeyError)


def test_ctrl_c_inside_a_teacher_is_no_fault_of_the_teacher():
    def interrupt(images):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask(Fake(interrupt), PIXELS, 4, "t", NAMES)


def test_a_fault_that_the_teacher_itself_names_is_passed_on():
    def refuse(images):
        raise RecipeError("no such option")

    with pytest.raises(RecipeError, match=r"^no such option$"):
        ask(Fake(refuse), PIXELS, 4, "t", NAMES)


# How good it is -------------------------------------------------------------------------------------------------------


def constant(label, count):
    """The soft labels of a teacher that always says the same class."""
    return Soft(None, np.tile(np.eye(4, dtype=np.float32)[label], (count, 1)))


def test_quality_is_the_share_of_right_answers():
    """Of classes that take turns, a constant answer gets a quarter; the interval is Wilson's, solved for here."""
    found = quality(constant(2, 80), np.arange(80) % 4)
    assert (found.accuracy, found.images, found.chance) == (0.25, 80, 0.25)
    for bound in (found.low, found.high):
        assert abs(0.25 - bound) == pytest.approx(1.96 * np.sqrt(bound * (1 - bound) / 80))
    assert found.low < 0.25 < found.high
    assert "top-1 0.250" in str(found)
    assert "on 80 validation images" in str(found)


def test_the_most_probable_class_that_is_kept_is_the_answer():
    """Though the rest of the classes, of which each is less probable, may be more probable together."""
    ids = np.array([[3, 1], [0, 2], [2, 0]])
    soft = Soft(ids, np.log(np.array([[0.3, 0.2, 0.5], [0.6, 0.3, 0.1], [0.9, 0.1, 1e-9]])))
    assert quality(soft, np.array([3, 0, 0])).accuracy == pytest.approx(2 / 3)


def test_chance_is_the_share_of_the_largest_class():
    """Three in five are crosses: to say so of every image is no knowledge, though it is right more than one in four."""
    labels = np.array([3] * 18 + [0, 1, 2] * 4)
    found = quality(constant(3, 30), labels)
    assert (found.accuracy, found.chance, found.images) == (0.6, 0.6, 30)
    assert found.low > 0.25
    with pytest.raises(TeacherError, match=r"t: expected better than chance, got top-1 0\.600 .*chance 0\.600; "):
        expect_better_than_chance(found, "t")


@pytest.mark.parametrize(("low", "fails"), [(0.24, True), (0.25, True), (0.26, False)])
def test_the_whole_interval_must_be_above_chance(low, fails):
    found = Quality(accuracy=0.4, low=low, high=0.6, chance=0.25, images=40)
    with pytest.raises(TeacherError) if fails else nullcontext():
        expect_better_than_chance(found, "t")


# What it is shown -----------------------------------------------------------------------------------------------------


def test_at_test_time_the_teachers_own_size_and_resize_rule_hold(shapes):
    image = Image.fromarray(shapes(1).read(0))
    own = at_test_time(EVAL, TeacherSpec(24, "", resize_short=40, mean=None, std=None))
    middle = image.resize((40, 40), Image.Resampling.BILINEAR).crop((8, 8, 32, 32))
    assert np.array_equal(view(image, own, 0), np.asarray(middle))
    sized = at_test_time(EVAL, TeacherSpec(24, "", mean=None, std=None))
    expected = view(image, EVAL.at(24), 0)
    assert expected.shape == (24, 24, 3)
    assert np.array_equal(view(image, sized, 0), expected)
    assert not np.array_equal(expected, np.asarray(middle))


def batch_of(*images):
    count = len(images[0])
    return Batch(0, images, None, np.arange(count), np.zeros(count, int), NAMES[:count])


def test_online_a_teacher_gets_its_own_rendering_and_faults_name_the_place(shapes):
    """The student's rendering comes first in a batch, and belongs to nobody else."""
    small, large = (np.full((3, side, side, 3), side, np.uint8) for side in (16, 24))
    teachers = [Fake(zeros, size=side, mean=None, std=None) for side in (16, 24)]
    samples = shapes(3)
    labels = OnlineLabels(tuple(Member("t", teacher, 1) for teacher in teachers), samples, 4)
    soft = labels.of(batch_of(np.zeros_like(small), small, large))
    assert [int(teacher.seen[0].max()) for teacher in teachers] == [16, 24]
    assert (soft.ids, soft.logits.shape) == (None, (3, 4))
    assert (labels.replay, labels.files) == (None, "")
    assert [made.resolution for made in labels.pipelines(EVAL)] == [16, 24]
    broken = OnlineLabels((Member("t", Fake(lambda images: np.full((3, 4), np.nan)), 1),), samples, 4)
    with pytest.raises(TeacherError, match=rf"finite logits, .* for {samples.where(0)}".replace("?", r"\?")):
        broken.of(batch_of(small, small))


# Who it is ------------------------------------------------------------------------------------------------------------


def test_teachers_are_the_same_only_with_equal_weights_precision_and_shares_in_order():
    def members(*facts):
        return [Member("t", Fake(zeros, fingerprint=print_, precision=bits), share) for print_, bits, share in facts]

    lists = [
        [("a", "float32", 1.0)],
        [("b", "float32", 1.0)],
        [("a", "bfloat16", 1.0)],
        [("a", "float32", 2.0)],
        *permutations([("a", "float32", 1.0), ("b", "float32", 1.0)]),
    ]
    assert len({together(members(*facts)) for facts in lists}) == len(lists)
    other_words = Member("another name", Fake(zeros, fingerprint="a", size=99), 1.0)
    assert together([other_words]) == together(members(*lists[0]))


def test_a_deferred_teacher_is_loaded_once_when_it_is_first_asked():
    """By however many threads at once."""
    loads, together_now = [], threading.Barrier(4)

    def load():
        loads.append(1)
        time.sleep(0.02)
        return zeros

    teacher = Deferred(TeacherSpec(16, "a"), load)
    assert isinstance(teacher, Teacher)
    assert (teacher.spec.fingerprint, loads) == ("a", [])

    def use():
        together_now.wait(timeout=10)
        assert teacher.predict(np.zeros((2, 3, 16, 16), np.float32)).shape == (2, 4)

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loads == [1]
