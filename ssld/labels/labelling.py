"""Asks a teacher about every view of every image, shard by shard, and commits the answers."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice

import numpy as np

from ssld.contracts import Teacher
from ssld.data.loader import Batch, Damage, view_batches
from ssld.data.samples import Samples, digest
from ssld.errors import Interrupted
from ssld.labels.format import Packed, damaged, pack
from ssld.labels.store import Probe, Store
from ssld.teaching.asking import ask

BATCH = 64


@dataclass(frozen=True)
class Work:
    """How a labelling goes about, besides what it makes.

    damage: of the whole set; stop(): the number of the signal that asks to end, or None; progress(done, total): views.
    """

    damage: Damage
    stop: Callable[[], int | None] = lambda: None
    progress: Callable[[int, int], None] = lambda done, total: None


@dataclass
class _Meter:
    """How far a labelling is, in views."""

    work: Work
    total: int
    done: int = 0

    def go_on(self) -> None:
        """Raise Interrupted when a signal came."""
        if number := self.work.stop():
            at = f"after {self.done} of {self.total} views"
            raise Interrupted(f"labelling: stopped {at}; whole shards are kept", 128 + number)

    def reach(self, done: int) -> None:
        self.done = done
        self.work.progress(done, self.total)


def label(store: Store, teacher: Teacher, samples: Samples, shards: Sequence[int], work: Work) -> int:
    """Label these shards and return how many of them were written; another process may have been first.

    Raises TeacherError, with teacher, shard and key, when an answer cannot be used: nothing is stored of that shard.
    Raises Interrupted when a signal came: what is committed stays.
    """
    store.begin()
    ends = np.cumsum(samples.shard_sizes[list(shards)]) * store.description.replay.views
    meter, written = _Meter(work, int(ends[-1])), 0
    for place, (shard, end) in enumerate(zip(shards, ends, strict=True)):
        if not store.file(samples, shard).exists():
            packed, probe = _label_shard(store, teacher, samples, shard, meter)
            written += store.commit(samples, shard, packed, probe, len(shards) - place)
        meter.reach(int(end))
    return written


def part(shards: Sequence[int], number: int, of: int) -> list[int]:
    """The static slice `number` (from 1) of `of` slices: every of-th shard."""
    return list(islice(shards, number - 1, None, of))


def _label_shard(
    store: Store, teacher: Teacher, samples: Samples, shard: int, meter: _Meter
) -> tuple[Packed, Probe | None]:
    about = store.description
    start, stop = (int(border) for border in samples.borders[shard : shard + 2])
    packed = damaged((stop - start, about.replay.views), len(about.classes), about.top_k)
    probe = None
    damage = meter.work.damage
    with closing(answers(store, teacher, samples, range(start, stop), damage, meter.go_on)) as found:
        for batch, logits in found:
            rows = batch.indices - start, batch.views
            answer = pack(logits, about.top_k, about.temperature)
            packed.ids[rows], packed.codes[rows], packed.rest[rows] = answer.ids, answer.codes, answer.rest
            probe = probe or Probe(int(rows[0][0]), digest(batch.images[0][0]), digest(logits[0]))
            meter.reach(meter.done + len(logits))
    return packed, probe


def answers(
    store: Store,
    teacher: Teacher,
    samples: Samples,
    indices: Sequence[int],
    damage: Damage,
    go_on: Callable[[], None] = lambda: None,
) -> Generator[tuple[Batch, np.ndarray], None, None]:
    """Batches of views of these samples, and the teacher's logits for each; go_on(): may raise to end it."""
    about = store.description
    batches = view_batches(samples, about.pipeline, about.replay, batch_size=BATCH, indices=indices, damage=damage)
    with closing(batches):
        for batch in batches:
            # before the teacher is asked: after its last answer the shard is committed, whatever comes
            go_on()
            names = [samples.where(int(index)) for index in batch.indices]
            yield batch, ask(teacher, batch.images[0], len(about.classes), about.who, names)
