"""Weights of PaddleClas: its .pdparams files, and the names of its two generations.

Names are those of PaddleClas since 2.2. ResNet_vd and MobileNetV3 were called otherwise before, and were trained and
published so; the other networks here have kept their names, or are younger.
"""

from __future__ import annotations

import os
import re
import signal
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import numpy as np

from ssld.checkpoint import decode
from ssld.contracts import Arrays
from ssld.errors import CheckpointError
from ssld.importing.pickles import REFUSED
from ssld.importing.reading import check_finite, in_time
from ssld.processes import start

MEMORY = (64 * 2**20, 4)
"""What a file may take to be read: bytes, and times its size. In protocol 2 a tensor lies in memory as text as well."""
SECONDS = (10, 10_000_000)
"""Of a processor: how many, and one more for so many bytes."""

_BY_PARAMETER = re.compile(r".*(\.[wb]_\d+|_weights|_offset)")
_NORM = r"(weight|bias|_mean|_variance)"
_RESNET = re.compile(
    rf"(?:conv1_(?P<stem>[123])|bb_(?P<stage>\d+)_(?P<block>\d+)\.(?P<part>conv[012]|short))"
    rf"\.(?:_(?P<conv>conv)\.weight|_batch_norm\.(?P<norm>{_NORM}))|out\.(?P<out>weight|bias)"
)
_MOBILENET = re.compile(
    rf"conv(?P<number>\d+)(?P<part>\.(?:expand_conv|bottleneck_conv|linear_conv|mid_se))?\.(?P<rest>conv[12]?\.weight"
    rf"|conv[12]\.bias|bn\.{_NORM})|(?P<last>last_conv\.weight|last_second_conv\.(?:conv\.weight|bn\.{_NORM}))"
    rf"|out\.(?P<out>weight|bias)"
)


def read(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a .pdparams file by their structured names, as PaddleClas calls them today; bfloat16 as float32.

    No code of the file runs. Raises CheckpointError for what is no such file, for one that names its tensors by
    parameter, and for numbers that are not finite. Ends the process, as after a StallError, where it takes too long.
    """
    with in_time(path):
        data = _tensors(path)
    arrays = {name[1:]: array.T if name[0] == "F" else array for name, array in decode(data, path).items()}
    by_parameter = next(filter(_BY_PARAMETER.fullmatch, arrays), None)
    if by_parameter is not None:
        raise CheckpointError(
            f"{path}: expected tensors with the names of a network's state_dict(), got names of parameters such as "
            f"{by_parameter}, as paddle.static.save writes them, which do not say where in a network they belong; "
            f"load it where it was made, and save the state_dict() of the network"
        )
    weights = {name: _numbers(array) for name, array in arrays.items()}
    check_finite(weights, path)
    return of_today(weights)


def of_today(weights: Arrays) -> dict[str, np.ndarray]:
    """The weights under the names that PaddleClas has given since 2.2; those that it never gave stay as they are."""
    renamed = _resnet(weights) or _mobilenet(weights)
    # names that differ only as text, like bb_0_0 and bb_00_0, are nobody's
    if renamed is None or len(set(renamed.values())) < len(weights):
        return dict(weights)
    return {renamed[name]: array for name, array in weights.items()}


def _resnet(names: Mapping[str, object]) -> dict[str, str] | None:
    """Today's names of a ResNet_vd of before 2.2; None for anything else."""
    found = {name: match for name in names if (match := _RESNET.fullmatch(name))}
    if len(found) < len(names):
        return None
    places = {name: (int(match["stage"]), int(match["block"])) for name, match in found.items() if match["stage"]}
    order = {place: number for number, place in enumerate(sorted(set(places.values())))}
    renamed = {}
    for name, match in found.items():
        leaf = "conv.weight" if match["conv"] else f"bn.{match['norm']}"
        if match["out"]:
            renamed[name] = f"fc.{match['out']}"
        elif match["stem"]:
            renamed[name] = f"stem.{int(match['stem']) - 1}.{leaf}"
        else:
            renamed[name] = f"blocks.{order[places[name]]}.{match['part']}.{leaf}"
    return renamed


def _mobilenet(names: Mapping[str, object]) -> dict[str, str] | None:
    """Today's names of a MobileNetV3 of before 2.2, whose blocks are counted from conv2; None for anything else."""
    renamed = {}
    for name in names:
        match = _MOBILENET.fullmatch(name)
        if match is None or (match["number"] == "1") != (match["part"] is None and match["number"] is not None):
            return None
        if match["out"]:
            renamed[name] = f"fc.{match['out']}"
        elif match["last"]:
            renamed[name] = name
        elif match["part"]:
            renamed[name] = f"blocks.{int(match['number']) - 2}{match['part']}.{match['rest']}"
        else:
            renamed[name] = f"conv.{match['rest']}"
    return renamed


def _numbers(array: np.ndarray) -> np.ndarray:
    """bfloat16, which paddle writes as uint16, as float32 of the same value; anything else as it is."""
    return (array.astype(np.uint32) << 16).view(np.float32) if array.dtype == np.uint16 else array


def _tensors(path: Path) -> bytes:
    """The tensors as a safetensors file. Raises CheckpointError."""
    try:
        # a named pipe would never end
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"expected a .pdparams file, got {path}, which is no file")
        with path.open("rb") as file:
            return _unpickled(file, path)
    except OSError as error:
        raise CheckpointError(f"expected a .pdparams file, got {path}: {error.strerror}") from error


def _unpickled(file: IO[bytes], path: Path) -> bytes:
    size = os.fstat(file.fileno()).st_size
    memory, seconds = MEMORY[0] + MEMORY[1] * size, SECONDS[0] + size // SECONDS[1]
    words = map(str, (file.fileno(), memory, seconds))
    process = start("ssld.importing.pickles", list(words), text=False, pass_fds=[file.fileno()])
    try:
        assert process.stdin is not None, "made with a pipe"
        assert process.stdout is not None, "made with a pipe"
        # its input ends after it, since it ends with its input
        with process.stdin, process.stdout as out:
            data: bytes = out.read()
            code = process.wait()
    finally:
        process.kill()
        process.wait()
    if code:
        raise CheckpointError(f"{path}: {_reason(code, data, seconds)}")
    return data


def _reason(code: int, said: bytes, seconds: int) -> str:
    if code == REFUSED:
        return said.decode()
    if code == -signal.SIGXCPU:
        return f"expected a file of tensors, got one that takes more than {seconds} seconds to read"
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return f"expected a file of tensors, got one that ends the process that reads it with {how}"
