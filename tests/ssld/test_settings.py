"""What a recipe may say of a stage: exact numbers, short forms, one way to name a teacher, labels, derived values."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ssld.settings import Context, Named, Stored, TaughtSettings, Teachers, TeacherSetting, TrainingSettings

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
        ("from", ""),
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
        ({}, "exactly one of stage, network, onnx or plugin, got none of them"),
        ({"stage": "a", "plugin": "b"}, "exactly one of stage, network, onnx or plugin, got stage, plugin"),
        ({"onnx": "a.onnx", "network": "A"}, "exactly one of stage, network, onnx or plugin, got network, onnx"),
        ({"network": "A"}, "expected a weights file beside network, got none"),
        ({"network": "A", "weights": ""}, "expected a weights file beside network, got ''"),
        *[({way: "", "weights": "f"}, "at least 1 character") for way in ("stage", "network", "onnx", "plugin")],
        ({"onnx": "a.onnx", "class_map": ""}, "at least 1 character"),
        ({"stage": "a", "weights": "f"}, "expected no other key beside stage, got weights"),
        ({"onnx": "a.onnx", "precision": "bfloat16"}, "expected precision beside stage or network only, got .* onnx"),
        ({"plugin": "a", "precision": "bfloat16"}, "expected precision beside stage or network only, got .* plugin"),
        ({"stage": "a", "precision": "float16"}, "precision"),
        ({"stage": "a", "weight": 0}, "weight"),
    ],
)
def test_a_teacher_is_named_in_one_way(value, message):
    with pytest.raises(ValidationError, match=message):
        TeacherSetting.model_validate(value)


def test_what_is_common_to_all_teachers_is_no_key_of_a_plugin():
    common = {"weight": 2, "class_map": "map.tsv"}
    teacher = TeacherSetting.model_validate({"plugin": "acme", "file": "a.bin", "size": 3, **common})
    assert teacher.options == {"file": "a.bin", "size": 3}
    assert (teacher.weight, teacher.class_map, teacher.precision) == (2, "map.tsv", "float32")


@pytest.mark.parametrize(
    ("value", "name", "file"),
    [
        ({"stage": "teach", "precision": "bfloat16"}, "stage teach", None),
        ({"network": "A", "weights": "a.safetensors"}, "network A", "a.safetensors"),
        ({"onnx": "a.onnx", "size": 24}, "onnx a.onnx", "a.onnx"),
        ({"plugin": "acme", "weights": "a.bin"}, "plugin acme", None),
    ],
)
def test_each_way_says_its_name_and_the_file_of_its_weights(value, name, file):
    """A plug-in's own keys are its own affair, whatever they are called."""
    teacher = TeacherSetting.model_validate(value)
    assert (teacher.way, teacher.name, teacher.file) == (name.partition(" ")[0], name, file)


class Taught(TaughtSettings):
    teacher: Teachers | None = None


def taught(**values):
    return Taught.model_validate({**MINIMAL, **values})


def test_one_teacher_is_a_list_of_one():
    one, two = {"stage": "a"}, {"onnx": "b.onnx", "weight": 3}
    assert taught(teacher=one) == taught(teacher=[one])
    assert [teacher.name for teacher in taught(teacher=[one, two]).taught_by] == ["stage a", "onnx b.onnx"]
    assert taught().taught_by == settings().taught_by == ()
    assert taught(teacher=taught(teacher=one).teacher[0]) == taught(teacher=one)


@pytest.mark.parametrize("value", [[], "teach", 3, [["a"]], [{"stage": "a"}, {}]])
def test_what_is_no_teacher_is_refused(value):
    with pytest.raises(ValidationError) as caught:
        taught(teacher=value)
    assert {error["loc"][0] for error in caught.value.errors()} == {"teacher"}


@pytest.mark.parametrize(
    ("values", "inputs"),
    [
        ({}, ()),
        ({"from": "a"}, ("a",)),
        ({"from": "a.safetensors"}, ()),
        ({"from": "a", "teacher": {"stage": "b"}}, ("a", "b")),
        ({"from": "a", "teacher": {"stage": "a"}}, ("a",)),
        ({"teacher": {"plugin": "b"}}, ()),
        ({"teacher": [{"stage": "b"}, {"plugin": "c"}, {"stage": "d"}, {"stage": "b"}]}, ("b", "d")),
    ],
)
def test_inputs_are_the_stages_that_are_read(values, inputs):
    assert taught(**values).inputs == inputs


# Soft labels ----------------------------------------------------------------------------------------------------------


def context(classes=100):
    return Context(resolution=48, samples=10, classes=classes)


def test_labels_are_online_unless_views_are_given():
    assert (taught().labels, taught().stored) == ("online", None)
    assert (taught(labels="online").stored, settings().stored) == (None, None)
    stored = taught(labels={"views": 8}).stored
    assert (stored.views, stored.top_k, stored.temperature, stored.seed, stored.store) == (8, 10, 1, 0, None)
    assert taught(labels=stored).stored == stored


@pytest.mark.parametrize(
    "value",
    [
        "offline",
        None,
        8,
        {},
        {"top_k": 10},
        *[{"views": views} for views in (0, "8", 1.0, True, 10_001)],
        *[{"views": 8, "top_k": top_k} for top_k in (0, -1, 2.5)],
        *[{"views": 8, "temperature": temperature} for temperature in (0, -1, math.inf)],
        *[{"views": 8, "seed": seed} for seed in (-1, 2**63)],
        {"views": 8, "topk": 3},
    ],
    ids=repr,
)
def test_labels_of_another_form_are_refused(value):
    with pytest.raises(ValidationError) as caught:
        taught(labels=value)
    assert {error["loc"][0] for error in caught.value.errors()} == {"labels"}


@pytest.mark.parametrize(("classes", "kept"), [(9, 9), (10, 10), (11, 10), (1000, 10)])
def test_no_more_classes_are_kept_than_there_are(classes, kept):
    assert taught(labels={"views": 8}).resolved(context(classes)).stored == Stored(views=8, top_k=kept)


def test_what_holds_for_every_stage_is_checked_beside_labels():
    with pytest.raises(ValueError, match="expected a warm-up within the 30 epochs"):
        taught(warmup_epochs=31, labels={"views": 8}).resolved(context()).check(context())


# Derived values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("epochs", "warmup"), [(1, 0.1), (30, 3), (50, 5), (360, 5)])
def test_open_values_are_derived(epochs, warmup):
    resolved = settings(epochs=epochs, batch_size=1024).resolved(context())
    assert resolved.warmup_epochs == pytest.approx(warmup)
    assert resolved.learning_rate == pytest.approx(0.4)
    assert resolved.resolution == 48


def test_given_values_stand_even_at_zero():
    given_values = settings(warmup_epochs=0, learning_rate=0.3, resolution=64)
    assert given_values.resolved(context()) == given_values


@given(st.integers(1, 500), st.integers(1, 10**7), st.integers(2, 10**4))
def test_total_steps_are_the_fewest_that_show_every_epoch(epochs, samples, batch):
    steps = settings(epochs=epochs, batch_size=batch).total_steps(samples)
    assert steps * batch >= epochs * samples
    assert (steps - 1) * batch < epochs * samples


def test_a_teachers_network_may_be_written_as_a_students_is():
    long = {"network": {"name": "ResNet18_vd", "stem_stride": 1}, "weights": "w.safetensors"}
    short = {"network": "ResNet18_vd", "options": {"stem_stride": 1}, "weights": "w.safetensors"}
    assert taught(teacher=long) == taught(teacher=short)
