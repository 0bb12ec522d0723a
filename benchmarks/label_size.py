"""What stored soft labels take on the disk, and what quantizing them loses.

    python benchmarks/label_size.py

Bytes per view are those of the label files of a store for 10,000 images in shards of 1,000, headers included; beside
them, what a store holds once whatever its number of images, which is mostly the class names. The loss is
KL(teacher || stored) in nats, both over the K classes and the rest, for 10,000 drawn teacher outputs: a third each
peaked, medium and flat (the most probable class typically at 0.99, 0.5, and at 1,000 classes 0.04). The second table
compares quantizers. A forward KL hardly sees the improbable classes, but the backward half of `js` does, and a teacher
that has learned its classes perfectly (certain, 0.99997) is mostly that; so it also has the mean error of log p.
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import numpy as np
from measuring import show

from ssld.contracts import TeacherSpec
from ssld.data.loader import Replay
from ssld.data.sources import open_source
from ssld.data.transforms import Pipeline
from ssld.labels import format
from ssld.labels.store import Description, Probe, Store

IMAGES = 10_000
BUDGET = {10: 32, 20: 62}
MARGINS = {"certain": 18.0, "peaked": 7.0, "medium": 0.5, "flat": -20.0}
"""By how many nats the likeliest class would stand out from all unlikely ones together, in the mean."""
MIXED = ("peaked", "medium", "flat")
Quantizer = Callable[[np.ndarray], np.ndarray]


def draw(kind: str, count: int, classes: int) -> np.ndarray:
    """Logits, float32 [count, classes]: one likely class, four that resemble it, and a normal crowd of all others."""
    random = np.random.default_rng([classes, *kind.encode()])
    spread = 1.5
    logits = random.normal(0, spread, (count, classes)).astype(np.float32)
    margin = random.normal(MARGINS[kind], 2, (count, 1))
    gaps = np.cumsum(random.exponential(2, (count, 4)), axis=1)
    heights = np.log(classes) + spread**2 / 2 + np.concatenate([margin, margin / 2 - gaps], axis=1)
    # one in each fifth of the classes, so that they are distinct
    chosen = random.integers(0, classes // 5, (count, 5)) * 5 + random.permutation(5)
    heights = np.maximum(heights, np.take_along_axis(logits, chosen, axis=1))
    np.put_along_axis(logits, chosen, heights.astype(np.float32), axis=1)
    return logits


def blocks(kind: str, count: int, classes: int, top_k: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Logits in blocks that fit into memory, with their exact log-probabilities of the K and the rest, in float64."""
    logits = draw(kind, count, classes)
    for start in range(0, count, 500):
        block = logits[start : start + 500]
        exact = block.astype(np.float64) - block.max(axis=1, keepdims=True)
        exact -= np.log(np.exp(exact).sum(axis=1, keepdims=True))
        falling = -np.sort(-exact, axis=1)
        with np.errstate(divide="ignore"):
            rest = np.log(np.exp(falling[:, top_k:]).sum(axis=1, keepdims=True))
        yield block, np.concatenate([falling[:, :top_k], rest], axis=1)


def normalized(logs: np.ndarray) -> np.ndarray:
    return logs - np.log(np.exp(logs).sum(axis=1, keepdims=True))


def divergence(exact: np.ndarray, stored: np.ndarray) -> np.ndarray:
    """KL(exact || stored) of each row of log-probabilities, in nats; where exact has no mass, there is no loss."""
    there = np.isfinite(exact)
    gaps = np.subtract(exact, stored, where=there, out=np.zeros_like(exact))
    return (np.exp(exact) * gaps).sum(axis=1)


def losses(kind: str, count: int, classes: int, top_k: int) -> np.ndarray:
    """KL of each drawn output to what comes back from the stored one."""
    found = []
    for logits, exact in blocks(kind, count, classes, top_k):
        soft = format.unpack(format.pack(logits, top_k), classes, top_k)
        if soft.ids is None:
            stored = np.take_along_axis(soft.logits, np.argsort(-logits, axis=1, kind="stable"), axis=1)
            exact = exact[:, :top_k]
        else:
            stored = soft.logits
        found.append(divergence(exact, normalized(stored.astype(np.float64))))
    return np.concatenate(found)


def bytes_per_view(classes: int, top_k: int, views: int) -> tuple[float, int]:
    """Of all label files of the images; and the bytes of what a store holds once, for any number of them.

    The size does not depend on what the labels are, so a real store is filled with those of damaged images.
    """
    samples = open_source(f"builtin:shapes?count={IMAGES}", labeled=False)
    names = tuple(f"n{number:08d}" for number in range(classes))
    pipeline = Pipeline.read(["RandCropImage", "RandFlipImage", "NormalizeImage"], 224)
    teacher = TeacherSpec(224, "f" * 64, names, engine="paddle.inference 3.3.1 with oneDNN")
    about = Description(teacher, pipeline, Replay(0, views), top_k, 1.0, names, "ResNeXt101_32x16d_wsl of teach")
    with tempfile.TemporaryDirectory() as root:
        store = Store(Path(root), about)
        store.begin()
        shards = samples.shard_sizes.tolist()
        for shard, size in enumerate(shards):
            labels = format.damaged((size, views), classes, top_k)
            store.commit(samples, shard, labels, Probe(0, "p" * 64, "o" * 64), len(shards) - shard)
        sizes = {path: path.stat().st_size for path in store.directory.iterdir()}
        each = sum(store.load(samples, shard).packed.rest.size for shard in range(len(shards)))
        files = sum(sizes.pop(store.file(samples, shard)) for shard in range(len(shards)))
    return files / each, sum(sizes.values())


def linear(limit: float) -> Quantizer:
    """Codes and back, in equal steps of the log-probability."""
    return lambda logs: -np.rint(np.clip(-logs / limit, 0, 1) * 255) / 255 * limit


def root(limit: float) -> Quantizer:
    """Codes and back, in equal steps of the square root of the log-probability."""
    return lambda logs: -((np.rint(np.sqrt(np.clip(-logs / limit, 0, 1)) * 255) / 255) ** 2) * limit


def quantized(exact: np.ndarray, quantizer: Quantizer) -> np.ndarray:
    rest = exact[:, -1:].astype(np.float16)
    return normalized(np.concatenate([quantizer(exact[:, :-1]), rest.astype(np.float64)], axis=1))


def size_table() -> Iterator[list[str]]:
    yield ["classes", "K", "B/view, V = 1", "V = 8", "budget", "B once", "mean KL", "99.9 % of KL below"]
    for classes, top_k in ((10, 10), (1_000, 10), (1_000, 20), (21_841, 10), (21_841, 20)):
        kl = np.concatenate([losses(kind, IMAGES // 3 + 1, classes, top_k) for kind in MIXED])
        sizes = [bytes_per_view(classes, top_k, views) for views in (1, 8)]
        marked = [f"{size:.2f}{' (over)' if size > BUDGET[top_k] else ''}" for size, _ in sizes]
        row = [f"{classes:,}", str(top_k), *marked, str(BUDGET[top_k]), f"{sizes[0][1]:,}"]
        yield [*row, f"{kl.mean():.1e}", f"{np.quantile(kl, 0.999):.1e}"]


def quantizer_table(classes: int = 1_000) -> Iterator[list[str]]:
    yield ["quantizer", "K", *(f"{kind}: mean, 99.9 %" for kind in MARGINS), "certain: error of log p"]
    for top_k in (10, 20):
        exact = {kind: np.concatenate([logs for _, logs in blocks(kind, IMAGES, classes, top_k)]) for kind in MARGINS}
        for shape in (linear, root):
            for limit in (16, 24, 32):
                stored = {kind: quantized(logs, shape(limit)) for kind, logs in exact.items()}
                kl = [divergence(logs, stored[kind]) for kind, logs in exact.items()]
                cells = (f"{values.mean():.1e}, {np.quantile(values, 0.999):.1e}" for values in kl)
                error = np.abs(stored["certain"] - exact["certain"]).mean()
                yield [f"{shape.__name__} to {limit}", str(top_k), *cells, f"{error:.2f}"]


@click.command()
def main() -> None:
    """Print both tables."""
    click.echo(f"quantizer: {format.QUANTIZER}")
    show(size_table())
    show(quantizer_table())


if __name__ == "__main__":
    main()
