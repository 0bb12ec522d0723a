"""Augmentations of colour and shape, by PaddleClas's names and arguments: which effects a view gets, and how strongly.

An effect is one of Pillow's and takes an amount: an angle, a share of the image, a factor, grey levels. A scale gives
the amount of a strength from -1 to 1; its sign is the direction, where an effect has two. No amount is in pixels, so a
view is the same at every resolution; only the sharpness is that of neighbouring pixels.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Annotated, Literal, TypeGuard

import numpy as np
from PIL import Image, ImageEnhance, ImageOps
from pydantic import AfterValidator, BeforeValidator, Field

from ssld.data.operators import FILTERS, IMAGENET_MEAN, UNIT, Chance, Colour, Operator, Side
from ssld.wording import cut

GREY: Colour = (128, 128, 128)
HIGHEST = 10
"""The magnitude at which an effect is as strong as it gets, in both papers and in timm."""

Scale = Callable[[float], float]
Palette = Mapping[str, Scale]
"""Effects by name, in the order by which draws number them, each with its scale."""


@dataclass(frozen=True)
class Canvas:
    """What is seen where the image has moved away, and how pixels are read that lie between others."""

    fill: Colour
    filter: Image.Resampling


Effect = Callable[[Image.Image, float, Canvas], Image.Image]


def _affine(image: Image.Image, canvas: Canvas, *matrix: float) -> Image.Image:
    transform = Image.Transform.AFFINE
    return image.transform(image.size, transform, matrix, resample=canvas.filter, fillcolor=canvas.fill)


def _solarize_add(image: Image.Image, amount: float, _: Canvas) -> Image.Image:
    """Brighten what is darker than the middle."""
    return image.point([min(255, grey + int(amount)) if grey < 128 else grey for grey in range(256)] * 3)


def _equalize(image: Image.Image, _amount: float, _: Canvas) -> Image.Image:
    """As Pillow does it, but by shares: its whole steps of so many pixels would whiten a quarter of a view of 32 px."""
    return image.point([grey for counts in np.split(np.array(image.histogram()), 3) for grey in _evened(counts)])


def _evened(counts: np.ndarray) -> list[int]:
    """What each grey level becomes: the share of the pixels that are darker, of those that are not the lightest."""
    below = np.cumsum(counts) - counts
    most = below[counts > 0].max()
    return np.rint(255 * np.minimum(below, most) / most).astype(int).tolist() if most else list(range(256))


EFFECTS: Mapping[str, Effect] = {
    "shear_x": lambda image, amount, canvas: _affine(image, canvas, 1, amount, 0, 0, 1, 0),
    "shear_y": lambda image, amount, canvas: _affine(image, canvas, 1, 0, 0, amount, 1, 0),
    "translate_x": lambda image, amount, canvas: _affine(image, canvas, 1, 0, amount * image.width, 0, 1, 0),
    "translate_y": lambda image, amount, canvas: _affine(image, canvas, 1, 0, 0, 0, 1, amount * image.height),
    "rotate": lambda image, amount, canvas: image.rotate(amount, canvas.filter, fillcolor=canvas.fill),
    "color": lambda image, amount, canvas: ImageEnhance.Color(image).enhance(amount),
    "contrast": lambda image, amount, canvas: ImageEnhance.Contrast(image).enhance(amount),
    "brightness": lambda image, amount, canvas: ImageEnhance.Brightness(image).enhance(amount),
    "sharpness": lambda image, amount, canvas: ImageEnhance.Sharpness(image).enhance(amount),
    "posterize": lambda image, amount, canvas: ImageOps.posterize(image, int(amount)),
    "solarize": lambda image, amount, canvas: ImageOps.solarize(image, int(amount)),
    "solarize_add": _solarize_add,
    "autocontrast": lambda image, amount, canvas: ImageOps.autocontrast(image),
    "equalize": _equalize,
    "invert": lambda image, amount, canvas: ImageOps.invert(image),
}
"""Amounts: of a shear, pixels across for one down, or the reverse; of a translation, a share of the side; degrees;
factors, 1 for no change; bits kept; the grey level from which it inverts; grey levels. The last three take none."""


def _up_to(most: float) -> Scale:
    return lambda strength: most * strength


def _none(strength: float) -> float:
    return 0


def _around_one(strength: float) -> float:
    return 1 + 0.9 * strength


PAPER: Palette = {
    "shear_x": _up_to(0.3),
    "shear_y": _up_to(0.3),
    "translate_x": _up_to(150 / 331),
    "translate_y": _up_to(150 / 331),
    "rotate": _up_to(30),
    "color": _around_one,
    "contrast": _around_one,
    "brightness": _around_one,
    "sharpness": _around_one,
    "posterize": lambda strength: round(8 - 4 * abs(strength)),
    "solarize": lambda strength: 256 - 256 * abs(strength),
    "autocontrast": _none,
    "equalize": _none,
    "invert": _none,
}
"""Cubuk et al., AutoAugment (arXiv 1805.09501), table 6; colours are changed in both directions, as by PaddleClas."""


def _by_level(strength: float) -> float:
    """A factor that grows with the level, from 0.1: at level 5 it changes nothing."""
    return 0.1 + 1.8 * abs(strength)


TIMM: Palette = {
    "autocontrast": _none,
    "equalize": _none,
    "invert": _none,
    "rotate": _up_to(30),
    "posterize": lambda strength: int(4 * abs(strength)),
    "solarize": lambda strength: int(256 * abs(strength)),
    "solarize_add": lambda strength: int(110 * abs(strength)),
    "color": _by_level,
    "contrast": _by_level,
    "brightness": _by_level,
    "sharpness": _by_level,
    "shear_x": _up_to(0.3),
    "shear_y": _up_to(0.3),
    "translate_x": _up_to(0.45),
    "translate_y": _up_to(0.45),
}
"""timm's `rand` without `inc1`: six effects are not weakest at level 0, and posterize blackens everything below 3."""

TIMM_INCREASING: Palette = {
    **TIMM,
    "posterize": lambda strength: 4 - TIMM["posterize"](strength),
    "solarize": lambda strength: 256 - TIMM["solarize"](strength),
    **dict.fromkeys(("color", "contrast", "brightness", "sharpness"), _around_one),
}
"""timm's `rand` with `inc1`: every effect grows with the level."""

TIMM_WEIGHTS = {
    "rotate": 0.3,
    "shear_x": 0.2,
    "shear_y": 0.2,
    "translate_x": 0.1,
    "translate_y": 0.1,
    "color": 0.025,
    "sharpness": 0.025,
    "autocontrast": 0.025,
    "solarize": 0.005,
    "solarize_add": 0.005,
    "contrast": 0.005,
    "brightness": 0.005,
    "equalize": 0.005,
}
"""timm's `w0`: how often an effect is chosen; the others never are."""


Interpolation = Literal["nearest", "bilinear", "bicubic"]
"""Pillow shears, rotates and moves by no other."""


def changed(image: Image.Image, palette: Palette, name: str, strength: float, canvas: Canvas) -> Image.Image:
    """The image after one effect; RGB in and out, of the same size."""
    return EFFECTS[name](image, palette[name](strength), canvas)


class Policy(Operator):
    """What draws effects.

    fillcolor: what is seen where the image has moved away; interpolation: of shearing, rotating and moving; PaddleClas
    shears by bicubic, which takes twice the time, and rotates and moves by nearest.
    """

    fillcolor: Colour = GREY
    interpolation: Interpolation = "bilinear"

    @property
    def _canvas(self) -> Canvas:
        return Canvas(self.fillcolor, FILTERS[self.interpolation])


def _direction(rng: np.random.Generator, chance: float = 1.0) -> int:
    """-1 or 1, or 0 for what is left out."""
    taken, left = rng.random(2)
    return (-1 if left < 0.5 else 1) if taken < chance else 0


IMAGENET_POLICY = (
    (("posterize", 0.4, 8), ("rotate", 0.6, 9)),
    (("solarize", 0.6, 5), ("autocontrast", 0.6, 5)),
    (("equalize", 0.8, 8), ("equalize", 0.6, 3)),
    (("posterize", 0.6, 7), ("posterize", 0.6, 6)),
    (("equalize", 0.4, 7), ("solarize", 0.2, 4)),
    (("equalize", 0.4, 4), ("rotate", 0.8, 8)),
    (("solarize", 0.6, 3), ("equalize", 0.6, 7)),
    (("posterize", 0.8, 5), ("equalize", 1.0, 2)),
    (("rotate", 0.2, 3), ("solarize", 0.6, 8)),
    (("equalize", 0.6, 8), ("posterize", 0.4, 6)),
    (("rotate", 0.8, 8), ("color", 0.4, 0)),
    (("rotate", 0.4, 9), ("equalize", 0.6, 2)),
    (("equalize", 0.0, 7), ("equalize", 0.8, 8)),
    (("invert", 0.6, 4), ("equalize", 1.0, 8)),
    (("color", 0.6, 4), ("contrast", 1.0, 8)),
    (("rotate", 0.8, 8), ("color", 1.0, 2)),
    (("color", 0.8, 8), ("solarize", 0.8, 7)),
    (("sharpness", 0.4, 7), ("invert", 0.6, 8)),
    (("shear_x", 0.6, 5), ("equalize", 1.0, 9)),
    (("color", 0.4, 0), ("equalize", 0.6, 3)),
    (("equalize", 0.4, 7), ("solarize", 0.2, 4)),
    (("solarize", 0.6, 5), ("autocontrast", 0.6, 5)),
    (("invert", 0.6, 4), ("equalize", 1.0, 8)),
    (("color", 0.6, 4), ("contrast", 1.0, 8)),
    (("equalize", 0.8, 8), ("equalize", 0.6, 3)),
)
"""AutoAugment's 25 pairs for ImageNet (arXiv 1805.09501, table 9): effect, chance, and level from 0 to 9."""


class AutoAugment(Policy):
    """One of the 25 pairs of effects that AutoAugment found for ImageNet, each with its own chance and strength."""

    def draw(self, width: int, height: int, rng: np.random.Generator) -> tuple[int, ...]:
        """(pair, direction, direction): 0 for an effect that is left out."""
        pair = int(rng.integers(len(IMAGENET_POLICY)))
        return pair, *(_direction(rng, chance) for _, chance, _ in IMAGENET_POLICY[pair])

    def apply(self, image: Image.Image, drawn: tuple[int, ...]) -> Image.Image:
        pair, *directions = drawn
        for (name, _, level), direction in zip(IMAGENET_POLICY[pair], directions, strict=True):
            if direction:
                image = changed(image, PAPER, name, direction * level / 9, self._canvas)
        return image


class RandAugment(Policy):
    """`num_layers` effects one after another, each any of 14, all of one `magnitude` (Cubuk et al., arXiv 1909.13719).

    magnitude: from 0 to 10, where 0 changes nothing but for the three effects that have no strength. Here posterize and
    solarize grow with it as well; in PaddleClas a higher magnitude weakens them.
    """

    num_layers: Annotated[int, Field(ge=1, le=14)] = 2
    magnitude: Annotated[float, Field(ge=0, le=HIGHEST)] = 5

    def draw(self, width: int, height: int, rng: np.random.Generator) -> tuple[int, ...]:
        """For each layer the effect and its direction, one after another."""
        return tuple(
            drawn for _ in range(self.num_layers) for drawn in (int(rng.integers(len(PAPER))), _direction(rng))
        )

    def apply(self, image: Image.Image, drawn: tuple[int, ...]) -> Image.Image:
        names = tuple(PAPER)
        for effect, direction in zip(drawn[::2], drawn[1::2], strict=True):
            image = changed(image, PAPER, names[effect], direction * self.magnitude / HIGHEST, self._canvas)
        return image


@dataclass(frozen=True)
class RandConfig:
    """What a config string of timm's `rand` family says.

    m: magnitude; n: effects for a view; w: whether some are likelier than others (`w0`); mstd: standard deviation of
    the magnitude; inc: whether every effect grows with it.
    """

    m: int = HIGHEST
    n: int = 2
    w: bool = False
    mstd: float = 0.0
    inc: bool = False

    @property
    def palette(self) -> Palette:
        return TIMM_INCREASING if self.inc else TIMM

    @property
    def weights(self) -> np.ndarray | None:
        """How likely each effect of the palette is."""
        return np.array([TIMM_WEIGHTS.get(name, 0.0) for name in TIMM]) if self.w else None


_SECTION = re.compile(r"(?P<key>mstd|m|n|inc|w)(?P<value>\d+(?:\.\d+)?)")
_FORM = (
    f"expected rand and then, in any order, m0 to m{HIGHEST} (10 when left out), n1 to n{len(TIMM_WEIGHTS)} (2), w0, a "
    f"deviation mstd0 to mstd{HIGHEST} (0), and inc0 or inc1 (0), joined by dashes as in rand-m9-mstd0.5-inc1"
)


@cache
def rand_config(text: str) -> RandConfig:
    """Read a config string. Raises ValueError, which says what is taken."""
    family, *sections = text.split("-")
    if family != "rand":
        raise ValueError(f"{_FORM}, got {cut(text)}; AutoAugment is an operator of its own, and there is no AugMix")
    found = [_SECTION.fullmatch(section) for section in sections]
    values = {match["key"]: match["value"] for match in found if match}
    if len(values) < len(sections) or not all(_in_range(key, value) for key, value in values.items()):
        raise ValueError(f"{_FORM}, got {cut(text)}")
    return RandConfig(
        m=int(values.get("m", HIGHEST)),
        n=int(values.get("n", 2)),
        w="w" in values,
        mstd=float(values.get("mstd", 0)),
        inc=values.get("inc") == "1",
    )


def _in_range(key: str, value: str) -> bool:
    ranges = {"m": range(HIGHEST + 1), "n": range(1, len(TIMM_WEIGHTS) + 1), "w": range(1), "inc": range(2)}
    return float(value) <= HIGHEST if key == "mstd" else value.isdecimal() and int(value) in ranges[key]


def _is_config(text: str) -> str:
    rand_config(text)
    return text


class TimmAutoAugment(Operator):
    """timm's RandAugment by its config string: effects that each have a chance of 1/2, at a magnitude that may vary.

    prob: of the whole operator; mean: the colour, in [0, 1], that is seen where the image has moved away; img_size: is
    taken because PaddleClas's recipes have it, and changes nothing: all distances are shares of the image.
    """

    config_str: Annotated[str, AfterValidator(_is_config)] = "rand-m9-mstd0.5-inc1"
    prob: Chance = 1.0
    interpolation: Interpolation = "bicubic"
    img_size: Side | None = None
    mean: tuple[Chance, Chance, Chance] = IMAGENET_MEAN

    def draw(self, width: int, height: int, rng: np.random.Generator) -> tuple[int, ...]:
        """For each effect its number, its direction (0 for one that is left out) and its level in parts of UNIT."""
        config = rand_config(self.config_str)
        if rng.random() >= self.prob:
            return ()
        weights = config.weights
        effects = rng.choice(len(config.palette), config.n, replace=weights is None, p=weights)
        levels = np.clip(config.m + config.mstd * rng.standard_normal(config.n), 0, HIGHEST)
        pairs = zip(effects, levels, strict=True)
        drawn = ((int(effect), _direction(rng, 0.5), round(UNIT * level)) for effect, level in pairs)
        return tuple(chain.from_iterable(drawn))

    def apply(self, image: Image.Image, drawn: tuple[int, ...]) -> Image.Image:
        palette = rand_config(self.config_str).palette
        red, green, blue = (round(255 * share) for share in self.mean)
        names, canvas = tuple(palette), Canvas((red, green, blue), FILTERS[self.interpolation])
        for effect, direction, level in zip(drawn[::3], drawn[1::3], drawn[2::3], strict=True):
            if direction:
                image = changed(image, palette, names[effect], direction * level / UNIT / HIGHEST, canvas)
        return image


def _factors(value: object) -> object:
    if _is_number(value) and 0 <= value <= 100:
        return max(0, 1 - value), 1 + value
    return _two_numbers(value, "≥ 0 and ≤ 100", 0, 101)


def _turns(value: object) -> object:
    if _is_number(value) and 0 <= value <= 0.5:
        return -value, value
    return _two_numbers(value, "≥ 0 and ≤ 0.5", -0.5, 0.5)


def _is_number(value: object) -> TypeGuard[float]:
    return type(value) in (int, float)


def _two_numbers(value: object, alone: str, least: float, most: float) -> object:
    pair = value if isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_number, value)) else None
    if pair is None or not least <= pair[0] <= pair[1] <= most:
        raise ValueError(
            f"expected a number {alone}, or two from {least} to {most} with the smaller first, got {cut(value)}"
        )
    return pair


Factors = Annotated[tuple[float, float], BeforeValidator(_factors)]
Turns = Annotated[tuple[float, float], BeforeValidator(_turns)]


class ColorJitter(Operator):
    """Brightness, contrast, saturation and hue, each by an amount that is drawn, in an order that is drawn.

    brightness, contrast, saturation: a number b for a factor from max(0, 1 - b) to 1 + b, or the least and the most;
    hue: the same for a part of the colour circle, at most 0.5, around 0; prob: of the whole operator.
    """

    brightness: Factors = (1.0, 1.0)
    contrast: Factors = (1.0, 1.0)
    saturation: Factors = (1.0, 1.0)
    hue: Turns = (0.0, 0.0)
    prob: Chance = 1.0

    def draw(self, width: int, height: int, rng: np.random.Generator) -> tuple[int, ...]:
        """What is changed (0 to 3, as named above) and by how much, in parts of UNIT; four times, in turn."""
        if rng.random() >= self.prob:
            return ()
        ranges = self.brightness, self.contrast, self.saturation, self.hue
        drawn = ((int(kind), round(UNIT * rng.uniform(*ranges[kind]))) for kind in rng.permutation(4))
        return tuple(chain.from_iterable(drawn))

    def apply(self, image: Image.Image, drawn: tuple[int, ...]) -> Image.Image:
        for kind, amount in zip(drawn[::2], drawn[1::2], strict=True):
            if kind == 3:
                image = _turned(image, amount / UNIT)
            else:
                enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[kind]
                image = enhance(image).enhance(amount / UNIT)
        return image


def _turned(image: Image.Image, hue: float) -> Image.Image:
    """Every colour moved on along the colour circle, by a share of it."""
    steps = round(256 * hue) % 256
    if not steps:
        # there and back, HSV would lose colours
        return image
    turned, saturation, value = image.convert("HSV").split()
    turned = turned.point([(grey + steps) % 256 for grey in range(256)])
    return Image.merge("HSV", (turned, saturation, value)).convert("RGB")
