"""From a source to tar shards: the original bytes, in a layout that a thousand readers can share."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from webdataset import TarWriter

from ssld.data.classes import CLASSES_FILE
from ssld.data.images import FORMATS, decode
from ssld.data.index import SIDECAR, index_shard, join
from ssld.data.samples import Samples
from ssld.errors import DataError, OutputError, RecipeError, StorageError
from ssld.files import disk

_WORK = ".packing"
"""Where shards are written, in the output directory, until all are whole; a killed run may leave it behind."""
_BATCH = 256

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class PackReport:
    """written: samples in the shards; shards: how many; damaged: where each image that was left out lies, and why."""

    written: int
    shards: int
    damaged: tuple[str, ...]


def pack(
    source: Samples, out: Path, *, shard_size: int = 1000, max_damaged: int = 0, progress: Progress | None = None
) -> PackReport:
    """Write a source as shards shard-000000.tar, … with classes.txt and the index of all of them beside.

    The same source gives the same bytes. shard_size: samples per shard; progress(done, total) follows every image.
    Raises DataError at more than `max_damaged` images that cannot be decoded, OutputError where `out` is not an empty
    or a new directory, StorageError where writing fails; nothing is left in `out` then.
    """
    if shard_size < 1:
        raise RecipeError(f"expected at least 1 sample per shard, got {shard_size}")
    is_new = _prepare(out)
    work = out / _WORK
    damaged: list[str] = []
    try:
        shards = _write_shards(_samples(source, damaged, max_damaged, progress), work, shard_size)
        _write_sidecars(source, work, shards)
        _publish(work, out)
    except BaseException as error:
        _clear(out, is_new)
        if isinstance(error, OSError):
            raise StorageError(f"{out}: expected to write shards, got: {error}; free space or mend the disk") from error
        raise
    return PackReport(len(source) - len(damaged), len(shards), tuple(damaged))


def _prepare(out: Path) -> bool:
    """Make the empty directories; says whether `out` is new."""
    try:
        is_new = not out.exists()
        out.mkdir(parents=True, exist_ok=True)
        others = sorted(entry.name for entry in out.iterdir() if entry.name != _WORK)
        if others:
            raise OutputError(f"{out}: expected an empty or a new directory, got {others[0]} in it; choose another")
        shutil.rmtree(out / _WORK, ignore_errors=True)
        (out / _WORK).mkdir()
    except OSError as error:
        raise OutputError(f"{out}: expected to create this directory, got: {error.strerror}; choose another") from error
    return is_new


def _samples(
    source: Samples, damaged: list[str], max_damaged: int, progress: Progress | None
) -> Iterator[dict[str, Any]]:
    """Samples as TarWriter wants them, numbered without gaps; damaged images are added to the list."""
    number = 0
    for i, image in enumerate(_checked(source), 1):
        if isinstance(image, DataError):
            damaged.append(str(image))
            if len(damaged) > max_damaged:
                raise DataError(
                    f"{source.name}: expected at most {max_damaged} damaged images, got {len(damaged)}: "
                    f"{'; '.join(damaged[-3:])}; repair or remove them, or allow more by --max-damaged"
                ) from image
        else:
            label = {} if source.labels is None else {"cls": b"%d" % source.labels[i - 1]}
            yield {"__key__": f"{number:09d}", **image, **label}
            number += 1
        if progress is not None:
            progress(i, len(source))
    if not number:
        raise DataError(f"{source.name}: expected images that can be decoded, got none")


def _checked(source: Samples) -> Iterator[dict[str, bytes] | DataError]:
    """Every image by its extension, or what is wrong with it, in order; decoded in threads, a batch at a time."""

    def check(i: int) -> dict[str, bytes] | DataError:
        try:
            return _load(source, i)
        except DataError as error:
            return error

    with ThreadPoolExecutor() as threads:
        for start in range(0, len(source), _BATCH):
            yield from threads.map(check, range(start, min(start + _BATCH, len(source))))


def _load(source: Samples, i: int) -> dict[str, bytes]:
    data = source.read(i)
    if isinstance(data, np.ndarray):
        buffer = io.BytesIO()
        Image.fromarray(data).save(buffer, "PNG")
        return {"png": buffer.getvalue()}
    try:
        decode(data)
    except DataError as error:
        raise DataError(f"{source.where(i)}: {error}") from error
    return {_extension(data): data}


def _extension(data: bytes) -> str:
    """What the name of the member ends in, by the content: a file's own name may say nothing, or be wrong."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        # JPEG has two names: Pillow calls it MPO where more pictures follow the first
        return {"PNG": "png", "WEBP": "webp"}.get(str(image.format), "jpg")


def _write_shards(samples: Iterator[dict[str, Any]], folder: Path, shard_size: int) -> list[Path]:
    shards: list[Path] = []
    for first in samples:
        shard = folder / f"shard-{len(shards):06d}.tar"
        with shard.open("wb") as file, TarWriter(file, encoder=False, mtime=0) as writer:
            for sample in chain([first], islice(samples, shard_size - 1)):
                writer.write(sample)
        disk.fsync(shard)
        shards.append(shard)
    return shards


def _write_sidecars(source: Samples, folder: Path, shards: list[Path]) -> None:
    contents = {SIDECAR: join([index_shard(shard) for shard in shards]).encode()}
    if source.classes is not None:
        contents[CLASSES_FILE] = "".join(f"{name}\n" for name in source.classes).encode()
    for name, data in contents.items():
        disk.write(folder / name, data)
        disk.fsync(folder / name)


def _publish(work: Path, out: Path) -> None:
    """Move the whole files to their place, the sidecar last."""
    for file in sorted(work.iterdir(), key=lambda file: (file.name == SIDECAR, file.name)):
        disk.replace(file, out / file.name)
    work.rmdir()
    disk.fsync_directory(out)
    disk.fsync_directory(out.parent)


def _clear(out: Path, is_new: bool) -> None:
    """Leave what was there before: nothing, or an empty directory. What cannot be removed is not what is to be told."""
    for entry in () if is_new else tuple(out.iterdir()):
        with suppress(OSError):
            disk.remove(entry)
    if is_new:
        shutil.rmtree(out, ignore_errors=True)
