"""The teachers of a stage: what they are given, what is refused of them, and where their labels are kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ssld import plugins
from ssld.contracts import TeacherSpec
from ssld.data.loader import Replay
from ssld.data.transforms import CropImage, RandCropImage, ResizeImage
from ssld.errors import DataError, PluginError, RecipeError
from ssld.graph import make_plan
from ssld.members import Members, named
from ssld.recipe import read_recipe
from ssld.rundir import Options, RunDirectory
from ssld.settings import TeacherSetting

SHAPES = "builtin:shapes?size=16&classes=4&"
CLASSES = ("circle", "square", "triangle", "cross")
DISTILL = {
    "kind": "distill",
    "teacher": {"plugin": "acme"},
    "student": "MobileNetV3_small_x0_35",
    "data": "unlabeled",
    "epochs": 6,
    "labels": {"views": 5, "top_k": 3, "seed": 7},
}
RECIPE = {
    "name": "members",
    "images": {"resolution": 16},
    "data": {
        "unlabeled": f"{SHAPES}count=40",
        "labeled": f"{SHAPES}count=16&seed=1",
        "validation": f"{SHAPES}count=24&seed=2",
    },
    "stages": {
        "teach": {"kind": "pretrain", "network": "MobileNetV3_small_x0_35", "data": "labeled", "epochs": 1},
        "distill": DISTILL,
        "again": {**DISTILL, "student": "ResNet18_vd"},
        "larger": {**DISTILL, "resolution": 24},
    },
}


class Plain:
    """A teacher of so many classes that says the same of every image."""

    def __init__(self, classes=4, **spec):
        self.spec = TeacherSpec(**{"size": 12, "fingerprint": "plain", **spec})
        self.classes = classes

    def predict(self, images):
        return np.tile(np.arange(self.classes, dtype=np.float32), (len(images), 1))


class Acme:
    """The plug-in `acme`: what it is called with, and what it returns."""

    def __init__(self):
        self.calls = []
        self.teacher = Plain()

    def __call__(self, resolution, classes=None, device="", precision="", temper=0):
        self.calls.append({"resolution": resolution, "classes": classes, "device": device, "temper": temper})
        return self.teacher


@pytest.fixture
def acme(monkeypatch, tmp_path):
    made = Acme()
    load, origin = plugins.load, plugins.origin
    monkeypatch.setattr(plugins, "load", lambda kind, name: made if name == "acme" else load(kind, name))
    monkeypatch.setattr(plugins, "origin", lambda kind, name: "acme 1" if name == "acme" else origin(kind, name))
    monkeypatch.chdir(tmp_path)
    return made


def members_of(*overrides, **options):
    Path("recipe.yaml").write_text(json.dumps(RECIPE))
    plan = make_plan(read_recipe("recipe.yaml", overrides))
    return Members(RunDirectory(Path("run")), plan, Options(**options), lambda _: None)


def node(members, name="distill"):
    return members.plan.node(name)


def test_a_teacher_gets_what_the_run_offers_and_the_recipes_own_keys(acme):
    members = members_of("stages.distill.teacher={plugin: acme, temper: 3}", device="gpu")
    (member,) = members.of(node(members))
    assert acme.calls == [{"resolution": 16, "classes": CLASSES, "device": "gpu", "temper": 3}]
    assert (member.teacher, member.who, member.weight) == (acme.teacher, "the teacher plugin acme (acme 1)", 1.0)


def test_stages_that_share_a_teacher_load_it_once(acme):
    members = members_of()
    teachers = {members.of(node(members, name))[0].teacher for name in ("distill", "again", "distill")}
    assert len(teachers) == len(acme.calls) == 1
    members.of(node(members, "larger"))
    assert [call["resolution"] for call in acme.calls] == [16], "the recipe's, whatever the student's is"


def test_several_teachers_keep_their_order_and_weights(acme):
    members = members_of("stages.distill.teacher=[{plugin: acme, weight: 2}, {plugin: acme, temper: 1}]")
    assert [member.weight for member in members.of(node(members))] == [2, 1]
    assert [call["temper"] for call in acme.calls] == [0, 1]


@pytest.mark.parametrize("returned", [None, 3, object(), TeacherSpec(8, "")])
def test_what_is_no_teacher_is_refused_with_its_package(acme, returned):
    acme.teacher = returned
    members = members_of()
    kind = type(returned).__name__
    with pytest.raises(
        PluginError, match=f"teacher 'acme' of acme 1: expected an object with spec and predict, got {kind}"
    ):
        members.of(node(members))


def test_a_teacher_of_other_classes_is_refused_before_it_is_asked(acme):
    acme.teacher = Plain(classes=4, size=12)
    acme.teacher.spec = replace(acme.teacher.spec, classes=("circle", "square", "cross", "triangle"))
    members = members_of()
    with pytest.raises(DataError, match=r"the teacher plugin acme \(acme 1\): expected the 4 classes of the data"):
        members.of(node(members))


def test_a_class_map_stands_between_the_teachers_classes_and_the_datas(acme):
    """Six classes of the teacher, of which two are circles and one is nothing that the data have."""
    acme.teacher = Plain(6)
    acme.teacher.spec = replace(acme.teacher.spec, classes=("disc", "box", "delta", "plus", "ball", "cow"))
    lines = ("disc\tcircle", "ball\tcircle", "box\tsquare", "delta\ttriangle", "plus\tcross")
    Path("map.tsv").write_text("\n".join(lines) + "\n")
    members = members_of("stages.distill.teacher={plugin: acme, class_map: map.tsv}")
    (member,) = members.of(node(members))
    assert acme.calls[0]["classes"] is None, "the data's classes are not the teacher's"
    powers = np.exp(np.arange(6.0))
    wanted = np.array([powers[0] + powers[4], powers[1], powers[2], powers[3]]) / powers[:5].sum()
    answer = member.teacher.predict(np.zeros((2, 3, 12, 12), np.float32))
    np.testing.assert_allclose(np.exp(answer), [wanted, wanted], rtol=1e-5)
    assert member.teacher.spec.fingerprint != "plain", "its labels are others"


def test_the_store_of_a_stage_is_for_the_views_of_training_at_the_teachers_size(acme):
    members = members_of()
    ((store, member),) = members.stores(node(members))
    about = store.description
    assert store.root == Path("run/labels.store")
    assert member.teacher is acme.teacher
    assert (about.teacher, about.classes, about.who) == (member.spec, CLASSES, member.who)
    assert about.teacher == replace(acme.teacher.spec, fingerprint=about.teacher.fingerprint)
    assert about.teacher.fingerprint != acme.teacher.spec.fingerprint, "the recipe's keys are in it as well"
    assert (about.replay, about.top_k, about.temperature) == (Replay(7, 5), 3, 1.0)
    assert about.pipeline.resolution == 12
    first, *_ = about.pipeline.steps
    assert isinstance(first, RandCropImage)
    assert first.size == (12, 12)


def test_the_store_may_lie_anywhere(acme, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for written, root in (("shared", Path("shared")), ("~/labels", tmp_path / "home" / "labels")):
        members = members_of(f"stages.distill.labels.store={written}")
        assert members.stores(node(members))[0][0].root == root


def test_resolution_and_student_do_not_change_the_store_and_the_teachers_size_does(acme):
    members = members_of()
    directories = {members.stores(node(members, name))[0][0].directory for name in ("distill", "again", "larger")}
    assert len(directories) == 1
    acme.teacher = Plain(size=20)
    members = members_of()
    assert members.stores(node(members))[0][0].directory not in directories


def test_more_classes_than_there_are_cannot_be_kept(acme):
    members = members_of("stages.distill.labels.top_k=10")
    assert members.stores(node(members))[0][0].description.top_k == 4


@pytest.mark.parametrize("resize_short", [None, 18])
def test_at_test_time_the_teachers_own_resize_rule_holds_or_else_the_recipes(acme, resize_short):
    acme.teacher = Plain(resize_short=resize_short)
    members = members_of("images.eval=[{ResizeImage: {resize_short: 32}}, CropImage, NormalizeImage]")
    ((store, _),) = members.tested_stores(node(members), members.of(node(members)))
    resize, crop = store.description.pipeline.steps
    assert isinstance(resize, ResizeImage)
    assert isinstance(crop, CropImage)
    # the recipe's 32 are written for 16 px, and this teacher sees 12
    assert (resize.resize_short, crop.size) == (resize_short or 24, (12, 12))
    assert (store.description.replay, store.description.top_k) == (Replay(0, 1), 4)


def test_a_stage_that_is_not_finished_teaches_nobody(acme):
    members = members_of("stages.distill.teacher={stage: teach}")
    with pytest.raises(
        RecipeError, match="run: expected the stage teach to be finished, got: not run yet; run it first"
    ):
        members.of(node(members))


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        ({"stage": "teach"}, ("stage", {"stage": "teach"})),
        ({"network": "ResNet50_vd", "weights": "w"}, ("network", {"network": "ResNet50_vd", "weights": "w"})),
        ({"onnx": "a.onnx", "size": 64}, ("onnx", {"onnx": "a.onnx", "size": 64})),
        ({"plugin": "acme", "url": "u", "weight": 2}, ("acme", {"url": "u"})),
    ],
)
def test_each_way_of_getting_a_teacher_has_its_entry_point(keys, wanted):
    assert named(TeacherSetting.model_validate(keys)) == wanted


def test_what_else_makes_a_teacher_answer_is_part_of_what_it_is(acme):
    """Equal weights are not an equal teacher: the plug-in's options and version count, and the weight in a list not."""

    def directory(*overrides):
        members = members_of(*overrides)
        return members.stores(node(members))[0][0].directory

    plain = directory()
    assert directory("stages.distill.teacher={plugin: acme, temper: 3}") != plain
    assert directory("stages.distill.teacher={plugin: acme, weight: 3}") == plain
    assert directory("stages.distill.teacher=[{plugin: acme}, {plugin: acme, temper: 3}]") == plain
