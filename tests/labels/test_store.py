"""Where a label file lies, what it says of itself, and which files are refused."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from ssld import files
from ssld.contracts import TeacherSpec
from ssld.data import samples as sampling
from ssld.data import transforms
from ssld.data.loader import Replay
from ssld.data.samples import concatenate
from ssld.data.sources import open_source
from ssld.data.transforms import Pipeline
from ssld.errors import DataError, LabelError, StorageError
from ssld.labels import store as storing
from ssld.labels.format import bytes_per_view, encode, pack
from ssld.labels.store import Description, Probe, Store

CLASSES = tuple("abcde")


def read(*operators):
    return Pipeline.read([*operators], 16)


TRAIN = read({"RandCropImage": {"scale": [0.5, 1.0]}}, "RandFlipImage")
SPEC = TeacherSpec(16, "f" * 64, engine="abacus 1.0")
ABOUT = Description(SPEC, TRAIN, Replay(seed=0, views=2), top_k=3, temperature=1.0, classes=CLASSES, who="the teacher")
PROBE = Probe(0, "pixels", "logits")
OTHERS = {
    "teacher": replace(ABOUT, teacher=replace(SPEC, fingerprint="0" * 64)),
    "precision": replace(ABOUT, teacher=replace(SPEC, precision="bfloat16")),
    "mean": replace(ABOUT, teacher=replace(SPEC, mean=(0.5, 0.456, 0.406))),
    "std": replace(ABOUT, teacher=replace(SPEC, std=(0.5, 0.224, 0.225))),
    "no mean and std": replace(ABOUT, teacher=replace(SPEC, mean=None, std=None)),
    "transform": replace(
        ABOUT, pipeline=Pipeline.read([{"RandCropImage": {"scale": [0.4, 1.0]}}, "RandFlipImage"], 16)
    ),
    "operators": replace(ABOUT, pipeline=read({"RandCropImage": {"scale": [0.5, 1.0]}})),
    "size": replace(ABOUT, pipeline=TRAIN.at(20)),
    "seed": replace(ABOUT, replay=Replay(seed=1, views=2)),
    "views": replace(ABOUT, replay=Replay(seed=0, views=3)),
    "top_k": replace(ABOUT, top_k=4),
    "temperature": replace(ABOUT, temperature=2.0),
    "class names": replace(ABOUT, classes=tuple("abcdf")),
    "order of the classes": replace(ABOUT, classes=tuple("abced")),
    "number of classes": replace(ABOUT, classes=tuple("abcdef")),
}


@pytest.fixture
def open_pool(monkeypatch):
    """open_pool(count, seed=0): drawn images, four to a shard."""
    monkeypatch.setattr(sampling, "VIRTUAL_SHARD", 4)
    return lambda count, seed=0: open_source(f"builtin:shapes?count={count}&size=20&seed={seed}", labeled=False)


def random_labels(samples, shard, about=ABOUT, seed=0):
    rng = np.random.default_rng((seed, shard))
    shape = (int(samples.shard_sizes[shard]), about.replay.views, len(about.classes))
    return pack(rng.normal(0, 3, shape).astype(np.float32), about.top_k, about.temperature)


def fill(store, samples):
    """Random labels for every shard."""
    store.begin()
    shards = range(len(samples.shard_ids))
    return [store.commit(samples, s, random_labels(samples, s, store.description), PROBE, 1) for s in shards]


def fail_write(monkeypatch, code):
    """The disk takes no file any more."""

    def write(path, data):
        raise OSError(code, os.strerror(code), str(path))

    disk = files.Disk()
    disk.write = write
    monkeypatch.setattr(files, "disk", disk)


# What a description is a hash of --------------------------------------------------------------------------------------


@pytest.mark.parametrize("changed", OTHERS)
def test_whatever_changes_labels_gives_them_another_directory(tmp_path, changed):
    assert Store(tmp_path, OTHERS[changed]).directory != Store(tmp_path, ABOUT).directory


def test_no_two_ways_of_making_labels_share_a_directory():
    assert len({about.fingerprint for about in (ABOUT, *OTHERS.values())}) == 1 + len(OTHERS)


@pytest.mark.parametrize(("module", "constant"), [(transforms, "REVISION"), (storing, "FORMAT")])
def test_another_revision_of_the_code_gives_another_directory(monkeypatch, module, constant):
    before = ABOUT.fingerprint
    monkeypatch.setattr(module, constant, 99)
    assert replace(ABOUT).fingerprint != before


def test_what_only_people_read_changes_nothing():
    renamed = replace(ABOUT, who="another name", teacher=replace(SPEC, engine="abacus 2.0"))
    assert renamed.fingerprint == ABOUT.fingerprint


def test_the_students_normalization_changes_no_label():
    """The teacher has its own; so a recipe with another one for its student finds the same labels."""
    steps = ({"RandCropImage": {"scale": [0.5, 1.0]}}, "RandFlipImage", {"NormalizeImage": {"mean": [0, 0, 0]}})
    assert replace(ABOUT, pipeline=read(*steps)).fingerprint == ABOUT.fingerprint


# What lies where ------------------------------------------------------------------------------------------------------


def test_a_file_says_what_it_is_to_any_reader_of_safetensors(tmp_path, open_pool):
    pool, store = open_pool(8), Store(tmp_path, ABOUT)
    fill(store, pool)
    with safe_open(store.file(pool, 1), "numpy") as file:
        header = json.loads(file.metadata()["ssld"])
        shapes = {name: file.get_tensor(name).shape for name in file.keys()}  # noqa: SIM118
    assert shapes == {"ids": (4, 2, 2), "codes": (4, 2, 3), "rest": (4, 2)}
    keys = "\0".join(f"shapes-0/{row:07d}" for row in range(4, 8))
    assert header["shard"] == {"id": pool.shard_ids[1], "keys": hashlib.sha256(keys.encode()).hexdigest()}
    assert header["teacher"] == {
        "fingerprint": "f" * 64,
        "precision": "float32",
        "mean": [*SPEC.mean],
        "std": [*SPEC.std],
    }
    assert [*header["transform"]["steps"][0]] == ["RandCropImage"]
    assert header["transform"]["size"] == 16
    assert (header["seed"], header["views"], header["top_k"], header["temperature"]) == (0, 2, 3, 1.0)
    assert header["classes"]["number"] == 5
    assert header["fingerprint"].startswith(store.directory.name)
    assert header["probe"] == {"sample": 0, "pixels": "pixels", "logits": "logits"}
    assert header["made"]["teacher"] == "the teacher"
    assert header["made"]["engine"] == "abacus 1.0"
    assert {"ssld", "numpy", "pillow", "cpu", "machine", "python"} <= header["made"].keys()


def test_the_directory_says_what_its_labels_are_with_the_class_names(tmp_path):
    store = Store(tmp_path / "new" / "root", ABOUT)
    store.begin()
    about = json.loads((store.directory / "labels.json").read_text())
    assert about.pop("names") == list(CLASSES)
    assert about == json.loads(json.dumps(ABOUT.basis))


def test_a_file_is_as_large_as_forecast(tmp_path, open_pool, monkeypatch):
    """Two files of the same header, but for its digits, differ by their labels alone."""
    store, sizes = Store(tmp_path, ABOUT), []
    for count in (1000, 3000):
        monkeypatch.setattr(sampling, "VIRTUAL_SHARD", count)
        pool = open_source(f"builtin:shapes?count={count}", labeled=False)
        fill(store, pool)
        sizes.append(store.file(pool, 0).stat().st_size)
    expected = bytes_per_view(len(ABOUT.classes), ABOUT.top_k)
    assert (sizes[1] - sizes[0]) / (2000 * 2) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("place", ["first", "last", "subset", "grown"])
def test_a_shard_has_its_labels_in_whatever_set_it_is(tmp_path, open_pool, place):
    pool, other, store = open_pool(8), open_pool(6, seed=1), Store(tmp_path, ABOUT)
    fill(store, pool)
    samples, shard = {
        "first": (concatenate([pool, other]), 1),
        "last": (concatenate([other, pool]), 3),
        "subset": (open_pool(20).subset(np.arange(2, 18)), 1),
        "grown": (open_pool(20), 1),
    }[place]
    assert shard not in store.missing(samples)
    assert store.load(samples, shard).sha256 == store.load(pool, 1).sha256
    labels = store.load(samples, shard).packed
    assert np.array_equal(labels.codes, random_labels(pool, 1).codes)


def test_a_shard_of_which_only_a_part_is_left_has_other_labels(tmp_path, open_pool):
    pool, store = open_pool(8), Store(tmp_path, ABOUT)
    fill(store, pool)
    assert store.missing(pool.subset(np.array([0, 1, 2, 4, 5, 6, 7]))) == [0]
    assert store.missing(pool.subset(np.array([1, 0, 2, 3]))) == [0], "the order of the samples counts"


def test_missing_are_the_shards_without_a_file(tmp_path, open_pool):
    pool, store = open_pool(12), Store(tmp_path, ABOUT)
    assert store.missing(pool) == [0, 1, 2], "where there is no directory at all"
    fill(store, pool)
    assert store.missing(pool) == []
    store.file(pool, 1).unlink()
    assert store.missing(pool) == [1]


def test_equal_labels_give_equal_bytes(tmp_path, open_pool):
    pool = open_pool(8)
    stores = [Store(tmp_path / name, ABOUT) for name in ("one", "two")]
    for store in stores:
        fill(store, pool)
    names = [sorted(path.name for path in store.directory.iterdir()) for store in stores]
    assert names[0] == names[1]
    assert len(names[0]) == 3
    for name in names[0]:
        assert (stores[0].directory / name).read_bytes() == (stores[1].directory / name).read_bytes()


def test_the_first_to_commit_a_shard_wins(tmp_path, open_pool):
    pool, store = open_pool(4), Store(tmp_path, ABOUT)
    assert fill(store, pool) == [True]
    first = store.file(pool, 0).read_bytes()
    assert store.commit(pool, 0, random_labels(pool, 0, seed=1), PROBE, 1) is False
    assert store.file(pool, 0).read_bytes() == first


def test_a_start_clears_away_what_killed_processes_left(tmp_path):
    store = Store(tmp_path, ABOUT)
    store.begin()
    old, fresh = store.directory / ".tmp-old", store.directory / ".tmp-fresh"
    for path in (old, fresh):
        path.write_bytes(b"half a file")
    os.utime(old, (time.time() - 7200,) * 2)
    store.begin()
    assert not old.exists()
    assert fresh.exists(), "another process may be writing it"


def test_a_full_disk_names_the_bytes_of_all_shards_that_are_left(tmp_path, open_pool, monkeypatch):
    pool, store = open_pool(12), Store(tmp_path, ABOUT)
    store.begin()
    store.commit(pool, 0, random_labels(pool, 0), PROBE, 3)
    one = store.file(pool, 0).stat().st_size
    fail_write(monkeypatch, errno.ENOSPC)
    with pytest.raises(StorageError, match=rf"cannot write {store.file(pool, 1)}: .*; {2 * one:,} bytes are needed"):
        store.commit(pool, 1, random_labels(pool, 1), PROBE, 2)
    assert store.missing(pool) == [1, 2]


# Files that are not what they should be -------------------------------------------------------------------------------


def flip(place):
    """Turn over one bit, at this share of the file."""

    def spoil(path):
        data = bytearray(path.read_bytes())
        data[int(place * (len(data) - 1))] ^= 1
        path.write_bytes(data)

    return spoil


def make_directory(path):
    path.unlink()
    path.mkdir()


def make_dangling_link(path):
    path.unlink()
    path.symlink_to("nowhere")


SPOILED = {
    "a flipped bit in the length": flip(0),
    "a flipped bit in the header": flip(0.3),
    "a flipped bit in the labels": flip(1),
    "cut short by a byte": lambda path: os.truncate(path, path.stat().st_size - 1),
    "cut short in the header": lambda path: os.truncate(path, 100),
    "cut short in the length": lambda path: os.truncate(path, 7),
    "empty": lambda path: os.truncate(path, 0),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "text": lambda path: path.write_text("it works\n"),
    "a directory": make_directory,
    "a link to nothing": make_dangling_link,
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_a_damaged_file_is_named(tmp_path, open_pool, kind):
    pool, store = open_pool(8), Store(tmp_path, ABOUT)
    fill(store, pool)
    SPOILED[kind](store.file(pool, 1))
    with pytest.raises(LabelError, match=f"{store.file(pool, 1)}.* label( it)? again"):
        store.load(pool, 1)
    store.load(pool, 0)


def test_no_bit_of_a_file_can_be_turned_unseen(tmp_path, open_pool):
    pool, store = open_pool(2), Store(tmp_path, replace(ABOUT, classes=tuple("ab"), top_k=1))
    fill(store, pool)
    path = store.file(pool, 0)
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        spoiled = bytearray(whole)
        spoiled[place] ^= 1 << place % 8
        path.write_bytes(spoiled)
        with pytest.raises(LabelError):
            store.load(pool, 0)


@pytest.mark.parametrize("other", OTHERS)
def test_labels_that_were_made_otherwise_are_refused_under_a_name_of_ours(tmp_path, open_pool, other):
    pool, store = open_pool(4), Store(tmp_path, ABOUT)
    fill(store, pool)
    stranger = Store(tmp_path, OTHERS[other])
    fill(stranger, pool)
    shutil.copy(stranger.file(pool, 0), store.file(pool, 0))
    message = f"{store.file(pool, 0)}: expected fingerprint {ABOUT.fingerprint}, got {OTHERS[other].fingerprint}"
    with pytest.raises(LabelError, match=message):
        store.load(pool, 0)


def test_labels_of_another_shard_are_refused_under_its_name(tmp_path, open_pool):
    pool, store = open_pool(8), Store(tmp_path, ABOUT)
    fill(store, pool)
    shutil.copy(store.file(pool, 0), store.file(pool, 1))
    with pytest.raises(LabelError, match=f"expected shard {pool.shard_ids[1]}, got {pool.shard_ids[0]}"):
        store.load(pool, 1)


@pytest.mark.parametrize("shape", [(3, 2), (5, 2), (4, 1), (4, 3)])
def test_labels_of_another_number_of_samples_or_views_are_refused(tmp_path, open_pool, shape):
    """A file that says in every word that it is the right one, and is whole."""
    pool, store = open_pool(4), Store(tmp_path, ABOUT)
    fill(store, pool)
    header = store.load(pool, 0).header
    labels = pack(np.zeros((*shape, 5), np.float32), 3)
    store.file(pool, 0).write_bytes(encode(header, labels))
    with pytest.raises(
        LabelError, match=rf"expected labels \[samples, views\] \[4, 2\], got \[{shape[0]}, {shape[1]}\]"
    ):
        store.load(pool, 0)


@pytest.mark.parametrize("change", ["time", "size", "name"])
def test_a_changed_image_file_makes_another_shard(tmp_path, change):
    """The labels of before are not found, and are refused when copied over the new name."""
    folder = tmp_path / "pool"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.png").write_bytes(b"image")
    before, store = open_source(str(folder), labeled=False), Store(tmp_path / "store", ABOUT)
    fill(store, before)
    if change == "time":
        os.utime(folder / "1.png", ns=(1, 1))
    elif change == "size":
        facts = (folder / "1.png").stat()
        (folder / "1.png").write_bytes(b"larger image")
        os.utime(folder / "1.png", ns=(facts.st_atime_ns, facts.st_mtime_ns))
    else:
        (folder / "1.png").rename(folder / "3.png")
    after = open_source(str(folder), labeled=False)
    assert store.missing(after) == [0]
    shutil.copy(store.file(before, 0), store.file(after, 0))
    with pytest.raises(LabelError, match=f"expected shard {after.shard_ids[0]}, got {before.shard_ids[0]}"):
        store.load(after, 0)


def test_a_moved_pool_keeps_its_labels(tmp_path):
    folder = tmp_path / "pool"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"image")
    store = Store(tmp_path / "store", ABOUT)
    fill(store, open_source(str(folder), labeled=False))
    folder.rename(tmp_path / "elsewhere")
    assert store.missing(open_source(str(tmp_path / "elsewhere"), labeled=False)) == []


@pytest.mark.parametrize("kind", [kind for kind in SPOILED if kind != "gone"])
def test_a_file_that_is_taken_away_makes_room_for_another(tmp_path, open_pool, kind):
    pool, store = open_pool(4), Store(tmp_path, ABOUT)
    fill(store, pool)
    whole = store.file(pool, 0).read_bytes()
    SPOILED[kind](store.file(pool, 0))
    store.drop_damaged(pool, 0)
    assert store.missing(pool) == [0]
    assert fill(store, pool) == [True]
    assert store.file(pool, 0).read_bytes() == whole


def test_taking_away_what_is_not_there_is_no_error(tmp_path, open_pool):
    Store(tmp_path, ABOUT).drop_damaged(open_pool(4), 0)


def test_a_file_that_another_process_has_mended_stays(tmp_path, open_pool):
    pool, store = open_pool(4), Store(tmp_path, ABOUT)
    fill(store, pool)
    whole = store.file(pool, 0).read_bytes()
    store.drop_damaged(pool, 0)
    assert store.file(pool, 0).read_bytes() == whole
    assert {path.name for path in store.directory.iterdir()} == {"labels.json", store.file(pool, 0).name}


def test_a_file_that_cannot_be_read_is_no_damage(tmp_path, open_pool, monkeypatch):
    """A machine that has no file handle left says nothing against the file."""
    pool, store = open_pool(4), Store(tmp_path, ABOUT)
    fill(store, pool)

    def refuse(path):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    before = sorted(store.directory.iterdir())
    for ask in (store.load, store.drop_damaged):
        with pytest.raises(DataError, match="expected to read soft labels, got: Too many open files") as caught:
            ask(pool, 0)
        assert not isinstance(caught.value, LabelError)
        assert sorted(store.directory.iterdir()) == before
