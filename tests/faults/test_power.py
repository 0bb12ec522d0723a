"""The power fails at any instant: what the product finds afterwards is whole, and what it was told is saved is there.

Two models of what a file system may lose. In the ordered one, changes of names come to the medium in their order, and
the last ones are lost; every sync of a directory brings all before it. In the other one, each directory loses its own
last changes, and its sync brings only those. In both, the content of a file that was not synced may be there wholly,
by half, or not at all.
"""

from __future__ import annotations

import errno
import io
import itertools
import math
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ssld import checkpoint, files
from ssld.contracts import TeacherSpec
from ssld.data.index import load_index
from ssld.data.loader import Replay
from ssld.data.samples import Samples
from ssld.data.sources import open_source
from ssld.data.transforms import Pipeline
from ssld.errors import CheckpointError, LabelError
from ssld.labels import store as storing
from ssld.labels.format import pack
from ssld.labels.store import Description, Store

OPERATIONS = ("write", "fsync", "fsync_directory", "mkdir", "symlink", "link", "rename", "replace", "remove")
SYNCS = ("fsync", "fsync_directory")
ABOUT = Description(
    TeacherSpec(16, "f" * 64), Pipeline.read(["RandFlipImage"], 16), Replay(0, 1), 2, 1.0, tuple("abc"), "the teacher"
)
DISK = files.Disk()
"""One that nobody puts anything in the place of."""


@dataclass(frozen=True)
class Operation:
    """One call of the disk; parts: of a write, how much of the data comes to the medium where it was not synced."""

    name: str
    arguments: tuple[Any, ...]

    @property
    def folders(self) -> set[Path]:
        """The directories in which it changes a name."""
        if self.name in SYNCS:
            return set()
        places = self.arguments[1:] if self.name == "symlink" else self.arguments
        return {place.parent for place in places if isinstance(place, Path)}

    def cut(self, part: float) -> Operation:
        path, data = self.arguments
        return Operation("write", (path, data[: int(len(data) * part)]))

    def do(self) -> None:
        if self.name not in SYNCS:
            getattr(DISK, self.name)(*self.arguments)


@contextmanager
def recording() -> Iterator[list[Operation]]:
    """Everything that the product does on its disk, which is done; nothing waits for the medium."""
    done: list[Operation] = []

    def record(name: str) -> Callable[..., None]:
        whole = getattr(files.disk, name)

        def operate(*arguments: Any) -> None:
            # what the system refuses changes nothing
            whole(*arguments)
            done.append(Operation(name, arguments))

        return operate

    with pytest.MonkeyPatch.context() as patch:
        for name in OPERATIONS:
            patch.setattr(files.disk, name, record(name))
        yield done


# What the medium holds ------------------------------------------------------------------------------------------------


def suffixes(done: Sequence[Operation]) -> Iterator[list[Operation]]:
    """What may be left when the last changes of names are lost, up to the last sync of any directory."""
    durable = max((i + 1 for i, operation in enumerate(done) if operation.name == "fsync_directory"), default=0)
    for kept in range(durable, len(done) + 1):
        yield list(done[:kept])


def by_directory(done: Sequence[Operation]) -> Iterator[list[Operation]]:
    """What may be left when each directory loses its own last changes, up to its own last sync."""
    synced = {operation.arguments[0]: i for i, operation in enumerate(done) if operation.name == "fsync_directory"}
    unsynced: dict[Path, list[int]] = {}
    for i, operation in enumerate(done):
        for folder in operation.folders:
            if i > synced.get(folder, -1):
                unsynced.setdefault(folder, []).append(i)
    choices = [[(folder, kept) for kept in range(len(places) + 1)] for folder, places in unsynced.items()]
    for choice in itertools.product(*choices):
        lost = {i for folder, kept in choice for i in unsynced[folder][kept:]}
        yield [operation for i, operation in enumerate(done) if i not in lost]


MODELS = {"ordered": suffixes, "by directory": by_directory}


def after(model: str, done: Sequence[Operation]) -> Iterator[tuple[Operation, ...]]:
    """All that a power cut after these operations may leave, as operations that count."""
    synced = {operation.arguments[0] for operation in done if operation.name == "fsync"}
    for left in MODELS[model](done):
        changes = [operation for operation in left if operation.name not in SYNCS]
        parts = [operation.name == "write" and operation.arguments[0] not in synced for operation in changes]
        for part in (1.0, 0.5, 0.0) if any(parts) else (1.0,):
            yield tuple(
                operation.cut(part) if unsynced else operation
                for operation, unsynced in zip(changes, parts, strict=True)
            )


# What is promised -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Promise:
    """Acts that follow each other below a root, and what the product's own reader finds there.

    read(root): a value, or None where there is nothing; it raises for what is damaged, and must not. start(root): what
    the next process clears away.
    """

    acts: tuple[Callable[[Path], object], ...]
    read: Callable[[Path], object]
    start: Callable[[Path], object]


@dataclass
class Count:
    """How many states there are, and in how many of them the promise is broken."""

    states: int = 0
    broken: int = 0


def replay(promise: Promise, root: Path, model: str, without: str = "", enough: float = math.inf) -> Count:
    """Act, and look at every state that a power cut may leave.

    without: a precaution that is taken out of what was done; enough: after so many broken states.
    """
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    values, ends = [promise.read(root)], [0]
    with recording() as done:
        for act in promise.acts:
            act(root)
            values.append(promise.read(root))
            done[:] = [operation for operation in done if operation.name != without]
            ends.append(len(done))
    count, seen = Count(), set[tuple[int, tuple[Operation, ...]]]()
    for crash in range(len(done) + 1):
        acknowledged = max(i for i, end in enumerate(ends) if end <= crash)
        allowed = values[acknowledged : acknowledged + 2]
        for left in after(model, done[:crash]):
            if (acknowledged, left) not in seen and count.broken < enough:
                seen.add((acknowledged, left))
                count.states += 1
                count.broken += not kept(promise, root, left, allowed)
    return count


def kept(promise: Promise, root: Path, left: Sequence[Operation], allowed: Sequence[object]) -> bool:
    """Whether the reader finds what it may, before and after the next process has cleared up."""
    shutil.rmtree(root)
    root.mkdir()
    for operation in left:
        try:
            operation.do()
        except FileNotFoundError:
            # the directory that it was in was lost
            continue
    try:
        found = promise.read(root)
        promise.start(root)
        return found in allowed and promise.read(root) == found
    except (CheckpointError, LabelError, UnexpectedError):
        return False


class UnexpectedError(Exception):
    """The product passed something over as damaged."""


# Checkpoints ----------------------------------------------------------------------------------------------------------


def save(root: Path, step: int, value: float) -> None:
    """A save as a run does it: links, and only then what need not stay."""
    stage = root / "teach"
    tensors = {"student": {"x": np.full(3, value, np.float32)}, "optimizer": {"y": np.full(5, value)}}
    checkpoint.save(stage, step, tensors, {"value": value})
    checkpoint.point(stage, "latest", step)
    checkpoint.retain(stage, [step])


def refuse(message: str) -> None:
    raise UnexpectedError(message)


def newest(root: Path) -> tuple[int, float] | None:
    """The step and the value of the checkpoint that a run goes on from; a link leads to one that is whole."""
    stage = root / "teach"
    found = checkpoint.latest(stage, refuse) if stage.is_dir() else None
    if found is None:
        return None
    assert found.tensors("student")["x"].tolist() == [found.state["value"]] * 3
    if (stage / "latest").is_symlink():
        checkpoint.load(stage / "latest")
    return found.step, found.state["value"]


def clear(root: Path) -> None:
    files.sweep(root, depth=2)


SAVES = Promise((lambda root: save(root, 3, 0.5), lambda root: save(root, 6, 0.25)), newest, clear)
AGAIN = Promise((lambda root: save(root, 3, 0.5), lambda root: save(root, 3, 0.25)), newest, clear)


def in_place(final: Path, contents: dict[str, bytes]) -> files.Committed:
    """A planted bug: the files are written where they are to be, over those that are there."""
    entries = {name: files.Entry.of(data) for name, data in contents.items()}
    files._make(final)
    for name, data in {**contents, files.MANIFEST: files._manifest(entries)}.items():
        if (final / name).exists():
            files.disk.remove(final / name)
        files.disk.write(final / name, data)
        files.disk.fsync(final / name)
    files.disk.fsync_directory(final)
    return files.Committed(final, entries)


def deleted_first(final: Path, contents: dict[str, bytes], commit=files.commit_directory) -> files.Committed:
    """A planted bug: what was there goes before what takes its place is whole."""
    for old in final.parent.glob("step-*"):
        files.discard(old)
    return commit(final, contents)


BUGS = {
    "no sync of files": ("fsync", None),
    "no sync of directories": ("fsync_directory", None),
    "written in place": ("", in_place),
    "deleted first": ("", deleted_first),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("promise", [SAVES, AGAIN], ids=["another step", "the same step"])
def test_of_two_saves_none_that_was_acknowledged_is_lost_and_none_that_is_damaged_is_found(
    tmp_path: Path, promise: Promise, model: str
) -> None:
    count = replay(promise, tmp_path / "root", model)
    print(f"two saves, {model}: {count}")  # noqa: T201  # shown with -rP
    assert count.states > 30
    assert count.broken == 0


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("promise", [SAVES, AGAIN], ids=["another step", "the same step"])
@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, promise: Promise, model: str, bug: str
) -> None:
    """What each precaution is for; without it the campaign above would fail."""
    without, commit = BUGS[bug]
    if commit:
        monkeypatch.setattr(files, "commit_directory", commit)
    count = replay(promise, tmp_path / "root", model, without, enough=10)
    print(f"{bug}, {model}: {count}")  # noqa: T201  # shown with -rP
    assert count.broken > 0


# Label files and single files -----------------------------------------------------------------------------------------


def pool() -> Samples:
    return open_source("builtin:shapes?count=6&size=16", labeled=False)


def label(root: Path) -> None:
    samples, store = pool(), Store(root / "store", ABOUT)
    store.begin()
    logits = np.random.default_rng(0).normal(0, 3, (len(samples), 1, 3)).astype(np.float32)
    store.commit(samples, 0, pack(logits, 2, 1.0), None, 1)


def labels(root: Path) -> object:
    """A hash of the label file, where one has the name; a damaged one must not."""
    samples, store = pool(), Store(root / "store", ABOUT)
    return store.load(samples, 0).sha256 if not store.missing(samples) else None


def content(root: Path) -> bytes | None:
    path = root / "run" / "recipe.yaml"
    return path.read_bytes() if path.exists() else None


def write(data: bytes) -> Callable[[Path], None]:
    return lambda root: files.write_atomic(root / "run" / "recipe.yaml", data)


LABELS = Promise((label,), labels, lambda root: files.sweep_old(root, -1.0))
FILE = Promise((write(b"the old text"), write(b"another, newer text")), content, clear)


@pytest.fixture
def linkless(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without hard links, where the parameter says so."""

    def refused(old: Path, new: Path) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    if request.param:
        monkeypatch.setattr(files.disk, "link", refused, raising=False)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("promise", "linkless"),
    [(LABELS, False), (LABELS, True), (FILE, False)],
    ids=["labels", "labels without links", "a file"],
    indirect=["linkless"],
)
def test_a_file_is_the_old_or_the_new_and_an_acknowledged_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, promise: Promise, model: str, linkless: None
) -> None:
    monkeypatch.setattr(storing, "environment", dict.fromkeys(storing.MADE_WITH, "").copy)
    count = replay(promise, tmp_path / "root", model)
    print(f"a file, {model}: {count}")  # noqa: T201  # shown with -rP
    assert count.states > 10
    assert count.broken == 0
    for precaution in ("fsync", "fsync_directory"):
        assert replay(promise, tmp_path / "root", model, precaution, enough=1).broken > 0, precaution


@pytest.mark.parametrize("model", MODELS)
def test_an_index_that_was_spoiled_is_made_anew(tmp_path: Path, model: str) -> None:
    """It is not durable: of a thousand none is waited for."""
    root, path = tmp_path / "root", tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("a.jpg")
        info.size = 5
        tar.addfile(info, io.BytesIO(b"image"))
    root.mkdir()
    with recording() as done:
        right = load_index([path], root / "cache").encode()
    spoiled = 0
    for left in after(model, done):
        shutil.rmtree(root)
        root.mkdir()
        for operation in left:
            operation.do()
        entries = [entry.read_bytes() for entry in root.glob("cache/*.index")]
        spoiled += entries != [right]
        assert load_index([path], root / "cache").encode() == right
        assert [entry.read_bytes() for entry in root.glob("cache/*.index")] == [right]
    assert spoiled > 0
