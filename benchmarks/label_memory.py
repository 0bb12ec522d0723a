"""Peak memory of a loss on soft labels of K = 10 classes, against cross-entropy with hard labels.

    python benchmarks/label_memory.py

One forward and backward pass of the loss alone, batch 256, on logits that are there already; each measured once, in a
process of its own (Linux), which took the same step with 200 classes before, so that no library is still loading.
`more` is the peak of the resident memory above what there was before the pass, logits included, and behind it how many
times the logits that is. The gradient of the logits, as large as they are, is part of it, and no loss does without:
1.0 means that nothing else grows with the number of classes.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import click
import numpy as np
import paddle
from label_size import show

from ssld.contracts import Soft
from ssld.settings import Named
from ssld.train import losses

BATCH = 256
TOP_K = 10
CLASSES = (1_000, 10_000, 21_841, 43_682)
CASES = ("hard ce", "js, K = 10", "js, all classes")


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


def status(key: str) -> float:
    """A line of /proc/self/status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{key}:"))


def measured(case: str, classes: int) -> tuple[float, float]:
    """Peak resident memory of this process in a pass, and how much of it the pass added, in MiB."""
    for count in (200, classes):
        loss = objective(case, count)
        logits = paddle.normal(shape=[BATCH, count])
        logits.stop_gradient = False
        # the peak counts from here
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        loss(logits).mean().backward()
        peak = status("VmHWM")
    return peak, peak - before


def table() -> Iterator[list[str]]:
    yield ["classes", "logits, MiB", *(f"{case}: {what}" for case in CASES for what in ("peak, MiB", "more, MiB"))]
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as processes:
        for classes in CLASSES:
            size = BATCH * classes * np.dtype(np.float32).itemsize / 2**20
            found = list(processes.map(measured, CASES, [classes] * len(CASES)))
            cells = [
                (f"{peak:.0f} ({peak / found[0][0]:.2f})", f"{more:.1f} ({more / size:.1f})") for peak, more in found
            ]
            yield [f"{classes:,}", f"{size:.1f}", *(text for pair in cells for text in pair)]


@click.command()
def main() -> None:
    """Print the table; a peak has its ratio to that of hard labels behind it."""
    show(table())


if __name__ == "__main__":
    main()
