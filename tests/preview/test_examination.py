"""`ssld check`: how good, how sure and how fast each teacher is, and in which other way it would do better."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from ssld import plugins
from ssld.cli import main
from ssld.contracts import TeacherSpec
from ssld.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from ssld.errors import TeacherError
from ssld.preview import examination
from ssld.preview.examination import examine_all
from ssld.teaching.appraisal import BINS, appraise, calibration_error, entropy
from ssld.teaching.asking import Quality
from ssld.teaching.suspicion import Trial, Way, clearly_better, sizes, verdict, ways

HALVES = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
UNIT = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
PIXELS = ((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))
IMAGENET = (IMAGENET_MEAN, IMAGENET_STD)
COLORS = np.array([[40, 100, 200], [60, 120, 180], [80, 140, 160], [100, 160, 140]])
EACH = 8

# Numbers -------------------------------------------------------------------------------------------------------------


def probabilities(rows: int, classes: int) -> np.ndarray:
    return np.random.default_rng(1).dirichlet(np.full(classes, 0.3), rows)


def test_entropy_is_the_mean_of_minus_p_log_p():
    rows = probabilities(50, 6)
    expected = sum(-p * math.log(p) for row in rows for p in row) / len(rows)
    assert entropy(np.log(rows)) == pytest.approx(expected)


def test_the_calibration_error_is_that_of_a_loop_over_the_bins():
    rows = probabilities(400, 4)
    labels = np.random.default_rng(2).integers(0, 4, 400)
    expected = 0.0
    for number in range(BINS):
        low, high = number / BINS, (number + 1) / BINS
        inside = [i for i in range(400) if low < max(rows[i]) <= high]
        if inside:
            accuracy = sum(int(np.argmax(rows[i]) == labels[i]) for i in inside) / len(inside)
            confidence = sum(max(rows[i]) for i in inside) / len(inside)
            expected += len(inside) / 400 * abs(accuracy - confidence)
    assert 0.05 < expected < 1
    assert calibration_error(rows, labels) == pytest.approx(expected)


def test_a_teacher_that_is_as_sure_as_it_is_right_is_calibrated():
    """Of four answers at 0.75, three are right; of two at 1.0, both: a full bin at the very end has its place too."""
    rows = np.array([[0.75, 0.25]] * 4 + [[1.0, 0.0]] * 2)
    labels = np.array([0, 0, 0, 1, 0, 0])
    assert calibration_error(rows, labels) == 0
    assert calibration_error(rows, 1 - labels) == pytest.approx((4 * 0.5 + 2 * 1.0) / 6)


def test_an_appraisal_brings_all_numbers_together():
    logits = np.log(probabilities(90, 7)) + 3.0
    labels = np.arange(90) % 7
    found = appraise(logits, labels)
    order = np.argsort(-logits, axis=1)
    assert found.quality.accuracy == np.mean(order[:, 0] == labels)
    assert found.top5 == np.mean((order[:, :5] == labels[:, None]).any(axis=1))
    assert found.entropy == pytest.approx(entropy(np.log(probabilities(90, 7))))
    assert found.entropy_share == pytest.approx(found.entropy / math.log(7))


def test_a_teacher_that_knows_nothing_has_the_whole_entropy():
    found = appraise(np.zeros((30, 5)), np.arange(30) % 5)
    assert found.entropy_share == pytest.approx(1)
    assert found.poor
    assert not found.usable


def test_sizes_are_near_and_the_nearest_come_first():
    assert set(sizes(224)) == {128, 160, 192, 256, 288, 320, 384, 448}
    ratios = [max(size / 224, 224 / size) for size in sizes(224)]
    assert ratios == sorted(ratios)
    assert 224 not in sizes(224)


# The verdict ---------------------------------------------------------------------------------------------------------

CONFIGURED = Way(IMAGENET, 24)
CHANCE = Quality(0.25, 0.18, 0.34, 0.25, 100)
GOOD = Quality(0.7, 0.6, 0.78, 0.25, 100)
EQUAL = Quality(0.75, 0.65, 0.82, 0.25, 100)


def test_the_ways_are_all_normalizations_in_both_orders_but_the_configured_one():
    found = list(ways(CONFIGURED))
    assert {(way.norm, way.reversed) for way in found} == {
        (norm, order) for norm in (IMAGENET, HALVES, UNIT, PIXELS) for order in (False, True)
    } - {(IMAGENET, False)}
    assert {way.size for way in found} == {24}


def test_of_trials_that_are_equally_good_the_one_with_the_fewest_changes_counts():
    simple, double = Trial(Way(HALVES, 24), GOOD), Trial(Way(HALVES, 32, True), EQUAL)
    assert clearly_better(CHANCE, [double, simple], CONFIGURED) is simple
    assert verdict(CHANCE, [double, simple], CONFIGURED) == (
        "accuracy 25.0 % as configured; 70.0 % with mean 0.5,0.5,0.5 and std 0.5,0.5,0.5: is the teacher's mean/std "
        "wrong?"
    )


def test_what_is_better_by_luck_only_is_not_named():
    lucky = Trial(Way(HALVES, 24), Quality(0.3, 0.22, 0.4, 0.25, 100))
    assert clearly_better(CHANCE, [lucky], CONFIGURED) is None
    assert "not clearly better in any of 1 other ways; check its weights" in verdict(CHANCE, [lucky], CONFIGURED)


# Asking --------------------------------------------------------------------------------------------------------------

RECIPE = {
    "name": "tiny",
    "images": {
        "resolution": 24,
        "train": ["RandCropImage", "NormalizeImage"],
        "eval": [{"ResizeImage": {"resize_short": 24}}, "CropImage", "NormalizeImage"],
    },
    "data": {"labeled": "colors", "validation": "colors"},
    "stages": {
        "distill": {
            "kind": "distill",
            "teacher": {"network": "ResNet18_vd", "weights": "teacher.safetensors"},
            "student": "MobileNetV3_small_x0_35",
            "data": "labeled",
            "epochs": 1,
        },
    },
}


class ColorBlind:
    """Knows a class by the exact color of its pixels, when it is shown them as `way` says; else it answers class 0."""

    def __init__(self, spec: TeacherSpec, way: Way) -> None:
        self.spec, self.way, self.asked = spec, way, 0

    def predict(self, images: np.ndarray) -> np.ndarray:
        self.asked += len(images)
        mean, std = (np.array(part)[:, None, None] for part in self.way.norm)
        planes = images[:, ::-1] if self.way.reversed else images
        colors = 255 * (planes * std + mean).mean(axis=(2, 3))
        right = (np.abs(colors[:, None] - COLORS) < 1).all(axis=2) & (images.shape[2] == self.way.size)
        logits = np.where(right, 6.0, 0.0)
        logits[:, 0] += 3.0
        return logits.astype(np.float32)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory with a set of plain colors, one for each of four classes, and a recipe."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for label, color in enumerate(COLORS.tolist()):
        folder = Path("colors", f"class {label}")
        folder.mkdir(parents=True)
        for number in range(EACH):
            Image.new("RGB", (30, 26), tuple(color)).save(folder / f"{number}.png")
    Path("teacher.safetensors").write_bytes(b"is not read by a fake")
    write(RECIPE)
    return tmp_path


def write(recipe: dict) -> None:
    # JSON is YAML
    Path("tiny.yaml").write_text(json.dumps(recipe))


@pytest.fixture
def teachers(monkeypatch):
    """teachers(way): every teacher of a recipe that is no stage needs this way; returns those that are made, later."""
    real, made = plugins.call, []

    def install(way: Way, kind_of_teacher=ColorBlind) -> list:
        def call(kind, name, options, supplied=None):
            if kind != "teachers" or name == "stage":
                return real(kind, name, options, supplied)
            values = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, **(supplied or {}), **options}
            names = values.get("classes") if isinstance(values.get("classes"), tuple) else None
            spec = TeacherSpec(
                values["resolution"], "f", names, mean=tuple(values["mean"]), std=tuple(values["std"]), engine="fake 1"
            )
            made.append(kind_of_teacher(spec, way))
            return made[-1]

        monkeypatch.setattr(plugins, "call", call)
        return made

    return install


def test_a_good_teacher_is_told_with_its_numbers_and_tried_in_no_other_way(place, teachers):
    made = teachers(Way(IMAGENET, 24))
    report = examine_all("tiny.yaml")
    [found], [teacher] = report.examined, made
    assert (report.faults, found.trials, found.finding) == ([], (), "")
    assert (found.appraisal.quality.accuracy, found.appraisal.quality.images) == (1.0, 4 * EACH)
    assert teacher.asked == 4 * EACH + examination.BATCH
    header, [row] = report.table()
    cells = dict(zip(header, row, strict=True))
    # class 0 is said with 9 against 0, 0, 0, and each other with 6 against 3, 0, 0
    first, other = np.exp([9, 0, 0, 0]), np.exp([6, 3, 0, 0])
    shares = [first / first.sum(), *[other / other.sum()] * 3]
    nats = sum(-(share * np.log(share)).sum() for share in shares) / 4
    assert cells["teacher"] == "the teacher network ResNet18_vd of teacher.safetensors"
    assert cells["entropy"] == f"{nats:.3f} nats"
    assert cells["of log C"] == f"{nats / math.log(4):.1%}"
    # the two confidences lie in one bin, since both are above 14/15
    assert cells["calibration error"] == f"{1 - np.mean([share.max() for share in shares]):.4f}"
    assert (cells["chance"], cells["engine"], cells["unmapped"]) == ("0.2500", "fake 1", "")


@pytest.mark.parametrize(
    ("way", "finding"),
    [
        (Way(HALVES, 24), "100.0 % with mean 0.5,0.5,0.5 and std 0.5,0.5,0.5: is the teacher's mean/std wrong?"),
        (Way(UNIT, 24), "100.0 % with mean 0,0,0 and std 1,1,1: is the teacher's mean/std wrong?"),
        (Way(PIXELS, 24), "100.0 % with pixels from 0 to 255: is the teacher's mean/std wrong?"),
        (Way(IMAGENET, 24, True), "100.0 % with channels in BGR order: is the teacher's channel order wrong?"),
        (
            Way(HALVES, 24, True),
            "std 0.5,0.5,0.5, channels in BGR order: is the teacher's mean/std or channel order wrong?",
        ),
        (Way(IMAGENET, 32), "100.0 % with 32 px: is the teacher's size wrong?"),
    ],
    ids=["halves", "none", "pixels", "BGR", "halves and BGR", "size"],
)
def test_a_teacher_that_is_shown_its_images_in_a_wrong_way_is_found_out(place, teachers, way, finding):
    teachers(way)
    report = examine_all("tiny.yaml")
    [found] = report.examined
    assert found.appraisal.quality.accuracy == 0.25
    assert found.finding.endswith(finding)
    [right] = [trial for trial in found.trials if trial.quality.accuracy == 1]
    assert right.way == way
    with pytest.raises(TeacherError, match="expected better than chance"):
        report.raise_faults()


def test_a_teacher_of_two_stages_is_asked_once(place, teachers):
    made = teachers(Way(IMAGENET, 24))
    distill = RECIPE["stages"]["distill"]
    finetune = {**distill, "kind": "finetune", "from": "distill"}
    write({**RECIPE, "stages": {"distill": distill, "finetune": finetune}})
    assert len(examine_all("tiny.yaml").examined) == 1
    assert sum(teacher.asked for teacher in made) == 4 * EACH + examination.BATCH


def test_when_the_time_is_up_the_classes_are_still_even(place, teachers, monkeypatch):
    """The folder is sorted by class; a teacher that is slow must not be measured on the first class alone."""
    monkeypatch.setattr(examination, "SECONDS", 0.0)
    teachers(Way(IMAGENET, 24))
    [found] = examine_all("tiny.yaml").examined
    assert (found.appraisal.quality.images, found.appraisal.quality.chance) == (examination.BATCH, 0.25)


def test_a_poor_teacher_leaves_half_of_the_time_for_other_ways(place, teachers, monkeypatch):
    monkeypatch.setattr(examination.Examination, "_is_late", lambda self: True)
    made = teachers(Way(HALVES, 24))
    [found] = examine_all("tiny.yaml").examined
    assert found.appraisal.quality.images == examination.BATCH
    assert "mean 0.5,0.5,0.5" in found.finding
    assert made[0].asked == 2 * examination.BATCH + 7 * examination.BATCH


def test_the_mass_that_a_class_map_drops_is_told(place, teachers):
    """Of five classes the last goes to none of the data's; it has e^2 beside e^9, or beside e^6 and e^3."""

    class Wider(ColorBlind):
        def predict(self, images):
            return np.pad(super().predict(images), ((0, 0), (0, 1)), constant_values=2.0)

    teachers(Way(IMAGENET, 24), Wider)
    Path("map.tsv").write_text("".join(f"{label}\tclass {label}\n" for label in range(4)))
    teacher = {**RECIPE["stages"]["distill"]["teacher"], "class_map": "map.tsv", "classes": 5}
    write({**RECIPE, "stages": {"distill": {**RECIPE["stages"]["distill"], "teacher": teacher}}})
    [found] = examine_all("tiny.yaml").examined
    e = math.exp(1)
    dropped = [e**2 / (e**9 + 3 + e**2), *[e**2 / (e**6 + e**3 + 2 + e**2)] * 3]
    assert found.unmapped == pytest.approx(sum(dropped) / 4, rel=1e-5)
    assert found.appraisal.quality.accuracy == 1


# The command ---------------------------------------------------------------------------------------------------------


def check(*words: str):
    return CliRunner().invoke(main, ["check", "tiny.yaml", *words])


def files(place: Path) -> set[Path]:
    return {path for path in place.rglob("*") if "cache" not in path.parts}


def test_a_usable_teacher_ends_with_0_and_nothing_is_written(place, teachers):
    teachers(Way(IMAGENET, 24))
    before = files(place)
    found = check()
    assert found.exit_code == 0, found.output
    assert "the teacher network ResNet18_vd of teacher.safetensors  1.0000" in found.stdout
    assert files(place) == before


def test_a_teacher_at_chance_ends_with_65_after_all_is_shown(place, teachers):
    teachers(Way(HALVES, 24))
    found = check()
    assert found.exit_code == 65
    assert "accuracy 25.0 % as configured; 100.0 % with mean 0.5,0.5,0.5" in found.stdout
    assert "shown with" in found.stdout
    assert "expected better than chance, got top-1 0.250" in found.stderr


def test_a_teacher_that_is_still_to_be_trained_is_named_and_the_others_are_shown(place, teachers):
    teachers(Way(IMAGENET, 24))
    teach = {"kind": "pretrain", "network": "MobileNetV3_small_x0_35", "data": "labeled", "epochs": 1}
    both = [{"stage": "teach"}, RECIPE["stages"]["distill"]["teacher"]]
    write({**RECIPE, "stages": {"teach": teach, "distill": {**RECIPE["stages"]["distill"], "teacher": both}}})
    found = check()
    assert found.exit_code == 2
    assert "the teacher network ResNet18_vd of teacher.safetensors  1.0000" in found.stdout
    assert "expected the stage teach to be finished, got: not run yet; run it first, with ssld run" in found.stderr
