"""Folders of images, and list files in PaddleClas's format, as samples."""

from __future__ import annotations

import os
from array import array
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ssld.data.classes import check_range, read_classes
from ssld.data.facts import changed, expect_file, kind, text
from ssld.data.index import IMAGE_EXTENSIONS, Strings
from ssld.data.samples import Samples, digest, virtual_shards
from ssld.errors import DataError

_IMAGES = f"(.{', .'.join(IMAGE_EXTENSIONS)})"
_SHOWN = 3


@dataclass(frozen=True, eq=False)
class _Files:
    """A store of image files: paths relative to a root; sizes in bytes and mtimes in nanoseconds, int64 [N]."""

    root: str
    names: Strings
    sizes: np.ndarray
    mtimes: np.ndarray

    def key(self, row: int) -> str:
        # without the virtual shard, so that a new image does not give all later ones another name
        return text(self.names[row])

    def where(self, row: int) -> str:
        return text(os.fsencode(self._path(row)))

    def read(self, row: int) -> bytes:
        size, mtime = int(self.sizes[row]), int(self.mtimes[row])
        try:
            with open(self._path(row), "rb") as file:
                data = file.read(size + 1)
                facts = os.fstat(file.fileno())  # after it was read, so that no change goes unseen in between
        except OSError as error:
            raise DataError(f"{self.where(row)}: expected an image file, got: {error.strerror}; restore it") from error
        if (len(data), facts.st_size, facts.st_mtime_ns) != (size, size, mtime):
            raise changed(self.where(row), size, mtime, facts)
        return data

    def stamp(self, rows: np.ndarray) -> str:
        names = self.names.at(rows)
        return digest("files", names.blob, names.ends, self.sizes[rows], self.mtimes[rows])

    def _path(self, row: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.names[row]))


@dataclass
class _Columns:
    """Files on the way to a store; arrays of the standard library, because they grow at 8 bytes a number."""

    names: list[bytes] = field(default_factory=list)
    sizes: array[int] = field(default_factory=lambda: array("q"))
    mtimes: array[int] = field(default_factory=lambda: array("q"))

    def add(self, name: str, facts: os.stat_result, where: str) -> None:
        """One more; raises DataError, by its place, for what is no file."""
        expect_file(facts, where)
        self.names.append(os.fsencode(name))
        self.sizes.append(facts.st_size)
        self.mtimes.append(facts.st_mtime_ns)

    def samples(self, name: str, root: str, classes: tuple[str, ...] | None, labels: np.ndarray | None) -> Samples:
        names, sizes, mtimes = Strings.of(self.names), np.array(self.sizes), np.array(self.mtimes)
        return Samples(
            name=name,
            classes=classes,
            identity=digest("files", names.blob, names.ends, sizes, mtimes, labels, classes),
            shard_sizes=virtual_shards(len(names)),
            labels=labels,
            store=_Files(root, names, sizes, mtimes),
            rows=np.arange(len(names)),
        )


def open_folder(name: str, root: Path, labeled: bool) -> Samples:
    """All images below a folder; where labeled, its sub-folders are the classes. Raises DataError, or OSError."""
    if not root.is_dir():
        raise DataError(f"{name}: expected a folder, got a file; name its kind with {{list: …}} or {{shards: …}}")
    columns = _Columns()
    if not labeled:
        _scan(str(root), "", columns, frozenset())
        if not columns.names:
            raise DataError(f"{name}: expected images {_IMAGES}, got a folder without any, at any depth")
        return columns.samples(name, str(root), None, None)
    folders, counts = _class_folders(name, root), []
    for folder in folders:
        before = len(columns.names)
        _scan(str(root / folder), folder + "/", columns, frozenset())
        counts.append(len(columns.names) - before)
    if not all(counts):
        empty = folders[counts.index(0)]
        raise DataError(
            f"{name}: expected images {_IMAGES} of class {empty!r}, got none; add some, or remove the folder"
        )
    labels = np.repeat(np.arange(len(folders)), counts)
    return columns.samples(name, str(root), tuple(text(os.fsencode(folder)) for folder in folders), labels)


def _class_folders(name: str, root: Path) -> list[str]:
    entries = [entry for entry in sorted(os.scandir(root), key=lambda entry: entry.name) if entry.name[0] != "."]
    folders = [entry.name for entry in entries if entry.is_dir()]
    loose = [entry.name for entry in entries if is_image(entry.name) and not entry.is_dir()]
    if not folders:
        raise DataError(f"{name}: expected one sub-folder per class, got {len(loose)} images and no sub-folder")
    if loose:
        raise DataError(
            f"{name}: expected images in class folders only, got {len(loose)} beside them, first {loose[0]}; "
            "move them into the folder of their class"
        )
    return folders


def _scan(folder: str, prefix: str, columns: _Columns, above: frozenset[tuple[int, int]]) -> None:
    """Add the images of a folder, sorted, at any depth; links are followed, hidden names skipped."""
    facts = os.stat(folder)
    here = (facts.st_dev, facts.st_ino)
    if here in above:
        raise DataError(f"{folder}: expected folders, got a link to a folder above it; remove the link")
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name[0] == ".":
            continue
        if entry.is_dir():
            _scan(entry.path, f"{prefix}{entry.name}/", columns, above | {here})
        elif is_image(entry.name):
            columns.add(prefix + entry.name, entry.stat(), entry.path)


def is_image(name: str) -> bool:
    """Whether a file is taken for an image, by its name."""
    return name.lower().endswith(tuple(f".{extension}" for extension in IMAGE_EXTENSIONS))


def open_list(name: str, file: Path, root: Path, classes_file: Path | None, labeled: bool) -> Samples:
    """The images that a list file names below a root, in its order. Raises DataError, or OSError."""
    base = str(root)
    numbers, labels = _read_list(file, labeled)
    columns, missing = _Columns(), []
    for path, number in numbers.items():
        try:
            columns.add(path, os.stat(os.path.join(base, path)), f"{file}:{number}: {path}")
        except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: the line holds a zero byte
            missing.append(path)
    if missing:
        lines = ", ".join(f"line {numbers[path]}: {text(os.fsencode(path))}" for path in missing[:_SHOWN])
        raise DataError(
            f"{file}: expected every file of the list below {base}, got {len(missing)} of {len(numbers)} missing "
            f"({lines}{', …' if len(missing) > _SHOWN else ''}); correct the list, or give its root"
        )
    if labels is None:
        return columns.samples(name, base, None, None)
    classes = read_classes(classes_file) if classes_file else None
    where = list(numbers.values())
    check_range(labels, classes, classes_file, lambda i: f"{file}:{where[i]}")
    return columns.samples(name, base, classes, labels)


def _read_list(file: Path, labeled: bool) -> tuple[dict[str, int], np.ndarray | None]:
    """Path to line number, in the order of the list, and the labels."""
    if not file.is_file():
        got = kind(file.stat())
        raise DataError(f"{file}: expected a list file, got {got}; a folder of images is named as {{folder: …}}")
    numbers: dict[str, int] = {}
    labels = array("q")
    with file.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
        for number, line in enumerate(map(str.strip, lines), 1):
            if not line:
                continue
            # a path may hold spaces, so a line that ends as an image does has no label
            words = [line] if is_image(line) else line.rsplit(None, 1)
            path, label = words if len(words) == 2 else (line, "")
            if path in numbers:
                raise DataError(f"{file}:{number}: expected each file once, got {path} as in line {numbers[path]}")
            numbers[path] = number
            if labeled:
                labels.append(_label(label, f"{file}:{number}"))
    if not numbers:
        raise DataError(f"{file}: expected lines `path label`, got none")
    return numbers, np.array(labels) if labeled else None


def _label(word: str, where: str) -> int:
    if not word:
        raise DataError(f"{where}: expected `path label`, got no label; add it, or use the list as unlabeled data")
    if not (word.isascii() and word.isdigit() and len(word) < 10):
        raise DataError(f"{where}: expected a label, a whole number from 0 on, got {word!r}; correct it")
    return int(word)
