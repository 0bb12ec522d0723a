"""A stage's training as it will be, with fresh weights, and labels that are there at once: to be timed."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ssld.contracts import Ranks, Soft, Task
from ssld.data.loader import Batch, Replay
from ssld.data.transforms import Pipeline
from ssld.errors import Interrupted, PluginError
from ssld.graph import Node, Plan, model, pipeline
from ssld.journal import Journal
from ssld.settings import Stored

SMALLEST = 2
"""The smallest batch that batch norms can be trained on."""
MANY = 10**6
"""Epochs of a training that is stopped long before one is over."""


@dataclass(frozen=True)
class Blank:
    """Soft labels as of a store, that say nothing; so that a stage can be timed without its teacher."""

    classes: int
    stored: Stored | None
    fingerprint: str = ""
    files: str = ""

    @property
    def replay(self) -> Replay | None:
        return Replay(self.stored.seed, self.stored.views) if self.stored else None

    def pipelines(self, student: Pipeline) -> tuple[Pipeline, ...]:
        """None: nobody but the student sees an image."""
        return ()

    def of(self, batch: Batch) -> Soft:
        """Labels of the form that the stage will get."""
        kept = self.classes if self.stored is None else self.stored.top_k
        temperature = 1.0 if self.stored is None else self.stored.temperature
        if kept >= self.classes:
            return Soft(None, np.zeros((len(batch.indices), self.classes), np.float32), temperature)
        ids = np.tile(np.arange(kept), (len(batch.indices), 1))
        return Soft(ids, np.zeros((len(batch.indices), kept + 1), np.float32), temperature)


def trial(plan: Plan, node: Node, device: str, journal: Journal, ranks: Ranks) -> Task[Any]:
    """The stage's task; nothing is saved, and nobody stops it."""
    return Task(
        name=node.name,
        model=model(plan, node),
        settings=node.settings,
        seed=0,
        device=device,
        data=plan.data.named(node.settings.data),
        validation=plan.data.validation,
        train=pipeline(plan.recipe, "train", node.settings.resolution),
        initial=None,
        soft=Blank(len(plan.data.classes), node.settings.stored) if node.settings.taught_by else None,
        reference=None,
        resume=None,
        damage_budget=plan.data.damage_budget(node.settings.data),
        save=lambda state: None,
        stop=lambda: None,
        journal=journal,
        ranks=ranks,
    )


def fitting(seconds: float, one: float, most: int) -> int:
    """The largest batch of which three fit into these seconds, when one image takes `one`.

    >>> fitting(6.0, 0.5, 64), fitting(6.0, 0.001, 64)
    (4, 64)
    """
    return max(1, min(most, int(seconds / (3 * max(one, 1e-9)))))


def step_speed(run: Callable[[Task[Any]], object], task: Task[Any], seconds: float) -> tuple[float, int]:
    """Images per second of a stage's training, and the batch at which they were so many.

    run: the work of the stage's kind. A first try with the smallest batch tells how large a batch the time allows.
    """
    wanted = task.settings.batch_size
    one = 1 / paced_steps(run, endless(task, SMALLEST), 0.0)
    batch = max(SMALLEST, fitting(seconds, one, wanted))
    return paced_steps(run, endless(task, batch), seconds), batch


def endless(task: Task[Any], batch: int) -> Task[Any]:
    """The same with that batch size, and neither an evaluation nor a checkpoint within reach."""
    far = {"epochs": MANY, "warmup_epochs": float(MANY), "eval_interval": MANY, "save_interval": 0, "save_steps": None}
    return replace(task, settings=task.settings.model_copy(update={**far, "batch_size": batch}))


def paced_steps(run: Callable[[Task[Any]], object], task: Task[Any], seconds: float) -> float:
    """Images per second from the end of the first step on, for so many seconds, but one more step at least."""
    ends: list[float] = []

    def stop() -> int | None:
        ends.append(time.monotonic())
        return signal.SIGTERM if len(ends) > 1 and ends[-1] - ends[0] >= seconds else None

    with suppress(Interrupted):
        run(replace(task, stop=stop))
    if len(ends) < 2:
        raise PluginError(
            f"{task.name}: expected a stage of kind {task.settings.kind} to ask stop() after every step, got "
            f"{len(ends)} calls; leave --measure out"
        )
    return task.settings.batch_size * (len(ends) - 1) / (ends[-1] - ends[0])
