"""What keeping soft labels will take, before anything is spent; nothing here asks a teacher."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from ssld.graph import Node
from ssld.labels.format import bytes_per_view
from ssld.members import Members, who
from ssld.wording import size

HEADER_BYTES = 1700
"""About what a label file has besides its labels."""


@dataclass(frozen=True)
class LabelForecast:
    """The soft labels of one stage by one teacher.

    images, shards: of the stage's data; missing, missing_images: shards without labels, and the images in them.
    epochs: of the stage; size: of the teacher's input in pixels, and directory: where the labels lie, both None where
    the teacher cannot be known yet, and why_unknown says why.
    """

    teacher: str
    images: int
    shards: int
    missing: int
    missing_images: int
    views: int
    epochs: int
    bytes_per_view: int
    size: int | None = None
    directory: Path | None = None
    why_unknown: str = ""

    @property
    def passes(self) -> int:
        """Images that the teacher is still to be shown."""
        return self.missing_images * self.views

    @property
    def bytes(self) -> int:
        """Bytes of the label files that are still to be written."""
        return self.passes * self.bytes_per_view + self.missing * HEADER_BYTES

    def what(self) -> str:
        """What would be done, and what that saves."""
        online = f"{self.epochs * self.images:,} online"
        if not self.missing:
            place = f"are in {self.directory}" if self.directory else "will be there"
            return f"skip: all {self.shards} shards {place}, no pass of the teacher instead of {online}"
        where = self.why_unknown or f"in {self.directory}"
        return (
            f"run: {self.missing} of {self.shards} shards, {self.passes:,} passes of the teacher instead of {online}, "
            f"{size(self.bytes)} {where}"
        )


def label_forecasts(
    members: Members, node: Node, waiting: Collection[str], foreseen: set[object]
) -> tuple[LabelForecast, ...]:
    """What the soft labels of a stage would take, for each of its teachers; none where the teacher is asked online.

    waiting: the stages that are still to run, whose results are not known; foreseen: the labels that earlier stages of
    the plan will have made, to which this one's are added.
    """
    stored, samples = node.settings.stored, members.plan.data.named(node.settings.data)
    if stored is None:
        return ()
    first = [name for name in node.settings.teacher_stages if name in waiting]
    stores = [] if first else members.stores(node)
    found = []
    for setting, known in zip_longest(node.settings.taught_by, stores):
        missing = known[0].missing(samples) if known else range(len(samples.shard_ids))
        place = known[0].directory if known else repr((setting, stored, node.settings.resolution))
        missing = [shard for shard in missing if (place, samples.shard_ids[shard]) not in foreseen]
        foreseen |= {(place, samples.shard_ids[shard]) for shard in missing}
        found.append(
            LabelForecast(
                teacher=who(setting).removeprefix("the teacher "),
                images=len(samples),
                shards=len(samples.shard_ids),
                missing=len(missing),
                missing_images=int(samples.shard_sizes[missing].sum()),
                views=stored.views,
                epochs=node.settings.epochs,
                bytes_per_view=bytes_per_view(len(members.plan.data.classes), stored.top_k),
                size=known[1].teacher.spec.size if known else None,
                directory=known[0].directory if known else None,
                why_unknown=f"after {', '.join(first)}" if first else "",
            )
        )
    return tuple(found)
