"""Asking a teacher: what it is shown, what is refused of its answer, and how good it is found."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
from PIL import Image

from ssld import teaching
from ssld.contracts import TeacherSpec
from ssld.data.transforms import Pipeline
from ssld.errors import DataError, TeacherError
from ssld.teaching import Quality, ask, check, expect_better_than_chance, prepare

EVAL = Pipeline.read(["ResizeImage", "CropImage", "NormalizeImage"], 16)
CLASSES = ("circle", "square", "triangle", "cross")
PIXELS = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)


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


def constant(label):
    """Always the same class."""
    return lambda images: np.tile(np.eye(4, dtype=np.float32)[label], (len(images), 1))


def test_pixels_are_normalized_by_the_teachers_own_mean_and_std():
    spec = TeacherSpec(16, "", mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    expected = (PIXELS / 255 - (0.1, 0.2, 0.3)) / (0.5, 0.6, 0.7)
    got = prepare(PIXELS, spec)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected.transpose(0, 3, 1, 2), atol=1e-5)


def test_a_teacher_without_mean_and_std_gets_the_pixels_as_they_are():
    teacher = Fake(zeros, mean=None, std=None)
    ask(teacher, PIXELS, 4, "t")
    assert teacher.seen[0].dtype == np.uint8
    assert np.array_equal(teacher.seen[0], PIXELS)


@pytest.mark.parametrize("spec", [{"mean": None, "std": None}, {}], ids=["pixels", "normalized"])
def test_a_teacher_that_writes_into_its_input_does_not_change_what_the_student_sees(spec):
    images = PIXELS.copy()

    def scribble(seen):
        seen[:] = 0
        return zeros(seen)

    if spec:
        with pytest.raises(TeacherError, match=r"t raised ValueError on a batch of 3 images: .*read-only"):
            ask(Fake(scribble, **spec), images, 4, "t")
    else:
        ask(Fake(scribble), images, 4, "t")
    assert np.array_equal(images, PIXELS)
    assert images.flags.writeable


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_any_float_is_taken_and_becomes_float32(dtype):
    got = ask(Fake(lambda images: np.full((3, 4), 0.5, dtype)), PIXELS, 4, "t")
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
    message = rf"the teacher t: expected float32 logits \[3, 4\] \(\[images, classes of the data\]\), got {got}"
    with pytest.raises(TeacherError, match=message):
        ask(Fake(lambda images: answer), PIXELS, 4, "the teacher t")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_refused_with_their_image(value):
    logits = np.zeros((3, 4), np.float32)
    logits[1, 2] = value
    with pytest.raises(TeacherError, match=rf"t: expected finite logits, got \[0.0, 0.0, {value}, 0.0\] for image 1"):
        ask(Fake(lambda images: logits), PIXELS, 4, "t")


def test_logits_beyond_float32_are_refused():
    with pytest.raises(TeacherError, match="expected finite logits"), np.errstate(over="ignore"):
        ask(Fake(lambda images: np.full((3, 4), 1e300)), PIXELS, 4, "t")


def test_a_teacher_that_raises_is_named_with_its_cause():
    def fall(images):
        raise KeyError("session")

    with pytest.raises(TeacherError, match="t raised KeyError on a batch of 3 images: 'session'") as caught:
        ask(Fake(fall), PIXELS, 4, "t")
    assert isinstance(caught.value.__cause__, KeyError)


def test_ctrl_c_inside_a_teacher_is_no_fault_of_the_teacher():
    def interrupt(images):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask(Fake(interrupt), PIXELS, 4, "t")


def test_quality_is_the_share_of_right_answers(shapes):
    """Of shapes that take turns, a constant answer gets a quarter; the interval is Wilson's, solved for here."""
    samples = shapes(80)
    quality = check(Fake(constant(2)), samples, EVAL, CLASSES, "t")
    assert (quality.accuracy, quality.images) == (0.25, 80)
    for bound in (quality.low, quality.high):
        assert abs(0.25 - bound) == pytest.approx(1.96 * np.sqrt(bound * (1 - bound) / 80))
    assert quality.low < 0.25 < quality.high
    assert "top-1 0.250" in str(quality)
    assert "on 80 validation images" in str(quality)


def test_right_answers_belong_to_their_images(shapes):
    """A teacher that knows every image by its pixels is right every time, in the last short batch as well."""
    samples = shapes(70)
    known = {}
    for i in range(70):
        pixels = EVAL.render(Image.fromarray(samples.read(i)), EVAL.draw(20, 20, 0))
        known[pixels.tobytes()] = samples.labels[i]

    def answer(images):
        return np.eye(4, dtype=np.float32)[[known[image.tobytes()] for image in images]]

    assert check(Fake(answer, mean=None, std=None), samples, EVAL, CLASSES, "t").accuracy == 1.0


def test_chance_is_the_share_of_the_largest_class(shapes):
    """Three in five are crosses: to say so of every image is no knowledge, though it is right more than one in four."""
    even = shapes(80)
    crosses, others = (np.flatnonzero((even.labels == 3) == of) for of in (True, False))
    samples = even.subset(np.sort(np.concatenate([crosses[:18], others[:12]])))
    quality = check(Fake(constant(3)), samples, EVAL, CLASSES, "t")
    assert (quality.accuracy, quality.chance, quality.images) == (0.6, 0.6, 30)
    assert quality.low > 0.25
    with pytest.raises(TeacherError, match=r"t: expected better than chance, got top-1 0\.600 .*chance 0\.600; "):
        expect_better_than_chance(quality, "t")


@pytest.mark.parametrize(("low", "fails"), [(0.24, True), (0.25, True), (0.26, False)])
def test_the_whole_interval_must_be_above_chance(low, fails):
    quality = Quality(accuracy=0.4, low=low, high=0.6, chance=0.25, images=40)
    with pytest.raises(TeacherError) if fails else nullcontext():
        expect_better_than_chance(quality, "t")


def test_many_images_are_sampled(shapes, monkeypatch):
    monkeypatch.setattr(teaching, "CHECKED", 12)
    teacher = Fake(constant(0))
    assert check(teacher, shapes(40), EVAL, CLASSES, "t").images == 12
    assert sum(map(len, teacher.seen)) == 12


def test_the_teachers_own_size_and_resize_rule_hold(shapes):
    samples = shapes(4)
    own = Fake(constant(0), size=24, resize_short=40, mean=None, std=None)
    check(own, samples, EVAL, CLASSES, "t")
    middle = Image.fromarray(samples.read(0)).resize((40, 40), Image.Resampling.BILINEAR).crop((8, 8, 32, 32))
    assert np.array_equal(own.seen[0][0], np.asarray(middle))
    sized = Fake(constant(0), size=24, mean=None, std=None)
    check(sized, samples, EVAL, CLASSES, "t")
    assert sized.seen[0].shape == (4, 24, 24, 3)
    assert not np.array_equal(sized.seen[0], own.seen[0])


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (
            ("square", "circle", "triangle", "cross"),
            "the first difference is at label 0: expected 'circle', got 'square'",
        ),
        (CLASSES[:3], "expected the 4 classes of the data, got 3; .* expected 'cross', got no more classes"),
        ((*CLASSES, "ring"), "expected the 4 classes of the data, got 5"),
    ],
)
def test_other_class_names_are_refused_before_it_is_asked(shapes, classes, message):
    teacher = Fake(constant(0), classes=classes)
    with pytest.raises(DataError, match=message):
        check(teacher, shapes(8), EVAL, CLASSES, "the teacher t")
    assert teacher.seen == []
