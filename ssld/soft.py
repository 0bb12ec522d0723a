"""The soft labels of a stage: from teachers that are asked in every step, or from a store that is filled first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ssld.contracts import Ranks, Reference, SoftLabels
from ssld.data.loader import Damage
from ssld.data.samples import Samples
from ssld.graph import Node
from ssld.journal import Journal
from ssld.labels.labelling import Work, label, part
from ssld.labels.reader import Reader, StoredLabels
from ssld.labels.store import Store
from ssld.members import Members
from ssld.needs import temperature
from ssld.teaching.asking import Member, OnlineLabels, Quality, expect_better_than_chance, quality, together
from ssld.threads import shared_by


@dataclass(frozen=True)
class Labelled:
    """What one call has done for a stage's labels by one teacher: shards written, and those that are still missing."""

    stage: str
    who: str
    written: int
    missing: int
    directory: Path


@dataclass(frozen=True)
class SoftSource:
    """Makes what is missing; stop(): the number of the signal that asks to end, or None."""

    members: Members
    journal: Journal
    stop: Callable[[], int | None]
    checked: set[Path] = field(default_factory=set)
    """Where the labels of the teachers lie that were measured already: once is enough for all stages."""

    def check(self, node: Node) -> None:
        """Measure each teacher of a stage on validation images, by labels that are kept for later.

        Raises TeacherError for answers of the wrong form, and for a teacher that is no better than chance.
        """
        options = self.members.options
        for store, member in self.members.tested_stores(node, self.members.of(node)):
            if store.directory in self.checked:
                continue
            self.checked.add(store.directory)
            found = self._quality(node, (member,))
            self.journal.record("teacher", who=member.who, **vars(found))
            # a smoke run is about the way, not about the result
            if not (options.trust_teacher or options.limit):
                expect_better_than_chance(found, member.who)
            engine = member.teacher.spec.engine
            self.journal.note(f"{member.who}{f', run by {engine}' if engine else ''}: {found}")

    def labels(self, node: Node) -> SoftLabels:
        """The soft labels of a stage's data; where they are kept, what is missing is made now."""
        settings, classes = node.settings, len(self.members.plan.data.classes)
        samples, budget = self._data(node)
        if settings.stored is None:
            return OnlineLabels(self.members.of(node), samples, classes, temperature(settings))
        return self._complete(self.members.stores(node), samples, budget)

    def label(self, node: Node, number: int, of: int) -> list[Labelled]:
        """Make what is missing of the static slice `number` (from 1) of `of` slices of a stage's shards."""
        samples, _ = self._data(node)
        mine = set(part(range(len(samples.shard_ids)), number, of))
        lacking = [[shard for shard in shards if shard in mine] for shards in self.lacking(node)]
        return self._label(node, lacking, f", part {number} of {of}" if of > 1 else "")

    def lacking(self, node: Node) -> list[list[int]]:
        """The shards of a stage's data without labels, for each teacher; damaged files are named and removed."""
        samples, _ = self._data(node)
        return [self._opened(store, samples).lacking for store, _ in self.members.stores(node)]

    def label_together(self, node: Node, shards: Sequence[Sequence[int]], ranks: Ranks) -> None:
        """Make this rank's slice of the shards that all ranks were told, for each teacher."""
        slices = [part(each, ranks.number + 1, ranks.count) for each in shards]
        self._label(node, slices, f", rank {ranks.number}'s part of {ranks.count}")

    def _label(self, node: Node, shards: Sequence[Sequence[int]], share: str) -> list[Labelled]:
        samples, budget = self._data(node)
        done = []
        for (store, member), wanted in zip(self.members.stores(node), shards, strict=True):
            written = self._make(store, member, samples, wanted, budget, share)
            done.append(Labelled(node.name, member.who, written, len(store.missing(samples)), store.directory))
        return done

    def _data(self, node: Node) -> tuple[Samples, int]:
        """What a stage trains on, and how many of its images may be damaged."""
        data, names = self.members.plan.data, node.settings.data
        return data.named(names), data.damage_budget(names)

    def reference(self, node: Node) -> Reference:
        """What the student is compared with at every evaluation."""
        data, members = self.members.plan.data, self.members.of(node)
        found, samples = self._quality(node, members), data.compared
        budget = data.damage_budget(("held out",)) if samples.labels is None else 0
        labels = self._complete(self.members.tested_stores(node, members), samples, budget)
        return Reference(samples, labels.at_test_time, found.accuracy, found.chance, budget)

    def _quality(self, node: Node, members: Sequence[Member]) -> Quality:
        samples = self.members.plan.data.checked
        assert samples.labels is not None, "validation sets are opened with labels"
        labels = self._complete(self.members.tested_stores(node, members), samples, 0)
        return quality(labels.at_test_time(np.arange(len(samples))), samples.labels)

    def _complete(self, stores: Sequence[tuple[Store, Member]], samples: Samples, budget: int) -> StoredLabels:
        """The labels of a set, by every teacher, after what was missing or damaged has been made."""
        readers = tuple((self._reader(store, member, samples, budget), member.weight) for store, member in stores)
        return StoredLabels(together([member for _, member in stores]), readers)

    def _reader(self, store: Store, member: Member, samples: Samples, budget: int) -> Reader:
        reader = self._opened(store, samples)
        lacking = reader.lacking
        # the other ranks wait until all labels are there
        with shared_by(1):
            self._make(store, member, samples, lacking, budget)
        for fault in reader.open(lacking).values():
            raise fault
        return reader

    def _opened(self, store: Store, samples: Samples) -> Reader:
        """The labels that are there; damaged files are named and removed."""
        reader = Reader(store, samples)
        for shard, fault in reader.open_present().items():
            self.journal.note(f"warning: {fault}")
            store.drop_damaged(samples, shard)
        reader.expect_same_views()
        return reader

    def _make(
        self, store: Store, member: Member, samples: Samples, shards: Sequence[int], budget: int, share: str = ""
    ) -> int:
        if not shards:
            return 0
        with self.journal.labelling(f"labelling {samples.name} by {member.who}{share}") as progress:
            work = Work(Damage(budget, self.journal.met), self.stop, progress)
            return label(store, member.teacher, samples, shards, work)
