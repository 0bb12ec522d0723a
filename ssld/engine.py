"""Walks a plan: skips what is whole, runs what is not, and when it stops says how to go on."""

from __future__ import annotations

import json
import shlex
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ssld.errors import ChangedError, PluginError, RecipeError, SsldError
from ssld.files import RunLock, sweep, writable
from ssld.graph import Node, Plan, make_plan
from ssld.inputs import Inputs
from ssld.journal import Journal, duration
from ssld.overview import Overview
from ssld.recipe import Recipe, differences, dump, read_recipe
from ssld.rundir import Options, RunDirectory, Status, environment


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
        self.inputs = Inputs(self.run, plan, options)
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
                # these would end the same way again
                if self.run.exists() and not isinstance(error, ChangedError | RecipeError | PluginError):
                    error.add_note(f"continue: ssld resume --out {shlex.quote(str(self.run.path))}")
                raise
            finally:
                journal.close()

    def _walk(self, journal: Journal, rerun: bool, first: Node | None) -> Overview:
        before = self._statuses(journal)
        again = self.plan.nodes[self.plan.nodes.index(first) :] if first is not None else ()
        changed = [node for node, status in before if status.kind == "changed" and node not in again]
        why = self._what_changed(before) if changed else []
        if changed and not rerun:
            raise self._changed(changed, why)
        todo = [node for node, status in before if status.kind != "done" or node in again]
        if todo:
            reason = f"starting again from stage {first.number} {first.name}" if first else "; ".join(why)
            self._work(todo, [*changed, *again], reason, before, journal)
        return Overview(self.run.path, tuple(self._statuses(journal)), fresh=bool(todo))

    def _statuses(self, journal: Journal) -> list[tuple[Node, Status]]:
        return [(node, self.run.status(node, journal.note)) for node in self.plan.nodes]

    def _work(
        self, todo: list[Node], old: list[Node], reason: str, before: list[tuple[Node, Status]], journal: Journal
    ) -> None:
        """Look at everything, then set the old results aside, then run what is to do."""
        # paddle takes SIGTERM for itself when it is imported, so it comes before our own handlers
        from ssld.preflight import preflight

        with self._signals():
            preflight(todo, self.inputs, journal)
            self._set_aside(old, before, reason, journal)
            self._begin(journal)
            for node in todo:
                self._run_stage(node, journal)

    def _begin(self, journal: Journal) -> None:
        text = dump(self.plan.recipe)
        self.run.begin(text, self.options)
        journal.detail(f"recipe\n{text}")
        for node in self.plan.nodes:
            journal.detail(f"{node.name}, resolved: {json.dumps(node.basis['settings'], sort_keys=True)}")
        journal.detail(f"environment: {json.dumps(environment(), sort_keys=True)}")
        journal.record("start", recipe=text, environment=environment())

    def _set_aside(self, old: list[Node], before: list[tuple[Node, Status]], reason: str, journal: Journal) -> None:
        spent = sum(status.seconds for node, status in before if node in old)
        target, count = self.run.set_aside(old)
        if count:
            journal.note(f"{reason}: {count} results, {duration(spent)} of work, are set aside in {target}")

    def _changed(self, changed: list[Node], why: list[str]) -> ChangedError:
        return ChangedError(
            f"{self.run.path} holds results of another recipe or other data:\n  "
            + "\n  ".join(why)
            + f"\nssld run with --rerun does {', '.join(node.name for node in changed)} again (the old results move to "
            f"{self.run.path}/attempt.N); with another --out it leaves them"
        )

    def _what_changed(self, statuses: list[tuple[Node, Status]]) -> list[str]:
        """The recipe's own differences where there are any, else those of the data and files behind it."""
        recorded, options = self.run.recorded()
        lines = differences(recorded.tree.value, self.plan.recipe.tree.value)
        if options.limit != self.options.limit:
            lines.append(f"--limit: {options.limit} → {self.options.limit}")
        return lines or [f"{node.name}: {status.why}" for node, status in statuses if status.kind == "changed"]

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C set a flag that the training loop reads after each step; the third one acts at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def remember(number: int, frame: object) -> None:
            if self.signal is not None:
                signal.signal(number, old[number])
            self.signal = number

        old = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _run_stage(self, node: Node, journal: Journal) -> None:
        status = self.run.status(node, journal.note)
        reached = status.checkpoint if status.kind == "resume" else None
        journal.place = f"{node.number} {node.name}"
        settings, position = node.settings, self.plan.nodes.index(node) + 1
        journal.note(
            f"[{journal.place}] stage {position} of {len(self.plan.nodes)}: {settings.kind} {settings.student.name}, "
            f"{node.samples} images, {node.steps} steps at {settings.resolution} px, lr {settings.learning_rate:.3g}"
            + (f", going on after step {reached.step}" if reached else "")
        )
        for line in differences(reached.state["environment"], environment()) if reached else ():
            journal.note(f"warning: the same weights as in an unbroken run are not promised, since {line}")
        task = self.inputs.task(node, reached, stop=lambda: self.signal, journal=journal)
        outcome = node.kind.run(task)
        self.run.save(node, task.model, outcome.state, finished=True)
        journal.record("finished", stage=node.name, **outcome.metrics)
