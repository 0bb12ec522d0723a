"""What has been read of another program's file: its tensors, and what is still open about their names and matrices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from ssld.contracts import Arrays
from ssld.ending import leave
from ssld.errors import CheckpointError, StallError
from ssld.terminal import tell
from ssld.watch import watch

WAIT = 600.0
"""Seconds of the clock, since a disk that does not answer takes no processor."""
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Read:
    """The tensors of a file.

    readings: the same tensors under each of the names that they may have here; which are right, a network decides.
    layout: how matrices lie. Paddle multiplies by [in, out], torch by [out, in]; "fixed" is paddle's for certain, and
    the others are what the names of the file suggest.
    """

    readings: tuple[Arrays, ...]
    layout: Literal["fixed", "paddle", "torch", "unknown"] = "fixed"

    def suited(self, shapes: Shapes) -> Arrays:
        """The tensors under the names that most of this network's have, with matrices turned to what goes into them."""
        named = max(self.readings, key=lambda reading: len(shapes.keys() & reading.keys()))
        return {name: array.T if self._turned(array, shapes.get(name)) else array for name, array in named.items()}

    def undecided(self, weights: Arrays) -> list[str]:
        """The matrices that fit in both ways, where nothing else in the file says which is right."""
        square = [name for name, array in weights.items() if array.ndim == 2 and len(set(array.shape)) == 1]
        return square if self.layout == "unknown" else []

    def _turned(self, array: np.ndarray, wanted: tuple[int, ...] | None) -> bool:
        """Whether a matrix has to be turned; by what goes in, as another number of classes may come out."""
        if self.layout == "fixed" or wanted is None or not (array.ndim == len(wanted) == 2):
            return False
        first, second = (side == wanted[0] for side in array.shape)
        return second and (not first or self.layout == "torch")


@contextmanager
def in_time(path: Path) -> Iterator[None]:
    """Ends the process, as after a StallError, where the file is not read within WAIT seconds."""
    late = StallError(
        f"expected {path} to be read within {WAIT:g} s, got only a part or nothing; see why its disk does not answer, "
        f"or copy it to another one and import it from there"
    )
    # the words of the watch name an option that only runs have
    with watch.on(WAIT, lambda _: leave(late, lambda: tell(f"Error: {late}"))), watch.awaiting(lambda: str(path)):
        yield


def check_finite(weights: Arrays, path: Path) -> None:
    """Raises CheckpointError for numbers that are not finite."""
    for name, array in weights.items():
        if not np.isfinite(array).all():
            raise CheckpointError(
                f"{path}: expected finite numbers, got {np.count_nonzero(~np.isfinite(array)):,} others among the "
                f"{array.size:,} of {name}; it is damaged, or its training failed"
            )
