"""Batches of views in a fixed order, endless for training and one pass for evaluation.

Threads read the bytes and have the views rendered. They have no state to lose: the view of a sample is a function of
the seed, its key and the epoch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain, count, islice
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from ssld.data.order import Order
from ssld.data.rendering import Renderer, Views, Work, render
from ssld.data.transforms import Pipeline
from ssld.errors import DataError
from ssld.threads import decoders, share
from ssld.watch import watch

if TYPE_CHECKING:
    from ssld.data.samples import Samples

T = TypeVar("T")
R = TypeVar("R")

HANDED_OVER = 8
"""Images that a thread takes on at a time, at most."""

renderer = Renderer()
"""All streams of the process share it: training goes on where an evaluation ends."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Some samples, rendered.

    step: training step, or number of the batch in an evaluation; images: per pipeline, uint8 [B, S, S, 3];
    labels: int64 [B], None for a pool; indices: int64 [B] into the samples; views: int64 [B], which view of each;
    keys: their names.
    """

    step: int
    images: tuple[np.ndarray, ...]
    labels: np.ndarray | None
    indices: np.ndarray
    views: np.ndarray
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Replay:
    """Views that can be had again: drawn by a seed of their own, `views` of each image, one after another.

    seed: the same for all training seeds that share the soft labels of these views.
    """

    seed: int
    views: int

    def view(self, epoch: int) -> int:
        """The view that an image is shown in: epoch mod views."""
        return epoch % self.views


@dataclass
class Damage:
    """The damaged images of one set, each counted once.

    budget: how many are passed over; report: is told of each as it is first met, None where only the error at the end
    of the budget speaks; found: place and reason, by the sample's index.
    """

    budget: int
    report: Callable[[str], None] | None = None
    found: dict[int, str] = field(default_factory=dict)

    def add(self, index: int, where: str, error: DataError) -> None:
        """Count one image. Raises DataError, from `error`, when the budget is exceeded."""
        is_new = index not in self.found
        self.found[index] = f"{where}: {error}"
        if len(self.found) > self.budget:
            raise DataError(
                f"expected at most {self.budget} damaged images, got {len(self.found)}; the last is "
                f"{self.found[index]}; replace it or take it out of the data"
            ) from error
        if is_new and self.report is not None:
            self.report(f"skipped, damaged: {self.found[index]} ({len(self.found)} of at most {self.budget})")


def training_batches(
    samples: Samples,
    pipelines: tuple[Pipeline, ...],
    *,
    batch_size: int,
    part: slice | None = None,
    seed: int,
    start: int = 0,
    window: int | None = None,
    workers: int | None = None,
    ahead: int = 4,
    damage: Damage,
    replay: Replay | None = None,
) -> Generator[Batch, None, None]:
    """Endless full batches from step `start` on; what a step holds does not depend on where one starts.

    The first pipeline draws a view, with derive(seed, key, epoch), and each renders it: the same crop and flip at
    every size; with `replay`, its seed and its view of that epoch are taken instead. Pipelines that make equal pixels
    share one array. A damaged image is counted, and the next readable sample of the set, with its own key, label and
    view, takes its slot.

    part: the rows of every batch that are wanted, None for all. What they hold does not depend on it.
    window: shards open at once, None for all; workers: images rendered at once, 0 for none beside the caller, None for
    what this rank's cores allow; ahead: batches rendered in advance.
    Closing the generator ends its threads. Raises DataError: more damage than the budget, nothing readable, or
    operators that end at another size; ValueError where the pipelines cannot share a view.
    """
    order = Order(samples.shard_sizes, seed, window)
    distinct, slots = _distinct(pipelines)
    rows = part or slice(batch_size)
    requests = (
        _Request(int(index), replay.seed, (replay.view(int(epoch)),))
        if replay
        else _Request(int(index), seed, (int(epoch),))
        for step in count(start)
        for index, epoch in zip(*(column[rows] for column in order.batch(step, batch_size)), strict=True)
    )
    wanted = len(range(batch_size)[rows])
    # beside a step, whose core is its own
    threads = decoders(share() - 1) if workers is None else workers
    loader = _Loader(samples, distinct, tries=min(damage.budget + 1, len(samples)), alone=not threads)
    loaded = _in_order(loader.load, requests, threads, ahead * wanted)
    return _batches(samples, loaded, slots, wanted, start, damage)


def evaluation_batches(
    samples: Samples, pipeline: Pipeline, *, batch_size: int, workers: int | None = None, ahead: int = 4, damage: Damage
) -> Generator[Batch, None, None]:
    """One pass in the order of the indices; the last batch may be short.

    A damaged image is counted and left out, so that no other one counts twice. An operator that draws would show
    each sample in one fixed view. Threads and errors are as in `training_batches`.
    """
    return view_batches(
        samples,
        pipeline,
        Replay(seed=0, views=1),
        batch_size=batch_size,
        indices=range(len(samples)),
        workers=workers,
        ahead=ahead,
        damage=damage,
    )


def view_batches(
    samples: Samples,
    pipeline: Pipeline,
    replay: Replay,
    *,
    batch_size: int,
    indices: Iterable[int],
    workers: int | None = None,
    ahead: int = 4,
    damage: Damage,
) -> Generator[Batch, None, None]:
    """Every view of the samples at these indices, sample after sample, each decoded once; the last batch may be short.

    A damaged image is counted and left out. Threads and errors are as in `training_batches`.
    """
    requests = (_Request(index, replay.seed, tuple(range(replay.views))) for index in indices)
    threads = decoders(share()) if workers is None else workers
    samples_ahead = max(2 * threads, ahead * batch_size // replay.views)
    loader = _Loader(samples, (pipeline,), tries=1, alone=not threads)
    loaded = _in_order(loader.load, requests, threads, samples_ahead)
    return _batches(samples, loaded, (0,), batch_size, 0, damage)


@dataclass(frozen=True)
class _Request:
    """One sample that is wanted, and what its views depend on besides its key: a seed, and their numbers."""

    index: int
    seed: int
    views: tuple[int, ...]


@dataclass(frozen=True)
class _Loaded:
    """What a request brought: the sample that was readable, and the damaged ones that were met before it.

    views: empty where no sample was readable.
    """

    index: int
    views: Views
    damaged: tuple[tuple[int, DataError], ...]


@dataclass(frozen=True)
class _Row:
    """One row of a batch."""

    index: int
    view: int
    images: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class _Loader:
    """What the threads share, and only read.

    tries: samples tried for one slot, from the wanted one on; alone: render in the caller's thread, whatever it takes.
    """

    samples: Samples
    pipelines: tuple[Pipeline, ...]
    tries: int
    alone: bool

    def load(self, requests: tuple[_Request, ...]) -> list[_Loaded]:
        found = self._rendered([(request, request.index) for request in requests])
        return [self._filled(request, views) for request, views in zip(requests, found, strict=True)]

    def _filled(self, request: _Request, found: Views | DataError) -> _Loaded:
        damaged: list[tuple[int, DataError]] = []
        index = request.index
        while isinstance(found, DataError):
            damaged.append((index, found))
            if len(damaged) == self.tries:
                return _Loaded(request.index, (), tuple(damaged))
            index = (index + 1) % len(self.samples)
            [found] = self._rendered([(request, index)])
        return _Loaded(index, found, tuple(damaged))

    def _rendered(self, wanted: Sequence[tuple[_Request, int]]) -> list[Views | DataError]:
        # a shard that cannot be read is no damaged image, and stops the run by its name
        works = [
            Work(self._read(index), self.samples.key(index), request.seed, request.views) for request, index in wanted
        ]
        with watch.awaiting(lambda: f"the images from {self.samples.where(wanted[0][1])} on to be decoded"):
            return [render(self.pipelines, work) for work in works] if self.alone else renderer(self.pipelines, works)

    def _read(self, index: int) -> bytes | np.ndarray:
        with watch.awaiting(lambda: f"{self.samples.where(index)} to be read"):
            return self.samples.read(index)


def _distinct(pipelines: tuple[Pipeline, ...]) -> tuple[tuple[Pipeline, ...], tuple[int, ...]]:
    """The pipelines that make different pixels, and for each one given its place among them."""
    kinds = {tuple(type(step).__name__ for step in pipeline.steps) for pipeline in pipelines}
    if len(kinds) != 1:
        raise ValueError(f"expected pipelines of the same operators, because they share a view, got {sorted(kinds)}")
    pixels = [(pipeline.steps, pipeline.resolution) for pipeline in pipelines]
    places = {pixel: place for place, pixel in enumerate(dict.fromkeys(pixels))}
    return tuple(pipelines[pixels.index(pixel)] for pixel in places), tuple(places[pixel] for pixel in pixels)


def _in_order(
    function: Callable[[tuple[T, ...]], list[R]], items: Iterable[T], workers: int, ahead: int
) -> Generator[R, None, None]:
    """What `function` makes of the items, some at a time, in threads: in their order, at most `ahead` in advance."""
    if workers == 0:
        yield from chain.from_iterable(map(function, batched(items, 1)))
        return
    # to hand over one image at a time would take the step's thread a twentieth of a millisecond for each
    size = max(1, min(HANDED_OVER, ahead // (2 * workers)))
    chunks = batched(items, size)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="ssld-decode")
    try:
        futures = deque(pool.submit(function, chunk) for chunk in islice(chunks, max(1, ahead // size)))
        while futures:
            yield from futures.popleft().result()
            futures.extend(pool.submit(function, chunk) for chunk in islice(chunks, 1))
    finally:
        pool.shutdown(cancel_futures=True)


def batched(items: Iterable[T], size: int) -> Iterator[tuple[T, ...]]:
    """Tuples of `size` items, as itertools.batched of Python 3.12; the last may be short."""
    waiting = iter(items)
    while chunk := tuple(islice(waiting, size)):
        yield chunk


def _batches(
    samples: Samples,
    loaded: Generator[_Loaded, None, None],
    slots: tuple[int, ...],
    batch_size: int,
    start: int,
    damage: Damage,
) -> Generator[Batch, None, None]:
    with closing(loaded):
        rows = chain.from_iterable(_readable(samples, loaded, damage))
        for step in count(start):
            batch = list(islice(rows, batch_size))
            if not batch:
                return
            yield _batch(samples, step, batch, slots)


def _readable(samples: Samples, loaded: Iterable[_Loaded], damage: Damage) -> Iterator[list[_Row]]:
    """Count the damage in the order of the slots, never in the order of the threads, and pass on what was filled."""
    for item in loaded:
        for index, error in item.damaged:
            damage.add(index, samples.where(index), error)
        if len(damage.found) == len(samples):
            raise DataError(f"expected a readable image in {samples.name}, got {len(samples)} damaged ones")
        yield [_Row(item.index, number, images) for number, images in item.views]


def _batch(samples: Samples, step: int, rows: list[_Row], slots: tuple[int, ...]) -> Batch:
    indices = np.array([row.index for row in rows], np.int64)
    views = np.array([row.view for row in rows], np.int64)
    images = [np.stack(column) for column in zip(*(row.images for row in rows), strict=True)]
    labels = None if samples.labels is None else samples.labels[indices]
    keys = tuple(samples.key(row.index) for row in rows)
    return Batch(step, tuple(images[slot] for slot in slots), labels, indices, views, keys)
