"""Walks a plan: skips what is whole, runs what is not, and when it stops says how to go on."""

from __future__ import annotations

import shlex
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ssld import checkpoint, plugins, teaching
from ssld.contracts import Arrays, Model, Task, Teacher
from ssld.errors import ChangedError, RecipeError, SsldError, TeacherError
from ssld.files import RunLock, sweep, writable
from ssld.graph import Node, Plan, make_plan, pipeline
from ssld.journal import Journal, duration
from ssld.overview import Overview
from ssld.recipe import Recipe, differences, dump, read_recipe
from ssld.rundir import Options, RunDirectory, Status, environment, result_of, state_of
from ssld.seeds import derive


def run(
    recipe: str | Path | Recipe,
    out: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    device: str = "cpu",
    limit: int | None = None,
    rerun: bool = False,
    trust_teacher: bool = False,
) -> Overview:
    """Do what the recipe says, or go on where an earlier run of it stopped.

    out: the run directory, runs/NAME when left out; overrides: "key.path=value"; limit: a smoke run on so many images
    of each set. Raises ChangedError when the directory holds results of another recipe and rerun is not set.
    """
    read = recipe if isinstance(recipe, Recipe) else read_recipe(recipe, overrides)
    directory = Path(out) if out is not None else Path("runs") / read.name
    plan = make_plan(read, limit=limit)
    return Walk(directory, plan, Options(device, limit, trust_teacher)).walk(rerun=rerun)


def resume(out: str | Path | None = None, *, stage: str | int | None = None) -> Overview:
    """Go on exactly where a run stopped; or, with a stage's number or name, start again from there.

    out: the run directory, the newest under runs/ when left out. Raises RecipeError when there is nothing to resume.
    """
    directory = existing_run(out)
    recipe, options = RunDirectory(directory).recorded()
    plan = make_plan(recipe, limit=options.limit)
    first = plan.find(str(stage)) if stage is not None else None
    return Walk(directory, plan, options).walk(first=first)


def plan(
    recipe: str | Path | Recipe,
    out: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    limit: int | None = None,
) -> Overview:
    """What `run` would do with the same arguments, and why; writes only the index cache."""
    read = recipe if isinstance(recipe, Recipe) else read_recipe(recipe, overrides)
    return overview(Path(out) if out is not None else Path("runs") / read.name, make_plan(read, limit=limit))


def status(out: str | Path | None = None) -> Overview:
    """Where a run stands: the newest under runs/ when `out` is left out."""
    directory = existing_run(out)
    recipe, options = RunDirectory(directory).recorded()
    return overview(directory, make_plan(recipe, limit=options.limit))


def overview(directory: Path, plan: Plan) -> Overview:
    """The plan beside what the directory holds."""
    remarks: list[str] = []
    stages = tuple((node, RunDirectory(directory).status(node, remarks.append)) for node in plan.nodes)
    return Overview(directory, stages, tuple(remarks))


def existing_run(out: str | Path | None) -> Path:
    """The run directory that is meant. Raises RecipeError when there is none."""
    directory = Path(out) if out is not None else newest_run(Path("runs"))
    if not RunDirectory(directory).exists():
        raise RecipeError(f"{directory}: expected a run directory, got none; start one with ssld run RECIPE")
    return directory


def newest_run(root: Path) -> Path:
    """The run under root that was worked on last."""
    found = [path.parent for path in root.glob("*/recipe.yaml")]
    if not found:
        raise RecipeError(f"{root}: expected a run, got none; start one with ssld run RECIPE, or give --out DIR")
    return max(found, key=lambda path: max(entry.stat().st_mtime for entry in path.iterdir()))


class Walk:
    """One attempt to finish a plan in a directory."""

    def __init__(self, directory: Path, plan: Plan, options: Options) -> None:
        self.run = RunDirectory(directory)
        self.plan = plan
        self.options = options
        self.signal: int | None = None

    def walk(self, *, rerun: bool = False, first: Node | None = None) -> Overview:
        """Run every stage that is not done; `first` and what follows it starts again."""
        writable(self.run.path)
        with RunLock(self.run.path):
            sweep(self.run.path)
            journal = Journal(self.run.path)
            try:
                return self._walk(journal, rerun, first)
            except SsldError as error:
                if (self.run.path / "recipe.yaml").is_file() and not isinstance(error, ChangedError):
                    error.add_note(f"continue: ssld resume --out {shlex.quote(str(self.run.path))}")
                raise
            finally:
                journal.close()

    def _walk(self, journal: Journal, rerun: bool, first: Node | None) -> Overview:
        if first is not None:
            self._restart(first, journal)
        before = self._statuses(journal)
        changed = [node for node, status in before if status.kind == "changed"]
        if changed:
            self._set_changed_aside(changed, before, rerun, journal)
        todo = [node for node, status in before if status.kind != "done"]
        if todo:
            self.run.begin(dump(self.plan.recipe), self.options)
            journal.record("start", recipe=dump(self.plan.recipe), environment=environment())
            with self._signals():
                self._preflight(todo, journal)
                for node in todo:
                    self._run_stage(node, journal)
        return Overview(self.run.path, tuple(self._statuses(journal)), fresh=bool(todo))

    def _statuses(self, journal: Journal) -> list[tuple[Node, Status]]:
        return [(node, self.run.status(node, journal.note)) for node in self.plan.nodes]

    def _restart(self, first: Node, journal: Journal) -> None:
        later = list(self.plan.nodes[self.plan.nodes.index(first) :])
        spent = sum(status.seconds for node, status in self._statuses(journal) if node in later)
        target, count = self.run.set_aside(later)
        if count:
            journal.note(
                f"starting again from stage {first.number} {first.name}: {count} results, {duration(spent)} of work, "
                f"are set aside in {target}"
            )

    def _set_changed_aside(
        self, changed: list[Node], statuses: list[tuple[Node, Status]], rerun: bool, journal: Journal
    ) -> None:
        why = self._what_changed(statuses)
        if not rerun:
            raise ChangedError(
                f"{self.run.path} holds results of another recipe or other data:\n  "
                + "\n  ".join(why)
                + f"\nrun with --rerun to do {', '.join(node.name for node in changed)} again (the old results move to "
                f"{self.run.path}/attempt.N), or with another --out"
            )
        target, count = self.run.set_aside(changed)
        journal.note(f"{count} results are set aside in {target}: {'; '.join(why)}")

    def _what_changed(self, statuses: list[tuple[Node, Status]]) -> list[str]:
        """The recipe's own differences where there are any, else those of the data and files behind it."""
        recorded, options = self.run.recorded()
        lines = differences(recorded.tree.value, self.plan.recipe.tree.value)
        if options.limit != self.options.limit:
            lines.append(f"--limit: {options.limit} → {self.options.limit}")
        return lines or [f"{node.name}: {status.why}" for node, status in statuses if status.kind == "changed"]

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C set a flag that the training loop reads after each step."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def remember(number: int, frame: object) -> None:
            self.signal = number

        old = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _preflight(self, todo: list[Node], journal: Journal) -> None:
        """Before anything is spent: the device, every network, every teacher that is no stage of this run."""
        from ssld.train import networks

        networks.use_device(self.options.device)
        for node in todo:
            networks.build(node.settings.student.name, node.settings.student.options, len(self.plan.data.classes))
            setting = getattr(node.settings, "teacher", None)
            if setting is not None and setting.stage is None:
                self._teacher(node, journal)

    def _run_stage(self, node: Node, journal: Journal) -> None:
        status = self.run.status(node, journal.note)
        journal.place = f"{node.number} {node.name}"
        position = f"stage {self.plan.nodes.index(node) + 1} of {len(self.plan.nodes)}"
        going_on = f", going on after step {status.checkpoint.step}" if status.kind == "resume" else ""
        journal.note(
            f"[{journal.place}] {position}: {node.settings.kind} {node.settings.student.name}, {node.samples} images, "
            f"{node.steps} steps at {node.settings.resolution} px, lr {node.settings.learning_rate:.3g}{going_on}"
        )
        if status.kind == "resume":
            self._compare_environment(status, journal)
        task = self._task(node, status, journal)
        outcome = node.kind.run(task)
        self.run.save(node, task.model, outcome.state, finished=True)
        journal.record("finished", stage=node.name, **outcome.metrics)

    def _compare_environment(self, status: Status, journal: Journal) -> None:
        for line in differences(status.checkpoint.state["environment"], environment()):
            journal.note(f"warning: the same weights as in an unbroken run are not promised, since {line}")

    def _task(self, node: Node, status: Status, journal: Journal) -> Task:
        settings, recipe = node.settings, self.plan.recipe
        evaluate = pipeline(recipe, "eval", settings.resolution)
        model = Model(settings.student.name, settings.student.options, self.plan.data.classes, evaluate)
        return Task(
            name=node.name,
            model=model,
            settings=settings,
            seed=derive(recipe.seed, node.name),
            device=self.options.device,
            data=self.plan.data.named(settings.data),
            validation=self.plan.data.validation,
            test=self.plan.data.test if node is self.plan.nodes[-1] else None,
            train=pipeline(recipe, "train", settings.resolution),
            initial=self._initial(node, journal),
            teacher=self._teacher(node, journal) if getattr(settings, "teacher", None) else None,
            resume=state_of(status.checkpoint) if status.kind == "resume" else None,
            damage_budget=self.plan.data.damage_budget(settings.data),
            save=lambda state: self.run.save(node, model, state, finished=False),
            stop=lambda: self.signal,
            journal=journal,
        )

    def _finished(self, name: str, journal: Journal) -> tuple[Model, Arrays]:
        found = checkpoint.latest(self.run.stage(self.plan.node(name)), journal.note)
        assert found is not None, "a stage runs after those it reads"
        return result_of(found)

    def _initial(self, node: Node, journal: Journal) -> Arrays | None:
        start = node.settings.start
        if start is None:
            return None
        return (
            checkpoint.read_weights(Path(start))
            if start.endswith(".safetensors")
            else self._finished(start, journal)[1]
        )

    def _teacher(self, node: Node, journal: Journal) -> Teacher:
        """Load the teacher of a stage and check that it can be learned from."""
        setting, data = node.settings.teacher, self.plan.data
        supplied: dict[str, Any] = {
            "classes": data.classes,
            "resolution": node.settings.resolution,
            "device": self.options.device,
        }
        if setting.stage is not None:
            model, weights = self._finished(setting.stage, journal)
            name, options = "stage", {"stage": setting.stage}
            supplied |= {"model": model, "weights": weights}
        elif setting.network is not None:
            name, options = "network", {"network": setting.network, **setting.options}
        else:
            name, options = setting.plugin, setting.options
        teacher = plugins.call("teachers", name, options, supplied)
        who = f"the teacher {setting.stage or setting.network or setting.plugin} of {node.name}"
        evaluate = pipeline(self.plan.recipe, "eval", node.settings.resolution)
        quality = teaching.check(teacher, data.validation, evaluate, data.classes, who)
        journal.record("teacher", stage=node.name, top1=quality.accuracy, low=quality.low, high=quality.high)
        chance = 1 / len(data.classes)
        if quality.low <= chance and not self.options.trust_teacher:
            raise TeacherError(
                f"{who}: expected better than chance, {chance:.3f}, got {quality}; check its weights, its class "
                f"order and its mean and std, or give --trust-teacher"
            )
        journal.note(f"{who}: {quality}, chance {chance:.3f}")
        return teacher
