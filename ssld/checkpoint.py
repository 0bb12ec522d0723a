"""Checkpoints: the only file that writes or reads them, and that reads weights.

A root (a stage's directory in a run) holds one directory per kept step, and links such as `latest` and `best`:

    step-00001234/
        student.safetensors, optimizer.safetensors, …   one file per group of tensors
        state.json                                      format, step, and the caller's own state
        manifest.json                                   size and sha256 of each of the others; written last
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from ssld import files
from ssld.contracts import Headless
from ssld.errors import CheckpointError, OutputError, UnreadableError

FORMAT = 1
STUDENT = "student"
HEADER_LIMIT = 8 * 2**20
"""Bytes; a header of a hundred thousand names costs minutes to parse, and no network here has a tenth of that."""
SHOWN = 5
_STATE = "state.json"
_NO_HEAD = {"ssld.head": "left out"}
"""What the metadata of a file say where its classifier was left out on purpose."""
_STEP = re.compile(r"(?:\.new-)?step-(\d{8,})")


class FormatError(CheckpointError):
    """A whole checkpoint, of another version of ssld."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was whole when it was opened; state is what `save` was given."""

    path: Path
    step: int
    state: Mapping[str, Any]
    committed: files.Committed

    def tensors(self, name: str) -> dict[str, np.ndarray]:
        """One group of tensors by name, read from the disk and checked again. Raises CheckpointError."""
        file = f"{name}.safetensors"
        return decode(self.committed.read(file), self.path / file)


def save(
    root: Path, step: int, tensors: Mapping[str, Mapping[str, np.ndarray]], state: Mapping[str, Any]
) -> Checkpoint:
    """Commit the groups of tensors and the JSON state as the checkpoint of this step, in place of an older one.

    Equal input gives equal bytes. Raises OutputError or StorageError when it cannot be written: the older checkpoints
    are then untouched; ValueError or TypeError for a state that is not JSON (NaN is not).
    """
    document = {"format": FORMAT, "step": step, "state": state}
    contents = {f"{name}.safetensors": _encode(group, name) for name, group in tensors.items()}
    contents[_STATE] = (json.dumps(document, sort_keys=True, allow_nan=False, indent=1) + "\n").encode()
    return _opened(files.commit_directory(directory(root, step), contents), contents[_STATE])


def load(path: Path) -> Checkpoint:
    """One checkpoint by its directory, or by a link to it. Raises CheckpointError that says what is damaged."""
    committed = files.verify(path.resolve())
    return _opened(committed, committed.read(_STATE))


def latest(root: Path, report: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint by step number; None where none was ever saved.

    A damaged one is passed over, and `report` is told. Raises CheckpointError when all are damaged, since to begin
    anew would hide the loss; and for one that cannot be read, or that another version of ssld wrote, which is not
    damaged: what went on from an older one would take its place.
    """
    found = steps(root)
    for step in reversed(found):
        try:
            return load(directory(root, step))
        except (FormatError, UnreadableError):
            raise
        except CheckpointError as error:
            report(f"passed over the checkpoint of step {step:,}: {error}")
    if found:
        raise CheckpointError(
            f"expected a whole checkpoint in {root}, got {len(found)} that are all damaged (step "
            f"{', '.join(map(str, found))}); restore one from a copy, or delete {root} to begin this stage anew"
        )
    return None


def steps(root: Path) -> list[int]:
    """The steps that have a checkpoint, damaged ones included, in rising order."""
    with files.readable(root):
        if not root.is_dir():
            return []
        matches = [_STEP.fullmatch(path.name) for path in root.iterdir() if path.is_dir()]
    return sorted({int(match[1]) for match in matches if match})


def retain(root: Path, keep: Collection[int]) -> None:
    """Remove the checkpoints of all other steps."""
    for step in steps(root):
        if step not in keep:
            files.discard(directory(root, step))


def point(root: Path, name: str, step: int) -> None:
    """Make root/name a relative link to the checkpoint of the step, in place of an older link."""
    files.link_atomic(root / name, directory(root, step).name)


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """Weights by name from a .safetensors file, a checkpoint (its student), or a root of checkpoints (the newest).

    Headless where the file says that its classifier was left out.
    Raises CheckpointError; a damaged newest checkpoint is not passed over, as an older one gives other weights.
    """
    if path.suffix == ".pdparams":
        raise CheckpointError(_pickled(path))
    if not path.is_dir():
        data = _content(path)
        weights = decode(data, path)
        return Headless(weights) if _metadata(data).items() >= _NO_HEAD.items() else weights
    found = steps(path)
    return load(directory(path, found[-1]) if found else path).tensors(STUDENT)


def write_weights(path: Path, weights: Mapping[str, np.ndarray]) -> None:
    """Write weights as a .safetensors file. Raises OutputError where anything but this very file is there."""
    data = _encode(weights, str(path), _NO_HEAD if isinstance(weights, Headless) else None)
    if files.commit_exclusive(path, data):
        return
    there = "another file"
    # what cannot be read is not known to be the same
    with suppress(OSError):
        if path.is_file() and path.read_bytes() == data:
            return
        there = "a directory" if path.is_dir() else there if path.exists() else "a link that leads nowhere"
    raise OutputError(f"cannot write {path}: {there} has this name; give another one, or remove it")


def fit_weights(weights: Mapping[str, np.ndarray], wanted: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Check that the weights have just the names and shapes of the network. Raises CheckpointError with both sides.

    what: the weights and the network in words, the subject of the message.
    """
    missing = [f"{key} {list(wanted[key])}" for key in wanted if key not in weights]
    unknown = [f"{key} {list(weights[key].shape)}" for key in sorted(weights) if key not in wanted]
    reshaped = [
        f"{key} {list(shape)} in the network, {list(weights[key].shape)} in the file"
        for key, shape in wanted.items()
        if key in weights and weights[key].shape != tuple(shape)
    ]
    lines = [
        *_listed("-", "in the network, not in the file", missing),
        *_listed("+", "in the file, not in the network", unknown),
        *_listed("~", "of another shape", reshaped),
    ]
    if lines:
        head = f"{what}: expected the {len(wanted)} tensors of the network, got {len(weights)} that do not match"
        foot = "name the network and the number of classes that the weights were made with"
        raise CheckpointError("\n".join([head, *lines, foot]))


def decode(data: bytes, where: Path) -> dict[str, np.ndarray]:
    """The tensors in the bytes of a .safetensors file; where: for messages. Raises CheckpointError."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > HEADER_LIMIT:
        got = f"{len(data)} bytes" if len(data) < 8 else f"one that announces a header of {length:,} bytes"
        raise CheckpointError(f"expected a safetensors file (header up to {HEADER_LIMIT:,} bytes), got {got}: {where}")
    try:
        return safetensors.numpy.load(data)
    # ValueError: a shape that numpy cannot have
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"expected a whole safetensors file, got a damaged one: {where}: {error}") from error
    except KeyError as error:
        raise CheckpointError(
            f"expected tensors of a type that numpy has, got {error} in {where}; convert them to float32"
        ) from error


def directory(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def _opened(committed: files.Committed, state: bytes) -> Checkpoint:
    where = committed.directory / _STATE
    try:
        document = json.loads(state)
        written, step, content = (document.get(key) for key in ("format", "step", "state"))
    except (ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{where}: expected the state of a checkpoint as JSON, got: {error}") from error
    if written != FORMAT:
        raise FormatError(f"{where}: expected format {FORMAT}, got {written}; use the version of ssld that wrote it")
    if type(step) is not int or not isinstance(content, dict):
        raise CheckpointError(f"{where}: expected a step and a state, got {step!r} and a {type(content).__name__}")
    return Checkpoint(committed.directory, step, content, committed)


def _listed(sign: str, meaning: str, lines: list[str]) -> list[str]:
    head = [f"{len(lines)} {meaning}:"] if lines else []
    rest = [f"  {sign} … and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return [*head, *(f"  {sign} {line}" for line in lines[:SHOWN]), *rest]


def _metadata(data: bytes) -> dict[str, str]:
    """The text beside the tensors of a whole .safetensors file."""
    length = int.from_bytes(data[:8], "little")
    found: dict[str, str] = json.loads(data[8 : 8 + length]).get("__metadata__") or {}
    return found


def _encode(group: Mapping[str, np.ndarray], name: str, metadata: dict[str, str] | None = None) -> bytes:
    # safetensors writes the memory as it lies; ascontiguousarray would give a scalar a dimension
    arrays = {key: np.asarray(array, order="C") for key, array in group.items()}
    try:
        return safetensors.numpy.save(arrays, metadata)
    except SafetensorError as error:
        raise CheckpointError(
            f"expected tensors of numbers in {name}, got one that cannot be stored: {error}"
        ) from error


def _content(path: Path) -> bytes:
    try:
        # a device or a named pipe would never end
        if path.exists() and not path.is_file():
            raise CheckpointError(f"expected a weights file or a checkpoint, got {path}, which is no file")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"expected a weights file or a checkpoint, got {path}: {error.strerror}") from error


def _pickled(path: Path) -> str:
    return (
        f"expected a .safetensors file, got {path}: a .pdparams file is a pickle, which can run code when it is "
        f"opened; bring it over without running it: ssld import {shlex.quote(str(path))}"
    )
