"""Batches: the same for any number of threads and any start, damage counted, no thread left behind."""

import _thread
import hashlib
import io
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import pytest
from PIL import Image

from ssld.data.images import decode
from ssld.data.loader import Batch, Damage, evaluation_batches, training_batches
from ssld.data.order import Order
from ssld.data.transforms import Pipeline, view
from ssld.errors import DataError
from ssld.seeds import derive

TRAIN = Pipeline.read(["RandCropImage", "RandFlipImage", "NormalizeImage"], 8)
TEST = Pipeline.read(["ResizeImage", "CropImage", "NormalizeImage"], 8)


@dataclass
class Fake:
    """Images of noise, PNG or pixels in turn; some damaged, some whose shard cannot be read."""

    count: int = 11
    labelled: bool = True
    damaged: frozenset[int] = frozenset()
    unreadable: frozenset[int] = frozenset()
    name: str = "fake"
    shard_sizes: np.ndarray = field(init=False)
    labels: np.ndarray | None = field(init=False)

    def __post_init__(self) -> None:
        self.shard_sizes = np.array([self.count // 2, self.count - self.count // 2])
        self.labels = np.arange(self.count, dtype=np.int64) * 10 if self.labelled else None

    def __len__(self) -> int:
        return self.count

    def key(self, index: int) -> str:
        return f"{index:04d}"

    def where(self, index: int) -> str:
        return f"fake.tar, {index:04d}.png"

    def pixels(self, index: int) -> np.ndarray:
        return np.random.default_rng(index).integers(0, 256, (12 + index, 20, 3), dtype=np.uint8)

    def read(self, index: int) -> bytes | np.ndarray:
        if index in self.unreadable:
            raise DataError(f"expected shard fake.tar whole, got its end at {index}") from OSError("cut")
        if index % 2 and index not in self.damaged:
            return self.pixels(index)
        buffer = io.BytesIO()
        Image.fromarray(self.pixels(index)).save(buffer, "PNG")
        return buffer.getvalue()[:60] if index in self.damaged else buffer.getvalue()


def batches(samples: Fake, steps: int, pipelines: tuple[Pipeline, ...] = (TRAIN,), **options: object) -> list[Batch]:
    settings = {"batch_size": 4, "seed": 0, "damage": Damage(0)} | options
    stream = training_batches(samples, pipelines, **settings)
    try:
        return list(islice(stream, steps))
    finally:
        stream.close()


def digest(batch: Batch) -> tuple[object, ...]:
    pixels = hashlib.sha256(b"".join(images.tobytes() for images in batch.images)).hexdigest()
    return batch.step, pixels, None if batch.labels is None else batch.labels.tobytes(), batch.keys


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) == before


# --- training


def test_a_batch_is_the_views_of_the_order() -> None:
    samples = Fake()
    order = Order(samples.shard_sizes, seed=5)
    for batch in batches(samples, 7, seed=5):
        indices, epochs = order.batch(batch.step, 4)
        np.testing.assert_array_equal(batch.indices, indices)
        np.testing.assert_array_equal(batch.labels, indices * 10)
        assert batch.keys == tuple(f"{index:04d}" for index in indices)
        for image, index, epoch in zip(batch.images[0], indices.tolist(), epochs.tolist(), strict=True):
            expected = view(decode(samples.read(index)), TRAIN, derive(5, samples.key(index), epoch))
            np.testing.assert_array_equal(image, expected)


def test_steps_do_not_depend_on_threads_or_on_where_one_starts() -> None:
    samples = Fake(damaged=frozenset({3}))
    expected = [digest(batch) for batch in batches(samples, 8, workers=0, damage=Damage(1))]
    assert len(set(expected)) == 8
    for workers, ahead in ((1, 1), (2, 0), (4, 3)):
        for start in (0, 3, 7):
            got = batches(samples, 8 - start, workers=workers, ahead=ahead, start=start, damage=Damage(1))
            assert [digest(batch) for batch in got] == expected[start:]


def test_a_sample_looks_different_in_the_next_epoch_and_with_another_seed() -> None:
    samples = Fake(count=1)
    same = [
        batch.images[0][n].tobytes() for seed in range(2) for batch in batches(samples, 2, seed=seed) for n in (0, 1)
    ]
    assert len(set(same)) == len(same)


def test_two_sizes_share_the_view_and_equal_pipelines_the_array() -> None:
    samples = Fake()
    large = TRAIN.at(24)
    other_mean = Pipeline.read(["RandCropImage", "RandFlipImage", {"NormalizeImage": {"mean": [0, 0, 0]}}], 8)
    (batch,) = batches(samples, 1, (TRAIN, large, other_mean))
    assert [images.shape for images in batch.images] == [(4, 8, 8, 3), (4, 24, 24, 3), (4, 8, 8, 3)]
    assert batch.images[0] is batch.images[2]
    index = int(batch.indices[0])
    np.testing.assert_array_equal(
        batch.images[1][0], view(decode(samples.read(index)), large, derive(0, samples.key(index), 0))
    )


def test_a_pool_has_no_labels() -> None:
    assert batches(Fake(labelled=False), 1)[0].labels is None


def test_a_batch_may_be_larger_than_the_set() -> None:
    (batch,) = batches(Fake(count=3), 1, batch_size=10)
    assert np.bincount(batch.indices).min() >= 3


@pytest.mark.parametrize("pipelines", [(), (TRAIN, TEST)])
def test_pipelines_that_cannot_share_a_view_are_refused(pipelines: tuple[Pipeline, ...]) -> None:
    with pytest.raises(ValueError, match="same operators"):
        batches(Fake(), 1, pipelines)


# --- damage


@pytest.mark.parametrize("workers", [0, 3])
def test_the_next_readable_sample_takes_the_slot_of_a_damaged_one(workers: int) -> None:
    samples, whole = Fake(damaged=frozenset({4, 5, 10})), Fake()
    damage = Damage(3)
    stand_in = {4: 6, 5: 6, 10: 0}
    for got, wanted in zip(batches(samples, 6, workers=workers, damage=damage), batches(whole, 6), strict=True):
        indices = [stand_in.get(index, index) for index in wanted.indices.tolist()]
        assert got.indices.tolist() == indices
        assert got.labels.tolist() == [index * 10 for index in indices]
        assert got.keys == tuple(samples.key(index) for index in indices)
        for image, index, place in zip(got.images[0], indices, range(4 * got.step, 4 * got.step + 4), strict=True):
            seed = derive(0, samples.key(index), place // 11)
            np.testing.assert_array_equal(image, view(decode(samples.read(index)), TRAIN, seed))
    assert set(damage.found) == {4, 5, 10}
    assert damage.found[4].startswith("fake.tar, 0004.png: expected a whole")


@pytest.mark.parametrize("workers", [0, 3])
def test_damage_over_the_budget_ends_the_run_and_names_the_image(workers: int) -> None:
    samples = Fake(damaged=frozenset({4, 7}))
    with pytest.raises(DataError, match=r"at most 1 damaged images, got 2; .*fake.tar, 000[47].png") as raised:
        batches(samples, 6, workers=workers, damage=Damage(1))
    assert isinstance(raised.value.__cause__, DataError)


def test_an_image_counts_once_however_often_it_is_met() -> None:
    damage = Damage(1)
    batches(Fake(damaged=frozenset({4})), 20, damage=damage)
    assert list(damage.found) == [4]


@pytest.mark.parametrize("workers", [0, 3])
def test_each_damaged_image_is_reported_once_as_it_is_first_met(workers: int) -> None:
    samples, told = Fake(damaged=frozenset({4, 7})), []
    batches(samples, 20, workers=workers, damage=Damage(2, told.append))
    met = [index for batch in batches(Fake(), 20) for index in batch.indices.tolist() if index in samples.damaged]
    assert len(told) == 2
    for line, index, number in zip(told, dict.fromkeys(met), (1, 2), strict=True):
        with pytest.raises(DataError) as reason:
            decode(samples.read(index))
        assert line == f"skipped, damaged: {samples.where(index)}: {reason.value} ({number} of at most 2)"


def test_the_image_over_the_budget_is_named_by_the_error_alone() -> None:
    told: list[str] = []
    with pytest.raises(DataError, match=r"at most 1 damaged images, got 2"):
        batches(Fake(damaged=frozenset({4, 7})), 20, damage=Damage(1, told.append))
    assert len(told) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_readable_ends_the_run_whatever_the_budget(workers: int) -> None:
    samples = Fake(count=5, damaged=frozenset(range(5)))
    with pytest.raises(DataError, match="a readable image in fake, got 5 damaged ones"):
        batches(samples, 1, workers=workers, damage=Damage(9))
    with pytest.raises(DataError, match="a readable image in fake, got 5 damaged ones"):
        list(evaluation_batches(samples, TEST, batch_size=2, workers=workers, damage=Damage(9)))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_cannot_be_read_is_no_damaged_image(workers: int) -> None:
    damage = Damage(9)
    with pytest.raises(DataError, match="its end at 4") as raised:
        batches(Fake(unreadable=frozenset({4})), 6, workers=workers, damage=damage)
    assert isinstance(raised.value.__cause__, OSError)
    assert not damage.found


@pytest.mark.parametrize("workers", [0, 2])
def test_operators_that_end_at_another_size_are_no_damage(workers: int) -> None:
    damage = Damage(9)
    with pytest.raises(DataError, match="expected a view of 8 x 8"):
        batches(Fake(), 1, (Pipeline.read(["RandFlipImage"], 8),), workers=workers, damage=damage)
    assert not damage.found


# --- evaluation


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 11, 50])
def test_an_evaluation_is_one_pass_in_order(batch_size: int, workers: int) -> None:
    samples = Fake()
    got = list(evaluation_batches(samples, TEST, batch_size=batch_size, workers=workers, damage=Damage(0)))
    assert [batch.step for batch in got] == list(range(-(-11 // batch_size)))
    assert [len(batch.indices) for batch in got[:-1]] == [batch_size] * (len(got) - 1)
    np.testing.assert_array_equal(np.concatenate([batch.indices for batch in got]), np.arange(11))
    images = np.concatenate([batch.images[0] for batch in got])
    for image, index in zip(images, range(11), strict=True):
        np.testing.assert_array_equal(image, view(decode(samples.read(index)), TEST, 0))


def test_an_evaluation_leaves_out_what_is_damaged() -> None:
    samples, damage = Fake(damaged=frozenset({0, 6})), Damage(2)
    got = list(evaluation_batches(samples, TEST, batch_size=4, damage=damage))
    assert [batch.indices.tolist() for batch in got] == [[1, 2, 3, 4], [5, 7, 8, 9], [10]]
    assert set(damage.found) == {0, 6}
    with pytest.raises(DataError, match="at most 1 damaged images, got 2"):
        list(evaluation_batches(samples, TEST, batch_size=4, damage=Damage(1)))


# --- threads


def test_closing_ends_the_threads_at_once() -> None:
    class Slow(Fake):
        def read(self, index: int) -> bytes | np.ndarray:
            time.sleep(0.02)
            return super().read(index)

    stream = training_batches(Slow(), (TRAIN,), batch_size=4, seed=0, workers=3, ahead=100, damage=Damage(0))
    next(stream)
    assert any(thread.name.startswith("ssld-decode") for thread in threading.enumerate())
    began = time.monotonic()
    stream.close()
    assert time.monotonic() - began < 1
    assert not any(thread.name.startswith("ssld-decode") for thread in threading.enumerate())


def test_no_more_than_the_batches_ahead_are_read() -> None:
    class Counting(Fake):
        reads = 0

        def read(self, index: int) -> bytes | np.ndarray:
            self.reads += 1
            return super().read(index)

    samples = Counting()
    stream = training_batches(samples, (TRAIN,), batch_size=4, seed=0, workers=1, ahead=2, damage=Damage(0))
    next(stream)
    time.sleep(0.1)
    stream.close()
    assert 4 <= samples.reads <= 4 + 2 * 4


def test_an_interrupt_while_waiting_leaves_no_thread() -> None:
    class Interrupting(Fake):
        sent = False

        def read(self, index: int) -> bytes | np.ndarray:
            time.sleep(0.05)
            if not self.sent:
                self.sent = True
                _thread.interrupt_main()
            return super().read(index)

    with pytest.raises(KeyboardInterrupt):
        batches(Interrupting(), 1, workers=1)
