"""Images per second of a training step on this CPU: by paddle's layers, by ssld's own, and without the depthwise ones.

    python benchmarks/step.py

A step is what a stage does: forward, loss, backward, update. The ceiling leaves the depthwise convolutions of ssld's
step out (a stride becomes a slice), which no kernel for them can beat.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest.mock import patch

import paddle
from material import stepper
from measuring import Row, alone, interleaved, rate
from paddle import nn

from ssld.train import depthwise, networks
from ssld.train.convolution import Conv2D

CASES: tuple[tuple[str, Mapping[str, Any], int, int], ...] = (
    ("MobileNetV3_small_x1_0", {}, 64, 64),
    ("MobileNetV3_large_x1_0", {}, 224, 16),
    ("MobileNetV3_small_x0_35", {"stem_stride": 1}, 32, 64),
    ("ResNet18_vd", {}, 32, 16),
    ("ResNet50_vd", {}, 64, 16),
)
TINY = (("MobileNetV3_small_x0_35", {}, 32, 8),)
CLASSES, SECONDS = 100, 2.0


class Sliced(nn.Layer):
    """What is left of a convolution when it computes nothing: its stride."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return x[:, :, :: self.stride, :: self.stride] if self.stride > 1 else x


def hollow(network: nn.Layer) -> nn.Layer:
    """The network without its depthwise convolutions."""
    for layer in network.sublayers(include_self=True):
        for name, child in list(layer.named_children()):
            if isinstance(child, Conv2D) and child.kernels() is depthwise:
                setattr(layer, name, Sliced(child._stride[0]))
    return network


def speed(network: nn.Layer, size: int, batch: int, fast: bool, seconds: float) -> Callable[[], float]:
    """Images per second, by paddle's layers or by ssld's own; after a first step."""
    step = stepper(network, size, batch)

    def measured(seconds: float) -> float:
        with patch.dict(os.environ, SSLD_FAST_CONV=str(int(fast))):
            return rate(step, batch, seconds)

    measured(0.0)
    return lambda: measured(seconds)


def rows(quick: bool) -> Iterator[Row]:
    for name, options, size, batch in TINY if quick else CASES:
        seconds = 0.1 if quick else SECONDS
        kinds = {kind: networks.build(name, options, CLASSES) for kind in ("paddle", "ssld")}
        if "MobileNet" in name:
            kinds["ceiling"] = hollow(networks.build(name, options, CLASSES))
        measures = {kind: speed(network, size, batch, kind != "paddle", seconds) for kind, network in kinds.items()}
        turns = interleaved(measures, quick)
        ratio, how = turns.ratio("ssld", "paddle"), f"batch {batch}; paddle {turns.median('paddle'):.1f} img/s"
        yield Row(f"step: {name}, {size} px", turns.median("ssld"), "img/s", ratio, "paddle", "", how)
        if "ceiling" in kinds:
            ratio, how = turns.ratio("ssld", "ceiling"), "the ratio is that of ssld's step"
            yield Row(f"ceiling: {name}, {size} px", turns.median("ceiling"), "img/s", ratio, "the ceiling", "", how)


if __name__ == "__main__":
    alone(rows)
