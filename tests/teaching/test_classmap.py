"""From a teacher's classes to those of the data: what the file may say, and what becomes of the logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssld.contracts import Teacher, TeacherSpec
from ssld.errors import RecipeError, TeacherError
from ssld.teaching.classmap import ClassMap, Mapped, Pair, read_class_map

BREEDS = ("tabby", "siamese", "beagle", "pug", "toaster")
ANIMALS = ("cat", "dog", "horse")
MAP = "# breeds\ntabby\tcat\nsiamese\tcat\n\n  beagle \t dog\npug\tdog\n"


@pytest.fixture
def read(tmp_path):
    """read(text, teacher_classes, classes): the class map that a file of this text is."""

    def read(text, teacher_classes=BREEDS, classes=ANIMALS):
        (tmp_path / "map.tsv").write_text(text, "utf-8")
        return read_class_map(tmp_path / "map.tsv", teacher_classes, classes)

    return read


def softmax(logits):
    powers = np.exp(logits.astype(np.longdouble))
    return powers / powers.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("text", "names"),
    [(MAP, BREEDS), ("0\tcat\n1\tcat\n2\tdog\n3\tdog", None)],
    ids=["names", "numbers"],
)
def test_what_goes_to_one_class_is_added(read, text, names):
    logits = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    answer = read(text, names).logits(logits)
    shares = softmax(logits)
    cat, dog = shares[:, 0] + shares[:, 1], shares[:, 2] + shares[:, 3]
    assert (answer.dtype, answer.shape) == (np.float32, (6, 3))
    np.testing.assert_allclose(np.exp(answer[:, 0]), cat / (cat + dog), rtol=1e-5)
    np.testing.assert_allclose(np.exp(answer[:, 1]), dog / (cat + dog), rtol=1e-5)


def test_a_class_that_nothing_goes_to_is_far_below_and_finite(read):
    answer = read(MAP).logits(np.zeros((2, 5), np.float32))
    np.testing.assert_allclose(answer[:, 2], np.log(np.finfo(np.float32).tiny), rtol=1e-6)
    assert (answer.argmax(axis=1) < 2).all()


@given(st.lists(st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False), min_size=5, max_size=5))
def test_any_finite_logits_give_probabilities(values):
    pairs = tuple(Pair(number, number, (0, 2, 0, 1)[number]) for number in range(4))
    class_map = ClassMap(Path("map.tsv"), pairs, ANIMALS, 5)
    logits = np.array([values], np.float32)
    answer, lost = class_map.logits(logits), class_map.unmapped(logits)
    assert np.isfinite(answer).all()
    np.testing.assert_allclose(np.exp(answer.astype(np.float64)).sum(axis=1), 1, rtol=1e-5)
    assert 0 <= lost[0] <= 1


def test_a_constant_added_to_all_logits_changes_nothing(read):
    logits = np.random.default_rng(0).normal(size=(4, 5))
    for shift in (-1000.0, 1000.0):
        np.testing.assert_allclose(read(MAP).logits(logits + shift), read(MAP).logits(logits), atol=1e-6)
        np.testing.assert_allclose(read(MAP).unmapped(logits + shift), read(MAP).unmapped(logits), atol=1e-6)


def test_what_is_left_out_is_divided_away_however_much_it_is(read):
    """The toaster holds all but exp(-200) of the probability; the rest still tells cat from dog."""
    logits = np.array([[1.0, 1.0, 0.0, 0.0, 200.0]], np.float32)
    np.testing.assert_allclose(np.exp(read(MAP).logits(logits))[0, 0], np.e / (np.e + 1), rtol=1e-5)
    np.testing.assert_allclose(read(MAP).unmapped(logits), 1)


def test_the_unmapped_share_is_that_of_the_classes_left_out(read):
    logits = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    np.testing.assert_allclose(read(MAP).unmapped(logits), softmax(logits)[:, 4].astype(np.float64), rtol=1e-5)
    everything = "".join(f"{breed}\tcat\n" for breed in BREEDS)
    np.testing.assert_array_equal(read(everything).unmapped(logits), 0)


def test_a_class_name_may_be_a_number_and_then_is_no_position(read):
    answer = read("1\tcat\n0\tdog", ("1", "0"), ("cat", "dog")).logits(np.array([[5.0, 0.0]], np.float32))
    assert answer.argmax() == 0


def test_lines_may_end_as_on_windows_and_stand_in_any_order(read):
    lines = MAP.splitlines()
    other = read("\r\n".join(reversed(lines)))
    logits = np.random.default_rng(0).normal(size=(4, 5))
    np.testing.assert_array_equal(other.logits(logits), read(MAP).logits(logits))
    assert other.fingerprint == read(MAP).fingerprint
    # a sum of three depends on their order
    assert [pair.teacher for pair in other.pairs] == [pair.teacher for pair in read(MAP).pairs] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("text", "classes"),
    [(MAP.replace("pug\tdog", "pug\tcat"), ANIMALS), (MAP + "toaster\thorse", ANIMALS), (MAP, ("dog", "cat", "horse"))],
    ids=["another target", "one line more", "the data's classes in another order"],
)
def test_another_map_has_another_fingerprint(read, text, classes):
    assert read(text, classes=classes).fingerprint != read(MAP).fingerprint


def test_all_faults_of_a_file_are_told_at_once_with_their_lines(read):
    text = "tabbi\tcat\nsiamese cat\nbeagle\tdgo\npug\tdog\tcat\n\tdog\npug\tdog\npug\tcat\nx\tdog\n"
    with pytest.raises(RecipeError) as caught:
        read(text)
    head, *lines = str(caught.value).splitlines()
    assert head.endswith("map.tsv: 7 faults")
    assert [line.strip() for line in lines] == [
        "line 1: unknown teacher class 'tabbi', did you mean tabby?",
        "line 2: expected `teacher class<TAB>student class`, got 'siamese cat'",
        "line 3: unknown student class 'dgo', did you mean dog?",
        "line 4: expected `teacher class<TAB>student class`, got 'pug\\tdog\\tcat'",
        "line 5: expected `teacher class<TAB>student class`, got '\\tdog'",
        "line 7: the same teacher class as line 6, got 'pug\\tcat'",
        "line 8: unknown teacher class 'x', known: tabby, siamese, beagle, pug, toaster",
    ]


def test_many_faults_and_many_names_stay_readable(read):
    names = [f"class {number}" for number in range(1000)]
    with pytest.raises(RecipeError) as caught:
        read("".join(f"{number}zzz\tcat\n" for number in range(500)), names)
    assert "500 faults" in str(caught.value)
    assert "… and 480 more" in str(caught.value)
    assert len(str(caught.value)) < 10_000


@pytest.mark.parametrize(
    ("text", "names", "message"),
    [
        ("# nothing\n\n", BREEDS, "expected at least one line"),
        ("crane\tcat", ("crane", "wren", "crane"), "line 1: the teacher class 'crane' is 2 classes: 0, 2"),
        ("tabby\tcat", None, "line 1: expected the number of a teacher class, which has no name, got 'tabby'"),
        ("-1\tcat", None, "line 1: expected the number of a teacher class, which has no name, got '-1'"),
        ("²\tcat", None, "line 1: expected the number of a teacher class, which has no name, got '²'"),
    ],
)
def test_one_fault(read, text, names, message):
    with pytest.raises(RecipeError) as caught:
        read(text, names)
    assert "map.tsv: 1 fault\n" in str(caught.value)
    assert message in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"expected a class map, got .*gone\.tsv: No such file"):
        read_class_map(tmp_path / "gone.tsv", BREEDS, ANIMALS)
    (tmp_path / "latin.tsv").write_bytes("müde\tcat".encode("latin-1"))
    with pytest.raises(RecipeError, match=r"latin\.tsv: expected text in UTF-8, got another byte at 1"):
        read_class_map(tmp_path / "latin.tsv", BREEDS, ANIMALS)


def test_numbers_are_checked_by_the_first_answer(read):
    class_map = read("0\tcat\n7\tdog\n5\tdog\n1\tcat", None)
    for asked in (class_map.logits, class_map.unmapped):
        with pytest.raises(RecipeError, match=r"(?s)2 faults\n  line 2: .* from 0 to 4, got 7\n  line 3: .* got 5"):
            asked(np.zeros((2, 5), np.float32))
    assert class_map.logits(np.zeros((2, 8), np.float32)).shape == (2, 3)


@pytest.mark.parametrize("shape", [(2, 4), (2, 6), (5,), (2, 5, 1)])
def test_an_answer_of_another_form_is_refused(read, shape):
    with pytest.raises(TeacherError, match=r"expected the teacher's logits \[images, 5\] .*map\.tsv, got \["):
        read(MAP).logits(np.zeros(shape, np.float32))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_so(read, bad):
    """Whoever asks the teacher refuses it, with the image's name."""
    logits = np.zeros((2, 5), np.float32)
    logits[1, 0] = bad
    answer = read(MAP).logits(logits)
    assert np.isfinite(answer[0]).all()
    assert not np.isfinite(answer[1]).all()


class Breeds:
    """Sees a pug in a bright image and a tabby in a dark one."""

    spec = TeacherSpec(8, "breeds", BREEDS, 9, (0.5,) * 3, (0.2,) * 3, "bfloat16", "by hand")

    def predict(self, images):
        bright = images.mean(axis=(1, 2, 3))
        zero = np.zeros_like(bright)
        return np.stack([-bright, zero - 9, zero - 9, bright, zero - 9], axis=1)


def test_a_mapped_teacher_answers_about_the_datas_classes(read):
    made = Mapped(Breeds(), read(MAP))
    assert isinstance(made, Teacher)
    images = np.stack([np.full((3, 8, 8), level, np.float32) for level in (-4, 4)])
    assert made.predict(images).argmax(axis=1).tolist() == [0, 1]
    spec = made.spec
    assert spec.classes == ANIMALS
    assert (spec.size, spec.resize_short, spec.mean, spec.std) == (8, 9, (0.5,) * 3, (0.2,) * 3)
    assert (spec.precision, spec.engine) == ("bfloat16", "by hand")


def test_a_mapped_teacher_is_another_with_another_map_or_other_weights(read):
    class Retrained(Breeds):
        spec = TeacherSpec(8, "retrained", BREEDS)

    maps = read(MAP), read(MAP + "toaster\thorse")
    prints = {Mapped(teacher, class_map).spec.fingerprint for teacher in (Breeds(), Retrained()) for class_map in maps}
    assert len(prints) == 4
    assert "breeds" not in prints
