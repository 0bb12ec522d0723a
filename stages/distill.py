"""Distillation: the student learns the teacher's soft labels. Labels of the data are never read.

Source: SSLD, as PaddleClas documents it (docs/zh_CN/training/advanced/ssld.md): stage 1 on the pool, the student from
scratch, no hard labels, no mixup.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from ssld.contracts import Outcome, StageKind, Task
from ssld.settings import TaughtSettings, Teachers


class Distill(TaughtSettings):
    """Train the student on the teacher's soft labels of `data`."""

    kind: Literal["distill"]
    teacher: Teachers

    needs_labels: ClassVar[bool] = False


def run(task: Task[Distill]) -> Outcome:
    """Minimize the distance to the teacher's soft labels."""
    from ssld.train import loop, losses, networks

    objective = losses.objective(task.settings.losses)
    return loop.fit(task, networks.student(task), objective)


stage = StageKind(Distill, run)
