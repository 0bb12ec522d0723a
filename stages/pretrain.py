"""Supervised training on labels: it makes a teacher where none is given."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from ssld.contracts import Outcome, StageKind, Task
from ssld.settings import Plugin, Smoothing, TrainingSettings


class Pretrain(TrainingSettings):
    """Train a network on the labels of `data`."""

    kind: Literal["pretrain"]
    student: Annotated[Plugin, Field(alias="network")]
    """The network to train: NAME, or {name: NAME, …options}."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    smoothing: Smoothing = 0.0
    """Share of each label that is spread evenly over all classes."""

    base_rate: ClassVar[float] = 0.1


def run(task: Task[Pretrain]) -> Outcome:
    """Minimize the cross-entropy with the labels."""
    from ssld.train import loop, losses, networks

    smoothing, network = task.settings.smoothing, networks.student(task)
    return loop.fit(task, network, lambda logits, target: losses.hard_ce(logits, target.labels, smoothing))


stage = StageKind(Pretrain, run)
