"""Two things that must work before anything else can: a step of training, and a frozen network."""

from __future__ import annotations

import time

import numpy as np
import paddle

from ssld.errors import SsldError
from ssld.train import networks
from ssld.train.frozen import Frozen
from ssld.train.losses import hard_ce
from ssld.train.momentum import Momentum

NETWORK, CLASSES, IMAGES, SIDE = "MobileNetV3_small_x0_35", 10, 8, 32


def training_step() -> str:
    """One step of a small student on noise. Raises SsldError unless its weights change and stay finite."""
    network = networks.build(NETWORK, {}, CLASSES)
    before = networks.arrays(network)
    began = time.monotonic()
    images = np.random.default_rng(0).random((IMAGES, 3, SIDE, SIDE), dtype=np.float32)
    hard_ce(network(paddle.to_tensor(images)), paddle.to_tensor(np.arange(IMAGES))).mean().backward()
    Momentum(network).step(0.1)
    after = networks.arrays(network)
    if not all(np.isfinite(value).all() for value in after.values()):
        raise SsldError("expected finite weights after one step, got NaN or infinity")
    if all(np.array_equal(before[name], after[name]) for name in before):
        raise SsldError("expected the weights to change in one step, they did not")
    return f"{IMAGES} images in {time.monotonic() - began:.2f} s"


def frozen_network(device: str) -> str:
    """An exported network answers as the eager one does; Frozen itself compares them."""
    answer = Frozen(networks.build(NETWORK, {}, CLASSES), SIDE, device=device)(np.zeros((2, 3, SIDE, SIDE), np.float32))
    return f"logits {list(answer.shape)}, equal to eager"
