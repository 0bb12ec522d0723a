"""How long data and labels take to be opened: the index of tar shards, and a store of label files.

    python benchmarks/opening.py

Shards of 1,000 samples, all of them links to one file, so that the time is that of reading headers and not of a disk;
cold is without an index, warm with the one that was kept then. The store has labels of a million images, two views,
K = 10 of 1,000 classes; every byte of it is checked, and the first batch is read.
"""

import io
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from measuring import TURNS, Row, alone, in_child

from ssld.contracts import TeacherSpec
from ssld.data.loader import Replay
from ssld.data.order import Order
from ssld.data.samples import Samples
from ssld.data.sources import open_source
from ssld.data.transforms import Pipeline
from ssld.labels.format import pack
from ssld.labels.reader import Reader, StoredLabels
from ssld.labels.store import Description, Store

EACH = 1000
SIZES = (10, 100, 1000)
STORED, VIEWS, CLASSES, BATCH = 1000, 2, 1000, 64


def link_shards(folder: Path, count: int) -> None:
    """One shard of samples that hold a byte each, under many names."""
    folder.mkdir()
    first = folder / "shard-000000.tar"
    with tarfile.open(first, "w") as tar:
        for number in range(EACH):
            member = tarfile.TarInfo(f"{number:09d}.jpg")
            member.size = 1
            tar.addfile(member, io.BytesIO(b"x"))
    for number in range(1, count):
        os.link(first, folder / f"shard-{number:06d}.tar")


def index(folder: str, cache: str) -> float:
    """Seconds until the shards of a folder are known."""
    began = time.perf_counter()
    open_source(folder, labeled=False, cache=Path(cache))
    return time.perf_counter() - began


def indexing(count: int, turns: int) -> Iterator[Row]:
    """Of so many shards; all in processes of their own."""
    cold, warm, peaks = [], [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "shards")
        link_shards(folder, count)
        for turn in range(turns):
            cache = str(Path(name, f"cache-{turn}"))
            seconds, peak = in_child(index, str(folder), cache)
            cold.append(seconds)
            peaks.append(peak)
            warm.append(in_child(index, str(folder), cache)[0])
    what = f"index of {count * EACH:,} samples"
    yield Row(f"{what}, cold", statistics.median(cold), "s", how=f"peak memory {statistics.median(peaks):.0f} MiB")
    ratio = statistics.median(one / other for one, other in zip(warm, cold, strict=True))
    yield Row(f"{what}, warm", statistics.median(warm), "s", ratio, "cold")


def pool(shards: int) -> Samples:
    return open_source(f"builtin:shapes?count={shards * EACH}&size=64", labeled=False)


def store(folder: Path) -> Store:
    names, teacher = tuple(map(str, range(CLASSES))), TeacherSpec(64, "noise")
    pipeline = Pipeline.read(["RandCropImage", "RandFlipImage", "NormalizeImage"], 64)
    return Store(folder, Description(teacher, pipeline, Replay(0, VIEWS), 10, 1.0, names, "noise"))


def fill(folder: Path, shards: int) -> None:
    """The same labels in every shard."""
    kept, samples = store(folder), pool(shards)
    logits = np.random.default_rng(0).normal(0, 3, (EACH, VIEWS, CLASSES)).astype(np.float32)
    packed = pack(logits, 10)
    kept.begin()
    for shard in range(shards):
        kept.commit(samples, shard, packed, None, 1)


def read(folder: str, shards: int) -> float:
    """Seconds from a set of samples and a store to the first batch's labels."""
    samples = pool(shards)
    began = time.perf_counter()
    reader = Reader(store(Path(folder)), samples)
    assert not reader.open(range(shards))
    indices, epochs = Order(samples.shard_sizes, seed=0).batch(0, BATCH)
    soft = StoredLabels("noise", ((reader, 1.0),)).at(indices, epochs % VIEWS)
    assert soft.logits.shape == (BATCH, 11)
    return time.perf_counter() - began


def rows(quick: bool) -> Iterator[Row]:
    turns = 1 if quick else TURNS
    for count in (2,) if quick else SIZES:
        yield from indexing(count, turns)
    shards = 2 if quick else STORED
    with tempfile.TemporaryDirectory() as name:
        fill(Path(name), shards)
        seconds = [in_child(read, name, shards)[0] for _ in range(turns)]
    name = f"store of {shards:,} label files opened, first batch read"
    yield Row(name, statistics.median(seconds), "s", asked="under 1 s")


if __name__ == "__main__":
    alone(rows)
