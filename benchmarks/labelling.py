"""Labelling throughput ÷ the teacher's bare forward throughput, and the memory that labelling takes.

    python benchmarks/labelling.py
    python benchmarks/labelling.py --memory

First: ResNet50_vd at 64 px over JPEG files of 96 px, two views; median of five turns of both in one run. Asked for: at
least 0.90. Second: peak resident memory of labelling 1,000 and 100,000 drawn images, each in a process of its own.
"""

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np
from PIL import Image

from ssld.contracts import Teacher, TeacherSpec
from ssld.data.loader import Damage, Replay
from ssld.data.samples import Samples
from ssld.data.sources import open_source
from ssld.data.transforms import Pipeline
from ssld.labels.labelling import Work, label
from ssld.labels.store import Description, Store
from ssld.teaching.asking import prepare

SIZE, CLASSES, IMAGES, TURNS = 64, 1000, 160, 5
PIPELINE = Pipeline.read(["RandCropImage", "RandFlipImage", "NormalizeImage"], SIZE)


class Frozen:
    """A network with random weights, run as a teacher is."""

    spec = TeacherSpec(SIZE, "random weights")

    def __init__(self, network: str) -> None:
        from ssld.train import frozen, networks

        self.predict = frozen.Frozen(networks.build(network, {}, CLASSES), SIZE)


def jpegs(folder: Path) -> Samples:
    """Drawn images as JPEG files of quality 90."""
    drawn = open_source(f"builtin:shapes?count={IMAGES}&size=96", labeled=False)
    folder.mkdir()
    for i in range(IMAGES):
        Image.fromarray(drawn.read(i)).save(folder / f"{i:05d}.jpg", quality=90)
    return open_source(str(folder), labeled=False)


def run(samples: Samples, teacher: Teacher, folder: Path) -> float:
    """Views per second of labelling, files written and all."""
    names = tuple(map(str, range(CLASSES)))
    store = Store(folder, Description(teacher.spec, PIPELINE, Replay(0, 2), 10, 1.0, names, "the teacher"))
    began = time.perf_counter()
    label(store, teacher, samples, store.missing(samples), Work(Damage(0)))
    return 2 * len(samples) / (time.perf_counter() - began)


def bare(teacher: Teacher) -> float:
    """Views per second of the same number of views in batches that are ready."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, SIZE, SIZE, 3), dtype=np.uint8)
    ready = prepare(pixels, teacher.spec)
    began = time.perf_counter()
    for _ in range(2 * IMAGES // 64):
        teacher.predict(ready)
    return 2 * IMAGES / (time.perf_counter() - began)


def speed() -> None:
    """Print both speeds and their ratio."""
    teacher, pairs = Frozen("ResNet50_vd"), []
    with tempfile.TemporaryDirectory() as name:
        samples = jpegs(Path(name, "images"))
        bare(teacher)
        for turn in range(TURNS):
            pairs.append((run(samples, teacher, Path(name, str(turn))), bare(teacher)))
    made, forward = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(one / other for one, other in pairs)
    click.echo(f"labelling {made:.1f} views/s, bare forward {forward:.1f} views/s, ratio {ratio:.3f}")


def memory() -> None:
    """Print the peak of both sizes of pool."""
    peaks = [
        int(subprocess.run([sys.executable, __file__, "--drawn", count], check=True, capture_output=True).stdout)
        for count in ("1000", "100000")
    ]
    click.echo(f"peak of labelling 1,000 images {peaks[0]} MiB, 100,000 images {peaks[1]} MiB")


@click.command()
@click.option("--memory", "of_memory", is_flag=True)
@click.option("--drawn", type=int, hidden=True)
def main(of_memory: bool, drawn: int | None) -> None:
    """One of the two measurements."""
    if drawn is not None:
        samples = open_source(f"builtin:shapes?count={drawn}&size=32", labeled=False)
        with tempfile.TemporaryDirectory() as name:
            run(samples, Frozen("MobileNetV3_small_x0_35"), Path(name))
        click.echo(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
    elif of_memory:
        memory()
    else:
        speed()


if __name__ == "__main__":
    main()
