from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssld.data import index as index_module
from ssld.data.pack import PackReport, pack
from ssld.data.samples import Samples
from ssld.data.sources import open_source
from ssld.errors import DataError, OutputError, RecipeError, StorageError
from ssld.files import disk


def encoded(value: int, format: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (5, 4), (value, 2 * value, 0)).save(buffer, format)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, name in enumerate(["cat/a.JPG", "cat/b.c.png", "dog/a.jpg", "dog/z.webp", "owl/ö.jpeg"]):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(20 * i, {"png": "PNG", "webp": "WEBP"}.get(name.rpartition(".")[2], "JPEG")))
    return tmp_path / "in"


def tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def bytes_of(samples: Samples) -> list[bytes]:
    return [bytes(samples.read(i)) for i in range(len(samples))]


def test_what_is_packed_reads_as_what_went_in(tmp_path: Path, folder: Path) -> None:
    source, seen = open_source(str(folder), labeled=True), []
    report = pack(source, tmp_path / "out", shard_size=2, progress=lambda done, total: seen.append((done, total)))
    assert report == PackReport(written=5, shards=3, damaged=())
    assert seen == [(i, 5) for i in range(1, 6)]
    packed = open_source(str(tmp_path / "out"), labeled=True, cache=tmp_path / "cache")
    assert bytes_of(packed) == bytes_of(source)
    assert packed.classes == source.classes
    assert np.array_equal(packed.labels, source.labels)
    assert packed.shard_sizes.tolist() == [2, 2, 1]
    assert packed.where(0) == "shard-000000.tar: 000000000.jpg"
    assert packed.key(4) == "shard-000002/000000004"


def test_a_member_is_named_after_what_it_holds(tmp_path: Path) -> None:
    """List files often name images by hash, without an extension, or with a wrong one."""
    two = io.BytesIO()
    pages = [Image.new("RGB", (5, 4), colour) for colour in ("red", "blue")]
    pages[0].save(two, "MPO", save_all=True, append_images=pages[1:])
    images = {"a": encoded(1, "JPEG"), "v1.2/b": encoded(2, "PNG"), "c.jpg": encoded(3, "WEBP"), "d": two.getvalue()}
    (tmp_path / "v1.2").mkdir()
    for name, data in images.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "list.txt").write_text("".join(f"{name} 0\n" for name in images))
    pack(open_source(str(tmp_path / "list.txt"), labeled=True), tmp_path / "out")
    packed = open_source(str(tmp_path / "out"), labeled=True, cache=tmp_path / "cache")
    assert bytes_of(packed) == list(images.values())
    assert [packed.where(i).rpartition(".")[2] for i in range(4)] == ["jpg", "png", "webp", "jpg"]


def test_the_sidecar_spares_the_headers(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(open_source(str(folder), labeled=True), tmp_path / "out")
    monkeypatch.setattr(index_module, "index_shard", None)
    packed = open_source(str(tmp_path / "out"), labeled=True, cache=tmp_path / "cache")
    assert len(packed) == 5
    assert not (tmp_path / "cache").exists()


def test_the_shards_are_plain_tars_in_the_layout_of_webdataset(tmp_path: Path, folder: Path) -> None:
    pack(open_source(str(folder), labeled=True), tmp_path / "out")
    with tarfile.open(tmp_path / "out/shard-000000.tar", "r:") as tar:
        names = tar.getnames()
        extracted = tar.extractfile("000000004.cls")
        assert extracted is not None
        assert extracted.read() == b"2"
    assert names[:4] == ["000000000.cls", "000000000.jpg", "000000001.cls", "000000001.png"]
    assert (tmp_path / "out/classes.txt").read_text() == "cat\ndog\nowl\n"
    assert set(tree(tmp_path / "out")) == {"shard-000000.tar", "classes.txt", "shards.index"}


def test_the_same_input_gives_the_same_bytes(tmp_path: Path, folder: Path) -> None:
    for out in ("1", "2"):
        pack(open_source(str(folder), labeled=True), tmp_path / out, shard_size=2)
        os.utime(folder / "cat/a.JPG", ns=(0, 0))
    assert tree(tmp_path / "1") == tree(tmp_path / "2")


def test_unlabeled_and_drawn_sources_have_neither_labels_nor_classes(tmp_path: Path) -> None:
    source = open_source("builtin:shapes?count=3&size=16", labeled=False)
    pack(source, tmp_path / "out")
    packed = open_source(str(tmp_path / "out"), labeled=False, cache=tmp_path)
    for i in range(3):
        with Image.open(io.BytesIO(bytes(packed.read(i)))) as image:
            assert image.format == "PNG"
            assert np.array_equal(np.asarray(image), source.read(i))
    assert set(tree(tmp_path / "out")) == {"shard-000000.tar", "shards.index"}


def test_damaged_images_are_named_and_left_out_up_to_the_limit(tmp_path: Path, folder: Path) -> None:
    (folder / "cat/b.c.png").write_bytes(b"no image")
    whole = (folder / "dog/a.jpg").read_bytes()
    (folder / "dog/a.jpg").write_bytes(whole[: len(whole) // 2])
    source = open_source(str(folder), labeled=True)
    with pytest.raises(DataError, match=r"at most 1 damaged images, got 2: .*b\.c\.png.*dog/a\.jpg"):
        pack(source, tmp_path / "out", max_damaged=1)
    assert not (tmp_path / "out").exists()
    report = pack(source, tmp_path / "out", max_damaged=2)
    assert (report.written, report.shards) == (3, 1)
    assert [
        str(folder / name) in message
        for name, message in zip(["cat/b.c.png", "dog/a.jpg"], report.damaged, strict=True)
    ]
    packed = open_source(str(tmp_path / "out"), labeled=True, cache=tmp_path)
    assert bytes_of(packed) == [bytes(source.read(i)) for i in (0, 3, 4)]
    assert packed.labels is not None
    assert packed.labels.tolist() == [0, 1, 2]
    assert packed.key(2) == "shard-000000/000000002"


def test_nothing_but_damage_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match="can be decoded, got none"):
        pack(open_source(str(tmp_path / "in"), labeled=False), tmp_path / "out", max_damaged=5)


def test_only_an_empty_directory_is_written_to(tmp_path: Path, folder: Path) -> None:
    source = open_source(str(folder), labeled=True)
    with pytest.raises(OutputError, match=r"empty or a new directory, got cat"):
        pack(source, folder)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="file: expected"):
        pack(source, tmp_path / "file")
    (tmp_path / "out/.packing").mkdir(parents=True)  # what a killed run leaves
    (tmp_path / "out/.packing/shard-000009.tar").write_bytes(b"half")
    assert pack(source, tmp_path / "out").shards == 1
    assert "shard-000009.tar" not in tree(tmp_path / "out")
    with pytest.raises(RecipeError, match="at least 1"):
        pack(source, tmp_path / "other", shard_size=0)


def test_what_is_replaced_while_it_is_packed_is_named(tmp_path: Path, folder: Path) -> None:
    source = open_source(str(folder), labeled=True)
    os.utime(folder / "dog/z.webp", ns=(0, 0))
    with pytest.raises(DataError, match=r"dog/z\.webp: expected .* got \d+ bytes written at 1970-01-01T00:00:00"):
        pack(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("made_before", [False, True])
@pytest.mark.parametrize("call", ["fsync", "fsync_directory"])
def test_a_full_disk_leaves_nothing(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, made_before: bool, call: str
) -> None:
    def full(_path: Path) -> None:
        raise OSError(28, "No space left on device")

    if made_before:
        (tmp_path / "out").mkdir()
    # at the first shard, or when all files have their names
    monkeypatch.setattr(disk, call, full)
    with pytest.raises(StorageError, match=r"out: expected to write shards.*No space left"):
        pack(open_source(str(folder), labeled=True), tmp_path / "out")
    assert (tmp_path / "out").exists() == made_before
    assert not made_before or not list((tmp_path / "out").iterdir())
