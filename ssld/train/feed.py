"""What a step is fed: images for the student, and beside them hard labels or the teacher's soft labels."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import paddle
from paddle import Tensor as Tensor

from ssld.contracts import Soft, Task
from ssld.data.loader import Batch, Damage, training_batches
from ssld.data.transforms import Pipeline, normalize
from ssld.errors import DataError


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

    def target(batch: Batch) -> Target:
        images = normalize(batch.images[0], pipeline.mean, pipeline.std)
        return Target(batch.step, images, batch.keys, batch.labels, soft.of(batch) if soft else None)

    # a teacher is asked in this thread: its engine holds the interpreter while it runs, so a thread of its own would
    # gain nothing, and with several OpenMP threads it would change the bits of the step beside it
    with closing(batches):
        yield from map(target, islice(batches, total - start))
