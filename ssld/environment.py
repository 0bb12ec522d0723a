"""What the bits of a result depend on besides its recipe."""

from __future__ import annotations

import functools
import os
import platform
from importlib import metadata
from pathlib import Path

PADDLE, PADDLE_GPU = "paddlepaddle", "paddlepaddle-gpu"


@functools.cache
def installed(package: str) -> str:
    """The version of an installed distribution, or nothing."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def numba_version() -> str:
    """The numba that computes depthwise convolutions in training on a CPU; nothing where paddle does."""
    return "" if os.environ.get("SSLD_FAST_CONV") == "0" else installed("numba")


def environment() -> dict[str, str]:
    """Machine, versions and thread settings, by name."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "MKL_CBWR")
    return {
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "python": platform.python_version(),
        **{package: installed(package) for package in ("ssld", PADDLE, PADDLE_GPU, "numpy", "pillow")},
        "depthwise": f"numba {numba} with llvmlite {installed('llvmlite')}" if (numba := numba_version()) else "paddle",
        **{name: os.environ.get(name, "") for name in names},
    }


def cpu_name() -> str:
    """The processor's model where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
