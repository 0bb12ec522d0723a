"""From what a recipe says of its data to samples: folders, PaddleClas list files, tar shards, built-in sets."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssld.data.braces import expanded
from ssld.data.builtin import open_builtin
from ssld.data.classes import CLASSES_FILE, check_range, read_classes
from ssld.data.facts import expect_file, text
from ssld.data.folders import is_image, open_folder, open_list
from ssld.data.index import BAD_LABEL, Index, Shards, load_index
from ssld.data.samples import Samples, digest
from ssld.errors import DataError, RecipeError
from ssld.wording import near

KINDS: Mapping[str, tuple[str, ...]] = {
    "folder": (),
    "list": ("root", "classes"),
    "shards": ("classes",),
    "builtin": (),
}
"""The kinds of source, and the keys that each may have beside its own."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
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
        return open_folder(name, _existing(value), labeled)
    classes = _path(extra["classes"]) if "classes" in extra else None
    if kind == "list":
        file = _existing(value)
        root = _existing(extra["root"]) if extra.get("root") else file.parent
        return open_list(name, file, root, classes, labeled)
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


# Shards --------------------------------------------------------------------------------------------------------------


def _open_shards(name: str, paths: Sequence[Path], classes_file: Path | None, labeled: bool, cache: Path) -> Samples:
    # before the index is read: a shard that is replaced meanwhile is not taken for the one that was indexed
    facts = [path.stat() for path in paths]
    for path, of_shard in zip(paths, facts, strict=True):
        expect_file(of_shard, str(path))
    mtimes = np.array([of_shard.st_mtime_ns for of_shard in facts])
    index = load_index(paths, cache)
    common = os.path.commonpath([path.absolute().parent for path in paths])
    names = tuple(os.path.relpath(path.absolute(), common).removesuffix(".tar") for path in paths)
    store = Shards(paths, names, index, mtimes)
    beside = paths[0].parent / CLASSES_FILE
    source = classes_file or (beside if beside.is_file() else None)
    classes = read_classes(source) if labeled and source else None
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
        got = store.label_text(row) if index.labels[row] == BAD_LABEL else "no such member"
        raise DataError(
            f"{store.where(row)}: expected a whole number from 0 on as text in the member .cls, got {got} "
            f"({bad.size} of {len(index.labels)} samples); correct it, or use the shards as unlabeled data"
        )
    check_range(index.labels, classes, source, store.where)
    return index.labels


def _shards_in(folder: Path) -> list[Path]:
    """The shards of a folder that holds .tar files and neither images nor folders; else none."""
    entries = sorted((entry for entry in os.scandir(folder) if entry.name[0] != "."), key=lambda entry: entry.name)
    if any(entry.is_dir() or is_image(entry.name) for entry in entries):
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
