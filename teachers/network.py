"""A network by name, with a weights file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ssld.checkpoint import read_weights
from ssld.contracts import Teacher, TeacherSpec
from ssld.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from ssld.train.frozen import Frozen
from ssld.train.networks import build, load
from ssld.train.teacher import NetworkTeacher, fingerprint

Triple = tuple[float, float, float]


def network(
    network: str,
    weights: Path,
    *,
    resolution: int,
    classes: tuple[str, ...],
    device: str,
    resize_short: int | None = None,
    mean: Triple = IMAGENET_MEAN,
    std: Triple = IMAGENET_STD,
    options: dict[str, Any] | None = None,
) -> Teacher:
    """The network of that name, built with `options`, holding every weight of the .safetensors file `weights`.

    resolution: side of its input in pixels, the run's when left out; mean, std: per channel, for pixels in [0, 1].
    Raises CheckpointError, with both sides, unless all keys and shapes match.
    """
    arrays = read_weights(weights)
    layer = build(network, options or {}, len(classes))
    load(layer, arrays, f"{weights} for the teacher {network}")
    spec = TeacherSpec(resolution, fingerprint(arrays), classes, resize_short, mean, std)
    return NetworkTeacher(spec, Frozen(layer, resolution, device=device))
