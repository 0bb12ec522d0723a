"""The images that a stage reads; where their bytes come from is a store's affair."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Protocol

import numpy as np

from ssld.errors import DataError, RecipeError
from ssld.seeds import generator

VIRTUAL_SHARD = 1000
"""Samples in a shard of a source that has no shards of its own."""


class Store(Protocol):
    """Where samples come from, by row number; key, where and read are called from several threads at once."""

    def key(self, row: int) -> str: ...

    def where(self, row: int) -> str: ...

    def read(self, row: int) -> bytes | np.ndarray: ...

    def stamp(self, rows: np.ndarray) -> str:
        """A hash of keys, sizes and times of these rows: the same as long as their bytes are; labels do not count."""
        ...


@dataclass(frozen=True, eq=False)
class Samples:
    """What a stage reads; it never changes.

    name: the source as the user gave it, for messages.
    classes: names in label order, or None where the source names none.
    identity: sha256, hexadecimal, over all that identifies the data: names, sizes, mtimes, labels, the subset chosen.
    shard_sizes: int64 [S], samples in each shard, in order; their sum is the number of samples.
    labels: int64 [N], or None where unlabeled.
    store, rows: where the bytes are, and int64 [N], the row of the store that each sample is.
    """

    name: str
    classes: tuple[str, ...] | None
    identity: str
    shard_sizes: np.ndarray
    labels: np.ndarray | None
    store: Store
    rows: np.ndarray

    def __post_init__(self) -> None:
        for array in (self.shard_sizes, self.labels, self.rows):
            if array is not None:
                array.flags.writeable = False

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def borders(self) -> np.ndarray:
        """int64 [S + 1]: shard s holds the samples from borders[s] to borders[s + 1]."""
        return np.append(0, np.cumsum(self.shard_sizes))

    @cached_property
    def shard_ids(self) -> tuple[str, ...]:
        """What each shard is, whatever set it is part of: a hash of its keys and of what its bytes are known by."""
        return tuple(self.store.stamp(self.rows[start:stop]) for start, stop in pairwise(self.borders))

    def key(self, i: int) -> str:
        """The name of sample i, unique in its source: what its random draws depend on."""
        return self.store.key(int(self.rows[i]))

    def where(self, i: int) -> str:
        """The place of sample i for messages: a file path, or "pool-000003.tar: 000123.jpg"."""
        return self.store.where(int(self.rows[i]))

    def read(self, i: int) -> bytes | np.ndarray:
        """The encoded image, or uint8 [H, W, 3] from a built-in source; thread-safe.

        Raises DataError that names `where(i)` when the file is gone, damaged or not what was indexed.
        """
        return self.store.read(int(self.rows[i]))

    def subset(self, indices: np.ndarray) -> Samples:
        """The samples at these distinct positions, in the order given.

        Shards stay what they are while the order follows them (those left empty are dropped), else the choice is cut
        into virtual shards. Raises IndexError for a position outside the set, ValueError for one given twice.
        """
        indices = np.asarray(indices, dtype=np.int64)
        if indices.size and (indices.min() < 0 or indices.max() >= len(self)):
            raise IndexError(f"expected positions in [0, {len(self)}), got {indices.min()} to {indices.max()}")
        if len(np.unique(indices)) < len(indices):
            raise ValueError(f"expected distinct positions in {self.name}, got some of them twice")
        shards = np.searchsorted(np.cumsum(self.shard_sizes), indices, side="right")
        follows = bool(np.all(np.diff(shards) >= 0))
        return replace(
            self,
            identity=digest("subset", self.identity, indices),
            shard_sizes=np.unique(shards, return_counts=True)[1] if follows else virtual_shards(len(indices)),
            labels=None if self.labels is None else self.labels[indices],
            rows=self.rows[indices],
        )

    def regrouped(self) -> Samples:
        """The same samples in virtual shards."""
        return replace(self, shard_sizes=virtual_shards(len(self)))

    def hold_out(self, share: float) -> tuple[Samples, Samples]:
        """(rest, held out): about `share` of every shard, chosen by what the shard is.

        So a set that grows by some shards keeps the choice in those that it had, and with it their soft labels.
        """
        chosen = np.zeros(len(self), bool)
        for shard, (start, stop) in zip(self.shard_ids, pairwise(self.borders), strict=True):
            rng = generator("held out", shard)
            count = int(share * (stop - start) + rng.random())
            chosen[start + rng.permutation(stop - start)[:count]] = True
        return self.subset(np.flatnonzero(~chosen)), self.subset(np.flatnonzero(chosen))

    def limited(self, count: int) -> Samples:
        """At most `count` samples, at random, evenly over the classes; a larger choice holds every smaller one."""
        if count < 1:
            raise RecipeError(f"expected a limit of at least 1 image for {self.name}, got {count}")
        if count >= len(self):
            return self
        return self.subset(np.sort(spread(self._strata(), "limited")[:count]))

    def split(self, fraction: float, seed: int) -> tuple[Samples, Samples]:
        """(rest, held out): the share held out of each class is `fraction` of it, to within one image.

        fraction: in (0, 1). Raises DataError when one of the two would be empty.
        """
        held = round(fraction * len(self))
        if not 0 < held < len(self):
            raise DataError(
                f"{self.name}: expected a split that leaves images on both sides, got {fraction} of {len(self)} "
                f"images, which is {held}; choose another fraction in (0, 1)"
            )
        shuffled = generator("split", seed).permutation(len(self))
        by_class = shuffled[np.argsort(self._strata()[shuffled], kind="stable")]
        # `held` of N positions, evenly spaced over the classes laid end to end
        chosen = np.diff(np.arange(len(self) + 1) * held // len(self)) > 0
        return self.subset(np.sort(by_class[~chosen])), self.subset(np.sort(by_class[chosen]))

    def _strata(self) -> np.ndarray:
        return np.zeros(len(self), np.int64) if self.labels is None else self.labels


class _Joined:
    """Several sets one after another; keys are those of the parts, so that draws and soft labels stay theirs."""

    def __init__(self, parts: Sequence[Samples]) -> None:
        self._parts = parts
        self._starts = np.cumsum([0, *map(len, parts)])

    def _locate(self, row: int) -> tuple[int, int]:
        part = int(np.searchsorted(self._starts, row, side="right")) - 1
        return part, row - int(self._starts[part])

    def key(self, row: int) -> str:
        part, i = self._locate(row)
        return self._parts[part].key(i)

    def where(self, row: int) -> str:
        part, i = self._locate(row)
        return self._parts[part].where(i)

    def read(self, row: int) -> bytes | np.ndarray:
        part, i = self._locate(row)
        return self._parts[part].read(i)

    def stamp(self, rows: np.ndarray) -> str:
        parts = np.searchsorted(self._starts, rows, side="right") - 1
        stamps = [
            self._parts[part].store.stamp(self._parts[part].rows[rows[parts == part] - self._starts[part]])
            for part in np.unique(parts)
        ]
        return stamps[0] if len(stamps) == 1 else digest("joined", *stamps)


def concatenate(parts: Sequence[Samples]) -> Samples:
    """One set of several, in order; labeled only where all parts are.

    Raises DataError when two parts name different classes, or a label lies outside the classes of another part.
    """
    if len(parts) == 1:
        return parts[0]
    labels = [part.labels for part in parts if part.labels is not None]
    return Samples(
        name=" + ".join(part.name for part in parts),
        classes=_common_classes(parts),
        identity=digest("concatenate", *(part.identity for part in parts)),
        shard_sizes=np.concatenate([part.shard_sizes for part in parts]),
        labels=np.concatenate(labels) if len(labels) == len(parts) else None,
        store=_Joined(parts),
        rows=np.arange(sum(map(len, parts))),
    )


def _common_classes(parts: Sequence[Samples]) -> tuple[str, ...] | None:
    first = next((part for part in parts if part.classes is not None), None)
    if first is None or first.classes is None:
        return None
    for part in parts:
        if part.classes is not None:
            same_classes(first.classes, part.classes, first.name, part.name)
        elif part.labels is not None and part.labels.max(initial=0) >= len(first.classes):
            raise DataError(
                f"{part.name}: expected labels below {len(first.classes)}, the number of classes in {first.name}, got "
                f"{part.labels.max()} at {part.where(int(part.labels.argmax()))}; correct it, or name its classes"
            )
    return first.classes


def same_classes(wanted: tuple[str, ...], got: tuple[str, ...], wanted_from: str, got_from: str) -> None:
    """Raise DataError unless both name the same classes in the same order."""
    if wanted == got:
        return
    at = next((i for i, (a, b) in enumerate(zip(wanted, got, strict=False)) if a != b), min(len(wanted), len(got)))
    here, there = (repr(names[at]) if at < len(names) else "no more classes" for names in (wanted, got))
    reordered = "they are the same names in another order; " if sorted(wanted) == sorted(got) else ""
    raise DataError(
        f"{got_from}: expected the {len(wanted)} classes of {wanted_from}, got {len(got)}; the first difference is at "
        f"label {at}: expected {here}, got {there}; {reordered}give both the same class names in the same order"
    )


def spread(labels: np.ndarray, *seed: object) -> np.ndarray:
    """Positions int64 [N] in a random order that goes round the classes, so that every prefix is balanced.

    >>> spread(np.array([0, 0, 0, 1]), "demo")[:2].tolist().count(3)
    1
    """
    shuffled = generator("spread", *seed).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    _, counts = np.unique(labels, return_counts=True)
    turn = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return by_class[np.argsort(turn, kind="stable")]


def virtual_shards(count: int) -> np.ndarray:
    """Sizes int64 [S] of the shards that `count` samples are cut into; only the last may be smaller."""
    return np.diff(np.append(np.arange(0, count, VIRTUAL_SHARD), count))


def digest(*parts: object) -> str:
    """sha256, hexadecimal, over the parts: arrays by type and content, bytes as they are, all else by its repr."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            head, body = f"{part.dtype.str}{part.shape}".encode(), part.tobytes()
        else:
            head = type(part).__name__.encode()
            body = part if isinstance(part, bytes) else repr(part).encode("utf-8", "backslashreplace")
        total.update(b"%d %s %d " % (len(head), head, len(body)))
        total.update(body)
    return total.hexdigest()
