"""Asking a teacher shard by shard: what is kept when all goes well, when it is stopped, when an answer is no good."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssld import files
from ssld.contracts import TeacherSpec
from ssld.data.images import decode
from ssld.data.loader import Damage, Replay
from ssld.data.pack import pack as pack_shards
from ssld.data.samples import concatenate, digest
from ssld.data.sources import open_source
from ssld.data.transforms import Pipeline, view
from ssld.errors import DataError, Interrupted, StorageError, TeacherError
from ssld.labels import labelling
from ssld.labels.format import pack
from ssld.labels.labelling import Work, label, part
from ssld.labels.store import Description, Store
from ssld.seeds import derive

CLASSES = tuple("abcde")
TRAIN = Pipeline.read([{"RandCropImage": {"scale": [0.5, 1.0]}}, "RandFlipImage"], 12)
REPLAY = Replay(seed=3, views=2)
IN_ANOTHER_PROCESS = "import runpy, sys; runpy.run_path(sys.argv[1])['label_shapes'](sys.argv[2])"


class Projection:
    """A linear teacher: all pixels count, and its answer for an image does not depend on the others of the batch."""

    def __init__(self):
        self.spec = TeacherSpec(12, "projection", mean=None, std=None)
        self.weights = np.random.default_rng(0).normal(0, 1e-3, (len(CLASSES), 12 * 12 * 3))
        self.asked = 0

    def predict(self, images):
        self.asked += len(images)
        pixels = images.reshape(len(images), 1, -1)
        return (pixels * self.weights).sum(axis=2).astype(np.float32)


class Failing(Projection):
    """One that spoils the answer to a batch once it has been shown so many images before."""

    def __init__(self, after, spoil):
        super().__init__()
        self.after, self.spoil = after, spoil

    def predict(self, images):
        good, before = super().predict(images), self.asked - len(images)
        return self.spoil(good) if before >= self.after else good


def cut(samples, size):
    """The same samples in shards of so many."""
    whole, rest = divmod(len(samples), size)
    return replace(samples, shard_sizes=np.array([size] * whole + [rest] * (rest > 0)))


def shapes(count=22, seed=0):
    return cut(open_source(f"builtin:shapes?count={count}&size=16&seed={seed}", labeled=False), 8)


def store_in(root, who="the teacher", top_k=3):
    return Store(Path(root), Description(Projection().spec, TRAIN, REPLAY, top_k, 1.0, CLASSES, who))


def label_all(store, samples, teacher=None, damaged=0, **work):
    shards = range(len(samples.shard_ids))
    return label(store, teacher or Projection(), samples, shards, Work(Damage(damaged), **work))


def label_shapes(root):
    """What the other process does."""
    label_all(store_in(root), shapes())


def contents(store):
    """The label files, by name."""
    return {path.name: path.read_bytes() for path in store.directory.glob("*.safetensors")}


def answer(samples, index, number, top_k=3):
    """What must be stored of a view, from the definitions: the draw of its key, rendered, shown to the teacher."""
    pixels = view(decode(samples.read(index)), TRAIN, derive(REPLAY.seed, samples.key(index), number))
    return pack(Projection().predict(pixels[None])[0], top_k)


def draw(folder, numbers):
    """Add images of these numbers to a folder, and open all that it holds, four to a shard."""
    folder.mkdir(exist_ok=True)
    for number in numbers:
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    return cut(open_source(str(folder), labeled=False), 4)


def draw_with_broken(folder, *broken):
    """Eleven images in a folder, of which these are none."""
    draw(folder, range(11))
    for number in broken:
        (folder / f"{number:02}.png").write_bytes(b"no image")
    return draw(folder, ())


@pytest.fixture
def batches_of_four(monkeypatch):
    monkeypatch.setattr(labelling, "BATCH", 4)


# What is stored -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [1, 3, 5])
def test_every_view_of_every_sample_has_the_teachers_answer(tmp_path, top_k):
    pool, store = shapes(), store_in(tmp_path, top_k=top_k)
    assert label_all(store, pool) == 3
    for shard, first in enumerate((0, 8, 16)):
        labels = store.load(pool, shard).packed
        for sample, number in np.ndindex(labels.rest.shape):
            wanted = answer(pool, first + sample, number, top_k)
            assert np.array_equal(labels.ids[sample, number], wanted.ids)
            assert np.array_equal(labels.codes[sample, number], wanted.codes)
            assert labels.rest[sample, number] == wanted.rest


def test_another_process_writes_the_same_bytes(tmp_path):
    here, there = store_in(tmp_path / "here"), store_in(tmp_path / "there")
    label_all(here, shapes())
    subprocess.run([sys.executable, "-c", IN_ANOTHER_PROCESS, __file__, str(tmp_path / "there")], check=True)
    assert contents(here) == contents(there)
    assert len(contents(here)) == 3


def first_shard_and_more(kind, folder):
    """A set of one shard, and a later one that has grown by two."""
    if kind == "shapes":
        return shapes(8), shapes(22)
    if kind == "folder":
        return draw(folder, range(4)), draw(folder, range(4, 11))
    pack_shards(draw(folder / "images", range(11)), folder / "shards", shard_size=4)
    names = ("shard-000000.tar", "shard-{000000..000002}.tar")
    return tuple(open_source(f"{folder}/shards/{name}", labeled=False, cache=folder / "cache") for name in names)


@pytest.mark.parametrize("kind", ["shapes", "folder", "shards"])
def test_a_shard_is_labelled_alike_in_whatever_set_it_is(tmp_path, kind):
    folder = tmp_path / "pool"
    folder.mkdir()
    alone, grown = first_shard_and_more(kind, folder)
    store = store_in(tmp_path / "alone")
    label_all(store, alone)
    ((name, content),) = contents(store).items()
    others = {
        "grown": grown,
        "joined": concatenate([shapes(10, seed=1), grown]),
        "subset": grown.subset(np.arange(len(alone) + 2)),
    }
    for place, samples in others.items():
        store = store_in(tmp_path / place)
        label_all(store, samples)
        assert len(contents(store)) == len(samples.shard_sizes), place
        assert contents(store)[name] == content, place


def test_only_the_shards_that_are_asked_for_are_made_and_none_twice(tmp_path):
    pool, store, teacher = shapes(), store_in(tmp_path), Projection()
    assert label(store, teacher, pool, [2], Work(Damage(0))) == 1
    assert (store.missing(pool), teacher.asked) == ([0, 1], 6 * 2)
    assert label_all(store, pool, teacher) == 2
    assert (store.missing(pool), teacher.asked) == ([], 22 * 2)
    assert label_all(store, pool, teacher) == 0
    assert teacher.asked == 22 * 2


@pytest.mark.parametrize("of", [1, 2, 3, 7, 20])
def test_static_slices_take_every_shard_once(of):
    slices = [part(range(10, 27), number, of) for number in range(1, of + 1)]
    assert sorted(shard for mine in slices for shard in mine) == [*range(10, 27)]
    assert max(map(len, slices)) - min(map(len, slices)) <= 1


def test_progress_counts_views_up_to_all_of_them(tmp_path, batches_of_four):
    pool, store, seen = shapes(), store_in(tmp_path), []
    label(store, Projection(), pool, [1], Work(Damage(0)))
    label_all(store, pool, progress=lambda done, total: seen.append((done, total)))
    done = [now for now, _ in seen]
    assert {total for _, total in seen} == {44}
    assert done == sorted(done)
    assert np.diff(done).max() == 16, "the shard that was there"
    assert done[-1] == 44


# Stopped, or second ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("asked", "whole"), [(1, 0), (3, 0), (4, 1), (5, 1), (9, 2)])
def test_a_stopped_labelling_keeps_whole_shards_and_ends_with_the_same_bytes(tmp_path, batches_of_four, asked, whole):
    """Batches of four views: four of them to a whole shard. The signal is there after so many."""
    unbroken, store, pool = store_in(tmp_path / "unbroken"), store_in(tmp_path / "stopped"), shapes()
    label_all(unbroken, pool)
    teacher = Projection()
    with pytest.raises(Interrupted, match=f"stopped after {4 * asked} of 44 views; whole shards are kept") as caught:
        label_all(store, pool, teacher, stop=lambda: 15 if teacher.asked >= 4 * asked else None)
    assert caught.value.exit_code == 143
    assert store.missing(pool) == [0, 1, 2][whole:]
    again = Projection()
    assert label_all(store, pool, again) == 3 - whole
    assert again.asked == 44 - 16 * whole
    assert contents(store) == contents(unbroken)
    assert {path.name for path in store.directory.iterdir()} == {"labels.json", *contents(store)}


def test_where_another_process_was_first_its_labels_stand(tmp_path):
    """It commits the second shard while we ask about it."""
    pool, ours, theirs = shapes(), store_in(tmp_path), store_in(tmp_path, who="their teacher")
    assert ours.directory == theirs.directory

    def overtake(good):
        if ours.missing(pool) == [1, 2]:
            label(theirs, Projection(), pool, [1], Work(Damage(0)))
        return good

    assert label_all(ours, pool, Failing(16, overtake)) == 2
    makers = [ours.load(pool, shard).header["made"]["teacher"] for shard in range(3)]
    assert makers == ["the teacher", "their teacher", "the teacher"]


# What is wrong with a teacher -----------------------------------------------------------------------------------------


def fall(good):
    raise OSError("connection lost")


def put(value):
    def spoil(good):
        good[3, 1] = value
        return good

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (fall, r"raised OSError on a batch of 12 images from IMAGE6.png on: connection lost"),
        (put(np.nan), r"expected finite logits, got \[.*nan.*\] for IMAGE7.png"),
        (put(np.inf), r"expected finite logits, got \[.*inf.*\] for IMAGE7.png"),
        (lambda good: good[:-1], r"expected float32 logits \[12, 5\].*, got float32 \[11, 5\] .*from IMAGE6.png on"),
        (lambda good: good[:, :4], r"expected float32 logits \[12, 5\].*, got float32 \[12, 4\] .*from IMAGE6.png on"),
        (lambda good: good.astype(int), r"expected float32 logits \[12, 5\].*, got int64 .*from IMAGE6.png on"),
        (lambda good: None, r"expected float32 logits \[12, 5\].*, got NoneType .*from IMAGE6.png on"),
    ],
    ids=["raises", "nan", "inf", "fewer rows", "fewer classes", "integers", "nothing"],
)
def test_of_a_shard_with_a_useless_answer_nothing_is_stored(tmp_path, monkeypatch, spoil, message):
    """The second shard has twelve views of six images; the fourth of them is the second one of its second image."""
    monkeypatch.setattr(labelling, "BATCH", 12)
    folder = tmp_path / "pool"
    folder.mkdir()
    pack_shards(draw(folder / "images", range(18)), folder / "shards", shard_size=6)
    pool = open_source(str(folder / "shards"), labeled=False, cache=tmp_path / "cache")
    store = store_in(tmp_path / "labels")
    message = message.replace("IMAGE", r"shard-000001\.tar: 00000000")
    with pytest.raises(TeacherError, match=f"^the teacher:? {message}"):
        label_all(store, pool, Failing(12, spoil))
    assert store.missing(pool) == [1, 2]
    assert [path.name for path in store.directory.glob(".tmp-*")] == []
    store.load(pool, 0)
    assert label_all(store, pool) == 2, "the shard before it stays"


def test_a_disk_that_fills_up_leaves_what_is_committed(tmp_path, monkeypatch):
    pool, store = shapes(), store_in(tmp_path)
    label(store, Projection(), pool, [0], Work(Damage(0)))
    size = store.file(pool, 0).stat().st_size

    class Full(files.Disk):
        def write(self, path, data):
            if store.file(pool, 0).exists() and "safetensors" in path.name:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            super().write(path, data)

    monkeypatch.setattr(files, "disk", Full())
    with pytest.raises(StorageError, match=r"No space left on device; .* bytes are needed") as caught:
        label_all(store, pool)
    needed = int(str(caught.value).split("device; ")[1].split(" ")[0].replace(",", ""))
    # shards of eight and of six are to come
    assert needed == pytest.approx(2 * size, rel=0.02)
    assert store.missing(pool) == [1, 2]
    monkeypatch.undo()
    assert label_all(store, pool) == 2


# Damaged images -------------------------------------------------------------------------------------------------------


def test_a_damaged_image_has_no_label_and_the_others_have_theirs(tmp_path):
    pool, store = draw_with_broken(tmp_path / "pool", 0, 6), store_in(tmp_path / "labels")
    told = []
    shards = range(len(pool.shard_ids))
    assert label(store, Projection(), pool, shards, Work(Damage(2, told.append))) == 3
    assert [f"{number:02}.png" in line for number, line in zip((0, 6), told, strict=True)] == [True, True]
    for index in range(11):
        labels = store.load(pool, index // 4).packed[index % 4]
        if index in (0, 6):
            assert np.isnan(labels.rest).all()
            continue
        for number in range(2):
            assert np.array_equal(labels.codes[number], answer(pool, index, number).codes)
            assert np.array_equal(labels.ids[number], answer(pool, index, number).ids)


def test_more_damage_than_allowed_ends_it_and_stores_nothing_of_the_shard(tmp_path):
    pool, store = draw_with_broken(tmp_path / "pool", 1, 6), store_in(tmp_path / "labels")
    with pytest.raises(DataError, match=r"expected at most 1 damaged images, got 2; the last is .*06\.png: expected a"):
        label_all(store, pool, damaged=1)
    assert store.missing(pool) == [1, 2]


def test_a_shard_without_a_readable_image_is_stored_as_such(tmp_path):
    pool, store = draw_with_broken(tmp_path / "pool", 8, 9, 10), store_in(tmp_path / "labels")
    assert label_all(store, pool, damaged=3) == 3
    labels = store.load(pool, 2)
    assert np.isnan(labels.packed.rest).all()
    assert labels.probe is None
    assert store.load(pool, 0).probe.sample == 0


def test_the_probe_is_of_the_first_readable_image(tmp_path):
    pool, store = draw_with_broken(tmp_path / "pool", 0, 1), store_in(tmp_path / "labels")
    label_all(store, pool, damaged=2)
    pixels = view(decode(pool.read(2)), TRAIN, derive(REPLAY.seed, "02.png", 0))
    wanted = digest(pixels), digest(Projection().predict(pixels[None])[0])
    probe = store.load(pool, 0).probe
    assert (probe.sample, probe.pixels, probe.logits) == (2, *wanted)
