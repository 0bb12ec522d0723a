"""Runs a plan: skips what is whole, does what is not, and when it stops says how to go on."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssld.changes import Old, refusal, what_changed
from ssld.ending import end, going_on, memory_named
from ssld.environment import PADDLE_KERNELS, SLOW, environment, kernels
from ssld.errors import ChangedError, CheckpointError, Interrupted, RecipeError, SsldError
from ssld.graph import Node, Plan, make_plan
from ssld.inputs import Inputs
from ssld.journal import Journal
from ssld.lock import RunLock, holder
from ssld.members import Members
from ssld.overview import Overview
from ssld.preview.forecast import label_forecasts
from ssld.recipe import Recipe, differences, dump, read_recipe
from ssld.rundir import Options, RunDirectory, Status
from ssld.signals import Stop, interrupting
from ssld.soft import Labelled, SoftSource
from ssld.threads import shared_by
from ssld.watch import watch

if TYPE_CHECKING:
    from ssld.crew import Crew


@interrupting()
def run(
    recipe: str | Path | Recipe,
    out: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    device: str = "cpu",
    limit: int | None = None,
    rerun: bool = False,
    trust_teacher: bool = False,
    until: str | int | None = None,
    nproc: int | None = None,
    stall_timeout: float | None = None,
) -> Overview:
    """Do what the recipe says, or go on where an earlier run of it stopped.

    out: the run directory, runs/NAME when left out; overrides: "key.path=value"; limit: a smoke run on so many images
    of each set; until: the number or name of the last stage to do; nproc: ranks, processes that train together;
    stall_timeout: seconds that an image, a teacher's answer, a step or a save may take before the process is ended, 0
    for any time; both are what the run has had when left out, at first 1 and 600. Raises ChangedError when the
    directory holds results of another recipe and rerun is not set.
    """
    read = recipe if isinstance(recipe, Recipe) else read_recipe(recipe, overrides)
    directory = RunDirectory.of(read.name, out)
    with going_on(onward(directory), directory.exists), interrupting():
        plan = make_plan(read, limit=limit)
        last = plan.find(str(until)) if until is not None else None
        had = directory.options()
        options = _with(Options(device, limit, trust_teacher, had.nproc, had.stall_timeout), nproc, stall_timeout)
        return Runner(directory, plan, options).run(rerun=rerun, last=last)


@interrupting()
def resume(
    out: str | Path | None = None,
    *,
    stage: str | int | None = None,
    nproc: int | None = None,
    stall_timeout: float | None = None,
) -> Overview:
    """Go on exactly where a run stopped; or, with a stage's number or name, start again from there.

    out: the run directory, the newest under runs/ when left out; nproc, stall_timeout: others than the run has had.
    Raises RecipeError when there is nothing to resume.
    """
    directory = RunDirectory(existing_run(out))
    with going_on(onward(directory), directory.exists), interrupting(), directory.from_its_place():
        recipe, options = directory.recorded()
        options = _with(options, nproc, stall_timeout)
        plan = make_plan(recipe, limit=options.limit)
        first = plan.find(str(stage)) if stage is not None else None
        return Runner(directory, plan, options).run(first=first)


def onward(directory: RunDirectory) -> str:
    """The command that goes on with a run."""
    return f"continue: ssld resume --out {shlex.quote(str(directory.path))}"


def _with(options: Options, nproc: int | None, stall_timeout: float | None) -> Options:
    """The options with what was given, and without what was not. Raises RecipeError for what is out of range."""
    given: dict[str, Any] = {"nproc": nproc, "stall_timeout": stall_timeout}
    try:
        return replace(options, **{name: value for name, value in given.items() if value is not None})
    except ValueError as error:
        raise RecipeError(str(error)) from error


def plan(
    recipe: str | Path | Recipe,
    out: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    limit: int | None = None,
) -> Overview:
    """What `run` would do with the same arguments, and why; writes only the index cache."""
    read = recipe if isinstance(recipe, Recipe) else read_recipe(recipe, overrides)
    return overview(RunDirectory.of(read.name, out).path, make_plan(read, limit=limit))


def status(out: str | Path | None = None) -> Overview:
    """Where a run stands: the newest under runs/ when `out` is left out."""
    directory = existing_run(out)
    run = RunDirectory(directory)
    recipe, options = run.recorded()
    with run.from_its_place():
        found = overview(directory, make_plan(recipe, limit=options.limit), foresee=False)
    working = holder(directory)
    where = f"{directory}, in use by {working}" if working else str(directory)
    return replace(found, remarks=(where, *found.remarks), running=working is not None)


def overview(directory: Path, plan: Plan, *, foresee: bool = True) -> Overview:
    """The plan beside what the directory holds; foresee: with what labelling would take, for which teachers load."""
    remarks: list[str] = []
    run = RunDirectory(directory)
    stages = tuple((node, run.status(node, remarks.append)) for node in plan.nodes)
    test, last = plan.data.test, plan.nodes[-1]
    tested = None if test is None else run.tested(last, test.identity)
    members = Members(run, plan, Options(), lambda _: None)
    waiting = {node.name for node, status in stages if status.kind != "done"}
    foreseen: set[object] = set()
    todo = [node for node in plan.nodes if node.name in waiting and foresee]
    labels = {node.name: label_forecasts(members, node, waiting, foreseen) for node in todo}
    return Overview(directory, stages, labels, tuple(remarks), test=tested)


@interrupting()
def label(
    recipe: str | Path | Recipe,
    out: str | Path | None = None,
    *,
    stage: str | int | None = None,
    part: tuple[int, int] = (1, 1),
    overrides: Sequence[str] = (),
    device: str = "cpu",
    limit: int | None = None,
    trust_teacher: bool = False,
    stall_timeout: float | None = None,
) -> list[Labelled]:
    """Make the soft labels that a recipe keeps, without training; several processes may do so at once.

    stage: the number or name of one stage, all that keep labels when left out; part: (number from 1, of how many)
    static slices of the shards; stall_timeout: as for `run`. Raises RecipeError where no stage keeps labels, or the
    teacher is still to be trained.
    """
    again = "continue: the same ssld label again"
    with going_on(again), interrupting():
        read = recipe if isinstance(recipe, Recipe) else read_recipe(recipe, overrides)
        directory = RunDirectory.of(read.name, out)
        plan = make_plan(read, limit=limit)
        nodes = keeping(plan, stage)
        had = Options(device, limit, trust_teacher, stall_timeout=directory.options().stall_timeout)
        options = _with(had, None, stall_timeout)
        directory.claim()
        stop, journal = Stop(), Journal(directory.path)
        try:
            stalled = watch.on(options.stall_timeout, lambda error: end(error, journal, again))
            with stop.listening(), stalled, memory_named(again):
                from ssld.train.networks import use_device

                stop.check("before anything was labelled")
                use_device(device)
                soft = Inputs.of(directory, plan, options, journal, lambda: stop.number).soft
                return [done for node in nodes for done in _label(soft, node, part, journal)]
        finally:
            journal.close()


def _label(soft: SoftSource, node: Node, part: tuple[int, int], journal: Journal) -> list[Labelled]:
    journal.place = f"{node.number} {node.name}"
    soft.check(node)
    done = soft.label(node, *part)
    # what a run compares its student on, so that it asks the teacher nothing
    soft.reference(node)
    return done


def keeping(plan: Plan, stage: str | int | None) -> list[Node]:
    """The stages whose soft labels are kept, or the one that is meant. Raises RecipeError where there is none."""
    nodes = [plan.find(str(stage))] if stage is not None else [node for node in plan.nodes if node.settings.stored]
    if not nodes or nodes[0].settings.stored is None:
        raise RecipeError(
            f"{plan.recipe.name}: expected a stage that keeps soft labels, got {nodes[0].name if nodes else 'none'}; "
            f"write labels: {{views: 8, top_k: 10}} for it"
        )
    return nodes


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


class Runner:
    """Brings a run directory to the end of a plan."""

    def __init__(self, directory: RunDirectory, plan: Plan, options: Options) -> None:
        self.directory = directory
        self.plan = plan
        self.options = options
        self.stop = Stop()
        self.onward = onward(directory)

    def run(self, *, rerun: bool = False, first: Node | None = None, last: Node | None = None) -> Overview:
        """Run every stage that is not done, up to `last`; `first` and what follows it starts again."""
        self.directory.claim()
        with RunLock(self.directory.path):
            self.directory.clear()
            journal = Journal(self.directory.path)
            try:
                with memory_named(self.onward):
                    return self._run(journal, rerun, first, last)
            except SsldError as error:
                if not isinstance(error, ChangedError):
                    journal.detail(f"Error: {error}")
                raise
            finally:
                journal.close()

    def _run(self, journal: Journal, rerun: bool, first: Node | None, last: Node | None) -> Overview:
        again = self.plan.nodes[self.plan.nodes.index(first) :] if first is not None else ()
        before = self._statuses(journal, again)
        for node, status in before:
            if status.kind in ("done", "resume") and status.checkpoint is not None:
                self.directory.tidy(node, status.checkpoint.step, status.checkpoint.state["facts"])
        changed = [node for node, status in before if status.kind == "changed" and node not in again]
        why = what_changed(self.directory, self.plan, self.options, before) if changed else []
        if changed and not rerun:
            raise refusal(self.directory.path, changed, why)
        left = [node for node, status in before if status.kind != "done" or node in again]
        wanted = self.plan.nodes[: self.plan.nodes.index(last) + 1] if last is not None else self.plan.nodes
        todo = [node for node in left if node in wanted]
        self._expect_shares(todo)
        complete = todo == left
        fresh = bool(todo) or (complete and self._untested())
        if fresh:
            reason = f"starting again from stage {first.number} {first.name}" if first else "; ".join(why)
            stalled = watch.on(self.options.stall_timeout, lambda error: end(error, journal, self.onward))
            with shared_by(self.options.nproc), stalled:
                self._work(todo, Old((*changed, *again), before, reason), journal, complete)
        after = self._statuses(journal)
        return Overview(self.directory.path, tuple(after), fresh=fresh, test=self._test_metrics())

    def _expect_shares(self, nodes: Sequence[Node]) -> None:
        """Raise RecipeError for more ranks than the batches feed."""
        count, device = self.options.nproc, self.options.device
        if count > 1 and device != "cpu":
            raise RecipeError(f"--nproc {count}: expected --device cpu, got {device}; leave one of the two out")
        # batch norms need two images
        small = [node for node in nodes if node.settings.batch_size < 2 * count]
        if count > 1 and small:
            raise RecipeError(
                f"--nproc {count}: expected at least 2 images of each batch for every rank, got a batch_size of "
                f"{small[0].settings.batch_size} in {small[0].name}; lower --nproc, or raise batch_size"
            )

    def _statuses(self, journal: Journal, again: Sequence[Node] = ()) -> list[tuple[Node, Status]]:
        found = []
        for node in self.plan.nodes:
            try:
                found.append((node, self.directory.status(node, journal.note)))
            except CheckpointError as error:
                if node not in again:
                    raise
                journal.note(f"{error}; the stage starts again")
                found.append((node, Status("new", "damaged")))
        return found

    def _work(self, todo: list[Node], old: Old, journal: Journal, complete: bool) -> None:
        """Try everything once, set old results aside, run what is to do, and then look at the test set.

        complete: whether nothing is left after that; before, the test set is not looked at.
        """
        fresh = not self.directory.exists()
        if not old.nodes:
            self._begin()
        with self.stop.listening():
            from ssld.crew import Crew
            from ssld.preflight import preflight
            from ssld.score import score_last

            inputs = Inputs.of(self.directory, self.plan, self.options, journal, lambda: self.stop.number)
            self._try(fresh, lambda: preflight(todo, inputs))
            if old.nodes:
                # recorded first: a process that is killed while results move must not go on with the old recipe
                self._begin()
                old.set_aside(self.directory, journal)
            self._describe(journal)
            count = self.options.nproc if todo else 1
            with Crew(self.directory.path, count, journal.met, lambda: self.stop.number) as crew:
                for node in todo:
                    self._run_stage(node, replace(inputs, ranks=crew.ranks), crew)
                    self.stop.check(f"after {node.name}, which is finished")
            if complete and self._untested():
                score_last(inputs, lambda: self.stop.check("before the test set was measured"))

    def _try(self, fresh: bool, preflight: Callable[[], None]) -> None:
        """What is wrong is met now; a run that has just begun then never was, but for a signal."""
        self.stop.check("before anything was spent")
        try:
            preflight()
        except SsldError as error:
            if fresh and not isinstance(error, Interrupted):
                self.directory.forget()
            raise
        self.stop.check("before anything was spent")

    def _test_metrics(self) -> Mapping[str, float] | None:
        test = self.plan.data.test
        return None if test is None else self.directory.tested(self.plan.nodes[-1], test.identity)

    def _untested(self) -> bool:
        return self.plan.data.test is not None and self._test_metrics() is None

    def _begin(self) -> None:
        self.directory.begin(dump(self.plan.recipe), self.options)

    def _describe(self, journal: Journal) -> None:
        """What is about to run, for the log."""
        text = dump(self.plan.recipe)
        journal.note(f"run {self.directory.path}")
        if self.options.device == "cpu" and kernels() == PADDLE_KERNELS:
            journal.note(f"trained by paddle's own kernels: {SLOW}")
        journal.detail(f"recipe\n{text}")
        for node in self.plan.nodes:
            journal.detail(f"{node.name}, resolved: {json.dumps(node.basis['settings'], sort_keys=True)}")
        journal.detail(f"environment: {json.dumps(environment(), sort_keys=True)}")
        journal.record("start", recipe=text, environment=environment())

    def _run_stage(self, node: Node, inputs: Inputs, crew: Crew) -> None:
        journal = inputs.journal
        reached = self.directory.reached(node, journal.note)
        journal.place = f"{node.number} {node.name}"
        settings, position = node.settings, self.plan.nodes.index(node) + 1
        journal.note(
            f"[{journal.place}] {settings.kind} {settings.student.name} ({position} of {len(self.plan.nodes)} stages), "
            f"{node.samples} images, {node.steps} steps at {settings.resolution} px, lr {settings.learning_rate:.3g}"
            + (f" on {crew.count} ranks" if crew.count > 1 else "")
            + (f", going on after step {reached.step}" if reached else "")
        )
        for line in differences(reached.state["environment"], environment()) if reached else ():
            journal.note(f"warning: the same weights as in an unbroken run are not promised, since {line}")
        if node.settings.stored and crew.followers:
            # before a poor teacher is asked about the whole pool
            inputs.soft.check(node)
            self._label(node, inputs, crew)
        task = inputs.task(node, reached)
        crew.tell(train=node.name, fingerprint=node.fingerprint, step=reached.step if reached else 0)
        outcome = node.kind.run(task)
        self.directory.save(node, task, outcome.state, outcome.metrics)
        journal.record("finished", stage=node.name, **outcome.metrics)

    def _label(self, node: Node, inputs: Inputs, crew: Crew) -> None:
        """Let all ranks make the soft labels that a stage lacks; fewer shards than ranks are left to rank 0's task."""
        shards = [lacking if len(lacking) >= crew.count else [] for lacking in inputs.soft.lacking(node)]
        if any(shards):
            crew.tell(label=node.name, shards=shards)
            inputs.soft.label_together(node, shards, crew.ranks)
            crew.expect("labelled")
