"""What keeping soft labels will take, before anything is spent; nothing here asks a teacher."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from ssld.errors import SsldError
from ssld.graph import Node
from ssld.members import Members
from ssld.wording import size

HEADER_BYTES = 1700
"""About what a label file has besides its labels."""


@dataclass(frozen=True)
class LabelForecast:
    """The soft labels of one stage by one teacher.

    size: of the teacher's input in pixels; epochs: of the stage; shards, missing: label files in all, and those that
    are not there; missing_images: in these; directory: where they lie. The last four and size are None where the
    teacher cannot be known yet, and why_unknown says why.
    """

    teacher: str
    images: int
    views: int
    epochs: int
    size: int | None = None
    shards: int | None = None
    missing: int | None = None
    missing_images: int | None = None
    bytes_per_view: int = 0
    directory: Path | None = None
    why_unknown: str = ""

    @property
    def passes(self) -> int:
        """Images that the teacher is still to be shown."""
        return (self.images if self.missing_images is None else self.missing_images) * self.views

    @property
    def bytes(self) -> int:
        """Bytes of the label files that are still to be written."""
        return self.passes * self.bytes_per_view + (self.missing or 0) * HEADER_BYTES

    def what(self) -> str:
        """What would be done, and what that saves."""
        online = f"{self.epochs * self.images:,} online"
        if self.why_unknown:
            return f"run: {self.passes:,} passes of the teacher instead of {online}, {self.why_unknown}"
        if not self.missing:
            return f"skip: all {self.shards} shards are in {self.directory}, no pass of the teacher instead of {online}"
        return (
            f"run: {self.missing} of {self.shards} shards, {self.passes:,} passes of the teacher instead of {online}, "
            f"{size(self.bytes)} in {self.directory}"
        )


def label_forecasts(members: Members, node: Node, waiting: Collection[str]) -> tuple[LabelForecast, ...]:
    """What the soft labels of a stage would take, for each of its teachers; none where the teacher is asked online.

    waiting: the stages that are still to run, whose results are not known.
    """
    stored, samples = node.settings.stored, members.plan.data.named(node.settings.data)
    if stored is None:
        return ()
    first = [name for name in node.settings.teacher_stages if name in waiting]
    try:
        stores = [] if first else members.stores(node)
        reason = f"after {', '.join(first)}"
    except SsldError as error:
        stores, reason = [], f"not known yet: {error}"
    if not stores:
        return tuple(
            LabelForecast(setting.name, len(samples), stored.views, node.settings.epochs, why_unknown=reason)
            for setting in node.settings.taught_by
        )
    found = []
    for (store, member), setting in zip(stores, node.settings.taught_by, strict=True):
        missing = store.missing(samples)
        found.append(
            LabelForecast(
                setting.name,
                len(samples),
                stored.views,
                node.settings.epochs,
                size=member.teacher.spec.size,
                shards=len(samples.shard_ids),
                missing=len(missing),
                missing_images=int(samples.shard_sizes[missing].sum()),
                bytes_per_view=store.description.bytes_per_view,
                directory=store.directory,
            )
        )
    return tuple(found)
