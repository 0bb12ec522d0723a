"""Images per second and core that are read, decoded, cropped, flipped and put into batches for training.

python benchmarks/decoding.py
"""

import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from material import jpegs, views
from measuring import Row, alone, interleaved, rate

from ssld.data.loader import Damage, training_batches
from ssld.data.samples import Samples
from ssld.data.sources import open_source

CASES = ((500, 375, 224), (96, 96, 64))
FILES, BATCH, SECONDS = 256, 32, 2.0


def decoded(samples: Samples, size: int, workers: int, seconds: float) -> float:
    """Images per second in so many threads."""
    pipelines = (views(size),)
    batches = training_batches(samples, pipelines, batch_size=BATCH, seed=0, workers=workers, damage=Damage(0))
    with closing(batches):
        next(batches)
        return rate(lambda: next(batches), BATCH, seconds)


def rows(quick: bool) -> Iterator[Row]:
    for width, height, size in CASES:
        with tempfile.TemporaryDirectory() as name:
            samples = open_source(jpegs(Path(name), 8 if quick else FILES, width, height), labeled=False)

            def speed(workers: int, samples: Samples = samples, size: int = size) -> float:
                return decoded(samples, size, workers, 0.05 if quick else SECONDS)

            turns = interleaved({"one": lambda: speed(1), "two": lambda: speed(2)}, quick)
        what = f"JPEG of {width} × {height} to {size} px"
        yield Row(f"decoding: {what}, 1 thread", turns.median("one"), "img/s")
        ratio = turns.ratio("two", "one")
        yield Row(f"decoding: {what}, 2 threads", turns.median("two") / 2, "img/s a thread", ratio, "1 thread in all")


if __name__ == "__main__":
    alone(rows)
