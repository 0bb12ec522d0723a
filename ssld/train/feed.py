"""What a step is fed: images for the student, and beside them hard labels or the teacher's soft labels."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar, cast

import numpy as np
import paddle
from paddle import Tensor as Tensor

from ssld.contracts import Soft, Task
from ssld.data.loader import Batch, Damage, training_batches
from ssld.data.transforms import Pipeline, normalize
from ssld.errors import DataError
from ssld.threads import share

T = TypeVar("T")


@dataclass(frozen=True)
class Target:
    """One batch, or this rank's part of it, ready for the step.

    images: float32 [B, 3, H, W], normalized for the student; hard: int64 [B]; taught: the soft labels.
    """

    step: int
    images: np.ndarray
    keys: tuple[str, ...]
    hard: np.ndarray | None
    taught: Soft | None

    @property
    def labels(self) -> Tensor:
        """Hard labels, int64 [B]. Raises DataError where the data have none."""
        if self.hard is None:
            raise DataError(f"expected labeled images, got one without a label: {self.keys[0]}")
        return paddle.to_tensor(self.hard)

    @property
    def soft(self) -> Soft:
        """The teacher's soft labels."""
        assert self.taught is not None, "only a stage with a teacher asks for soft labels"
        return self.taught


def feed(task: Task[Any], pipeline: Pipeline, start: int, total: int, damage: Damage) -> Generator[Target, None, None]:
    """Batches from step `start` to `total`, with soft labels where the stage has a teacher."""
    soft = task.soft
    batches = training_batches(
        task.data,
        (pipeline, *(soft.pipelines(pipeline) if soft else ())),
        batch_size=task.settings.batch_size,
        part=task.ranks.part(task.settings.batch_size),
        seed=task.seed,
        start=start,
        damage=damage,
        replay=soft.replay if soft else None,
    )

    def normalized(batches: Iterable[Batch]) -> Generator[tuple[Batch, np.ndarray], None, None]:
        for batch in islice(batches, total - start):
            yield batch, normalize(batch.images[0], pipeline.mean, pipeline.std)

    coming = normalized(batches)
    with closing(batches), closing(one_ahead(coming) if share() > 1 else coming) as ready:
        for batch, images in ready:
            # a teacher is asked in this thread: its engine holds the interpreter while it runs, so a thread of its own
            # would gain nothing, and its threads would change the bits of the step beside it
            taught = soft.of(batch) if soft else None
            yield Target(batch.step, images, batch.keys, batch.labels, taught)


def one_ahead(items: Iterator[T]) -> Generator[T, None, None]:
    """The same items; while one is worked on, a thread makes the next."""
    end = object()
    with ThreadPoolExecutor(1, thread_name_prefix="ssld-feed") as pool:
        coming = pool.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, items, end)
            yield cast(T, item)
