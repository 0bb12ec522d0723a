"""Images per second of a training step on this CPU: paddle's convolutions, ssld's own, and none at all.

    python benchmarks/step.py
    python benchmarks/step.py --only ResNet18_vd

A step is what a stage does: forward, loss, backward, update. "without depthwise" leaves the depthwise convolutions of
ssld's step out (a stride becomes a slice), which no kernel for them can beat. All take turns, so that whatever else the
machine does meets each of them; a figure is the median of five turns, and a ratio the median of five ratios.
"""

import os
import statistics
import time
from collections.abc import Callable

import click
import numpy as np
import paddle
from paddle import nn

from ssld.train import depthwise, networks
from ssld.train.convolution import Conv2D
from ssld.train.losses import hard_ce
from ssld.train.momentum import Momentum

CASES = (
    ("MobileNetV3_small_x1_0", {}, 64, 64),
    ("MobileNetV3_large_x1_0", {}, 224, 16),
    ("MobileNetV3_small_x0_35", {"stem_stride": 1}, 32, 64),
    ("ResNet18_vd", {}, 32, 16),
    ("ResNet50_vd", {}, 64, 16),
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
            if isinstance(child, Conv2D) and child.kernels() is depthwise:
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
@click.option("--only", "names", multiple=True, help="Measure this network alone; may be given several times.")
def main(names: tuple[str, ...]) -> None:
    """Print one line for each network."""
    networks.use_device("cpu")
    click.echo(f"{'network':24} {'px':>4} {'batch':>5} {'paddle':>8} {'ssld':>8}  faster  without depthwise")
    for name, options, size, batch in CASES:
        if names and name not in names:
            continue
        kinds = {"paddle": networks.build(name, options, 100), "ssld": networks.build(name, options, 100)}
        if "MobileNet" in name:
            kinds["none"] = hollow(networks.build(name, options, 100))
        steps = {kind: stepper(network, size, batch, kind != "paddle") for kind, network in kinds.items()}
        for step in steps.values():
            step()
        turns = [{kind: rate(step, batch) for kind, step in steps.items()} for _ in range(TURNS)]
        found = {kind: statistics.median(turn[kind] for turn in turns) for kind in steps}
        faster = statistics.median(turn["ssld"] / turn["paddle"] for turn in turns)
        none = f"{found['none']:17.1f}" if "none" in found else ""
        click.echo(f"{name:24} {size:4} {batch:5} {found['paddle']:8.1f} {found['ssld']:8.1f} {faster:6.2f}x  {none}")


if __name__ == "__main__":
    main()
