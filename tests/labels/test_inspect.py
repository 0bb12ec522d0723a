"""Label directories are found, looked at and removed by their files alone, without recipe, teacher or images."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace

import numpy as np
import pytest

from ssld.contracts import TeacherSpec
from ssld.data.loader import Replay
from ssld.data.sources import open_source
from ssld.data.transforms import Pipeline
from ssld.errors import BusyError, LabelError
from ssld.labels.format import pack
from ssld.labels.inspect import kept_in, remove
from ssld.labels.store import Description, Store
from ssld.lock import RunLock

CLASSES = tuple("abcde")
PIPELINE = Pipeline.read(["RandCropImage"], 12)
ABOUT = Description(TeacherSpec(12, "f" * 64), PIPELINE, Replay(0, 2), 3, 1.0, CLASSES, "the teacher")
OTHER = replace(ABOUT, replay=Replay(1, 2))


@pytest.fixture
def pool():
    """Drawn images in three shards."""
    samples = open_source("builtin:shapes?count=10&size=8", labeled=False)
    return replace(samples, shard_sizes=np.array([4, 4, 2]))


def fill(root, pool, about=ABOUT):
    store = Store(root, about)
    store.begin()
    for shard, size in enumerate(pool.shard_sizes):
        logits = np.random.default_rng(shard).normal(0, 3, (size, about.replay.views, 5)).astype(np.float32)
        store.commit(pool, shard, pack(logits, 3), None, 1)
    return store


def test_directories_are_found_from_a_run_from_a_store_and_by_themselves(tmp_path, pool):
    run = tmp_path / "run"
    stores = [fill(run / "labels.store", pool, about) for about in (ABOUT, OTHER)]
    directories = sorted(store.directory for store in stores)
    assert [kept.directory for kept in kept_in(run)] == directories
    assert [kept.directory for kept in kept_in(run / "labels.store")] == directories
    assert [kept.directory for kept in kept_in(directories[1])] == directories[1:]


@pytest.mark.parametrize("place", ["empty", "nowhere", "file"])
def test_a_place_without_labels_is_named(tmp_path, place):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    with pytest.raises(LabelError, match=rf"^{tmp_path / place}: expected soft labels.*, got none"):
        kept_in(tmp_path / place)


def test_what_is_kept_is_told(tmp_path, pool):
    store = fill(tmp_path, pool)
    (kept,) = kept_in(tmp_path)
    assert (kept.about["views"], kept.about["seed"], kept.about["top_k"], kept.about["names"]) == (2, 0, 3, [*CLASSES])
    assert {*kept.files} == {store.file(pool, shard) for shard in range(3)}
    sizes = [(store.directory / name).stat().st_size for name in os.listdir(store.directory)]
    assert kept.bytes == sum(sizes)


def test_whole_files_give_their_headers(tmp_path, pool):
    store = fill(tmp_path, pool)
    (kept,) = kept_in(tmp_path)
    found = {path: (header, fault) for path, header, fault in kept.headers()}
    assert {fault for _, fault in found.values()} == {None}
    for shard in range(3):
        header, _ = found[store.file(pool, shard)]
        assert header["shard"]["id"] == pool.shard_ids[shard]
        assert header["made"]["teacher"] == "the teacher"


@pytest.mark.parametrize("spoil", ["bit", "cut", "empty"])
def test_a_damaged_file_is_named_and_the_others_read(tmp_path, pool, spoil):
    store = fill(tmp_path, pool)
    path = store.file(pool, 1)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes({"bit": bytes(data), "cut": bytes(data[:-3]), "empty": b""}[spoil])
    (kept,) = kept_in(tmp_path)
    faults = {path: fault for path, header, fault in kept.headers() if fault}
    assert [*faults] == [path]
    assert str(faults[path]).startswith(f"{path} is damaged: ")
    assert sum(header is not None for _, header, _ in kept.headers()) == 2


def test_a_directory_in_place_of_a_label_file_is_named(tmp_path, pool):
    store = fill(tmp_path, pool)
    path = store.file(pool, 1)
    path.unlink()
    path.mkdir()
    (kept,) = kept_in(tmp_path)
    faults = [str(fault) for _, _, fault in kept.headers() if fault]
    assert len(faults) == 1
    assert str(path) in faults[0]


def test_a_file_of_another_directory_is_named_with_what_differs(tmp_path, pool):
    store, other = fill(tmp_path, pool), fill(tmp_path, pool, OTHER)
    shutil.copy(other.file(pool, 0), store.file(pool, 0))
    (kept,) = kept_in(store.directory)
    faults = [str(fault) for _, _, fault in kept.headers() if fault]
    assert len(faults) == 1
    assert faults[0].startswith(f"{store.file(pool, 0)}: expected the seed of {store.directory}/labels.json")


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "\xff"])
def test_a_damaged_description_is_named(tmp_path, pool, content):
    store = fill(tmp_path, pool)
    (store.directory / "labels.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(LabelError, match=rf"^{store.directory}/labels\.json: expected the description of the labels"):
        kept_in(tmp_path)


def test_removing_takes_the_labels_and_their_directory(tmp_path, pool):
    store, other = fill(tmp_path, pool), fill(tmp_path, pool, OTHER)
    remove(next(kept for kept in kept_in(tmp_path) if kept.directory == store.directory))
    assert not store.directory.exists()
    assert [kept.directory for kept in kept_in(tmp_path)] == [other.directory]
    assert store.missing(pool) == [0, 1, 2]


def test_removing_leaves_what_is_not_ours(tmp_path, pool):
    store = fill(tmp_path, pool)
    (store.directory / "notes.txt").write_text("mine")
    (kept,) = kept_in(tmp_path)
    remove(kept)
    assert os.listdir(store.directory) == ["notes.txt"]


def test_labels_of_a_run_at_work_stay(tmp_path, pool):
    run = tmp_path / "run"
    fill(run / "labels.store", pool)
    (kept,) = kept_in(run)
    with RunLock(run), pytest.raises(BusyError, match=rf"^cannot remove {kept.directory}: {run} is in use by pid"):
        remove(kept)
    assert all(path.is_file() for path in kept.files)
    remove(kept)
    assert not kept.directory.exists()
