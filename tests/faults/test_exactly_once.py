"""Every sample exactly once per epoch and in one order: from every step, with any number of decoders and ranks.

What is right is known without the loader: an epoch is the set of all keys, and the order is that of one run that was
never interrupted, on one rank, in one thread.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import NamedTuple

import numpy as np
import pytest

from ssld.contracts import Ranks
from ssld.data import loader, rendering
from ssld.data.loader import Batch, Damage, training_batches
from ssld.data.order import Order
from ssld.data.rendering import Renderer
from ssld.data.samples import Samples
from ssld.data.transforms import Pipeline

SHARDS = (1, 40, 7, 30, 0, 22, 17)
SAMPLES = sum(SHARDS)
BATCH = 10
"""So that every epoch ends inside of a batch."""
STEPS = 3 * SAMPLES // BATCH
RESUMED = range(2 * SAMPLES // BATCH + 1)
"""Every step of the first two epochs; from each, one epoch and more is followed."""
VIEWS = Pipeline.read(["RandFlipImage"], 6)
PIXELS = np.random.default_rng(0).integers(0, 256, (SAMPLES, 6, 6, 3), dtype=np.uint8)


@dataclass(frozen=True)
class Noise:
    """A store of pixels."""

    def key(self, row: int) -> str:
        return f"{row:03d}"

    def where(self, row: int) -> str:
        return f"noise {row}"

    def read(self, row: int) -> np.ndarray:
        return PIXELS[row]

    def stamp(self, rows: np.ndarray) -> str:
        return "noise"


def samples() -> Samples:
    rows = np.arange(SAMPLES)
    return Samples("noise", None, "noise", np.array(SHARDS), rows % 5, Noise(), rows)


class Seen(NamedTuple):
    """One row of a batch: whose it is, its label, the number of its view, and its pixels."""

    key: str
    label: int
    view: int
    pixels: bytes


Stream = Callable[..., Iterator[Batch]]
"""A loader: (samples, pipelines, **options of training_batches)."""


def seen(stream: Stream, steps: int, **options: object) -> list[list[Seen]]:
    """The rows of each step."""
    made = stream(samples(), (VIEWS,), seed=3, damage=Damage(0), **{"batch_size": BATCH, **options})
    with closing(made):
        return [
            [
                Seen(key, int(label), int(view), image.tobytes())
                for key, label, view, image in zip(batch.keys, batch.labels, batch.views, batch.images[0], strict=True)
            ]
            for batch in islice(made, steps)
        ]


@cache
def unbroken(window: int | None, batch_size: int = BATCH) -> list[list[Seen]]:
    """Almost three epochs in one go, in one thread."""
    return seen(training_batches, 3 * SAMPLES // batch_size, window=window, batch_size=batch_size, workers=0)


def problems(rows: list[Seen]) -> list[str]:
    """What is wrong with the whole epochs: samples that are missing, come twice, or have another label or view."""
    found = []
    everything = {f"{row:03d}" for row in range(SAMPLES)}
    for epoch in range(len(rows) // SAMPLES):
        part = rows[epoch * SAMPLES : (epoch + 1) * SAMPLES]
        counts = Counter(row.key for row in part)
        found += [f"epoch {epoch}: {key} is missing" for key in sorted(everything - set(counts))]
        found += [f"epoch {epoch}: {key} comes {count} times" for key, count in counts.items() if count > 1]
        found += [f"epoch {epoch}: {row.key} shows view {row.view}" for row in part if row.view != epoch]
        found += [f"{row.key} has the label {row.label}" for row in part if row.label != int(row.key) % 5]
    return found


def together(parts: list[list[list[Seen]]]) -> list[list[Seen]]:
    """The steps of all ranks, each step's rows in the order of the ranks."""
    return [[row for rows in step for row in rows] for step in zip(*parts, strict=True)]


def differences(got: list[list[Seen]], start: int, window: int | None) -> list[str]:
    """Where a run from `start` differs from the unbroken one."""
    wanted = unbroken(window)[start : start + len(got)]
    return [
        f"step {start + n}: {[row.key for row in a]} for {[row.key for row in b]}"
        for n, (a, b) in enumerate(zip(got, wanted, strict=True))
        if a != b
    ]


def resumed(stream: Stream, start: int, ranks: int, **options: object) -> list[list[Seen]]:
    """A run that goes on at a step, for one epoch and a bit, by so many ranks."""
    steps = min(SAMPLES // BATCH + 2, STEPS - start)
    parts = (Ranks(number, ranks).part(BATCH) for number in range(ranks))
    return together([seen(stream, steps, start=start, part=part, **options) for part in parts])


WINDOWS = pytest.mark.parametrize("window", [None, 2], ids=["no window", "a window"])


@WINDOWS
def test_an_unbroken_run_holds_every_sample_once_per_epoch(window: int | None) -> None:
    assert problems([row for step in unbroken(window) for row in step]) == []


@WINDOWS
def test_the_order_does_not_depend_on_the_size_of_the_batch(window: int | None) -> None:
    rows, others = ([row for step in unbroken(window, size) for row in step] for size in (BATCH, 9))
    assert others[: len(rows)] == rows


@WINDOWS
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("decoders", [0, 1, 2, 3, 4])
def test_from_every_step_all_goes_on_as_if_it_had_never_stopped(decoders: int, ranks: int, window: int | None) -> None:
    for start in RESUMED:
        got = resumed(training_batches, start, ranks, workers=decoders, window=window)
        assert differences(got, start, window) == []
        assert problems([row for step in [*unbroken(window)[:start], *got] for row in step]) == []


def test_processes_that_render_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "FIRST", 0.0)
    renderer = Renderer()
    monkeypatch.setattr(loader, "renderer", renderer)
    end = time.monotonic() + 240
    while not (renderer._processes and all(process.is_up() for process in renderer._processes)):
        assert time.monotonic() < end, "no process came up"
        resumed(training_batches, 0, 1, workers=1)
    monkeypatch.setattr(rendering, "render", None)  # nothing is rendered here
    for start in RESUMED:
        assert differences(resumed(training_batches, start, 1, workers=1), start, None) == []


# Tests of the test ----------------------------------------------------------------------------------------------------


class Fresh(Order):
    """Begins every epoch with a new batch: what did not fill the last one falls between two epochs."""

    def batch(self, step: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        epoch, place = divmod(step, self.samples // batch_size)
        rows = slice(place * batch_size, (place + 1) * batch_size)
        return self._epoch(epoch)[rows], np.full(batch_size, epoch)


class Late(Order):
    """Goes on one step too late."""

    def batch(self, step: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        return super().batch(step + (step > 0), batch_size)


def test_of_the_test_a_sample_between_two_epochs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "Order", Fresh)
    steps = seen(training_batches, 40, batch_size=16, workers=0)
    assert any("is missing" in line for line in problems([row for step in steps for row in step]))


def test_of_the_test_a_step_that_is_left_out_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = unbroken(None)
    monkeypatch.setattr(loader, "Order", Late)
    got = resumed(training_batches, 5, 1, workers=0)
    assert differences(got, 5, None)
    rows = [row for step in [*wanted[:5], *got] for row in step]
    assert any("is missing" in line for line in problems(rows))


def test_of_the_test_parts_that_overlap_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def part(self: Ranks, rows: int) -> slice:
        return slice(rows * self.number // self.count, min(rows, rows * (self.number + 1) // self.count + 1))

    monkeypatch.setattr(Ranks, "part", part)
    got = resumed(training_batches, 0, 2, workers=0)
    assert differences(got, 0, None)
    assert any("comes 2 times" in line for line in problems([row for step in got for row in step]))


def test_of_the_test_a_shuffle_by_the_number_of_decoders_is_found() -> None:
    def reordered(*arguments: object, workers: int, **options: object) -> Iterator[Batch]:
        return training_batches(*arguments, workers=workers, **{**options, "window": workers or None})

    assert differences(resumed(reordered, 4, 1, workers=2), 4, None)
    assert not differences(resumed(reordered, 4, 1, workers=0), 4, None)
