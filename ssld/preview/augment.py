"""Views of one image in one picture, so that a person sees what a recipe's operators make of it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from math import ceil, sqrt
from pathlib import Path

from PIL import Image

from ssld.data.images import decode
from ssld.data.rendering import Work, render
from ssld.data.transforms import Pipeline
from ssld.errors import DataError, OutputError
from ssld.files import write_atomic
from ssld.graph import pipeline
from ssld.recipe import read_recipe

LARGEST = 384
"""Side of a view in pixels, at most: nobody sees more of sixteen at a time."""
GAP = 4
PAPER = (255, 255, 255)


def views_of(recipe: str | Path, image: Path, out: Path, *, overrides: Sequence[str] = (), views: int = 15) -> str:
    """Write a PNG: the image, and behind it, row by row, views 0, 1, … of it by the recipe's operators of training.

    Each is drawn as for soft labels of seed 0 from the name of the file, so the same call gives the same picture.
    Returns what was shown, in words. Raises RecipeError, DataError for what is no image, OutputError.
    """
    if out.suffix.lower() != ".png":
        raise OutputError(f"cannot write {out}: expected a name that ends with .png")
    read = read_recipe(recipe, overrides)
    shown = pipeline(read, "train", min(read.images.resolution, LARGEST))
    data = _bytes(image)
    found = render((shown,), Work(data, image.name, 0, tuple(range(views))))
    if isinstance(found, DataError):
        raise DataError(f"{image}: {found}") from found
    cells = [_whole(decode(data), shown.resolution), *(Image.fromarray(pixels) for _, (pixels,) in found)]
    write_atomic(out, _png(sheet(cells)), durable=False)
    return f"{out}: {image.name} and {views} views of it by {_names(shown)}"


def sheet(cells: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one size, as a square of them or a little less, row by row on white."""
    columns = ceil(sqrt(len(cells)))
    width, height = (side + GAP for side in cells[0].size)
    page = Image.new("RGB", (GAP + columns * width, GAP + ceil(len(cells) / columns) * height), PAPER)
    for place, cell in enumerate(cells):
        row, column = divmod(place, columns)
        page.paste(cell, (GAP + column * width, GAP + row * height))
    return page


def _whole(image: Image.Image, side: int) -> Image.Image:
    """All of the image in the middle of a white square."""
    scale = side / max(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)
    square = Image.new("RGB", (side, side), PAPER)
    square.paste(image.resize((width, height), Image.Resampling.BICUBIC), ((side - width) // 2, (side - height) // 2))
    return square


def _bytes(image: Path) -> bytes:
    try:
        return image.read_bytes()
    except OSError as error:
        raise DataError(f"{image}: expected an image file, got: {error.strerror}") from error


def _png(page: Image.Image) -> bytes:
    written = io.BytesIO()
    page.save(written, "PNG", optimize=True)
    return written.getvalue()


def _names(shown: Pipeline) -> str:
    return ", ".join(type(operator).__name__ for operator in shown.steps)
