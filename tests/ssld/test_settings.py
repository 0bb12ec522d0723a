"""What a recipe may say of a stage: exact numbers, short forms, one way to name a teacher, derived values."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ssld.settings import Context, Named, TeacherSetting, TrainingSettings

MINIMAL = {"kind": "any", "data": "labeled", "epochs": 30}


def settings(**values):
    return TrainingSettings.model_validate({**MINIMAL, **values})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("epochs", value) for value in ("64", True, 1.0, 0, None)],
        *[("learning_rate", value) for value in ("0.1", True, math.inf, math.nan, 0, -0.1)],
        *[("momentum", value) for value in (1, -0.1, "0.9")],
        *[("batch_size", value) for value in (1, 0, 8.0)],
        *[("save_steps", value) for value in (0, True)],
        *[("data", value) for value in ([], 3, None)],
        ("epoch", 3),
    ],
)
def test_a_value_of_another_type_or_out_of_range_is_refused(key, value):
    with pytest.raises(ValidationError) as caught:
        settings(**{key: value})
    assert {error["loc"][0] for error in caught.value.errors()} == {key}


def test_a_whole_number_is_a_number_too():
    assert settings(learning_rate=1, weight_decay=0).learning_rate == 1.0


def test_nothing_changes_after_reading():
    with pytest.raises(ValidationError, match="frozen"):
        settings().epochs = 3


def test_one_source_is_a_list_of_one():
    assert settings().data == ("labeled",)
    assert settings(data=["unlabeled", "labeled"]).data == ("unlabeled", "labeled")


def test_a_plugin_is_a_name_or_a_name_with_options():
    assert settings(student="A").student == Named(name="A")
    assert settings(student={"name": "A", "width": 2}).student.options == {"width": 2}
    assert settings(student="A").student.options == {}
    with pytest.raises(ValidationError):
        settings(student={"width": 2})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "exactly one of stage, network or plugin, got none of them"),
        ({"stage": "a", "plugin": "b"}, "exactly one of stage, network or plugin, got stage, plugin"),
        ({"network": "A"}, "expected a weights file beside network"),
        ({"stage": "a", "weights": "f"}, "expected no other key beside stage, got weights"),
    ],
)
def test_a_teacher_is_named_in_one_way(value, message):
    with pytest.raises(ValidationError, match=message):
        TeacherSetting.model_validate(value)


def test_a_plugin_teacher_has_keys_of_its_own():
    teacher = TeacherSetting.model_validate({"plugin": "onnx", "file": "a.onnx", "size": 3})
    assert teacher.options == {"file": "a.onnx", "size": 3}


class Taught(TrainingSettings):
    teacher: TeacherSetting | None = None


@pytest.mark.parametrize(
    ("values", "inputs"),
    [
        ({}, ()),
        ({"from": "a"}, ("a",)),
        ({"from": "a.safetensors"}, ()),
        ({"from": "a", "teacher": {"stage": "b"}}, ("a", "b")),
        ({"from": "a", "teacher": {"stage": "a"}}, ("a",)),
        ({"teacher": {"plugin": "b"}}, ()),
    ],
)
def test_inputs_are_the_stages_that_are_read(values, inputs):
    assert Taught.model_validate({**MINIMAL, **values}).inputs == inputs


@pytest.mark.parametrize(("epochs", "warmup"), [(1, 0.1), (30, 3), (50, 5), (360, 5)])
def test_open_values_are_derived(epochs, warmup):
    resolved = settings(epochs=epochs, batch_size=1024).resolved(Context(resolution=48, samples=10))
    assert resolved.warmup_epochs == pytest.approx(warmup)
    assert resolved.learning_rate == pytest.approx(0.4)
    assert resolved.resolution == 48


def test_given_values_stand_even_at_zero():
    given_values = settings(warmup_epochs=0, learning_rate=0.3, resolution=64)
    assert given_values.resolved(Context(resolution=48, samples=10)) == given_values


@given(st.integers(1, 500), st.integers(1, 10**7), st.integers(2, 10**4))
def test_total_steps_are_the_fewest_that_show_every_epoch(epochs, samples, batch):
    steps = settings(epochs=epochs, batch_size=batch).total_steps(samples)
    assert steps * batch >= epochs * samples
    assert (steps - 1) * batch < epochs * samples
