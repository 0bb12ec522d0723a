"""Recipe to plan: order, numbers, derived values, and fingerprints that change with what changes weights."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import subprocess
import sys
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ssld import plugins
from ssld.data.sources import open_source
from ssld.errors import DataError, RecipeError
from ssld.graph import make_plan, numbers, ordered
from ssld.recipe import read_recipe

LADDER = ["teach", "distill", "finetune", "fixres"]
SHAPES = "builtin:shapes?size=16&classes=4&"
RECIPE = {
    "name": "ladder",
    "seed": 3,
    "images": {"resolution": 32, "train": ["RandCropImage", "NormalizeImage"]},
    "data": {
        "unlabeled": f"{SHAPES}count=2001",
        "labeled": f"{SHAPES}count=100&seed=1",
        "validation": f"{SHAPES}count=40&seed=2",
    },
    "stages": {
        "teach": {"kind": "pretrain", "network": "ResNet18_vd", "data": "labeled", "epochs": 120, "batch_size": 128},
        "distill": {
            "kind": "distill",
            "teacher": {"stage": "teach"},
            "student": "MobileNetV3_small_x0_35",
            "data": ["unlabeled", "labeled"],
            "epochs": 20,
        },
        "finetune": {
            "kind": "finetune",
            "from": "distill",
            "teacher": {"stage": "teach"},
            "data": "labeled",
            "epochs": 30,
            "batch_size": 32,
        },
        "fixres": {"kind": "fixres", "from": "finetune", "data": "labeled", "epochs": 5},
    },
}


@pytest.fixture
def plan(tmp_path):
    """plan(changes, name): the plan of the recipe with values put in at dotted paths; None removes a key."""

    def plan(changes=(), file="recipe.yaml", head="", **options):
        values = copy.deepcopy(RECIPE)
        for path, value in dict(changes).items():
            *above, key = path.split(".")
            inner = values
            for step in above:
                inner = inner[step]
            inner.pop(key, None)
            inner |= {} if value is None else {key: value}
        written = tmp_path / file
        plan.file = written
        written.write_text(head + json.dumps(values, indent=1))  # JSON is YAML
        return make_plan(read_recipe(written), cache=tmp_path / "cache", **options)

    return plan


def prints(plan):
    return {node.name: node.fingerprint for node in plan.nodes}


def differing(one, other):
    first, second = prints(one), prints(other)
    assert first.keys() == second.keys()
    return [name for name in first if first[name] != second[name]]


# Order and numbers ----------------------------------------------------------------------------------------------------


def graph(stages):
    """As much of a recipe as its order depends on: the names of the stages that each reads."""
    made = {name: SimpleNamespace(inputs=tuple(inputs)) for name, inputs in stages.items()}
    return SimpleNamespace(stages=made, place=lambda path: f"recipe.yaml:1:1: {'.'.join(path)}")


@given(st.data())
def test_every_stage_comes_after_what_it_reads(data):
    count = data.draw(st.integers(1, 7))
    names = data.draw(st.permutations([f"s{i}" for i in range(count)]))
    reads = {
        name: data.draw(st.lists(st.sampled_from(names[:i]), unique=True)) if i else [] for i, name in enumerate(names)
    }
    order = ordered(graph({name: reads[name] for name in data.draw(st.permutations(names))}))
    assert sorted(order) == sorted(names)
    assert all(order.index(earlier) < order.index(name) for name in names for earlier in reads[name])


def test_independent_stages_keep_the_order_of_the_recipe():
    assert ordered(graph({"c": [], "a": [], "b": []})) == ["c", "a", "b"]
    assert ordered(graph({"last": ["first"], "first": []})) == ["first", "last"]


def test_a_recipe_that_is_in_order_stays_as_it_is():
    stages = {"teach": [], "distill": ["teach"], "other": [], "tune": ["distill", "other"]}
    assert ordered(graph(stages)) == list(stages)


@pytest.mark.parametrize(
    ("taught", "expected"),
    [
        ("-+++", [0, 1, 2, 3]),
        ("--+-", [0, 0, 1, 2]),  # two stages make teachers
        ("+-", [1, 2]),  # the teacher comes from elsewhere
        ("---", [0, 1, 2]),  # nothing is distilled
        ("-", [0]),
    ],
)
def test_the_first_stage_with_a_teacher_is_number_one(taught, expected):
    order = [f"s{i}" for i in range(len(taught))]
    stages = {
        name: SimpleNamespace(taught_by=("t",) if sign == "+" else ()) for name, sign in zip(order, taught, strict=True)
    }
    assert numbers(SimpleNamespace(stages=stages), order) == expected


def test_stages_are_found_by_number_and_name(plan):
    made = plan()
    assert [(node.number, node.name) for node in made.nodes] == list(enumerate(LADDER))
    assert made.find("2") is made.find("finetune") is made.node("finetune")
    with pytest.raises(
        RecipeError, match=r"ladder: expected a stage of this recipe, got '7'; .* 0 teach, 1 distill, 2 fin"
    ):
        made.find("7")


@pytest.mark.parametrize("stages", [{"a": ["b"], "b": ["c"], "c": ["a"], "d": []}, {"a": ["a"]}])
def test_a_cycle_is_shown_in_the_direction_of_reading(stages):
    with pytest.raises(RecipeError, match="the stages wait for each other: ") as caught:
        ordered(graph(stages))
    cycle = str(caught.value).partition("each other: ")[2].partition(";")[0].split(" → ")
    assert cycle[0] == cycle[-1]
    assert all(later in stages[name] for name, later in pairwise(cycle))
    assert str(caught.value).startswith(f"recipe.yaml:1:1: stages.{cycle[0]}")


def test_a_stage_that_is_not_there_is_named_with_the_nearest(plan):
    message = r"yaml:\d+:\d+: stages\.fixres: expected a stage .* got 'finetun'; did you mean finetune\?"
    with pytest.raises(RecipeError, match=message):
        plan({"stages.fixres.from": "finetun"})


# Derived numbers ------------------------------------------------------------------------------------------------------


def test_what_the_recipe_leaves_open_is_derived(plan):
    teach, distill, finetune, fixres = (node.settings for node in plan().nodes)
    rates = [stage.learning_rate for stage in (teach, distill, finetune, fixres)]
    # 0.1 per 256 images; a hundredth of the parent's per image; 0.004 per 256 images
    assert rates == pytest.approx([0.05, 0.025, 0.000125, 0.001])
    assert [stage.warmup_epochs for stage in (teach, distill, finetune, fixres)] == [5, 2, 3, 0]
    assert [stage.resolution for stage in (teach, distill, finetune, fixres)] == [32, 32, 32, 48]
    assert [stage.student.name for stage in (teach, distill)] == ["ResNet18_vd", "MobileNetV3_small_x0_35"]
    assert finetune.student == fixres.student == distill.student


def test_what_the_recipe_says_stands(plan):
    given = {"stages.distill.learning_rate": 0.4, "stages.distill.warmup_epochs": 0, "stages.finetune.resolution": 64}
    _, distill, finetune, fixres = (node.settings for node in plan(given).nodes)
    assert (distill.learning_rate, distill.warmup_epochs) == (0.4, 0)
    assert finetune.learning_rate == pytest.approx(0.4 / 100 / 2)
    assert (finetune.resolution, fixres.resolution) == (64, 88)  # 64 * 320 / 224 = 91.4, and 88 is the multiple of 8


def test_imagenet_goes_from_224_to_320(plan):
    made = plan({"images.resolution": 224})
    assert [node.settings.resolution for node in made.nodes] == [224, 224, 224, 320]


def test_samples_and_steps_are_those_of_the_data_that_a_stage_reads(plan):
    made = plan()
    mixed = 2001 - len(made.data.held_out) + 100
    assert [node.samples for node in made.nodes] == [100, mixed, 100, 100]
    assert [node.steps for node in made.nodes] == [94, math.ceil(20 * mixed / 64), 94, 8]


def test_the_student_is_inherited_and_may_be_repeated_but_not_contradicted(plan):
    same = plan({"stages.finetune.student": "MobileNetV3_small_x0_35"})
    assert differing(same, plan()) == []
    message = r"stages\.finetune: expected the student of distill, MobileNetV3_small_x0_35, got ResNet18_vd; leave"
    with pytest.raises(RecipeError, match=message):
        plan({"stages.finetune.student": "ResNet18_vd"})
    with pytest.raises(
        RecipeError, match=r"stages\.distill: expected student: NETWORK, since the stage starts from no"
    ):
        plan({"stages.distill.student": None})


def test_options_of_the_student_count_as_the_student(plan):
    with pytest.raises(RecipeError, match=r"stages\.finetune: expected the student of distill"):
        plan({"stages.finetune.student": {"name": "MobileNetV3_small_x0_35", "dropout": 0.0}})


def test_operators_that_end_at_another_size_are_refused_at_their_place(plan):
    with pytest.raises(
        RecipeError, match=r"recipe\.yaml:\d+:\d+: images\.eval: expected a view of 32 x 32 pixels, got"
    ):
        plan({"images.eval": ["ResizeImage"]})


def test_operators_that_enlarge_what_they_shrank_are_refused_at_their_place(plan):
    blurring = [{"ResizeImage": {"resize_short": 24}}, {"CropImage": {"size": 24}}, {"ResizeImage": {"size": 32}}]
    message = (
        r"recipe\.yaml:\d+:\d+: images\.eval: expected no operator to enlarge .* 24 px before ResizeImage of 32 px"
    )
    with pytest.raises(RecipeError, match=message):
        plan({"images.eval": [*blurring, "NormalizeImage"]})


def test_a_warm_up_longer_than_the_stage_is_refused_at_its_place(plan):
    message = (
        r"recipe\.yaml:\d+:\d+: stages\.finetune: expected a warm-up within the 30 epochs of the stage, "
        r"got warmup_epochs: 30\.5; lower it, or raise epochs"
    )
    with pytest.raises(RecipeError, match=message) as caught:
        plan({"stages.finetune.warmup_epochs": 30.5})
    line = int(str(caught.value).split(":")[1])
    assert "finetune" in plan.file.read_text().splitlines()[line - 1]
    assert plan({"stages.finetune.warmup_epochs": 30}).node("finetune").settings.warmup_epochs == 30


# Fingerprints ---------------------------------------------------------------------------------------------------------

CHANGES = {
    "seed": (4, LADDER),
    "images.resolution": (40, LADDER),
    "images.train": (["RandCropImage", "RandFlipImage", "NormalizeImage"], LADDER),
    "images.eval": ([{"ResizeImage": {"resize_short": 33}}, "CropImage", "NormalizeImage"], LADDER),
    "data.validation": (f"{SHAPES}count=41&seed=2", LADDER),
    "data.labeled": (f"{SHAPES}count=100&seed=9", LADDER),
    "data.unlabeled": (f"{SHAPES}count=2002", LADDER[1:]),
    "stages.teach.epochs": (121, LADDER),
    "stages.teach.network": ({"name": "ResNet18_vd", "stem_stride": 1}, LADDER),
    "stages.teach.clip_norm": (1.0, LADDER),
    "stages.distill.loss": ({"name": "kl", "temperature": 2}, LADDER[1:]),
    "stages.distill.labels": ({"views": 4}, LADDER[1:]),
    "stages.distill.teacher": ([{"stage": "teach"}, {"stage": "teach", "weight": 2}], LADDER[1:]),
    "stages.finetune.teacher": ({"stage": "teach", "precision": "bfloat16"}, LADDER[2:]),
    "stages.distill.data": (["labeled", "unlabeled"], LADDER[1:]),
    "stages.distill.batch_size": (32, LADDER[1:]),
    "stages.distill.learning_rate": (0.3, LADDER[1:]),
    "stages.distill.momentum": (0.8, LADDER[1:]),
    "stages.distill.weight_decay": (0.0, LADDER[1:]),
    "stages.distill.warmup_epochs": (0, LADDER[1:]),
    "stages.finetune.hard": (0.5, LADDER[2:]),
    "stages.fixres.adapt_bn": (True, ["fixres"]),
    "stages.fixres.resolution": (64, ["fixres"]),
}


@pytest.mark.parametrize("path", CHANGES)
def test_what_changes_weights_changes_the_fingerprints_from_there_on(plan, path):
    value, stages = CHANGES[path]
    assert differing(plan(), plan({path: value})) == stages


UNCHANGED = [
    {"name": "other"},
    {"stages.teach.keep_last": 9, "stages.distill.save_steps": 7, "stages.finetune.save_interval": 3},
    {"data.test": f"{SHAPES}count=8&seed=5"},
    {"stages.distill.loss": "js", "stages.distill.teacher": [{"stage": "teach"}], "stages.teach.data": ["labeled"]},
    {"stages.distill.labels": "online", "stages.finetune.teacher": {"stage": "teach", "weight": 1.0}},
    {"stages.teach.learning_rate": 0.05, "stages.teach.warmup_epochs": 5.0, "stages.fixres.resolution": 48},
    {"stages.teach.network": None, "stages.teach.student": {"name": "ResNet18_vd"}},
    {"data.labeled": {"builtin": "shapes?count=100&classes=4&seed=1&size=16"}},
]


STORED = {"views": 4, "top_k": 3, "temperature": 2.0, "seed": 5}
LOSS = {"stages.distill.loss": {"name": "kl", "temperature": 2.0}}


def with_labels(plan, **labels):
    return plan({**LOSS, "stages.distill.labels": {**STORED, **labels}})


@pytest.mark.parametrize(
    "labels",
    [{"views": 5}, {"top_k": 2}, {"seed": 6}, {"top_k": 4, "temperature": 1.0}],
    ids=lambda labels: next(iter(labels)),
)
def test_what_is_kept_of_a_teacher_changes_what_is_learned(plan, labels):
    assert differing(with_labels(plan), with_labels(plan, **labels)) == LADDER[1:]


def test_where_labels_are_kept_does_not_matter_nor_classes_that_are_not_there(plan):
    assert differing(with_labels(plan), with_labels(plan, store="elsewhere")) == []
    assert differing(with_labels(plan, top_k=4), with_labels(plan, top_k=1000)) == []
    assert with_labels(plan, top_k=1000).node("distill").settings.stored.top_k == 4


def test_labels_of_another_temperature_are_refused_at_their_stage(plan):
    message = (
        r"recipe\.yaml:\d+:\d+: stages\.distill: loss kl: expected soft labels of its temperature, 2, got "
        r"labels\.temperature: 1 and 3 of 4 classes; .* top_k: 4, or write labels: online"
    )
    with pytest.raises(RecipeError, match=message):
        with_labels(plan, temperature=1.0)


@pytest.mark.parametrize("changes", UNCHANGED, ids=lambda changes: next(iter(changes)))
def test_what_changes_no_weight_changes_no_fingerprint(plan, changes):
    assert differing(plan(), plan(changes)) == []


def test_neither_the_file_nor_its_comments_matter(plan, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    assert differing(plan(), plan(file="elsewhere/other.yaml", head="# a note\n\n")) == []


def test_a_fingerprint_is_the_same_in_every_process(plan, tmp_path):
    """It is kept on disk, so it may hold nothing of this process, such as the hash of a string."""
    here = prints(plan())
    program = (
        "import sys; from ssld.graph import make_plan; from ssld.recipe import read_recipe; "
        "print(*(node.fingerprint for node in make_plan(read_recipe(sys.argv[1])).nodes))"
    )
    there = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "recipe.yaml"],
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        check=True,
        timeout=60,
        text=True,
    )
    assert there.stdout.split() == list(here.values())


def test_a_new_revision_of_a_kind_is_another_stage(plan, monkeypatch):
    before = plan()
    known = plugins.stage_kind

    def revised(name):
        return dataclasses.replace(known(name), revision=2) if name == "finetune" else known(name)

    monkeypatch.setattr(plugins, "stage_kind", revised)
    assert differing(before, plan()) == ["finetune", "fixres"]


@pytest.fixture
def versions(monkeypatch):
    """versions[distribution] = version: what is said to be installed; `owner` names who offers each plug-in."""
    known, owner = {"ssld": "1.0"}, {}

    def origin(kind, name):
        distribution = owner.get(name, "ssld")
        return f"{distribution} {known[distribution]}"

    monkeypatch.setattr(plugins, "origin", origin)
    return SimpleNamespace(known=known, owner=owner)


def test_a_release_of_ssld_changes_no_fingerprint_by_itself(plan, versions):
    before = plan()
    versions.known["ssld"] = "2.0"
    assert differing(before, plan()) == []


@pytest.mark.parametrize(
    ("plugin", "changes", "stages"),
    [
        ("ResNet18_vd", {}, LADDER),
        ("js", {}, LADDER[1:]),
        ("fixres", {}, ["fixres"]),
        ("acme", {"stages.finetune.teacher": {"plugin": "acme"}}, ["finetune", "fixres"]),
    ],
    ids=["student", "loss", "kind", "teacher"],
)
@pytest.mark.parametrize("distribution", ["acme-models", "ssld-models"])
def test_a_release_of_a_strangers_plug_in_does(plan, versions, plugin, changes, stages, distribution):
    versions.owner[plugin] = distribution
    versions.known[distribution] = "1.0"
    before = plan(changes)
    versions.known[distribution] = "1.1"
    assert differing(before, plan(changes)) == stages


def test_a_stage_of_another_name_draws_other_weights(plan):
    stages = RECIPE["stages"]
    renamed = {"teacher" if name == "teach" else name: stage for name, stage in copy.deepcopy(stages).items()}
    for name in ("distill", "finetune"):
        renamed[name]["teacher"] = {"stage": "teacher"}
    assert plan({"stages": renamed}).node("teacher").fingerprint != plan().node("teach").fingerprint


def test_a_weights_file_counts_by_its_content(plan, tmp_path):
    file = tmp_path / "weights.safetensors"
    changes = {
        "stages.distill.teacher": {"network": "ResNet18_vd", "weights": str(file)},
        "stages.finetune.from": str(file),
        "stages.finetune.student": "MobileNetV3_small_x0_35",
    }

    def written(value):
        safetensors.numpy.save_file({"a": np.array([value])}, file)
        return plan(changes)

    first, again, other = (written(value) for value in (1.0, 1.0, 2.0))
    assert differing(first, again) == []
    assert differing(first, other) == LADDER[1:]
    file.unlink()
    with pytest.raises(RecipeError, match=r"expected a file.*weights\.safetensors.* No such file"):
        plan(changes)


@pytest.mark.parametrize("key", ["onnx", "class_map"])
def test_a_file_of_a_teacher_counts_by_its_content_wherever_it_lies(plan, tmp_path, key):
    """One of several: the others, and what is not the file's, stay as they are."""

    def taught_by(name, content):
        file = tmp_path / name
        file.write_bytes(content)
        teacher = {"stage": "teach", key: str(file)} if key == "class_map" else {"onnx": str(file), "size": 24}
        return plan({"stages.finetune.teacher": [{"stage": "teach"}, teacher]})

    before = taught_by("first", b"content")
    assert str(tmp_path) not in json.dumps(before.node("finetune").basis)
    assert differing(before, taught_by("second", b"content")) == []
    assert differing(before, taught_by("first", b"contents")) == ["finetune", "fixres"]


def test_tensors_beside_an_onnx_file_count_by_their_content(plan, tmp_path):
    # a tensor whose values lie in another file names it by the key `location`
    name = b"values-" + 150 * b"x"
    entry = b"\x0a\x08location\x12" + bytes([len(name) & 0x7F | 0x80, len(name) >> 7]) + name
    (tmp_path / "model.onnx").write_bytes(b"graph" + entry)

    def with_tensors(content):
        (tmp_path / name.decode()).write_bytes(content)
        return plan({"stages.finetune.teacher": {"onnx": str(tmp_path / "model.onnx")}})

    before = with_tensors(b"tensors")
    assert differing(before, with_tensors(b"tensors")) == []
    assert differing(before, with_tensors(b"TENSORS")) == ["finetune", "fixres"]


@pytest.mark.parametrize("key", ["onnx", "class_map"])
def test_a_file_of_a_teacher_that_is_not_there_is_named_at_its_place(plan, tmp_path, key):
    teacher = {"stage": "teach", key: "gone"} if key == "class_map" else {"onnx": "gone"}
    with pytest.raises(RecipeError, match=r"yaml:\d+:\d+: stages\.finetune\.teacher.*: expected .* got gone: No such"):
        plan({"stages.finetune.teacher": teacher})


@pytest.mark.parametrize("key", ["weights", "file", "onnx_model"])
def test_a_key_of_a_plug_in_teacher_counts_as_it_stands(plan, versions, key):
    """Whatever it is called: only the plug-in knows what it means."""
    versions.owner["acme"] = "acme-models"
    versions.known["acme-models"] = "1.0"
    one, other = (plan({"stages.finetune.teacher": {"plugin": "acme", key: value}}) for value in ("a", "b"))
    assert differing(one, other) == ["finetune", "fixres"]


@pytest.mark.parametrize("key", ["teacher", "from"])
def test_where_a_weights_file_lies_does_not_matter(plan, tmp_path, key):
    first, moved = tmp_path / "weights.safetensors", tmp_path / "elsewhere.safetensors"
    safetensors.numpy.save_file({"a": np.array([1.0])}, first)

    def starting_from(file):
        if key == "teacher":
            return plan({"stages.finetune.teacher": {"network": "ResNet18_vd", "weights": str(file)}})
        student = {"stages.finetune.student": "MobileNetV3_small_x0_35"}
        return plan({"stages.finetune.from": str(file), "stages.finetune.learning_rate": 0.1, **student})

    before = starting_from(first)
    first.rename(moved)
    assert differing(before, starting_from(moved)) == []
    safetensors.numpy.save_file({"a": np.array([2.0])}, moved)
    assert differing(before, starting_from(moved)) == ["finetune", "fixres"]


@pytest.fixture
def folder(tmp_path):
    """Two classes of three images each."""
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (16, 16), (i, 0, 0)).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


def test_changed_images_change_what_reads_them(plan, folder):
    def of_folder():
        return plan({"data.unlabeled": str(folder)})

    before = of_folder()
    assert differing(before, of_folder()) == []
    image = folder / "cat" / "0.png"
    stat = image.stat()
    os.utime(image, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    touched = of_folder()
    assert differing(before, touched) == LADDER[1:]
    (folder / "cat" / "9.png").write_bytes(image.read_bytes())
    added = of_folder()
    assert differing(touched, added) == LADDER[1:]
    # of 7 images, those that are held out are not trained on
    assert added.node("distill").samples == 107 - (len(added.data.held_out) if "held out" in added.data.sources else 0)


def test_a_limit_is_a_smaller_set(plan):
    whole, limited = plan(), plan(limit=8)
    held = len(limited.data.sources["unlabeled"]) - 8
    assert held in (0, -1)  # a thirty-second of eight images
    assert [node.samples for node in limited.nodes] == [8, 16 + held, 8, 8]
    assert len(limited.data.validation) == 8
    assert differing(whole, limited) == LADDER
    assert differing(whole, plan(limit=10_000)) == []


# Data -----------------------------------------------------------------------------------------------------------------


def test_a_part_of_the_labeled_images_is_held_out(plan):
    made = plan({"data.validation": {"split": 0.2}})
    held, rest = (
        {part.key(i) for i in range(len(part))} for part in (made.data.validation, made.data.named(("labeled",)))
    )
    assert (len(held), len(rest)) == (20, 80)
    assert not held & rest
    assert np.bincount(made.data.validation.labels).tolist() == [5] * 4


def test_all_seeds_of_a_recipe_are_measured_on_the_same_held_out_images(plan):
    one, other = (plan({"data.validation": {"split": 0.2}, "seed": seed}).data for seed in (3, 4))
    assert one.validation.identity == other.validation.identity
    assert one.named(("labeled",)).identity == other.named(("labeled",)).identity


def test_without_a_validation_set_nothing_is_planned(plan):
    with pytest.raises(
        RecipeError, match=r"data: expected a labeled validation set, got none; add data\.validation: SO"
    ):
        plan({"data.validation": None})


def test_classes_that_differ_are_refused_with_both_sources(plan):
    message = r"data\.validation: expected the 4 classes of data\.labeled, got 5; the first difference is at label 4"
    with pytest.raises(DataError, match=message):
        plan({"data.validation": "builtin:shapes?count=40&classes=5"})


def listed(tmp_path, name, *labels):
    Image.new("RGB", (16, 16)).save(tmp_path / "image.png")
    lines = [f"{i}.png {label}" for i, label in enumerate(labels)]
    for i in range(len(labels)):
        (tmp_path / f"{i}.png").write_bytes((tmp_path / "image.png").read_bytes())
    (tmp_path / name).write_text("\n".join(lines) + "\n")
    return str(tmp_path / name)


def test_labels_without_names_are_classes_by_number(plan, tmp_path):
    sources = {"labeled": listed(tmp_path, "train.txt", 0, 1, 2), "validation": listed(tmp_path, "val.txt", 1, 1)}
    made = plan({"data.labeled": sources["labeled"], "data.validation": sources["validation"]})
    assert made.data.classes == ("0", "1", "2")


def test_a_label_beyond_the_named_classes_is_refused_with_its_image(plan, tmp_path):
    with pytest.raises(DataError, match=r"data\.validation: expected labels from 0 to 3, got 4 for .*1\.png"):
        plan({"data.validation": listed(tmp_path, "val.txt", 3, 4)})


def keys(samples):
    return {samples.key(i) for i in range(len(samples))}


def test_a_part_of_the_pool_is_held_out_of_all_training(plan):
    """A thirty-second of every shard; of 2,001 images, the last shard has one."""
    data = plan().data
    held = data.held_out
    assert not keys(held) & keys(data.named(("unlabeled",)))
    assert keys(held) | keys(data.named(("unlabeled",))) == keys(
        open_source(RECIPE["data"]["unlabeled"], labeled=False)
    )
    assert held.labels is None
    assert 31 * 2 <= len(held) <= 32 * 2 + 1


def test_all_seeds_of_a_recipe_hold_out_the_same_part_of_the_pool(plan):
    one, other = (plan({"seed": seed}).data for seed in (3, 4))
    assert one.held_out.identity == other.held_out.identity
    assert one.named(("unlabeled",)).identity == other.named(("unlabeled",)).identity


def test_without_a_pool_the_validation_set_is_what_is_held_out(plan):
    made = plan({"data.unlabeled": None, "stages.distill.data": "labeled"})
    assert made.data.held_out is made.data.validation


def test_a_pool_that_no_teacher_labels_stays_whole(plan):
    made = plan({"stages": {"teach": RECIPE["stages"]["teach"]}})
    assert len(made.data.named(("unlabeled",))) == 2001
    assert made.data.held_out is made.data.validation


def test_the_pool_alone_may_be_damaged_a_little(plan):
    """One in a thousand, rounded up."""
    data = plan().data
    allowed = math.ceil(len(data.named(("unlabeled",))) / 1000)
    assert data.damage_budget(("unlabeled",)) == allowed == 2
    assert data.damage_budget(("labeled",)) == 0
    assert data.damage_budget(("unlabeled", "labeled")) == allowed
    assert data.damage_budget(("held out",)) == 1


def test_a_stage_reads_its_sources_in_their_order(plan):
    data = plan().data
    both = data.named(("labeled", "unlabeled"))
    parts = [data.named((name,)) for name in ("labeled", "unlabeled")]
    assert [both.key(i) for i in range(len(both))] == [part.key(i) for part in parts for i in range(len(part))]
    assert both.labels is None
    assert data.test is None


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (
            "eval: [RandCropImage, CropImage]",
            r"images\.eval: expected operators that draw nothing, .* got RandCropImage",
        ),
        (
            "train: [RandCropImage, {NormalizeImage: {mean: [0.5, 0.5, 0.5]}}]",
            r"images\.eval: expected the normalization of images\.train, mean \[0\.5, .* got mean \[0\.485, ",
        ),
        (
            "eval: [ResizeImage, CropImage, {NormalizeImage: {mean: [123, 116, 103]}}]",
            r"expected a mean of pixels, from 0 to 1 where scale is 0\.0039.*, got \[123\.0, .*scale: 1",
        ),
    ],
)
def test_what_would_show_a_student_other_images_than_it_is_judged_by_is_refused(tmp_path, images, said):
    (tmp_path / "r.yaml").write_text(
        "name: r\n"
        'data: {labeled: "builtin:shapes?count=24&size=16", validation: "builtin:shapes?count=8&size=16&seed=1"}\n'
        f"images:\n  resolution: 16\n  {images}\n"
        "stages: {teach: {kind: pretrain, network: MobileNetV3_small_x0_35, data: labeled, epochs: 1}}\n"
    )
    with pytest.raises(RecipeError, match=said):
        make_plan(read_recipe(tmp_path / "r.yaml"))
