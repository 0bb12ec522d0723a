"""From a weights file of another program to one of ours, and whose weights they are."""

from __future__ import annotations

import glob
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ssld import plugins
from ssld.checkpoint import fit_weights, write_weights
from ssld.contracts import Arrays, Headless
from ssld.errors import CheckpointError, RecipeError, SsldError
from ssld.files import ABANDONED, sweep_old
from ssld.importing import paddleclas, torchlike
from ssld.importing.reading import Read
from ssld.signals import Stop, interrupting
from ssld.train.shapes import Outline, outline

SUFFIX = ".safetensors"
_BEFORE = "before anything was written"


@dataclass(frozen=True)
class Imported:
    """What was written. networks: the installed ones that have just these tensors, and with how many classes.

    Where the classifier is left out, `networks` tells of what was read, and `tensors` of what was written.
    """

    path: Path
    tensors: int
    networks: dict[str, int]


@dataclass(frozen=True)
class _Fit:
    """Weights as a network has them, or as they were read where none has; networks: see Imported.

    head: the name of the classifier in each of them.
    """

    weights: Arrays
    networks: dict[str, int]
    head: str | None = None


@interrupting()
def convert(
    file: Path, out: Path | None, network: str | None, note: Callable[[str], None], *, head_mismatch: bool = False
) -> Imported:
    """Write weights of PaddleClas, or of torch in a .safetensors file, as a .safetensors file with our names.

    out: beside a .pdparams file where it is None; another file there is never replaced.
    network: the one that has to have just these tensors, with whatever number of classes; None to look for it. The
    names of torch mean nothing without a network.
    note: is told what could not be compared, or what comes nearest.
    head_mismatch: leave the classifier out, so that a stage with another number of classes can start from the file.
    Raises CheckpointError for a file that cannot be read or does not fit, OutputError where another file is in the way,
    Interrupted after a signal; one that comes when the file was read waits for the end of a network or of the writing.
    """
    foreign = file.suffix == SUFFIX
    if (out is None and foreign) or (out is not None and out.suffix != SUFFIX):
        raise RecipeError(
            f"--out: expected a name that ends in {SUFFIX}, got {out or 'none beside a file of that kind'}"
        )
    found, stop = torchlike.read(file) if foreign else Read((paddleclas.read(file),)), Stop()
    target = out or file.with_suffix(SUFFIX)
    with stop.listening():
        fit = _checked(found, network, file) if network else _fitting(found, file, note, stop)
        fit = _headless(fit, file, note) if head_mismatch else fit
        stop.check(_BEFORE)
        sweep_old(target.parent, ABANDONED, f".tmp-{glob.escape(target.name)}-*")
        write_weights(target, fit.weights)
    stop.check(f"after {target} was written")
    return Imported(target, len(fit.weights), fit.networks)


def _checked(found: Read, network: str, file: Path) -> _Fit:
    """The weights of the network. Raises CheckpointError, with both sides, unless all tensors match."""
    made, weights = _compared(found, network)
    fit_weights(weights, made.shapes, f"{file} for {network}")
    return _decided(found, made, weights, network, file)


def _headless(fit: _Fit, file: Path, note: Callable[[str], None]) -> _Fit:
    """The weights without those of the classifier. Raises CheckpointError where no network says which these are."""
    if fit.head is None:
        raise CheckpointError(
            f"{file}: expected weights of a network here, whose classifier is to be left out, got those of none; "
            f"name the nearest with --network to see the difference"
        )
    head = sorted(name for name in fit.weights if name.startswith(f"{fit.head}."))
    shown = ", ".join(f"{name} {list(fit.weights[name].shape)}" for name in head)
    note(f"left out, so that a stage can start from the others with classes of its own: {shown}")
    others = {name: array for name, array in fit.weights.items() if name not in head}
    return replace(fit, weights=Headless(others))


def _decided(found: Read, made: Outline, weights: Arrays, network: str, file: Path) -> _Fit:
    """What fits. Raises CheckpointError where a matrix would fit the other way as well."""
    if undecided := found.undecided(weights):
        shown = f"{undecided[0]} {list(weights[undecided[0]].shape)}"
        raise CheckpointError(
            f"{file} for {network}: expected a matrix whose shape says how it lies, got {shown}, which may "
            f"be [in, out], as here, or [out, in], as in torch, and no other name tells whose file this is; convert it "
            f"where it was made"
        )
    return _Fit(weights, {network: made.count}, made.head)


def _compared(found: Read, network: str) -> tuple[Outline, Arrays]:
    """The network with as many classes as the weights are for, and the weights as they suit it."""
    made = outline(network)
    weights = found.suited(made.shapes)
    # most networks need not be built a second time
    if 2 * len(made.shapes.keys() & weights.keys()) > len(weights):
        made = outline(network, made.classes(weights))
    return made, weights


def _fitting(found: Read, file: Path, note: Callable[[str], None], stop: Stop) -> _Fit:
    """The weights, and all installed networks that have just these tensors."""
    fitting, shared = {}, {}
    for network in sorted({plugin.name for plugin in plugins.find("students")}):
        stop.check(_BEFORE)
        try:
            made, weights = _compared(found, network)
        except SsldError as error:
            note(f"not compared with {network}: {error}")
            continue
        shapes = {name: array.shape for name, array in weights.items()}
        if made.shapes == shapes:
            fitting[network] = _decided(found, made, weights, network, file)
        shared[network] = len(made.shapes.items() & shapes.items())
    if not fitting:
        return _unfitted(found, file, shared, note)
    first, *others = fitting.values()
    if any(other.weights.keys() != first.weights.keys() for other in others):
        raise CheckpointError(
            f"{file}: expected the weights of one network, got some that fit {', '.join(fitting)}, each under other "
            f"names; name one with --network"
        )
    return replace(first, networks={network: fit.networks[network] for network, fit in fitting.items()})


def _unfitted(found: Read, file: Path, shared: Mapping[str, int], note: Callable[[str], None]) -> _Fit:
    """The weights of a network that is not here. Raises CheckpointError where only a network tells what they are."""
    weights = found.readings[0]
    remark = f"no installed network has just these {len(weights)} tensors"
    if shared:
        nearest = max(shared, key=shared.__getitem__)
        remark += f"; the nearest, {nearest}, has {shared[nearest]} of them: --network {nearest} shows the difference"
    if found.layout != "fixed":
        raise CheckpointError(f"{file}: {remark}")
    if shared:
        note(remark)
    return _Fit(weights, {})
