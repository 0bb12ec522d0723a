"""What the benchmarks work on: images in files, recipes, and a bare training step."""

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import nn
from PIL import Image
from rich.console import Console
from safetensors.numpy import save_file

from ssld.data.sources import open_source
from ssld.data.transforms import Pipeline
from ssld.graph import Plan, make_plan
from ssld.journal import Journal
from ssld.recipe import read_recipe
from ssld.train import networks
from ssld.train.losses import hard_ce
from ssld.train.momentum import Momentum

STUDENT = "MobileNetV3_small_x1_0"
CLASSES = 1000
NAMES = tuple(f"class {number}" for number in range(CLASSES))
TRAIN = ("RandCropImage", "RandFlipImage", "NormalizeImage")
Source = str | Mapping[str, str]


def views(size: int) -> Pipeline:
    """What training shows, at a size."""
    return Pipeline.read(list(TRAIN), size)


def jpegs(folder: Path, count: int, width: int, height: int | None = None) -> Source:
    """Drawn images as JPEG files of quality 90, labels in turns, as a source for recipes and `open_source`."""
    drawn, images = open_source(f"builtin:shapes?count={count}&size={width}", labeled=False), folder / "images"
    images.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(np.asarray(drawn.read(i))[:height]).save(images / f"{i:06d}.jpg", quality=90)
    (folder / "list.txt").write_text("".join(f"{i:06d}.jpg {i % CLASSES}\n" for i in range(count)))
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in NAMES))
    return {"list": str(folder / "list.txt"), "root": str(images), "classes": str(folder / "classes.txt")}


def supervised(folder: Path, network: str, size: int, batch: int, source: Source) -> Path:
    """The recipe of one stage that trains on labels."""
    stage = {"kind": "pretrain", "network": network, "data": "labeled", "epochs": 1, "batch_size": batch}
    return written(folder / "supervised.yaml", size, {"labeled": source, "validation": source}, stage)


def distilled(
    folder: Path, teacher: str, size: int, source: Source, validation: Source, labels: Any, epochs: int = 1
) -> Path:
    """The recipe of one stage that distils STUDENT in batches of 64; the weights of the teacher are drawn."""
    weights = folder / f"{teacher}.safetensors"
    if not weights.exists():
        save_file(networks.arrays(networks.build(teacher, {}, CLASSES)), weights)
    stage = {
        "kind": "distill",
        "teacher": {"network": teacher, "weights": str(weights)},
        "student": STUDENT,
        "data": "unlabeled",
        "batch_size": 64,
        "epochs": epochs,
        "eval_interval": epochs,
        "labels": labels,
    }
    return written(folder / "distilled.yaml", size, {"unlabeled": source, "validation": validation}, stage)


def written(file: Path, size: int, data: Mapping[str, Source], stage: Mapping[str, Any]) -> Path:
    """A recipe of one stage; JSON is YAML."""
    images = {"resolution": size, "train": list(TRAIN)}
    file.write_text(json.dumps({"name": file.stem, "images": images, "data": data, "stages": {"train": stage}}))
    return file


def planned(recipe: Path) -> Plan:
    return make_plan(read_recipe(recipe))


def quiet() -> Journal:
    """A journal that nobody reads."""
    return Journal(None, Console(file=io.StringIO()))


def stepper(network: nn.Layer, size: int, batch: int) -> Callable[[], None]:
    """A training step on noise that lies in memory: forward, loss, backward, update."""
    networks.use_device("cpu")
    network.train()
    optimizer, generator = Momentum(network), np.random.default_rng(0)
    images = generator.random((batch, 3, size, size), dtype=np.float32)
    labels = paddle.to_tensor(generator.integers(0, 8, batch))

    def step() -> None:
        hard_ce(network(paddle.to_tensor(images)), labels).mean().backward()
        optimizer.step(1e-4)

    return step
