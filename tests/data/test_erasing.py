"""Augmentations that hide a part of a view: what, where, how often and in which colour; PaddleClas's defects."""

import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from ssld.data.operators import Operator
from ssld.data.transforms import Pipeline, normalize, read_operators, view

WHITE = Image.new("RGB", (224, 224), (255, 255, 255))
IMAGENET = (124, 116, 104)
"""The colour that ImageNet's mean is: 255 times (0.485, 0.456, 0.406)."""
OPERATORS = [
    {"RandomErasing": {"EPSILON": 1}},
    {"RandomErasing": {"EPSILON": 1, "mode": "pixel"}},
    "Cutout",
    {"HideAndSeek": {"grid_sizes": [16, 44]}},
    {"GridMask": {"rotate": 90}},
]


def piped(operator: object, resolution: int = 224) -> Pipeline:
    return Pipeline.read([operator], resolution)


def hidden(pixels: np.ndarray) -> np.ndarray:
    """Which pixels of a white view are white no more; bool [S, S]."""
    return (pixels != 255).any(-1)


def masks(operator: object, count: int, resolution: int = 224) -> np.ndarray:
    """What is hidden in the views of so many seeds, bool [count, S, S]."""
    image, pipeline = WHITE.resize((resolution, resolution)), piped(operator, resolution)
    return np.stack([hidden(view(image, pipeline, seed)) for seed in range(count)])


def within(found: float, chance: float, count: int) -> bool:
    """Whether a share is what chance lets one expect of so many draws: 5 standard deviations."""
    return abs(found - chance) <= 5 * np.sqrt(chance * (1 - chance) / count)


def box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of what is hidden, which is a full rectangle."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    left, right, top, bottom = columns[0], columns[-1] + 1, rows[0], rows[-1] + 1
    assert mask[top:bottom, left:right].all()
    return left, top, right, bottom


# --- what all have in common


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_view_is_drawn_the_same_at_every_size_and_is_no_other_seeds(operator: object) -> None:
    pipeline = Pipeline.read(["RandCropImage", operator], 224)
    found = [pipeline.draw(90, 70, seed) for seed in range(200)]
    assert found == [pipeline.at(160).draw(90, 70, seed) for seed in range(200)]
    assert len({drawn[1] for drawn in found}) > 190
    assert {type(part) for drawn in found for parts in drawn for part in parts} == {int}


@pytest.mark.parametrize("operator", OPERATORS)
def test_teacher_and_student_miss_the_same_part(operator: object) -> None:
    large = piped(operator, 192)
    small = large.at(64)
    for seed in range(40):
        low, high = (hidden(view(WHITE.resize((p.resolution,) * 2), p, seed)) for p in (small, large))
        share = high.reshape(64, 3, 64, 3).mean((1, 3))
        # A block lies within the part or beside it, or is cut by its border.
        assert (low[share == 1]).all()
        assert not (low[share == 0]).any()
        assert abs(low.mean() - high.mean()) < 0.02


@pytest.mark.parametrize("operator", OPERATORS)
def test_what_is_not_hidden_is_untouched_and_so_is_the_source(operator: object) -> None:
    pixels = np.random.default_rng(0).integers(0, 100, (64, 64, 3), dtype=np.uint8)
    image, pipeline, some = Image.fromarray(pixels), piped(operator, 64), 0
    for seed in range(20):
        shown = view(image, pipeline, seed)
        mask = hidden(view(WHITE.resize((64, 64)), pipeline, seed))
        np.testing.assert_array_equal(shown[~mask], pixels[~mask])
        some += mask.any()
    assert some > 15
    np.testing.assert_array_equal(np.asarray(image), pixels)


@pytest.mark.parametrize("operator", ["Cutout", {"HideAndSeek": {"grid_sizes": [16]}}, "GridMask", OPERATORS[0]])
@pytest.mark.parametrize("normalization", [{}, {"mean": [0.5, 0.25, 0.75], "std": [0.2, 0.3, 0.4]}, {"scale": "1/128"}])
def test_what_is_hidden_is_0_after_normalization_on_either_side_of_it(operator: object, normalization: object) -> None:
    """As in PaddleClas's recipes, which erase behind NormalizeImage; half a grey level is what a byte leaves."""
    before = Pipeline.read([operator, {"NormalizeImage": normalization}], 224)
    behind = Pipeline.read([{"NormalizeImage": normalization}, operator], 224)
    for seed in range(5):
        pixels = view(WHITE, before, seed)
        np.testing.assert_array_equal(pixels, view(WHITE, behind, seed))
        values = normalize(pixels[None], behind.mean, behind.std)[0].transpose(1, 2, 0)
        rounding = 0.5 / 255 / np.array(behind.std)
        assert (np.abs(values[hidden(pixels)]) <= rounding + 1e-6).all()
        assert hidden(pixels).any()


@pytest.mark.parametrize("name", ["RandomErasing", "Cutout", "HideAndSeek", "GridMask"])
def test_another_colour_may_be_asked_for(name: str) -> None:
    pipeline, image = piped({name: {"fill_value": [0, 0, 7]}}, 32), WHITE.resize((32, 32))
    shown = np.stack([view(image, pipeline, seed) for seed in range(20)])
    assert set(map(tuple, shown.reshape(-1, 3).tolist())) == {(255, 255, 255), (0, 0, 7)}


@pytest.mark.parametrize("operator", OPERATORS)
def test_json_gives_the_same_pipeline_back(operator: object) -> None:
    pipeline = Pipeline.read(["RandCropImage", "NormalizeImage", operator], 32)
    text = json.dumps(pipeline.to_json())
    assert Pipeline.from_json(json.loads(text)) == pipeline
    assert Pipeline.from_json(json.loads(text)).steps == pipeline.steps


@pytest.mark.parametrize("resolution", [8, 32, 224, 384])
@pytest.mark.parametrize("operator", ["Cutout", "HideAndSeek", "GridMask", "RandomErasing"])
def test_a_recipe_of_any_resolution_can_leave_the_lengths_out(operator: str, resolution: int) -> None:
    """The usual ones are for 224 px: a hole of 112 would be all of a view of 32."""
    Pipeline.read(["RandCropImage", operator], resolution).check()
    # the hidden part of the same seeds at 64 px
    assert abs(masks(operator, 30, resolution).mean() - masks(operator, 30, 64).mean()) < 0.06


@pytest.mark.parametrize(
    "operator",
    [
        {"Cutout": {"length": 8}},
        {"HideAndSeek": {"grid_sizes": [8], "hide_prob": 1}},
        {"GridMask": {"d1": 16, "d2": 16}},
    ],
)
def test_lengths_are_pixels_at_the_resolution_of_the_recipe(operator: object) -> None:
    """And as many times more at another; `base` is another that they were written for."""
    (name, arguments) = next(iter(operator.items()))
    recipe, other = piped(operator, 32), piped({name: {**arguments, "base": 32}}, 64)
    assert recipe.at(64).steps == other.steps
    if name == "Cutout":
        assert hidden(recipe.render(WHITE.resize((32, 32)), ((32768, 32768),))).sum() == 8 * 8
        assert hidden(recipe.at(64).render(WHITE.resize((64, 64)), ((32768, 32768),))).sum() == 16 * 16
    if name == "HideAndSeek":
        assert recipe.draw(9, 9, 0)[0] == (8, *range(16))
    if name == "GridMask":
        assert recipe.draw(9, 9, 0)[0][0] == 32768


# --- RandomErasing


def test_erasing_has_the_area_and_shape_that_were_asked_for() -> None:
    found = masks({"RandomErasing": {"EPSILON": 1, "sl": 0.1, "sh": 0.2, "r1": "1.0/3.0"}}, 300)
    boxes = np.array([box(mask) for mask in found])
    height, width = boxes[:, 3] - boxes[:, 1], boxes[:, 2] - boxes[:, 0]
    area = height * width / 224**2
    assert 0.095 < area.min() < 0.11
    assert 0.19 < area.max() < 0.205
    ratio = height / width
    assert ratio.min() > 0.32
    assert ratio.max() < 3.1
    # The ratio is uniform over [1/3, 3]: a quarter is below 1.
    assert within(np.mean(ratio < 1), 0.25, 300)


def test_a_ratio_that_is_even_in_its_logarithm_is_wide_as_often_as_high() -> None:
    pipeline = piped({"RandomErasing": {"EPSILON": 1, "sl": 0.02, "sh": 0.1, "use_log_aspect": True}})
    drawn = np.array([pipeline.draw(9, 9, seed)[0] for seed in range(1000)])
    ratio = np.log(drawn[:, 3] / drawn[:, 2])
    assert within(np.mean(ratio < 0), 0.5, 1000)
    assert abs(np.abs(ratio).mean() - np.log(1 / 0.3) / 2) < 0.05


def test_erasing_reaches_everywhere_alike() -> None:
    pipeline = piped({"RandomErasing": {"EPSILON": 1}})
    left, top, width, height, _ = np.array([pipeline.draw(9, 9, seed)[0] for seed in range(2000)]).T / 65536
    for place, size in ((left, width), (top, height)):
        share = place / (1 - size)
        assert (share.min() >= 0, share.max() <= 1.0001) == (True, True)
        assert all(within(np.mean((share >= k / 4) & (share < (k + 1) / 4)), 0.25, 2000) for k in range(4))


@pytest.mark.parametrize("chance", [0.0, 0.25, 1.0])
def test_erasing_is_as_likely_as_was_asked_for(chance: float) -> None:
    pipeline = piped({"RandomErasing": {"EPSILON": chance}})
    assert within(np.mean([pipeline.draw(9, 9, seed) != ((),) for seed in range(1000)]), chance, 1000)


def test_a_rectangle_that_never_fits_is_given_up() -> None:
    pipeline = piped({"RandomErasing": {"EPSILON": 1, "sl": 1, "sh": 1}})
    assert {pipeline.draw(9, 9, seed) for seed in range(20)} == {((),)}
    # of half the view only rectangles of ratio 1/2 to 2 fit: those of one try alone are rarer than those of a hundred
    counts = []
    for attempt in (1, 100):
        half = piped({"RandomErasing": {"EPSILON": 1, "sl": 0.5, "sh": 0.5, "attempt": attempt}})
        counts.append(np.mean([half.draw(9, 9, seed) != ((),) for seed in range(500)]))
    assert within(counts[0], (2 - 0.5) / (1 / 0.3 - 0.3), 500)
    assert counts[1] == 1


def test_the_mean_is_what_a_hidden_pixel_is_after_normalization() -> None:
    pipeline = Pipeline.read(["NormalizeImage", {"RandomErasing": {"EPSILON": 1, "mean": [-1, 0.5, 1.0]}}], 224)
    pixels = view(WHITE, pipeline, 0)
    values = normalize(pixels[None], pipeline.mean, pipeline.std)[0][:, hidden(pixels)]
    np.testing.assert_allclose(values, np.repeat([[-1], [0.5], [1.0]], values.shape[1], 1), atol=0.01)


@pytest.mark.parametrize(("mean", "grey"), [(1e308, 255), (-1e308, 0)])
def test_a_mean_beyond_white_or_black_is_white_or_black(mean: float, grey: int) -> None:
    pixels = view(
        Image.new("RGB", (32, 32), (9, 9, 9)), piped({"RandomErasing": {"EPSILON": 1, "mean": [mean] * 3}}, 32), 0
    )
    assert set(np.unique(pixels)) == {9, grey}


def test_noise_is_normal_after_normalization_and_its_own_in_every_view() -> None:
    """Within what a byte holds: below -2.1 and above 2.2 standard deviations there is nothing."""
    pipeline = Pipeline.read(["NormalizeImage", {"RandomErasing": {"EPSILON": 1, "sl": 0.4, "mode": "pixel"}}], 224)
    values = []
    for seed in range(4):
        pixels = view(WHITE, pipeline, seed)
        values.append(normalize(pixels[None], pipeline.mean, pipeline.std)[0][:, hidden(pixels)][:, :10000])
    for channel in np.concatenate(values, 1):
        assert abs(channel.mean()) < 0.05
        assert abs(np.clip(np.random.default_rng(0).standard_normal(10**5), -2.1, 2.3).std() - channel.std()) < 0.03
    assert np.abs(np.corrcoef([drawn[0] for drawn in values])[np.triu_indices(4, 1)]).max() < 0.05
    assert np.abs(np.corrcoef(values[0])[np.triu_indices(3, 1)]).max() < 0.05


def test_a_colour_that_is_drawn_is_one_for_each_view() -> None:
    pipeline = piped({"RandomErasing": {"EPSILON": 1, "mode": "rand"}})
    colours = []
    for seed in range(30):
        pixels = view(WHITE, pipeline, seed)
        found = set(map(tuple, pixels[hidden(pixels)].tolist()))
        assert len(found) == 1
        colours.append(found.pop())
    assert len(set(colours)) == 30
    assert np.abs(np.mean(colours, 0) - IMAGENET).max() < 5 * 58 / np.sqrt(30)


def test_noise_has_the_same_grains_at_every_size() -> None:
    """Which show where two sizes meet: a view of 112 px has every other grain of one of 224."""
    large = piped({"RandomErasing": {"EPSILON": 1, "mode": "pixel", "sl": 0.3}})
    drawn = ((0, 0, 32768, 32768, 5),)
    high = large.render(WHITE, drawn)[:112, :112].astype(int)
    low = large.at(112).render(WHITE.resize((112, 112)), drawn)[:56, :56].astype(int)
    for beside in (np.roll(high, 1, 0), np.roll(high, 1, 1)):
        assert np.abs(np.corrcoef(high.ravel(), beside.ravel())[0, 1]) < 0.05
    blocks = high.reshape(56, 2, 56, 2, 3).transpose(0, 2, 1, 3, 4).reshape(56, 56, 4, 3)
    assert (blocks == low[:, :, None]).all(-1).any(-1).all()


# --- Cutout


def test_cutout_hides_a_square_and_raises_nothing() -> None:
    """PaddleClas's own, with its own defaults, knows no colour and raises AttributeError."""
    full = 0
    for mask in masks("Cutout", 200):
        left, top, right, bottom = box(mask)
        for first, last in ((left, right), (top, bottom)):
            assert last - first == 112 or (last - first < 112 and (first == 0 or last == 224))
        full += mask.sum() == 112**2
    # the center lies in the middle half of both directions
    assert within(full / 200, 0.25, 200)
    assert set(map(tuple, view(WHITE, piped("Cutout"), 0).reshape(-1, 3).tolist())) == {(255, 255, 255), IMAGENET}


def test_the_center_of_a_hole_is_anywhere() -> None:
    pipeline = piped({"Cutout": {"n_holes": 3, "length": 10}})
    centers = np.array([pipeline.draw(9, 9, seed)[0] for seed in range(1000)]).reshape(-1, 2) / 65536
    counts, *_ = np.histogram2d(*centers.T, bins=4, range=[[0, 1]] * 2)
    assert all(within(count / 3000, 1 / 16, 3000) for count in counts.ravel())


def test_several_holes_hide_more() -> None:
    shares = [masks({"Cutout": {"n_holes": count, "length": 20}}, 50).mean() for count in (1, 2, 4)]
    # less where holes meet or lie across the border
    assert all(0.8 * count < share * 224**2 / 400 <= count for count, share in zip((1, 2, 4), shares, strict=True))


# --- HideAndSeek


def test_hide_and_seek_hides_squares_all_over_the_view() -> None:
    """PaddleClas's takes the axes of [height, width, channels] for others, and hides three columns at most."""
    for size in (16, 32, 44, 56):
        found = masks({"HideAndSeek": {"grid_sizes": [size]}}, 60)
        edges = [*range(0, 224, size), 224]
        spans = list(pairwise(edges))
        squares = np.array(
            [
                [[mask[top:bottom, left:right].mean() for left, right in spans] for top, bottom in spans]
                for mask in found
            ]
        )
        assert set(np.unique(squares)) == {0, 1}
        assert within(squares.mean(), 0.5, squares.size)
        assert (np.abs(squares.mean(0) - 0.5) < 5 * np.sqrt(0.25 / 60)).all()


def test_the_squares_of_a_grid_are_counted_row_by_row() -> None:
    expected = np.zeros((224, 224), bool)
    expected[:56, 56:112] = expected[56:112, 112:168] = True
    np.testing.assert_array_equal(hidden(piped("HideAndSeek").render(WHITE, ((56, 1, 6),))), expected)


def test_a_view_has_any_of_the_grids() -> None:
    pipeline = piped("HideAndSeek")
    sizes = Counter(pipeline.draw(9, 9, seed)[0][0] for seed in range(1000))
    assert set(sizes) == {0, 16, 32, 44, 56}
    assert all(within(count / 1000, 0.2, 1000) for count in sizes.values())
    assert not hidden(pipeline.render(WHITE, ((0,),))).any()


@pytest.mark.parametrize("chance", [0.0, 0.2, 1.0])
def test_squares_are_hidden_as_often_as_was_asked_for(chance: float) -> None:
    found = masks({"HideAndSeek": {"grid_sizes": [32], "hide_prob": chance}}, 20)
    assert within(found[:, ::32, ::32].mean(), chance, 20 * 49)


# --- GridMask


@pytest.mark.parametrize("chance", [0.0, 0.4, 1.0])
def test_a_grid_is_as_likely_as_was_asked_for_from_the_first_view_on(chance: float) -> None:
    """PaddleClas's waits for epochs that nobody counts, and never hides anything."""
    pipeline = piped({"GridMask": {"prob": chance}})
    assert within(np.mean([pipeline.draw(9, 9, seed) != ((),) for seed in range(500)]), chance, 500)


@pytest.mark.parametrize("rotate", [1, 360])
@pytest.mark.parametrize(("mode", "share"), [(0, lambda bar: 1 - (1 - bar) ** 2), (1, lambda bar: (1 - bar) ** 2)])
def test_a_grid_hides_its_share_and_every_place_alike(mode: int, share: object, rotate: int) -> None:
    """Bars, or the squares between them; PaddleClas's takes the three channels for the width of the view."""
    for ratio in (0.3, 0.6):
        operator = {"GridMask": {"d1": 8, "d2": 24, "ratio": ratio, "mode": mode, "rotate": rotate}}
        found = masks(operator, 400, 64)
        assert abs(found.mean() - share(ratio)) < 0.02
        quarters = found.reshape(400, 4, 16, 4, 16).mean((0, 2, 4))
        assert np.abs(quarters - share(ratio)).max() < 0.05


def test_a_grid_has_the_period_and_the_place_that_were_drawn() -> None:
    pipeline = piped({"GridMask": {"d1": 32, "d2": 56, "ratio": 0.25}})
    unit = 65536 / 224
    shown = pipeline.render(WHITE, ((round(40 * unit), round(8 * unit), round(30 * unit), 0),))
    # From the center, which is at 112: bars of 10 begin at 8 and at 30, and every 40 px from there.
    place = np.arange(224) - 112
    expected = ((place - 8) % 40 < 10)[None, :] | ((place - 30) % 40 < 10)[:, None]
    np.testing.assert_array_equal(hidden(shown), expected)


def test_periods_and_turns_are_drawn_evenly() -> None:
    pipeline = piped({"GridMask": {"d1": 56, "d2": 112, "rotate": 30}})
    found = np.array([pipeline.draw(9, 9, seed)[0] for seed in range(1000)])
    period = found[:, 0] / 65536
    assert (period.min() >= 0.25, period.max() <= 0.5) == (True, True)
    assert within(np.mean(period < 0.375), 0.5, 1000)
    assert set(found[:, 3]) == set(range(30))
    for place in found[:, 1:3].T / found[:, 0]:
        assert within(np.mean(place < 0.5), 0.5, 1000)


def test_a_grid_turns_about_the_center_as_pillow_turns_a_picture_of_it() -> None:
    pipeline = piped({"GridMask": {"rotate": 360}})
    drawn = (20000, 5000, 9000)
    wide = pipeline.at(672).render(WHITE.resize((672, 672)), ((*(part // 3 for part in drawn), 0),))
    picture = Image.fromarray(wide).rotate(25, Image.Resampling.BILINEAR, fillcolor=(255, 255, 255))
    expected = hidden(np.asarray(picture)[224:448, 224:448])
    assert np.mean(hidden(pipeline.render(WHITE, ((*drawn, 25),))) == expected) > 0.97


# --- order and faults


@pytest.mark.parametrize(
    ("operators", "message"),
    [
        (["Cutout", "RandCropImage"], "operators that erase behind what resizes or crops, got Cutout, RandCropImage"),
        (["ResizeImage", "GridMask", "CropImage"], "operators that erase behind what resizes or crops"),
        (["NormalizeImage", "Cutout", "RandFlipImage"], "NormalizeImage once and last, but for operators that erase"),
        (["NormalizeImage", "Cutout", "NormalizeImage"], "NormalizeImage once and last, but for operators that erase"),
        (["NormalizeImage", "RandAugment"], "NormalizeImage once and last, but for operators that erase"),
        ([{"Cutout": {"length": 0}}], "Cutout.length: expected a whole number ≥ 1 and ≤ 8192, got 0"),
        ([{"Cutout": {"fillvalue": [0, 0, 0]}}], "Cutout.fillvalue: unknown key, did you mean fill_value"),
        ([{"Cutout": {"fill_value": [0, 300, 0]}}], r"Cutout.fill_value\[1\]: .* ≥ 0 and ≤ 255, got 300"),
        ([{"Cutout": {"fill_value": "none"}}], "Cutout.fill_value: expected a list .*, got 'none'"),
        ([{"RandomErasing": {"sl": 0.5, "sh": 0.4}}], "expected sl ≤ sh, got 0.5 and 0.4"),
        ([{"RandomErasing": {"r1": 3}}], "RandomErasing.r1: expected a number ≥ 0.01 and ≤ 1, got 3"),
        ([{"RandomErasing": {"r1": "1/0"}}], "RandomErasing.r1: .*got '1/0'"),
        ([{"RandomErasing": {"epsilon": 1}}], "RandomErasing.epsilon: unknown key, did you mean EPSILON"),
        ([{"RandomErasing": {"mode": "noise"}}], "RandomErasing.mode: expected const or rand or pixel, got 'noise'"),
        ([{"HideAndSeek": {"hide_prob": 2}}], "HideAndSeek.hide_prob: expected a number ≥ 0 and ≤ 1, got 2"),
        ([{"HideAndSeek": {"grid_sizes": []}}], "HideAndSeek.grid_sizes: expected a list of at least 1"),
        ([{"GridMask": {"d1": 9}}], "both d1 and d2, the smaller first, or neither, got 9 and null"),
        ([{"GridMask": {"d1": 9, "d2": 8}}], "both d1 and d2, the smaller first, or neither, got 9 and 8"),
        ([{"GridMask": {"ratio": 1}}], "GridMask.ratio: expected a number > 0 and < 1, got 1"),
        ([{"GridMask": {"mode": 2}}], "GridMask.mode: expected 0 or 1, got 2"),
    ],
)
def test_faults_say_what_was_expected(operators: list[object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_operators(operators)


@pytest.mark.parametrize("name", ["Cutout", "GridMask", "HideAndSeek", "RandomErasing"])
def test_a_pipeline_without_a_crop_is_told_so(name: str) -> None:
    with pytest.raises(ValueError, match=r"a view of 32 x 32 pixels, got 500 x 375"):
        Pipeline.read([name], 32).check()


def test_the_colour_that_follows_the_normalization_is_part_of_the_steps() -> None:
    """By which labels and stages know what they were made of."""

    def steps(*mean: float) -> tuple[Operator, ...]:
        return Pipeline.read(["RandCropImage", "Cutout", {"NormalizeImage": {"mean": list(mean)}}], 32).steps

    assert steps(0.1, 0.2, 0.3) == steps(0.1, 0.2, 0.3) != steps(0.3, 0.2, 0.1)
