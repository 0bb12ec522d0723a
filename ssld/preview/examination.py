"""Every teacher of a recipe, asked about validation images before anything is spent: how good, how sure, how fast."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ssld.contracts import Teacher, TeacherSpec
from ssld.data.loader import Batch, Damage, Replay, view_batches
from ssld.data.samples import Samples, spread
from ssld.data.transforms import Pipeline
from ssld.datasets import COMPARED
from ssld.errors import SsldError
from ssld.graph import Node, make_plan
from ssld.journal import counting
from ssld.members import Members
from ssld.overview import Table
from ssld.recipe import read_recipe
from ssld.rundir import Options, RunDirectory
from ssld.settings import TeacherSetting
from ssld.teaching.appraisal import Appraisal, appraise
from ssld.teaching.asking import Member, Quality, ask, expect_better_than_chance
from ssld.teaching.classmap import Mapped
from ssld.teaching.suspicion import Trial, Way, shown, try_ways, verdict, way_of

SECONDS = 60.0
"""For each teacher."""
BATCH = 16
"""Images asked about at a time: a teacher that takes a second for each must not outrun its time by a minute."""
FEWEST, MOST = 24, 200
"""Images on which another way of showing them is tried."""
EXPECTED_TRIALS = 20
OWN = ("network", "stage", "onnx")
"""The ways of getting a teacher that come with ssld, for which the engine normalizes."""


@dataclass
class Listening:
    """A teacher, and beside its answers the time they take and the mass that its class map drops."""

    teacher: Teacher
    seconds: float = 0.0
    dropped: list[np.ndarray] = field(default_factory=list)

    @property
    def spec(self) -> TeacherSpec:
        return self.teacher.spec

    @property
    def unmapped(self) -> float | None:
        """The mean probability of classes that go to none of the data's; None without a class map."""
        return float(np.concatenate(self.dropped).mean()) if self.dropped else None

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Logits, as the teacher's own."""
        began = time.monotonic()
        mapped = self.teacher if isinstance(self.teacher, Mapped) else None
        logits = (mapped.teacher if mapped else self.teacher).predict(images)
        self.seconds += time.monotonic() - began
        if mapped is None:
            return logits
        self.dropped.append(mapped.class_map.unmapped(logits))
        return mapped.class_map.logits(logits)


@dataclass(frozen=True)
class Examined:
    """A teacher, and what was found.

    unmapped: the mean probability of classes that its class map drops, None without one; images_per_second: of the
    teacher alone, on batches that are ready; configured, trials: how it was shown images, and in which other ways.
    """

    who: str
    engine: str
    appraisal: Appraisal
    unmapped: float | None
    images_per_second: float
    configured: Way | None = None
    trials: tuple[Trial, ...] = ()

    @property
    def finding(self) -> str:
        """What to think of a poor teacher, "" of a good one or one that could not be tried in other ways."""
        if self.configured is None or not self.trials:
            return ""
        return f"{self.who}: {verdict(self.appraisal.quality, list(self.trials), self.configured)}"

    def table(self) -> Table:
        """Header and rows: how well it did when images were shown to it in other ways."""
        rows: list[tuple[str, ...]] = [
            (", ".join(trial.way.differences(self.configured)[0]), *_accuracy(trial.quality))
            for trial in self.trials
            if self.configured
        ]
        return ("shown with", "top-1", "95 %", "images"), rows


@dataclass
class Report:
    """What `ssld check` says. faults: of teachers that cannot be asked, or are no better than chance."""

    examined: list[Examined] = field(default_factory=list)
    faults: list[SsldError] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def table(self) -> Table:
        """Header and rows: how good each teacher is."""
        header = ("teacher", "top-1", "95 %", "chance", "top-5", "entropy", "of log C", "calibration error")
        return (*header, "unmapped", "images", "images/s", "engine"), [_row(found) for found in self.examined]

    def raise_faults(self) -> None:
        """Raise the gravest fault, with the text of all."""
        if self.faults:
            gravest = max(self.faults, key=lambda fault: fault.exit_code)
            raise type(gravest)("\n  ".join(map(str, self.faults)))


def _row(found: Examined) -> tuple[str, ...]:
    appraisal = found.appraisal
    top1, interval, images = _accuracy(appraisal.quality)
    return (
        found.who,
        top1,
        interval,
        f"{appraisal.quality.chance:.4f}",
        f"{appraisal.top5:.4f}",
        f"{appraisal.entropy:.3f} nats",
        f"{appraisal.entropy_share:.1%}",
        f"{appraisal.calibration:.4f}",
        "" if found.unmapped is None else f"{found.unmapped:.4f}",
        images,
        f"{found.images_per_second:.0f}" if found.images_per_second >= 10 else f"{found.images_per_second:.2g}",
        found.engine,
    )


def _accuracy(quality: Quality) -> tuple[str, str, str]:
    return f"{quality.accuracy:.4f}", f"{quality.low:.4f} to {quality.high:.4f}", str(quality.images)


def examine_all(
    recipe: str | Path,
    out: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    device: str = "cpu",
    limit: int | None = None,
) -> Report:
    """Ask every teacher of a recipe, each once; nothing is written but the index cache.

    out: the run that has finished the stages which teach, runs/NAME when left out.
    """
    read = read_recipe(recipe, overrides)
    directory = RunDirectory.of(read.name, out)
    report = Report()
    members = Members(directory, make_plan(read, limit=limit), Options(device, limit), report.remarks.append)
    seen: set[str] = set()
    for node, setting in _teachers(members):
        try:
            member, pipeline, key = _loaded(members, node, setting)
            if key not in seen:
                seen.add(key)
                found = Examination(members, node, setting, member, pipeline).run()
                report.examined.append(found)
                expect_better_than_chance(found.appraisal.quality, found.who)
        except SsldError as fault:
            if str(fault) not in map(str, report.faults):
                report.faults.append(fault)
    return report


def _teachers(members: Members) -> Iterator[tuple[Node, TeacherSetting]]:
    return ((node, setting) for node in members.plan.nodes for setting in node.settings.taught_by)


def _loaded(members: Members, node: Node, setting: TeacherSetting) -> tuple[Member, Pipeline, str]:
    """One of the teachers of a stage, how it is shown an image at test time, and a hash of the two."""
    member = members.member(setting)
    [(store, _)] = members.tested_stores(node, (member,))
    return member, store.description.pipeline, store.description.fingerprint


@dataclass(frozen=True)
class Examination:
    """One teacher of a stage, and the time at which it began to be asked."""

    members: Members
    node: Node
    setting: TeacherSetting
    member: Member
    pipeline: Pipeline
    began: float = field(default_factory=time.monotonic)

    def run(self) -> Examined:
        """Ask about validation images until the time is up, half of it where the teacher does poorly."""
        listening = Listening(self.member.teacher)
        appraisal = self._judged(*self._answers(listening))
        spec, count = listening.spec, appraisal.quality.images
        speed = count / max(listening.seconds, 1e-9)
        found = Examined(self.member.who, spec.engine, appraisal, listening.unmapped, speed)
        if not appraisal.poor or self.setting.way not in OWN:
            return found
        configured = way_of(spec)
        fewer = self._affordable(speed, count)
        trials = try_ways(
            configured,
            appraisal.quality,
            lambda way: self._tried(configured, way, fewer),
            self._time_is_up,
            self.setting.way == "network",
        )
        return replace(found, configured=configured, trials=tuple(trials))

    @property
    def _validation(self) -> Samples:
        return self.members.plan.data.validation

    def _seconds(self) -> float:
        return time.monotonic() - self.began

    def _time_is_up(self) -> bool:
        return self._seconds() >= SECONDS

    def _is_late(self) -> bool:
        """Whether the rest of the time is for other ways of showing the images, should they be needed."""
        return self._seconds() >= SECONDS / 2

    @staticmethod
    def _judged(logits: Sequence[np.ndarray], labels: Sequence[np.ndarray]) -> Appraisal:
        return appraise(np.concatenate(logits), np.concatenate(labels))

    def _answers(self, teacher: Listening) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Logits [B, classes] and true classes [B], batch by batch."""
        logits: list[np.ndarray] = []
        labels: list[np.ndarray] = []
        total = min(COMPARED, len(self._validation))
        with closing(self._batches(self.pipeline, total)) as batches, counting(self.member.who) as progress:
            for batch in batches:
                if not logits:
                    # a teacher may load when it is first asked, which is no part of its speed
                    self._ask(teacher.teacher, batch)
                logits.append(self._ask(teacher, batch))
                labels.append(self._labels(batch))
                progress(sum(map(len, labels)), total)
                if self._time_is_up() or (self._is_late() and self._judged(logits, labels).poor):
                    break
        return logits, labels

    def _affordable(self, speed: float, most: int) -> int:
        """So many images can be shown in every other way in the time that is left."""
        left = (SECONDS - self._seconds()) * speed / EXPECTED_TRIALS
        return min(most, MOST, max(FEWEST, int(left)))

    def _tried(self, configured: Way, way: Way, count: int) -> Quality:
        """How good the teacher is on `count` images that it is shown in another way."""
        member, pipeline = self.member, self.pipeline
        if way.size != configured.size:
            member, pipeline, _ = self._resized(way.size / configured.size, way.size)
        teacher = shown(member.teacher, way)
        with closing(self._batches(pipeline, count)) as batches:
            answers = [(self._ask(teacher, batch), self._labels(batch)) for batch in batches]
        return self._judged(*zip(*answers, strict=True)).quality

    def _resized(self, factor: float, size: int) -> tuple[Member, Pipeline, str]:
        """The same network with another input size; it is not kept, since each takes its memory."""
        short = self.setting.options.get("resize_short")
        keys = {"resolution": size, **({"resize_short": round(short * factor)} if short else {})}
        return _loaded(replace(self.members, loaded={}), self.node, self.setting.model_copy(update=keys))

    def _batches(self, pipeline: Pipeline, count: int) -> Generator[Batch, None, None]:
        """The first `count` validation images of an order that goes round the classes, wherever one stops."""
        samples = self._validation
        assert samples.labels is not None, "validation sets are opened with labels"
        chosen = spread(samples.labels, "limited")[:count].tolist()
        return view_batches(samples, pipeline, Replay(0, 1), batch_size=BATCH, indices=chosen, damage=Damage(0))

    def _ask(self, teacher: Teacher, batch: Batch) -> np.ndarray:
        names = [self._validation.where(int(index)) for index in batch.indices]
        return ask(teacher, batch.images[0], len(self.members.plan.data.classes), self.member.who, names)

    @staticmethod
    def _labels(batch: Batch) -> np.ndarray:
        assert batch.labels is not None, "validation sets are opened with labels"
        return batch.labels
