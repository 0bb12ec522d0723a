"""Is the installation right? Each check says what it found."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

import numpy as np
import paddle

from ssld import plugins
from ssld.train import networks
from ssld.train.frozen import Frozen
from ssld.train.losses import hard_ce
from ssld.train.momentum import Momentum


@dataclass(frozen=True)
class Finding:
    """One check: its name, whether it is as it should be, and what was found."""

    name: str
    ok: bool
    detail: str


def examine(device: str = "cpu") -> list[Finding]:
    """Run every check; a check that raises is a finding, not a crash."""
    checks: tuple[tuple[str, Callable[[str], str]], ...] = (
        ("python", lambda device: platform.python_version()),
        ("packages", packages),
        ("one paddle", one_paddle),
        ("device", on_device),
        ("threads", threads),
        ("plug-ins", installed),
        ("training step", training_step),
        ("frozen network", frozen_network),
    )
    return [attempt(name, check, device) for name, check in checks]


def attempt(name: str, check: Callable[[str], str], device: str) -> Finding:
    try:
        return Finding(name, True, check(device))
    except Exception as error:
        return Finding(name, False, f"{type(error).__name__}: {error}")


def packages(device: str) -> str:
    names = ("ssld", "paddlepaddle", "numpy", "pillow", "safetensors", "webdataset", "faiss-cpu", "pydantic")
    return ", ".join(f"{name} {metadata.version(name)}" for name in names)


def one_paddle(device: str) -> str:
    """The CPU and the GPU wheel own the same files; installed together, either may be half overwritten."""
    found = [dist.name for dist in metadata.distributions() if dist.name in ("paddlepaddle", "paddlepaddle-gpu")]
    if len(set(found)) != 1:
        raise RuntimeError(f"expected one of paddlepaddle and paddlepaddle-gpu, got {', '.join(sorted(set(found)))}")
    return found[0]


def on_device(device: str) -> str:
    networks.use_device(device)
    return str(paddle.device.get_device())


def threads(device: str) -> str:
    return f"{os.cpu_count()} cores, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'not set')}"


def installed(device: str) -> str:
    return ", ".join(f"{len(plugins.find(kind))} {kind}" for kind in ("stages", "teachers", "students", "losses"))


def training_step(device: str) -> str:
    """One step of a small student on noise changes its weights and leaves them finite."""
    network = networks.build("MobileNetV3_small_x0_35", {}, 10)
    before = networks.arrays(network)
    began = time.monotonic()
    images = paddle.to_tensor(np.random.default_rng(0).random((8, 3, 32, 32), dtype=np.float32))
    hard_ce(network(images), paddle.to_tensor(np.arange(8))).mean().backward()
    Momentum(network, 0.9, 0.0, None).step(0.1)
    after = networks.arrays(network)
    if not all(np.isfinite(value).all() for value in after.values()):
        raise RuntimeError("expected finite weights after one step, got NaN or infinity")
    if all(np.array_equal(before[name], after[name]) for name in before):
        raise RuntimeError("expected the weights to change in one step, they did not")
    return f"8 images in {time.monotonic() - began:.2f} s"


def frozen_network(device: str) -> str:
    """The exported network answers as the eager one; Frozen itself compares them."""
    network = networks.build("MobileNetV3_small_x0_35", {}, 10)
    answer = Frozen(network, 32, device=device)(np.zeros((2, 3, 32, 32), np.float32))
    return f"logits {list(answer.shape)}, equal to eager"
