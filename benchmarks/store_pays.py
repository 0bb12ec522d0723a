"""Ten epochs with stored labels ÷ ten epochs online, labelling included, against what the two costs promise.

    python benchmarks/store_pays.py
    python benchmarks/store_pays.py --eager --turns 1

ResNet50_vd teaches MobileNetV3_small_x1_0 at 64 px, batch 64, two views, on drawn images: a whole `ssld run` each, in
turns, less what the same run takes for one step, since to start, to export the teacher and to evaluate once costs the
same for ten epochs of any pool. T and S, the cost of one teacher and one student pass, are measured apart, before and
after. Asked for: within 5 % of (2 T + 10 S) / (10 T + 10 S). --eager asks the online teacher without the inference
engine.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import click
import numpy as np
import paddle
from safetensors.numpy import save_file

import ssld
from ssld.data.transforms import IMAGENET_MEAN, IMAGENET_STD, normalize
from ssld.train import frozen, networks
from ssld.train.losses import hard_ce
from ssld.train.momentum import Momentum

SIZE, BATCH, EPOCHS, VIEWS, CLASSES = 64, 64, 10, 2, 8
RECIPE = """
name: store_pays
images: {{resolution: {SIZE}}}
data:
  unlabeled: builtin:shapes?count={images}&size=96
  validation: builtin:shapes?count=8&size=96&seed=1
stages:
  distill:
    kind: distill
    teacher: {{network: ResNet50_vd, weights: {weights}}}
    student: MobileNetV3_small_x1_0
    data: unlabeled
    epochs: {epochs}
    eval_interval: {epochs}
    labels: {labels}
"""


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def passes() -> tuple[float, float]:
    """Seconds per image of one teacher pass and of one training step of the student."""
    teacher = frozen.Frozen(networks.build("ResNet50_vd", {}, CLASSES), SIZE)
    student = networks.build("MobileNetV3_small_x1_0", {}, CLASSES)
    optimizer = Momentum(student, 0.9, 1e-5, None)
    pixels = np.random.default_rng(0).integers(0, 256, (BATCH, SIZE, SIZE, 3), dtype=np.uint8)
    images, labels = normalize(pixels, IMAGENET_MEAN, IMAGENET_STD), paddle.to_tensor(np.arange(BATCH) % CLASSES)

    def step() -> None:
        hard_ce(student(paddle.to_tensor(images)), labels).mean().backward()
        optimizer.step(0.01)

    def cost(work: Callable[[], object]) -> float:
        work()
        return statistics.median(timed(work) for _ in range(7)) / BATCH

    return cost(lambda: teacher(images)), cost(step)


def run(folder: Path, images: int, labels: str, out: str) -> float:
    """Seconds of ten epochs beyond those of one step, each from an empty directory."""

    def whole(count: int, epochs: int) -> float:  # four images make one step, and next to no labels
        recipe, values = folder / "recipe.yaml", {"SIZE": SIZE, "epochs": epochs, "images": count, "labels": labels}
        recipe.write_text(RECIPE.format(weights=folder / "teacher.safetensors", **values))
        return timed(lambda: ssld.run(recipe, folder / f"{out}-{epochs}", trust_teacher=True))

    return whole(images, EPOCHS) - whole(4, 1)


def eager() -> object:
    """The teacher as paddle runs it by itself."""
    return patch.object(frozen, "_exported", lambda layer, *_: frozen._eager(layer))


@click.command()
@click.option("--images", default=640, show_default=True)
@click.option("--turns", default=5, show_default=True)
@click.option("--eager", "by_itself", is_flag=True, help="The online teacher in paddle's eager mode.")
def main(images: int, turns: int, by_itself: bool) -> None:
    """Print T, S, both times and the ratio."""
    before, pairs = passes(), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_file(networks.arrays(networks.build("ResNet50_vd", {}, CLASSES)), folder / "teacher.safetensors")
        for turn in range(turns):
            kept = run(folder, images, f"{{views: {VIEWS}}}", f"kept-{turn}")
            with eager() if by_itself else nullcontext():
                pairs.append((kept, run(folder, images, "online", f"online-{turn}")))
    teacher, student = (statistics.mean(both) for both in zip(before, passes(), strict=True))
    promised = (VIEWS * teacher + EPOCHS * student) / (EPOCHS * teacher + EPOCHS * student)
    kept, online = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(one / other for one, other in pairs)
    click.echo(f"T {1e3 * teacher:.2f} ms, S {1e3 * student:.2f} ms an image: promised {promised:.3f}")
    click.echo(f"store {kept:.1f} s, online {online:.1f} s: ratio {ratio:.3f}, {ratio / promised - 1:+.1%}")


if __name__ == "__main__":
    main()
