"""Batches: the same for any number of threads and any start, damage counted, no thread left behind."""

import _thread
import hashlib
import io
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ssld.contracts import Ranks
from ssld.data import rendering
from ssld.data.images import decode
from ssld.data.loader import Batch, Damage, Replay, evaluation_batches, training_batches, view_batches
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
    labels = None if batch.labels is None else batch.labels.tobytes()
    return batch.step, pixels, labels, batch.views.tobytes(), batch.keys


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


# --- several ranks


def together(parts: list[Batch]) -> Batch:
    """The parts of a batch put together, in the order of their ranks."""
    images = tuple(np.concatenate(column) for column in zip(*(part.images for part in parts), strict=True))
    labels = None if parts[0].labels is None else np.concatenate([part.labels for part in parts])
    indices, views = (np.concatenate([getattr(part, name) for part in parts]) for name in ("indices", "views"))
    return Batch(parts[0].step, images, labels, indices, views, tuple(key for part in parts for key in part.keys))


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("options", [{}, {"damaged": frozenset({3, 4, 10})}, {"labelled": False}])
def test_the_parts_of_all_ranks_are_the_batch_of_one(count: int, options: dict[str, object]) -> None:
    """11 images and batches of 7, so that the parts differ in size and epochs cross."""
    samples, large = Fake(**options), TRAIN.at(12)
    budget = len(samples.damaged)
    settings = {"pipelines": (TRAIN, large), "batch_size": 7, "seed": 5}
    whole = batches(samples, 8, damage=Damage(budget), **settings)
    for start in (0, 2, 7):
        ranks = [
            batches(
                samples,
                8 - start,
                part=Ranks(number, count).part(7),
                start=start,
                workers=number % 3,
                damage=Damage(budget),
                **settings,
            )
            for number in range(count)
        ]
        for parts, expected in zip(zip(*ranks, strict=True), whole[start:], strict=True):
            assert {part.step for part in parts} == {expected.step}
            sizes = [len(part.indices) for part in parts]
            assert sum(sizes) == 7
            assert max(sizes) - min(sizes) <= 1
            assert digest(together(list(parts))) == digest(expected)


@pytest.mark.parametrize("count", [2, 5])
def test_the_parts_of_all_ranks_show_the_views_that_were_labelled(count: int) -> None:
    samples, replay = Fake(), Replay(seed=3, views=3)
    whole = batches(samples, 20, batch_size=6, replay=replay)
    ranks = [
        batches(samples, 20, batch_size=6, replay=replay, part=Ranks(number, count).part(6)) for number in range(count)
    ]
    for parts, expected in zip(zip(*ranks, strict=True), whole, strict=True):
        assert digest(together(list(parts))) == digest(expected)


def test_a_rank_reads_its_own_part_alone() -> None:
    reads: Counter[int] = Counter()

    class Counting(Fake):
        def read(self, index: int) -> bytes | np.ndarray:
            reads[index] += 1
            return super().read(index)

    samples = Counting(count=12)
    (batch,) = batches(samples, 1, batch_size=12, part=Ranks(1, 3).part(12), workers=0)
    assert len(batch.indices) == 4
    assert dict(reads) == {int(index): 1 for index in batch.indices}


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


# --- views that can be had again


@given(st.integers(1, 50), st.integers(0, 500))
def test_views_come_one_after_another_and_then_again(views: int, epoch: int) -> None:
    replay = Replay(0, views)
    assert [replay.view(n) for n in range(views)] == list(range(views))
    assert replay.view(epoch + views) == replay.view(epoch)


def rendered(
    samples: Fake, replay: Replay, pipeline: Pipeline = TRAIN, **options: object
) -> dict[tuple[int, int], bytes]:
    """All views of all samples, as labelling has them: (index, view) to pixels."""
    settings = {"batch_size": 5, "indices": range(len(samples)), "damage": Damage(0)} | options
    found = {}
    for batch in view_batches(samples, pipeline, replay, **settings):
        for index, number, image in zip(batch.indices.tolist(), batch.views.tolist(), batch.images[0], strict=True):
            found[index, number] = image.tobytes()
    return found


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("seed", [0, 7])
def test_training_shows_the_views_that_were_labelled(workers: int, seed: int) -> None:
    """View e mod V in epoch e, of the labels' own seed, whatever the training's; 11 images, so that epochs cross."""
    samples, replay = Fake(), Replay(seed=3, views=3)
    views = rendered(samples, replay, workers=workers)
    assert len(set(views.values())) == 33
    order, slots = Order(samples.shard_sizes, seed), []
    for batch in batches(samples, 20, seed=seed, workers=workers, replay=replay):
        indices, epochs = order.batch(batch.step, 4)
        assert batch.indices.tolist() == indices.tolist()
        assert batch.views.tolist() == [epoch % 3 for epoch in epochs.tolist()]
        slots += zip(batch.indices.tolist(), batch.views.tolist(), batch.images[0], strict=True)
    assert len(slots) > 6 * 11
    for index, number, image in slots:
        assert image.tobytes() == views[index, number]


def test_without_a_replay_the_view_is_the_epoch() -> None:
    samples, order = Fake(), Order(np.array([5, 6]), 0)
    for batch in batches(samples, 8):
        assert batch.views.tolist() == order.batch(batch.step, 4)[1].tolist()


def test_another_label_seed_gives_other_views() -> None:
    samples = Fake()
    one, other = (rendered(samples, Replay(seed, 2)) for seed in (0, 1))
    assert one.keys() == other.keys()
    assert not set(one.values()) & set(other.values())


def test_more_views_hold_the_fewer_and_any_part_of_the_samples_has_its_own() -> None:
    samples = Fake()
    many = rendered(samples, Replay(0, 4))
    assert rendered(samples, Replay(0, 2)).items() <= many.items()
    assert rendered(samples, Replay(0, 4), indices=[7, 2]).items() <= many.items()


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 33, 50])
def test_every_view_comes_once_sample_after_sample(workers: int, batch_size: int) -> None:
    options = {"batch_size": batch_size, "indices": range(11), "workers": workers, "damage": Damage(0)}
    got = list(view_batches(Fake(), TRAIN, Replay(0, 3), **options))
    rows = [row for batch in got for row in zip(batch.indices.tolist(), batch.views.tolist(), strict=True)]
    assert rows == [(index, number) for index in range(11) for number in range(3)]
    assert [len(batch.indices) for batch in got[:-1]] == [batch_size] * (len(got) - 1)
    assert [batch.labels.tolist() for batch in got] == [(batch.indices * 10).tolist() for batch in got]


def test_an_image_is_decoded_once_for_all_its_views(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: Counter[bytes] = Counter()

    def counting(data: bytes | np.ndarray) -> Image.Image:
        decoded[bytes(data)] += 1
        return decode(data)

    monkeypatch.setattr(rendering, "decode", counting)
    assert len(rendered(Fake(), Replay(0, 6))) == 66
    assert sorted(decoded.values()) == [1] * 11


@pytest.mark.parametrize("workers", [0, 3])
def test_what_is_damaged_has_no_view_and_its_slot_is_filled_with_one_that_was_labelled(workers: int) -> None:
    samples, replay, damage = Fake(damaged=frozenset({4, 5, 10})), Replay(1, 2), Damage(3)
    views = rendered(samples, replay, damage=damage, workers=workers)
    assert {index for index, _ in views} == set(range(11)) - {4, 5, 10}
    assert set(damage.found) == {4, 5, 10}
    stand_in = {4: 6, 5: 6, 10: 0}
    got = batches(samples, 8, replay=replay, damage=Damage(3), workers=workers)
    for batch, whole in zip(got, batches(Fake(), 8, replay=replay), strict=True):
        assert batch.indices.tolist() == [stand_in.get(index, index) for index in whole.indices.tolist()]
        assert batch.views.tolist() == whole.views.tolist()
        for index, number, image in zip(batch.indices.tolist(), batch.views.tolist(), batch.images[0], strict=True):
            assert image.tobytes() == views[index, number]


def test_more_damage_than_the_budget_ends_a_labelling() -> None:
    with pytest.raises(DataError, match=r"at most 1 damaged images, got 2; .*fake.tar, 0007.png"):
        rendered(Fake(damaged=frozenset({4, 7})), Replay(0, 2), damage=Damage(1))


VIEWS = """
import hashlib, sys
from ssld.data.loader import Damage, Replay, view_batches
from ssld.data.sources import open_source
from ssld.data.transforms import Pipeline

samples = open_source("builtin:shapes?count=9&size=20", labeled=False)
pipeline = Pipeline.read(["RandCropImage", "RandFlipImage", "NormalizeImage"], 8)
replay = Replay(int(sys.argv[1]), 3)
for batch in view_batches(samples, pipeline, replay, batch_size=4, indices=range(9), damage=Damage(0)):
    print(batch.indices.tolist(), batch.views.tolist(), hashlib.sha256(batch.images[0].tobytes()).hexdigest())
"""


def test_views_are_the_same_in_every_process() -> None:
    def shown(seed: int, hash_seed: str) -> str:
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", VIEWS, str(seed)]
        return subprocess.run(command, env=environment, capture_output=True, check=True, text=True, timeout=60).stdout

    first = shown(3, "1")
    assert len(first.splitlines()) == 7
    assert shown(3, "2") == first
    assert shown(4, "1") != first


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
