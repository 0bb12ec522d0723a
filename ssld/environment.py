"""What the bits of a result depend on besides its recipe."""

from __future__ import annotations

import functools
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import numpy as np

RANKS = "SSLD_RANKS"
"""The variable by which a process knows how many train together; one where it is not set."""
PADDLE, PADDLE_GPU = "paddlepaddle", "paddlepaddle-gpu"


@functools.cache
def installed(package: str) -> str:
    """The version of an installed distribution, or nothing."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def numba_version() -> str:
    """The numba that compiles the kernels of a training step on a CPU; nothing where paddle computes all of it."""
    return "" if os.environ.get("SSLD_FAST_CONV") == "0" else installed("numba")


PADDLE_KERNELS = "paddle"
SLOW = "a training step takes three to seven times as long as with the extra cpu (pip install 'ssld[cpu]')"
"""Of paddle's own kernels; docs/performance.md has the figures."""


def environment() -> dict[str, str]:
    """Machine, versions and thread settings, by name."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "MKL_CBWR")
    return {
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "python": platform.python_version(),
        **{package: installed(package) for package in ("ssld", PADDLE, PADDLE_GPU, "numpy", "pillow")},
        "kernels": kernels(),
        **{name: os.environ.get(name, "") for name in names},
        "ranks": os.environ.get(RANKS, "1"),
    }


def kernels() -> str:
    """What computes convolutions, batch norms and classifiers in a training step on a CPU."""
    if not (numba := numba_version()):
        return PADDLE_KERNELS
    built = cast(dict[str, Any], np.show_config(mode="dicts")).get("Build Dependencies", {})
    blas = built.get("blas", {})
    return f"numba {numba} with llvmlite {installed('llvmlite')}, {blas.get('name')} {blas.get('version')}"


def cpu_name() -> str:
    """The processor's model where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
