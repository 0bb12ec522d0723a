"""Images per second of an evaluation on this CPU: the layer itself, the engine, and all of it from JPEG files.

    python benchmarks/evaluation.py
    python benchmarks/evaluation.py --only MobileNetV3_small_x1_0

All take turns, so that whatever else the machine does meets each of them; a figure is the median of five turns, and a
ratio to the layer the median of five ratios. "evaluation" is what a stage does from its second evaluation on: it puts
the new weights in, compares with the layer, decodes, answers and counts. Asked for: at least 5 times the layer for
ResNet50_vd.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import paddle
from paddle import nn
from PIL import Image

from ssld import threads
from ssld.data.samples import Samples
from ssld.data.sources import open_source
from ssld.data.transforms import Pipeline
from ssld.train import networks
from ssld.train.evaluation import Evaluator
from ssld.train.frozen import Frozen


@dataclass(frozen=True)
class Case:
    """A network; files: JPEGs of `side` pixels to evaluate; batch: of the engine; shown: to the layer at once."""

    network: str
    size: int
    side: int
    files: int
    batch: int
    shown: int


CASES = (Case("ResNet50_vd", 224, 320, 64, 16, 4), Case("MobileNetV3_small_x1_0", 64, 96, 512, 64, 64))
CLASSES, TURNS = 8, 5


def jpegs(case: Case, folder: Path) -> Samples:
    """Drawn images as JPEG files of quality 90, in folders of classes."""
    drawn = open_source(f"builtin:shapes?count={case.files}&size={case.side}", labeled=True)
    for i in range(case.files):
        file = folder / drawn.classes[drawn.labels[i]] / f"{i:05d}.jpg"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(drawn.read(i)).save(file, quality=90)
    return open_source(str(folder), labeled=True)


def eager(network: nn.Layer) -> Callable[[np.ndarray], object]:
    """The layer itself."""

    def run(images: np.ndarray) -> object:
        with paddle.no_grad():
            return network(paddle.to_tensor(images)).numpy()

    return run


def rate(run: Callable[[np.ndarray], object], images: np.ndarray) -> float:
    """Images per second, of at least two runs and a quarter of a second."""
    began, runs = time.perf_counter(), 0
    while (seconds := time.perf_counter() - began) < 0.25 or runs < 2:
        run(images)
        runs += 1
    return runs * len(images) / seconds


def whole(evaluator: Evaluator, samples: Samples) -> float:
    """Images per second of an evaluation with new weights."""
    began = time.perf_counter()
    evaluator(samples)
    return len(samples) / (time.perf_counter() - began)


def measure(case: Case, folder: Path) -> str:
    """The row of one network."""
    network = networks.build(case.network, {}, CLASSES)
    network.eval()
    samples, cores = jpegs(case, folder), threads.cores()
    images = np.random.default_rng(0).normal(size=(case.batch, 3, case.size, case.size)).astype(np.float32)
    one, more = (Frozen(network, case.size, threads=number) for number in (1, cores))
    pipeline = Pipeline.read(
        [{"ResizeImage": {"resize_short": case.size * 8 // 7}}, "CropImage", "NormalizeImage"], case.size
    )
    evaluator, layer = Evaluator(network, pipeline, "cpu"), eager(network)
    for run in (layer, one, more):
        run(images[: case.shown])
    evaluator(samples)
    turns = []
    for _ in range(TURNS):
        bare = rate(layer, images[: case.shown]), rate(one, images), rate(more, images)
        turns.append((*bare, whole(evaluator, samples)))
    found = [statistics.median(column) for column in zip(*turns, strict=True)]
    ratios = [statistics.median(turn[place] / turn[0] for turn in turns) for place in range(len(found))]
    columns = (f"{speed:9.1f} {ratio:4.1f}x" for speed, ratio in zip(found[1:], ratios[1:], strict=True))
    return f"{case.network:24} {case.size:4} {found[0]:8.1f} {' '.join(columns)}"


@click.command()
@click.option("--only", "names", multiple=True, help="Measure this network alone; may be given several times.")
def main(names: tuple[str, ...]) -> None:
    """Print one line for each network."""
    networks.use_device("cpu")
    cores = threads.cores()
    click.echo(f"{'network':24} {'px':>4} {'layer':>8} {'1 thread':>15} {f'{cores} threads':>15} {'evaluation':>15}")
    for case in CASES:
        if not names or case.network in names:
            with tempfile.TemporaryDirectory() as name:
                click.echo(measure(case, Path(name)))


if __name__ == "__main__":
    main()
