"""Where the stages of a plan stand, as tables for people."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ssld.graph import Node
from ssld.journal import duration
from ssld.rundir import Status

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]


def shown(path: Path) -> str:
    """A path as the user would type it: from the current directory where it is below."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


@dataclass(frozen=True)
class Overview:
    """A run directory beside its plan. remarks: damage that was met; fresh: whether this call has run anything."""

    directory: Path
    stages: tuple[tuple[Node, Status], ...]
    remarks: tuple[str, ...] = ()
    fresh: bool = False

    def table(self) -> Table:
        """Header and rows: what each stage has reached, its time, and where its checkpoint is."""
        tested = any("test_top1" in status.metrics for _, status in self.stages)
        header = ("stage", "state", "top-1", "top-5", *(("test top-1",) if tested else ()), "time", "checkpoint")
        metrics = ("top1", "top5", *(("test_top1",) if tested else ()))
        return header, [
            (
                f"{node.number} {node.name}",
                status.short,
                *(f"{status.metrics[name]:.4f}" if name in status.metrics else "" for name in metrics),
                duration(status.seconds) if status.checkpoint else "",
                shown(status.checkpoint.path) if status.checkpoint else "",
            )
            for node, status in self.stages
        ]

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
        return header, [
            (
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
                f"{status.action}: {status.why}",
            )
            for node, status in self.stages
        ]
