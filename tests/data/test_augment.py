"""Augmentations of colour and shape: effects derived again pixel by pixel, draws counted, PaddleClas's defects."""

import colorsys
import json
from collections import Counter
from itertools import pairwise, permutations

import numpy as np
import pytest
from PIL import Image, ImageOps

from ssld.data.augment import (
    EFFECTS,
    IMAGENET_POLICY,
    PAPER,
    TIMM,
    TIMM_INCREASING,
    AutoAugment,
    ColorJitter,
    RandAugment,
    TimmAutoAugment,
    rand_config,
)
from ssld.data.transforms import Pipeline, read_operators, view

SIDE = 64
JITTER = {"ColorJitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}}
OPERATORS = ["AutoAugment", {"RandAugment": {"num_layers": 3, "magnitude": 8}}, "TimmAutoAugment", JITTER]


def noise(side: int = SIDE, low: int = 0, high: int = 256) -> np.ndarray:
    return np.random.default_rng(0).integers(low, high, (side, side, 3), dtype=np.uint8)


def slope(side: int = SIDE) -> np.ndarray:
    """Red and green say where the center of a pixel is: (column, row), as shares of 255."""
    column, row = np.meshgrid(*2 * [(np.arange(side) + 0.5) / side * 255])
    return np.stack([column, row, 0 * row + 128], -1).round().astype(np.uint8)


def changed(pixels: np.ndarray, effect: str, magnitude: float, direction: int = 1) -> np.ndarray:
    """By RandAugment, which applies one effect that we name."""
    operator = RandAugment(num_layers=1, magnitude=magnitude)
    return np.asarray(operator.apply(Image.fromarray(pixels), (list(PAPER).index(effect), direction))).astype(int)


def draws(operator: object, count: int) -> list[tuple[int, ...]]:
    pipeline = Pipeline.read([operator], 8)
    return [pipeline.draw(90, 70, seed)[0] for seed in range(count)]


def within(found: float, chance: float, count: int) -> bool:
    """Whether a share is what chance lets one expect of so many draws: 5 standard deviations."""
    return abs(found - chance) <= 5 * np.sqrt(chance * (1 - chance) / count)


# --- effects

grey = noise() @ np.array([299, 587, 114]) / 1000


@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("magnitude", [2, 5, 10])
@pytest.mark.parametrize(
    ("effect", "without"),
    [
        ("color", np.repeat(grey[..., None], 3, -1)),
        ("contrast", np.full((SIDE, SIDE, 3), grey.mean())),
        ("brightness", np.zeros((SIDE, SIDE, 3))),
    ],
)
def test_a_factor_mixes_the_image_with_what_it_is_without_that_quality(
    effect: str, without: np.ndarray, magnitude: int, direction: int
) -> None:
    factor = 1 + direction * 0.09 * magnitude
    expected = np.clip(factor * noise() + (1 - factor) * without, 0, 255)
    # Pillow keeps what the image is without it as whole grey levels.
    assert np.abs(changed(noise(), effect, magnitude, direction) - expected).max() <= 1.6


def test_sharpness_mixes_the_image_with_a_smoothed_one() -> None:
    pixels = noise().astype(float)
    around = sum(np.roll(pixels, (down, right), (0, 1)) for down in (-1, 0, 1) for right in (-1, 0, 1))
    smooth = (around + 4 * pixels) / 13
    for direction in (1, -1):
        expected = np.clip(smooth + (1 + 0.45 * direction) * (pixels - smooth), 0, 255)
        assert np.abs(changed(noise(), "sharpness", 5, direction) - expected)[1:-1, 1:-1].max() <= 1.6


@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize(
    ("effect", "source"),
    [
        ("shear_x", lambda x, y, s: (x + 0.3 * s * y, y)),
        ("shear_y", lambda x, y, s: (x, y + 0.3 * s * x)),
        ("translate_x", lambda x, y, s: (x + 150 / 331 * s, y)),
        ("translate_y", lambda x, y, s: (x, y + 150 / 331 * s)),
        (
            "rotate",
            lambda x, y, s: (
                0.5 + (x - 0.5) * np.cos(np.pi / 6 * s) - (y - 0.5) * np.sin(np.pi / 6 * s),
                0.5 + (x - 0.5) * np.sin(np.pi / 6 * s) + (y - 0.5) * np.cos(np.pi / 6 * s),
            ),
        ),
    ],
)
def test_a_pixel_shows_what_was_elsewhere_and_grey_where_nothing_was(
    effect: str, source: object, direction: int
) -> None:
    """Where it was, in shares of the side: at every resolution the same."""
    for side, magnitude in ((64, 10), (64, 3), (160, 10)):
        x, y = np.meshgrid(*2 * [(np.arange(side) + 0.5) / side])
        from_x, from_y = source(x, y, direction * magnitude / 10)
        found = changed(slope(side), effect, magnitude, direction)
        distance = np.minimum.reduce([from_x, 1 - from_x, from_y, 1 - from_y])
        inside, outside = distance > 2 / side, distance < -1 / side
        assert inside.mean() > 0.3
        assert np.abs(found[inside][:, 0] - 255 * from_x[inside]).max() < 2
        assert np.abs(found[inside][:, 1] - 255 * from_y[inside]).max() < 2
        assert (found[outside] == 128).all()


@pytest.mark.parametrize("name", ["nearest", "bilinear", "bicubic"])
def test_where_the_image_has_moved_away_the_colour_is_the_one_that_was_asked_for(name: str) -> None:
    operator = RandAugment(num_layers=1, magnitude=10, fillcolor=(1, 2, 3), interpolation=name)
    moved = np.asarray(operator.apply(Image.fromarray(slope()), (list(PAPER).index("translate_x"), 1)))
    assert (moved[:, -20:] == [1, 2, 3]).all()
    assert (moved[:, :30] != [1, 2, 3]).any(-1).all()


def test_autocontrast_stretches_each_channel_to_the_whole_range() -> None:
    pixels = noise(low=40, high=180)
    low, high = pixels.min((0, 1)).astype(float), pixels.max((0, 1)).astype(float)
    assert np.abs(changed(pixels, "autocontrast", 5) - (pixels - low) * 255 / (high - low)).max() <= 1


@pytest.mark.parametrize("side", [32, 128])
def test_equalize_makes_grey_levels_as_frequent_as_it_can(side: int) -> None:
    pixels = (noise(side).astype(float) ** 2 / 255).astype(np.uint8)
    found = changed(pixels, "equalize", 5)
    for channel in range(3):
        shares = np.cumsum(np.bincount(found[..., channel].ravel(), minlength=256)) / side**2
        # a level cannot be divided, so the most frequent one bounds what can be reached
        most = np.bincount(pixels[..., channel].ravel()).max() / side**2
        assert np.abs(shares - (np.arange(256) + 1) / 256).max() < most + 0.005
        order = np.argsort(pixels[..., channel], axis=None)
        assert (np.diff(found[..., channel].ravel()[order]) >= 0).all()


def test_equalize_is_pillows_where_there_are_many_pixels() -> None:
    image = Image.fromarray(noise(512, 30, 200))
    expected = np.asarray(ImageOps.equalize(image)).astype(int)
    assert np.abs(changed(np.asarray(image), "equalize", 5) - expected).max() <= 1
    flat = np.full((8, 8, 3), 77, np.uint8)
    np.testing.assert_array_equal(changed(flat, "equalize", 5), flat)


def test_invert_turns_grey_levels_around() -> None:
    np.testing.assert_array_equal(changed(noise(), "invert", 5), 255 - noise().astype(int))


def test_solarize_add_brightens_the_dark_half() -> None:
    operator = TimmAutoAugment(config_str="rand-m7")
    drawn = (list(TIMM).index("solarize_add"), 1, 7 << 16)
    found = np.asarray(operator.apply(Image.fromarray(noise()), drawn))
    np.testing.assert_array_equal(found, np.where(noise() < 128, noise().astype(int) + 77, noise()))


# --- magnitudes


def test_a_higher_magnitude_posterizes_more() -> None:
    """PaddleClas keeps int(0.4 magnitude) bits: the lower, the fewer, and none at all below 3."""
    ramp = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    levels = [len(np.unique(changed(ramp, "posterize", magnitude))) for magnitude in range(11)]
    assert levels == sorted(levels, reverse=True)
    assert (levels[0], levels[5], levels[10]) == (256, 64, 16)
    np.testing.assert_array_equal(changed(ramp, "posterize", 10), ramp & 0b11110000)


def test_a_higher_magnitude_solarizes_more() -> None:
    """PaddleClas inverts what is above 25.6 magnitude: everything at 0, nothing at 10."""
    ramp = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    for magnitude in range(11):
        kept = 256 * (10 - magnitude) // 10
        expected = np.where(ramp < kept, ramp, 255 - ramp)
        np.testing.assert_array_equal(changed(ramp, "solarize", magnitude), expected)


@pytest.mark.parametrize("effect", [name for name in PAPER if name not in ("autocontrast", "equalize", "invert")])
def test_magnitude_0_changes_nothing_and_more_changes_more(effect: str) -> None:
    distances = [np.abs(changed(slope(), effect, magnitude) - slope()).mean() for magnitude in range(11)]
    assert distances[0] == 0
    assert all(more >= less - 0.5 for less, more in pairwise(distances))
    # a slope is as sharp as it is smooth
    assert distances[10] > distances[3] or effect == "sharpness"


def test_the_levels_of_autoaugment_are_ten_even_steps_of_the_papers_ranges() -> None:
    ranges = {
        **dict.fromkeys(("shear_x", "shear_y"), np.linspace(0, 0.3, 10)),
        **dict.fromkeys(("translate_x", "translate_y"), np.linspace(0, 150 / 331, 10)),
        "rotate": np.linspace(0, 30, 10),
        **dict.fromkeys(("color", "contrast", "brightness", "sharpness"), 1 + np.linspace(0, 0.9, 10)),
        "posterize": np.linspace(8, 4, 10).round(),
        "solarize": np.linspace(256, 0, 10),
    }
    for effect, amounts in ranges.items():
        np.testing.assert_allclose([PAPER[effect](level / 9) for level in range(10)], amounts, atol=1e-12)


# timm's level 0 to 10, with inc1 and without
BY_LEVEL = {
    "rotate": ([0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30],) * 2,
    "posterize": ([4, 4, 4, 3, 3, 2, 2, 2, 1, 1, 0], [0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 4]),
    "solarize": (
        [256, 231, 205, 180, 154, 128, 103, 77, 52, 26, 0],
        [0, 25, 51, 76, 102, 128, 153, 179, 204, 230, 256],
    ),
    "solarize_add": ([0, 11, 22, 33, 44, 55, 66, 77, 88, 99, 110],) * 2,
    "color": ([1, 1.09, 1.18, 1.27, 1.36, 1.45, 1.54, 1.63, 1.72, 1.81, 1.9], np.linspace(0.1, 1.9, 11)),
    "contrast": (np.linspace(1, 1.9, 11), np.linspace(0.1, 1.9, 11)),
    "brightness": (np.linspace(1, 1.9, 11), np.linspace(0.1, 1.9, 11)),
    "sharpness": (np.linspace(1, 1.9, 11), np.linspace(0.1, 1.9, 11)),
    "shear_x": (np.linspace(0, 0.3, 11),) * 2,
    "shear_y": (np.linspace(0, 0.3, 11),) * 2,
    "translate_x": (np.linspace(0, 0.45, 11),) * 2,
    "translate_y": (np.linspace(0, 0.45, 11),) * 2,
}


@pytest.mark.parametrize("effect", BY_LEVEL)
def test_the_levels_of_timm_are_its_own(effect: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    monkeypatch.setattr("ssld.data.augment.EFFECTS", {effect: lambda image, amount, _: seen.append(amount) or image})
    for text, amounts in zip(("rand-inc1", "rand"), BY_LEVEL[effect], strict=True):
        operator = TimmAutoAugment(config_str=text)
        for level in range(11):
            operator.apply(Image.new("RGB", (4, 4)), (list(TIMM).index(effect), 1, level << 16))
        np.testing.assert_allclose(seen, amounts, atol=1e-12)
        seen.clear()


def test_a_direction_of_timm_is_a_side_for_what_has_two() -> None:
    two_sided = {name for name in TIMM_INCREASING if TIMM_INCREASING[name](0.7) != TIMM_INCREASING[name](-0.7)}
    shapes = {"rotate", "shear_x", "shear_y", "translate_x", "translate_y"}
    assert two_sided == shapes | {"color", "contrast", "brightness", "sharpness"}
    assert {name for name in TIMM if TIMM[name](0.7) != TIMM[name](-0.7)} == shapes


# --- what is drawn

# The paper's table 9: effect, chance in tenths, level.
TABLE = """
P48 R69, S65 A65, E88 E63, P67 P66, E47 S24, E44 R88, S63 E67, P85 EX2, R23 S68, E68 P46, R88 C40, R49 E62, E07 E88,
I64 EX8, C64 KX8, R88 CX2, C88 S87, H47 I68, W65 EX9, C40 E63, E47 S24, S65 A65, I64 EX8, C64 KX8, E88 E63
"""
LETTERS = {
    **{"P": "posterize", "R": "rotate", "S": "solarize", "A": "autocontrast", "E": "equalize"},
    **{"C": "color", "I": "invert", "K": "contrast", "H": "sharpness", "W": "shear_x"},
}


def test_the_pairs_of_autoaugment_are_the_papers() -> None:
    pairs = tuple(
        tuple((LETTERS[name], 1.0 if tenths == "X" else int(tenths) / 10, int(level)) for name, tenths, level in pair)
        for pair in (entry.split() for entry in TABLE.split(","))
    )
    assert pairs == IMAGENET_POLICY


def test_autoaugment_draws_every_pair_alike_and_each_effect_by_its_chance() -> None:
    found = draws("AutoAugment", 5000)
    counts = Counter(pair for pair, *_ in found)
    assert all(within(counts[pair] / 5000, 1 / 25, 5000) for pair in range(25))
    for place in (0, 1):
        for pair in range(25):
            taken = [drawn[1 + place] for drawn in found if drawn[0] == pair]
            assert within(np.mean(np.abs(taken)), IMAGENET_POLICY[pair][place][1], len(taken))
    directions = [direction for _, *both in found for direction in both if direction]
    assert within(np.mean(np.array(directions) > 0), 0.5, len(directions))


def test_randaugment_draws_every_effect_alike_in_both_directions() -> None:
    """PaddleClas rotates in one direction only."""
    found = np.array(draws({"RandAugment": {"num_layers": 3}}, 2000)).reshape(-1, 2)
    assert all(within(np.mean(found[:, 0] == effect), 1 / 14, 6000) for effect in range(14))
    assert set(found[:, 1]) == {-1, 1}
    rotations = found[found[:, 0] == list(PAPER).index("rotate"), 1]
    assert within(np.mean(rotations > 0), 0.5, len(rotations))


def test_timm_takes_half_of_what_it_draws() -> None:
    found = np.array(draws({"TimmAutoAugment": {"config_str": "rand-m7-n3"}}, 2000)).reshape(-1, 3)
    assert all(within(np.mean(found[:, 0] == effect), 1 / 15, 6000) for effect in range(15))
    assert within(np.mean(found[:, 1] != 0), 0.5, 6000)
    assert set(found[:, 2]) == {7 << 16}


def test_the_magnitudes_of_timm_are_normal_and_cut_to_what_there_is() -> None:
    found = np.array(draws({"TimmAutoAugment": {"config_str": "rand-m6-mstd0.5"}}, 2000)).reshape(-1, 3)[:, 2] / 65536
    assert abs(found.mean() - 6) < 5 * 0.5 / np.sqrt(4000)
    assert abs(found.std() - 0.5) < 5 * 0.5 / np.sqrt(8000)
    cut = np.array(draws({"TimmAutoAugment": {"config_str": "rand-m9-mstd2"}}, 2000)).reshape(-1, 3)[:, 2] / 65536
    assert (cut.min() >= 0, cut.max()) == (True, 10)
    # one standard deviation is 0.5: above 10 lies what is more than 1/2 of it above
    assert within(np.mean(cut == 10), 0.3085, 4000)


def test_weights_make_effects_rare_and_never_the_same_twice() -> None:
    found = np.array(draws({"TimmAutoAugment": {"config_str": "rand-m7-n2-w0"}}, 2000)).reshape(-1, 2, 3)[..., 0]
    assert (found[:, 0] != found[:, 1]).all()
    names = np.array(list(TIMM))[found]
    assert not {"posterize", "invert"} & set(names.ravel())
    assert within(np.mean(names[:, 0] == "rotate"), 0.3, 2000)
    assert np.mean(names == "solarize") < 0.02


def test_a_part_of_the_views_is_left_alone() -> None:
    for operator in ({"TimmAutoAugment": {"prob": 0.3}}, {"ColorJitter": {"prob": 0.3, "brightness": 0.4}}):
        assert within(np.mean([drawn != () for drawn in draws(operator, 1000)]), 0.3, 1000)
    untouched = Pipeline.read([{"TimmAutoAugment": {"prob": 0}}, {"ColorJitter": {"prob": 0, "hue": 0.5}}], SIDE)
    np.testing.assert_array_equal(view(Image.fromarray(noise()), untouched, 0), noise())


# --- config strings


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("rand", (10, 2, False, 0.0, False)),
        ("rand-m7-mstd0.5-inc1", (7, 2, False, 0.5, True)),
        ("rand-inc1-n3-m0-w0", (0, 3, True, 0.0, True)),
        # PaddleClas takes inc0 for inc1, because "0" is not empty
        ("rand-m9-inc0", (9, 2, False, 0.0, False)),
    ],
)
def test_a_config_string_is_read_as_timm_reads_it(text: str, wanted: tuple[object, ...]) -> None:
    config = rand_config(text)
    assert (config.m, config.n, config.w, config.mstd, config.inc) == wanted


REFUSED = [
    *("rand-m11", "rand-n0", "rand-n14", "rand-w1", "rand-inc2", "rand-m7.5", "rand-mstd11", "rand-p0.5", "rand-m"),
    *("rand-", "rand-m7-m8", "rand-m-7", "RAND-m7", "rand m7", "", "rand-mstdinf"),
]


@pytest.mark.parametrize("text", ["augmix-m5-w4-d2", "original-mstd0.5", "v0", "autoaug", *REFUSED])
def test_another_config_string_is_answered_with_what_is_taken(text: str) -> None:
    with pytest.raises(ValueError, match=rf"TimmAutoAugment.config_str: expected rand and .*m0 to m10.*got '{text}'"):
        read_operators([{"TimmAutoAugment": {"config_str": text}}])


# --- jitter


def test_jitter_draws_evenly_within_its_ranges_and_in_any_order() -> None:
    found = draws({"ColorJitter": {"brightness": 0.4, "contrast": 2, "saturation": [0.5, 0.75], "hue": 0.1}}, 2000)
    orders = Counter(drawn[::2] for drawn in found)
    assert set(orders) == set(permutations(range(4)))
    assert max(orders.values()) < 2000 / 24 + 5 * np.sqrt(2000 / 24)
    for kind, (low, high) in enumerate([(0.6, 1.4), (0, 3), (0.5, 0.75), (-0.1, 0.1)]):
        amounts = np.array([drawn[2 * drawn[::2].index(kind) + 1] for drawn in found]) / 65536
        assert low - 1e-4 <= amounts.min() < low + 0.01 * (high - low)
        assert high + 1e-4 >= amounts.max() > high - 0.01 * (high - low)
        assert abs(amounts.mean() - (low + high) / 2) < 5 * (high - low) / np.sqrt(12 * 2000)


@pytest.mark.parametrize(("kind", "effect"), [(0, "brightness"), (1, "contrast"), (2, "color")])
def test_what_is_jittered_is_what_the_effects_change(kind: int, effect: str) -> None:
    found = np.asarray(ColorJitter().apply(Image.fromarray(noise()), (kind, 3 << 15)))
    assert EFFECTS[effect](Image.fromarray(noise()), 1.5, None) == Image.fromarray(found)
    assert (found != noise()).any()


@pytest.mark.parametrize("hue", [0.1, -0.25, 0.5])
def test_hue_turns_the_colour_circle(hue: float) -> None:
    # HSV in bytes rounds a colour by what a step of saturation and hue is worth
    pixels = np.random.default_rng(1).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    found = np.asarray(ColorJitter().apply(Image.fromarray(pixels), (3, round(hue * 65536))))
    for was, now in zip(pixels.reshape(-1, 3) / 255, found.reshape(-1, 3) / 255, strict=True):
        angle, saturation, value = colorsys.rgb_to_hsv(*was)
        expected = colorsys.hsv_to_rgb((angle + hue) % 1, saturation, value)
        assert np.abs(now - expected).max() < 0.04


def test_jitter_of_nothing_gives_every_bit_back() -> None:
    for operator in ("ColorJitter", {"ColorJitter": {"brightness": 0, "contrast": [1, 1], "hue": 0}}):
        pipeline = Pipeline.read([operator], SIDE)
        for seed in range(24):
            np.testing.assert_array_equal(view(Image.fromarray(noise()), pipeline, seed), noise())


# --- views


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_view_is_drawn_the_same_at_every_size_and_is_no_other_seeds(operator: object) -> None:
    pipeline = Pipeline.read(["RandCropImage", "RandFlipImage", operator], 32)
    found = [pipeline.draw(90, 70, seed) for seed in range(200)]
    assert found == [pipeline.at(48).draw(90, 70, seed) for seed in range(200)]
    assert len({drawn[2] for drawn in found}) > 60
    assert {type(part) for drawn in found for parts in drawn for part in parts} == {int}


@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("effect", PAPER)
def test_teacher_and_student_see_the_same_effect(effect: str, direction: int) -> None:
    """Blocks of the large view average to the small one, but for edges and for where grey levels jump."""
    low = changed(slope(32), effect, 8, direction)
    high = changed(slope(96), effect, 8, direction).reshape(32, 3, 32, 3, 3).mean((1, 3))
    assert np.abs(low - high).mean() < 3
    assert np.median(np.abs(low - high)) < 3


@pytest.mark.parametrize("operator", OPERATORS)
def test_an_augmentation_leaves_its_source_as_it_was_and_the_size_too(operator: object) -> None:
    image = Image.fromarray(noise())
    pipeline = Pipeline.read([operator], SIDE)
    shown = [view(image, pipeline, seed) for seed in range(40)]
    np.testing.assert_array_equal(np.asarray(image), noise())
    assert {pixels.shape for pixels in shown} == {(SIDE, SIDE, 3)}
    assert sum((pixels != noise()).any() for pixels in shown) > 20


@pytest.mark.parametrize("operator", OPERATORS)
def test_json_gives_the_same_augmentation_back(operator: object) -> None:
    pipeline = Pipeline.read(["RandCropImage", operator], 32)
    text = json.dumps(pipeline.to_json())
    assert Pipeline.from_json(json.loads(text)) == pipeline


def test_autoaugment_applies_both_of_a_pair_in_their_order() -> None:
    # the first pair posterizes, level 8, and rotates, level 9
    image = Image.fromarray(noise())
    bits, degrees = PAPER["posterize"](8 / 9), PAPER["rotate"](-1)
    expected = np.asarray(image.point(lambda level: level & 0b11110000).rotate(-30, Image.Resampling.BILINEAR))
    assert (bits, degrees) == (4, -30)
    found = np.asarray(AutoAugment().apply(image, (0, 1, -1)))
    inner = np.s_[20:44, 20:44]
    np.testing.assert_array_equal(found[inner], expected[inner])
    np.testing.assert_array_equal(AutoAugment().apply(image, (0, 0, 0)), noise())


# --- faults


@pytest.mark.parametrize(
    ("operator", "message"),
    [
        ({"RandAugment": {"magnitude": 11}}, "RandAugment.magnitude: expected a number ≥ 0.* and ≤ 10.*, got 11"),
        ({"RandAugment": {"num_layers": 0}}, "RandAugment.num_layers: expected a whole number ≥ 1 and ≤ 14, got 0"),
        (
            {"RandAugment": {"fillcolor": [0, 0, 256]}},
            r"RandAugment.fillcolor\[2\]: .* ≥ 0 and ≤ 255, got 256",
        ),
        ({"RandAugment": {"magnitudes": 3}}, "RandAugment.magnitudes: unknown key, did you mean magnitude"),
        ({"AutoAugment": {"interpolation": "lanczos"}}, "expected nearest or bilinear or bicubic, got 'lanczos'"),
        ({"AutoAugment": {"policy": "v0"}}, "AutoAugment.policy: unknown key, known: fillcolor, interpolation"),
        ({"TimmAutoAugment": {"prob": 1.5}}, "TimmAutoAugment.prob: expected a number ≥ 0 and ≤ 1, got 1.5"),
        ({"TimmAutoAugment": {"config_str": 7}}, "TimmAutoAugment.config_str: expected text, got 7"),
        ({"ColorJitter": {"brightness": -0.1}}, "ColorJitter.brightness: expected a number ≥ 0 .*, got -0.1"),
        ({"ColorJitter": {"contrast": [2, 1]}}, r"ColorJitter.contrast: .* the smaller first, got \[2, 1\]"),
        ({"ColorJitter": {"contrast": [-1, 1]}}, r"ColorJitter.contrast: .* from 0 to 101 .*, got \[-1, 1\]"),
        ({"ColorJitter": {"saturation": 10**400}}, "ColorJitter.saturation: expected .* ≤ 100"),
        ({"ColorJitter": {"saturation": True}}, "ColorJitter.saturation: expected .*, got True"),
        ({"ColorJitter": {"hue": 0.6}}, "ColorJitter.hue: expected a number ≥ 0 and ≤ 0.5, or two from -0.5 to 0.5"),
        ({"ColorJitter": {"hue": float("nan")}}, "ColorJitter.hue: .*got nan"),
        ("RandAugmentV3", "got 'RandAugmentV3'; did you mean RandAugment"),
    ],
)
def test_faults_say_what_was_expected(operator: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_operators([operator])
