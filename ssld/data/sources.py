"""From what a recipe says of its data to samples: folders, PaddleClas list files, tar shards, built-in sets."""

from __future__ import annotations

import errno
import os
import re
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ssld.data.braces import expanded
from ssld.data.builtin import open_builtin
from ssld.data.index import BAD_LABEL, IMAGE_EXTENSIONS, Index, Shards, Strings, load_index, text
from ssld.data.samples import Samples, digest, virtual_shards
from ssld.errors import DataError, RecipeError
from ssld.wording import near

KINDS: Mapping[str, tuple[str, ...]] = {
    "folder": (),
    "list": ("root", "classes"),
    "shards": ("classes",),
    "builtin": (),
}
"""The kinds of source, and the keys that each may have beside its own."""
CLASSES_FILE = "classes.txt"

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_IMAGES = f"(.{', .'.join(IMAGE_EXTENSIONS)})"
_SHOWN = 3
_HINT = 200


def open_source(spec: str | Mapping[str, Any], *, labeled: bool, cache: Path | None = None) -> Samples:
    """The samples of a source.

    spec: a folder, a list file, shards such as "pool-{000000..000499}.tar", "builtin:NAME?key=value", or a mapping
    that names the kind: {folder: P}, {list: FILE, root: DIR, classes: FILE}, {shards: PATTERN, classes: FILE},
    {builtin: NAME}. labeled: whether labels are read; where not, neither labels nor class names are looked at.
    cache: where indexes of shards are kept; by default ssld/index in XDG_CACHE_HOME or ~/.cache.
    Raises RecipeError for a spec that says nothing known, DataError for data that are not what it says.
    """
    try:
        return _open(spec, labeled, cache or _default_cache())
    except OSError as error:
        todo = "give this user the right to read it" if isinstance(error, PermissionError) else "repair or remove it"
        place = text(os.fsencode(error.filename or str(spec)))
        raise DataError(f"{place}: expected to read it, got: {error.strerror or error}; {todo}") from error


def _open(spec: str | Mapping[str, Any], labeled: bool, cache: Path) -> Samples:
    name, kind, value, extra = _parse(spec)
    if kind == "builtin":
        return open_builtin(value, labeled=labeled)
    if kind == "folder":
        return _open_folder(name, _existing(value), labeled)
    classes = _path(extra["classes"]) if "classes" in extra else None
    if kind == "list":
        return _open_list(name, _existing(value), extra.get("root"), classes, labeled)
    return _open_shards(name, _expand(value), classes, labeled, cache)


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ssld" / "index"


def _path(value: str) -> Path:
    # unlike Path.expanduser, this leaves the home of a user who is not known as it is
    return Path(os.path.expanduser(value))


def _there(path: Path, test: Callable[[Path], bool] = Path.exists) -> bool:
    """Whether such a file is there: what is longer than any name, as braces and schemes may be, is none."""
    try:
        return test(path)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return False


def _parse(spec: str | Mapping[str, Any]) -> tuple[str, str, str, dict[str, str]]:
    """(name for messages, kind, value, the other keys)."""
    if isinstance(spec, str):
        return (spec, *_guess(spec), {})
    name = ", ".join(f"{key}: {value}" for key, value in spec.items())
    kinds = [kind for kind in KINDS if kind in spec]
    if len(kinds) != 1:
        got = " and ".join(kinds) or name or "nothing"
        unknown = next((str(key) for key in spec if key not in kinds), "")
        raise RecipeError(f"data source: expected exactly one kind, got {got}; {near(unknown, KINDS)}")
    known = (kinds[0], *KINDS[kinds[0]])
    for key, value in spec.items():
        if key not in known:
            raise RecipeError(f"{name}: expected keys of the kind {kinds[0]}, got {key}; {near(str(key), known)}")
        if not isinstance(value, str | os.PathLike):
            raise RecipeError(f"{name}: expected text for {key}, got {value!r}; write a path, in quotes if need be")
    values = {key: os.fspath(value) for key, value in spec.items()}
    if kinds[0] != "builtin":
        for value in values.values():
            _refuse_scheme(value)
    return name, kinds[0], values.pop(kinds[0]), values


def _guess(spec: str) -> tuple[str, str]:
    """(kind, value): a string is told apart by what it is."""
    if spec.startswith("builtin:"):
        return "builtin", spec.removeprefix("builtin:")
    _refuse_scheme(spec)
    path = _path(spec)
    if _there(path, Path.is_dir):
        shards = _shards_in(path)
        return ("shards", spec) if shards else ("folder", spec)
    if spec.endswith((".tar", ".tar.gz", ".tgz")) or ("{" in spec and not _there(path)):
        return "shards", spec
    return "list", spec


def _refuse_scheme(spec: str) -> None:
    match = _SCHEME.match(spec)
    if match and not _there(Path(spec)):
        raise RecipeError(
            f"{spec}: expected a folder, a list file, .tar shards or builtin:NAME, got the scheme {match[1][:20]}:; "
            "this version reads local paths only: copy the data to a local disk and give its path"
        )


def _existing(value: str) -> Path:
    path = _path(value)
    if path.exists():
        return path
    if path.parent.is_dir():
        hint = near(path.name, sorted(name for name in os.listdir(path.parent) if name[0] != "."))
        hint = hint if len(hint) <= _HINT else f"{hint[:_HINT]}…"
    else:
        hint = f"nor is {path.parent} there"
    raise DataError(f"{value}: expected a folder or a file, got nothing at {path.absolute()}; {hint}")


# Folders and list files ----------------------------------------------------------------------------------------------


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
        try:
            with open(self._path(row), "rb") as file:
                data = file.read()
        except OSError as error:
            raise DataError(f"{self.where(row)}: expected an image file, got: {error.strerror}; restore it") from error
        if len(data) != self.sizes[row]:
            raise DataError(
                f"{self.where(row)}: expected {self.sizes[row]} bytes as when it was indexed, got {len(data)}; "
                "data must not change during a run: restore the file, or start again"
            )
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

    def add(self, name: str, facts: os.stat_result) -> None:
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


def _open_folder(name: str, root: Path, labeled: bool) -> Samples:
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
    loose = [entry.name for entry in entries if _is_image(entry.name) and not entry.is_dir()]
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
        elif _is_image(entry.name):
            columns.add(prefix + entry.name, entry.stat())


def _is_image(name: str) -> bool:
    return name.lower().endswith(tuple(f".{extension}" for extension in IMAGE_EXTENSIONS))


def _open_list(name: str, file: Path, root: str | None, classes_file: Path | None, labeled: bool) -> Samples:
    base = str(_existing(root) if root else file.parent)
    numbers, labels = _read_list(file, labeled)
    columns, missing = _Columns(), []
    for path in numbers:
        try:
            columns.add(path, os.stat(os.path.join(base, path)))
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
    classes = _read_classes(classes_file) if classes_file else None
    where = list(numbers.values())
    _check_range(labels, classes, classes_file, lambda i: f"{file}:{where[i]}")
    return columns.samples(name, base, classes, labels)


def _read_list(file: Path, labeled: bool) -> tuple[dict[str, int], np.ndarray | None]:
    """Path to line number, in the order of the list, and the labels."""
    if not file.is_file():
        raise DataError(f"{file}: expected a list file, got a folder; name its kind with {{folder: …}}")
    numbers: dict[str, int] = {}
    labels = array("q")
    with file.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
        for number, line in enumerate(map(str.strip, lines), 1):
            if not line:
                continue
            # a path may hold spaces, so a line that ends as an image does has no label
            words = [line] if _is_image(line) else line.rsplit(None, 1)
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


# Shards --------------------------------------------------------------------------------------------------------------


def _open_shards(name: str, paths: Sequence[Path], classes_file: Path | None, labeled: bool, cache: Path) -> Samples:
    index = load_index(paths, cache)
    common = os.path.commonpath([path.absolute().parent for path in paths])
    names = tuple(os.path.relpath(path.absolute(), common).removesuffix(".tar") for path in paths)
    mtimes = np.array([path.stat().st_mtime_ns for path in paths])
    store = Shards(paths, names, index, mtimes)
    beside = paths[0].parent / CLASSES_FILE
    source = classes_file or (beside if beside.is_file() else None)
    classes = _read_classes(source) if labeled and source else None
    labels = _shard_labels(store, index, classes, source) if labeled else None
    members = index.members
    return Samples(
        name=name,
        classes=classes,
        identity=digest(
            "shards", names, index.lengths, mtimes, index.counts, members.blob, members.ends, labels, classes
        ),
        shard_sizes=index.counts,
        labels=labels,
        store=store,
        rows=np.arange(len(members)),
    )


def _shard_labels(store: Shards, index: Index, classes: tuple[str, ...] | None, source: Path | None) -> np.ndarray:
    bad = np.flatnonzero(index.labels < 0)
    if bad.size:
        row = int(bad[0])
        got = repr(store.label_text(row)) if index.labels[row] == BAD_LABEL else "no such member"
        raise DataError(
            f"{store.where(row)}: expected a whole number from 0 on as text in the member .cls, got {got} "
            f"({bad.size} of {len(index.labels)} samples); correct it, or use the shards as unlabeled data"
        )
    _check_range(index.labels, classes, source, store.where)
    return index.labels


def _shards_in(folder: Path) -> list[Path]:
    """The shards of a folder that holds .tar files and neither images nor folders; else none."""
    entries = sorted((entry for entry in os.scandir(folder) if entry.name[0] != "."), key=lambda entry: entry.name)
    if any(entry.is_dir() or _is_image(entry.name) for entry in entries):
        return []
    return [folder / entry.name for entry in entries if entry.name.endswith(".tar")]


def _expand(pattern: str) -> Sequence[Path]:
    """The shards that a pattern with braces names, or those of a folder; all of them exist, none comes twice."""
    folder = _path(pattern)
    if _there(folder, Path.is_dir):
        shards = _shards_in(folder)
        if not shards:
            raise DataError(
                f"{pattern}: expected a folder of .tar shards and nothing else, got none, or folders or images"
            )
        return shards
    paths = [_path(name) for name in expanded(pattern)]
    missing = [path for path in paths if not _there(path, Path.is_file)]
    if missing:
        shown = ", ".join(map(str, missing[:_SHOWN])) + (", …" if len(missing) > _SHOWN else "")
        raise DataError(
            f"{pattern}: expected {len(paths)} shards, got {len(missing)} missing ({shown}); correct the range"
        )
    if len(set(paths)) < len(paths):
        raise RecipeError(f"{pattern}: expected every shard once, got some twice; correct the braces")
    return paths


# Classes -------------------------------------------------------------------------------------------------------------


def _read_classes(file: Path) -> tuple[str, ...]:
    """Class names in label order, one per line."""
    if not file.is_file():
        raise DataError(f"{file}: expected a file of class names, one per line, got no such file")
    try:
        lines = file.read_text(encoding="utf-8-sig").rstrip("\n").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: expected class names in UTF-8, got: {error}; save it as UTF-8") from error
    numbers: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line in numbers:
            got = f"{line!r} as in line {numbers[line]}" if line in numbers else "an empty line"
            raise DataError(f"{file}:{number}: expected a class name of its own on each line, got {got}; correct it")
        numbers[line] = number
    return tuple(numbers)


def _check_range(
    labels: np.ndarray, classes: tuple[str, ...] | None, source: Path | None, where: Callable[[int], str]
) -> None:
    if classes is not None and labels.max() >= len(classes):
        worst = int(labels.argmax())
        raise DataError(
            f"{where(worst)}: expected a label in [0, {len(classes) - 1}], for the {len(classes)} classes of {source}, "
            f"got {labels[worst]}; correct the label, or the class names"
        )
