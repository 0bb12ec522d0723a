"""The soft labels of a stage: made where they are missing or no good, and found where they are there."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from ssld import datasets, files, plugins
from ssld.contracts import TeacherSpec
from ssld.data import samples as sampling
from ssld.data.images import decode
from ssld.data.loader import Damage, Replay, training_batches
from ssld.data.transforms import Pipeline, view
from ssld.errors import DataError, Interrupted, LabelError, StorageError, TeacherError
from ssld.graph import make_plan, pipeline
from ssld.journal import Journal
from ssld.labels.format import pack, unpack
from ssld.labels.labelling import Work, label
from ssld.labels.store import Store
from ssld.members import Members
from ssld.recipe import read_recipe
from ssld.rundir import Options, RunDirectory
from ssld.soft import SoftSource

SHAPES = "builtin:shapes?size=16&classes=4&"
DISTILL = {
    "kind": "distill",
    "teacher": {"plugin": "acme"},
    "student": "MobileNetV3_small_x0_35",
    "epochs": 6,
    "labels": {"views": 2, "top_k": 3, "store": "store"},
}
RECIPE = {
    "name": "labels",
    "images": {"resolution": 16},
    "data": {
        "unlabeled": f"{SHAPES}count=40",
        "labeled": f"{SHAPES}count=16&seed=1",
        "validation": f"{SHAPES}count=24&seed=2",
    },
    "stages": {
        "distill": {**DISTILL, "data": "unlabeled"},
        "again": {**DISTILL, "data": ["unlabeled", "labeled"], "resolution": 20},
    },
}
TWO_TEACHERS = "stages.distill.teacher=[{plugin: acme}, {plugin: acme, seed: 1, weight: 3}]"


class Projection:
    """A linear teacher of 12 px: its answer for an image does not depend on the others of the batch."""

    def __init__(self, seed):
        self.spec = TeacherSpec(12, f"projection {seed}", mean=None, std=None)
        self.weights = np.random.default_rng(seed).normal(0, 1e-3, (4, 12 * 12 * 3))
        self.asked = 0

    def predict(self, images):
        self.asked += len(images)
        pixels = images.reshape(len(images), 1, -1)
        return (pixels * self.weights).sum(axis=2).astype(np.float32)


@pytest.fixture
def acme(monkeypatch, tmp_path):
    """The teachers of the plug-in `acme` by their key `seed`, made when they are first named; shards of eight."""
    made = {}

    def make(seed=0):
        return made.setdefault(seed, Projection(seed))

    load, origin = plugins.load, plugins.origin
    monkeypatch.setattr(plugins, "load", lambda kind, name: make if name == "acme" else load(kind, name))
    monkeypatch.setattr(plugins, "origin", lambda kind, name: "acme 1" if name == "acme" else origin(kind, name))
    monkeypatch.setattr(sampling, "VIRTUAL_SHARD", 8)
    monkeypatch.chdir(tmp_path)
    return made


@pytest.fixture
def open_soft(acme):
    """open_soft(*overrides, options=…, stop=…): what a process has that runs the recipe in the directory `run`."""
    journals = []

    def make(*overrides, options=None, stop=lambda: None):
        Path("recipe.yaml").write_text(json.dumps(RECIPE))
        Path("run").mkdir(exist_ok=True)
        plan = make_plan(read_recipe("recipe.yaml", overrides))
        journals.append(Journal(Path("run"), Console(file=io.StringIO())))
        members = Members(RunDirectory(Path("run")), plan, options or Options(), journals[-1].note)
        return SoftSource(members, journals[-1], stop)

    yield make
    for journal in journals:
        journal.close()


def labels_of(soft, name="distill"):
    return soft.labels(soft.members.plan.node(name))


def store_of(soft, name="distill"):
    return soft.members.stores(soft.members.plan.node(name))[0][0]


def pool_of(soft):
    return soft.members.plan.data.named(("unlabeled",))


def contents(folder="store"):
    return {path: path.read_bytes() for path in Path(folder).glob("*/*.safetensors")}


def forbid(teacher):
    """Let it fail when it is asked once more."""

    def predict(images):
        raise AssertionError(f"asked about {len(images)} images")

    teacher.predict = predict


def told():
    return Path("run/train.log").read_text()


# Asked once -----------------------------------------------------------------------------------------------------------


def test_labels_are_the_teachers_answers_to_the_views_of_training(open_soft, acme):
    soft = open_soft()
    labels, pool = labels_of(soft), pool_of(soft)
    assert labels.replay == Replay(0, 2)
    train = pipeline(soft.members.plan.recipe, "train", 16)
    batches = training_batches(
        pool, (train, train.at(12)), batch_size=16, seed=5, damage=Damage(0), replay=labels.replay
    )
    for _ in range(8):
        batch = next(batches)
        wanted = unpack(pack(acme[0].predict(batch.images[1]), 3), 4, 3)
        got = labels.of(batch)
        assert np.array_equal(got.ids, wanted.ids)
        assert np.array_equal(got.logits, wanted.logits)
    batches.close()


def test_each_view_is_asked_about_once(open_soft, acme):
    soft = open_soft()
    first = labels_of(soft)
    assert acme[0].asked == 2 * len(pool_of(soft))
    forbid(acme[0])
    again = labels_of(open_soft())
    assert (again.files, again.fingerprint) == (first.files, first.fingerprint)


@pytest.mark.parametrize(
    "overrides",
    [
        ("seed=5",),
        ("stages.distill.resolution=24",),
        ("images.resolution=32",),
        ("stages.distill.student=ResNet18_vd",),
        ("stages.distill.epochs=60", "stages.distill.batch_size=8", "stages.distill.learning_rate=0.3"),
        ("stages.distill.loss=kl",),
        (
            "images.train=[RandCropImage, RandFlipImage, {NormalizeImage: {mean: [0, 0, 0]}}]",
            "images.eval=[ResizeImage, CropImage, {NormalizeImage: {mean: [0, 0, 0]}}]",
        ),
    ],
)
def test_another_run_over_the_same_views_asks_nobody(open_soft, acme, overrides):
    """Another training seed, resolution, student, length, loss or normalization; the store lies outside the runs."""
    first = labels_of(open_soft()).files
    forbid(acme[0])
    assert labels_of(open_soft(*overrides)).files == first


def test_two_stages_share_what_they_have_in_common(open_soft, acme):
    """The second reads the pool and the labeled images as one set: only the latter are new."""
    soft = open_soft()
    labels_of(soft)
    before = acme[0].asked
    labels = labels_of(soft, "again")
    assert acme[0].asked - before == 2 * 16
    pool = len(pool_of(soft))
    assert np.array_equal(
        labels.at_test_time(np.arange(pool)).logits, labels_of(soft).at_test_time(np.arange(pool)).logits
    )


def test_a_grown_pool_asks_about_the_new_shards_only(open_soft, acme):
    few = len(pool_of(open_soft()))
    labels_of(open_soft())
    before = acme[0].asked
    soft = open_soft(f"data.unlabeled={SHAPES}count=72")
    labels_of(soft)
    assert acme[0].asked - before == 2 * (len(pool_of(soft)) - few)


@pytest.mark.parametrize("override", ["views=3", "top_k=2", "seed=1", "temperature=2.0"])
def test_labels_that_are_to_be_made_otherwise_are_made_beside_the_others(open_soft, acme, override):
    temperature = ("stages.distill.loss={name: kl, temperature: 2.0}",) if "temperature" in override else ()
    labels_of(open_soft())
    before = contents()
    labels_of(open_soft(f"stages.distill.labels.{override}", *temperature))
    assert before.items() < contents().items()
    assert len(contents()) == 2 * len(before)


def test_a_second_teacher_is_asked_alone(open_soft, acme):
    labels_of(open_soft())
    before = acme[0].asked
    forbid(acme[0])
    soft = open_soft(TWO_TEACHERS)
    labels = labels_of(soft)
    assert acme[1].asked == before
    assert [weight for _, weight in labels.readers] == [1, 3]
    # its order and weights change the mean, and no label
    forbid(acme[1])
    other = labels_of(open_soft("stages.distill.teacher=[{plugin: acme, seed: 1}, {plugin: acme}]"))
    assert other.fingerprint != labels.fingerprint


def test_without_a_store_of_their_own_labels_lie_in_the_run(open_soft, acme):
    labels_of(open_soft("stages.distill.labels.store=null"))
    assert len(contents("run/labels.store")) == 5
    assert contents() == {}


def test_asked_in_every_step_a_teacher_says_the_same(open_soft, acme):
    """Stored, to within 8 bits of log-probability."""
    online, soft = open_soft("stages.distill.labels=online"), open_soft("stages.distill.labels.top_k=4")
    asking, stored, pool = labels_of(online), labels_of(soft), pool_of(soft)
    train = pipeline(soft.members.plan.recipe, "train", 16)
    batches = training_batches(
        pool, (train, *asking.pipelines(train)), batch_size=32, seed=5, damage=Damage(0), replay=stored.replay
    )
    batch = next(batches)
    batches.close()
    powers = [np.exp(soft.logits) for soft in (asking.of(batch), stored.of(batch))]
    answers = [power / power.sum(axis=1, keepdims=True) for power in powers]
    np.testing.assert_allclose(*answers, atol=0.02)
    assert (asking.files, asking.replay) == ("", None)
    assert asking.fingerprint == stored.fingerprint


# Files that are no good -----------------------------------------------------------------------------------------------


def flip(path, soft):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def make_directory(path, soft):
    path.unlink()
    path.mkdir()


def make_dangling_link(path, soft):
    path.unlink()
    path.symlink_to("nowhere")


def copy_from(**changes):
    """The labels of the same shard by another description, under the name of ours."""

    def spoil(path, soft):
        store, pool = store_of(soft), pool_of(soft)
        other = Store(Path("elsewhere"), replace(store.description, **changes))
        label(other, Projection(0), pool, [1], Work(Damage(0)))
        shutil.copy(other.file(pool, 1), path)

    return spoil


def copy_of_changed_shard(path, soft):
    """Labels of a shard that has as many samples, and other images."""
    changed = make_plan(read_recipe("recipe.yaml", [f"data.unlabeled={SHAPES}count=40&seed=9"])).data
    store, samples = store_of(soft), changed.named(("unlabeled",))
    label(store, Projection(0), samples, [1], Work(Damage(0)))
    shutil.copy(store.file(samples, 1), path)
    store.file(samples, 1).unlink()


SPEC = Projection(0).spec
NO_FLIP = Pipeline.read(["RandCropImage"], 12)
SPOILED = {
    "flipped bit": flip,
    "cut short": lambda path, soft: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path, soft: os.truncate(path, 0),
    "another teacher": copy_from(teacher=replace(SPEC, fingerprint="another")),
    "another precision": copy_from(teacher=replace(SPEC, precision="bfloat16")),
    "another transform": copy_from(pipeline=NO_FLIP),
    "another seed": copy_from(replay=Replay(1, 2)),
    "changed shard": copy_of_changed_shard,
    "directory": make_directory,
    "dangling link": make_dangling_link,
}


@pytest.mark.parametrize("kind", SPOILED)
def test_a_file_that_is_no_good_is_named_and_made_again(open_soft, acme, kind):
    soft = open_soft()
    first, before = labels_of(soft), contents()
    path = store_of(soft).file(pool_of(soft), 1)
    SPOILED[kind](path, soft)
    assert {name: os.path.isfile(name) and name.read_bytes() for name in before} != before
    asked = acme[0].asked
    again = labels_of(open_soft())
    assert f"warning: {path}" in told()
    assert acme[0].asked - asked == 2 * int(pool_of(soft).shard_sizes[1]), "only this shard"
    assert contents() == before
    assert again.files == first.files


@pytest.mark.parametrize("kind", SPOILED)
def test_a_file_that_is_no_good_is_made_again_by_the_part_it_belongs_to(open_soft, acme, kind):
    soft = open_soft()
    labels_of(soft)
    before = contents()
    SPOILED[kind](store_of(soft).file(pool_of(soft), 1), soft)
    (first,) = open_soft().label(soft.members.plan.node("distill"), 1, 2)
    assert (first.written, first.missing) == (0, 1), "the first part has the shards 0, 2 and 4"
    (second,) = open_soft().label(soft.members.plan.node("distill"), 2, 2)
    assert (second.written, second.missing) == (1, 0)
    assert contents() == before


# Images ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(acme, monkeypatch):
    """A pool of twelve images in files of one length, of which none is held out: that would depend on their times."""
    monkeypatch.setattr(datasets, "LARGEST_SHARE", 0.0)
    Path("pool").mkdir()
    for number in range(12):
        draw(number, number)
    return "data.unlabeled=pool"


def draw(number, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(f"pool/{number:02}.png", compress_level=0)


def test_a_changed_image_behind_the_same_time_stops_the_run(open_soft, acme, folder):
    labels_of(open_soft(folder))
    first = Path("pool/00.png")
    facts = first.stat()
    draw(0, 99)
    os.utime(first, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    forbid(acme[0])
    with pytest.raises(LabelError, match=f"{first} to be rendered as the teacher saw it"):
        labels_of(open_soft(folder))


def test_an_image_of_another_time_has_its_shard_labelled_again(open_soft, acme, folder):
    labels_of(open_soft(folder))
    before = acme[0].asked
    os.utime("pool/09.png", ns=(1, 1))
    labels_of(open_soft(folder))
    assert acme[0].asked - before == 2 * 4, "the second shard has four images"


def test_a_pool_may_lose_an_image_in_a_thousand(open_soft, acme, folder):
    Path("pool/02.png").write_bytes(b"no image")
    labels = labels_of(open_soft(folder))
    assert "skipped, damaged: pool/02.png: expected a whole" in told()
    with pytest.raises(LabelError, match=r"pool/02\.png: expected a soft label"):
        labels.at_test_time(np.array([1, 2]))
    assert np.isfinite(labels.at_test_time(np.array([0, 1, 3])).logits).all()


def test_more_damage_ends_the_labelling(open_soft, acme, folder):
    for number in (2, 5):
        Path(f"pool/{number:02}.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"expected at most 1 damaged images, got 2; the last is pool/05\.png"):
        labels_of(open_soft(folder))


# What ends a labelling ------------------------------------------------------------------------------------------------


def test_a_signal_ends_it_and_the_next_call_goes_on(open_soft, acme):
    whole = labels_of(open_soft("stages.distill.labels.store=other"))
    acme.clear()
    with pytest.raises(Interrupted, match="whole shards are kept") as caught:
        labels_of(open_soft(stop=lambda: 2 if acme[0].asked > 20 else None))
    assert caught.value.exit_code == 130
    asked, kept = acme[0].asked, len(contents())
    assert 0 < kept < 5
    soft = open_soft()
    views = 2 * int(pool_of(soft).shard_sizes.sum())
    stored = 2 * int(np.delete(pool_of(soft).shard_sizes, store_of(soft).missing(pool_of(soft))).sum())
    assert labels_of(soft).files == whole.files
    assert acme[0].asked - asked == views - stored


def test_a_full_disk_ends_it_with_what_it_needs(open_soft, acme, monkeypatch):
    class Full(files.Disk):
        def write(self, path, data):
            if len(contents()) == 2 and "safetensors" in path.name:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            super().write(path, data)

    monkeypatch.setattr(files, "disk", Full())
    with pytest.raises(StorageError, match=r"No space left on device; ([0-9,]+) bytes are needed"):
        labels_of(open_soft())
    assert len(contents()) == 2
    monkeypatch.setattr(files, "disk", files.Disk())
    labels_of(open_soft())
    assert len(contents()) == 5


def test_a_useless_answer_ends_it_with_the_teacher_and_the_image(open_soft, acme):
    soft = open_soft()
    good = soft.members.of(soft.members.plan.node("distill"))[0].teacher
    answer = good.predict
    good.predict = lambda images: answer(images) * (np.nan if good.asked > 16 else 1)
    message = r"^the teacher plugin acme \(acme 1\): expected finite logits, got \[nan.* for builtin:shapes.*: image "
    with pytest.raises(TeacherError, match=message):
        labels_of(soft)
    assert len(contents()) == 1


# Parts ----------------------------------------------------------------------------------------------------------------


def test_parts_together_make_all_labels(open_soft, acme):
    soft = open_soft()
    node = soft.members.plan.node("distill")
    done = [open_soft().label(node, number, 3)[0] for number in (1, 2, 3)]
    assert [(part.written, part.missing) for part in done] == [(2, 3), (2, 1), (1, 0)]
    assert {part.directory for part in done} == {store_of(soft).directory}
    assert (done[0].stage, done[0].who) == ("distill", "the teacher plugin acme (acme 1)")
    forbid(acme[0])
    assert [part.written for part in open_soft().label(node, 1, 1)] == [0]
    labels_of(open_soft())


def test_each_teacher_has_its_own_row(open_soft, acme):
    soft = open_soft(TWO_TEACHERS)
    done = soft.label(soft.members.plan.node("distill"), 1, 1)
    assert [part.written for part in done] == [5, 5]
    assert len({part.directory for part in done}) == 2


# How good a teacher is ------------------------------------------------------------------------------------------------


class Knowing(Projection):
    """One that saw the validation set, and is wrong about its first images."""

    def __init__(self, validation, shown, wrong):
        super().__init__(0)
        self.known = {}
        for index in range(len(validation)):
            pixels = view(decode(validation.read(index)), shown, 0)
            self.known[pixels.tobytes()] = (validation.labels[index] + (index < wrong)) % 4

    def predict(self, images):
        answers = super().predict(images)
        known = [self.known.get(image.tobytes()) for image in images]
        return np.stack(
            [answer if label is None else 5 * np.eye(4)[label] for answer, label in zip(answers, known, strict=True)]
        )


@pytest.fixture
def knowing(open_soft, acme):
    """knowing(wrong): lets the teacher know the validation set but for so many images."""
    plan = open_soft().members.plan
    shown = pipeline(plan.recipe, "eval", 16).at(12)
    return lambda wrong: acme.__setitem__(0, Knowing(plan.data.validation, shown, wrong))


def test_a_teacher_is_measured_once_for_all_runs(open_soft, acme, knowing):
    knowing(wrong=6)
    soft = open_soft()
    node = soft.members.plan.node("distill")
    soft.check(node)
    assert acme[0].asked == 24
    events = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    (event,) = [event for event in events if event["event"] == "teacher"]
    assert (event["accuracy"], event["images"], event["chance"]) == (0.75, 24, 0.25)
    assert "the teacher plugin acme (acme 1): top-1 0.750" in told()
    forbid(acme[0])
    soft.check(node)
    open_soft().check(node)


def test_a_teacher_no_better_than_chance_is_refused(open_soft, acme, knowing):
    knowing(wrong=20)
    soft = open_soft()
    with pytest.raises(TeacherError, match=r"expected better than chance, got top-1 0\.167"):
        soft.check(soft.members.plan.node("distill"))


@pytest.mark.parametrize("options", [Options(trust_teacher=True), Options(limit=24)])
def test_a_trusted_teacher_is_measured_all_the_same(open_soft, acme, knowing, options):
    knowing(wrong=20)
    soft = open_soft(options=options)
    soft.check(soft.members.plan.node("distill"))
    assert "top-1 0.167" in told()


def test_a_student_is_compared_on_what_is_held_out(open_soft, acme, knowing):
    knowing(wrong=6)
    soft = open_soft()
    reference = soft.reference(soft.members.plan.node("distill"))
    held_out, evaluate = soft.members.plan.data.held_out, pipeline(soft.members.plan.recipe, "eval", 16).at(12)
    assert held_out.labels is None, "a part of the pool"
    assert not {held_out.key(i) for i in range(len(held_out))} & {
        pool_of(soft).key(i) for i in range(len(pool_of(soft)))
    }
    assert (reference.teacher, reference.chance) == (0.75, 0.25)
    assert (reference.samples.identity, reference.damage_budget) == (held_out.identity, 1)
    indices = np.arange(len(held_out))
    shown = np.stack([view(decode(held_out.read(i)), evaluate, 0) for i in indices])
    wanted = unpack(pack(acme[0].predict(shown).astype(np.float32), 4), 4, 4)
    assert np.array_equal(reference.soft(indices).logits, wanted.logits)
    # its labels are kept, too
    forbid(acme[0])
    open_soft().reference(soft.members.plan.node("distill"))
