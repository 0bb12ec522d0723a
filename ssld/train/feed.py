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

from ssld.contracts import Task
from ssld.data.loader import Batch, Damage, training_batches
from ssld.data.transforms import Pipeline, normalize
from ssld.errors import DataError
from ssld.teaching import ask, shown


@dataclass(frozen=True)
class Target:
    """One batch, ready for the step.

    images: float32 [B, 3, H, W], normalized for the student; hard: int64 [B]; logits: the teacher's,
    float32 [B, classes].
    """

    step: int
    images: np.ndarray
    keys: tuple[str, ...]
    hard: np.ndarray | None
    logits: np.ndarray | None

    @property
    def labels(self) -> Tensor:
        """Hard labels, int64 [B]. Raises DataError where the data have none."""
        if self.hard is None:
            raise DataError(f"expected labeled images, got one without a label: {self.keys[0]}")
        return paddle.to_tensor(self.hard)

    @property
    def soft(self) -> Tensor:
        """The teacher's logits, float32 [B, classes]."""
        assert self.logits is not None, "only a stage with a teacher asks for soft labels"
        return paddle.to_tensor(self.logits)


def feed(task: Task[Any], pipeline: Pipeline, start: int, total: int, damage: Damage) -> Generator[Target, None, None]:
    """Batches from step `start` to `total`, each shown to the teacher where there is one."""
    teacher = task.teacher
    pipelines = (pipeline,) if teacher is None else (pipeline, shown(pipeline, teacher.spec))
    batches = training_batches(
        task.data,
        pipelines,
        batch_size=task.settings.batch_size,
        seed=task.seed,
        start=start,
        damage=damage,
    )

    def target(batch: Batch) -> Target:
        logits = None
        if teacher is not None:
            logits = ask(teacher, batch.images[1], len(task.model.classes), f"the teacher of {task.name}")
        images = normalize(batch.images[0], pipeline.mean, pipeline.std)
        return Target(batch.step, images, batch.keys, batch.labels, logits)

    # in this thread: the engine holds the interpreter while it runs, so a thread of its own would gain nothing, and
    # with several OpenMP threads it would change the bits of the step beside it
    with closing(batches):
        yield from map(target, islice(batches, total - start))
