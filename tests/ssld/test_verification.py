"""Kept labels against a teacher that is asked again: one that is the same, and one that only says so."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssld import datasets, plugins, verification
from ssld.contracts import TeacherSpec
from ssld.data import samples as sampling
from ssld.data.images import decode
from ssld.data.loader import Damage
from ssld.data.transforms import view
from ssld.errors import LabelError, RecipeError, TeacherError
from ssld.graph import make_plan
from ssld.labels.inspect import kept_in
from ssld.labels.labelling import Work, label
from ssld.members import Members
from ssld.recipe import dump, read_recipe
from ssld.rundir import Options, RunDirectory
from ssld.seeds import derive
from ssld.verification import run_of, verify, verify_all

SHAPES = "builtin:shapes?size=16&classes=4&"
DISTILL = {
    "kind": "distill",
    "teacher": {"plugin": "acme"},
    "student": "MobileNetV3_small_x0_35",
    "epochs": 6,
    "labels": {"views": 2, "top_k": 2, "seed": 5},
}
RECIPE = {
    "name": "verification",
    "images": {"resolution": 16},
    "data": {
        "unlabeled": f"{SHAPES}count=40",
        "labeled": f"{SHAPES}count=16&seed=1",
        "validation": f"{SHAPES}count=24&seed=2",
    },
    "stages": {"distill": {**DISTILL, "data": "unlabeled"}, "again": {**DISTILL, "data": "labeled"}},
}


class Projection:
    """A linear teacher: its answer for an image does not depend on the others of the batch."""

    def __init__(self):
        self.spec = TeacherSpec(12, "projection", mean=None, std=None)
        self.weights = np.random.default_rng(0).normal(0, 1e-3, (4, 12 * 12 * 3))
        self.asked = 0

    def predict(self, images):
        self.asked += len(images)
        pixels = images.reshape(len(images), 1, -1)
        return (pixels * self.weights).sum(axis=2).astype(np.float32)


@pytest.fixture
def acme(monkeypatch, tmp_path):
    """The teacher of the plug-in `acme`; shards of eight, and nothing held out."""
    teacher = Projection()

    def make():
        return teacher

    load, origin = plugins.load, plugins.origin
    monkeypatch.setattr(plugins, "load", lambda kind, name: make if name == "acme" else load(kind, name))
    monkeypatch.setattr(plugins, "origin", lambda kind, name: "acme 1" if name == "acme" else origin(kind, name))
    monkeypatch.setattr(sampling, "VIRTUAL_SHARD", 8)
    monkeypatch.setattr(datasets, "LARGEST_SHARE", 0.0)
    monkeypatch.chdir(tmp_path)
    return teacher


def begin(*overrides):
    """A run in the directory `run`, and what finds its teachers."""
    Path("labels.yaml").write_text(json.dumps(RECIPE))
    recipe = read_recipe("labels.yaml", overrides)
    run = RunDirectory(Path("run"))
    run.begin(dump(recipe), Options())
    return Members(run, make_plan(recipe), Options(), lambda _: None)


def make_labels(members, name="distill", damaged=0):
    """Labels of a stage's data, or of the validation images; returns their store and the samples."""
    data, node = members.plan.data, members.plan.node("distill" if name == "validation" else name)
    if name == "validation":
        ((store, member),), samples = members.tested_stores(node, members.of(node)), data.validation
    else:
        ((store, member),), samples = members.stores(node), data.named(node.settings.data)
    label(store, member.teacher, samples, range(len(samples.shard_ids)), Work(Damage(damaged)))
    return store, samples


def only():
    (kept,) = kept_in(Path("run"))
    return kept


def softmax(logits):
    powers = [math.exp(value) for value in logits]
    return [power / sum(powers) for power in powers]


def ignore(_):
    """No remark is expected to be worth reading."""


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_the_same_teacher_agrees_with_its_labels(acme, top_k):
    store, _ = make_labels(begin(f"stages.distill.labels.top_k={top_k}"))
    asked = acme.asked
    verdict = verify(only(), Path("run"), ignore)
    assert acme.asked - asked == verdict.views == 80
    assert (verdict.images, verdict.agreement) == (40, 1.0)
    assert 0 <= verdict.kl < 1e-3
    assert verdict.largest < 0.02
    rows, faults = verify_all([only()], None, 0.01, ignore)
    assert faults == []
    assert rows[0][:5] == (store.directory.name, "5", "40", "80", "1.0000")


def test_a_teacher_that_changed_behind_its_fingerprint_is_found(acme):
    store, _ = make_labels(begin())
    acme.weights = -acme.weights
    rows, (fault,) = verify_all([only()], None, 0.01, ignore)
    assert f"{store.directory}: expected the teacher to agree with at least 95% of its labels" in fault
    assert fault.endswith("remove them with ssld labels rm, and label again")
    assert float(rows[0][4]) < 0.5


def test_a_teacher_that_answers_alike_with_another_certainty_is_found_by_the_divergence(acme):
    make_labels(begin())
    acme.weights = 1.5 * acme.weights
    (row,), faults = verify_all([only()], None, 0.01, ignore)
    assert row[4] == "1.0000"
    assert len(faults) == 1
    assert verify_all([only()], None, 10.0, ignore)[1] == [], "within that tolerance"


@pytest.mark.parametrize(("top_k", "temperature"), [(1, 1.0), (2, 1.0), (2, 2.0), (4, 1.0), (4, 4.0)])
def test_the_numbers_are_those_of_the_definitions(acme, top_k, temperature):
    """KL(kept || teacher) over the K classes and the rest as one, by the exact answers of both teachers.

    The old one's are kept in 8 bits, which moves the numbers by a few in a thousand.
    """
    loss = f"stages.distill.loss={{name: kl, temperature: {temperature}}}"
    labels = f"stages.distill.labels={{views: 2, top_k: {top_k}, temperature: {temperature}, seed: 5}}"
    store, samples = make_labels(begin(loss, labels))
    old = Projection()
    acme.weights = acme.weights + np.random.default_rng(1).normal(0, 5e-4, acme.weights.shape)
    same, divergence, largest = [], [], []
    for index in range(len(samples)):
        for number in range(2):
            seed = derive(5, samples.key(index), number)
            pixels = view(decode(samples.read(index)), store.description.pipeline, seed)[None]
            before, after = (teacher.predict(pixels)[0] / temperature for teacher in (old, acme))
            same.append(before.argmax() == after.argmax())
            best = np.argsort(-before)[:top_k]
            p, q = np.array(softmax(before)), np.array(softmax(after))
            pairs = [(p[number], q[number]) for number in best]
            largest += [abs(a - b) for a, b in pairs]
            if top_k < 4:
                pairs.append((1 - p[best].sum(), 1 - q[best].sum()))
            divergence.append(sum(a * math.log(a / b) for a, b in pairs))
    verdict = verify(only(), Path("run"), ignore)
    assert verdict.agreement == np.mean(same)
    assert 0.1 < verdict.agreement < 0.95
    assert verdict.kl == pytest.approx(np.mean(divergence), rel=0.05)
    assert verdict.largest == pytest.approx(max(largest), abs=0.02)


def test_of_many_images_some_are_asked_about_from_the_first_to_the_last(acme, monkeypatch):
    monkeypatch.setattr(verification, "SAMPLED", 5)
    store, samples = make_labels(begin())
    shown = []
    predict = acme.predict
    acme.predict = lambda images: shown.extend(image.tobytes() for image in images) or predict(images)
    verdict = verify(only(), Path("run"), ignore)
    assert (verdict.images, verdict.views, len(shown)) == (5, 10, 10)
    ends = [view(decode(samples.read(i)), store.description.pipeline, derive(5, samples.key(i), 0)) for i in (0, 39)]
    assert [image.tobytes() for image in ends] == [shown[0], shown[-2]]


def test_labels_of_some_shards_are_enough(acme):
    store, samples = make_labels(begin())
    for shard in (0, 2, 3):
        store.file(samples, shard).unlink()
    assert verify(only(), Path("run"), ignore).images == 16


def test_damaged_images_are_passed_over(acme):
    Path("pool").mkdir()
    for number in range(10):
        Image.new("RGB", (16, 16), (20 * number, 90, 0)).save(f"pool/{number}.png")
    Path("pool/4.png").write_bytes(b"no image")
    make_labels(begin("data.unlabeled=pool"), damaged=1)
    assert verify(only(), Path("run"), ignore).images == 9


def test_labels_of_validation_images_are_verified_too(acme):
    make_labels(begin(), "validation")
    assert (verdict := verify(only(), Path("run"), ignore)).images == verdict.views == 24


def test_labels_that_stages_share_are_verified_by_whichever_has_some(acme):
    """Both stages keep labels in one directory, of different images; those of the first are still to be made."""
    make_labels(begin(), "again")
    assert verify(only(), Path("run"), ignore).images == 16


def test_labels_of_images_that_are_no_more_are_told_from_those_of_another_recipe(acme):
    store, _ = make_labels(begin())
    begin(f"data.unlabeled={SHAPES}count=40&seed=9")
    with pytest.raises(LabelError, match=f"{store.directory}: expected labels of .*, got none"):
        verify(only(), Path("run"), ignore)
    begin("stages.distill.labels.views=3", "stages.again.labels.views=3")
    with pytest.raises(RecipeError, match=f"run: expected a run that uses the labels of {store.directory}, got one"):
        verify(only(), Path("run"), ignore)


def test_the_run_of_labels_is_the_one_they_lie_in_or_is_named(acme):
    make_labels(begin())
    assert run_of(only()) == Path("run").resolve()
    make_labels(begin("stages.distill.labels.store=shared"))
    (kept,) = kept_in(Path("shared"))
    with pytest.raises(RecipeError, match=r"expected labels inside a run, got none above; name a run .* --run"):
        run_of(kept)
    assert verify_all([kept], Path("run"), 0.01, ignore)[1] == []


def test_damaged_files_are_all_named_and_their_teacher_is_not_asked(acme):
    members = begin()
    store, samples = make_labels(members)
    make_labels(members, "validation")
    for shard in (1, 3):
        store.file(samples, shard).write_bytes(b"")
    asked = acme.asked
    rows, faults = verify_all(kept_in(Path("run")), None, 0.01, ignore)
    assert sorted(fault.split(" ")[0] for fault in faults) == sorted(str(store.file(samples, s)) for s in (1, 3))
    assert {row[0]: row[2] for row in rows}[store.directory.name] == "", "nothing is said of the teacher"
    assert acme.asked - asked == 24, "about the validation images, whose labels are whole"


def test_a_file_under_the_name_of_another_shard_is_found(acme):
    store, samples = make_labels(begin())
    store.file(samples, 1).write_bytes(store.file(samples, 0).read_bytes())
    with pytest.raises(LabelError, match=f"{store.file(samples, 1)}: expected shard {samples.shard_ids[1]}"):
        verify(only(), Path("run"), ignore)


def test_changed_rendering_is_found_before_the_teacher_is_asked(acme, monkeypatch):
    make_labels(begin())
    monkeypatch.setattr("ssld.data.operators.FILTERS", dict.fromkeys(("bilinear",), Image.Resampling.NEAREST))
    asked = acme.asked
    with pytest.raises(LabelError, match="as the teacher saw it"):
        verify(only(), Path("run"), ignore)
    assert acme.asked == asked


def test_a_useless_answer_is_an_error_of_the_teacher(acme):
    make_labels(begin())
    acme.weights = acme.weights * np.nan
    with pytest.raises(TeacherError, match="expected finite logits"):
        verify(only(), Path("run"), ignore)


def test_labels_of_another_run_in_a_shared_store_are_read_and_not_asked_about(acme):
    store, _ = make_labels(begin())
    other = store.directory.with_name("0123456789abcdef")
    shutil.copytree(store.directory, other)
    told = []
    rows, faults = verify_all(kept_in(Path("run")), Path("run"), 0.01, told.append)
    assert faults == []
    assert [row[2] for row in rows] == ["not asked", "40"]
    assert "got one that does not" in told[0]
