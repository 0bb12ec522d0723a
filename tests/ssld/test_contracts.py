"""The values that cross a border: what a teacher's spec takes and refuses."""

from __future__ import annotations

import pytest

from ssld.contracts import Teacher, TeacherSpec


def test_a_list_of_classes_is_taken_and_cannot_change_later():
    names = ["cat", "dog"]
    spec = TeacherSpec(16, "", classes=names)
    names.append("bird")
    assert spec.classes == ("cat", "dog")
    assert spec == TeacherSpec(16, "", classes=("cat", "dog"))
    assert TeacherSpec(16, "").classes is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": 0}, "expected a size of at least 1 pixel, got 0"),
        ({"size": -224}, "expected a size of at least 1 pixel, got -224"),
        ({"std": None}, r"expected mean and std, or neither, got mean \(0\.485, .*\) and std None"),
        ({"mean": None}, r"expected mean and std, or neither, got mean None and std \(0\.229, "),
    ],
)
def test_what_no_image_can_be_rendered_to_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        TeacherSpec(**{"size": 16, "fingerprint": "", **values})


def test_pixels_as_they_are_need_neither_mean_nor_std():
    spec = TeacherSpec(1, "", mean=None, std=None)
    assert (spec.size, spec.mean, spec.std) == (1, None, None)


def test_a_teacher_is_what_has_a_spec_and_predicts():
    class Mute:
        spec = TeacherSpec(16, "")

    class Whole(Mute):
        def predict(self, images):
            return images

    assert not isinstance(Mute(), Teacher)
    assert isinstance(Whole(), Teacher)
