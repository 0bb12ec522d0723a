"""A whole distillation epoch from the store against the bare training step.

    python benchmarks/epoch.py

The epoch is a stage of `ssld run`: JPEG files read, cropped and flipped, labels from files, the log, and at the end
the export of the student and an evaluation on a tenth as many images (the validation set, and those on which student
and teacher are compared). The export takes as long whatever the epoch, hence two sizes. The bare step is the same
network at the same batch, on noise in memory, in the same process right before and right after.
"""

import tempfile
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

from material import CLASSES, STUDENT, distilled, jpegs, stepper
from measuring import Row, Turns, alone, interleaved, rate

import ssld
from ssld.train import networks

SIDE, SIZE, BATCH = 112, 64, 64
SIZES, SECONDS = ((4224, 288), (16896, 1152)), 5.0
"""Images of the pool, of which a thirty-second is held out to compare student and teacher on, and for validation."""


def epochs(folder: Path, images: int, validation: int) -> Callable[[], float]:
    """Images per second of an epoch each time; the labels are made in a run before."""
    pool, held = (jpegs(folder / name, number, SIDE) for name, number in (("pool", images), ("validation", validation)))
    labels = {"views": 1, "top_k": 10, "store": str(folder / "labels")}
    recipe = distilled(folder, "MobileNetV3_small_x0_35", SIZE, pool, held, labels)
    numbers = count()

    def run() -> float:
        found = ssld.run(recipe, folder / f"run-{next(numbers)}", trust_teacher=True)
        [(node, status)] = found.stages
        return node.samples / status.seconds

    run()
    return run


def rows(quick: bool) -> Iterator[Row]:
    seconds = 0.2 if quick else SECONDS
    step = stepper(networks.build(STUDENT, {}, CLASSES), SIZE, BATCH)
    step()

    def bare() -> float:
        return rate(step, BATCH, seconds)

    for images, validation in ((2 * BATCH, 8),) if quick else SIZES:
        with tempfile.TemporaryDirectory() as name:
            epoch = epochs(Path(name), images, validation)
            turns = interleaved({"before": bare, "epoch": epoch, "after": bare}, quick)
        turns = Turns([{**turn, "bare": (turn["before"] + turn["after"]) / 2} for turn in turns.found])
        ratio, bare_step = turns.ratio("epoch", "bare"), f"bare step {turns.median('bare'):.0f} img/s"
        what = f"epoch of {images:,} images from the store, {SIZE} px"
        yield Row(
            what, turns.median("epoch"), "img/s", ratio, "bare step", "≥ 0.85", f"{STUDENT}, batch {BATCH}; {bare_step}"
        )


if __name__ == "__main__":
    alone(rows)
