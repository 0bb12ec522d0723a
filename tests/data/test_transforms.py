"""Views: drawn once in source coordinates, rendered at any size; pipelines, and the faults of a recipe's operators."""

import hashlib
import json
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ssld.data.transforms import Pipeline, center, normalize, read_operators, view
from ssld.errors import DataError

TRAIN = ["RandCropImage", "RandFlipImage", "NormalizeImage"]
TEST = [{"ResizeImage": {"resize_short": 256}}, {"CropImage": {"size": 224}}, "NormalizeImage"]
sides = st.integers(1, 400)


def gradient(width: int, height: int) -> Image.Image:
    """Red and green say where a pixel was: (column, row) of the source, as shares of 255."""
    columns, rows = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([columns, rows, 0 * rows], -1).round().astype(np.uint8))


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


# --- views


def test_a_view_is_the_same_in_another_process() -> None:
    script = """if True:
        import hashlib
        import numpy as np
        from PIL import Image
        from ssld.data.transforms import Pipeline, view
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8))
        pipeline = Pipeline.read(["RandCropImage", "RandFlipImage", "NormalizeImage"], 32)
        pixels = b"".join(view(image, pipeline, seed).tobytes() for seed in range(20))
        assert not {"paddle", "faiss"} & set(__import__("sys").modules)
        print(hashlib.sha256(pixels).hexdigest())"""
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
    pixels = b"".join(view(noise(90, 70), Pipeline.read(TRAIN, 32), seed).tobytes() for seed in range(20))
    assert hashlib.sha256(pixels).hexdigest() == other


def test_views_differ_with_the_seed() -> None:
    pipeline = Pipeline.read(TRAIN, 8)
    views = {pipeline.draw(90, 70, seed) for seed in range(200)}
    assert len(views) > 195


@pytest.mark.parametrize("seed", range(12))
def test_two_sizes_see_the_same_part_and_flip(seed: int) -> None:
    image = gradient(300, 200)
    small = Pipeline.read(TRAIN, 32)
    large = small.at(96)
    drawn = small.draw(300, 200, seed)
    assert large.draw(300, 200, seed) == drawn
    low, high = (pipeline.render(image, drawn).astype(np.float64) for pipeline in (small, large))
    blocks = high.reshape(32, 3, 32, 3, 3).mean((1, 3))
    # The pixels of one block average to what the small view shows there; Pillow's filter and two roundings differ.
    assert np.abs(low - blocks)[1:-1, 1:-1].max() < 2


@pytest.mark.parametrize("seed", range(12))
def test_the_part_that_is_drawn_is_the_part_that_is_shown(seed: int) -> None:
    pipeline = Pipeline.read(TRAIN, 64)
    (left, top, width, height), (flipped,) = pipeline.draw(300, 200, seed)
    shown = pipeline.render(gradient(300, 200), ((left, top, width, height), (flipped,))).astype(np.float64)
    shown = shown[:, ::-1] if flipped else shown
    # Centers of the corner pixels: half an output pixel inside the part, in units of the gradient.
    first = ((left + width / 128 - 0.5) / 299 * 255, (top + height / 128 - 0.5) / 199 * 255)
    last = ((left + width - width / 128 - 0.5) / 299 * 255, (top + height - height / 128 - 0.5) / 199 * 255)
    np.testing.assert_allclose(shown[0, 0, :2], first, atol=2)
    np.testing.assert_allclose(shown[-1, -1, :2], last, atol=2)


@given(sides, sides, st.integers(0, 2**62))
def test_the_part_lies_inside_the_image(width: int, height: int, seed: int) -> None:
    ((left, top, part_width, part_height),) = Pipeline.read(["RandCropImage"], 8).draw(width, height, seed)
    assert 0 <= left <= left + part_width <= width
    assert 0 <= top <= top + part_height <= height
    assert part_width >= 1
    assert part_height >= 1


def test_parts_have_the_area_and_shape_that_were_asked_for() -> None:
    pipeline = Pipeline.read([{"RandCropImage": {"scale": [0.2, 0.6], "ratio": [0.5, 2.0]}}], 8)
    parts = np.array([pipeline.draw(1000, 1000, seed)[0] for seed in range(2000)])
    area = parts[:, 2] * parts[:, 3] / 1e6
    ratio = parts[:, 2] / parts[:, 3]
    # At ratio 2 at most half of a square fits, and one pixel is cut off on either side.
    assert area.min() > 0.195
    assert area.max() <= 0.6
    assert ratio.min() > 0.49
    assert ratio.max() < 2.04
    # The ratio is uniform over [0.5, 2]: a third is below 1; 5 standard deviations.
    assert abs(np.mean(ratio < 1) - 1 / 3) < 5 * np.sqrt(2 / 9 / 2000)


def test_parts_reach_every_border() -> None:
    pipeline = Pipeline.read([{"RandCropImage": {"scale": [0.25, 0.25], "ratio": [1, 1]}}], 8)
    parts = np.array([pipeline.draw(8, 8, seed)[0] for seed in range(500)])
    assert set(parts[:, 0]) == set(parts[:, 1]) == set(range(5))
    assert set(parts[:, 2]) == set(parts[:, 3]) == {4}


@pytest.mark.parametrize(("code", "flip"), [(1, np.s_[:, ::-1]), (0, np.s_[::-1]), (-1, np.s_[::-1, ::-1])])
def test_about_half_are_flipped(code: int, flip: object) -> None:
    image = noise(8, 8)
    pipeline = Pipeline.read([{"RandFlipImage": {"flip_code": code}}], 8)
    flipped = 0
    for seed in range(1000):
        pixels = view(image, pipeline, seed)
        flipped += (is_flipped := bool((pixels == np.asarray(image)[flip]).all()))
        assert is_flipped or (pixels == np.asarray(image)).all()
    assert abs(flipped - 500) < 5 * np.sqrt(250)


# --- resolutions


@pytest.mark.parametrize(("resolution", "short"), [(224, 256), (320, 366), (384, 439), (112, 128)])
def test_the_default_short_side_is_that_of_paddleclas(resolution: int, short: int) -> None:
    resize = Pipeline.read(["ResizeImage", "CropImage"], resolution).steps[0]
    assert resize.resize_short == short == round(Fraction(resolution * 256, 224))


@pytest.mark.parametrize(("resolution", "short"), [(224, 236), (320, 337), (448, 472)])
def test_explicit_sizes_scale_with_the_resolution(resolution: int, short: int) -> None:
    operators = [{"ResizeImage": {"resize_short": 236}}, {"CropImage": {"size": [224, 224]}}]
    scaled = Pipeline.read(operators, 224).at(resolution)
    assert [scaled.steps[0].resize_short, scaled.steps[1].size] == [short, (resolution, resolution)]
    assert scaled.at(224) == Pipeline.read(operators, 224)
    assert view(noise(80, 60), scaled, 0).shape == (resolution, resolution, 3)


@pytest.mark.parametrize(
    ("operators", "got"),
    [
        ([], "60 x 40"),
        ([{"ResizeImage": {"resize_short": 32}}], "48 x 32"),
        ([{"RandCropImage": {"size": 16}}], "16 x 16"),
        ([{"CropImage": {"size": [32, 16]}}], "32 x 16"),
    ],
)
def test_operators_that_end_at_another_size_are_an_error(operators: list[object], got: str) -> None:
    with pytest.raises(DataError, match=f"32 x 32 pixels, got {got} from an image of 60 x 40"):
        view(noise(60, 40), Pipeline.read(operators, 32), 0)


# --- mean and std


@pytest.mark.parametrize("scale", [1 / 255, "1.0/255.0", "1/255", 1.0, "1"])
def test_normalizing_is_paddleclas_formula_in_float32(scale: float | str) -> None:
    factor = 1 / 255 if scale != 1.0 and scale != "1" else 1.0
    mean, std = (np.array(value) * factor * 255 for value in ([0.4, 0.5, 0.6], [0.2, 0.25, 0.3]))
    pipeline = Pipeline.read([{"NormalizeImage": {"scale": scale, "mean": list(mean), "std": list(std)}}], 8)
    images = np.arange(256, dtype=np.uint8).repeat(12).reshape(4, 16, 16, 3)
    expected = (images.astype(np.float64) * factor - mean) / std
    result = normalize(images, pipeline.mean, pipeline.std)
    assert result.dtype == np.float32
    assert result.flags.c_contiguous
    np.testing.assert_allclose(result, expected.transpose(0, 3, 1, 2), rtol=0, atol=1e-6)


def test_normalizing_gives_the_same_bits_in_any_batch() -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 9, 7, 3), dtype=np.uint8)
    whole = normalize(images, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    alone = [normalize(images[n : n + 1], (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) for n in range(5)]
    np.testing.assert_array_equal(whole, np.concatenate(alone))


@pytest.mark.parametrize("operators", [[], ["NormalizeImage"], ["CropImage", {"NormalizeImage": None}]])
def test_mean_and_std_are_imagenets_by_default(operators: list[object]) -> None:
    pipeline = Pipeline.read(operators, 8)
    assert (pipeline.mean, pipeline.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


# --- pipelines


@pytest.mark.parametrize("operators", [TRAIN, TEST, [], [{"NormalizeImage": {"scale": "1.0/255.0"}}]])
def test_json_gives_the_same_pipeline_back(operators: list[object]) -> None:
    pipeline = Pipeline.read(operators, 224).at(320)
    text = json.dumps(pipeline.to_json())
    assert Pipeline.from_json(json.loads(text)) == pipeline
    assert json.dumps(Pipeline.from_json(json.loads(text)).to_json()) == text


def test_center_is_the_written_out_pipeline() -> None:
    written = Pipeline.read(TEST, 224)
    built = center(224, 256, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert built.steps == written.steps
    assert center(224, None, None, None).steps == written.steps
    assert (built.mean, built.std) == (written.mean, written.std)


ENLARGING = [
    ([{"ResizeImage": {"resize_short": 32}}, "CropImage"], "ResizeImage to 32 px before CropImage of 224 px"),
    ([{"ResizeImage": {"size": [300, 200]}}, "CropImage"], "ResizeImage to 200 px before CropImage of 224 px"),
    ([{"ResizeImage": {"resize_short": 223}}, "CropImage"], "ResizeImage to 223 px before CropImage of 224 px"),
    (["ResizeImage", {"CropImage": {"size": 99}}, {"ResizeImage": {"size": 224}}], "CropImage to 99 px before Resize"),
    ([{"RandCropImage": {"size": 32}}, "RandFlipImage", {"ResizeImage": {"size": 224}}], "RandCropImage to 32 px"),
]


@pytest.mark.parametrize("resolution", [224, 320, 112])
@pytest.mark.parametrize(("operators", "got"), ENLARGING)
def test_operators_that_enlarge_what_they_shrank_are_refused(
    operators: list[object], got: str, resolution: int
) -> None:
    """In the sizes that the recipe writes, at whatever resolution a stage renders."""
    with pytest.raises(ValueError, match=f"got {got}.*would blur every image.*for resolution 224"):
        Pipeline.read(operators, 224).at(resolution).check()


@pytest.mark.parametrize("resolution", [512, 224, 31])
@pytest.mark.parametrize(
    "operators",
    [
        TRAIN,
        TEST,
        ["CropImage"],
        [{"ResizeImage": {"resize_short": 224}}, "CropImage"],
        [{"ResizeImage": {"size": [300, 240]}}, {"ResizeImage": {"resize_short": 240}}, "CropImage"],
        [{"ResizeImage": {"size": 224}}],
    ],
)
def test_a_small_source_may_be_enlarged_and_a_large_one_shrunk_step_by_step(
    operators: list[object], resolution: int
) -> None:
    Pipeline.read(operators, 224).at(resolution).check()


@pytest.mark.parametrize("operators", [[], ["ResizeImage"], [{"CropImage": {"size": 16}}], ["RandFlipImage"]])
def test_a_pipeline_that_ends_at_another_size_fails_its_check(operators: list[object]) -> None:
    with pytest.raises(ValueError, match=r"a view of 32 x 32 pixels, got .* from an image of 500 x 375"):
        Pipeline.read(operators, 32).check()


@pytest.mark.parametrize(
    "operators", [[{"ResizeImage": {"resize_short": 100}}, "CropImage"], [{"RandCropImage": {"size": [1, 100]}}]]
)
def test_a_size_that_another_resolution_makes_immense_is_refused_before_an_image_of_it_is_made(
    operators: list[object],
) -> None:
    with pytest.raises(ValueError, match=r"at most 8192 px, got 51200 by .* for resolution 8, at resolution 4096"):
        Pipeline.read(operators, 8).at(4096).check()


def test_a_view_of_other_operators_is_refused() -> None:
    with pytest.raises(ValueError):
        Pipeline.read(TRAIN, 8).render(noise(9, 9), ((1,),))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("CropImage", "a list of operators"),
        (["RandCropImag"], "got 'RandCropImag'; did you mean RandCropImage"),
        (["Mosaic"], "got 'Mosaic'; known: ResizeImage, CropImage"),
        ([{"CropImage": {"sizes": 8}}], "CropImage.sizes: unknown key, did you mean size"),
        ([{"CropImage": {"size": 0}}], r"CropImage.size: expected a side in pixels or .* ≥ 1 and ≤ 8192, got 0"),
        ([{"CropImage": {"size": "8"}}], "CropImage.size: .*got '8'"),
        ([{"CropImage": {"size": [8]}}], r"CropImage.size: .*got \[8\]"),
        (
            [{"ResizeImage": {"resize_short": 0}}],
            "ResizeImage.resize_short: expected a whole number ≥ 1 and ≤ 8192, got 0",
        ),
        ([{"CropImage": {"size": True}}], "CropImage.size: .*got True"),
        ([{"CropImage": 8}], "{NAME: {argument: value}}"),
        ([{"CropImage": {}, "ResizeImage": {}}], "{NAME: {argument: value}}"),
        ([3], "{NAME: {argument: value}}"),
        ([{"CropImage": {"size": 8193}}], "CropImage.size: .* ≥ 1 and ≤ 8192, got 8193"),
        ([{"RandCropImage": {"size": [8, 10**400]}}], r"RandCropImage.size: .* ≤ 8192, got \[8, 10{30,60}…"),
        ([{"ResizeImage": {"resize_short": 8193}}], "ResizeImage.resize_short: .* ≥ 1 and ≤ 8192, got 8193"),
        (["Crop" * 1000], "got '(Crop){14}…; known"),
        ([{"ResizeImage": {"size": 8, "resize_short": 9}}], "size or resize_short, got both"),
        ([{"ResizeImage": {"interpolation": "cubic"}}], "ResizeImage.interpolation"),
        ([{"RandCropImage": {"scale": [0.5, 0.1]}}], "smaller number first"),
        (
            [{"RandCropImage": {"scale": [0.0, 1.0]}}],
            r"RandCropImage.scale\[0\]: expected a number > 0 and ≤ 1, got 0.0",
        ),
        ([{"RandFlipImage": {"flip_code": 2}}], "RandFlipImage.flip_code: expected 1 or 0 or -1, got 2"),
        ([{"NormalizeImage": {"std": [0, 1, 1]}}], r"NormalizeImage.std\[0\]: expected a number > 0"),
        ([{"NormalizeImage": {"scale": "a/b"}}], "NormalizeImage.scale: .*got 'a/b'"),
        ([{"NormalizeImage": {"scale": "1/0"}}], "NormalizeImage.scale: .*got '1/0'"),
        (["NormalizeImage", "CropImage"], "NormalizeImage once and last"),
        (["NormalizeImage", "NormalizeImage"], "NormalizeImage once and last"),
        (["ResizeImage", "RandCropImage"], "one RandCropImage, before"),
        (["RandCropImage", "RandCropImage"], "one RandCropImage, before"),
    ],
)
def test_faults_say_what_was_expected(value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_operators(value)


def test_a_flip_may_come_before_the_crop() -> None:
    assert view(noise(20, 20), Pipeline.read(["RandFlipImage", "RandCropImage"], 8), 0).shape == (8, 8, 3)
