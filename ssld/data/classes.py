"""Class names in a file beside the data, and whether labels are numbers of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from ssld.errors import DataError

CLASSES_FILE = "classes.txt"


def read_classes(file: Path) -> tuple[str, ...]:
    """Class names in label order, one per line."""
    if not file.is_file():
        raise DataError(f"{file}: expected a file of class names, one per line, got no such file")
    try:
        lines = file.read_text(encoding="utf-8-sig").rstrip("\n").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: expected class names in UTF-8, got: {error}; save it as UTF-8") from error
    numbers: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line in numbers:
            got = f"{line!r} as in line {numbers[line]}" if line in numbers else "an empty line"
            raise DataError(f"{file}:{number}: expected a class name of its own on each line, got {got}; correct it")
        numbers[line] = number
    return tuple(numbers)


def check_range(
    labels: np.ndarray, classes: tuple[str, ...] | None, source: Path | None, where: Callable[[int], str]
) -> None:
    if classes is not None and labels.max() >= len(classes):
        worst = int(labels.argmax())
        raise DataError(
            f"{where(worst)}: expected a label in [0, {len(classes) - 1}], for the {len(classes)} classes of {source}, "
            f"got {labels[worst]}; correct the label, or the class names"
        )
