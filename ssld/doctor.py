"""Is the installation right? Each check says what it found."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

from ssld import environment, plugins
from ssld import threads as shared
from ssld.environment import RANKS
from ssld.errors import SsldError
from ssld.train import networks, selfcheck


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
        ("kernels", kernels),
        ("plug-ins", installed),
        ("training step", lambda device: selfcheck.training_step()),
        ("frozen network", lambda device: selfcheck.frozen_network(device)),
    )
    return [attempt(name, check, device) for name, check in checks]


def attempt(name: str, check: Callable[[str], str], device: str) -> Finding:
    try:
        return Finding(name, True, check(device))
    except SsldError as error:
        return Finding(name, False, str(error))
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
    return networks.use_device(device)


def threads(device: str) -> str:
    found = f"{shared.cores()} of {os.cpu_count()} cores, ranks: {os.environ.get(RANKS, '1')}"
    return f"{found}; a training step takes {shared.of_step()}, a frozen network {shared.share()}"


def kernels(device: str) -> str:
    """What computes a training step on a CPU, and how it could be faster."""
    found = environment.kernels()
    return f"{found}; {environment.SLOW}" if found == environment.PADDLE_KERNELS else found


def installed(device: str) -> str:
    """Every plug-in can be imported, and no two share a name."""
    for kind in plugins.KINDS:
        for found in plugins.find(kind):
            plugins.load(kind, found.name)
    return ", ".join(f"{len(plugins.find(kind))} {kind}" for kind in plugins.KINDS)
