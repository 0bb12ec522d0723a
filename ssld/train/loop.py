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

    def facts(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "best": self.best, "kept": self.kept, "metrics": self.metrics}

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

    Raises Interrupted after a save when a signal came; DataError when the loss is not finite: the step is not taken,
    and the last checkpoint stands; RankError when a rank is gone.
    """
    settings = task.settings
    assert isinstance(settings, TrainingSettings)
    total = settings.total_steps(len(task.data))
    progress = Progress.after(task.resume)
    optimizer = Momentum(network, settings.momentum, settings.weight_decay, settings.clip_norm)
    if task.resume is not None:
        optimizer.restore(task.resume.optimizer)
    descend = Descent(task, network, objective, optimizer, Exchange(network, task.ranks))
    evaluate = Evaluator(network, task.model.pipeline, task.device)
    leads = task.ranks.number == 0
    rate = rates(settings, len(task.data), total)
    damage = Damage(task.damage_budget, task.journal.met)
    clock = Clock(progress.seconds)
    with (
        task.journal.stage(task.name, total, len(task.data), settings.batch_size, progress.step) as log,
        closing(feed(task, pipeline or task.train, progress.step, total, damage)) as targets,
    ):
        while progress.step < total:
            waited = time.monotonic()
            target = next(targets)
            waited = time.monotonic() - waited
            prepare(network)
            loss, stop = descend(target, rate(progress.step))
            progress.step += 1
            log.step(progress.step, loss, rate(progress.step - 1), waited)
            due = leads and measure_if_due(task, evaluate, progress, total)
            progress.seconds = clock.seconds()
            save = due or stop or save_is_due(settings, progress.step, clock)
            if leads and save and progress.step < total:
                task.save(snapshot(network, optimizer, progress))
                clock.saved()
            if stop and progress.step < total:
                raise Interrupted(
                    f"{task.name}: stopped by {signal.Signals(stop).name} after step {progress.step} of {total}; "
                    f"the state is saved",
                    128 + stop,
                )
    progress.seconds = clock.seconds()
    return Outcome(snapshot(network, optimizer, progress), progress.metrics)


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


def measure_if_due(task: Task[Any], evaluate: Evaluator, progress: Progress, total: int) -> bool:
    """Evaluate at the end of an epoch that asks for it; says whether the state is worth keeping on disk now."""
    settings = task.settings
    batch, samples = settings.batch_size, len(task.data)
    epoch, before = progress.step * batch // samples, (progress.step - 1) * batch // samples
    if epoch == before and progress.step < total:
        return False
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
