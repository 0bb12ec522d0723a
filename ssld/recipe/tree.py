"""A recipe's plain values together with the place of each key, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ssld.errors import RecipeError
from ssld.wording import KeyPath, dotted


class Place(NamedTuple):
    """Where a key stands: `recipe.yaml:6:5`, or the words of the command line that set it."""

    file: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file


class Fault(NamedTuple):
    """What is wrong with one key."""

    place: Place
    path: KeyPath
    message: str

    def __str__(self) -> str:
        return f"{self.place}: {dotted(self.path)}: {self.message}" if self.path else f"{self.place}: {self.message}"


def refuse(faults: Iterable[Fault], file: str) -> None:
    """Raise one RecipeError that lists the faults by place; return where there are none."""
    lines = [str(fault) for fault in sorted(set(faults), key=lambda fault: (fault.place, str(fault)))]
    if lines:
        header = [f"{file}: {len(lines)} faults"] if len(lines) > 1 else []
        raise RecipeError("\n".join(header + lines))


@dataclass(frozen=True)
class Tree:
    """A recipe's plain values, the place of each key, and what was wrong with the text so far."""

    value: Any
    places: Mapping[KeyPath, Place]
    faults: tuple[Fault, ...] = ()

    def place(self, path: KeyPath) -> Place:
        """The place of a key, or of the nearest key above it that is written anywhere."""
        return next(self.places[path[:end]] for end in range(len(path), -1, -1) if path[:end] in self.places)

    def with_fault(self, path: KeyPath, message: str) -> Tree:
        """The same tree with one more fault."""
        return replace(self, faults=(*self.faults, Fault(self.place(path), path, message)))


def merge(base: Tree, child: Tree) -> Tree:
    """The base with the child's keys over it: mappings are merged, all other values replaced."""
    places = {**base.places, **child.places}
    return Tree(_merged(base.value, child.value), places, (*base.faults, *child.faults))


def _merged(base: Any, child: Any) -> Any:
    if not (isinstance(base, dict) and isinstance(child, dict)):
        return child
    return {**base, **{key: _merged(base.get(key), value) for key, value in child.items()}}
