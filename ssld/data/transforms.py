"""Views: how an image becomes a network's input, by PaddleClas's operators and their argument names.

A view is parameters, not pixels. It is drawn once, in source coordinates and independent of the resolution, and then
rendered at any size, so that teacher and student see the same crop and flip, each at its own resolution.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from typing import Any, Self

import numpy as np
from PIL import Image
from pydantic import ValidationError

from ssld.data.augment import AutoAugment, ColorJitter, RandAugment, TimmAutoAugment
from ssld.data.erasing import Cutout, Erasing, GridMask, HideAndSeek, RandomErasing
from ssld.data.operators import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    LARGEST_SIDE,
    Crop,
    CropImage,
    NormalizeImage,
    Operator,
    RandCropImage,
    RandFlipImage,
    ResizeImage,
    Triple,
)
from ssld.errors import DataError
from ssld.seeds import generator
from ssld.wording import cut, dotted, faults, near

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "REVISION",
    "Operator",
    "Pipeline",
    "Triple",
    "View",
    "center",
    "normalize",
    "read_operators",
    "view",
]

REVISION = 1
"""Goes up whenever the same operators, of the same seed, would draw or render something else."""

View = tuple[tuple[int, ...], ...]
"""What each pixel operator drew: () where it draws nothing. Source pixels or shares, independent of the resolution."""

_PROBE = (500, 375)
"""Width and height of an ordinary photograph; it is no square, because a square hides a missing crop."""

OPERATORS: Mapping[str, type[Operator]] = {
    operator.__name__: operator
    for operator in (
        *(ResizeImage, CropImage, RandCropImage, RandFlipImage, NormalizeImage),
        *(AutoAugment, RandAugment, TimmAutoAugment, ColorJitter),
        *(RandomErasing, Cutout, HideAndSeek, GridMask),
    )
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
    if name == "DecodeImage":
        raise ValueError("expected operators on a decoded image, got DecodeImage; leave it out: all are decoded to RGB")
    if name not in OPERATORS:
        raise ValueError(f"expected an operator, got {cut(name)}; {near(name, OPERATORS)}")
    kind = OPERATORS[name]
    try:
        return kind.model_validate(arguments or {})
    except ValidationError as error:
        found = faults(error, kind.model_json_schema())
        raise ValueError("; ".join(f"{dotted((name, *path))}: {text}" for path, text in found)) from error


def _check_order(operators: tuple[Operator, ...]) -> None:
    names = ", ".join(type(operator).__name__ for operator in operators)
    normalized = [place for place, operator in enumerate(operators) if isinstance(operator, NormalizeImage)]
    if normalized and not all(isinstance(operator, Erasing) for operator in operators[normalized[0] + 1 :]):
        raise ValueError(f"expected NormalizeImage once and last, but for operators that erase, got {names}")
    shaping = [place for place, operator in enumerate(operators) if isinstance(operator, ResizeImage | Crop)]
    if any(isinstance(operators[place], RandCropImage) for place in shaping[1:]):
        # Its part would be drawn in pixels of the resized image, and change with the resolution.
        raise ValueError(f"expected one RandCropImage, before what else resizes or crops, got {names}")
    erasing = [place for place, operator in enumerate(operators) if isinstance(operator, Erasing)]
    if erasing and shaping and erasing[0] < shaping[-1]:
        # The lengths are shares of the view, of which the crop would take a part.
        raise ValueError(f"expected operators that erase behind what resizes or crops, got {names}")


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
        found = (operator for operator in self.operators if isinstance(operator, NormalizeImage))
        return next(found, NormalizeImage())

    @cached_property
    def steps(self) -> tuple[Operator, ...]:
        """The operators that make pixels, with every size and colour filled in: equal steps render equal pixels."""
        return tuple(
            operator.at(self.base, self.resolution).before(self.mean, self.std)
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
