from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from ssld.data import samples as samples_module
from ssld.data.samples import Samples
from ssld.data.sources import open_source
from ssld.errors import DataError


def write(root: Path, files: Mapping[str, bytes | str]) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return root


def contents(samples: Samples) -> list[str]:
    return [bytes(samples.read(i)).decode() for i in range(len(samples))]


def labels(samples: Samples) -> list[int] | None:
    return None if samples.labels is None else samples.labels.tolist()


def refused(error: type[Exception], spec: str | dict[str, Any], *parts: str, labeled: bool = True) -> None:
    with pytest.raises(error) as caught:
        open_source(spec, labeled=labeled)
    missing = [part for part in parts if part not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"


TREE = {"dog/1.jpg": "d1", "cat/deep/er/2.PNG": "c2", "cat/1.webp": "c1", "cat/notes.txt": "-", ".hidden/3.jpg": "-"}

# folders


def test_a_labeled_folder_takes_its_classes_from_its_folders(tmp_path: Path) -> None:
    found = open_source(str(write(tmp_path, TREE)), labeled=True)
    assert found.classes == ("cat", "dog")
    assert contents(found) == ["c1", "c2", "d1"]
    assert labels(found) == [0, 0, 1]
    assert [found.key(i) for i in range(3)] == ["cat/1.webp", "cat/deep/er/2.PNG", "dog/1.jpg"]
    assert found.where(2) == str(tmp_path / "dog/1.jpg")


def test_an_unlabeled_folder_takes_all_images_and_no_classes(tmp_path: Path) -> None:
    found = open_source({"folder": str(write(tmp_path, {**TREE, "0.jpeg": "top"}))}, labeled=False)
    assert contents(found) == ["top", "c1", "c2", "d1"]
    assert (found.labels, found.classes) == (None, None)


def test_folders_are_cut_into_virtual_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples_module, "VIRTUAL_SHARD", 2)
    assert open_source(str(write(tmp_path, TREE)), labeled=False).shard_sizes.tolist() == [2, 1]


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    write(tmp_path, {"far/1.jpg": "linked"})
    (tmp_path / "near").mkdir()
    (tmp_path / "near/link").symlink_to(tmp_path / "far")
    assert contents(open_source(str(tmp_path / "near"), labeled=False)) == ["linked"]
    (tmp_path / "near/circle").symlink_to(tmp_path / "near")
    refused(DataError, str(tmp_path / "near"), "link to a folder above it", labeled=False)


def test_a_broken_link_is_named(tmp_path: Path) -> None:
    (tmp_path / "1.jpg").symlink_to(tmp_path / "gone")
    refused(DataError, str(tmp_path), "1.jpg", "No such file", labeled=False)


@pytest.mark.parametrize(
    ("files", "labeled", "parts"),
    [
        ({"notes.md": ""}, False, [".jpg, .jpeg, .png, .webp"]),
        ({"1.jpg": ""}, True, ["one sub-folder per class", "1 images and no sub-folder"]),
        ({"1.jpg": "", "cat/2.jpg": ""}, True, ["got 1 beside them, first 1.jpg"]),
        ({"cat/1.jpg": "", "cow/.keep": ""}, True, ["of class 'cow', got none"]),
    ],
)
def test_folders_that_hold_something_else_are_refused(
    tmp_path: Path, files: dict[str, str], labeled: bool, parts: list[str]
) -> None:
    refused(DataError, str(write(tmp_path, files)), str(tmp_path), *parts, labeled=labeled)


def test_the_identity_follows_names_sizes_times_and_labels_but_not_the_place(tmp_path: Path) -> None:
    def identity(labeled: bool = True, root: Path = tmp_path / "a") -> str:
        return open_source(str(root), labeled=labeled).identity

    write(tmp_path / "a", {"cat/1.jpg": "x", "dog/1.jpg": "y"})
    os.utime(tmp_path / "a/cat/1.jpg", ns=(0, 5))
    seen = [identity(), identity(labeled=False)]
    (tmp_path / "a").rename(tmp_path / "b")
    assert identity(root=tmp_path / "b") == seen[0]
    (tmp_path / "b").rename(tmp_path / "a")
    os.utime(tmp_path / "a/cat/1.jpg", ns=(0, 6))
    seen.append(identity())
    (tmp_path / "a/cat").rename(tmp_path / "a/cow")
    seen.append(identity())
    assert len(set(seen)) == len(seen)


def rewritten(path: Path) -> None:
    """As many bytes as before, a nanosecond later."""
    later = path.stat().st_mtime_ns + 1
    path.write_bytes(bytes(reversed(path.read_bytes())))
    os.utime(path, ns=(later, later))


def replaced(path: Path) -> None:
    """Another file of as many bytes, an older one, as a backup that is put in its place."""
    path.with_suffix(".new").write_bytes(bytes(reversed(path.read_bytes())))
    os.utime(path.with_suffix(".new"), ns=(0, 10**18))
    path.with_suffix(".new").replace(path)


@pytest.mark.parametrize(
    ("change", "got"),
    [
        (lambda path: path.write_bytes(b"longer"), "got 6 bytes written at 20"),
        (lambda path: path.write_bytes(b""), "got 0 bytes written at 20"),
        (rewritten, "got 2 bytes written at 20"),
        (replaced, "got 2 bytes written at 2001-09-09T01:46:40.000000000Z"),
        (Path.unlink, "got: No such file"),
    ],
)
def test_a_file_that_changed_since_is_named(tmp_path: Path, change: Callable[[Path], Any], got: str) -> None:
    found = open_source(str(write(tmp_path, TREE)), labeled=True)
    assert found.read(2) == b"d1"
    change(tmp_path / "dog/1.jpg")
    with pytest.raises(DataError, match=rf"dog/1\.jpg: expected .*{got}"):
        found.read(2)
    assert found.read(0) == b"c1"


def test_a_file_that_only_got_other_rights_or_another_name_beside_its_own_is_the_same(tmp_path: Path) -> None:
    found = open_source(str(write(tmp_path, TREE)), labeled=True)
    (tmp_path / "dog/1.jpg").chmod(0o444)
    os.link(tmp_path / "dog/1.jpg", tmp_path / "another.jpg")
    assert found.read(2) == b"d1"


@pytest.mark.parametrize(
    ("spec", "labeled", "message"),
    [
        ("folder: cat", False, "cat/b.png: expected a file, got a named pipe"),
        ("folder: .", True, "cat/b.png: expected a file, got a named pipe"),
        ("folder: cat/links", False, "cat/links/c.png: expected a file, got a named pipe"),
        ("list: pipe.txt", True, "pipe.txt:2: cat/b.png: expected a file, got a named pipe"),
        ("list: device.txt", True, "device.txt:3: /dev/zero: expected a file, got a device"),
        ("list: folder.txt", True, "folder.txt:1: cat: expected a file, got a folder"),
        ("list: cat/b.png", True, "cat/b.png: expected a list file, got a named pipe"),
        ("list: /dev/zero", True, "/dev/zero: expected a list file, got a device"),
    ],
)
def test_what_may_be_read_for_ever_is_refused_and_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, labeled: bool, message: str
) -> None:
    lists = {"pipe.txt": "cat/a.png 0\ncat/b.png 0", "device.txt": "cat/a.png 0\n\n/dev/zero 1", "folder.txt": "cat 0"}
    write(tmp_path, {**lists, "cat/a.png": "a", "cat/links/d.png": "d"})
    os.mkfifo(tmp_path / "cat/b.png")
    (tmp_path / "cat/links/c.png").symlink_to("../b.png")
    monkeypatch.chdir(tmp_path)
    refused(DataError, dict([spec.split(": ")]), message, labeled=labeled)


def test_a_file_that_grew_without_end_is_read_no_further_than_one_byte(tmp_path: Path) -> None:
    found = open_source(str(write(tmp_path, TREE)), labeled=True)
    with open(tmp_path / "dog/1.jpg", "r+b") as file:
        file.truncate(2**40)
    with pytest.raises(DataError, match=r"dog/1\.jpg: expected 2 bytes .*, got 1099511627776 bytes"):
        found.read(2)


# list files


def test_a_list_file_splits_at_the_last_space(tmp_path: Path) -> None:
    write(tmp_path, {"im/a b.jpg": "ab", "im/c.jpg": "c", "train.txt": "im/a b.jpg 1\n\nim/c.jpg 0\r\n"})
    found = open_source(str(tmp_path / "train.txt"), labeled=True)
    assert contents(found) == ["ab", "c"]
    assert labels(found) == [1, 0]
    assert found.classes is None
    assert found.where(0) == str(tmp_path / "im/a b.jpg")


def test_a_list_file_without_labels_with_a_root_and_with_classes(tmp_path: Path) -> None:
    write(tmp_path, {"im/a b.jpg": "ab", "im/c.jpg": "c", "l/1.txt": "a b.jpg\nc.jpg nonsense\n", "l/2.txt": "c.jpg 1"})
    root = str(tmp_path / "im")
    assert contents(open_source({"list": str(tmp_path / "l/1.txt"), "root": root}, labeled=False)) == ["ab", "c"]
    write(tmp_path, {"names.txt": "cat\nsea lion\n"})
    spec = {"list": str(tmp_path / "l/2.txt"), "root": root, "classes": str(tmp_path / "names.txt")}
    assert open_source(spec, labeled=True).classes == ("cat", "sea lion")


@pytest.mark.parametrize(
    ("lines", "parts"),
    [
        ("a.jpg 0\nb.jpg", [":2:", "got no label"]),
        ("a.jpg 0\nb", [":2:", "got no label"]),
        ("a.jpg 0\nb.jpg cat", [":2:", "got 'cat'"]),
        ("a.jpg -1", [":1:", "got '-1'"]),
        ("a.jpg 1.0", [":1:", "got '1.0'"]),
        ("a.jpg 2", [":1:", "label in [0, 1]", "got 2"]),
        ("a.jpg 0\n\na.jpg 1", [":3:", "a.jpg as in line 1"]),
        ("a.jpg 0\nx.jpg 0\ny.jpg 0\n", ["2 of 3 missing", "line 2: x.jpg, line 3: y.jpg"]),
        ("a\0.jpg 0", ["1 of 1 missing"]),
        ("\n", ["expected lines"]),
    ],
)
def test_faults_of_a_list_are_named_by_line(tmp_path: Path, lines: str, parts: list[str]) -> None:
    write(tmp_path, {"a.jpg": "", "b.jpg": "", "train.txt": lines, "names.txt": "cat\ndog"})
    spec = {"list": str(tmp_path / "train.txt"), "classes": str(tmp_path / "names.txt")}
    refused(DataError, spec, str(tmp_path / "train.txt"), *parts)


@pytest.mark.parametrize(
    ("names", "part"),
    [(b"cat\n\ndog", ":2:"), (b"cat\ncat", ":2:"), (b"", ":1:"), (b"\xff\xfe", "UTF-8"), (None, "no such file")],
)
def test_faults_of_a_classes_file_are_named(tmp_path: Path, names: bytes | None, part: str) -> None:
    write(tmp_path, {"a.jpg": "", "train.txt": "a.jpg 0", **({} if names is None else {"names.txt": names})})
    spec = {"list": str(tmp_path / "train.txt"), "classes": str(tmp_path / "names.txt")}
    refused(DataError, spec, str(tmp_path / "names.txt"), part)
