"""Where the stages of a plan stand, as tables for people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ssld.graph import Node
from ssld.journal import duration
from ssld.preview.forecast import LabelForecast
from ssld.rundir import Status

STATES = {"done": "finished", "resume": "stopped", "changed": "changed", "new": "to do"}
ACTIONS = {"done": "skip", "resume": "go on", "changed": "run again", "new": "run"}
METRICS = ("top1", "top5", "agreement")
Table = tuple[tuple[str, ...], list[tuple[str, ...]]]


def shown(path: Path) -> str:
    """A path as the user would type it: from the current directory where it is below."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


@dataclass(frozen=True)
class Overview:
    """A run directory beside its plan.

    labels: what keeping the soft labels of a stage takes, by the stage's name, for each of its teachers.
    remarks: what should be known besides; fresh: whether this call has run anything; test: the last stage's metrics on
    the test set, where there is one; running: whether a process works in the directory.
    """

    directory: Path
    stages: tuple[tuple[Node, Status], ...]
    labels: Mapping[str, tuple[LabelForecast, ...]] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    fresh: bool = False
    test: Mapping[str, float] | None = None
    running: bool = False

    def table(self) -> Table:
        """Header and rows: what each stage has reached, its time, and where its checkpoint is."""
        header = ("stage", "state", "top-1", "top-5", "agreement", "time", "checkpoint")
        rows = [
            (
                f"{node.number} {node.name}",
                "running" if node is self._at_work else STATES[status.kind],
                *(f"{status.metrics[name]:.4f}" if name in status.metrics else "" for name in METRICS),
                duration(status.seconds) if status.checkpoint else "",
                shown(status.checkpoint.path) if status.checkpoint else "",
            )
            for node, status in self.stages
        ]
        if self.test is not None:
            last = self.stages[-1][0].name
            rows.append((f"{last} on test", "", f"{self.test['top1']:.4f}", f"{self.test['top5']:.4f}", "", "", ""))
        return header, rows

    @property
    def _at_work(self) -> Node | None:
        """The stage that a process in this directory is at: the first that is not done."""
        return next((node for node, status in self.stages if status.kind != "done"), None) if self.running else None

    def forecast(self) -> Table:
        """Header and rows: what each stage would do, with every derived number, and why it would run."""
        header = (
            "stage",
            "kind",
            "network",
            "px",
            "images",
            "epochs",
            "steps",
            "batch",
            "lr",
            "warm-up",
            "what and why",
        )
        rows = []
        for node, status in self.stages:
            rows += [_label_row(node, label) for label in self.labels.get(node.name, ())]
            rows.append(_stage_row(node, status))
        return header, rows


def _label_row(node: Node, label: LabelForecast) -> tuple[str, ...]:
    return (
        f"{node.number} {node.name}",
        "label",
        label.teacher,
        str(label.size or ""),
        str(label.images),
        f"{label.views} views",
        *[""] * 4,
        label.what(),
    )


def _stage_row(node: Node, status: Status) -> tuple[str, ...]:
    return (
        f"{node.number} {node.name}",
        node.settings.kind,
        node.settings.student.name,
        str(node.settings.resolution),
        str(node.samples),
        str(node.settings.epochs),
        str(node.steps),
        str(node.settings.batch_size),
        f"{node.settings.learning_rate:.3g}",
        f"{node.settings.warmup_epochs:g}",
        f"{ACTIONS[status.kind]}: {status.why}",
    )
