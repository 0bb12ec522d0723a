"""Images per second that are read, decoded, cropped, flipped and put into batches for training, here and in processes.

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
    """Images per second by so many processes, in this thread with 0; the first seconds bring the processes up."""
    pipelines = (views(size),)
    batches = training_batches(samples, pipelines, batch_size=BATCH, seed=0, workers=workers, damage=Damage(0))
    with closing(batches):
        rate(lambda: next(batches), BATCH, seconds)
        return rate(lambda: next(batches), BATCH, seconds)


def rows(quick: bool) -> Iterator[Row]:
    seconds = 0.05 if quick else SECONDS
    for width, height, size in CASES:
        with tempfile.TemporaryDirectory() as name:
            samples = open_source(jpegs(Path(name), 8 if quick else FILES, width, height), labeled=False)

            def speed(workers: int, samples: Samples = samples, size: int = size) -> float:
                return decoded(samples, size, workers, seconds)

            turns = interleaved({"here": lambda: speed(0), "one": lambda: speed(1), "two": lambda: speed(2)}, quick)
        what = f"decoding: JPEG of {width} × {height} to {size} px"
        yield Row(f"{what}, here", turns.median("here"), "img/s")
        for key, by in (("one", "1 process"), ("two", "2 processes")):
            yield Row(f"{what}, {by}", turns.median(key), "img/s", turns.ratio(key, "here"), "here")


if __name__ == "__main__":
    alone(rows)
