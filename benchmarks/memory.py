"""Peak memory, each figure of a process of its own (Linux): training, labelling, and the losses alone.

    python benchmarks/memory.py

A loss is one forward and backward pass, batch 256, on logits that are there already, after the same with 200 classes,
so that no library is still loading. Its figure is the peak above what there was before; the gradient of the logits, as
large as they are, is part of it, and no loss does without: a ratio of 1 means that nothing else grows with the classes.
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import paddle
from labelling import Drawn, labelled
from measuring import Row, alone, in_child, memory, peak
from ranks import trained

from ssld.contracts import Soft
from ssld.data.sources import open_source
from ssld.settings import Named
from ssld.train import losses

TRAINED, SECONDS = ("MobileNetV3_small_x1_0", 64, 64), 5.0
POOLS = (1_000, 20_000)
BATCH, TOP_K, CLASSES = 256, 10, (1_000, 21_841)
LOSSES = ("hard ce", "js, K = 10", "js, all classes")


def training(quick: bool) -> Iterator[Row]:
    case, seconds = (("MobileNetV3_small_x0_35", 32, 8), 0.0) if quick else (TRAINED, SECONDS)
    network, size, batch = case
    _, one = in_child(trained, *case, 1, seconds)
    (_, others), lead = in_child(trained, *case, 2, seconds)
    what = f"training, {network}, {size} px, batch {batch}"
    yield Row(f"memory: {what}", one, "MiB")
    for number, most in enumerate((lead, *others)):
        yield Row(f"memory: the same, rank {number} of {1 + len(others)}", most, "MiB", most / one, "one process")


def drawn(count: int) -> None:
    """Label so many drawn images."""
    samples = open_source(f"builtin:shapes?count={count}&size=32", labeled=False)
    with tempfile.TemporaryDirectory() as name:
        labelled(samples, Drawn("MobileNetV3_small_x0_35"), Path(name))


def labelling(quick: bool) -> Iterator[Row]:
    pools = (64, 128) if quick else POOLS
    few, many = (in_child(drawn, count)[1] for count in pools)
    yield Row(f"memory: labelling {pools[0]:,} images", few, "MiB")
    yield Row(f"memory: labelling {pools[1]:,} images", many, "MiB", many / few, f"{pools[0]:,} images", "≤ 1.05")


def objective(case: str, classes: int) -> Callable[[paddle.Tensor], paddle.Tensor]:
    """From the logits to a loss per sample, with labels drawn by a fixed seed."""
    random = np.random.default_rng(classes)
    if case == "hard ce":
        labels = paddle.to_tensor(random.integers(0, classes, BATCH))
        return lambda logits: losses.hard_ce(logits, labels)
    js = losses.named(Named(name="js"))
    if case == "js, all classes":
        dense = Soft(None, random.normal(0, 2, (BATCH, classes)).astype(np.float32))
        return lambda logits: js(logits, dense)
    # one in each K-th part of the classes, so that they are distinct
    ids = random.integers(0, classes // TOP_K, (BATCH, TOP_K)) + np.arange(TOP_K) * (classes // TOP_K)
    sparse = Soft(ids, random.normal(0, 2, (BATCH, TOP_K + 1)).astype(np.float32))
    return lambda logits: js(logits, sparse)


def passed(case: str, classes: int) -> float:
    """MiB that a pass takes beyond what there was before."""
    for number in (200, classes):
        loss = objective(case, number)
        logits = paddle.normal(shape=[BATCH, number])
        logits.stop_gradient = False
        # the peak counts from here
        Path("/proc/self/clear_refs").write_text("5")
        before = memory("VmRSS")
        loss(logits).mean().backward()
    return peak() - before


def of_losses(quick: bool) -> Iterator[Row]:
    for classes in CLASSES[:1] if quick else CLASSES:
        logits = BATCH * classes * np.dtype(np.float32).itemsize / 2**20
        for case in LOSSES:
            found, _ = in_child(passed, case, classes)
            yield Row(f"memory: loss {case}, of {classes:,}", found, "MiB", found / logits, "the logits")


def rows(quick: bool) -> Iterator[Row]:
    for part in (training, labelling, of_losses):
        yield from part(quick)


if __name__ == "__main__":
    alone(rows)
