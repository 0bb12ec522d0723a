"""What a stage is given: earlier results, outside weights, and a teacher that was looked at first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ssld import checkpoint, plugins, teaching
from ssld.contracts import Arrays, Model, Task, Teacher
from ssld.errors import ChangedError, PluginError
from ssld.graph import Node, Plan, pipeline
from ssld.journal import Journal
from ssld.rundir import Options, RunDirectory, result_of, state_of
from ssld.seeds import derive
from ssld.settings import TeacherSetting


@dataclass(frozen=True)
class Inputs:
    """Reads for a stage what it may not read itself."""

    run: RunDirectory
    plan: Plan
    options: Options
    teachers: dict[tuple[str, int], Teacher] = field(default_factory=dict)
    """Those that were looked at already; a stage that shares one with another does not load and measure it again."""

    def task(
        self,
        node: Node,
        reached: checkpoint.Checkpoint | None,
        *,
        stop: Callable[[], int | None],
        journal: Journal,
    ) -> Task[Any]:
        """Everything as values; reached: the checkpoint at which an earlier run of the stage stopped."""
        settings, data, recipe = node.settings, self.plan.data, self.plan.recipe
        evaluate = pipeline(recipe, "eval", settings.resolution)
        model = Model(settings.student.name, settings.student.options, data.classes, evaluate)
        task: Task[Any] = Task(
            name=node.name,
            model=model,
            settings=settings,
            seed=derive(recipe.seed, node.name),
            device=self.options.device,
            data=data.named(settings.data),
            validation=data.validation,
            train=pipeline(recipe, "train", settings.resolution),
            initial=None if reached else self.initial(node, journal),
            teacher=self._same_teacher(node, reached, journal) if settings.taught_by else None,
            resume=state_of(reached) if reached else None,
            damage_budget=data.damage_budget(settings.data),
            save=lambda state: self.run.save(node, task, state),
            stop=stop,
            journal=journal,
        )
        return task

    def _same_teacher(self, node: Node, reached: checkpoint.Checkpoint | None, journal: Journal) -> Teacher:
        """The stage's teacher. Raises ChangedError when a stopped stage had another one of the same name."""
        teacher = self.teacher(node, journal)
        before = reached.state["teacher"] if reached else teacher.spec.fingerprint
        if before != teacher.spec.fingerprint:
            raise ChangedError(
                f"{node.name}: expected the teacher with which the stage began, fingerprint {before[:16]}…, got "
                f"{teacher.spec.fingerprint[:16]}…; bring it back, or start again with ssld resume --stage {node.name}"
            )
        return teacher

    def teacher(self, node: Node, journal: Journal) -> Teacher:
        """Load the teacher of a stage and check that it can be learned from.

        Raises TeacherError for answers of the wrong form and for a teacher at chance level, PluginError for no teacher.
        """
        setting = node.settings.taught_by
        assert setting is not None, "only asked for a stage that has a teacher"
        key = repr(setting), node.settings.resolution
        if key not in self.teachers:
            self.teachers[key] = self._load_teacher(node, setting, journal)
        return self.teachers[key]

    def _load_teacher(self, node: Node, setting: TeacherSetting, journal: Journal) -> Teacher:
        data = self.plan.data
        name, options = named(setting)
        supplied = {"classes": data.classes, "resolution": node.settings.resolution, "device": self.options.device}
        if setting.stage is not None:
            model, weights = result_of(self.finished(setting.stage, journal))
            supplied |= {"model": model, "weights": weights}
        teacher = plugins.call("teachers", name, options, supplied)
        if not isinstance(teacher, Teacher):
            raise PluginError(
                f"teacher {name!r} of {plugins.origin('teachers', name)}: expected an object with spec and predict, "
                f"got {type(teacher).__name__}"
            )
        who = f"the teacher {setting.stage or setting.network or setting.plugin} of {node.name}"
        evaluate = pipeline(self.plan.recipe, "eval", node.settings.resolution)
        quality = teaching.check(teacher, data.validation, evaluate, data.classes, who)
        journal.record(
            "teacher", who=who, top1=quality.accuracy, low=quality.low, high=quality.high, chance=quality.chance
        )
        # a smoke run is about the way, not about the result
        if not (self.options.trust_teacher or self.options.limit):
            teaching.expect_better_than_chance(quality, who)
        journal.note(f"{who}: {quality}")
        return teacher

    def finished(self, name: str, journal: Journal) -> checkpoint.Checkpoint:
        """The last checkpoint of a stage that is done."""
        found = checkpoint.latest(self.run.stage(self.plan.node(name)), journal.note)
        assert found is not None, "a stage runs after those it reads"
        return found

    def initial(self, node: Node, journal: Journal) -> Arrays | None:
        """The weights that `from` names, of a stage or a file."""
        start = node.settings.start
        if start is None:
            return None
        if start.endswith(".safetensors"):
            return checkpoint.read_weights(Path(start))
        return self.finished(start, journal).tensors("student")


def named(setting: TeacherSetting) -> tuple[str, dict[str, Any]]:
    """The teacher's entry point, and the recipe's keys for it."""
    if setting.stage is not None:
        return "stage", {"stage": setting.stage}
    if setting.network is not None:
        return "network", {"network": setting.network, **setting.options}
    assert setting.plugin is not None, "a teacher is given in exactly one way"
    return setting.plugin, setting.options
