"""Augmentations that hide a part of the finished view, by PaddleClas's names and arguments.

What is hidden shows the colour that NormalizeImage makes 0, which is what PaddleClas's recipes do by erasing behind
NormalizeImage. Places and lengths are drawn as shares of the view, so teacher and student miss the same part of it.
"""

from __future__ import annotations

from math import ceil, exp, log, pi, sqrt
from typing import Annotated, Literal, Self

import numpy as np
from PIL import Image
from pydantic import BeforeValidator, Field, model_validator

from ssld.data.operators import LARGEST_SIDE, UNIT, Chance, Colour, Operator, Share, Side, Triple, quotient
from ssld.seeds import generator
from ssld.wording import got

WRITTEN_FOR = 224
"""The resolution at which PaddleClas's default lengths make sense."""
GRAINS = 224
"""Grains of noise across a view: at 224 px every pixel has one of its own."""


def _greys(shares: Triple) -> Colour:
    red, green, blue = (round(min(max(255 * share, 0), 255)) for share in shares)
    return red, green, blue


class Erasing(Operator):
    """What hides a part of the view.

    fill_value: (R, G, B) of what is hidden, from 0 to 255; by default what NormalizeImage makes 0.
    """

    fill_value: Colour | None = None

    def before(self, mean: Triple, std: Triple) -> Self:
        return self if self.fill_value else self.model_copy(update={"fill_value": _greys(mean)})

    @property
    def _colour(self) -> Colour:
        assert self.fill_value is not None, "colours are filled in by before()"
        return self.fill_value


def _edges(start: float, end: float, side: int) -> tuple[int, int]:
    """First pixel and the one behind the last, of what lies between two shares of a side."""
    return min(max(round(start * side), 0), side), min(max(round(end * side), 0), side)


def _box(left: float, top: float, width: float, height: float, image: Image.Image) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) in pixels, from shares."""
    first_column, last_column = _edges(left, left + width, image.width)
    first_row, last_row = _edges(top, top + height, image.height)
    return first_column, first_row, last_column, last_row


class RandomErasing(Erasing):
    """One rectangle (Zhong et al., arXiv 1708.04896), as PaddleClas has it.

    EPSILON: how likely it is; sl, sh: least and largest share of the area; r1: least height over width, the largest is
    1 / r1; use_log_aspect: draw their logarithm evenly; attempt: rectangles that are tried until one fits.
    mode: const for one colour, rand for one that is drawn, pixel for noise; mean: of what is hidden, for const, and of
    the noise, whose standard deviation is 1, after NormalizeImage.
    fill_value, spread: the same in grey levels, filled in where they are left out.
    """

    EPSILON: Annotated[Chance, BeforeValidator(quotient)] = 0.5
    sl: Annotated[Share, BeforeValidator(quotient)] = 0.02
    sh: Annotated[Share, BeforeValidator(quotient)] = 0.4
    r1: Annotated[float, Field(ge=0.01, le=1), BeforeValidator(quotient)] = 0.3
    mean: Triple = (0.0, 0.0, 0.0)
    attempt: Annotated[int, Field(ge=1, le=1000)] = 100
    use_log_aspect: bool = False
    mode: Literal["const", "rand", "pixel"] = "const"
    spread: Colour | None = None

    @model_validator(mode="after")
    def _ascends(self) -> Self:
        if self.sl > self.sh:
            raise ValueError(f"expected sl ≤ sh, got {self.sl} and {self.sh}")
        return self

    def before(self, mean: Triple, std: Triple) -> Self:
        red, green, blue = (zero + unit * wanted for zero, unit, wanted in zip(mean, std, self.mean, strict=True))
        return self.model_copy(
            update={
                "fill_value": self.fill_value or _greys((red, green, blue)),
                "spread": self.spread or _greys(std),
            }
        )

    def draw(self, width: int, height: int, rng: np.random.Generator) -> tuple[int, ...]:
        """(left, top, width, height) in parts of UNIT, and the seed of the noise; () where nothing is hidden."""
        if rng.random() >= self.EPSILON:
            return ()
        for _ in range(self.attempt):
            area, aspect = rng.uniform(self.sl, self.sh), self._aspect(rng)
            high, wide = sqrt(area * aspect), sqrt(area / aspect)
            if high < 1 and wide < 1:
                shares = rng.uniform(0, 1 - wide), rng.uniform(0, 1 - high), wide, high
                return *(round(UNIT * share) for share in shares), int(rng.integers(2**63))
        return ()

    def _aspect(self, rng: np.random.Generator) -> float:
        if self.use_log_aspect:
            return exp(rng.uniform(log(self.r1), -log(self.r1)))
        return rng.uniform(self.r1, 1 / self.r1)

    def apply(self, image: Image.Image, drawn: tuple[int, ...]) -> Image.Image:
        if not drawn:
            return image
        *parts, seed = drawn
        left, top, width, height = (part / UNIT for part in parts)
        box = _box(left, top, width, height, image)
        hidden = image.copy()
        if self.mode == "const":
            hidden.paste(self._colour, box)
        elif box[0] < box[2] and box[1] < box[3]:
            grains = (ceil(height * GRAINS), ceil(width * GRAINS)) if self.mode == "pixel" else (1, 1)
            noise = Image.fromarray(self._noise(grains, seed))
            hidden.paste(noise.resize((box[2] - box[0], box[3] - box[1]), Image.Resampling.NEAREST), box)
        return hidden

    def _noise(self, grains: tuple[int, int], seed: int) -> np.ndarray:
        """uint8 [rows, columns, 3]."""
        normal = generator("erasing", seed).standard_normal((*grains, 3), np.float32)
        return np.clip(np.rint(np.array(self._colour) + np.array(self.spread) * normal), 0, 255).astype(np.uint8)


class Measured(Erasing):
    """What has lengths in pixels.

    base: the resolution for which they are written; the recipe's where it is left out.
    """

    base: Side | None = None

    def at(self, base: int, resolution: int) -> Self:
        base = self.base or base
        return self.model_copy(update={"base": base, **self._lengths(base / WRITTEN_FOR)})

    def _lengths(self, scale: float) -> dict[str, object]:
        """What is left out of them, from what suits 224 px."""
        raise NotImplementedError

    @property
    def _side(self) -> int:
        assert self.base is not None, "lengths are filled in by at()"
        return self.base


class Cutout(Measured):
    """Squares around any point of the view (DeVries and Taylor, arXiv 1708.04552): at the border a part of one is left.

    n_holes: how many; length: of their side, by default half of the view's.
    """

    n_holes: Annotated[int, Field(ge=1, le=100)] = 1
    length: Side | None = None

    def _lengths(self, scale: float) -> dict[str, object]:
        return {"length": self.length or max(1, round(112 * scale))}

    def draw(self, width: int, height: int, rng: np.random.Generator) -> tuple[int, ...]:
        """The center of each hole, (column, row), in parts of UNIT."""
        return tuple(rng.integers(UNIT, size=2 * self.n_holes).tolist())

    def apply(self, image: Image.Image, drawn: tuple[int, ...]) -> Image.Image:
        assert self.length is not None, "lengths are filled in by at()"
        length, hidden = self.length / self._side, image.copy()
        for column, row in zip(drawn[::2], drawn[1::2], strict=True):
            left, top = column / UNIT - length / 2, row / UNIT - length / 2
            hidden.paste(self._colour, _box(left, top, length, length, image))
        return hidden


_Grids = Annotated[tuple[Annotated[int, Field(ge=0, le=LARGEST_SIDE)], ...], Field(min_length=1)]


class HideAndSeek(Measured):
    """A grid of squares, each hidden with probability `hide_prob` (Singh and Lee, arXiv 1704.04232).

    grid_sizes: sides of the squares, of which a view gets any; 0 hides nothing. By default 0, 16, 32, 44 and 56 at 224.
    """

    grid_sizes: _Grids | None = None
    hide_prob: Chance = 0.5

    def _lengths(self, scale: float) -> dict[str, object]:
        usual = tuple(max(1, round(size * scale)) if size else 0 for size in (0, 16, 32, 44, 56))
        return {"grid_sizes": usual if self.grid_sizes is None else self.grid_sizes}

    def draw(self, width: int, height: int, rng: np.random.Generator) -> tuple[int, ...]:
        """The side that was drawn, in pixels at `base`, and the numbers of the hidden squares, row by row."""
        assert self.grid_sizes is not None, "lengths are filled in by at()"
        size = self.grid_sizes[rng.integers(len(self.grid_sizes))]
        if size == 0:
            return (0,)
        hidden = rng.random(ceil(self._side / size) ** 2) < self.hide_prob
        return size, *np.flatnonzero(hidden).tolist()

    def apply(self, image: Image.Image, drawn: tuple[int, ...]) -> Image.Image:
        size, *squares = drawn
        if size == 0:
            return image
        across, share, hidden = ceil(self._side / size), size / self._side, image.copy()
        for square in squares:
            row, column = divmod(square, across)
            hidden.paste(self._colour, _box(column * share, row * share, share, share, image))
        return hidden


class GridMask(Measured):
    """A grid whose bars, or whose squares, are hidden (Chen et al., arXiv 2001.04086).

    d1, d2: least and largest period, by default 96 and 224 at 224; ratio: width of a bar, of the period; rotate: the
    grid is turned by a whole number of degrees below it; mode: 0 hides the bars in both directions, so that squares are
    left, 1 hides those squares, as in the paper; prob: how likely it is, from the first epoch on.
    """

    d1: Side | None = None
    d2: Side | None = None
    rotate: Annotated[int, Field(ge=1, le=360)] = 1
    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.5
    mode: Literal[0, 1] = 0
    prob: Chance = 1.0

    @model_validator(mode="after")
    def _both(self) -> Self:
        if (self.d1 is None) != (self.d2 is None) or (self.d1 or 0) > (self.d2 or 0):
            raise ValueError(
                f"expected both d1 and d2, the smaller first, or neither, got {got(self.d1)} and {got(self.d2)}"
            )
        return self

    def _lengths(self, scale: float) -> dict[str, object]:
        return {"d1": self.d1 or max(1, round(96 * scale)), "d2": self.d2 or max(1, round(224 * scale))}

    def draw(self, width: int, height: int, rng: np.random.Generator) -> tuple[int, ...]:
        """(period, column, row, degrees): where a bar begins, in parts of UNIT like the period; () for no grid."""
        assert self.d1 is not None, "lengths are filled in by at()"
        assert self.d2 is not None, "lengths are filled in by at()"
        if rng.random() >= self.prob:
            return ()
        period = max(1, round(UNIT * rng.uniform(self.d1, self.d2) / self._side))
        column, row = rng.integers(period, size=2).tolist()
        return period, column, row, int(rng.integers(self.rotate))

    def apply(self, image: Image.Image, drawn: tuple[int, ...]) -> Image.Image:
        if not drawn:
            return image
        period, column, row, degrees = drawn
        across, down = _turned(image.width, image.height, degrees * pi / 180)
        bars = self._in_bar(across, column, period) | self._in_bar(down, row, period)
        hidden = image.copy()
        mask = bars if self.mode == 0 else ~bars
        hidden.paste(self._colour, mask=Image.fromarray(np.uint8(255) * mask))
        return hidden

    def _in_bar(self, at: np.ndarray, start: int, period: int) -> np.ndarray:
        return (UNIT * at - start) % period < self.ratio * period


def _turned(width: int, height: int, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """How far right of the center and below it each pixel is, as shares, in axes turned by an angle.

    Together they have the shape [height, width].
    """
    column, row = (np.arange(width) + 0.5)[None, :] / width - 0.5, (np.arange(height) + 0.5)[:, None] / height - 0.5
    if not angle:
        return column, row
    return column * np.cos(angle) - row * np.sin(angle), column * np.sin(angle) + row * np.cos(angle)
