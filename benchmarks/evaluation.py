"""Images per second of an evaluation on this CPU: the layer itself, the engine, and all of it from JPEG files.

    python benchmarks/evaluation.py

"evaluation" is what a stage does from its second evaluation on: it puts the new weights in, compares with the layer,
decodes, answers and counts.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import paddle
from material import CLASSES, jpegs
from measuring import Row, alone, interleaved, rate
from paddle import nn

from ssld import threads
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
    asked: str = ""


CASES = (Case("ResNet50_vd", 224, 320, 64, 16, 4, "≥ 5"), Case("MobileNetV3_small_x1_0", 64, 96, 512, 64, 64))
SECONDS = 0.5


def eager(network: nn.Layer) -> Callable[[np.ndarray], object]:
    """The layer itself."""

    def run(images: np.ndarray) -> object:
        with paddle.no_grad():
            return network(paddle.to_tensor(images)).numpy()

    return run


def speeds(case: Case, folder: Path, seconds: float) -> dict[str, Callable[[], float]]:
    """Images per second of each way, after a first answer."""
    network = networks.build(case.network, {}, CLASSES)
    network.eval()
    samples = open_source(jpegs(folder / "images", case.files, case.side), labeled=True)
    images = np.random.default_rng(0).normal(size=(case.batch, 3, case.size, case.size)).astype(np.float32)
    resize = {"ResizeImage": {"resize_short": case.size * 8 // 7}}
    pipeline = Pipeline.read([resize, "CropImage", "NormalizeImage"], case.size)
    evaluator, layer, few = Evaluator(network, pipeline, "cpu"), eager(network), images[: case.shown]
    engines = {count: Frozen(network, case.size, threads=count) for count in {1, threads.cores()}}
    for run in (layer, *engines.values()):
        run(few)
    evaluator(samples)
    return {
        "layer": lambda: rate(lambda: layer(few), len(few), seconds),
        **{
            f"engine, threads: {count}": lambda engine=engine: rate(lambda: engine(images), len(images), seconds)
            for count, engine in engines.items()
        },
        "evaluation": lambda: rate(lambda: evaluator(samples), len(samples), 0.0),
    }


def rows(quick: bool) -> Iterator[Row]:
    networks.use_device("cpu")
    for case in (replace(CASES[1], files=16, batch=8, shown=8),) if quick else CASES:
        with tempfile.TemporaryDirectory() as name:
            turns = interleaved(speeds(case, Path(name), 0.0 if quick else SECONDS), quick)
        how = f"the layer {turns.median('layer'):.1f} img/s"
        for what in turns.names[1:]:
            asked = case.asked if what == "evaluation" else ""
            name = f"{what}: {case.network}, {case.size} px"
            yield Row(name, turns.median(what), "img/s", turns.ratio(what, "layer"), "the layer", asked, how)


if __name__ == "__main__":
    alone(rows)
