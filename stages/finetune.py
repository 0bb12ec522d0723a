"""Finetuning on the labeled set: with the teacher and without labels, as published, or with hard labels mixed in.

Source: SSLD stage 2 in PaddleClas 2.0 (docs/zh_CN/advanced_tutorials/distillation/distillation.md §3.3): the same
label-free loss, all layers, a hundredth of stage 1's learning rate, 30 to 60 epochs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from ssld.contracts import Outcome, StageKind, Task
from ssld.settings import Context, Smoothing, TaughtSettings, Teachers, Words

if TYPE_CHECKING:
    from ssld.train.feed import Target, Tensor


class Finetune(TaughtSettings):
    """Train a distilled student further on the labeled set."""

    kind: Literal["finetune"]
    start: Annotated[Words, Field(alias="from")]
    teacher: Teachers | None = None
    hard: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the cross-entropy with the true labels; the rest is the teacher's. 1 needs no teacher."""
    smoothing: Smoothing = 0.0
    """Share of each true label that is spread evenly over all classes."""

    base_rate: ClassVar[float] = 0.001

    @model_validator(mode="after")
    def _something_teaches(self) -> Finetune:
        if self.teacher is None and self.hard < 1:
            raise ValueError(f"expected a teacher, or hard: 1 to learn from labels alone, got hard: {self.hard:g}")
        if self.teacher is not None and self.hard == 1:
            raise ValueError(
                "expected no teacher beside hard: 1, which learns from labels alone; lower hard, or drop it"
            )
        if self.smoothing and not self.hard:
            raise ValueError(
                "expected hard above 0 beside smoothing, which is of true labels, got hard: 0; raise it, or drop "
                "smoothing"
            )
        return self

    def derived(self, context: Context) -> dict[str, Any]:
        derived = super().derived(context)
        if context.parent is not None:
            derived["learning_rate"] = context.parent.learning_rate / 100 * self.batch_size / context.parent.batch_size
        return derived


def run(task: Task[Finetune]) -> Outcome:
    """Minimize (1 - hard) * distance to the teacher + hard * cross-entropy with the labels."""
    from ssld.train import loop, losses, networks

    hard, smoothing = task.settings.hard, task.settings.smoothing
    distance = losses.objective(task.settings.losses)
    network = networks.student(task)

    def objective(logits: Tensor, target: Target) -> Tensor:
        terms = [(1 - hard) * distance(logits, target)] if hard < 1 else []
        terms += [hard * losses.hard_ce(logits, target.labels, smoothing)] if hard > 0 else []
        return sum(terms[1:], terms[0])

    return loop.fit(task, network, objective)


stage = StageKind(Finetune, run)
