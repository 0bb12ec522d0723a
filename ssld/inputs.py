"""What a stage is given: data, outside weights, earlier results, and the soft labels of its teachers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ssld import checkpoint
from ssld.contracts import Arrays, Ranks, SoftLabels, Task
from ssld.errors import ChangedError
from ssld.graph import Node, Plan, model, pipeline
from ssld.journal import Journal
from ssld.members import Members
from ssld.rundir import Options, RunDirectory, state_of
from ssld.seeds import derive
from ssld.soft import SoftSource
from ssld.teaching.asking import together


@dataclass(frozen=True)
class Inputs:
    """Reads for a stage what it may not read itself; stop(): the signal that asks the run to end, or None."""

    members: Members
    soft: SoftSource
    journal: Journal
    stop: Callable[[], int | None]
    ranks: Ranks = field(default_factory=Ranks)

    @classmethod
    def of(
        cls,
        run: RunDirectory,
        plan: Plan,
        options: Options,
        journal: Journal,
        stop: Callable[[], int | None],
        ranks: Ranks | None = None,
    ) -> Inputs:
        members = Members(run, plan, options, journal.note)
        return cls(members, SoftSource(members, journal, stop), journal, stop, ranks or Ranks())

    def task(self, node: Node, reached: checkpoint.Checkpoint | None) -> Task[Any]:
        """Everything as values; reached: the checkpoint at which an earlier run of the stage stopped."""
        settings, plan = node.settings, self.members.plan
        self.soft.check(node)
        task: Task[Any] = Task(
            name=node.name,
            model=model(plan, node),
            settings=settings,
            seed=derive(plan.recipe.seed, node.name),
            device=self.members.options.device,
            data=plan.data.named(settings.data),
            validation=plan.data.validation,
            train=pipeline(plan.recipe, "train", settings.resolution),
            initial=None if reached else self.initial(node),
            soft=self._labels(node, reached) if settings.taught_by else None,
            reference=self.soft.reference(node) if settings.taught_by else None,
            resume=state_of(reached) if reached else None,
            damage_budget=plan.data.damage_budget(settings.data),
            save=lambda state: self.members.run.save(node, task, state) if self.ranks.number == 0 else None,
            stop=self.stop,
            journal=self.journal,
            ranks=self.ranks,
        )
        return task

    def _labels(self, node: Node, reached: checkpoint.Checkpoint | None) -> SoftLabels:
        """The stage's soft labels. Raises ChangedError when a stopped stage had another teacher of the same name."""
        teachers = together(self.members.of(node))
        before = reached.state["teacher"] if reached else teachers
        if before != teachers:
            raise ChangedError(
                f"{node.name}: expected the teacher with which the stage began, fingerprint {before[:16]}…, got "
                f"{teachers[:16]}…; bring it back, or start again with ssld resume --stage {node.name}"
            )
        soft = self.soft.labels(node)
        if reached and reached.state["labels"] != soft.files:
            self.journal.note(
                "warning: the same weights as in an unbroken run are not promised, since the label files have changed"
            )
        return soft

    def initial(self, node: Node) -> Arrays | None:
        """The weights that `from` names, of a stage or a file."""
        start = node.settings.start
        if start is None:
            return None
        if start.endswith(".safetensors"):
            return checkpoint.read_weights(Path(start))
        return self.members.finished(start).tensors("student")
