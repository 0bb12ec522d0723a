from __future__ import annotations

import errno
import gzip
import hashlib
import io
import os
import re
import subprocess
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from ssld.data import index as index_module
from ssld.data.index import (
    ABANDONED,
    BAD_LABEL,
    NO_LABEL,
    SIDECAR,
    Index,
    decode_index,
    index_shard,
    join,
    load_index,
    split_name,
)
from ssld.errors import DataError, OutputError, StorageError
from ssld.files import disk

SAMPLES = [("a.jpg", b"first" * 300), ("a.cls", b"3"), ("b.cls", b" 0\n"), ("b.png", b"second"), ("c.webp", b"third")]


HEAD = len(b"ssld index 1\n") + 32
"""Bytes before the columns of an index: what it is, and their sha256."""


def write_tar(path: Path, members: Sequence[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def slices(path: Path, index: Index) -> list[bytes]:
    data = path.read_bytes()
    return [data[start : start + size] for start, size in zip(index.offsets, index.sizes, strict=True)]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_index_says_where_the_bytes_lie(tmp_path: Path, format: int) -> None:
    names = ["dir/a.jpg", "é.png", "x" * 90 + ".JPEG"] + (
        ["y" * 200 + ".jpg"] if format != tarfile.USTAR_FORMAT else []
    )
    members = [(name, os.urandom(700 + i)) for i, name in enumerate(names)]
    path = write_tar(tmp_path / "s.tar", members, format)
    index = index_shard(path)
    assert slices(path, index) == [data for _, data in members]
    assert [index.members[i].decode() for i in range(len(index.members))] == names
    assert index.lengths.tolist() == [path.stat().st_size]
    assert index.counts.tolist() == [len(members)]


def test_labels_are_read_and_what_is_no_label_is_marked(tmp_path: Path) -> None:
    bad = [
        ("d.jpg", b"x"),
        ("d.cls", b"-1"),
        ("e.jpg", b"x"),
        ("e.cls", b"cat"),
        ("f.jpg", b"x"),
        ("f.cls", "٣".encode()),
    ]
    index = index_shard(write_tar(tmp_path / "s.tar", [*SAMPLES, *bad]))
    assert index.labels.tolist() == [3, 0, NO_LABEL, BAD_LABEL, BAD_LABEL, BAD_LABEL]


@pytest.mark.parametrize(
    ("data", "label"),
    [
        (b"5".ljust(63) + b"\n", 5),
        (b"5".ljust(64) + b"7", BAD_LABEL),
        (b"5".ljust(64) + b"cat", BAD_LABEL),
        (b"5".ljust(65), BAD_LABEL),
        (b"5".rjust(65), BAD_LABEL),
        (b"5".ljust(100_000) + b"7", BAD_LABEL),
    ],
)
def test_a_label_is_read_to_its_end_or_is_none(tmp_path: Path, data: bytes, label: int) -> None:
    index = index_shard(write_tar(tmp_path / "s.tar", [("a.jpg", b"image"), ("a.cls", data)]))
    assert index.labels.tolist() == [label]


def test_other_members_hidden_names_and_folders_are_passed_over(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", [("._a.jpg", b"x"), ("README", b"x"), ("a.jpg", b"image"), ("a.json", b"{}")])
    with tarfile.open(path, "a") as tar:
        folder = tarfile.TarInfo("folder.jpg")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    assert slices(path, index_shard(path)) == [b"image"]


def link(path: Path, name: str, kind: bytes) -> Path:
    """Add a link to a.jpg, and another sample behind it."""
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, "a.jpg"
        tar.addfile(info)
        tar.addfile(tarfile.TarInfo("z.jpg"))
    return path


KINDS = [(tarfile.LNKTYPE, "hard", "hard-dereference"), (tarfile.SYMTYPE, "symbolic", "dereference")]


@pytest.mark.parametrize(("kind", "word", "option"), KINDS)
@pytest.mark.parametrize("name", ["b.jpg", "b.PNG", "a.cls", "train/b.webp", f"{'b' * 200}.jpeg"])
def test_a_link_in_place_of_a_part_of_a_sample_is_refused(
    tmp_path: Path, name: str, kind: bytes, word: str, option: str
) -> None:
    path = link(write_tar(tmp_path / "s.tar", [("a.jpg", b"image")]), name, kind)
    with pytest.raises(DataError, match=rf"s\.tar: {name}: .* a {word} link at byte 1024; .*`tar --{option}` or"):
        index_shard(path)


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
@pytest.mark.parametrize("name", ["README", "a.json", "a.seg.png", "latest", "._b.jpg"])
def test_a_link_that_is_no_part_of_a_sample_is_passed_over(tmp_path: Path, name: str, kind: bytes) -> None:
    path = link(write_tar(tmp_path / "s.tar", [("a.jpg", b"image")]), name, kind)
    assert slices(path, index_shard(path)) == [b"image", b""]


def test_the_remedy_for_links_that_tar_writes_by_itself_helps(tmp_path: Path) -> None:
    if b"GNU" not in subprocess.run(["tar", "--version"], capture_output=True, check=True).stdout:
        pytest.skip("another tar has other options")
    (tmp_path / "a.jpg").write_bytes(b"image")
    os.link(tmp_path / "a.jpg", tmp_path / "b.jpg")
    command = ["tar", "--create", "--file=s.tar", "a.jpg", "b.jpg"]
    subprocess.run(command, cwd=tmp_path, check=True)
    with pytest.raises(DataError, match="hard link") as refused:
        index_shard(tmp_path / "s.tar")
    [option] = re.findall(r"`tar (--[a-z-]+)`", str(refused.value))
    subprocess.run([*command, option], cwd=tmp_path, check=True)
    assert slices(tmp_path / "s.tar", index_shard(tmp_path / "s.tar")) == [b"image"] * 2


def test_an_index_from_before_links_were_refused_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cache = write_tar(tmp_path / "s.tar", [("a.jpg", b"image")]), tmp_path / "cache"
    with monkeypatch.context() as before:
        before.setattr(index_module, "_RULES", 1)
        load_index([path], cache)
        link(path, "b.jpg", tarfile.LNKTYPE)
        before.setattr(index_module, "_expect_no_sample", lambda *_: None)
        assert len(load_index([path], cache).members) == 2
    with pytest.raises(DataError, match="hard link"):
        load_index([path], cache)


@pytest.mark.parametrize(
    ("name", "split"),
    [("a.jpg", ("a", "jpg")), ("a.b.JPG", ("a", "b.jpg")), ("x.y/a.jpg", ("x.y/a", "jpg")), (".a.jpg", ("", "a.jpg"))],
)
def test_names_split_as_webdataset_splits_them(name: str, split: tuple[str, str]) -> None:
    assert split_name(name) == split


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            [("a.jpg", b"1"), ("b.jpg", b"2"), ("a.cls", b"0")],
            "s.tar: a: expected the members of a sample side by side",
        ),
        ([("a.jpg", b"1"), ("b.jpg", b"2"), ("a.jpg", b"3")], "s.tar: a: .*two samples share it"),
        ([("a.jpg", b"1"), ("a.jpg", b"2")], "s.tar: a: expected one member .jpg, got two"),
        ([("a.jpg", b"1"), ("a.png", b"2")], "s.tar: a: expected one image .*got 2"),
        ([("a.cls", b"1"), ("a.seg.png", b"2")], "s.tar: a: expected one image .*got 0 .*cls, .seg.png"),
        ([], "expected samples, got a tar without any"),
    ],
)
def test_samples_that_are_not_whole_are_refused_by_name(
    tmp_path: Path, members: list[tuple[str, bytes]], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        index_shard(write_tar(tmp_path / "s.tar", members))


def test_a_shard_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole.tar", SAMPLES).read_bytes()
    cut = tmp_path / "cut.tar"
    end = index_shard(tmp_path / "whole.tar").offsets[-1] + 512 + 1024
    for length in sorted({*range(0, int(end), 512), *range(0, int(end), 97)}):
        cut.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"cut\.tar"):
            index_shard(cut)


def test_a_damaged_header_does_not_end_the_shard_silently(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", SAMPLES)
    data = bytearray(path.read_bytes())
    at = int(index_shard(path).offsets[2]) - 512
    data[at + 150] ^= 1  # in the checksum field of the last header
    path.write_bytes(data)
    with pytest.raises(DataError, match="header is damaged"):
        index_shard(path)


def test_joined_tars_are_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", SAMPLES)
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(DataError, match="two tars were joined"):
        index_shard(path)


@pytest.mark.parametrize(
    ("data", "message"), [(b"<html>" * 300, "no tar"), (gzip.compress(b"x" * 999, mtime=0), "gunzip")]
)
def test_what_is_no_tar_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "s.tar"
    path.write_bytes(data)
    with pytest.raises(DataError, match=message):
        index_shard(path)


def equal(a: Index, b: Index) -> bool:
    return a.encode() == b.encode()


def test_parts_and_join_undo_each_other_and_bytes_survive(tmp_path: Path) -> None:
    first = index_shard(write_tar(tmp_path / "1.tar", SAMPLES))
    second = index_shard(write_tar(tmp_path / "2.tar", [("ü.jpg", b"x"), ("zz.jpg", b"yy")]))
    both = decode_index(join([first, second]).encode())
    assert both is not None
    assert both.shards == ("1.tar", "2.tar")
    assert equal(both.part(0), first)
    assert equal(both.part(1), second)
    assert both.members[3] == "ü.jpg".encode()


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: b"", lambda data: data[:99] + b"?" + data[100:]]
)
def test_a_damaged_cache_entry_is_made_anew(tmp_path: Path, damage) -> None:
    path, cache = write_tar(tmp_path / "s.tar", SAMPLES), tmp_path / "cache"
    index = load_index([path], cache)
    (entry,) = cache.iterdir()
    whole = entry.read_bytes()
    entry.write_bytes(damage(whole))
    assert equal(load_index([path], cache), index)
    assert entry.read_bytes() == whole


def test_the_cache_spares_the_headers_until_the_shard_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cache = write_tar(tmp_path / "s.tar", SAMPLES), tmp_path / "cache"
    load_index([path], cache)
    os.utime(path, ns=(0, path.stat().st_mtime_ns))
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", None)
        assert load_index([path], cache).labels.tolist() == [3, 0, NO_LABEL]
    write_tar(path, SAMPLES[:2])
    assert load_index([path], cache).labels.tolist() == [3]


def test_a_sidecar_is_used_where_it_fits(tmp_path: Path) -> None:
    paths = [write_tar(tmp_path / f"{n}.tar", SAMPLES) for n in range(2)]
    index = join([index_shard(path) for path in paths])
    index.labels[:] = 7  # to be seen in what comes back
    (tmp_path / SIDECAR).write_bytes(index.encode())
    assert load_index(paths, tmp_path / "cache").labels.tolist() == [7] * 6
    write_tar(paths[0], [*SAMPLES, ("z.jpg", bytes(20000))])
    os.utime(paths[0], ns=(0, 0))
    assert load_index(paths, tmp_path / "cache").labels.tolist() == [3, 0, NO_LABEL, NO_LABEL, 7, 7, 7]


def test_a_sidecar_does_not_speak_for_a_shard_that_was_written_later(tmp_path: Path) -> None:
    """Other labels change neither the size of a tar, which is padded, nor its headers."""
    path = write_tar(tmp_path / "s.tar", [("a.jpg", b"x"), ("a.cls", b"3"), ("b.jpg", b"y"), ("b.cls", b"5")])
    (tmp_path / SIDECAR).write_bytes(index_shard(path).encode())
    before, indexed = path.stat(), (tmp_path / SIDECAR).stat().st_mtime_ns
    write_tar(path, [("a.jpg", b"x"), ("a.cls", b"5"), ("b.jpg", b"y"), ("b.cls", b"3")])
    os.utime(path, ns=(0, indexed + 1))
    assert path.stat().st_size == before.st_size
    assert load_index([path], tmp_path / "cache").labels.tolist() == [5, 3]


BIG = np.array([2**60, 5, 6])


def repacked(index: Index, **changed: object) -> bytes:
    """An index with other columns, whose sha256 is right."""
    buffer = io.BytesIO()
    with np.load(io.BytesIO(index.encode()[HEAD:])) as columns:
        np.savez(buffer, **{**columns, **changed})
    return index.encode()[: HEAD - 32] + hashlib.sha256(buffer.getvalue()).digest() + buffer.getvalue()


@pytest.mark.parametrize(
    "changed",
    [
        {"offsets": -BIG},
        {"sizes": BIG},
        {"sizes": -BIG},
        {"offsets": BIG, "sizes": BIG},
        {"ends": BIG},
        {"ends": np.array([4, 2, 6])},
        {"counts": np.array([2**40])},
        {"counts": np.array([-3])},
        {
            "counts": np.array([0, 3]),
            "lengths": np.array([9000, 9000]),
            "shards": np.frombuffer(b"s.tar\0t.tar", np.uint8),
        },
        {"labels": np.array([0, 0, -3])},
        {"labels": np.array([0, 0, 10**9])},
        {"labels": np.zeros(2, np.int64)},
        {"labels": np.zeros((3, 1), np.int64)},
        {"labels": np.zeros(3)},
        {"more": np.zeros(3)},
        {"labels": np.array([object()] * 3)},
        {"blob": np.zeros((), np.uint8)},
    ],
    ids=lambda changed: " and ".join(f"{key} {value.dtype} {value.shape}" for key, value in changed.items()),
)
def test_a_sidecar_that_lies_is_passed_over(tmp_path: Path, changed: dict[str, np.ndarray]) -> None:
    """Its sha256 says that it is as it was written, not that it speaks the truth."""
    path = write_tar(tmp_path / "s.tar", SAMPLES)
    index = index_shard(path)
    assert decode_index(repacked(index)) is not None
    assert decode_index(repacked(index, **changed)) is None
    (tmp_path / SIDECAR).write_bytes(repacked(index, **changed))
    assert equal(load_index([path], tmp_path / "cache"), index)


def test_a_cache_that_cannot_be_written_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match=r"a file is where a directory is needed .*XDG_CACHE_HOME"):
        load_index([write_tar(tmp_path / "s.tar", SAMPLES)], tmp_path / "file")


def test_a_full_disk_leaves_no_part_of_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(path: Path, data: bytes) -> None:
        path.write_bytes(data[:9])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path, cache = write_tar(tmp_path / "s.tar", SAMPLES), tmp_path / "cache"
    with monkeypatch.context() as full:
        full.setattr(disk, "write", write)
        with pytest.raises(StorageError, match=r"No space left on device; [\d,]+ bytes are needed .*XDG_CACHE_HOME"):
            load_index([path], cache)
    assert not list(cache.iterdir())
    assert equal(load_index([path], cache), index_shard(path))


def test_what_a_killed_process_left_in_the_cache_is_removed(tmp_path: Path) -> None:
    path, cache = write_tar(tmp_path / "s.tar", SAMPLES), tmp_path / "cache"
    load_index([path], cache)
    for name, age in {".tmp-old": ABANDONED + 60, ".tmp-new": ABANDONED - 60}.items():
        (cache / name).touch()
        os.utime(cache / name, (time.time() - age,) * 2)
    load_index([path], cache)
    assert [file.name for file in cache.iterdir() if file.suffix != ".index"] == [".tmp-new"]


def test_columns_are_compact(tmp_path: Path) -> None:
    index = index_shard(write_tar(tmp_path / "s.tar", [(f"{i:09d}.jpg", b"") for i in range(500)]))
    columns = (index.offsets, index.sizes, index.labels, index.members.ends)
    assert sum(column.nbytes for column in columns) + len(index.members.blob) <= 500 * (4 * 8 + 13)
    assert all(column.dtype == np.int64 for column in columns)
