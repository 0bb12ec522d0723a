"""Data sets that need no download: scikit-learn's digits, and shapes drawn on demand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import parse_qsl

import numpy as np

from ssld.data.samples import Samples, digest, spread, virtual_shards
from ssld.errors import DataError, RecipeError
from ssld.seeds import generator
from ssld.wording import got, near

DIGITS_PARTS: Mapping[str, slice] = {"labeled": slice(0, 400), "validation": slice(400, 797), "pool": slice(797, None)}
"""Where each part lies in the fixed order of the 1,797 images, which goes round the classes."""


def open_builtin(spec: str, *, labeled: bool) -> Samples:
    """A built-in source: digits?part=labeled|pool|validation or shapes?count=1000&size=64&classes=8&seed=0.

    Raises RecipeError for a name, an option or a value that is not known; DataError where scikit-learn is missing.
    """
    name, _, query = spec.partition("?")
    if name not in SOURCES:
        raise RecipeError(f"builtin:{spec}: expected a built-in source, got {got(name)}; {near(name, SOURCES)}")
    opener, known = SOURCES[name]
    try:
        options = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError as error:
        raise RecipeError(f"builtin:{spec}: expected options as key=value&key=value, got {got(query)}") from error
    for key, _value in options:
        if key not in known:
            raise RecipeError(f"builtin:{spec}: expected an option of {name}, got {got(key)}; {near(key, known)}")
    return opener(f"builtin:{spec}", dict(options), labeled)


# Digits --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Digits:
    """A store of uint8 [N, 8, 8]."""

    name: str
    images: np.ndarray

    def key(self, row: int) -> str:
        return f"digits/{row:04d}"

    def where(self, row: int) -> str:
        return f"{self.name}: image {row}"

    def read(self, row: int) -> np.ndarray:
        return np.repeat(self.images[row, :, :, None], 3, axis=2)

    def stamp(self, rows: np.ndarray) -> str:
        return digest("digits", rows, self.images[rows])


def _open_digits(name: str, options: Mapping[str, str], labeled: bool) -> Samples:
    part = options.get("part", "")
    if part not in DIGITS_PARTS:
        raise RecipeError(f"{name}: expected a part, as in part=pool, got {got(part)}; {near(part, DIGITS_PARTS)}")
    images, targets = _load_digits()
    rows = spread(targets, "digits")[DIGITS_PARTS[part]]
    labels = targets[rows] if labeled else None
    classes = tuple("0123456789") if labeled else None
    return Samples(
        name=name,
        classes=classes,
        identity=digest("digits", images[rows], labels),
        shard_sizes=virtual_shards(len(rows)),
        labels=labels,
        store=_Digits(name, images),
        rows=rows,
    )


@cache
def _load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [1797, 8, 8] and labels int64 [1797]; scikit-learn's values are 0 to 16.

    To import scikit-learn takes as long as to import paddle, so the file is read that its load_digits reads.
    """
    found = find_spec("sklearn")
    file = Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz" if found and found.origin else None
    if file is None or not file.is_file():
        raise DataError(
            f"builtin:digits: expected scikit-learn, which holds the images, got "
            f'{"none" if file is None else f"one without {file.name}"}; run pip install "ssld[demo]"'
        )
    table = np.loadtxt(file, np.uint8, delimiter=",")
    return np.rint(table[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8), table[:, -1].astype(np.int64)


# Shapes --------------------------------------------------------------------------------------------------------------


def _polygon(u: np.ndarray, v: np.ndarray, sides: int, apothem: float) -> np.ndarray:
    angles = 2 * np.pi * np.arange(sides) / sides
    return apothem - np.max([u * np.cos(angle) + v * np.sin(angle) for angle in angles], axis=0)


def _disc(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return 1 - np.hypot(u, v)


def _bar(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.minimum(0.3 - abs(u), 1 - abs(v))


SHAPES: Mapping[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": _disc,
    "square": lambda u, v: _polygon(u, v, 4, 0.75),
    "triangle": lambda u, v: _polygon(u, v, 3, 0.5),
    "cross": lambda u, v: np.maximum(_bar(u, v), _bar(v, u)),
    "ring": lambda u, v: 0.2 - abs(np.hypot(u, v) - 0.8),
    "star": lambda u, v: np.maximum(_polygon(u, v, 3, 0.5), _polygon(-u, v, 3, 0.5)),
    "fine stripes": _disc,
    "coarse stripes": _disc,
    "pentagon": lambda u, v: _polygon(u, v, 5, 0.8),
    "crescent": lambda u, v: np.minimum(_disc(u, v), np.hypot(u - 0.5, v) - 0.75),
    "half disc": lambda u, v: np.minimum(_disc(u, v), u),
    "bar": _bar,
}
"""How far inside the shape a point is, in units of its radius; u, v: coordinates from its middle, in the same units."""
STRIPES: Mapping[str, float] = {"fine stripes": 3 / 64, "coarse stripes": 6 / 64}
"""Periods in image sides. At half of 64 pixels the fine ones are 1.5 pixels wide and melt into one colour."""


@dataclass(frozen=True)
class _Shapes:
    """A store that draws its images: size in pixels, and how many classes take turns."""

    name: str
    size: int
    classes: int
    seed: int

    def key(self, row: int) -> str:
        return f"shapes-{self.seed}/{row:07d}"

    def where(self, row: int) -> str:
        return f"{self.name}: image {row}"

    def read(self, row: int) -> np.ndarray:
        return draw_shape(tuple(SHAPES)[row % self.classes], self.size, generator("shapes", self.seed, row))

    def stamp(self, rows: np.ndarray) -> str:
        return digest("shapes", self.size, self.classes, self.seed, rows)


def draw_shape(shape: str, size: int, draws: np.random.Generator) -> np.ndarray:
    """uint8 [size, size, 3]: one shape, at a random place, angle, size and colour, on a noisy sloping background."""
    radius = draws.uniform(0.22, 0.4) * size
    middle = draws.uniform(radius, size - radius, 2)
    angle = draws.uniform(0, 2 * np.pi)
    y, x = np.mgrid[:size, :size] + 0.5
    u = ((x - middle[0]) * np.cos(angle) + (y - middle[1]) * np.sin(angle)) / radius
    v = ((y - middle[1]) * np.cos(angle) - (x - middle[0]) * np.sin(angle)) / radius
    cover = np.clip(SHAPES[shape](u, v) * radius + 0.5, 0, 1)
    if shape in STRIPES:
        cover = cover * (0.5 + 0.5 * np.sin(2 * np.pi * u * radius / (STRIPES[shape] * size)))
    background = draws.uniform(0, 255, 3)
    colour = (background + 128 + draws.uniform(-48, 48, 3)) % 256  # at least 80 away in each channel
    slope = (x * draws.uniform(-30, 30) + y * draws.uniform(-30, 30)) / size
    ground = background + slope[..., None] + draws.normal(0, 6, (size, size, 3))
    return np.clip(ground + cover[..., None] * (colour - background), 0, 255).astype(np.uint8)


_SHAPE_OPTIONS: Mapping[str, tuple[int, int, int]] = {
    "count": (1000, 1, 10**9),
    "size": (64, 8, 1024),
    "classes": (8, 2, len(SHAPES)),
    "seed": (0, 0, 2**31),
}
"""Default, smallest and largest value."""


def _open_shapes(name: str, options: Mapping[str, str], labeled: bool) -> Samples:
    count, size, classes, seed = (_whole(name, key, options) for key in _SHAPE_OPTIONS)
    return Samples(
        name=name,
        classes=tuple(SHAPES)[:classes] if labeled else None,
        identity=digest("shapes", count, size, classes, seed, labeled),
        shard_sizes=virtual_shards(count),
        labels=np.arange(count) % classes if labeled else None,
        store=_Shapes(name, size, classes, seed),
        rows=np.arange(count),
    )


def _whole(name: str, key: str, options: Mapping[str, str]) -> int:
    default, low, high = _SHAPE_OPTIONS[key]
    value = options.get(key, str(default))
    # Python reads no number of thousands of digits
    if not (value.isascii() and value.isdigit() and len(value) < 20 and low <= int(value) <= high):
        raise RecipeError(f"{name}: expected {key} as a whole number in [{low}, {high}], got {got(value)}")
    return int(value)


SOURCES: Mapping[str, tuple[Callable[[str, Mapping[str, str], bool], Samples], tuple[str, ...]]] = {
    "digits": (_open_digits, ("part",)),
    "shapes": (_open_shapes, tuple(_SHAPE_OPTIONS)),
}
"""How each built-in source is opened, and the options that it knows."""
