from __future__ import annotations

import errno
import io
import os
import tarfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ssld.data import samples as samples_module
from ssld.data import sources as sources_module
from ssld.data.index import Index, load_index
from ssld.data.loader import Damage, training_batches
from ssld.data.samples import Samples, concatenate
from ssld.data.sources import open_source
from ssld.data.transforms import Pipeline
from ssld.errors import DataError, RecipeError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def write(root: Path, files: Mapping[str, bytes | str]) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return root


def write_tar(path: Path, members: Mapping[str, str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data.encode())
            tar.addfile(info, io.BytesIO(data.encode()))
    return path


def contents(samples: Samples) -> list[str]:
    return [bytes(samples.read(i)).decode() for i in range(len(samples))]


def labels(samples: Samples) -> list[int] | None:
    return None if samples.labels is None else samples.labels.tolist()


def refused(error: type[Exception], spec: str | dict[str, Any], *parts: str, labeled: bool = True) -> None:
    with pytest.raises(error) as caught:
        open_source(spec, labeled=labeled)
    missing = [part for part in parts if part not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"


# shards

SHARDS = {"0.tar": {"a.jpg": "a0", "a.cls": "1"}, "1.tar": {"a.cls": "0", "a.png": "a1", "b.jpg": "b1", "b.cls": "1"}}


def write_shards(root: Path, shards: Mapping[str, Mapping[str, str]] = SHARDS) -> Path:
    for name, members in shards.items():
        write_tar(root / name, members)
    return root


@pytest.mark.parametrize("spec", ["{root}", "{root}/{{0..1}}.tar", "{root}/{{0,1}}.tar"])
def test_shards_by_folder_or_pattern(tmp_path: Path, spec: str) -> None:
    write(write_shards(tmp_path), {"classes.txt": "cat\ndog\n", "README": ""})
    found = open_source(spec.format(root=tmp_path), labeled=True)
    assert contents(found) == ["a0", "a1", "b1"]
    assert labels(found) == [1, 0, 1]
    assert found.classes == ("cat", "dog")
    assert found.shard_sizes.tolist() == [1, 2]
    assert [found.key(i) for i in range(3)] == ["0/a", "1/a", "1/b"]
    assert found.where(1) == "1.tar: a.png"


def test_one_shard_in_another_folder_keeps_its_own_name(tmp_path: Path) -> None:
    write_shards(tmp_path, {"x/0.tar": SHARDS["0.tar"], "y/0.tar": SHARDS["0.tar"]})
    found = open_source(f"{tmp_path}/{{x,y}}/0.tar", labeled=False)
    assert [found.key(i) for i in range(2)] == ["x/0/a", "y/0/a"]
    assert open_source(f"{tmp_path}/x/0.tar", labeled=False).key(0) == "0/a"


def test_unlabeled_shards_need_no_label_and_read_none(tmp_path: Path) -> None:
    write_shards(tmp_path, {"0.tar": {"a.jpg": "a", "a.cls": "cat", "b.jpg": "b"}})
    found = open_source(str(tmp_path / "0.tar"), labeled=False)
    assert contents(found) == ["a", "b"]
    assert (found.labels, found.classes) == (None, None)


@pytest.mark.parametrize(
    ("members", "parts"),
    [
        ({"a.jpg": "", "a.cls": "cat"}, ["0.tar: a.jpg", "got 'cat'"]),
        ({"a.jpg": "", "a.cls": "-1"}, ["0.tar: a.jpg", "got '-1' ("]),
        ({"a.jpg": "", "a.cls": "1" + 63 * " " + "7"}, ["0.tar: a.jpg", f"got '1{63 * ' '}'… of 65 bytes ("]),
        ({"a.jpg": "", "a.cls": "0", "b.jpg": ""}, ["0.tar: b.jpg", "no such member", "1 of 2"]),
        ({"a.jpg": "", "a.cls": "2"}, ["0.tar: a.jpg", "label in [0, 1]", "classes.txt", "got 2"]),
    ],
)
def test_labels_in_shards_are_checked(tmp_path: Path, members: dict[str, str], parts: list[str]) -> None:
    write(write_shards(tmp_path, {"0.tar": members}), {"classes.txt": "cat\ndog"})
    refused(DataError, str(tmp_path / "0.tar"), *parts)


@pytest.mark.parametrize("spec", ["{root}", "{root}/{{0,1}}.tar"])
def test_a_named_pipe_among_shards_is_refused_and_not_opened(tmp_path: Path, spec: str) -> None:
    os.mkfifo(write_shards(tmp_path, {"0.tar": SHARDS["0.tar"]}) / "1.tar")
    refused(DataError, spec.format(root=tmp_path), "1.tar")


def test_shards_that_are_missing_or_named_twice(tmp_path: Path) -> None:
    write_shards(tmp_path)
    refused(DataError, f"{tmp_path}/{{0..5}}.tar", "expected 6 shards, got 4 missing", "2.tar", ", …")
    refused(RecipeError, f"{tmp_path}/{{0,0}}.tar", "every shard once")
    refused(RecipeError, f"{tmp_path}/{{0..1.tar", "braces in pairs")
    refused(DataError, {"shards": str(write(tmp_path / "empty", {"x.jpg": ""}))}, "a folder of .tar shards")


def test_a_shard_that_changed_since_is_named(tmp_path: Path) -> None:
    found = open_source(str(write_shards(tmp_path)), labeled=True)
    write_tar(tmp_path / "1.tar", {"a.jpg": "x" * 20000})
    with pytest.raises(DataError, match=r"1\.tar: b\.jpg: .*/1\.tar: expected 10240 bytes .*, got 30720 bytes"):
        found.read(2)
    (tmp_path / "1.tar").unlink()
    with pytest.raises(DataError, match=r"1\.tar: b\.jpg: expected to read"):
        found.read(2)


def exchange(path: Path) -> None:
    """Write the shard anew with other images in the same places, a nanosecond later."""
    later = path.stat().st_mtime_ns + 1
    write_tar(path, {"a.jpg": "other"})
    os.utime(path, ns=(later, later))


@pytest.mark.parametrize("when", ["after it was opened", "when its index was read", "while it is read"])
def test_a_shard_of_the_same_size_that_was_written_later_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    path = write_tar(tmp_path / "0.tar", {"a.jpg": "image"})

    def then_exchanged(paths: list[Path], cache: Path) -> Index:
        index = load_index(paths, cache)
        exchange(path)
        return index

    def first_exchanged(file: int, size: int, offset: int) -> bytes:
        exchange(path)
        return pread(file, size, offset)

    pread = os.pread
    if when == "when its index was read":
        monkeypatch.setattr(sources_module, "load_index", then_exchanged)
    found = open_source(str(path), labeled=False)
    if when == "after it was opened":
        exchange(path)
    elif when == "while it is read":
        monkeypatch.setattr(os, "pread", first_exchanged)
    with pytest.raises(DataError, match=r"0\.tar: a\.jpg: .*expected 10240 bytes written at .*, got 10240 bytes"):
        found.read(0)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_whose_data_are_replaced_ends_by_their_name(tmp_path: Path, workers: int) -> None:
    """A budget for damaged images does not cover it: it is not the image that is damaged."""
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    for name in "abcdefgh":
        write(tmp_path, {f"{name}.png": picture.getvalue()})
    pipeline = Pipeline.read(["NormalizeImage"], 8)
    stream = training_batches(
        open_source(str(tmp_path), labeled=False),
        (pipeline,),
        batch_size=2,
        seed=0,
        workers=workers,
        ahead=1,
        damage=Damage(8),
    )
    next(stream)
    for path in tmp_path.iterdir():
        os.utime(path, ns=(0, 0))
    with pytest.raises(DataError, match=r"\w\.png: expected .*data must not change during a run"):
        list(islice(stream, 4))


# what a shard is known by


def of_files(root: Path, kind: str) -> dict[str, str]:
    """Eight images in four shards of two, as a folder or as a list."""
    write(root / "images", {f"{i}.jpg": f"image {i}" for i in range(8)})
    for i in range(8):
        os.utime(root / "images" / f"{i}.jpg", ns=(0, 10**9 * i))
    if kind == "folder":
        return {"folder": str(root / "images")}
    write(root, {"list.txt": "".join(f"{i}.jpg\n" for i in range(8))})
    return {"list": str(root / "list.txt"), "root": str(root / "images")}


def of_shards(root: Path) -> dict[str, str]:
    """Four shards of two images."""
    for shard in range(4):
        write_tar(root / f"{shard}.tar", {f"{i}.jpg": f"image {shard} {i}" for i in range(2)})
        os.utime(root / f"{shard}.tar", ns=(0, 10**9 * shard))
    return {"shards": str(root)}


@pytest.fixture(params=["folder", "list", "shards"])
def pool(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, str], Path]:
    """A source of four shards, and the file that its third one is made of."""
    monkeypatch.setattr(samples_module, "VIRTUAL_SHARD", 2)
    if request.param == "shards":
        return of_shards(tmp_path / "pool"), tmp_path / "pool" / "2.tar"
    return of_files(tmp_path, request.param), tmp_path / "images" / "5.jpg"


def shard_ids(spec: dict[str, str] | str) -> tuple[str, ...]:
    return open_source(spec, labeled=False).shard_ids


def test_every_shard_has_an_id_of_its_own_that_stays(pool: tuple[dict[str, str], Path]) -> None:
    ids = shard_ids(pool[0])
    assert len(set(ids)) == 4
    assert shard_ids(pool[0]) == ids


@pytest.mark.parametrize("change", ["time", "size"])
def test_a_file_that_changed_changes_the_id_of_its_shard_alone(pool: tuple[dict[str, str], Path], change: str) -> None:
    spec, file = pool
    before, stat = shard_ids(spec), file.stat()
    if change == "size" and file.suffix == ".tar":
        write_tar(file, {f"{i}.jpg": "longer" * 2000 for i in range(2)})
    elif change == "size":
        file.write_bytes(file.read_bytes() + b".")
    os.utime(file, ns=(0, stat.st_mtime_ns + (change == "time")))
    after = shard_ids(spec)
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, True, False, True]


def test_a_shard_keeps_its_id_in_every_set_it_is_part_of(pool: tuple[dict[str, str], Path]) -> None:
    samples = open_source(pool[0], labeled=False)
    other = open_source("builtin:shapes?count=3&size=8", labeled=False)
    assert concatenate([other, samples]).shard_ids == (*other.shard_ids, *samples.shard_ids)
    assert samples.subset(np.array([0, 1, 2, 6, 7])).shard_ids[::2] == samples.shard_ids[::3]
    assert samples.subset(np.array([0, 1, 2, 6, 7])).shard_ids[1] not in samples.shard_ids


def test_shards_that_are_added_leave_the_others_and_their_choice(tmp_path: Path) -> None:
    spec = of_shards(tmp_path / "pool")
    before = open_source(spec, labeled=False)
    write_tar(tmp_path / "pool" / "4.tar", {f"{i}.jpg": f"image 4 {i}" for i in range(2)})
    grown = open_source(spec, labeled=False)
    assert grown.shard_ids[:4] == before.shard_ids
    held, more = ([part.key(i) for i in range(len(part))] for part in (s.hold_out(0.5)[1] for s in (before, grown)))
    assert held == [key for key in more if not key.startswith("4/")]


def test_labels_are_no_part_of_what_a_shard_is(tmp_path: Path) -> None:
    """The same images as a pool and as a labeled set have the same soft labels."""
    write(tmp_path, {"cat/1.jpg": "c1", "dog/2.jpg": "d2"})
    labeled, unlabeled = (open_source({"folder": str(tmp_path)}, labeled=labeled) for labeled in (True, False))
    assert labeled.identity != unlabeled.identity
    assert labeled.shard_ids == unlabeled.shard_ids


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("shapes?count=40&seed=1", "shapes?count=40&seed=2"),
        ("shapes?count=40&size=8", "shapes?count=40&size=9"),
        ("shapes?count=40&classes=3", "shapes?count=40&classes=4"),
        ("digits?part=pool", "digits?part=labeled"),
    ],
)
def test_shards_of_builtin_sets_are_told_apart(one: str, other: str) -> None:
    first, second = (shard_ids(f"builtin:{name}") for name in (one, other))
    assert not set(first) & set(second)
    assert shard_ids(f"builtin:{one}") == first


def test_many_threads_read_the_right_bytes(tmp_path: Path) -> None:
    members = {f"{i}.jpg": f"image {i}" * (i % 7) for i in range(200)}
    found = open_source(str(write_tar(tmp_path / "s.tar", members)), labeled=False)
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(200), 5)).tolist()
    with ThreadPoolExecutor(8) as threads:
        read = list(threads.map(found.read, order))
    assert read == [members[f"{i}.jpg"].encode() for i in order]


def test_tar_identity_is_kept_by_the_cache_and_lost_by_a_change(tmp_path: Path) -> None:
    def identity(labeled: bool = True) -> str:
        return open_source(str(tmp_path), labeled=labeled).identity

    write_shards(tmp_path)
    first = identity()
    assert identity() == first
    assert identity(labeled=False) != first
    os.utime(tmp_path / "0.tar", ns=(0, 1))
    assert identity() != first


# what a spec may say


@pytest.mark.parametrize("spec", ["pipe:cat x", "s3://bucket/x-{0..1}.tar", "http://host/x.tar", "file:///x", "gs://x"])
@pytest.mark.parametrize("wrap", [lambda spec: spec, lambda spec: {"shards": spec}, lambda spec: {"folder": spec}])
def test_schemes_are_refused_with_what_is_supported(spec: str, wrap) -> None:
    refused(RecipeError, wrap(spec), spec, f"scheme {spec.split(':')[0]}:", "local paths only")


def test_a_folder_with_a_colon_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, {"v1:raw/a.jpg": "a"})
    assert contents(open_source("v1:raw", labeled=False)) == ["a"]


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ({}, ["exactly one kind, got nothing; known: folder, list, shards, builtin"]),
        ({"foldr": "x"}, ["got foldr: x; did you mean folder?"]),
        ({"folder": "x", "list": "y"}, ["got folder and list; known: folder, list, shards, builtin"]),
        ({"list": "x", "rooot": "y"}, ["keys of the kind list, got rooot; did you mean root?"]),
        ({"folder": "x", "classes": "y"}, ["keys of the kind folder, got classes; known: folder"]),
        ({"folder": 3}, ["expected text for folder, got 3"]),
    ],
)
def test_mappings_that_say_nothing_known(spec: dict[str, Any], parts: list[str]) -> None:
    refused(RecipeError, spec, *parts)


def test_a_missing_path_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    refused(DataError, str(tmp_path / "imagse"), "imagse", "did you mean images?")
    refused(DataError, str(tmp_path / "no/where"), f"nor is {tmp_path / 'no'} there")


def test_a_missing_path_in_a_full_folder_does_not_list_all_of_it(tmp_path: Path) -> None:
    write(tmp_path, {f"{i:04d}.jpg": "" for i in range(300)})
    with pytest.raises(DataError, match=r"; known: 0000\.jpg, .*…$") as caught:
        open_source(str(tmp_path / "nothing-like-it"), labeled=False)
    assert len(str(caught.value)) < 400 + 2 * len(str(tmp_path))


def test_the_home_of_a_user_who_is_not_known_is_a_missing_path() -> None:
    refused(DataError, "~no-such-user/images", "expected a folder or a file, got nothing")


DENIED = [
    ("folder", "a/cat", True),
    ("folder", "a/cat", False),
    ("folder", "a", True),
    ("list", "train.txt", True),
    ("list", "a", True),
    ("classes", "names.txt", True),
    ("shards", "s", False),
    ("shards", "s/0.tar", False),
    ("shards", "s/classes.txt", True),
    ("shards", "s/shards.index", False),
]


@pytest.mark.parametrize(("kind", "closed", "labeled"), DENIED)
def test_what_may_not_be_read_is_named_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, closed: str, labeled: bool
) -> None:
    """The system's calls refuse one path, because a superuser may read whatever its mode forbids."""
    write(tmp_path, {"a/cat/1.jpg": "", "train.txt": "a/cat/1.jpg 0", "names.txt": "cat", "s/classes.txt": "cat"})
    write_tar(tmp_path / "s/0.tar", {"a.jpg": "", "a.cls": "0"})
    (tmp_path / "s/shards.index").write_bytes(b"")
    spec: dict[str, dict[str, str]] = {
        "folder": {"folder": str(tmp_path / "a")},
        "list": {"list": str(tmp_path / "train.txt")},
        "classes": {"list": str(tmp_path / "train.txt"), "classes": str(tmp_path / "names.txt")},
        "shards": {"shards": str(tmp_path / "s")},
    }

    def refuse(call, itself: bool):
        def checked(path, *rest, **options):
            place = Path(path) if isinstance(path, str | Path) else Path()
            if tmp_path / closed in place.parents or (itself and place == tmp_path / closed):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return call(path, *rest, **options)

        return checked

    # the folder above says that it is there, and no more
    monkeypatch.setattr(os, "stat", refuse(os.stat, itself=False))
    monkeypatch.setattr(os, "scandir", refuse(os.scandir, itself=True))
    monkeypatch.setattr(io, "open", refuse(io.open, itself=True))
    monkeypatch.setattr("builtins.open", refuse(open, itself=True))
    refused(DataError, spec[kind], str(tmp_path / closed), "got: Permission denied; give this user", labeled=labeled)


def test_a_name_that_is_too_long_is_refused_as_data() -> None:
    refused(DataError, "x" * 300, "File name too long")


def test_a_wrong_kind_is_told(tmp_path: Path) -> None:
    write(tmp_path, {"train.txt": "a.jpg 0"})
    refused(DataError, {"folder": str(tmp_path / "train.txt")}, "expected a folder, got a file")
    refused(DataError, {"list": str(tmp_path)}, "expected a list file, got a folder")
