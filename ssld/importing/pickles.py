"""The tensors of a .pdparams file, read without running it: `python -m ssld.importing.pickles`.

A pickle is a program that names what it calls. Here each name that such a file needs stands for something of this
module, which writes down what it is given; any other name ends the reading. numpy is not loaded, so no number of the
file reaches it before it was checked. What a file can still do is take memory, time, or the interpreter with it, which
is why this is a process of its own, with limits, that ends with the one that started it.

The tensors go to standard output as a safetensors file; "C" or "F" before each name says in which order its numbers
lie.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import pickle
import resource
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

REFUSED = 65
"""The exit code of a file that is refused; the reason is on standard output."""
MAX_TENSORS = 20_000
MAX_NAME = 256
MAX_DIMENSIONS = 8
_TABLE = "StructuredToParameterName@@"
_PARTS = "UnpackBigParamInfor@@"
_KINDS = {
    **{"f2": ("F16", 2), "f4": ("F32", 4), "f8": ("F64", 8), "b1": ("BOOL", 1)},
    **{f"{sign}{size}": (f"{sign.upper()}{8 * size}", size) for sign in "iu" for size in (1, 2, 4, 8)},
}
"""How safetensors calls each type of numpy, and the bytes of a number."""


class Refused(Exception):
    """Why a file is not read on."""


class Name:
    """What a name in the file stands for: it can be called, and nothing else be done with it."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise Refused("expected a file of tensors, got one that changes what it calls")


class Kind:
    """A numpy.dtype."""

    __slots__ = ("dtype", "itemsize")

    def __init__(self, name: Any, *_: Any) -> None:
        if not isinstance(name, str) or name not in _KINDS:
            raise Refused(f"expected arrays of numbers, got one of dtype {shown(name)}")
        self.dtype, self.itemsize = _KINDS[name]

    def __setstate__(self, state: Any) -> None:
        if state[1] not in ("<", "|"):
            raise Refused(f"expected numbers in little-endian order, got the order {shown(state[1])}")


class Array:
    """A numpy.ndarray. shape: of the numbers as they lie, so reversed where they lie in Fortran's order."""

    __slots__ = ("data", "dtype", "order", "shape")

    def __init__(self, *_: Any) -> None:
        self.data = b""

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, data = state
        if not isinstance(kind, Kind):
            raise Refused(f"expected arrays with a dtype, got {shown(kind)}")
        # Python 2 had no bytes of their own
        data = latin1(data) if isinstance(data, str) else data
        if not isinstance(data, bytes):
            raise Refused(f"expected the numbers of an array as bytes, got {shown(data)}")
        if not (0 < len(shape) <= MAX_DIMENSIONS or shape == ()) or any(type(side) is not int for side in shape):
            raise Refused(f"expected arrays of at most {MAX_DIMENSIONS} dimensions, got the shape {shown(shape)}")
        if min(shape, default=1) < 1 or math.prod(shape) * kind.itemsize != len(data):
            raise Refused(f"expected an array of shape {shown(shape)}, got {len(data):,} bytes of {kind.dtype}")
        self.order = "F" if fortran else "C"
        self.shape = shape[::-1] if fortran else shape
        self.dtype, self.data = kind.dtype, data


def latin1(text: str, encoding: str = "latin1") -> bytes:
    """How protocol 2 writes bytes."""
    if encoding != "latin1":
        raise Refused(f"expected bytes as latin1, got them as {shown(encoding)}")
    return text.encode("latin1")


NAMES: Mapping[tuple[str, str], Name] = {
    ("numpy", "ndarray"): Name(Array),
    ("numpy", "dtype"): Name(Kind),
    ("numpy.core.multiarray", "_reconstruct"): Name(Array),
    ("numpy._core.multiarray", "_reconstruct"): Name(Array),
    ("_codecs", "encode"): Name(latin1),
    ("collections", "OrderedDict"): Name(dict),
    ("builtins", "tuple"): Name(tuple),
    ("__builtin__", "tuple"): Name(tuple),
}
"""All that paddle.save names in a state dict: of numpy 1 and 2, in protocols 2 to 4."""


class Reader(pickle.Unpickler):
    """Knows the names above."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in NAMES:
            raise Refused(
                f"refused global {shown(f'{module}.{name}')}: weights name nothing but arrays, so this file may be "
                f"made to run code; do not open it with paddle.load"
            )
        return NAMES[module, name]


def shown(value: Any) -> str:
    """A value in a message: short, on one line."""
    if isinstance(value, tuple) and len(value) <= 2 * MAX_DIMENSIONS and all(isinstance(part, int) for part in value):
        return ascii(list(value))[:100]
    return ascii(value[:100])[1:-1] if isinstance(value, str) else type(value).__name__


def read(file: IO[bytes]) -> dict[str, Array]:
    """The tensors by name. Raises Refused, and whatever a damaged pickle makes Python raise."""
    content = Reader(file, encoding="latin1").load()
    if file.read(1):
        raise Refused("expected a pickle and nothing after it, got more bytes; it is damaged")
    if not isinstance(content, dict):
        raise Refused(f"expected tensors by name, as in a network's state_dict(), got a {shown(content)}")
    if _PARTS in content:
        raise Refused("expected whole tensors, got some over 1 GiB in parts; save it with protocol=4")
    tensors = {name: _tensor(name, value) for name, value in content.items() if name != _TABLE}
    if not 0 < len(tensors) <= MAX_TENSORS:
        raise Refused(f"expected 1 to {MAX_TENSORS:,} tensors, got {len(tensors):,}")
    return tensors


def _tensor(name: Any, value: Any) -> Array:
    if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= MAX_NAME or name == "__metadata__":
        raise Refused(f"expected names of tensors, got {shown(name)!r}")
    # paddle.save writes a tensor beside what is none as (name of the parameter, array)
    inner = value[1] if isinstance(value, tuple) and len(value) == 2 else value
    if not isinstance(inner, Array) or not inner.data:
        raise Refused(f"expected nothing but tensors, got a {shown(value)} as {shown(name)}")
    return inner


def encoded(tensors: Mapping[str, Array]) -> Iterator[bytes]:
    """A safetensors file, piece by piece."""
    header, end = {}, 0
    for name, array in tensors.items():
        start, end = end, end + len(array.data)
        header[array.order + name] = {"dtype": array.dtype, "shape": array.shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    yield len(text).to_bytes(8, "little") + text
    for array in tensors.values():
        yield array.data


def limit(memory: int, seconds: int) -> None:
    """Take so many bytes more than now, and so many seconds of a processor, and leave no core file.

    macOS does not limit the memory of a process.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    pages = Path("/proc/self/statm")
    if pages.exists():
        most = int(pages.read_text().split()[0]) * os.sysconf("SC_PAGESIZE") + memory
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def follow(descriptor: int) -> None:
    """End this process when the input does, which the one that started it holds open as long as it lives."""

    def wait() -> None:
        os.read(descriptor, 1)
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
    # the unpickler may hold the interpreter for all its time, and then no thread runs; the system's signal, SIGIO, ends
    # the process all the same, but for macOS, where only the thread does
    fcntl.fcntl(descriptor, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_ASYNC)


def main(descriptor: int, memory: int, seconds: int) -> int:
    # first: its thread takes memory too, which is not the file's
    follow(sys.stdin.fileno())
    limit(memory, seconds)
    try:
        with open(descriptor, "rb") as file:
            tensors = read(file)
            total, size = sum(len(array.data) for array in tensors.values()), os.fstat(descriptor).st_size
        if total > size:
            raise Refused(f"expected at most the {size:,} bytes of the file in its tensors, got {total:,}")
        sys.stdout.buffer.writelines(encoded(tensors))
        sys.stdout.buffer.flush()
    except Exception as error:
        sys.stdout.buffer.write(reason(error, memory).encode())
        return REFUSED
    return 0


def reason(error: Exception, memory: int) -> str:
    if isinstance(error, Refused):
        return str(error)
    if isinstance(error, MemoryError):
        return f"expected a file of tensors, got one that takes more than {memory:,} bytes of memory to read"
    return f"expected a whole pickle of tensors, got {type(error).__name__}: {shown(str(error))}"


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
