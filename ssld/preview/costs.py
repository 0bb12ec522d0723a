"""What a run will cost in time and disk: reckoned from measured speeds, as a table for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ssld.graph import Node
from ssld.journal import duration
from ssld.overview import Table
from ssld.wording import size

WORTH = 1.1
"""So many times as fast is worth ranks, whose batch norms see a part of each batch."""


@dataclass(frozen=True)
class TeacherSpeed:
    """Of one teacher of a stage, in views per second: on batches that are ready, and labelling from the source."""

    forward: float
    labelling: float


@dataclass(frozen=True)
class Speeds:
    """What was measured for one stage.

    decode: images per second that the loader reads and renders for the student; step: images per second of training
    with soft labels that are there already; batch: at which that was; evaluation: images per second; start: seconds
    before the first of them; shared: images per second of the same training on so many ranks.
    """

    decode: float
    step: float
    batch: int
    evaluation: float
    start: float
    teachers: tuple[TeacherSpeed, ...] = ()
    ranks: int = 1
    shared: float = 0.0

    @property
    def training(self) -> float:
        """Images per second once the batches that were read ahead are used up."""
        return min(self.step, self.decode)


@dataclass(frozen=True)
class LabelWork:
    """What one teacher has still to be asked for a stage.

    training: views; bytes: of their label files; tested: images as at test time, to measure it and compare with it.
    """

    training: int
    bytes: int
    tested: int


@dataclass(frozen=True)
class Cost:
    """One stage that is to run.

    steps: that are left; evaluated: images of one evaluation; labels: for each teacher; store: where they will lie,
    None where none are kept; free: bytes on that disk; speeds: None where the time of the probe was up.
    """

    node: Node
    steps: int
    evaluated: int
    speeds: Speeds | None
    labels: tuple[LabelWork, ...] = ()
    store: Path | None = None
    free: int = 0

    @property
    def asking(self) -> float:
        """Seconds in which the teachers are asked beside an image's training, each once."""
        return sum(1 / teacher.forward for teacher in self.speeds.teachers) if self.speeds else 0.0

    @property
    def labelling(self) -> float:
        """Seconds in which the teachers are asked before the training begins."""
        if self.speeds is None:
            return 0.0
        pairs = zip(self.labels, self.speeds.teachers, strict=True)
        return sum((work.training + work.tested) / teacher.labelling for work, teacher in pairs)

    @property
    def training(self) -> float:
        """Seconds of all steps that are left, and of the evaluations between them."""
        if self.speeds is None:
            return 0.0
        settings = self.node.settings
        image = 1 / self.speeds.training + (0.0 if settings.stored else self.asking)
        return self.steps * settings.batch_size * image + self.evaluations * self.evaluation

    @property
    def evaluations(self) -> int:
        """How many are left: one at the end of every so many epochs, and one at the end."""
        node = self.node
        done = (node.steps - self.steps) * node.settings.batch_size // max(node.samples, 1)
        every, epochs = node.settings.eval_interval, node.settings.epochs
        return epochs // every - done // every + bool(epochs % every)

    @property
    def evaluation(self) -> float:
        """Seconds of one evaluation."""
        return self.speeds.start + self.evaluated / self.speeds.evaluation if self.speeds else 0.0

    @property
    def pays_off(self) -> float | None:
        """Epochs after which labels that are kept have cost less than a teacher that is asked in every step.

        Where it is asked in every step: what each view of a store would take to pay off. None without a teacher.
        """
        if self.speeds is None or not self.speeds.teachers:
            return None
        pairs = zip(self.labels, self.speeds.teachers, strict=True)
        kept = self.node.settings.stored is not None
        views = ((work.training if kept else self.node.samples, teacher) for work, teacher in pairs)
        return sum(count / teacher.labelling for count, teacher in views) / (self.node.samples * self.asking)


def table(costs: Sequence[Cost]) -> Table:
    """Header and rows: speeds, time and bytes of every stage, and of all of them."""
    header = ("stage", "decode", "teacher", "student", "evaluation", "labelling", "training", "labels", "free disk")
    least = "" if all(cost.speeds for cost in costs) else "at least "
    total = (
        *("total", "", "", "", ""),
        _time(sum(cost.labelling for cost in costs)),
        _time(sum(cost.training for cost in costs)),
        size(sum(work.bytes for cost in costs for work in cost.labels)),
        "",
        f"{least}{_time(sum(cost.labelling + cost.training for cost in costs))} in all",
    )
    return (*header, "the store pays off after"), [*map(_row, costs), total]


def advice(costs: Sequence[Cost]) -> str:
    """What more ranks would do to the training of the stages on which they were tried; nothing where none was."""
    tried = [(cost, cost.speeds) for cost in costs if cost.speeds and cost.speeds.shared]
    if not tried:
        return ""
    images = [(cost.steps * cost.node.settings.batch_size, speeds) for cost, speeds in tried]
    alone = sum(count / speeds.step for count, speeds in images)
    together = sum(count / speeds.shared for count, speeds in images)
    ranks = tried[0][1].ranks
    what = f"--nproc {ranks} would take {_time(together)} for the steps that take {_time(alone)} on one rank"
    return f"{what}: worth it" if together < alone / WORTH else f"{what}: stay with one"


def _row(cost: Cost) -> tuple[str, ...]:
    name, speeds = f"{cost.node.number} {cost.node.name}", cost.speeds
    if speeds is None:
        return name, "not measured: the time was up", *[""] * 8
    wanted = cost.node.settings.batch_size
    smaller = f", batch {speeds.batch} of {wanted}" if speeds.batch < wanted else ""
    return (
        name,
        f"{_rate(speeds.decode)} img/s",
        ", ".join(f"{_rate(teacher.forward)} views/s" for teacher in speeds.teachers),
        f"{_rate(speeds.step)} img/s{smaller}" + _on_ranks(speeds),
        f"{_rate(speeds.evaluation)} img/s, {cost.evaluation:.1f} s each",
        _time(cost.labelling) if cost.labels else "",
        _time(cost.training),
        size(sum(work.bytes for work in cost.labels)) if cost.store else "",
        f"{size(cost.free)} at {cost.store}" if cost.store else "",
        _pays_off(cost),
    )


def _on_ranks(speeds: Speeds) -> str:
    return f", {_rate(speeds.shared)} on {speeds.ranks} ranks" if speeds.shared else ""


def _pays_off(cost: Cost) -> str:
    after = cost.pays_off
    if after is None:
        return ""
    if cost.node.settings.stored is None:
        return f"{after:.1f} epochs for each view"
    return f"{after:.1f} epochs, of {cost.node.settings.epochs}"


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else duration(seconds)


def _rate(per_second: float) -> str:
    return f"{per_second:.3g}" if per_second < 100 else f"{per_second:.0f}"
