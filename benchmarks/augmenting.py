"""Images per second that are decoded, cropped, flipped and augmented on one core, beside the same without augmentation.

python benchmarks/augmenting.py
"""

import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from material import TRAIN, jpegs
from measuring import Row, alone, interleaved, rate

from ssld.data.loader import Damage, training_batches
from ssld.data.samples import Samples
from ssld.data.sources import open_source
from ssld.data.transforms import Pipeline

WIDTH, HEIGHT, SIZE = 500, 375, 224
FILES, BATCH, SECONDS = 256, 32, 2.0
JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
AUGMENTATIONS: dict[str, Any] = {
    "AutoAugment": "AutoAugment",
    "RandAugment": "RandAugment",
    "TimmAutoAugment": "TimmAutoAugment",
    "ColorJitter": {"ColorJitter": JITTER},
    "RandomErasing": "RandomErasing",
    "GridMask": "GridMask",
}


def augmented(samples: Samples, operators: list[Any], seconds: float) -> float:
    """Images per second in this thread, after one batch."""
    pipelines = (Pipeline.read(operators, SIZE),)
    batches = training_batches(samples, pipelines, batch_size=BATCH, seed=0, workers=0, damage=Damage(0))
    with closing(batches):
        next(batches)
        return rate(lambda: next(batches), BATCH, seconds)


def rows(quick: bool) -> Iterator[Row]:
    seconds = 0.05 if quick else SECONDS
    crop, flip, normalize = TRAIN
    with tempfile.TemporaryDirectory() as name:
        samples = open_source(jpegs(Path(name), 8 if quick else FILES, WIDTH, HEIGHT), labeled=False)
        lists = {"": [*TRAIN]} | {key: [crop, flip, which, normalize] for key, which in AUGMENTATIONS.items()}
        measures = {
            key: lambda operators=operators: augmented(samples, operators, seconds) for key, operators in lists.items()
        }
        turns = interleaved(measures, quick)
    what = f"augmenting: JPEG of {WIDTH} × {HEIGHT} to {SIZE} px"
    yield Row(f"{what}, crop and flip", turns.median(""), "img/s")
    for key in AUGMENTATIONS:
        yield Row(f"{what}, and {key}", turns.median(key), "img/s", turns.ratio(key, ""), "crop and flip")


if __name__ == "__main__":
    alone(rows)
