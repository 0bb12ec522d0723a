"""What stored soft labels cost and save: a step from the store, and ten epochs against an online teacher.

    python benchmarks/stored.py

A step of MobileNetV3_small_x1_0 at 64 px, batch 64, on JPEG files, 10 of 1,000 classes kept, against a supervised step;
reading, decoding and all.

Ten epochs, labelling of two views included, with ResNet50_vd as the teacher: a whole run, less what the same run takes
for one step, since to start, to export the teacher and to evaluate once costs the same for ten epochs of any pool. T
and S, the cost of one pass of the teacher and of one training step, promise (2 T + 10 S) / (10 T + 10 S).
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from material import CLASSES, STUDENT, Source, distilled, jpegs, planned, quiet, stepper, supervised
from measuring import Row, alone, interleaved, rate, timed

import ssld
from ssld.contracts import Task
from ssld.graph import Plan
from ssld.inputs import Inputs
from ssld.journal import Journal
from ssld.preview.trial import endless, paced_steps, trial
from ssld.rundir import Options, RunDirectory
from ssld.train import networks
from ssld.train.frozen import Frozen

TEACHER, SIDE, SIZE, BATCH = "ResNet50_vd", 96, 64, 64
IMAGES, SECONDS = 2000, 4.0
POOL, EPOCHS, VIEWS = 640, 10, 2
FEW = 4
"""Images that make one step, and next to no labels."""


def step_speeds(folder: Path, images: int, journal: Journal, seconds: float) -> dict[str, Callable[[], float]]:
    """Images per second of a step on labels, and of one on soft labels in files."""
    networks.use_device("cpu")
    source = jpegs(folder / "pool", images, SIDE)
    hard = planned(supervised(folder, STUDENT, SIZE, BATCH, source))
    labels = {"views": VIEWS, "top_k": 10}
    soft = planned(distilled(folder, "MobileNetV3_small_x0_35", SIZE, source, source, labels))
    inputs = Inputs.of(RunDirectory(folder / "run"), soft, Options(), journal, lambda: None)
    own, taught = (trial(plan, plan.nodes[0], "cpu", journal, inputs.ranks) for plan in (hard, soft))
    taught = replace(taught, soft=inputs.soft.labels(soft.nodes[0]))

    def speed(task: Task[Any], plan: Plan) -> float:
        return paced_steps(plan.nodes[0].kind.run, endless(task, BATCH), seconds)

    return {"supervised": lambda: speed(own, hard), "stored": lambda: speed(taught, soft)}


def step_rows(quick: bool) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as name, closing(quiet()) as journal:
        images, seconds = (2 * BATCH, 0.0) if quick else (IMAGES, SECONDS)
        turns = interleaved(step_speeds(Path(name), images, journal, seconds), quick)
    ratio, how = turns.ratio("supervised", "stored"), f"supervised {turns.median('supervised'):.0f} img/s"
    yield Row("step from the store", turns.median("stored"), "img/s", ratio, "supervised, in time", "≤ 1.05", how)


def ten_epochs(folder: Path, sources: dict[int, Source], labels: Any) -> float:
    """Seconds beyond those of one step."""

    def whole(images: int, epochs: int) -> float:
        recipe = distilled(folder, TEACHER, SIZE, sources[images], sources[FEW], labels, epochs)
        with tempfile.TemporaryDirectory() as out:
            return timed(lambda: ssld.run(recipe, out, trust_teacher=True))

    return whole(max(sources), EPOCHS) - whole(FEW, 1)


def epochs_rows(quick: bool) -> Iterator[Row]:
    images = BATCH if quick else POOL
    noise = np.random.default_rng(0).random((BATCH, 3, SIZE, SIZE), dtype=np.float32)
    teacher = Frozen(networks.build(TEACHER, {}, CLASSES), SIZE)
    step = stepper(networks.build(STUDENT, {}, CLASSES), SIZE, BATCH)
    seconds = 0.0 if quick else 1.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources = {count: jpegs(folder / str(count), count, SIDE) for count in (FEW, images)}
        measures = {
            "teacher": lambda: rate(lambda: teacher(noise), BATCH, seconds),
            "student": lambda: rate(step, BATCH, seconds),
            "store": lambda: ten_epochs(folder, sources, {"views": VIEWS}),
            "online": lambda: ten_epochs(folder, sources, "online"),
        }
        turns = interleaved(measures, quick)
    t, s = 1 / turns.median("teacher"), 1 / turns.median("student")
    asked = f"{(VIEWS * t + EPOCHS * s) / (EPOCHS * t + EPOCHS * s):.3f} ± 5 %"
    how = f"online {turns.median('online'):.1f} s; T {1e3 * t:.2f}, S {1e3 * s:.2f} ms an image"
    name = f"ten epochs on {images} images from the store"
    yield Row(name, turns.median("store"), "s", turns.ratio("store", "online"), "online", asked, how)


def rows(quick: bool) -> Iterator[Row]:
    yield from step_rows(quick)
    yield from epochs_rows(quick)


if __name__ == "__main__":
    alone(rows)
