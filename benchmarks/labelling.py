"""Labelling against the teacher's bare forward pass.

    python benchmarks/labelling.py

ResNet50_vd at 64 px, two views of JPEG files of 96 px; the bare pass has as many views, in batches that are ready.
"""

import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
from material import CLASSES, NAMES, jpegs, views
from measuring import Row, alone, interleaved, rate, timed

from ssld.contracts import Teacher, TeacherSpec
from ssld.data.loader import Damage, Replay
from ssld.data.samples import Samples
from ssld.data.sources import open_source
from ssld.labels.labelling import BATCH, Work, label
from ssld.labels.store import Description, Store
from ssld.teaching.asking import prepare
from ssld.train import networks
from ssld.train.frozen import Frozen

SIZE, IMAGES, VIEWS = 64, 160, 2


class Drawn:
    """A network with drawn weights, run as a teacher is."""

    spec = TeacherSpec(SIZE, "drawn weights")

    def __init__(self, network: str) -> None:
        self.predict = Frozen(networks.build(network, {}, CLASSES), SIZE)


def labelled(samples: Samples, teacher: Teacher, folder: Path) -> float:
    """Views per second, files written and all."""
    about = Description(teacher.spec, views(SIZE), Replay(0, VIEWS), 10, 1.0, NAMES, "the teacher")
    store = Store(folder, about)
    work = Work(Damage(0))
    return VIEWS * len(samples) / timed(lambda: label(store, teacher, samples, store.missing(samples), work))


def rows(quick: bool) -> Iterator[Row]:
    network, images = ("MobileNetV3_small_x0_35", 32) if quick else ("ResNet50_vd", IMAGES)
    teacher, numbers = Drawn(network), count()
    pixels = np.random.default_rng(0).integers(0, 256, (BATCH, SIZE, SIZE, 3), dtype=np.uint8)
    ready = prepare(pixels, teacher.spec)
    teacher.predict(ready)
    seconds = 0.0 if quick else 2.0
    with tempfile.TemporaryDirectory() as name:
        samples = open_source(jpegs(Path(name, "pool"), images, 96), labeled=False)
        measures = {
            "bare": lambda: rate(lambda: teacher.predict(ready), BATCH, seconds),
            "labelling": lambda: labelled(samples, teacher, Path(name, str(next(numbers)))),
        }
        turns = interleaved(measures, quick)
    ratio, how = turns.ratio("labelling", "bare"), f"{network}, 64 px; bare {turns.median('bare'):.0f} views/s"
    yield Row("labelling", turns.median("labelling"), "views/s", ratio, "bare", "≥ 0.90", how)


if __name__ == "__main__":
    alone(rows)
