"""The file format of soft labels: from a teacher's logits to the bytes of one label file, and back.

Of each sample and view are kept the K most probable classes, 8 bits of log-probability for each, and the log of the
mass of all other classes. A file is a safetensors file of these three arrays; the library itself is not used to write
it, since it puts two entries of metadata into random order.

    8 bytes     length of the JSON, little-endian
    JSON        {"__metadata__": {"sha256": …, "ssld": the header, as JSON in a string}, "rest": {"dtype": …}, …}
    rest        float16 [N, V]
    codes       uint8 [N, V, K]
    ids         uint8 [N, V, ceil(K * bits / 8)]

The sha256 is of the JSON without it, then of the arrays.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from typing import Any

import numpy as np

from ssld.contracts import Soft
from ssld.errors import LabelError

LIMIT = 24
"""Nats; a class less probable than exp(-24) = 4e-11 is kept as if it were that probable.

With 16, the KL to the teacher would be a third less, but one that is certain would be off by several nats in most
classes, which the backward half of the loss `js` sees; benchmarks/label_size.py compares.
"""
QUANTIZER = f"sqrt 8 bit to {LIMIT} nats"
"""How a log-probability becomes a code, for headers: in equal steps of its square root, the finer the nearer to 1."""
FIRST = 1e-5
"""Nats that the most probable class is raised by, to stay the most probable one beside another of the same code."""
HEADER_LIMIT = 2**20
"""Bytes of JSON in front of the arrays; a real one has 1,700."""
_BLOCK = 2**20  # logits that are worked on at a time, so that memory does not grow with the rows
_STEPS = 255
_HALF, _BYTE = np.dtype("<f2"), np.dtype("u1")
_KINDS: Mapping[str, tuple[str, np.dtype[Any]]] = {"rest": ("F16", _HALF), "codes": ("U8", _BYTE), "ids": ("U8", _BYTE)}


@dataclass(frozen=True, eq=False)
class Packed:
    """Soft labels as they are stored. The leading dimensions are free: [N, V] in a file, [B] in a batch.

    ids: uint8 [..., ceil(K * bits / 8)], the K most probable classes, most probable first and equal ones by class, each
    of the fewest bits that can hold every class; codes: uint8 [..., K], their log-probabilities, quantized.
    rest: float16 [...], log of the mass of all other classes, at least -104; -inf where K is all classes; NaN marks a
    sample without a label, whose image was damaged.
    """

    ids: np.ndarray
    codes: np.ndarray
    rest: np.ndarray

    def __post_init__(self) -> None:
        kinds = self.ids.dtype, self.codes.dtype, self.rest.dtype
        shapes = {self.ids.shape[:-1], self.codes.shape[:-1], self.rest.shape}
        if kinds != (_BYTE, _BYTE, _HALF) or len(shapes) != 1:
            got = ", ".join(f"{array.dtype} {list(array.shape)}" for array in (self.ids, self.codes, self.rest))
            raise ValueError(f"expected uint8 [..., bytes], uint8 [..., K] and float16 [...], got {got}")

    def __getitem__(self, index: Any) -> Packed:
        """The same numpy index, of leading dimensions, on all three."""
        return Packed(self.ids[index], self.codes[index], self.rest[index])


def pack(logits: np.ndarray, top_k: int, temperature: float = 1.0) -> Packed:
    """The top_k classes of softmax(logits / temperature), and the mass of the others.

    logits: float32 [..., C]. What is returned for a row does not depend on the other rows. Raises ValueError for
    logits that are not finite, and unless 1 <= top_k <= C and 1e-6 <= temperature <= 1e6.

    >>> labels = pack(np.log(np.float32([0.2, 0.7, 0.05, 0.05])), top_k=2)
    >>> np.exp(unpack(labels, classes=4, top_k=2).logits).round(2)
    array([0.7, 0.2, 0.1], dtype=float32)
    """
    logits = np.ascontiguousarray(logits, np.float32)
    *shape, classes = logits.shape
    if not 1 <= top_k <= classes:
        raise ValueError(f"expected top_k from 1 to {classes}, the number of classes, got {top_k}")
    if not 1e-6 <= temperature <= 1e6:
        raise ValueError(f"expected a temperature from 1e-6 to 1e6, got {temperature}")
    packed = damaged((math.prod(shape),), classes, top_k)
    rows = logits.reshape(-1, classes)
    size = max(1, _BLOCK // classes)
    for start in range(0, len(rows), size):
        block = slice(start, start + size)
        if not np.isfinite(rows[block]).all():
            raise ValueError("expected finite logits, got NaN or infinity")
        ids = _top(rows[block], top_k)
        top, packed.rest[block] = _log_probabilities(rows[block], ids, temperature)
        packed.codes[block] = quantize(top)
        packed.ids[block] = _pack_ids(ids, classes)
    return Packed(*(array.reshape((*shape, *array.shape[1:])) for array in (packed.ids, packed.codes, packed.rest)))


def unpack(packed: Packed, classes: int, top_k: int, temperature: float = 1.0) -> Soft:
    """The distributions that `pack` stored, made to sum to 1, as logits at the temperature that it was given.

    For leading dimensions [B]: ids int64 [B, K] and logits float32 [B, K + 1]; with all classes kept, no ids and
    logits [B, C] in class order. The logits of a sample without a label are NaN. Raises ValueError for arrays that
    do not have the widths of so many classes and top_k.
    """
    wanted = damaged((), classes, top_k)
    widths = packed.ids.shape[-1], packed.codes.shape[-1]
    if widths != (wanted.ids.size, top_k):
        raise ValueError(f"expected {wanted.ids.size} bytes of ids and {top_k} codes for each label, got {widths}")
    ids = _unpack_ids(packed.ids, classes, top_k)
    stored = np.concatenate([restore(packed.codes), np.asarray(packed.rest, np.float64)[..., None]], axis=-1)
    stored[..., 0] += FIRST
    total = np.log(np.exp(stored).sum(axis=-1, keepdims=True))
    logits = (temperature * (stored - total)).astype(np.float32)
    if top_k < classes:
        return Soft(ids, logits, temperature)
    in_order = np.full((*ids.shape[:-1], classes), np.nan, np.float32)
    np.put_along_axis(in_order, ids, logits[..., :-1], axis=-1)
    return Soft(None, in_order, temperature)


def damaged(shape: tuple[int, ...], classes: int, top_k: int) -> Packed:
    """Labels of samples whose image was damaged: rest is NaN, and all else zero."""
    width = -(-top_k * _bits(classes) // 8)
    return Packed(
        np.zeros((*shape, width), np.uint8), np.zeros((*shape, top_k), np.uint8), np.full(shape, np.nan, np.float16)
    )


def bytes_per_view(classes: int, top_k: int) -> int:
    """Of the labels of one view; a file has a header of less than two thousand bytes besides."""
    one = damaged((), classes, top_k)
    return one.ids.nbytes + one.codes.nbytes + one.rest.nbytes


def quantize(log_probabilities: np.ndarray) -> np.ndarray:
    """uint8 codes of log-probabilities, which are at most 0; the larger the code, the less probable the class."""
    return np.rint(_STEPS * np.sqrt(np.clip(-log_probabilities / LIMIT, 0, 1))).astype(np.uint8)


def restore(codes: np.ndarray) -> np.ndarray:
    """The log-probabilities, float64, that the codes stand for."""
    return -LIMIT * (codes / _STEPS) ** 2


def encode(header: Mapping[str, Any], packed: Packed) -> bytes:
    """One label file. Equal input gives equal bytes.

    header: what the labels are, in JSON values with strings for keys. Raises ValueError or TypeError where it is not
    JSON (NaN is not), or takes more than a mebibyte.
    """
    text = json.dumps(header, sort_keys=True, allow_nan=False, separators=(",", ":"))
    arrays = {name: np.asarray(getattr(packed, name), kind, order="C") for name, (_, kind) in _KINDS.items()}
    front = _front(text, arrays)
    if len(front) > HEADER_LIMIT:
        raise ValueError(f"expected a header of at most {HEADER_LIMIT:,} bytes, got {len(front):,}")
    return b"".join([front, *(array.tobytes() for array in arrays.values())])


def decode(data: bytes | memoryview | mmap, where: Path) -> tuple[dict[str, Any], Packed]:
    """Header and labels of a whole file: one that encoding them again would give byte for byte. Raises LabelError.

    The arrays are views of data, which may be a file mapped into memory. where: the name of the file, for messages.
    """
    content = np.frombuffer(data, np.uint8)
    length = int.from_bytes(content[:8].tobytes(), "little")
    if content.size < 8 or length > HEADER_LIMIT - 8:
        got = f"{content.size} bytes" if content.size < 8 else f"one that announces {length:,} bytes"
        raise _damage(where, f"a label file with a header of at most {HEADER_LIMIT:,} bytes", got)
    front, body = content[: 8 + length].tobytes(), content[8 + length :]
    try:
        document = json.loads(front[8:])
        text = document["__metadata__"]["ssld"]
        header, arrays = json.loads(text), _views(body, document)
        packed = Packed(arrays["ids"], arrays["codes"], arrays["rest"])
        whole = isinstance(header, dict) and _front(text, arrays) == front
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damage(where, "the header and the arrays of a label file", f"{type(error).__name__}: {error}") from error
    if not whole:
        raise _damage(where, "the content that its sha256 was made of", "another")
    return header, packed


def _front(text: str, arrays: Mapping[str, np.ndarray]) -> bytes:
    """All of the file that comes before the arrays, as safetensors lays it out. text: the header."""
    document: dict[str, Any] = {"__metadata__": {"ssld": text}}
    end = 0
    for name, array in arrays.items():
        start, end = end, end + array.nbytes
        document[name] = {"dtype": _KINDS[name][0], "shape": list(array.shape), "data_offsets": [start, end]}
    digest = hashlib.sha256(json.dumps(document).encode())
    for array in arrays.values():
        digest.update(array.data)
    document["__metadata__"]["sha256"] = digest.hexdigest()
    body = json.dumps(document, separators=(",", ":")).encode()
    body += b" " * (-len(body) % 8)
    return len(body).to_bytes(8, "little") + body


def _views(body: np.ndarray, document: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays that lie in the bytes, in the shapes that the document gives. Raises ValueError unless they fit."""
    shapes = {name: document[name]["shape"] for name in _KINDS}
    sizes = [
        math.prod(shape) * kind.itemsize for shape, (_, kind) in zip(shapes.values(), _KINDS.values(), strict=True)
    ]
    if sum(sizes) != body.size:
        raise ValueError(f"expected {sum(sizes):,} bytes after the header, got {body.size:,}")
    parts = np.split(body, np.cumsum(sizes)[:-1])
    return {
        name: part.view(_KINDS[name][1]).reshape(shape)
        for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }


def _damage(where: Path, expected: str, got: str) -> LabelError:
    return LabelError(f"{where} is damaged: expected {expected}, got {got}; it is not used; label again")


def _top(rows: np.ndarray, top_k: int) -> np.ndarray:
    """Columns of the top_k largest values of each row, int64 [rows, top_k]: largest first, equal ones by column."""
    count, classes = rows.shape
    if top_k == classes:
        return np.argsort(-rows, axis=1, kind="stable")
    # partition gives the value of the last one that is in, and which of its equals are in is decided by the sort
    least = np.partition(rows, classes - top_k, axis=1)[:, classes - top_k, None]
    row, column = np.nonzero(rows >= least)
    order = np.lexsort((-rows[row, column], row))
    first = np.searchsorted(row, np.arange(count))
    return column[order][first[:, None] + np.arange(top_k)]


def _log_probabilities(rows: np.ndarray, ids: np.ndarray, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Of softmax(rows / temperature): the logs of the probabilities of ids, and of the sum of all others."""
    with np.errstate(over="ignore"):
        scaled = (rows - rows.max(axis=1, keepdims=True)) / np.float32(temperature)
    top = np.take_along_axis(scaled, ids, axis=1)
    masses = np.exp(scaled, out=scaled)
    total = np.log(masses.sum(axis=1))
    if ids.shape == rows.shape:
        return top - total[:, None], np.full(len(rows), -np.inf)
    # what was cut off is summed by itself: near p = 1, the difference to the sum of all would be rounding alone
    np.put_along_axis(masses, ids, 0, axis=1)
    rest = np.maximum(masses.sum(axis=1), np.finfo(np.float32).tiny)
    return top - total[:, None], np.log(rest) - total


def _bits(classes: int) -> int:
    return max(1, (classes - 1).bit_length())


def _pack_ids(ids: np.ndarray, classes: int) -> np.ndarray:
    """uint8 [..., ceil(K * bits / 8)] of [..., K]: the ids one after another, each with its highest bit first."""
    shifts = np.arange(_bits(classes))[::-1]
    bits = (ids[..., None] >> shifts & 1).astype(np.uint8)
    return np.packbits(bits.reshape(*ids.shape[:-1], -1), axis=-1)


def _unpack_ids(packed: np.ndarray, classes: int, top_k: int) -> np.ndarray:
    width = _bits(classes)
    bits = np.unpackbits(packed, axis=-1, count=top_k * width).reshape(*packed.shape[:-1], top_k, width)
    return bits @ (1 << np.arange(width, dtype=np.int64)[::-1])
