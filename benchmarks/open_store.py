"""Seconds to open a store of 1,000 label shards and to read the first batch.

    python benchmarks/open_store.py

A million images in 1,000 shards of 1,000, two views, K = 10 of 1,000 classes; the files hold random labels. Asked for:
under one second. Median of five, each in a process of its own; the files are in the page cache.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np

from ssld.contracts import TeacherSpec
from ssld.data.loader import Replay
from ssld.data.order import Order
from ssld.data.samples import Samples
from ssld.data.sources import open_source
from ssld.data.transforms import Pipeline
from ssld.labels.format import pack
from ssld.labels.reader import Reader, StoredLabels
from ssld.labels.store import Description, Store

SHARDS, VIEWS, CLASSES, BATCH = 1000, 2, 1000, 64


def pool() -> Samples:
    return open_source(f"builtin:shapes?count={SHARDS * 1000}&size=64", labeled=False)


def store(folder: Path) -> Store:
    names = tuple(map(str, range(CLASSES)))
    pipeline = Pipeline.read(["RandCropImage", "RandFlipImage", "NormalizeImage"], 64)
    return Store(folder, Description(TeacherSpec(64, "noise"), pipeline, Replay(0, VIEWS), 10, 1.0, names, "noise"))


def fill(folder: Path) -> None:
    """The same labels in every shard."""
    kept, samples = store(folder), pool()
    logits = np.random.default_rng(0).normal(0, 3, (1000, VIEWS, CLASSES)).astype(np.float32)
    packed = pack(logits, 10)
    kept.begin()
    for shard in range(SHARDS):
        kept.commit(samples, shard, packed, None, 1)


def read(folder: Path) -> float:
    """Seconds from a set of samples and a store to the first batch's labels; the sha256 of every file is checked."""
    samples = pool()
    began = time.perf_counter()
    reader = Reader(store(folder), samples)
    assert not reader.open(range(SHARDS))
    indices, epochs = Order(samples.shard_sizes, seed=0).batch(0, BATCH)
    soft = StoredLabels("noise", ((reader, 1.0),)).at(indices, epochs % VIEWS)
    assert soft.logits.shape == (BATCH, 11)
    return time.perf_counter() - began


def main() -> None:
    """Print the median."""
    if len(sys.argv) > 1:
        click.echo(read(Path(sys.argv[1])))
        return
    with tempfile.TemporaryDirectory() as name:
        fill(Path(name))
        calls = [subprocess.run([sys.executable, __file__, name], check=True, capture_output=True) for _ in range(5)]
    seconds = statistics.median(float(call.stdout) for call in calls)
    click.echo(f"{SHARDS} label shards opened, checked, and the first batch read in {seconds:.2f} s")


if __name__ == "__main__":
    main()
