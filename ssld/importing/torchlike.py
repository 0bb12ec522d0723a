"""Weights in a .safetensors file, as torch names them: batch norms, prefixes of wrappers, residual networks.

torchvision (models/resnet.py) projects no shortcut where the shape stays, as in the first stage of its ResNet18 and 34.
PaddleClas projects there too, so those two have no counterpart here; from ResNet50 on both projects are alike.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Literal

from ssld.checkpoint import read_weights
from ssld.contracts import Arrays
from ssld.errors import CheckpointError
from ssld.importing.pickles import MAX_NAME, MAX_TENSORS, shown
from ssld.importing.reading import Read, check_finite, in_time

COUNTER = "num_batches_tracked"
"""What torch counts in every batch norm, and needs only where its momentum is None."""
_STATISTICS = {"running_mean": "_mean", "running_var": "_variance"}
_NORM = r"(?P<{}>weight|bias|_mean|_variance)"
_RESNET = re.compile(
    rf"(?:layer(?P<stage>[1-4])\.(?P<block>0|[1-9]\d?)\.|(?=conv1\.|bn1\.))"
    rf"(?:conv(?P<conv>[1-3])\.weight|bn(?P<bn>[1-3])\.{_NORM.format('norm')}"
    rf"|downsample\.(?:0\.weight|1\.{_NORM.format('short')}))"
)
_HEAD = "fc."
_WRAPPERS = 4
"""How many prefixes that all names have are taken off, one after another."""


def read(path: Path) -> Read:
    """The tensors of a .safetensors file under each of the names that they may have here.

    Raises CheckpointError for a damaged file, and for numbers that are not finite. Ends the process, as after a
    StallError, where it takes too long.
    """
    if path.is_dir():
        raise CheckpointError(f"expected a .safetensors file, got {path}, which is no file")
    with in_time(path):
        found = read_weights(path)
    _check_names(found, path)
    check_finite(found, path)
    return of_torch(found)


def of_torch(found: Arrays) -> Read:
    """Weights under the names that they may have here; batch norms' counters are left out."""
    weights = {_here(name): array for name, array in found.items() if _leaf(name) != COUNTER}
    return Read(tuple(_readings(weights)), _layout(found))


def _check_names(found: Collection[str], path: Path) -> None:
    count = sum(_leaf(name) != COUNTER for name in found)
    if not 0 < count <= MAX_TENSORS:
        raise CheckpointError(f"{path}: expected 1 to {MAX_TENSORS:,} tensors, got {count:,}")
    for name in found:
        if not name.isprintable() or not 0 < len(name) <= MAX_NAME:
            raise CheckpointError(f"{path}: expected names of tensors, got {shown(name)!r}")
    if len({_here(name) for name in found}) < len(found):
        raise CheckpointError(f"{path}: expected one tensor of each name, got both running_mean and _mean of a layer")


def _layout(found: Collection[str]) -> Literal["paddle", "torch", "unknown"]:
    leaves = {_leaf(name) for name in found}
    if leaves & {COUNTER, *_STATISTICS}:
        return "torch"
    return "paddle" if leaves & set(_STATISTICS.values()) else "unknown"


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _here(name: str) -> str:
    """A tensor's name with paddle's word for the statistic of a batch norm."""
    layer, dot, leaf = name.rpartition(".")
    return f"{layer}{dot}{_STATISTICS.get(leaf, leaf)}"


def _readings(weights: Arrays) -> Iterator[Arrays]:
    """The weights as they are called, and without prefixes that all have; each also with torchvision's names read."""
    for stripped in _stripped(weights):
        yield stripped
        for naming in (_plain, _wsl):
            renamed = _renamed(stripped, naming)
            if renamed is not None:
                yield renamed


def _stripped(weights: Arrays) -> Iterator[Arrays]:
    """Also without `module.`, `model.` and whatever else a wrapper put before all names."""
    yield weights
    for _ in range(_WRAPPERS):
        first, rest = zip(*(name.partition(".")[::2] for name in weights), strict=True)
        if len(set(first)) > 1 or not all(rest):
            return
        weights = dict(zip(rest, weights.values(), strict=True))
        yield weights


Naming = Callable[[re.Match[str], Mapping[tuple[int, int], int]], str]
"""The name here, from the parts of torchvision's and the number of each block in the row."""


def _renamed(weights: Arrays, naming: Naming) -> Arrays | None:
    """The weights with torchvision's names read; other names stay, for the report. None where none is torchvision's."""
    found = {name: match for name in weights if (match := _RESNET.fullmatch(name))}
    places = sorted({(int(match["stage"]), int(match["block"])) for match in found.values() if match["stage"]})
    if not places:
        return None
    order = {place: number for number, place in enumerate(places)}
    renamed = {}
    for name, array in weights.items():
        match = found.get(name)
        head = name.replace(_HEAD, "_out.", 1) if naming is _wsl and name.startswith(_HEAD) else name
        renamed[naming(match, order) if match else head] = array
    return renamed if len(renamed) == len(weights) else None


def _plain(match: re.Match[str], order: Mapping[tuple[int, int], int]) -> str:
    """As in ResNet50: the stem is a row of its own, and the blocks of all stages are one row."""
    number, norm = _part(match)
    leaf = f"bn.{norm}" if norm else "conv.weight"
    if not match["stage"]:
        return f"stem.{number}.{leaf}"
    block = order[int(match["stage"]), int(match["block"])]
    return f"blocks.{block}.{'short' if number is None else f'conv{number}'}.{leaf}"


def _wsl(match: re.Match[str], order: Mapping[tuple[int, int], int]) -> str:
    """As in ResNeXt101_32x8d_wsl: each block is a layer of the network, counted within its stage."""
    number, norm = _part(match)
    leaf = f"_bn.{norm}" if norm else "_conv.weight"
    if not match["stage"]:
        return f"_conv_stem.{leaf}"
    return f"_conv{match['stage']}_{match['block']}.{'_short._conv' if number is None else f'_conv{number}'}.{leaf}"


def _part(match: re.Match[str]) -> tuple[int | None, str | None]:
    """Which convolution of its block, from 0, None for the shortcut; and which tensor of its norm, None for its own."""
    which = match["conv"] or match["bn"]
    return (int(which) - 1 if which else None), match["norm"] or match["short"]
