"""Every operation on the disk fails in turn, in four ways, in everything that a run keeps."""

from __future__ import annotations

import dataclasses
import errno
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ssld import checkpoint, files
from ssld.contracts import Model, State, TeacherSpec
from ssld.data import index as indexing
from ssld.data.loader import Replay
from ssld.data.samples import Samples
from ssld.data.sources import open_source
from ssld.data.transforms import Pipeline
from ssld.errors import LabelError, StorageError
from ssld.graph import Node, make_plan
from ssld.labels import store as storing
from ssld.labels.format import pack
from ssld.labels.store import Description, Store
from ssld.recipe import read_recipe
from ssld.rundir import Options, RunDirectory

OPERATIONS = ("write", "fsync", "fsync_directory", "mkdir", "symlink", "link", "rename", "replace", "remove")
NEEDING_NO_SPACE = ("fsync", "fsync_directory", "remove")
MODES = ("killed", "torn", "eio", "full")
RECIPE = """\
name: small
data: {labeled: "builtin:shapes?count=24&size=16", validation: "builtin:shapes?count=8&size=16&seed=1"}
stages:
  teach: {kind: pretrain, network: MobileNetV3_small_x0_35, data: labeled, epochs: 9}
"""
PIPELINE = Pipeline.read(["RandFlipImage"], 16)
ABOUT = Description(TeacherSpec(16, "f" * 64), PIPELINE, Replay(0, 1), 2, 1.0, tuple("abc"), "the teacher")
TASK = SimpleNamespace(model=Model("MobileNetV3_small_x0_35", {}, ("a", "b"), PIPELINE), soft=None)


class Killed(BaseException):
    """Ends the process as kill -9 does: no handler of the product catches it."""


class Faulty:
    """Stands for a disk of which operation number `at` fails.

    killed: the process ends before it; torn: a write ends in the middle, and the process with it; eio: an error, once,
    a write in the middle; full: the same of every operation that needs space, from then on.
    """

    def __init__(self, at: int = 0, mode: str = "") -> None:
        self.at, self.mode, self.count, self.failed = at, mode, 0, ""

    def operation(self, name: str) -> Callable[..., None]:
        whole = getattr(files.Disk(), name)

        def operate(*arguments: Any) -> None:
            self.count += 1
            if self.failed and self.mode in ("killed", "torn"):
                raise Killed
            if self.count == self.at or (self.failed and self.mode == "full" and name not in NEEDING_NO_SPACE):
                self.failed = self.failed or name
                self.fail(name, arguments)
            whole(*arguments)

        return operate

    def fail(self, name: str, arguments: tuple[Any, ...]) -> None:
        if name == "write" and self.mode != "killed":
            path, data = arguments
            path.write_bytes(data[: len(data) // 2])
        if self.mode in ("killed", "torn"):
            raise Killed
        raise OSError(errno.EIO if self.mode == "eio" else errno.ENOSPC, "injected")


@contextmanager
def faulty(disk: Faulty) -> Iterator[Faulty]:
    """The product's own disk, which every module has a name for, fails as that one does."""
    with pytest.MonkeyPatch.context() as patch:
        for name in OPERATIONS:
            patch.setattr(files.disk, name, disk.operation(name))
        yield disk


# What is written ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What is written below a root: prepare(root), act(root), and what the product's own readers find there.

    found(root): the parts, by name, that are old or new each on their own; it raises where one cannot be read.
    start(root): what the next process does before it acts again.
    """

    prepare: Callable[[Path], object]
    act: Callable[[Path], object]
    found: Callable[[Path], dict[str, object]]
    start: Callable[[Path], object] = lambda root: None


@cache
def stage() -> Node:
    """The stage that is saved."""
    with TemporaryDirectory() as folder:
        file = Path(folder, "recipe.yaml")
        file.write_text(RECIPE)
        (node,) = make_plan(read_recipe(file)).nodes
    return node


def run_in(root: Path) -> RunDirectory:
    """A run that has begun; what a save needs of it."""
    run = RunDirectory(root / "run")
    if not run.exists():
        run.begin(RECIPE, Options())
    return run


def save(root: Path, step: int, value: float, best: int) -> None:
    weights = {"fc.weight": np.full((2, 3), value, np.float32)}
    facts = {"seconds": 1.5, "metrics": {}, "best": {"step": best, "top1": 0.5}, "kept": []}
    run_in(root).save(stage(), TASK, State(step, weights, weights, facts))


def saved(root: Path) -> dict[str, object]:
    """The checkpoint to go on from, and the best one; a damaged one fails the test."""
    run = RunDirectory(root / "run")
    newest = run.status(stage(), pytest.fail).checkpoint
    best = run.stage(stage()) / "best"
    chosen = checkpoint.load(best).step if best.is_symlink() else None
    return {"newest": newest and (newest.step, newest.tensors("student")["fc.weight"][0, 0]), "best": chosen}


def tidy(root: Path) -> None:
    """What the engine does before anything else."""
    run = RunDirectory(root / "run")
    run.clear()
    if newest := run.status(stage(), pytest.fail).checkpoint:
        run.tidy(stage(), newest.step, newest.state["facts"])


def clear(root: Path) -> None:
    run = RunDirectory(root / "run")
    if run.path.is_dir():
        run.clear()


def pool() -> Samples:
    return open_source("builtin:shapes?count=6&size=16", labeled=False)


def label(root: Path) -> None:
    store, samples = Store(root / "store", ABOUT), pool()
    store.drop_damaged(samples, 0)
    store.begin()
    logits = np.random.default_rng(0).normal(0, 3, (len(samples), 1, 3)).astype(np.float32)
    store.commit(samples, 0, pack(logits, 2, 1.0), None, 1)


def spoil(root: Path) -> None:
    """Labels with a bit that has turned."""
    label(root)
    (file,) = (root / "store").rglob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def labelled(root: Path) -> dict[str, object]:
    """What a training would use; a damaged file counts for nothing, as it is made again."""
    try:
        return {"labels": Store(root / "store", ABOUT).load(pool(), 0).sha256}
    except LabelError:
        return {"labels": None}


def shard(root: Path) -> Path:
    path = root / "a.tar"
    if not path.is_file():
        root.mkdir(exist_ok=True)
        with tarfile.open(path, "w") as tar:
            info = tarfile.TarInfo("a.jpg")
            info.size = 5
            tar.addfile(info, io.BytesIO(b"image"))
    return path


def indexed(root: Path) -> dict[str, object]:
    """What the cache holds, which is what is read from the headers, or nothing."""
    known = {indexing.decode_index(file.read_bytes()) for file in (root / "cache").glob("*.index")}
    assert len(known) < 2
    return {"index": [index and index.members[0] for index in known]}


def recorded(root: Path) -> dict[str, object]:
    run = RunDirectory(root / "run")
    if not run.exists():
        return {"recipe": None, "options": None}
    recipe, options = run.recorded()
    return {"recipe": recipe.name, "options": options.limit}


def begun(root: Path) -> None:
    RunDirectory(root / "run").begin(RECIPE.replace("small", "older"), Options(limit=9))


def measured(root: Path) -> dict[str, object]:
    return {"test": RunDirectory(root / "run").tested(stage(), "the set")}


def keep_tested(root: Path, top1: float) -> None:
    run_in(root).keep_tested(stage(), "the set", {"top1": top1})


def both(root: Path) -> list[Node]:
    return [stage(), dataclasses.replace(stage(), name="student")]


def finish(root: Path) -> None:
    weights = {"fc.weight": np.ones(3, np.float32)}
    for node in both(root):
        facts = {"best": {}, "name": node.name}
        run_in(root).save(node, TASK, State(1, weights, weights, facts), {"top1": 0.5})


def where(root: Path) -> dict[str, object]:
    """Whether each result is in the run or set aside; it is in one place, and whole."""
    places = {}
    for node in both(root):
        there = [
            run.name.partition(".")[0]
            for run in (root / "run", *sorted(root.glob("run/attempt.*")))
            if RunDirectory(run).status(node, pytest.fail).kind == "done"
        ]
        (places[node.name],) = there
    return places


def weights(root: Path) -> dict[str, object]:
    file = root / "net.safetensors"
    return {"weights": checkpoint.read_weights(file)["x"].tolist() if file.exists() else None}


WORKS = {
    "the first checkpoint": Work(run_in, lambda root: save(root, 3, 0.5, best=3), saved, tidy),
    "a later checkpoint": Work(
        lambda root: [save(root, step, step / 2, best=3) for step in (3, 6, 9)],
        lambda root: save(root, 12, 6.0, best=12),
        saved,
        tidy,
    ),
    "a checkpoint in place of one": Work(
        lambda root: [save(root, step, step / 2, best=3) for step in (3, 6)],
        lambda root: save(root, 6, 7.0, best=6),
        saved,
        tidy,
    ),
    "labels": Work(lambda root: root.mkdir(), label, labelled),
    "labels in place of damaged ones": Work(spoil, label, labelled),
    "an index": Work(shard, lambda root: indexing.load_index([shard(root)], root / "cache"), indexed),
    "the begin of a run": Work(
        lambda root: root.mkdir(), lambda root: RunDirectory(root / "run").begin(RECIPE, Options()), recorded, clear
    ),
    "another begin of a run": Work(
        begun, lambda root: RunDirectory(root / "run").begin(RECIPE, Options()), recorded, clear
    ),
    "the end of a run that never began": Work(begun, lambda root: RunDirectory(root / "run").forget(), recorded),
    "a measurement": Work(lambda root: keep_tested(root, 0.25), lambda root: keep_tested(root, 0.5), measured, clear),
    "results that are set aside": Work(finish, lambda root: run_in(root).set_aside(both(root)), where, clear),
    "a weights file": Work(
        lambda root: root.mkdir(),
        lambda root: checkpoint.write_weights(root / "net.safetensors", {"x": np.arange(3.0)}),
        weights,
        # a folder of the user's own is not cleared by anybody else
        lambda root: files.sweep_old(root, -1.0),
    ),
}


def tree(root: Path) -> list[str]:
    """The names of all that is there; a second attempt to set results aside may have another number."""
    return sorted({re.sub(r"attempt\.\d", "attempt", str(path.relative_to(root))) for path in root.rglob("*")})


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a killed process was writing is litter at once, where it would be after an hour; no medium is waited for."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(storing, "ABANDONED", -1.0)
    monkeypatch.setattr(indexing, "ABANDONED", -1.0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", WORKS)
def test_a_fault_at_any_operation_leaves_the_old_or_the_new(tmp_path: Path, name: str, mode: str) -> None:
    work, root, before = WORKS[name], tmp_path / "root", tmp_path / "before"
    work.prepare(root)
    shutil.copytree(root, before, symlinks=True)
    old = work.found(root)
    with faulty(Faulty()) as sound:
        work.act(root)
    new, whole = work.found(root), tree(root)
    assert sound.count > 1
    outcomes = set()
    for at in range(1, sound.count + 1):
        shutil.rmtree(root)
        shutil.copytree(before, root, symlinks=True)
        with faulty(Faulty(at, mode)) as disk:
            fail(lambda: work.act(root), disk, root)
        found = work.found(root)
        outcomes |= {found == old, found == new}
        for part, value in found.items():
            assert value in (old[part], new[part]), f"{disk.failed} {at}: {part}"
        litter = [path for path in tree(root) if Path(path).name.startswith(".tmp-")]
        assert not litter or mode in ("killed", "torn") or disk.failed == "remove"
        work.start(root)
        assert all(value in (found[part], new[part]) for part, value in work.found(root).items())
        work.act(root)
        assert (work.found(root), tree(root)) == (new, whole), f"{disk.failed} {at}: not the same afterwards"
    assert outcomes == {True, False}
    print(f"{name}, {mode}: {sound.count} operations, each in a trial")  # noqa: T201  # shown with -rP


def fail(act: Callable[[], object], disk: Faulty, root: Path) -> None:
    """The act does not get to its end, and an error is one of ours that says where."""
    if disk.mode in ("killed", "torn"):
        with pytest.raises(Killed):
            act()
        return
    with pytest.raises(StorageError, match="injected") as caught:
        act()
    assert str(root) in str(caught.value)


@pytest.mark.parametrize("name", ["the first checkpoint", "labels", "a measurement"])
def test_a_file_system_that_cannot_sync_a_directory_keeps_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Network file systems say EINVAL; there the server keeps the order of names."""

    def refused(path: Path) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    work, trees = WORKS[name], []
    for root in (tmp_path / "usual", tmp_path / "network"):
        work.prepare(root)
        work.act(root)
        trees.append((tree(root), work.found(root)))
        monkeypatch.setattr(files.disk, "fsync_directory", refused)
    assert trees[0] == trees[1]


# Nothing goes past it -------------------------------------------------------------------------------------------------

WATCHED = """
import os, sys
from pathlib import Path
from ssld import files
from ssld.cli import main

roots = tuple(sys.argv[1].split(":"))
inside, known, strays = 0, set(), set()
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree"}

def name(path):
    found = os.path.abspath(os.fsdecode(path)) if isinstance(path, (str, bytes, os.PathLike)) else ""
    return found if found.startswith(roots) else ""

def watch(event, arguments):
    if event == "open":
        mode, flags = arguments[1:]
        writes = any(letter in mode for letter in "wax+") if mode else flags & (os.O_WRONLY | os.O_RDWR)
        paths = arguments[:1] if writes else ()
    else:
        paths = arguments[:2] if event in CHANGES else ()
    for path in filter(None, map(name, paths)):
        (known if inside else strays).add(path)

def counted(whole):
    def operate(*arguments):
        global inside
        inside += 1
        try:
            whole(*arguments)
        finally:
            inside -= 1
    return operate

for each in {"write", "fsync", "fsync_directory", "mkdir", "symlink", "link", "rename", "replace", "remove"}:
    setattr(files.disk, each, counted(getattr(files.disk, each)))
sys.addaudithook(watch)
code = main(["run", "recipe.yaml", "--out", "run", "--trust-teacher"], standalone_mode=False)
code = code or main(["resume", "--out", "run", "--stage", "1"], standalone_mode=False)
# by its own name: what is in a directory is renamed with it
seen = {os.path.basename(path) for path in known | strays}
unseen = sorted(str(path) for root in roots for path in Path(root).rglob("*") if path.name not in seen)
print(f"changed elsewhere: {sorted(strays)}, never seen: {unseen}")
sys.exit(code)
"""
"""A run, and the start of its last stage anew, of which every change below some roots is noted."""
TRAINED = """\
name: audited
images:
  resolution: 16
  train: [RandCropImage: {scale: [0.5, 1.0]}, RandFlipImage, NormalizeImage]
  eval: [ResizeImage: {resize_short: 16}, CropImage, NormalizeImage]
data:
  unlabeled: "pool/shard-{000000..000001}.tar"
  labeled: builtin:shapes?count=16&size=16&classes=4
  validation: builtin:shapes?count=8&size=16&classes=4&seed=1
  test: builtin:shapes?count=8&size=16&classes=4&seed=2
stages:
  teach: {kind: pretrain, network: MobileNetV3_small_x0_35, data: labeled, epochs: 1, batch_size: 8, save_steps: 1}
  distill: {kind: distill, teacher: {stage: teach}, student: MobileNetV3_small_x0_35, data: unlabeled, epochs: 1,
    batch_size: 8, save_steps: 1, labels: {views: 1, top_k: 2, store: store}}
"""


def write_pool(folder: Path) -> None:
    """16 images in two shards."""
    drawn = open_source("builtin:shapes?count=16&size=16&classes=4&seed=3", labeled=False)
    folder.mkdir()
    for number in range(2):
        with tarfile.open(folder / f"shard-{number:06d}.tar", "w") as tar:
            for i in range(8 * number, 8 * number + 8):
                image = io.BytesIO()
                Image.fromarray(drawn.read(i)).save(image, "PNG")
                info = tarfile.TarInfo(f"{i:03d}.png")
                info.size = len(image.getvalue())
                tar.addfile(info, io.BytesIO(image.getvalue()))


def test_all_that_a_run_keeps_is_written_in_the_one_place(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(TRAINED)
    write_pool(tmp_path / "pool")
    run, roots = tmp_path / "run", ":".join(str(tmp_path / name) for name in ("run", "store", "cache"))
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, roots],
        cwd=tmp_path,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    logs = sorted(str(run / name) for name in ("train.log", "metrics.jsonl", "run.lock"))
    assert done.stdout.splitlines()[-1] == f"changed elsewhere: {logs}, never seen: []"
    # of every kind of file there is one: else the watch would have seen too little
    names = {re.sub(r"\d{8}|[0-9a-f]{16,}", "#", path) for path in tree(tmp_path)}
    for wanted in (
        "run/recipe.yaml",
        "run/run.json",
        "run/test.json",
        "run/distill/step-#/student.safetensors",
        "run/distill/best",
        "run/attempt/distill/latest",
        "store/#/#.safetensors",
        "store/#/labels.json",
        "cache/ssld/index/#.index",
    ):
        assert wanted in names
