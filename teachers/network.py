"""A network by name, with a weights file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ssld.checkpoint import read_weights
from ssld.contracts import Teacher, TeacherSpec
from ssld.data.transforms import IMAGENET_MEAN, IMAGENET_STD, Triple
from ssld.environment import PADDLE, PADDLE_GPU, installed
from ssld.teaching.asking import Deferred, fingerprint

Precision = Literal["float32", "bfloat16"]


def network(
    network: str,
    weights: Path,
    *,
    resolution: int,
    classes: tuple[str, ...] | int,
    device: str,
    precision: Precision = "float32",
    resize_short: int | None = None,
    mean: Triple = IMAGENET_MEAN,
    std: Triple = IMAGENET_STD,
    options: dict[str, Any] | None = None,
) -> Teacher:
    """The network of that name, built with `options`, holding every weight of the .safetensors file `weights`.

    resolution: side of its input in pixels, the run's when left out; mean, std: per channel, for pixels in [0, 1].
    classes: their names, those of the data when left out, or only how many, for a teacher that needs a class map.
    The network is built when the teacher is first asked: RecipeError for an unknown name or option, CheckpointError,
    with both sides, unless all keys and shapes match.
    """
    arrays = read_weights(weights)
    names, count = (None, classes) if isinstance(classes, int) else (classes, len(classes))
    spec = TeacherSpec(
        resolution, fingerprint(arrays), names, resize_short, mean, std, precision, engine(device, precision)
    )

    def load() -> Callable[[np.ndarray], np.ndarray]:
        from ssld.train import networks
        from ssld.train.frozen import Frozen

        layer = networks.build(network, options or {}, count)
        networks.load(layer, arrays, f"{weights} for the teacher {network}")
        return Frozen(layer, resolution, device=device, precision=precision)

    return Deferred(spec, load)


def engine(device: str, precision: Precision) -> str:
    """What computes a paddle network that only answers."""
    version = installed(PADDLE) or installed(PADDLE_GPU)
    if device == "cpu":
        return f"paddle.inference {version} with oneDNN, {precision}"
    return f"paddle {version}, eager, on {device}, {precision}"
