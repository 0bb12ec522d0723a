from __future__ import annotations

from importlib.machinery import ModuleSpec

import numpy as np
import pytest
from PIL import Image

from ssld.data import builtin
from ssld.data.builtin import SHAPES, STRIPES, draw_shape
from ssld.data.sources import open_source
from ssld.errors import DataError, RecipeError
from ssld.seeds import generator

PARTS = {"labeled": 400, "validation": 397, "pool": 1000}


@pytest.mark.parametrize(("part", "size"), PARTS.items())
def test_digits_are_the_images_of_scikit_learn(part: str, size: int) -> None:
    from sklearn.datasets import load_digits

    images, targets = load_digits(return_X_y=True)
    found = open_source(f"builtin:digits?part={part}", labeled=True)
    assert len(found) == size
    assert found.classes == tuple("0123456789")
    assert found.labels is not None
    for i in range(size):
        row = int(found.key(i).removeprefix("digits/"))
        pixels = np.asarray(found.read(i))
        assert pixels.shape == (8, 8, 3)
        assert pixels.dtype == np.uint8
        assert np.abs(pixels - images[row].reshape(8, 8, 1) / 16 * 255).max() <= 0.5
        assert found.labels[i] == targets[row]


def test_the_parts_of_the_digits_are_disjoint_whole_and_balanced() -> None:
    parts = {part: open_source({"builtin": f"digits?part={part}"}, labeled=True) for part in PARTS}
    keys = [part.key(i) for part in parts.values() for i in range(len(part))]
    assert len(set(keys)) == len(keys) == 1797
    for part in ("labeled", "validation"):
        counts = np.bincount(parts[part].labels)
        assert counts.max() - counts.min() <= 1
    assert len({part.identity for part in parts.values()}) == 3


def test_the_pool_shows_no_labels() -> None:
    pool = open_source("builtin:digits?part=pool", labeled=False)
    assert (pool.labels, pool.classes) == (None, None)


@pytest.mark.parametrize(("there", "found"), [(False, "none"), (True, "one without digits.csv.gz")])
def test_digits_without_scikit_learn_name_the_extra(monkeypatch, tmp_path, there, found) -> None:
    spec = ModuleSpec("sklearn", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(builtin, "find_spec", lambda name: spec if there else None)
    builtin._load_digits.cache_clear()
    with pytest.raises(DataError, match=rf'got {found}; run pip install "ssld\[demo\]"'):
        open_source("builtin:digits?part=pool", labeled=False)


def test_shapes_are_drawn_the_same_each_time_and_differ_by_index_and_seed() -> None:
    spec = "builtin:shapes?count=20&size=24&seed="
    first, again, other = (open_source(spec + seed, labeled=True) for seed in "001")
    assert first.identity == again.identity != other.identity
    for i in (3, 19):
        assert np.array_equal(first.read(i), again.read(i))
        assert not np.array_equal(first.read(i), other.read(i))
    assert not np.array_equal(first.read(0), first.read(8))
    assert first.key(3) != other.key(3)


def test_shapes_take_turns_and_have_the_asked_size() -> None:
    found = open_source("builtin:shapes?count=25&size=40&classes=12", labeled=True)
    assert found.classes == tuple(SHAPES)
    assert found.labels is not None
    assert found.labels.tolist() == [i % 12 for i in range(25)]
    pixels = np.asarray(found.read(11))
    assert (pixels.shape, pixels.dtype) == ((40, 40, 3), np.uint8)
    assert open_source("builtin:shapes", labeled=False).shard_sizes.tolist() == [1000]


def test_a_huge_set_costs_no_memory_for_pixels() -> None:
    found = open_source("builtin:shapes?count=1000000&size=256", labeled=True)
    assert found.rows.nbytes + found.labels.nbytes + found.shard_sizes.nbytes <= 17e6
    assert np.asarray(found.read(999_999)).shape == (256, 256, 3)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_stands_out_and_lies_inside_the_image(shape: str) -> None:
    for i in range(5):
        image = draw_shape(shape, 64, generator("test", i)).astype(float)
        corners = np.stack([image[:4, :4], image[-4:, :4], image[:4, -4:], image[-4:, -4:]]).mean((1, 2))
        away = np.abs(image - corners.mean(0)).max(2) > 55
        assert 0.01 < away.mean() < 0.55
        assert away[[0, -1]].mean() < 0.15
        assert away[:, [0, -1]].mean() < 0.15


def test_fine_stripes_vanish_at_half_the_resolution_and_coarse_ones_stay() -> None:
    def contrast(shape: str, side: int) -> float:
        """Variation inside the disc relative to a plain disc, mean of some images."""
        ratios = []
        for i in range(12):
            plain, striped = (
                np.asarray(
                    Image.fromarray(draw_shape(kind, 64, generator("c", i))).resize(
                        (side, side), Image.Resampling.BILINEAR
                    ),
                    float,
                )
                for kind in ("circle", shape)
            )
            ratios.append(_detail(striped) / _detail(plain))
        return float(np.mean(ratios))

    assert set(STRIPES) == {"fine stripes", "coarse stripes"}
    assert contrast("fine stripes", 64) > 2
    assert contrast("coarse stripes", 32) > 1.4 * contrast("fine stripes", 32)
    assert contrast("fine stripes", 32) < 0.6 * contrast("fine stripes", 64)


def _detail(image: np.ndarray) -> float:
    """Mean absolute difference between neighbours, along both axes."""
    return float(np.abs(np.diff(image, axis=0)).mean() + np.abs(np.diff(image, axis=1)).mean())


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("digit", ["got 'digit'; did you mean digits?"]),
        ("faces", ["got 'faces'; known: digits, shapes"]),
        ("digits", ["got ''; known: labeled, validation, pool"]),
        ("digits?part=pol", ["got 'pol'; did you mean pool?"]),
        ("digits?prt=pool", ["option of digits, got 'prt'; did you mean part?"]),
        ("shapes?cout=3", ["option of shapes, got 'cout'; did you mean count?"]),
        ("shapes?zebra=3", ["got 'zebra'; known: count, size, classes, seed"]),
        ("shapes?count=0", ["count as a whole number in [1, ", "got '0'"]),
        ("shapes?classes=13", ["classes as a whole number in [2, 12]", "got '13'"]),
        ("shapes?size=big", ["size", "got 'big'"]),
        (f"shapes?count={'9' * 5000}", ["count as a whole number in [1, ", "got '9999"]),
        ("shapes?count", ["key=value", "got 'count'"]),
    ],
)
def test_options_that_are_not_known(spec: str, parts: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        open_source(f"builtin:{spec}", labeled=True)
    assert all(part in str(caught.value) for part in [f"builtin:{spec}", *parts])
