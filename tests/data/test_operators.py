"""Operators that resize and crop, derived again from their definitions."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ssld.data.transforms import Pipeline, read_operators, view


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@settings(deadline=None)
@given(st.integers(20, 200), st.integers(20, 200), st.integers(10, 64))
def test_resize_short_rounds_the_other_side_exactly(width: int, height: int, short: int) -> None:
    operator = read_operators([{"ResizeImage": {"resize_short": short}}])[0]
    exact = [round(Fraction(side * short, min(width, height))) for side in (width, height)]
    assert list(operator.apply(Image.new("RGB", (width, height)), ()).size) == exact


@pytest.mark.parametrize(("width", "height"), [(300, 200), (310, 200), (200, 310), (256, 256), (37, 50)])
def test_resize_and_crop_are_the_center_square_of_the_resized_image(width: int, height: int) -> None:
    image = noise(width, height)
    short = min(width, height)
    resized = image.resize((round(width * 64 / short), round(height * 64 / short)), Image.Resampling.BICUBIC)
    left, top = (resized.width - 56) // 2, (resized.height - 56) // 2
    expected = np.asarray(resized)[top : top + 56, left : left + 56]
    resize = {"ResizeImage": {"resize_short": 64, "interpolation": "bicubic"}}
    np.testing.assert_array_equal(view(image, Pipeline.read([resize, "CropImage"], 56), 0), expected)


def test_shrinking_averages_what_it_covers() -> None:
    # Pillow rounds once per direction.
    pixels = np.random.default_rng(1).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    shown = view(Image.fromarray(pixels), Pipeline.read([{"ResizeImage": {"size": 8, "interpolation": "area"}}], 8), 0)
    assert np.abs(shown - pixels.reshape(8, 3, 8, 3, 3).mean((1, 3))).max() <= 1


@pytest.mark.parametrize("name", ["nearest", "bilinear", "bicubic", "area", "lanczos"])
def test_every_interpolation_keeps_a_flat_image(name: str) -> None:
    operators = [{"RandCropImage": {"interpolation": name}}, {"ResizeImage": {"size": 8, "interpolation": name}}]
    assert (view(Image.new("RGB", (31, 17), (9, 99, 200)), Pipeline.read(operators, 8), 0) == [9, 99, 200]).all()


@pytest.mark.parametrize(("width", "height"), [(5, 9), (9, 5), (16, 3), (3, 16), (15, 40), (1, 1)])
def test_a_crop_of_a_smaller_image_enlarges_it_first(width: int, height: int) -> None:
    factor = max(Fraction(16, min(width, height)), Fraction(1))
    image = noise(width, height)
    whole = np.asarray(image.resize((round(width * factor), round(height * factor)), Image.Resampling.BILINEAR))
    top, left = (whole.shape[0] - 16) // 2, (whole.shape[1] - 16) // 2
    shown = view(image, Pipeline.read(["CropImage"], 16), 0)
    np.testing.assert_array_equal(shown, whole[top : top + 16, left : left + 16])
