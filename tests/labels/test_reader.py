"""What training reads is the teacher's answer to the very pixels that it shows; or else an error says where not."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssld.contracts import TeacherSpec
from ssld.data import operators, transforms
from ssld.data.loader import Damage, Replay, training_batches
from ssld.data.sources import open_source
from ssld.data.transforms import Pipeline
from ssld.errors import LabelError
from ssld.labels.format import pack, unpack
from ssld.labels.labelling import Work, label
from ssld.labels.reader import Reader, StoredLabels
from ssld.labels.store import Description, Store

CLASSES = tuple("abcdef")
STUDENT = Pipeline.read([{"RandCropImage": {"scale": [0.4, 1.0]}}, "RandFlipImage", "NormalizeImage"], 16)
VIEWS = 3
REPLAY = Replay(seed=7, views=VIEWS)
IN_ANOTHER_PROCESS = "import runpy, sys; runpy.run_path(sys.argv[1])['label_shapes'](sys.argv[2])"


class Projection:
    """A linear teacher: all pixels count, and its answer for an image does not depend on the others of the batch."""

    def __init__(self, size=12, seed=0):
        self.spec = TeacherSpec(size, f"projection {seed}", mean=None, std=None)
        self.weights = np.random.default_rng(seed).normal(0, 1e-3, (len(CLASSES), size * size * 3))

    def predict(self, images):
        pixels = images.reshape(len(images), 1, -1)
        return (pixels * self.weights).sum(axis=2).astype(np.float32)


def cut(samples, size):
    """The same samples in shards of so many."""
    whole, rest = divmod(len(samples), size)
    return replace(samples, shard_sizes=np.array([size] * whole + [rest] * (rest > 0)))


def shapes(count=11):
    return cut(open_source(f"builtin:shapes?count={count}&size=20", labeled=False), 4)


def draw(folder, *broken):
    """Eleven images in a folder, four to a shard; these are none. All files of one size are as long."""
    folder.mkdir(exist_ok=True)
    for number in range(11):
        write(folder / f"{number:02}.png", number)
    for number in broken:
        (folder / f"{number:02}.png").write_bytes(b"no image")
    return cut(open_source(str(folder), labeled=False), 4)


def write(path, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, compress_level=0)


def store_in(root, teacher, replay=REPLAY, top_k=3, temperature=1.0):
    pipeline = STUDENT.at(teacher.spec.size)
    return Store(Path(root), Description(teacher.spec, pipeline, replay, top_k, temperature, CLASSES, "the teacher"))


def labelled(store, teacher, samples, damaged=0):
    """A reader of the labels, after they were made."""
    shards = range(len(samples.shard_ids))
    label(store, teacher, samples, shards, Work(Damage(damaged)))
    return opened(store, samples)


def opened(store, samples):
    reader = Reader(store, samples)
    assert reader.open(range(len(samples.shard_ids))) == {}
    return reader


def label_shapes(root):
    """What the other process does."""
    labelled(store_in(root, Projection()), Projection(), shapes())


def shown(samples, replay, steps, size=12, damaged=0):
    """The batches of five that a training shows, with the pixels at the student's size and at the teacher's."""
    pipelines = (STUDENT, STUDENT.at(size))
    damage = Damage(damaged)
    with closing(training_batches(samples, pipelines, batch_size=5, seed=99, damage=damage, replay=replay)) as batches:
        yield from islice(batches, steps)


def equal(soft, other):
    same_ids = (soft.ids is None and other.ids is None) or np.array_equal(soft.ids, other.ids)
    return same_ids and np.array_equal(soft.logits, other.logits)


def probabilities(soft):
    powers = np.exp(soft.logits.astype(np.float64) / soft.temperature)
    return powers / powers.sum(axis=1, keepdims=True)


# The labels of the pixels that are shown ------------------------------------------------------------------------------


@pytest.mark.parametrize(("top_k", "temperature"), [(1, 1.0), (3, 1.0), (3, 2.0), (6, 4.0)])
@pytest.mark.parametrize("size", [12, 16])
def test_each_label_is_the_answer_to_the_pixels_of_its_epoch(tmp_path, top_k, temperature, size):
    """Seven epochs of three views: every view of every image is shown twice, in an order that is not that of shards."""
    pool, teacher = shapes(), Projection(size)
    store = store_in(tmp_path, teacher, top_k=top_k, temperature=temperature)
    labels = StoredLabels("", ((labelled(store, teacher, pool), 1.0),))
    compared = set()
    for batch in shown(pool, labels.replay, 16, size):
        epochs = (batch.step * 5 + np.arange(5)) // len(pool)
        assert np.array_equal(batch.views, epochs % VIEWS)
        wanted = unpack(pack(teacher.predict(batch.images[1]), top_k, temperature), 6, top_k, temperature)
        assert equal(labels.of(batch), wanted)
        assert labels.of(batch).temperature == temperature
        compared |= {*zip(batch.indices.tolist(), epochs.tolist(), strict=True)}
    assert {(index, epoch) for index in range(11) for epoch in range(7)} <= compared


def test_views_come_back_after_as_many_epochs_and_differ_before(tmp_path):
    pool, teacher = shapes(), Projection()
    labels = StoredLabels("", ((labelled(store_in(tmp_path, teacher), teacher, pool), 1.0),))
    pixels, answers = {}, {}
    for batch in shown(pool, labels.replay, 14):
        soft = labels.of(batch)
        for row, index in enumerate(batch.indices.tolist()):
            epoch = (batch.step * 5 + row) // len(pool)
            pixels[index, epoch] = batch.images[0][row].tobytes()
            answers[index, epoch] = soft.logits[row].tobytes()
    for index in range(11):
        assert [pixels[index, epoch] for epoch in range(3)] == [pixels[index, epoch + 3] for epoch in range(3)]
        assert [answers[index, epoch] for epoch in range(3)] == [answers[index, epoch + 3] for epoch in range(3)]
        assert len({pixels[index, epoch] for epoch in range(3)}) == VIEWS
        assert len({answers[index, epoch] for epoch in range(3)}) == VIEWS


def test_what_another_process_labelled_fits_the_pixels_of_this_one(tmp_path):
    subprocess.run([sys.executable, "-c", IN_ANOTHER_PROCESS, __file__, str(tmp_path)], check=True)
    teacher, pool = Projection(), shapes()
    labels = StoredLabels("", ((opened(store_in(tmp_path, teacher), pool), 1.0),))
    for batch in shown(pool, labels.replay, 7):
        assert equal(labels.of(batch), unpack(pack(teacher.predict(batch.images[1]), 3), 6, 3))


def test_another_label_seed_shows_other_views_with_labels_of_their_own(tmp_path):
    pool, teacher, other = shapes(), Projection(), replace(REPLAY, seed=8)
    stores = [store_in(tmp_path, teacher), store_in(tmp_path, teacher, other)]
    assert stores[0].directory != stores[1].directory
    labels = [StoredLabels("", ((labelled(store, teacher, pool), 1.0),)) for store in stores]
    pairs = zip(shown(pool, REPLAY, 7), shown(pool, other, 7), strict=True)
    for one, two in pairs:
        assert np.array_equal(one.indices, two.indices), "the order is of the training seed"
        assert (one.images[0] != two.images[0]).any(axis=(1, 2, 3)).all()
        assert (labels[0].of(one).logits != labels[1].of(two).logits).any(axis=1).all()
        assert equal(labels[1].of(two), unpack(pack(teacher.predict(two.images[1]), 3), 6, 3))


def test_labels_are_found_by_sample_and_view_in_any_order(tmp_path):
    pool, teacher = shapes(), Projection()
    reader = labelled(store_in(tmp_path, teacher), teacher, pool)
    rng = np.random.default_rng(0)
    indices, views = rng.integers(0, 11, 50), rng.integers(0, VIEWS, 50)
    together = reader.at(indices, views)
    for row, (index, number) in enumerate(zip(indices, views, strict=True)):
        alone = reader.at(np.array([index]), np.array([number]))
        assert np.array_equal(alone.ids[0], together.ids[row])
        assert np.array_equal(alone.logits[0], together.logits[row])


def test_at_test_time_there_is_one_view(tmp_path):
    pool, teacher = shapes(), Projection()
    labels = StoredLabels("", ((labelled(store_in(tmp_path, teacher), teacher, pool), 1.0),))
    indices = np.array([10, 0, 4])
    assert equal(labels.at_test_time(indices), labels.at(indices, np.array([0, 0, 0])))
    assert labels.pipelines(STUDENT) == (), "no image is rendered for a teacher"


# Several teachers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0), (0.2, 0.6)])
def test_with_all_classes_kept_two_teachers_are_their_mean(tmp_path, weights):
    """Each at a size of its own. The mean is that of the teachers' own answers, to within what 8 bits make of them."""
    pool, teachers = shapes(), (Projection(12, 0), Projection(16, 1))
    readers = tuple(labelled(store_in(tmp_path, teacher, top_k=6), teacher, pool) for teacher in teachers)
    labels = StoredLabels("", tuple(zip(readers, weights, strict=True)))
    share = weights[0] / sum(weights)
    pairs = zip(shown(pool, REPLAY, 7, size=12), shown(pool, REPLAY, 7, size=16), strict=True)
    for small, large in pairs:
        logits = [teacher.predict(batch.images[1]) for teacher, batch in zip(teachers, (small, large), strict=True)]
        powers = [np.exp(answer.astype(np.float64)) for answer in logits]
        dense = [answer / answer.sum(axis=1, keepdims=True) for answer in powers]
        mean = share * dense[0] + (1 - share) * dense[1]
        soft = labels.of(small)
        assert soft.ids is None
        np.testing.assert_allclose(probabilities(soft), mean, atol=0.02)


def test_with_some_classes_kept_two_teachers_are_averaged_by_the_rule(tmp_path):
    """By brute force: each teacher's distribution over all classes, its rest spread evenly over those not named."""
    pool, teachers = shapes(), (Projection(12, 0), Projection(12, 1))
    readers = tuple(labelled(store_in(tmp_path, teacher, top_k=2), teacher, pool) for teacher in teachers)
    indices, views = np.repeat(np.arange(11), VIEWS), np.tile(np.arange(VIEWS), 11)
    mean = np.zeros((33, 6))
    for reader, share in zip(readers, (0.75, 0.25), strict=True):
        soft = reader.at(indices, views)
        for row, (ids, p) in enumerate(zip(soft.ids, probabilities(soft), strict=True)):
            spread = np.full(6, p[-1] / 4)
            spread[ids] = p[:-1]
            mean[row] += share * spread
    got = StoredLabels("", ((readers[0], 3.0), (readers[1], 1.0))).at(indices, views)
    best = np.argsort(-mean, axis=1, kind="stable")[:, :2]
    assert np.array_equal(got.ids, best)
    kept = np.take_along_axis(mean, best, axis=1)
    np.testing.assert_allclose(probabilities(got), np.column_stack([kept, 1 - kept.sum(axis=1)]), atol=1e-6)


# What has no label, or another one ------------------------------------------------------------------------------------


def test_training_shows_no_damaged_image_and_its_substitutes_have_their_labels(tmp_path):
    pool, teacher = draw(tmp_path / "pool", 3, 8), Projection()
    store = store_in(tmp_path / "labels", teacher)
    reader = labelled(store, teacher, pool, damaged=2)
    labels = StoredLabels("", ((reader, 1.0),))
    for batch in shown(pool, REPLAY, 9, damaged=2):
        assert not {3, 8} & {*batch.indices.tolist()}
        assert equal(labels.of(batch), unpack(pack(teacher.predict(batch.images[1]), 3), 6, 3))
    assert [reader.indices(shard).tolist() for shard in range(3)] == [[0, 1, 2], [4, 5, 6, 7], [9, 10]]


def test_an_image_that_was_damaged_at_labelling_is_named_with_its_label_file(tmp_path):
    pool, teacher = draw(tmp_path / "pool", 5), Projection()
    store = store_in(tmp_path / "labels", teacher)
    reader = labelled(store, teacher, pool, damaged=1)
    message = rf"^{tmp_path}/pool/05\.png: expected a soft label, got none in {store.file(pool, 1)}: .*label again$"
    with pytest.raises(LabelError, match=message):
        reader.at(np.array([0, 4, 5, 9]), np.array([0, 1, 2, 0]))


def test_files_that_cannot_be_used_are_returned_and_the_others_opened(tmp_path):
    pool, teacher = shapes(), Projection()
    store = store_in(tmp_path, teacher)
    labelled(store, teacher, pool)
    store.file(pool, 1).write_bytes(b"")
    reader = Reader(store, pool)
    faults = reader.open([0, 1])
    assert [*faults] == [1]
    assert str(store.file(pool, 1)) in str(faults[1])
    assert (reader.shards, reader.lacking) == ([0], [1, 2])


def test_the_hash_of_all_files_changes_with_any_of_them(tmp_path):
    pool = shapes()
    store = store_in(tmp_path / "one", Projection())
    before = labelled(store, Projection(), pool).files
    assert opened(store, pool).files == before
    again = store_in(tmp_path / "two", Projection())
    assert labelled(again, Projection(), pool).files == before
    # the same teacher in name only
    store.file(pool, 2).unlink()
    label(store, Projection(seed=1), pool, [2], Work(Damage(0)))
    assert opened(store, pool).files != before


# The probe ------------------------------------------------------------------------------------------------------------


def put_back(path, change):
    """Change a file, and give it its time again."""
    facts = path.stat()
    change(path)
    assert path.stat().st_size == facts.st_size
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


@pytest.mark.parametrize("shard", [0, 1, 2])
def test_another_image_behind_the_same_name_size_and_time_is_found(tmp_path, shard):
    """Of each of a few shards the first image is looked at."""
    folder, teacher = tmp_path / "pool", Projection()
    pool = draw(folder)
    store = store_in(tmp_path / "labels", teacher)
    labelled(store, teacher, pool).expect_same_views()
    path = folder / f"{4 * shard:02}.png"
    put_back(path, lambda path: write(path, 99))
    after = cut(open_source(str(folder), labeled=False), 4)
    assert after.shard_ids == pool.shard_ids
    with pytest.raises(LabelError, match=rf"{store.file(pool, shard)}: expected {path} to be rendered as the teacher"):
        opened(store, after).expect_same_views()


def test_an_image_that_became_unreadable_behind_its_time_is_named(tmp_path):
    folder, teacher = tmp_path / "pool", Projection()
    pool = draw(folder)
    store = store_in(tmp_path / "labels", teacher)
    reader = labelled(store, teacher, pool)
    put_back(folder / "04.png", lambda path: path.write_bytes(bytes(path.stat().st_size)))
    with pytest.raises(LabelError, match=rf"^{folder}/04\.png: expected the image that the teacher saw"):
        reader.expect_same_views()


def test_another_filter_in_the_image_library_is_found(tmp_path, monkeypatch):
    pool, teacher = shapes(), Projection()
    reader = labelled(store_in(tmp_path, teacher), teacher, pool)
    monkeypatch.setitem(operators.FILTERS, "bilinear", Image.Resampling.BICUBIC)
    with pytest.raises(LabelError, match=r"the image or the image library has changed; remove the labels with ssld"):
        reader.expect_same_views()


def test_other_draws_are_found(tmp_path, monkeypatch):
    pool, teacher = shapes(), Projection()
    reader = labelled(store_in(tmp_path, teacher), teacher, pool)
    known = transforms.generator
    monkeypatch.setattr(transforms, "generator", lambda *parts: known("numpy 9", *parts))
    with pytest.raises(LabelError, match="as the teacher saw it"):
        reader.expect_same_views()


def test_the_probe_is_of_a_readable_image(tmp_path):
    pool, teacher = draw(tmp_path / "pool", 0, 4, 5, 8, 9, 10), Projection()
    reader = labelled(store_in(tmp_path / "labels", teacher), teacher, pool, damaged=6)
    reader.expect_same_views()
    put_back(tmp_path / "pool" / "01.png", lambda path: write(path, 99))
    with pytest.raises(LabelError, match=r"01\.png"):
        reader.expect_same_views()


def test_a_large_store_is_probed_in_few_places(tmp_path):
    """Opening a store must not read the whole pool; the first and one of the last shards are among them."""
    pool, teacher = cut(open_source("builtin:shapes?count=40&size=8", labeled=False), 1), Projection()
    reader = labelled(store_in(tmp_path, teacher, replace(REPLAY, views=1)), teacher, pool)
    read = []
    known = pool.store

    class Counting:
        def __getattr__(self, name):
            return getattr(known, name)

        def read(self, row):
            read.append(row)
            return known.read(row)

    reader.samples = replace(pool, store=Counting())
    reader.expect_same_views()
    assert read[0] == 0
    assert read[-1] >= 20
    assert len(read) == 3
