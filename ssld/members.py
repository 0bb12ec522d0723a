"""The teachers of a stage, loaded but not asked, and the stores in which their soft labels are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ssld import checkpoint, plugins
from ssld.contracts import Teacher
from ssld.data.loader import Replay
from ssld.data.samples import digest, same_classes
from ssld.data.transforms import Pipeline
from ssld.errors import PluginError, RecipeError
from ssld.graph import Node, Plan, owner, pipeline
from ssld.labels.store import Description, Store
from ssld.rundir import Options, RunDirectory, result_of
from ssld.settings import TeacherSetting
from ssld.teaching.asking import Member, at_test_time
from ssld.teaching.classmap import Mapped, read_class_map

COMPARED_CLASSES = 10
"""What is kept of a teacher's answer where it is only measured, or compared with the student."""


@dataclass(frozen=True)
class Members:
    """Finds the teachers of stages. report: is told of damaged checkpoints that are passed over."""

    run: RunDirectory
    plan: Plan
    options: Options
    report: Callable[[str], None]
    loaded: dict[str, Teacher] = field(default_factory=dict)
    """By setting; a stage that shares a teacher with another does not load it again."""

    def of(self, node: Node) -> tuple[Member, ...]:
        """The teachers of a stage. Raises PluginError for what is no teacher, DataError for one of other classes."""
        return tuple(self.member(setting) for setting in node.settings.taught_by)

    def stores(self, node: Node) -> list[tuple[Store, Member]]:
        """Where the soft labels of a stage's training views are kept, for each of its teachers."""
        stored = node.settings.stored
        assert stored is not None, "only asked for a stage whose labels are kept"
        train, replay = pipeline(self.plan.recipe, "train", node.settings.resolution), Replay(stored.seed, stored.views)
        return [
            (
                self._store(node, member, train.at(member.teacher.spec.size), replay, stored.top_k, stored.temperature),
                member,
            )
            for member in self.of(node)
        ]

    def tested_stores(self, node: Node, members: Sequence[Member]) -> list[tuple[Store, Member]]:
        """Where the soft labels of images are kept that are shown as at test time."""
        evaluate = pipeline(self.plan.recipe, "eval", node.settings.resolution)
        top_k = min(COMPARED_CLASSES, len(self.plan.data.classes))
        return [
            (self._store(node, member, at_test_time(evaluate, member.teacher.spec), Replay(0, 1), top_k, 1.0), member)
            for member in members
        ]

    def finished(self, name: str) -> checkpoint.Checkpoint:
        """The last checkpoint of a stage that is done. Raises RecipeError for one that is not."""
        node = self.plan.node(name)
        status = self.run.status(node, self.report)
        if status.kind != "done" or status.checkpoint is None:
            raise RecipeError(
                f"{self.run.path}: expected the stage {name} to be finished, got: {status.why}; run it first, with "
                f"ssld run"
            )
        return status.checkpoint

    def _store(
        self, node: Node, member: Member, shown: Pipeline, replay: Replay, top_k: int, temperature: float
    ) -> Store:
        spec, classes = member.spec, self.plan.data.classes
        return Store(self.run.labels(node), Description(spec, shown, replay, top_k, temperature, classes, member.who))

    def member(self, setting: TeacherSetting) -> Member:
        """One teacher. Raises as `of` does."""
        key = repr(setting)
        if key not in self.loaded:
            self.loaded[key] = self._load(setting)
        teacher = self.loaded[key]
        made_of = digest(teacher.spec.fingerprint, *self._made_of(setting))
        return Member(who(setting), teacher, setting.weight, made_of)

    def _made_of(self, setting: TeacherSetting) -> tuple[object, ...]:
        """What of a teacher its weights do not tell: the network, options, and versions of what strangers wrote."""
        if setting.stage is not None:
            student = self.plan.node(setting.stage).settings.student
            return "network", student.name, owner("students", student.name), sorted(student.options.items())
        if setting.network is not None:
            options = sorted((setting.options.get("options") or {}).items())
            return "network", setting.network, owner("students", setting.network), options
        options = sorted((key, repr(value)) for key, value in setting.options.items())
        return (setting.way, setting.plugin or "", owner("teachers", setting.plugin or setting.way), options)

    def _load(self, setting: TeacherSetting) -> Teacher:
        classes = self.plan.data.classes
        name, options = named(setting)
        # a teacher's size is the recipe's where it has none of its own, whatever the student's is
        supplied: dict[str, Any] = {"resolution": self.plan.recipe.images.resolution, "device": self.options.device}
        supplied |= {"precision": setting.precision}
        supplied |= {"classes": classes} if setting.class_map is None else {}
        if setting.stage is not None:
            model, weights = result_of(self.finished(setting.stage))
            supplied |= {"model": model, "weights": weights}
        teacher = plugins.call("teachers", name, options, supplied)
        if not isinstance(teacher, Teacher):
            raise PluginError(
                f"teacher {name!r} of {plugins.origin('teachers', name)}: expected an object with spec and predict, "
                f"got {type(teacher).__name__}"
            )
        if setting.class_map is not None:
            teacher = Mapped(teacher, read_class_map(Path(setting.class_map), teacher.spec.classes, classes))
        if teacher.spec.classes is not None:
            same_classes(classes, teacher.spec.classes, "the data", who(setting))
        return teacher


def who(setting: TeacherSetting) -> str:
    """The teacher in words; of a stranger's plug-in, distribution and version too."""
    if setting.plugin:
        return f"the teacher {setting.name} ({plugins.origin('teachers', setting.plugin)})"
    return f"the teacher {setting.name}{f' of {Path(setting.file).name}' if setting.network and setting.file else ''}"


def named(setting: TeacherSetting) -> tuple[str, dict[str, Any]]:
    """The teacher's entry point, and the recipe's keys for it."""
    if setting.way == "plugin":
        return str(setting.plugin), setting.options
    return setting.way, {setting.way: getattr(setting, setting.way), **setting.options}
