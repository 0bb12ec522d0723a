"""Operators: the single steps by which an image becomes a view, by PaddleClas's names and arguments.

An operator draws whole numbers, whatever the resolution, and applies them to an image of any size. Resizing is that of
Pillow, which widens the filter when it shrinks; OpenCV, the default of PaddleClas, does not.
"""

from __future__ import annotations

from math import sqrt
from typing import Annotated, Literal, Self

import numpy as np
from PIL import Image
from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from ssld.settings import Frozen
from ssld.wording import cut

Triple = tuple[float, float, float]
IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "area": Image.Resampling.BOX,
    "lanczos": Image.Resampling.LANCZOS,
}
_FLIPS = {
    1: Image.Transpose.FLIP_LEFT_RIGHT,
    0: Image.Transpose.FLIP_TOP_BOTTOM,
    -1: Image.Transpose.ROTATE_180,
}

LARGEST_SIDE = 8192
"""In pixels: a square of it takes 200 MB, more than any network is shown."""


def _is_side(value: object) -> bool:
    return type(value) is int and 1 <= value <= LARGEST_SIDE


def _pair(value: object) -> object:
    pair = (value, value) if isinstance(value, int) else value
    if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(map(_is_side, pair)):
        raise ValueError(
            f"expected a side in pixels or [width, height], whole numbers ≥ 1 and ≤ {LARGEST_SIDE}, got {cut(value)}"
        )
    return pair


def quotient(value: object) -> object:
    """PaddleClas writes the scale as the text "1.0/255.0"."""
    if not isinstance(value, str):
        return value
    top, _, bottom = value.partition("/")
    try:
        return float(top) / float(bottom or 1)
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f'expected a number or a quotient such as "1.0/255.0", got {cut(value)}') from error


def ascending(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] > value[1]:
        raise ValueError(f"expected the smaller number first, got {value[0]}, {value[1]}")
    return value


Side = Annotated[int, Field(ge=1, le=LARGEST_SIDE, strict=True)]
Size = Annotated[tuple[int, int], BeforeValidator(_pair)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Chance = Annotated[float, Field(ge=0, le=1)]
Interpolation = Literal["nearest", "bilinear", "bicubic", "area", "lanczos"]
_Grey = Annotated[int, Field(ge=0, le=255)]
Colour = tuple[_Grey, _Grey, _Grey]
"""(R, G, B)."""

UNIT = 1 << 16
"""A share of something is drawn as a whole number of so many parts of it."""


def _scaled(size: tuple[int, int], base: int, resolution: int) -> tuple[int, int]:
    return max(1, round(size[0] * resolution / base)), max(1, round(size[1] * resolution / base))


class Operator(Frozen):
    """One step of a pipeline. Sizes are (width, height) in pixels; a single number means a square."""

    @property
    def target(self) -> tuple[int, int] | None:
        """Least width and height of what it makes, once sizes are filled in; None where it leaves the size alone."""
        return None

    def at(self, base: int, resolution: int) -> Self:
        """The same operator with every size filled in for `resolution`; explicit ones were written for `base`."""
        return self

    def before(self, mean: Triple, std: Triple) -> Self:
        """The same operator with the colours filled in that depend on the normalization, of pixels in [0, 1]."""
        return self

    def draw(self, width: int, height: int, rng: np.random.Generator) -> tuple[int, ...]:
        """What is random about it, for a source of this size."""
        return ()

    @property
    def draws(self) -> bool:
        """Whether anything is random about it."""
        return type(self).draw is not Operator.draw

    def apply(self, image: Image.Image, drawn: tuple[int, ...]) -> Image.Image:
        """The image after this step."""
        return image


class ResizeImage(Operator):
    """Resize to `size`, or so that the shorter side is `resize_short`; by default round(resolution * 256 / 224)."""

    size: Size | None = None
    resize_short: Side | None = None
    interpolation: Interpolation = "bilinear"

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.size is not None and self.resize_short is not None:
            raise ValueError("expected size or resize_short, got both")
        return self

    def at(self, base: int, resolution: int) -> Self:
        if self.size is not None:
            return self.model_copy(update={"size": _scaled(self.size, base, resolution)})
        short, per = (256, 224) if self.resize_short is None else (self.resize_short, base)
        return self.model_copy(update={"resize_short": max(1, round(short * resolution / per))})

    @property
    def target(self) -> tuple[int, int] | None:
        return self.size if self.resize_short is None else (self.resize_short, self.resize_short)

    def apply(self, image: Image.Image, drawn: tuple[int, ...]) -> Image.Image:
        return image.resize(self.size or self._short(image), FILTERS[self.interpolation])

    def _short(self, image: Image.Image) -> tuple[int, int]:
        assert self.resize_short is not None, "sizes are filled in by at()"
        short = min(image.size)
        return round(image.width * self.resize_short / short), round(image.height * self.resize_short / short)


class Crop(Operator):
    """What both crops have in common: they end at `size`, the resolution by default."""

    size: Size | None = None

    def at(self, base: int, resolution: int) -> Self:
        size = (resolution, resolution) if self.size is None else _scaled(self.size, base, resolution)
        return self.model_copy(update={"size": size})

    @property
    def target(self) -> tuple[int, int] | None:
        return self.size


class CropImage(Crop):
    """The center `size` of the image, the resolution by default.

    An image that is smaller than that is first enlarged, keeping its shape, until the crop just fits; PaddleClas
    would return the small image.
    """

    def apply(self, image: Image.Image, drawn: tuple[int, ...]) -> Image.Image:
        assert self.size is not None, "sizes are filled in by at()"
        width, height = self.size
        enlarge = max(width / image.width, height / image.height)
        if enlarge > 1:
            fitting = max(width, round(image.width * enlarge)), max(height, round(image.height * enlarge))
            image = image.resize(fitting, Image.Resampling.BILINEAR)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return image.crop((left, top, left + width, top + height))


class RandCropImage(Crop):
    """A random part of the image, resized to `size`, the resolution by default (ppcls/data/preprocess/ops).

    scale: the part's share of the area; ratio: its width over its height. Both are cut to what fits the image.
    """

    scale: Annotated[tuple[Share, Share], AfterValidator(ascending)] = (0.08, 1.0)
    ratio: Annotated[tuple[Positive, Positive], AfterValidator(ascending)] = (3 / 4, 4 / 3)
    interpolation: Interpolation = "bilinear"

    def draw(self, width: int, height: int, rng: np.random.Generator) -> tuple[int, ...]:
        """(left, top, width, height) of the part, in pixels of the source."""
        aspect = sqrt(rng.uniform(*self.ratio))
        bound = min(width / height / aspect**2, height / width * aspect**2)
        low, high = min(self.scale[0], bound), min(self.scale[1], bound)
        side = sqrt(width * height * rng.uniform(low, high))
        part_width = min(max(1, int(side * aspect)), width)
        part_height = min(max(1, int(side / aspect)), height)
        left = int(rng.integers(0, width - part_width, endpoint=True))
        top = int(rng.integers(0, height - part_height, endpoint=True))
        return left, top, part_width, part_height

    def apply(self, image: Image.Image, drawn: tuple[int, ...]) -> Image.Image:
        assert self.size is not None, "sizes are filled in by at()"
        left, top, width, height = drawn
        return image.resize(self.size, FILTERS[self.interpolation], box=(left, top, left + width, top + height))


class RandFlipImage(Operator):
    """A flip with probability 1/2: horizontal (1), vertical (0) or both at once (-1), as OpenCV numbers them."""

    flip_code: Literal[1, 0, -1] = 1

    def draw(self, width: int, height: int, rng: np.random.Generator) -> tuple[int, ...]:
        """(1,) to flip, (0,) to leave it."""
        return (int(rng.integers(2)),)

    def apply(self, image: Image.Image, drawn: tuple[int, ...]) -> Image.Image:
        return image.transpose(_FLIPS[self.flip_code]) if drawn[0] else image


class NormalizeImage(Operator):
    """(pixel * scale - mean) / std, pixel in [0, 255]. No pixel is touched here: it becomes Pipeline.mean and std."""

    scale: Annotated[Positive, BeforeValidator(quotient)] = 1 / 255
    mean: Triple = IMAGENET_MEAN
    std: tuple[Positive, Positive, Positive] = IMAGENET_STD

    @model_validator(mode="after")
    def _of_pixels(self) -> Self:
        brightest = 255 * self.scale
        if not all(0 <= value <= brightest for value in self.mean):
            raise ValueError(
                f"expected a mean of pixels, from 0 to {brightest:g} where scale is {self.scale:g}, got "
                f"{list(self.mean)}; for means of pixels up to 255 write scale: 1"
            )
        return self
