"""What lies where in a tar shard: read from its headers once, kept in a cache or beside the shards, read by offset."""

from __future__ import annotations

import hashlib
import io
import os
import re
import tarfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ssld.data.facts import changed, text
from ssld.data.samples import digest
from ssld.errors import DataError, OutputError, StorageError
from ssld.files import ABANDONED, sweep_old, write_atomic

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
SIDECAR = "shards.index"
"""The file beside the shards that holds the index of them all."""
NO_LABEL, BAD_LABEL = -1, -2
"""Stand in the label column for a sample without a .cls member, and for one that is not a whole number >= 0."""

_MAGIC = b"ssld index 1\n"
_RULES = 2
"""Goes up when the same shard has another index than before, or none, so that those in the cache are made anew."""
_BLOCK = 512
_RECORD = 20 * _BLOCK
"""What tar, tarfile and webdataset fill the end of a tar up to."""
_LABEL = re.compile(rb"\s*(\d{1,9})\s*", re.ASCII)
_MAX_LABEL = 10**9 - 1
_LONGEST_LABEL = 64
"""Bytes of a .cls member: nine digits, and whatever space stands around them."""


@dataclass(frozen=True, eq=False)
class Strings:
    """A list of names in one piece of memory: a million small Python objects would take ten times as much.

    blob: all names, end to end; ends: int64 [N], where each one ends.
    """

    blob: bytes
    ends: np.ndarray

    @classmethod
    def of(cls, names: Sequence[bytes]) -> Strings:
        return cls(b"".join(names), np.cumsum([len(name) for name in names], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> bytes:
        return self.blob[self.ends[i - 1] if i else 0 : self.ends[i]]

    def at(self, rows: np.ndarray) -> Strings:
        """The names in these rows, at least one."""
        first, last = int(rows[0]), int(rows[-1])
        if last - first == len(rows) - 1 and np.all(np.diff(rows) == 1):
            return self.part(first, last + 1)
        return Strings.of([self[row] for row in rows])

    def part(self, start: int, stop: int) -> Strings:
        """The names from start to stop."""
        first = int(self.ends[start - 1]) if start else 0
        ends = self.ends[start:stop] - first
        return Strings(self.blob[first : first + int(ends[-1])], ends)


@dataclass(frozen=True, eq=False)
class Index:
    """The samples of one or more shards, in order.

    shards: file names; lengths: int64 [S], bytes in each; counts: int64 [S], samples in each.
    members: names of the image members [N]; offsets, sizes: int64 [N], where their bytes lie in the shard.
    labels: int64 [N], with NO_LABEL and BAD_LABEL.
    """

    shards: tuple[str, ...]
    lengths: np.ndarray
    counts: np.ndarray
    members: Strings
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray

    def part(self, shard: int) -> Index:
        """The index of one shard."""
        stop = int(self.counts[: shard + 1].sum())
        rows = slice(stop - int(self.counts[shard]), stop)
        one = slice(shard, shard + 1)
        members = self.members.part(rows.start, rows.stop)
        columns = (self.offsets[rows], self.sizes[rows], self.labels[rows])
        return Index(self.shards[one], self.lengths[one], self.counts[one], members, *columns)

    def encode(self) -> bytes:
        """The index as bytes: a magic line, the sha256 of the rest, and the columns as an .npz archive."""
        buffer = io.BytesIO()
        np.savez(
            buffer,
            shards=np.frombuffer("\0".join(self.shards).encode("utf-8", "surrogateescape"), np.uint8),
            blob=np.frombuffer(self.members.blob, np.uint8),
            ends=self.members.ends,
            **{name: getattr(self, name) for name in ("lengths", "counts", "offsets", "sizes", "labels")},
        )
        return _MAGIC + hashlib.sha256(buffer.getvalue()).digest() + buffer.getvalue()


def decode_index(data: bytes) -> Index | None:
    """What `encode` wrote, or None for any other bytes.

    A sidecar comes with the data, so one that is whole may still have been made by anybody, to any end.
    """
    start = len(_MAGIC) + 32
    if data[:start] != _MAGIC + hashlib.sha256(data[start:]).digest():
        return None
    try:
        columns = _arrays(data[start:])
        shards = columns.pop("shards").tobytes().decode("utf-8", "surrogateescape").split("\0")
        members = Strings(columns.pop("blob").tobytes(), columns.pop("ends"))
        index = Index(shards=tuple(shards), members=members, **columns)
        return index if _sound(index) else None
    except (ValueError, KeyError, TypeError, IndexError, OSError, EOFError, MemoryError, zipfile.BadZipFile):
        return None


def _arrays(data: bytes) -> dict[str, np.ndarray]:
    """The columns in an .npz archive, in which nothing is compressed. Raises ValueError where something is."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED or member.file_size > len(data) for member in members):
        raise ValueError("expected an index that is not compressed")
    return dict(np.load(io.BytesIO(data), allow_pickle=False))


def _sound(index: Index) -> bool:
    """Whether the columns fit each other, and every image lies in its shard."""
    ends, counts, columns = index.members.ends, index.counts, (index.offsets, index.sizes, index.labels)
    shapes = [column.shape == ends.shape for column in columns] + [counts.shape == index.lengths.shape]
    kinds = [array.dtype == np.int64 and array.ndim == 1 for array in (ends, counts, index.lengths, *columns)]
    if not all(shapes + kinds) or len(index.shards) != len(counts) or counts.min(initial=1) < 1:
        return False
    if counts.max(initial=0) > len(ends) or counts.sum() != len(ends) or not len(ends):
        return False
    if ends[0] < 0 or np.any(np.diff(ends) < 0) or ends[-1] != len(index.members.blob):
        return False
    room = np.repeat(index.lengths, counts) - index.offsets
    inside = (index.offsets >= 0) & (index.sizes >= 0) & (index.sizes <= room)
    return bool(inside.all() and index.labels.min() >= BAD_LABEL and index.labels.max() <= _MAX_LABEL)


def join(parts: Sequence[Index]) -> Index:
    """One index of several, in order."""
    starts = np.cumsum([0, *(len(part.members.blob) for part in parts)])
    ends = [part.members.ends + start for part, start in zip(parts, starts[:-1], strict=True)]
    columns = ("lengths", "counts", "offsets", "sizes", "labels")
    return Index(
        shards=tuple(shard for part in parts for shard in part.shards),
        members=Strings(b"".join(part.members.blob for part in parts), np.concatenate(ends)),
        **{name: np.concatenate([getattr(part, name) for part in parts]) for name in columns},
    )


class Shards:
    """A store of tar members, read by offset; a file is opened per read, so threads share nothing."""

    def __init__(self, paths: Sequence[Path], names: Sequence[str], index: Index, mtimes: np.ndarray) -> None:
        """names: of the shards, for keys; mtimes: int64 [S], in nanoseconds, from before the index was read."""
        self._paths, self._names, self._index, self._mtimes = paths, names, index, mtimes
        self._ends = np.cumsum(index.counts)

    def _shard(self, row: int) -> int:
        return int(np.searchsorted(self._ends, row, side="right"))

    def key(self, row: int) -> str:
        member = text(self._index.members[row])
        return f"{self._names[self._shard(row)]}/{split_name(member)[0]}"

    def where(self, row: int) -> str:
        return f"{self._paths[self._shard(row)].name}: {text(self._index.members[row])}"

    def read(self, row: int) -> bytes:
        shard = self._shard(row)
        path, size = self._paths[shard], int(self._index.sizes[row])
        try:
            with path.open("rb", buffering=0) as file:
                data = os.pread(file.fileno(), size, int(self._index.offsets[row]))
                facts = os.fstat(file.fileno())  # after it was read, so that no change goes unseen in between
        except OSError as error:
            raise DataError(f"{self.where(row)}: expected to read {path}, got: {error.strerror}; restore it") from error
        length, mtime = int(self._index.lengths[shard]), int(self._mtimes[shard])
        if (len(data), facts.st_size, facts.st_mtime_ns) != (size, length, mtime):
            raise changed(f"{self.where(row)}: {path}", length, mtime, facts)
        return data

    def stamp(self, rows: np.ndarray) -> str:
        shards = np.unique(np.searchsorted(self._ends, rows, side="right"))
        members = self._index.members.at(rows)
        return digest(
            "shards",
            [(self._names[shard], int(self._index.lengths[shard]), int(self._mtimes[shard])) for shard in shards],
            members.blob,
            members.ends,
            self._index.offsets[rows],
            self._index.sizes[rows],
        )

    def label_text(self, row: int) -> str:
        """What the .cls member of a sample holds, in quotes, for messages."""
        key = split_name(text(self._index.members[row]))[0]
        with self._paths[self._shard(row)].open("rb") as shard, tarfile.open(fileobj=shard, mode="r:") as tar:
            members = (member for member in tar if split_name(text(os.fsencode(member.name))) == (key, "cls"))
            label = next(members)
            more = f"… of {label.size} bytes" if label.size > _LONGEST_LABEL else ""
            return repr(text(_label_bytes(shard, label))) + more


def load_index(paths: Sequence[Path], cache: Path) -> Index:
    """The index of these shards: from the sidecar where it fits, else from the cache, else from their headers.

    Raises DataError for a shard that is no whole tar of samples, OutputError or StorageError when the cache cannot be
    written, and OSError when a file cannot be read.
    """
    sidecars = {folder: _read(folder / SIDECAR) for folder in {path.parent for path in paths}}
    places = {
        (folder, shard): number
        for folder, sidecar in sidecars.items()
        if sidecar is not None
        for number, shard in enumerate(sidecar.shards)
    }
    sweep_old(cache, ABANDONED)
    parts = []
    for path in paths:
        sidecar, number = sidecars[path.parent], places.get((path.parent, path.name))
        if sidecar is not None and number is not None and _describes(sidecar, number, path):
            parts.append(sidecar.part(number))
        else:
            parts.append(_cached(path, cache))
    return join(parts)


def _describes(sidecar: Index, number: int, shard: Path) -> bool:
    """Whether the shard is the one that was indexed, by its size and its time.

    Members are padded to whole blocks, so a shard with other labels has the same size, and the same headers too.
    """
    facts = shard.stat()
    indexed = (shard.parent / SIDECAR).stat().st_mtime_ns
    return bool(sidecar.lengths[number] == facts.st_size) and facts.st_mtime_ns <= indexed


def _cached(path: Path, cache: Path) -> Index:
    facts = path.stat()
    name = f"{path.absolute()}\0{facts.st_size}\0{facts.st_mtime_ns}\0{_RULES}".encode("utf-8", "surrogateescape")
    entry = cache / f"{hashlib.sha256(name).hexdigest()[:32]}.index"
    known = _read(entry)
    if known is not None:
        return known
    index = index_shard(path)
    try:
        # durable would be a sync for each of a thousand shards
        write_atomic(entry, index.encode(), durable=False)
    except (OutputError, StorageError) as error:
        raise type(error)(
            f"{error}; the index of {path.name} is kept there: point XDG_CACHE_HOME at a directory that can be written "
            "to keep it elsewhere"
        ) from error
    return index


def _read(path: Path) -> Index | None:
    return decode_index(path.read_bytes()) if path.is_file() else None


def index_shard(path: Path) -> Index:
    """The index of one tar shard, from its headers; nothing is decompressed or decoded.

    Raises DataError, naming the shard and the sample, for what is compressed, cut short or no tar, and for samples
    without an image, with a member given twice or that is a link, or with members that are not side by side; OSError
    where there is no file to be opened.
    """
    with path.open("rb") as shard:
        length = os.fstat(shard.fileno()).st_size
        try:
            _check_whole(path, shard, length)
            with tarfile.open(fileobj=shard, mode="r:") as tar:
                rows = list(_samples(path, shard, tar))
                _check_tail(path, shard, tar.offset, length)
        except (tarfile.TarError, OSError) as error:
            raise DataError(f"{path}: expected a whole, uncompressed tar shard, got: {error}; copy it again") from error
    if not rows:
        raise DataError(f"{path}: expected samples, got a tar without any; remove it from the source")
    names, offsets, sizes, labels = zip(*rows, strict=True)
    columns = (np.array(column, np.int64) for column in (offsets, sizes, labels))
    return Index((path.name,), np.array([length]), np.array([len(rows)]), Strings.of(names), *columns)


def _check_whole(path: Path, shard: BinaryIO, length: int) -> None:
    if shard.read(2) == b"\x1f\x8b":
        raise DataError(
            f"{path}: expected an uncompressed tar, got gzip; unpack it with `gunzip` (images gain nothing)"
        )
    end = os.pread(shard.fileno(), 2 * _BLOCK, max(length - 2 * _BLOCK, 0))
    if length % _BLOCK or end != bytes(2 * _BLOCK):
        raise DataError(
            f"{path}: expected a tar that ends in two empty blocks, got {length} bytes without them; "
            "it was cut short, or is no tar: copy it again"
        )
    shard.seek(0)


def _check_tail(path: Path, shard: BinaryIO, end: int, length: int) -> None:
    # tarfile takes a damaged header for the end of the archive, and so loses what follows without a word
    shard.seek(end)
    if shard.read(_RECORD + _BLOCK).strip(b"\0") or length - end > _RECORD + _BLOCK:
        raise DataError(
            f"{path}: expected nothing after the last member at byte {end}, got {length - end} bytes more; a header "
            "is damaged, a copy broke off, or two tars were joined: copy it again, or write it anew with `ssld pack`"
        )


def _samples(path: Path, shard: BinaryIO, tar: tarfile.TarFile) -> Iterator[tuple[bytes, int, int, int]]:
    seen: set[str] = set()
    for key, group in groupby(_members(path, tar), key=lambda member: split_name(member.name)[0]):
        if key in seen:
            raise DataError(
                f"{path.name}: {key}: expected the members of a sample side by side, got this key a second time; "
                "two samples share it, or the tar is not sorted: write it anew with `tar --sort=name` or `ssld pack`"
            )
        seen.add(key)
        yield _sample(f"{path.name}: {key}", shard, list(group))


def _members(path: Path, tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for member in iter(tar.next, None):
        tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every header it has seen
        if member.issparse():
            raise DataError(f"{path}: {member.name}: expected a whole file, got one with holes; pack without --sparse")
        if member.islnk() or member.issym():
            _expect_no_sample(path, member)
        if member.isreg() and all(split_name(member.name)):
            yield member


def _expect_no_sample(path: Path, link: tarfile.TarInfo) -> None:
    # tar writes one by itself for each further name of a file, and the sample of that name would be lost
    key, extension = split_name(link.name)
    if key and extension in (*IMAGE_EXTENSIONS, "cls"):
        kind, option = ("hard", "--hard-dereference") if link.islnk() else ("symbolic", "--dereference")
        raise DataError(
            f"{path}: {text(os.fsencode(link.name))}: expected a file, got a {kind} link at byte {link.offset}; write "
            f"the shard anew with `tar {option}` or `ssld pack`"
        )


def split_name(member: str) -> tuple[str, str]:
    """(key, extension) as webdataset has it: split at the first dot of the last path part; "" for a hidden name.

    >>> split_name("train/000123.seg.PNG")
    ('train/000123', 'seg.png')
    """
    folder, slash, name = member.rpartition("/")
    stem, _, extension = name.partition(".")
    return (folder + slash + stem if stem else "", extension.lower())


def _sample(where: str, shard: BinaryIO, members: Iterable[tarfile.TarInfo]) -> tuple[bytes, int, int, int]:
    found: dict[str, tarfile.TarInfo] = {}
    for member in members:
        extension = split_name(member.name)[1]
        if extension in found:
            raise DataError(
                f"{where}: expected one member .{extension}, got two; two samples share the key: rename one"
            )
        found[extension] = member
    images = [found[extension] for extension in IMAGE_EXTENSIONS if extension in found]
    if len(images) != 1:
        raise DataError(
            f"{where}: expected one image (.{', .'.join(IMAGE_EXTENSIONS)}), got {len(images)} among the members "
            f".{', .'.join(found)}; put the members of a sample side by side, with one image in each"
        )
    label = NO_LABEL
    if "cls" in found:
        match = _LABEL.fullmatch(_label_bytes(shard, found["cls"]))
        label = int(match[1]) if match and found["cls"].size <= _LONGEST_LABEL else BAD_LABEL
    return images[0].name.encode("utf-8", "surrogateescape"), images[0].offset_data, images[0].size, label


def _label_bytes(shard: BinaryIO, label: tarfile.TarInfo) -> bytes:
    return os.pread(shard.fileno(), min(label.size, _LONGEST_LABEL), label.offset_data)
