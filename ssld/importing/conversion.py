"""From a weights file of another program to one of ours, and whose weights they are."""

from __future__ import annotations

import glob
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ssld import plugins
from ssld.checkpoint import fit_weights, write_weights
from ssld.contracts import Arrays
from ssld.errors import RecipeError, SsldError
from ssld.files import ABANDONED, sweep_old
from ssld.importing import paddleclas
from ssld.signals import Stop, interrupting
from ssld.train.shapes import outline

SUFFIX = ".safetensors"
_BEFORE = "before anything was written"


@dataclass(frozen=True)
class Imported:
    """What was written. networks: the installed ones that have just these tensors, and with how many classes."""

    path: Path
    tensors: int
    networks: dict[str, int]


@interrupting()
def convert(file: Path, out: Path | None, network: str | None, note: Callable[[str], None]) -> Imported:
    """Write a .pdparams file as .safetensors, beside it where `out` is None; another file there is never replaced.

    network: the one that has to have just these tensors, with whatever number of classes; None to look for it.
    note: is told what could not be compared, or what comes nearest.
    Raises CheckpointError for a file that cannot be read or does not fit, OutputError where another file is in the way,
    Interrupted after a signal; one that comes when the file was read waits for the end of a network or of the writing.
    """
    if out is not None and out.suffix != SUFFIX:
        raise RecipeError(f"--out: expected a name that ends in {SUFFIX}, got {out}")
    weights, stop = paddleclas.read(file), Stop()
    target = out or file.with_suffix(SUFFIX)
    with stop.listening():
        networks = _checked(weights, network, file) if network else _fitting(weights, note, stop)
        stop.check(_BEFORE)
        sweep_old(target.parent, ABANDONED, f".tmp-{glob.escape(target.name)}-*")
        write_weights(target, weights)
    stop.check(f"after {target} was written")
    return Imported(target, len(weights), networks)


def _checked(weights: Arrays, network: str, file: Path) -> dict[str, int]:
    """The network with its number of classes. Raises CheckpointError, with both sides, unless all tensors match."""
    made = outline(network)
    made = outline(network, made.classes(weights))
    fit_weights(weights, made.shapes, f"{file} for {network}")
    return {network: made.count}


def _fitting(weights: Arrays, note: Callable[[str], None], stop: Stop) -> dict[str, int]:
    """All installed networks that have just these tensors."""
    shapes = {name: array.shape for name, array in weights.items()}
    fitting, shared = {}, {}
    for network in sorted({found.name for found in plugins.find("students")}):
        stop.check(_BEFORE)
        try:
            made = outline(network)
            # the others need not be built a second time
            if 2 * len(made.shapes.keys() & weights.keys()) > len(weights):
                made = outline(network, made.classes(weights))
        except SsldError as error:
            note(f"not compared with {network}: {error}")
            continue
        if made.shapes == shapes:
            fitting[network] = made.count
        shared[network] = len(made.shapes.items() & shapes.items())
    if not fitting and shared:
        nearest = max(shared, key=shared.__getitem__)
        note(
            f"no installed network has just these {len(weights)} tensors; the nearest, {nearest}, has "
            f"{shared[nearest]} of them: --network {nearest} shows the difference"
        )
    return fitting
