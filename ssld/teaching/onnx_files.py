"""What files an .onnx file is made of, found without a library that reads it."""

from __future__ import annotations

import re
from pathlib import Path

_LOCATION = re.compile(rb"\x0a\x08location\x12([\x01-\x7f]|[\x80-\xff][\x01-\x7f])")
"""How a tensor names the file that holds its values: a StringStringEntryProto, the length of the name as a varint."""


def files_beside(file: Path, content: bytes) -> list[Path]:
    """The files with tensors of an .onnx file of that content, sorted; a name is one of the folder of the file."""
    names = set()
    for found in _LOCATION.finditer(content):
        low, *high = found[1]
        length = low if not high else (low & 0x7F) + (high[0] << 7)
        names.add(content[found.end() : found.end() + length].decode(errors="surrogateescape"))
    return [file.parent / name for name in sorted(names)]
