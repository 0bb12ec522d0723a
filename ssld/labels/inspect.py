"""Looks at label files without knowing what they belong to: what they are, whether they are whole; removes them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssld.errors import BusyError, LabelError
from ssld.files import disk, reported
from ssld.labels.format import decode
from ssld.labels.store import DESCRIPTION, FORMAT, SUFFIX
from ssld.lock import holder

SHOWN = {"transform": dict, "views": int, "top_k": int, "temperature": int | float}
"""What `ssld labels info` tells of a description, and what each is."""


@dataclass(frozen=True)
class Kept:
    """One directory of label files. about: its labels.json; files: the label files, sorted."""

    directory: Path
    about: Mapping[str, Any]
    files: tuple[Path, ...]

    @property
    def bytes(self) -> int:
        """Of everything in the directory."""
        return sum(path.stat().st_size for path in self.directory.iterdir())

    def headers(self) -> Iterator[tuple[Path, Mapping[str, Any] | None, LabelError | None]]:
        """Each file with its header, or with what is wrong with it; every byte is read."""
        for path in self.files:
            try:
                header, _ = decode(path.read_bytes(), path)
                yield path, header, self._stranger(path, header)
            except OSError as error:
                yield path, None, LabelError(f"{path}: expected a label file, got: {error.strerror}; remove it")
            except LabelError as error:
                yield path, None, error

    def _stranger(self, path: Path, header: Mapping[str, Any]) -> LabelError | None:
        differing = [key for key, value in self.about.items() if key != "names" and header.get(key) != value]
        if not differing:
            return None
        return LabelError(
            f"{path}: expected the {', '.join(differing)} of {self.directory / DESCRIPTION}, got other ones; the file "
            f"belongs elsewhere: remove it"
        )


def kept_in(place: Path) -> list[Kept]:
    """The label directories at a place: one of them, a store that holds some, or a run with a store of its own.

    Raises LabelError where there is none.
    """
    found = [path.parent for pattern in ("", "*/", "*/*/") for path in place.glob(f"{pattern}{DESCRIPTION}")]
    if not found:
        raise LabelError(f"{place}: expected soft labels, a store of them or a run that keeps some, got none")
    return [_open(directory) for directory in sorted(found)]


def remove(kept: Kept) -> None:
    """Take a label directory away, and nothing else that lies in it. Raises BusyError where a run is at work on it."""
    for run in kept.directory.resolve().parents:
        if working := holder(run):
            raise BusyError(
                f"cannot remove {kept.directory}: {run} is in use by {working}; wait for it, or stop it first"
            )
    with reported(kept.directory, 0):
        for path in (*kept.files, kept.directory / DESCRIPTION):
            disk.remove(path)
        if not any(kept.directory.iterdir()):
            disk.remove(kept.directory)


def _open(directory: Path) -> Kept:
    try:
        about = json.loads((directory / DESCRIPTION).read_text("utf-8"))
        if not isinstance(about, dict):
            raise ValueError(f"no JSON object: {about!r}")
        if about.get("format") != FORMAT:
            raise ValueError(f"format {about.get('format')}, where this version reads {FORMAT}")
        if strange := [name for name, kind in SHOWN.items() if not isinstance(about.get(name), kind)]:
            raise ValueError(f"{strange[0]} {about.get(strange[0])!r}")
        if not about["transform"].keys() >= {"size", "steps"}:
            raise ValueError(f"a transform of {', '.join(about['transform']) or 'nothing'}")
    except (OSError, ValueError, RecursionError) as error:
        raise LabelError(f"{directory / DESCRIPTION}: expected the description of the labels, got: {error}") from error
    return Kept(directory, about, tuple(sorted(directory.glob(f"*{SUFFIX}"))))
