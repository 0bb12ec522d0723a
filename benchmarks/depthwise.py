"""Images per second of a training step on this CPU: paddle's depthwise convolutions, ssld's own, and none at all.

    python benchmarks/depthwise.py

A step is what a stage does: forward, loss, backward, update. "none" leaves the depthwise convolutions out (a stride
becomes a slice), which no convolution can beat. The three take turns, so that whatever else the machine does meets all
of them; each figure is the median of five turns.
"""

import os
import statistics
import time
from collections.abc import Callable

import click
import numpy as np
import paddle
from paddle import nn

from ssld.train import networks
from ssld.train.depthwise import DepthwiseConv2D
from ssld.train.losses import hard_ce
from ssld.train.momentum import Momentum

CASES = (
    ("MobileNetV3_small_x1_0", {}, 64, 64),
    ("MobileNetV3_large_x1_0", {}, 224, 16),
    ("MobileNetV3_small_x0_35", {"stem_stride": 1}, 32, 64),
)
TURNS, SECONDS = 5, 2.0


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
            if isinstance(child, DepthwiseConv2D):
                setattr(layer, name, Sliced(child._stride[0]))
    return network


def stepper(network: nn.Layer, size: int, batch: int, fast: bool) -> Callable[[], None]:
    """One training step on noise."""
    optimizer = Momentum(network)
    generator = np.random.default_rng(0)
    images = generator.random((batch, 3, size, size), dtype=np.float32)
    labels = paddle.to_tensor(generator.integers(0, 100, batch))

    def step() -> None:
        os.environ["SSLD_FAST_CONV"] = str(int(fast))
        hard_ce(network(paddle.to_tensor(images)), labels).mean().backward()
        optimizer.step(1e-4)

    return step


def rate(step: Callable[[], None], batch: int) -> float:
    """Images per second over about SECONDS."""
    began, steps = time.perf_counter(), 0
    while (seconds := time.perf_counter() - began) < SECONDS:
        step()
        steps += 1
    return steps * batch / seconds


@click.command()
def main() -> None:
    """Print one line for each network."""
    click.echo(f"{'network':24} {'px':>4} {'batch':>5} {'paddle':>8} {'ssld':>8} {'none':>8}  faster  of the ceiling")
    for name, options, size, batch in CASES:
        build = [networks.build(name, options, 100) for _ in range(3)]
        steps = [
            stepper(network, size, batch, fast)
            for network, fast in zip((*build[:2], hollow(build[2])), (False, True, True), strict=True)
        ]
        for step in steps:
            step()
        turns = [[rate(step, batch) for step in steps] for _ in range(TURNS)]
        paddles, ours, none = (statistics.median(column) for column in zip(*turns, strict=True))
        click.echo(
            f"{name:24} {size:4} {batch:5} {paddles:8.1f} {ours:8.1f} {none:8.1f} {ours / paddles:6.2f}x"
            f" {ours / none:14.2f}"
        )


if __name__ == "__main__":
    main()
