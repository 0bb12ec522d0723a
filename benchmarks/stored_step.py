"""A distillation step from stored labels ÷ a supervised step of the same student, images, decoding and all.

    python benchmarks/stored_step.py

MobileNetV3_small_x1_0 at 64 px, batch 64, 1,000 classes, K = 10, on drawn images; the two take turns, each figure is
the median of five turns. Asked for: at most 1.05.
"""

import io
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console

from ssld import plugins
from ssld.contracts import Model, SoftLabels, Task, TeacherSpec
from ssld.data.loader import Damage, Replay
from ssld.data.sources import open_source
from ssld.data.transforms import Pipeline
from ssld.journal import Journal
from ssld.labels.labelling import Work, label
from ssld.labels.reader import Reader, StoredLabels
from ssld.labels.store import Description, Store
from ssld.settings import Context, Named
from ssld.train import losses, networks
from ssld.train.exchange import Exchange
from ssld.train.feed import feed
from ssld.train.loop import Descent
from ssld.train.momentum import Momentum

CLASSES, SIZE, BATCH, IMAGES, STEPS, TURNS = 1000, 64, 64, 2000, 20, 5
PIPELINE = Pipeline.read(["RandCropImage", "RandFlipImage", "NormalizeImage"], SIZE)


class Noise:
    """A teacher that costs nothing: what the labels say does not change what they cost."""

    spec = TeacherSpec(SIZE, "noise", mean=None, std=None)

    def predict(self, images: np.ndarray) -> np.ndarray:
        return np.random.default_rng(0).normal(0, 3, (len(images), CLASSES)).astype(np.float32)


def task(folder: Path) -> Task[Any]:
    """A supervised stage over drawn images with random labels."""
    samples = open_source(f"builtin:shapes?count={IMAGES}&size=96", labeled=True)
    samples = replace(samples, labels=np.random.default_rng(0).integers(0, CLASSES, IMAGES))
    keys = {"kind": "pretrain", "data": "labeled", "network": "MobileNetV3_small_x1_0", "epochs": 100}
    context = Context(resolution=SIZE, samples=IMAGES, classes=CLASSES)
    settings = plugins.stage_kind("pretrain").settings.model_validate(keys).resolved(context)
    model = Model(settings.student.name, {}, tuple(map(str, range(CLASSES))), PIPELINE)
    return Task(
        name="benchmark",
        model=model,
        settings=settings,
        seed=0,
        device="cpu",
        data=samples,
        validation=samples,
        train=PIPELINE,
        initial=None,
        soft=None,
        reference=None,
        resume=None,
        damage_budget=0,
        save=lambda state: None,
        stop=lambda: None,
        journal=Journal(folder, Console(file=io.StringIO())),
    )


def stored(samples: Any, folder: Path) -> SoftLabels:
    """Labels of two views in a store on disk."""
    names = tuple(map(str, range(CLASSES)))
    store = Store(folder / "labels", Description(Noise.spec, PIPELINE, Replay(0, 2), 10, 1.0, names, "noise"))
    label(store, Noise(), samples, store.missing(samples), Work(Damage(0)))
    reader = Reader(store, samples)
    assert not reader.open(range(len(samples.shard_ids)))
    return StoredLabels("noise", ((reader, 1.0),))


def turns(task: Task[Any]) -> Iterator[float]:
    """Images per second, one turn after another."""
    network = networks.student(task)
    network.train()
    optimizer = Momentum(network, 0.9, 1e-5, None)
    js = losses.named(Named(name="js"))
    targets = feed(task, task.train, 0, 10**6, Damage(0))

    def objective(logits: Any, target: Any) -> Any:
        return losses.hard_ce(logits, target.labels) if task.soft is None else js(logits, target.soft)

    descend = Descent(task, network, objective, optimizer, Exchange(network, task.ranks))
    with closing(targets):
        for turn in range(TURNS + 1):
            began = time.perf_counter()
            for _ in range(STEPS):
                descend(next(targets), 0.01)
            if turn:  # the first one warms up
                yield STEPS * BATCH / (time.perf_counter() - began)


def main() -> None:
    """Print both speeds and their ratio."""
    with tempfile.TemporaryDirectory() as name:
        supervised = task(Path(name))
        distilled = replace(supervised, soft=stored(supervised.data, Path(name)))
        pairs = list(zip(turns(supervised), turns(distilled), strict=True))
    hard, soft = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(one / other for one, other in pairs)
    click.echo(f"supervised {hard:.1f} img/s, from the store {soft:.1f} img/s, step ratio {ratio:.3f}")


if __name__ == "__main__":
    main()
