"""How fast data, teachers and students are on this machine, found out by doing a little of everything."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import cycle, repeat
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ssld import plugins, threads
from ssld.contracts import Ranks, Task
from ssld.crew import PARTING, Crew
from ssld.data.loader import Batch, Damage, Replay, training_batches, view_batches
from ssld.data.transforms import normalize
from ssld.engine import overview
from ssld.errors import RankError
from ssld.files import scratch
from ssld.graph import Node, make_plan, model, pipeline
from ssld.journal import Journal
from ssld.members import Members, who
from ssld.overview import Overview
from ssld.preview.costs import Cost, LabelWork, Speeds, TeacherSpeed
from ssld.preview.trial import SMALLEST, endless, fitting, paced_steps, step_speed, trial
from ssld.recipe import dump, read_recipe
from ssld.rundir import Options, RunDirectory
from ssld.settings import TeacherSetting
from ssld.teaching.asking import Member, ask
from ssld.train import networks
from ssld.train.frozen import COMPARED, Frozen

SECONDS = 38.0
"""Of all measurements on one rank; what is begun is finished, and paddle loads first."""
ON_RANKS = 12.0
"""Seconds in which ranks start and are measured; with all that, within a minute together."""
LONGEST = 3.0
"""Seconds of one measurement: more would make it little better."""
BATCH = 64
"""Images that a network which only answers is shown at a time, as in labelling and evaluation."""
MOST_RANKS, ON_A_RANK = 8, 8
"""Ranks that are tried, and the images of a batch that each must have: with fewer, what all do is most of a step."""
READ = 16
"""Images in a batch where only reading is measured."""


def measure(
    recipe: str | Path,
    out: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    device: str = "cpu",
    limit: int | None = None,
) -> list[Cost]:
    """What each stage that is to run will cost, by a probe of at most a minute; in the order of the plan.

    Nothing is written but the index cache, and files in a temporary directory.
    """
    read = read_recipe(recipe, overrides)
    plan = make_plan(read, limit=limit)
    found = overview(RunDirectory.of(read.name, out).path, plan)
    networks.use_device(device)
    journal = Journal(None, Console(quiet=True))
    try:
        members = Members(RunDirectory(found.directory), plan, Options(device, limit), journal.note)
        return Probe(members, found, journal).costs()
    finally:
        journal.close()


def pace(counts: Iterator[int], seconds: float) -> float:
    """Items per second of an endless stream of counts; the first is not counted, since it may load something."""
    next(counts)
    began, done = time.monotonic(), 0
    for count in counts:
        done += count
        if time.monotonic() - began >= seconds:
            break
    return done / (time.monotonic() - began)


def paced(batches: Generator[Batch, None, None], work: Callable[[Batch], object], seconds: float) -> float:
    """Images per second of batches that are read, and worked on."""

    def counts() -> Iterator[int]:
        for batch in batches:
            work(batch)
            yield len(batch.indices)

    with closing(batches):
        return pace(counts(), seconds)


def batch_for(answer: Callable[[int], object], seconds: float) -> int:
    """At how many images a time to measure a network, loaded already, that answers about `answer(n)` of them."""
    began = time.monotonic()
    answer(1)
    return fitting(seconds, time.monotonic() - began, BATCH)


@dataclass
class Budget:
    """The time of a probe, in even shares for the measurements that are left."""

    measurements: int
    seconds: float
    began: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.began)

    def share(self) -> float:
        """Seconds for the next measurement."""
        share = min(LONGEST, max(0.0, self.left) / max(self.measurements, 1))
        self.measurements -= 1
        return share


class Probe:
    """Measures every stage of a plan that is to run."""

    def __init__(self, members: Members, found: Overview, journal: Journal) -> None:
        self.members, self.plan, self.journal, self.forecasts = members, members.plan, journal, found.labels
        self.todo = [(node, status) for node, status in found.stages if status.kind != "done"]
        self.waiting = {node.name for node, _ in self.todo}
        self.budget = Budget(sum(3 + 2 * len(node.settings.taught_by) for node, _ in self.todo), SECONDS)
        self.fresh: dict[str, Member] = {}
        self.measured: dict[tuple[Any, ...], TeacherSpeed] = {}
        self.counted: set[tuple[Any, ...]] = set()

    def costs(self) -> list[Cost]:
        """One for each stage that is to run, in order."""
        costs = []
        for node, status in self.todo:
            reached = status.checkpoint.step if status.kind == "resume" and status.checkpoint else 0
            speeds = self._speeds(node) if self.budget.left > 0 else None
            taught = bool(node.settings.taught_by)
            evaluated = len(self.plan.data.validation) + taught * len(self.plan.data.compared)
            cost = Cost(node, node.steps - reached, evaluated, speeds)
            if node.settings.stored:
                store = self.members.run.labels(node)
                cost = replace(cost, store=store, free=free_bytes(store))
            costs.append(replace(cost, labels=self._label_work(node)))
        return self._on_ranks(costs)

    def _on_ranks(self, costs: list[Cost]) -> list[Cost]:
        """The same, with how fast the training is on several ranks: one for each core, up to MOST_RANKS."""
        batches = [cost.node.settings.batch_size for cost in costs if cost.speeds]
        count = min(threads.cores(), MOST_RANKS, max(batches, default=0) // ON_A_RANK)
        if count < 2 or self.members.options.device != "cpu":
            return costs
        self.budget = Budget(len(batches), ON_RANKS)
        with scratch() as folder:
            run = RunDirectory(folder)
            run.begin(dump(self.plan.recipe), replace(self.members.options, nproc=count))
            try:
                with threads.shared_by(count), Crew(run.path, count, self.journal.note) as crew:
                    return [self._shared(cost, crew) for cost in costs]
            except RankError:
                # a rank may want more memory than there is; what one rank takes is known
                return costs

    def _shared(self, cost: Cost, crew: Crew) -> Cost:
        node, speeds = cost.node, cost.speeds
        if speeds is None or node.settings.batch_size < SMALLEST * crew.count:
            return cost
        batch = max(speeds.batch, SMALLEST * crew.count)
        crew.tell(attempt=node.name, batch=batch)
        speed = paced_steps(node.kind.run, endless(self._trial(node, crew.ranks), batch), self.budget.share())
        # a kind that trains without the loop does not stop with rank 0
        crew.expect("attempted", PARTING)
        return replace(cost, speeds=replace(speeds, shared=speed, ranks=crew.count))

    def _speeds(self, node: Node) -> Speeds:
        decode = self._decode(node, self.budget.share())
        step, batch = step_speed(node.kind.run, self._trial(node, Ranks()), self.budget.share())
        evaluation, start = self._evaluation(node, self.budget.share())
        teachers = tuple(self._teacher(node, setting) for setting in node.settings.taught_by)
        return Speeds(decode, step, batch, evaluation, start, teachers)

    def _decode(self, node: Node, seconds: float) -> float:
        """Images per second."""
        train = pipeline(self.plan.recipe, "train", node.settings.resolution)
        samples, damage = self.plan.data.named(node.settings.data), self._damage(node)
        batches = training_batches(samples, (train,), batch_size=READ, seed=0, damage=damage)
        return paced(batches, lambda batch: None, seconds)

    def _evaluation(self, node: Node, seconds: float) -> tuple[float, float]:
        """Images per second, and seconds before the first of them."""
        samples, shown = self.plan.data.validation, model(self.plan, node).pipeline
        blank = np.zeros((COMPARED, 3, shown.resolution, shown.resolution), np.float32)
        began = time.monotonic()
        frozen = Frozen(self._network(node), shown.resolution, device=self.members.options.device)
        frozen(blank)
        start = time.monotonic() - began
        batches = view_batches(
            samples,
            shown,
            Replay(0, 1),
            batch_size=batch_for(lambda images: frozen(blank[:images]), seconds),
            indices=cycle(range(len(samples))),
            damage=Damage(0),
        )
        return paced(batches, lambda batch: frozen(normalize(batch.images[0], shown.mean, shown.std)), seconds), start

    def _teacher(self, node: Node, setting: TeacherSetting) -> TeacherSpeed:
        """Measured once for all stages that show the same images to it."""
        member = self._member(setting)
        seconds = self.budget.share(), self.budget.share()
        stored = node.settings.stored
        replay = Replay(stored.seed, stored.views) if stored else Replay(0, 1)
        key = (repr(setting), member.teacher.spec.size, node.settings.data, replay)
        if key not in self.measured:
            batch, forward = self._forward(member, seconds[0])
            labelling = self._labelling(node, member, replay, batch, seconds[1])
            # a busy machine may slow down the one measurement and not the other
            self.measured[key] = TeacherSpeed(forward, min(labelling, forward))
        return self.measured[key]

    def _forward(self, member: Member, seconds: float) -> tuple[int, float]:
        """A batch that fits into the time, and the views per second of the teacher alone."""
        side = member.teacher.spec.size
        pixels = np.random.default_rng(0).integers(0, 256, (BATCH, side, side, 3), np.uint8)

        def answer(images: int) -> int:
            ask(member.teacher, pixels[:images], len(self.plan.data.classes), member.who, ["a measurement"])
            return images

        answer(1)
        batch = batch_for(answer, seconds)
        return batch, pace(map(answer, repeat(batch)), seconds)

    def _labelling(self, node: Node, member: Member, replay: Replay, batch: int, seconds: float) -> float:
        """Views per second, reading and rendering included."""
        samples, classes = self.plan.data.named(node.settings.data), len(self.plan.data.classes)
        shown = pipeline(self.plan.recipe, "train", node.settings.resolution).at(member.teacher.spec.size)
        batches = view_batches(
            samples,
            shown,
            replay,
            batch_size=batch,
            indices=cycle(range(len(samples))),
            damage=self._damage(node),
        )
        return paced(
            batches, lambda views: ask(member.teacher, views.images[0], classes, member.who, views.keys), seconds
        )

    def _member(self, setting: TeacherSetting) -> Member:
        """The teacher; of a stage that is still to be trained, the same network with fresh weights."""
        if setting.stage not in self.waiting:
            return self.members.member(setting)
        key = repr(setting)
        if key not in self.fresh:
            self.fresh[key] = self._fresh(setting)
        return self.fresh[key]

    def _fresh(self, setting: TeacherSetting) -> Member:
        first = self.plan.node(str(setting.stage))
        supplied = {
            "model": model(self.plan, first),
            "weights": networks.arrays(self._network(first)),
            "device": self.members.options.device,
            "precision": setting.precision,
        }
        teacher = plugins.call("teachers", "stage", {"stage": first.name}, supplied)
        return Member(who(setting), teacher, setting.weight)

    def _label_work(self, node: Node) -> tuple[LabelWork, ...]:
        """What of each teacher's labels is not there yet, and will not be made by an earlier stage of the plan."""
        forecasts = self.forecasts.get(node.name) or repeat(None)
        return tuple(
            LabelWork(
                forecast.passes if forecast else 0, forecast.bytes if forecast else 0, self._tested(node, setting)
            )
            for setting, forecast in zip(node.settings.taught_by, forecasts, strict=False)
        )

    def _tested(self, node: Node, setting: TeacherSetting) -> int:
        """Images about which a teacher is asked at test time: to measure it, and to compare the student with it."""
        data = self.plan.data
        [(store, _)] = self.members.tested_stores(node, (self._member(setting),))
        missing = 0
        for samples in (data.checked, data.compared):
            key = (store.directory, samples.identity)
            if key not in self.counted:
                self.counted.add(key)
                missing += int(samples.shard_sizes[store.missing(samples)].sum())
        return missing

    def _trial(self, node: Node, ranks: Ranks) -> Task[Any]:
        return trial(self.plan, node, self.members.options.device, self.journal, ranks)

    def _damage(self, node: Node) -> Damage:
        return Damage(self.plan.data.damage_budget(node.settings.data))

    def _network(self, node: Node) -> Any:
        student = node.settings.student
        return networks.build(student.name, student.options, len(self.plan.data.classes))


def free_bytes(place: Path) -> int:
    """Free space where a directory is, or would be made."""
    there = next(path for path in (place.absolute(), *place.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free
