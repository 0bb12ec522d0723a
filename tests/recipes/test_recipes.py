"""Every shipped recipe is a lab note that reads, and the published ones hold the published numbers."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest

from ssld import plugins
from ssld.recipe import Recipe, read_recipe, schema
from ssld.settings import TrainingSettings

RECIPES = Path(__file__).parents[2] / "recipes"
FILES = sorted(RECIPES.rglob("*.yaml"))
NOTE = ("source:", "command:", "result:", "cost:", "date:")
LONGEST = 50


def named(path: Path) -> str:
    return path.relative_to(RECIPES).with_suffix("").as_posix()


every_recipe = pytest.mark.parametrize("path", FILES, ids=named)


def test_there_are_recipes_for_a_first_run_and_for_imagenet() -> None:
    assert {"mobilenetv3_ssld", "imagenet/resnet50_vd_ssld", "imagenet/mobilenetv3_large_ssld"} <= set(
        map(named, FILES)
    )


@every_recipe
def test_it_opens_with_a_lab_note(path: Path) -> None:
    note = list(takewhile(lambda line: line.startswith("#"), path.read_text("utf-8").splitlines()))
    entries = [line.removeprefix("# ") for line in note]
    assert entries, "expected a comment before the first key"
    assert not entries[0].startswith(NOTE), "expected one sentence on what the recipe is, before the notes"
    for word in NOTE:
        [entry] = [entry for entry in entries if entry.startswith(word)]
        assert entry.removeprefix(word).strip(), f"{word} is empty"


@every_recipe
def test_it_fits_a_screen(path: Path) -> None:
    assert len(path.read_text("utf-8").splitlines()) <= LONGEST


@every_recipe
def test_it_reads_and_is_called_like_its_file(path: Path) -> None:
    assert read_recipe(path).name == path.stem


def networks(recipe: Recipe) -> Iterator[str]:
    for settings in recipe.stages.values():
        assert isinstance(settings, TrainingSettings)
        yield from [settings.student.name] if settings.student else []
        yield from [teacher.network for teacher in settings.taught_by if teacher.network]


@every_recipe
def test_its_networks_are_installed(path: Path) -> None:
    named_here = set(networks(read_recipe(path)))
    assert named_here
    assert named_here <= {found.name for found in plugins.find("students")}


@every_recipe
def test_its_keys_are_those_an_editor_knows(path: Path) -> None:
    """The schema names every key that the recipe uses, down to those of each stage."""
    whole = schema()
    value = read_recipe(path).tree.value
    assert value.keys() <= whole["properties"].keys()
    kinds = {
        choice["if"]["properties"]["kind"]["const"]: choice["then"]["$ref"].rpartition("/")[2]
        for choice in whole["properties"]["stages"]["additionalProperties"]["allOf"]
    }
    for stage in value["stages"].values():
        assert stage.keys() <= whole["$defs"][kinds[stage["kind"]]]["properties"].keys()


def test_the_first_recipe_is_the_whole_ladder() -> None:
    recipe = read_recipe(RECIPES / "mobilenetv3_ssld.yaml")
    assert list(recipe.stages) == ["teach", "distill", "finetune", "fixres"]
    assert [settings.kind for settings in recipe.stages.values()] == ["pretrain", "distill", "finetune", "fixres"]


# PaddleClas, docs/zh_CN/training/advanced/ssld.md: §3.2 for distill, §3.3 for finetune. Momentum is 0.9 throughout.
# network: epochs, images per step, base learning rate, L2 coefficient, top-1
PUBLISHED = {
    "imagenet/mobilenetv3_large_ssld": {
        "distill": ("MobileNetV3_large_x1_0", 360, 5760, 3.65625, 1e-5, "0.7854"),
        "finetune": ("MobileNetV3_large_x1_0", 30, 2048, 0.008, 1e-5, "0.7896"),
    },
    "imagenet/resnet50_vd_ssld": {
        "distill": ("ResNet50_vd", 360, 1024, 0.4, 7e-5, "0.8207"),
        "finetune": ("ResNet50_vd", 60, 1024, 0.004, 7e-5, "0.8239"),
    },
}
TEACHERS = {
    "imagenet/mobilenetv3_large_ssld": ("ResNet50_vd", "0.8239"),
    "imagenet/resnet50_vd_ssld": ("ResNeXt101_32x16d_wsl", "0.8424"),
}
CASES = [(name, stage) for name, stages in PUBLISHED.items() for stage in stages]


@pytest.mark.parametrize(("name", "stage"), CASES)
def test_a_published_stage_has_the_published_numbers(name: str, stage: str) -> None:
    network, epochs, batch_size, learning_rate, l2, top1 = PUBLISHED[name][stage]
    path = RECIPES / f"{name}.yaml"
    recipe = read_recipe(path)
    settings: Any = recipe.stages[stage]
    student = settings.student or recipe.stages[settings.start].student
    assert student.name == network
    assert (settings.epochs, settings.batch_size, settings.learning_rate) == (epochs, batch_size, learning_rate)
    assert (settings.weight_decay, settings.momentum, settings.warmup_epochs) == (l2, 0.9, 5)
    assert [term.name for term in settings.loss] == ["js"]
    [teacher] = settings.taught_by
    assert teacher.network == TEACHERS[name][0]
    assert f"{top1} after {stage}" in path.read_text("utf-8")


@pytest.mark.parametrize("name", TEACHERS)
def test_a_published_ladder_reads_no_label_before_the_classifier_is_fixed(name: str) -> None:
    stages: dict[str, Any] = dict(read_recipe(RECIPES / f"{name}.yaml").stages)
    assert set(stages["distill"].data) == {"unlabeled", "labeled"}, "published: the mined pool and ImageNet-1k"
    assert stages["finetune"].data == ("labeled",)
    assert stages["finetune"].hard == 0


@pytest.mark.parametrize(("name", "teacher"), TEACHERS.items())
def test_the_note_names_the_teacher_and_how_good_it_is(name: str, teacher: tuple[str, str]) -> None:
    text = (RECIPES / f"{name}.yaml").read_text("utf-8")
    [line] = [line for line in text.splitlines() if line.startswith("# teacher:")]
    assert all(fact in line for fact in teacher)


def test_the_published_classifier_is_fixed_at_320_pixels() -> None:
    stage: Any = read_recipe(RECIPES / "imagenet/resnet50_vd_ssld.yaml").stages["fixres"]
    assert (stage.start, stage.data, stage.resolution) == ("finetune", ("labeled",), 320)
