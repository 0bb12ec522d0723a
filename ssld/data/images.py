"""Bytes to pixels: one stated rule for every kind of image, and one error for what is not an image.

The rules, so that labels made today fit the pixels of tomorrow:
- JPEG, PNG and WebP are read, whatever the name says; of an animation, the first frame.
- The EXIF orientation is applied, so that the picture is seen as a person sees it; broken EXIF counts as upright.
- Grey, palette and CMYK become RGB by Pillow's conversion; colour profiles are not applied.
- 16-bit samples keep their high byte.
- Transparent pixels are composited on white, as on a page.
- More than 50 megapixels are refused by the header, before any pixel is decoded; so is a strip over 100 times as long
  as it is wide, which would fill the memory when its short side is enlarged.
"""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image, UnidentifiedImageError

from ssld.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 50_000_000
MAX_RATIO = 100
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow's parsers were seen to raise on hostile bytes; MemoryError is not the image's fault and passes.
_PARSER_ERRORS = (OSError, SyntaxError, ValueError, TypeError, LookupError, OverflowError, struct.error, zlib.error)
_BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)


def decode(data: bytes | np.ndarray) -> Image.Image:
    """The image in mode RGB, upright, by the rules of this module.

    data: an encoded file, or pixels as uint8 [H, W, 3].
    Raises DataError, without the place, which the caller knows: another format,
    damaged, truncated, too large or too thin.
    """
    return _from_array(data) if isinstance(data, np.ndarray) else _from_bytes(data)


def _from_array(pixels: np.ndarray) -> Image.Image:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise DataError(f"expected pixels as uint8 [H, W, 3], got {pixels.dtype} {list(pixels.shape)}")
    _check_size(pixels.shape[1], pixels.shape[0])
    return Image.fromarray(np.ascontiguousarray(pixels))


def _from_bytes(data: bytes) -> Image.Image:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(*image.size)
            image.load()
            return _upright(_rgb(image), _orientation(image))
    except UnidentifiedImageError as error:
        raise DataError(f"expected a whole JPEG, PNG or WebP image, got {_describe(data)}") from error
    except _BOMB as error:
        raise DataError(f"expected at most {MAX_PIXELS / 1e6:.0f} megapixels, got more; scale it down") from error
    except _PARSER_ERRORS as error:
        raise DataError(f"expected a whole image, got a damaged one of {len(data)} bytes: {error}") from error


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        got = f"{width} x {height} = {width * height / 1e6:.1f}"
        raise DataError(f"expected at most {MAX_PIXELS / 1e6:.0f} megapixels, got {got}; scale it down")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise DataError(f"expected sides in a ratio of at most {MAX_RATIO}, got {width} x {height}; cut it")


def _describe(data: bytes) -> str:
    return f"{len(data)} bytes that begin with {bytes(data[:16])!r}" if data else "0 bytes"


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1, upright, where there is none or it cannot be parsed."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except _PARSER_ERRORS:
        # ImageNet holds good pictures with broken EXIF blocks, and every viewer shows them as they are stored.
        return 1
    return value if value in _UPRIGHT else 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255 and would turn the picture white.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        page = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(page, image.convert("RGBA"))
    return image.convert("RGB")
