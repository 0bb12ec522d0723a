"""Reads soft labels back: by sample and view, for the batches of a training and for the images of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ssld.contracts import Soft
from ssld.data.images import decode
from ssld.data.loader import Batch, Replay
from ssld.data.samples import Samples, digest
from ssld.data.transforms import Pipeline, view
from ssld.errors import DataError, LabelError, PluginError
from ssld.labels.format import damaged, unpack
from ssld.labels.store import Labels, Store
from ssld.seeds import derive
from ssld.teaching.ensemble import average

PROBED = 3


class Reader:
    """The labels of one store for one set of samples, in memory; every byte is checked when they are opened."""

    def __init__(self, store: Store, samples: Samples) -> None:
        self.store, self.samples = store, samples
        self._shards: dict[int, Labels] = {}

    def open(self, shards: Sequence[int]) -> dict[int, LabelError]:
        """Open the label files of these shards; returns what is wrong with those that cannot be used."""
        faults = {}
        for shard in shards:
            try:
                self._shards[shard] = self.store.load(self.samples, shard)
            except LabelError as error:
                faults[shard] = error
        return faults

    @property
    def lacking(self) -> list[int]:
        """The shards that have no labels yet."""
        return [shard for shard in range(len(self.samples.shard_ids)) if shard not in self._shards]

    def open_present(self) -> dict[int, LabelError]:
        """Open every label file that is there; returns what is wrong with those that cannot be used."""
        missing = set(self.store.missing(self.samples))
        return self.open([shard for shard in range(len(self.samples.shard_ids)) if shard not in missing])

    @property
    def shards(self) -> list[int]:
        """The shards whose labels are open."""
        return sorted(self._shards)

    def indices(self, shard: int) -> np.ndarray:
        """The samples of a shard that have labels, which those that were damaged do not."""
        there = ~np.isnan(self._shards[shard].packed.rest).any(axis=1)
        return np.flatnonzero(there) + int(self.samples.borders[shard])

    @property
    def files(self) -> str:
        """A hash of all label files."""
        return digest(*(self._shards[shard].sha256 for shard in sorted(self._shards)))

    def expect_same_views(self) -> None:
        """Render the first view of a few shards again. Raises LabelError when one is no more what the teacher saw."""
        places = sorted(self._shards)
        for shard in places[:: max(1, len(places) // PROBED)][:PROBED]:
            probe, about = self._shards[shard].probe, self.store.description
            if probe is None:
                continue
            index = int(self.samples.borders[shard]) + probe.sample
            seed = derive(about.replay.seed, self.samples.key(index), 0)
            data = self.samples.read(index)
            try:
                pixels = digest(view(decode(data), about.pipeline, seed))
            except DataError as error:
                raise LabelError(
                    f"{self.samples.where(index)}: expected the image that the teacher saw, got: {error}; restore it"
                ) from error
            if pixels != probe.pixels:
                raise LabelError(
                    f"{self.store.file(self.samples, shard)}: expected {self.samples.where(index)} to be rendered as "
                    f"the teacher saw it, pixels {probe.pixels[:16]}…, got {pixels[:16]}…: the image or the image "
                    f"library has changed; remove the labels with ssld labels rm {self.store.directory}, or bring "
                    f"back what was"
                )

    def at(self, indices: np.ndarray, views: np.ndarray) -> Soft:
        """Soft labels of these samples in these views. Raises LabelError for one that was damaged at labelling."""
        about = self.store.description
        rows = damaged((len(indices),), len(about.classes), about.top_k)
        shards = np.searchsorted(self.samples.borders, indices, side="right") - 1
        for shard in np.unique(shards):
            mine = shards == shard
            found = self._shards[int(shard)].packed[indices[mine] - self.samples.borders[shard], views[mine]]
            rows.ids[mine], rows.codes[mine], rows.rest[mine] = found.ids, found.codes, found.rest
        lost = np.isnan(rows.rest)
        if lost.any():
            index = int(indices[lost.argmax()])
            raise LabelError(
                f"{self.samples.where(index)}: expected a soft label, got none in "
                f"{self.store.file(self.samples, int(shards[lost.argmax()]))}: the image could not be read when it was "
                f"labelled; remove that file and label again"
            )
        return unpack(rows, len(about.classes), about.top_k, about.temperature)


def names(pipeline: Pipeline) -> str:
    """The operators in words."""
    return ", ".join(type(step).__name__ for step in pipeline.steps)


@dataclass(frozen=True)
class StoredLabels:
    """Soft labels from a store; of several teachers, the mean of what each has in its own.

    fingerprint: a hash of the teachers; readers: with the weight of each teacher.
    """

    fingerprint: str
    readers: tuple[tuple[Reader, float], ...]

    @property
    def replay(self) -> Replay:
        return self.readers[0][0].store.description.replay

    @property
    def files(self) -> str:
        return digest(*(reader.files for reader, _ in self.readers))

    def pipelines(self, student: Pipeline) -> tuple[Pipeline, ...]:
        """None: nobody but the student sees an image. Raises PluginError for other views than the labels are of."""
        about = self.readers[0][0].store.description
        if student.at(about.pipeline.resolution).steps != about.pipeline.steps:
            raise PluginError(
                f"expected a stage that trains on the views of its labels, {names(about.pipeline)}, got "
                f"{names(student)}; write labels: online"
            )
        return ()

    def of(self, batch: Batch) -> Soft:
        """The soft labels of a batch whose views are those of `replay`."""
        return self.at(batch.indices, batch.views)

    def at(self, indices: np.ndarray, views: np.ndarray) -> Soft:
        """Soft labels of these samples in these views."""
        classes = len(self.readers[0][0].store.description.classes)
        return average([(reader.at(indices, views), weight) for reader, weight in self.readers], classes)

    def at_test_time(self, indices: np.ndarray) -> Soft:
        """Soft labels of these samples in their only view."""
        return self.at(indices, np.zeros(len(indices), np.int64))
