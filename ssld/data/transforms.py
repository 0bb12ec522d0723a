"""Views: how an image becomes a network's input, by PaddleClas's operators and their argument names.

A view is parameters, not pixels. It is drawn once, in source coordinates and independent of the resolution, and then
rendered at any size, so that teacher and student see the same crop and flip, each at its own resolution.
Resizing is Pillow's, which widens the filter when it shrinks; OpenCV, PaddleClas's default, does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from math import sqrt
from typing import Annotated, Any, Literal, Self

import numpy as np
from PIL import Image
from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from ssld.errors import DataError
from ssld.seeds import generator
from ssld.settings import Frozen
from ssld.wording import cut, dotted, faults, near

REVISION = 1
"""Goes up whenever the same operators, of the same seed, would draw or render something else."""

View = tuple[tuple[int, ...], ...]
"""What each pixel operator drew: () where it draws nothing. Source pixels, independent of the resolution."""

Triple = tuple[float, float, float]
IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)
_PROBE = (500, 375)
"""Width and height of an ordinary photograph; it is no square, because a square hides a missing crop."""

_FILTERS = {
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


def _quotient(value: object) -> object:
    """PaddleClas writes the scale as the text "1.0/255.0"."""
    if not isinstance(value, str):
        return value
    top, _, bottom = value.partition("/")
    try:
        return float(top) / float(bottom or 1)
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f'expected a number or a quotient such as "1.0/255.0", got {cut(value)}') from error


def _ascending(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] > value[1]:
        raise ValueError(f"expected the smaller number first, got {value[0]}, {value[1]}")
    return value


Side = Annotated[int, Field(ge=1, le=LARGEST_SIDE, strict=True)]
Size = Annotated[tuple[int, int], BeforeValidator(_pair)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Interpolation = Literal["nearest", "bilinear", "bicubic", "area", "lanczos"]


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

    def draw(self, width: int, height: int, rng: np.random.Generator) -> tuple[int, ...]:
        """What is random about it, for a source of this size."""
        return ()

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
        return image.resize(self.size or self._short(image), _FILTERS[self.interpolation])

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

    scale: Annotated[tuple[Share, Share], AfterValidator(_ascending)] = (0.08, 1.0)
    ratio: Annotated[tuple[Positive, Positive], AfterValidator(_ascending)] = (3 / 4, 4 / 3)
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
        return image.resize(self.size, _FILTERS[self.interpolation], box=(left, top, left + width, top + height))


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

    scale: Annotated[Positive, BeforeValidator(_quotient)] = 1 / 255
    mean: Triple = IMAGENET_MEAN
    std: tuple[Positive, Positive, Positive] = IMAGENET_STD


OPERATORS: Mapping[str, type[Operator]] = {
    operator.__name__: operator for operator in (ResizeImage, CropImage, RandCropImage, RandFlipImage, NormalizeImage)
}


MIXING = ("mixup", "cutmix", "fmix", "mixupcutmixhybrid")
"""PaddleClas's operators that mix two images, with or without "Operator" behind it."""


def read_operators(value: object) -> tuple[Operator, ...]:
    """The operators of a recipe: a list of `NAME` or `{NAME: {argument: value}}`.

    Raises ValueError, which pydantic reports with its place: an unknown operator or argument (with the nearest known
    one), a value out of range, or an order that has no meaning.
    """
    if not isinstance(value, list):
        raise ValueError(f"expected a list of operators, got {cut(value)}")
    operators = tuple(_operator(item) for item in value)
    _check_order(operators)
    return operators


def _operator(item: object) -> Operator:
    name, arguments = next(iter(item.items())) if isinstance(item, dict) and len(item) == 1 else (item, None)
    if not isinstance(name, str) or not isinstance(arguments, dict | None):
        raise ValueError(f"expected an operator as NAME or {{NAME: {{argument: value}}}}, got {cut(item)}")
    if name.lower().removesuffix("operator") in MIXING:
        raise ValueError(
            f"expected operators on one image, got {name}: a soft label that is kept belongs to one view of one image, "
            f"and SSLD mixes none; leave it out"
        )
    if name not in OPERATORS:
        raise ValueError(f"expected an operator, got {cut(name)}; {near(name, OPERATORS)}")
    kind = OPERATORS[name]
    try:
        return kind.model_validate(arguments or {})
    except ValidationError as error:
        found = faults(error, kind.model_json_schema())
        raise ValueError("; ".join(f"{dotted((name, *path))}: {text}" for path, text in found)) from error


def _check_order(operators: tuple[Operator, ...]) -> None:
    names = [type(operator).__name__ for operator in operators]
    if "NormalizeImage" in names[:-1]:
        raise ValueError(f"expected NormalizeImage once and last, got {', '.join(names)}")
    shaping = [name for name in names if name not in ("RandFlipImage", "NormalizeImage")]
    if "RandCropImage" in shaping[1:]:
        # Its part would be drawn in pixels of the resized image, and change with the resolution.
        raise ValueError(f"expected one RandCropImage, before what else resizes or crops, got {', '.join(names)}")


def _check_sides(steps: tuple[Operator, ...], base: int, resolution: int) -> None:
    """A size that is in range may be out of it at another resolution than the one it is written for."""
    for step in steps:
        if step.target is not None and max(step.target) > LARGEST_SIDE:
            raise ValueError(
                f"expected sides of at most {LARGEST_SIDE} px, got {max(step.target)} by {type(step).__name__}, whose "
                f"size is written for resolution {base}, at resolution {resolution}; lower it, or leave it out"
            )


def _check_growth(steps: tuple[Operator, ...], base: int) -> None:
    """Sizes of one resolution among sizes of another: only what an image lacks from the start may be made up."""
    sized = [(type(step).__name__, step.target) for step in steps if step.target is not None]
    for (small, (width, height)), (large, (wider, higher)) in combinations(sized, 2):
        if wider > width or higher > height:
            raise ValueError(
                f"expected no operator to enlarge what one before it made, got {small} to {min(width, height)} px "
                f"before {large} of {max(wider, higher)} px, which would blur every image; leave the sizes out, or "
                f"write them for resolution {base}"
            )


@dataclass(frozen=True)
class Pipeline:
    """What is done to an image before a network sees it.

    operators: as the recipe gives them; base: the resolution at which their explicit sizes are written;
    resolution: side in pixels of the square that is rendered.
    """

    operators: tuple[Operator, ...]
    base: int
    resolution: int

    @classmethod
    def read(cls, value: object, resolution: int) -> Self:
        """From a recipe's list of operators, written for this resolution. Raises ValueError as read_operators does."""
        return cls(read_operators(value), resolution, resolution)

    def at(self, resolution: int) -> Pipeline:
        """The same views at another resolution: explicit sizes scale with it and are rounded."""
        return replace(self, resolution=resolution)

    @property
    def mean(self) -> Triple:
        """Per channel (R, G, B), for pixels in [0, 1]."""
        red, green, blue = (value / (255 * self._normalize.scale) for value in self._normalize.mean)
        return red, green, blue

    @property
    def std(self) -> Triple:
        """Per channel (R, G, B), for pixels in [0, 1]."""
        red, green, blue = (value / (255 * self._normalize.scale) for value in self._normalize.std)
        return red, green, blue

    @property
    def _normalize(self) -> NormalizeImage:
        last = self.operators[-1] if self.operators else None
        return last if isinstance(last, NormalizeImage) else NormalizeImage()

    @cached_property
    def steps(self) -> tuple[Operator, ...]:
        """The operators that make pixels, with every size filled in: equal steps render equal pixels."""
        return tuple(
            operator.at(self.base, self.resolution)
            for operator in self.operators
            if not isinstance(operator, NormalizeImage)
        )

    def check(self) -> None:
        """Try the operators before anything is spent.

        Raises ValueError where they enlarge what they shrank, end at another size than the resolution, or make an
        image that no memory holds.
        """
        _check_sides(self.steps, self.base, self.resolution)
        _check_growth(self.at(self.base).steps, self.base)
        try:
            view(Image.new("RGB", _PROBE), self, 0)
        except DataError as error:
            raise ValueError(str(error)) from error

    def draw(self, width: int, height: int, seed: int) -> View:
        """The view of a source of this size (pixels): a pure function of the seed, the same at every resolution."""
        rng = generator("view", seed)
        return tuple(step.draw(width, height, rng) for step in self.steps)

    def render(self, image: Image.Image, view: View) -> np.ndarray:
        """The view's pixels, uint8 [resolution, resolution, 3]; read-only.

        image: the source, mode RGB. Raises DataError where the operators end at another size.
        """
        source = image.size
        for step, drawn in zip(self.steps, view, strict=True):
            image = step.apply(image, drawn)
        if image.size != (self.resolution, self.resolution):
            names = ", ".join(type(step).__name__ for step in self.steps) or "no operator"
            raise DataError(
                f"expected a view of {self.resolution} x {self.resolution} pixels, got {image.width} x {image.height} "
                f"from an image of {source[0]} x {source[1]} by {names}; end with a crop, and leave its size out"
            )
        return np.asarray(image)

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads back exactly; every argument is written, so that later defaults change nothing."""
        operators = [{type(operator).__name__: operator.model_dump(mode="json")} for operator in self.operators]
        return {"operators": operators, "base": self.base, "resolution": self.resolution}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Raises ValueError for what `to_json` did not write, KeyError where a part is missing."""
        return cls(read_operators(value["operators"]), value["base"], value["resolution"])


def view(image: Image.Image, pipeline: Pipeline, seed: int) -> np.ndarray:
    """Draw a view and render it: uint8 [resolution, resolution, 3]."""
    return pipeline.render(image, pipeline.draw(*image.size, seed))


def center(resolution: int, resize_short: int | None, mean: Triple | None, std: Triple | None) -> Pipeline:
    """The usual pipeline at test time: the shorter side to `resize_short`, then the center square.

    resize_short: pixels, None for round(resolution * 256 / 224). mean, std: for pixels in [0, 1]; None for a teacher
    that normalizes by itself.
    """
    resize: tuple[Operator, ...] = (ResizeImage(resize_short=resize_short), CropImage())
    if mean is None or std is None:
        return Pipeline(resize, resolution, resolution)
    return Pipeline((*resize, NormalizeImage(mean=mean, std=std)), resolution, resolution)


def normalize(images: np.ndarray, mean: Triple, std: Triple) -> np.ndarray:
    """(images / 255 - mean) / std: float32 [B, 3, H, W] from uint8 [B, H, W, 3], as one multiply and one subtract.

    Bits depend neither on the batch nor on the threads; 0.2 ms an image of 224 x 224 on one core.
    """
    batch, height, width, channels = images.shape
    result = np.empty((batch, channels, height, width), np.float32)
    for image, planes in zip(images, result, strict=True):
        for channel, plane in enumerate(planes):
            np.multiply(image[..., channel], np.float32(1 / (255 * std[channel])), out=plane)
            plane -= np.float32(mean[channel] / std[channel])
    return result
