"""The one training loop. Every stage brings a network and an objective; the order of events is the same for all."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import paddle
from paddle import nn

from ssld.contracts import Outcome, State, Task
from ssld.data.loader import Damage
from ssld.data.transforms import Pipeline
from ssld.errors import DataError, Interrupted
from ssld.seeds import derive
from ssld.settings import TrainingSettings
from ssld.train import networks
from ssld.train.evaluation import Evaluator
from ssld.train.exchange import Exchange
from ssld.train.feed import Target, feed
from ssld.train.momentum import Momentum
from ssld.train.schedules import cosine_warmup
from ssld.watch import watch

Objective = Callable[[paddle.Tensor, Target], paddle.Tensor]
SAVE_EVERY_SECONDS = 180.0


@dataclass
class Progress:
    """Where the loop is; `facts` is what of it survives in a checkpoint."""

    step: int = 0
    seconds: float = 0.0
    best: dict[str, float] = field(default_factory=lambda: {"step": 0, "top1": -1.0})
    kept: list[int] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    due: bool = False
    """The step ends an epoch, and what is done then is not done yet: where a stage stopped so, it goes on with that."""

    def facts(self) -> dict[str, Any]:
        return {
            "seconds": self.seconds,
            "best": self.best,
            "kept": self.kept,
            "metrics": self.metrics,
            "due": self.due,
        }

    @classmethod
    def after(cls, state: State | None) -> Progress:
        return cls() if state is None else cls(step=state.step, **state.facts)


def fit(
    task: Task[Any],
    network: nn.Layer,
    objective: Objective,
    *,
    prepare: Callable[[nn.Layer], object] = nn.Layer.train,
    pipeline: Pipeline | None = None,
) -> Outcome:
    """Train until the last step and return the last state.

    objective(logits [B, classes], target) -> [B] losses; prepare sets the mode of the layers before every step;
    pipeline renders the training images, the task's own when left out. Every rank of the task calls this; rank 0 alone
    evaluates, saves and reports.

    Raises Interrupted after a save when a signal came, within a step or a batch of an evaluation, which is then done
    again; DataError when the loss is not finite: the step is not taken, and the last checkpoint stands; RankError when
    a rank is gone.
    """
    settings = task.settings
    assert isinstance(settings, TrainingSettings)
    total = settings.total_steps(len(task.data))
    progress = Progress.after(task.resume)
    optimizer = Momentum(network, settings.momentum, settings.weight_decay, settings.clip_norm)
    if task.resume is not None:
        optimizer.restore(task.resume.optimizer)
    descend = Descent(task, network, objective, optimizer, Exchange(network, task.ranks))
    between = Between(task, network, optimizer, progress, total)
    rate = rates(settings, len(task.data), total)
    damage = Damage(task.damage_budget, task.journal.met)
    with (
        task.journal.stage(task.name, total, len(task.data), settings.batch_size, progress.step) as log,
        closing(feed(task, pipeline or task.train, progress.step, total, damage)) as targets,
    ):
        if progress.due:
            between.steps(None, again=True)
        while progress.step < total:
            waited = time.monotonic()
            target = next(targets)
            waited = time.monotonic() - waited
            prepare(network)
            loss, stop = descend(target, rate(progress.step))
            progress.step += 1
            log.step(progress.step, loss, rate(progress.step - 1), waited)
            progress.due = ends_epoch(task, progress.step, total)
            between.steps(stop)
    return Outcome(between.state(), progress.metrics)


@dataclass(frozen=True)
class Descent:
    """Steps of gradient descent, on all ranks at once."""

    task: Task[Any]
    network: nn.Layer
    objective: Objective
    optimizer: Momentum
    exchange: Exchange

    def __call__(self, target: Target, rate: float) -> tuple[float, int | None]:
        """One step; returns the mean loss of the whole batch, and the signal at which to stop. Raises DataError."""
        task = self.task
        paddle.seed(derive(task.seed, "step", target.step, task.ranks.number))
        with watch.awaiting(lambda: f"step {target.step + 1} of {task.name} to be computed"):
            losses = self.objective(self.network(paddle.to_tensor(target.images)), target)
            # a rank's share of the mean over the whole batch
            share = losses.sum() / task.settings.batch_size
            share.backward()
        loss, stop = self.exchange(float(share), task.stop())
        if not np.isfinite(loss):
            raise DataError(
                f"{task.name}: the loss of step {target.step + 1} is {loss}, expected a finite number; the last "
                f"checkpoint is kept. Lower learning_rate (this step's was {rate:.3g}) or check the teacher. "
                f"The batch held {', '.join(target.keys[:4])}, …"
            )
        self.optimizer.step(rate)
        return loss, stop


class Between:
    """What comes between two steps: an evaluation, a checkpoint, and the end where a signal asks for it."""

    def __init__(self, task: Task[Any], network: nn.Layer, optimizer: Momentum, progress: Progress, total: int) -> None:
        self.task, self.network, self.optimizer, self.progress, self.total = task, network, optimizer, progress, total
        self.leads = task.ranks.number == 0
        self.clock = Clock(progress.seconds)
        self.evaluate = Evaluator(network, task.model.pipeline, task.device, lambda: self.go_on(task.stop()))

    def steps(self, stop: int | None, *, again: bool = False) -> None:
        """Measure and save where that is due, and raise Interrupted where a signal came.

        again: a stage that goes on with what was due has on disk what it was before.
        """
        try:
            keep = self.leads and self.progress.due and measured(self.task, self.evaluate, self.progress, self.total)
        except Interrupted:
            self.save()
            raise
        if self.progress.step < self.total:
            if keep or stop or again or save_is_due(self.task.settings, self.progress.step, self.clock):
                self.save()
            self.go_on(stop)

    def go_on(self, stop: int | None) -> None:
        """Raise Interrupted where a signal came: the state is saved before anybody hears of it."""
        if stop:
            where = f"after step {self.progress.step} of {self.total}"
            raise Interrupted(
                f"{self.task.name}: stopped by {signal.Signals(stop).name} {where}; the state is saved", 128 + stop
            )

    def save(self) -> None:
        if self.leads:
            self.task.save(self.state())
            self.clock.saved()

    def state(self) -> State:
        self.progress.seconds = self.clock.seconds()
        return snapshot(self.network, self.optimizer, self.progress)


def ends_epoch(task: Task[Any], step: int, total: int) -> bool:
    """Whether the epoch ends with this step, or the stage."""
    batch, samples = task.settings.batch_size, len(task.data)
    return step == total or step * batch // samples > (step - 1) * batch // samples


def measured(task: Task[Any], evaluate: Evaluator, progress: Progress, total: int) -> bool:
    """Evaluate at the end of an epoch that asks for it; says whether the state is worth keeping on disk now."""
    settings = task.settings
    batch, samples = settings.batch_size, len(task.data)
    epoch, before = progress.step * batch // samples, (progress.step - 1) * batch // samples
    worth = False
    if progress.step == total or epoch // settings.eval_interval > before // settings.eval_interval:
        progress.metrics = evaluate(task.validation, task.reference)
        seen, lines = task.reference, {}
        if seen is not None:
            lines = {"teacher_top1": seen.teacher, "chance_top1": seen.chance}
        task.journal.measured(task.name, progress.step, min(epoch, settings.epochs), progress.metrics, lines)
        if progress.metrics["top1"] > progress.best["top1"]:
            progress.best = {"step": progress.step, "top1": progress.metrics["top1"]}
            worth = True
    if settings.save_interval and epoch // settings.save_interval > before // settings.save_interval:
        progress.kept = [*progress.kept, progress.step]
        worth = True
    progress.due = False
    return worth


def rates(settings: TrainingSettings, samples: int, total: int) -> Callable[[int], float]:
    """The learning rate of each step: linear warm-up, then cosine to zero."""
    warmup = round(settings.warmup_epochs * samples / settings.batch_size)
    return lambda step: cosine_warmup(step, total, warmup, settings.learning_rate)


def snapshot(network: nn.Layer, optimizer: Momentum, progress: Progress) -> State:
    """All that is needed to go on from here. Raises DataError for weights that are not finite: they are not saved."""
    weights = networks.arrays(network)
    broken = [name for name, value in weights.items() if not np.isfinite(value).all()]
    if broken:
        raise DataError(
            f"expected finite weights after step {progress.step}, got NaN or infinity in {broken[0]} and "
            f"{len(broken) - 1} more; the last checkpoint is kept. Lower learning_rate, or set clip_norm"
        )
    return State(progress.step, weights, optimizer.state(), progress.facts())


def save_is_due(settings: TrainingSettings, step: int, clock: Clock) -> bool:
    """Whether a checkpoint inside the epoch is due: by steps where the recipe says so, else by time."""
    if settings.save_steps is not None:
        return step % settings.save_steps == 0
    return clock.since_save() >= SAVE_EVERY_SECONDS


class Clock:
    """Seconds that the stage has taken, over all the runs it took to finish it."""

    def __init__(self, before: float) -> None:
        self.start = self.last_save = time.monotonic()
        self.before = before

    def seconds(self) -> float:
        return round(self.before + time.monotonic() - self.start, 1)

    def since_save(self) -> float:
        return time.monotonic() - self.last_save

    def saved(self) -> None:
        self.last_save = time.monotonic()
