"""Every shipped recipe is a lab note that reads, and the published ones hold the published numbers."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ssld
from ssld import plugins
from ssld.checkpoint import write_weights
from ssld.recipe import Recipe, read_recipe, schema
from ssld.settings import TrainingSettings

RECIPES = Path(__file__).parents[2] / "recipes"
FILES = sorted(RECIPES.rglob("*.yaml"))
NOTE = ("source:", "command:", "result:", "cost:", "date:")
LONGEST = 50


def named(path: Path) -> str:
    return path.relative_to(RECIPES).with_suffix("").as_posix()


every_recipe = pytest.mark.parametrize("path", FILES, ids=named)


def test_there_are_recipes_for_a_first_run_and_for_every_published_student() -> None:
    assert {"mobilenetv3_ssld", *PUBLISHED, WITH_FIX} <= set(map(named, FILES))


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


# PaddleClas 2.0, docs/zh_CN/advanced_tutorials/distillation/distillation.md: §3.2 for distill, §3.3 for finetune, every
# row but Res2Net200_vd_26w_4s, which is no network here. Momentum is 0.9 throughout, warm-up 5 epochs.
# network: epochs, images per step, base learning rate, L2 coefficient, top-1
PUBLISHED = {
    "imagenet/mobilenetv1_ssld": {
        "distill": ("MobileNetV1", 360, 4096, 1.6, 3e-5, "0.7765"),
        "finetune": ("MobileNetV1", 30, 4096, 0.016, 3e-5, "0.7789"),
    },
    "imagenet/mobilenetv2_ssld": {
        "distill": ("MobileNetV2", 360, 3072, 0.54, 1e-5, "0.7634"),
        "finetune": ("MobileNetV2", 30, 3072, 0.0054, 1e-5, "0.7673"),
    },
    "imagenet/mobilenetv3_large_ssld": {
        "distill": ("MobileNetV3_large_x1_0", 360, 5760, 3.65625, 1e-5, "0.7854"),
        "finetune": ("MobileNetV3_large_x1_0", 30, 2048, 0.008, 1e-5, "0.7896"),
    },
    "imagenet/mobilenetv3_small_ssld": {
        "distill": ("MobileNetV3_small_x1_0", 360, 5760, 3.65625, 1e-5, "0.7011"),
        "finetune": ("MobileNetV3_small_x1_0", 30, 6400, 0.025, 1e-5, "0.7128"),
    },
    "imagenet/resnet50_vd_ssld": {
        "distill": ("ResNet50_vd", 360, 1024, 0.4, 7e-5, "0.8207"),
        "finetune": ("ResNet50_vd", 60, 1024, 0.004, 7e-5, "0.8239"),
    },
    "imagenet/resnet101_vd_ssld": {
        "distill": ("ResNet101_vd", 360, 1024, 0.4, 7e-5, "0.8341"),
        "finetune": ("ResNet101_vd", 30, 1024, 0.004, 7e-5, "0.8373"),
    },
}
WITH_FIX = "imagenet/resnet50_vd_ssld_v2"
LADDERS = (*PUBLISHED, WITH_FIX)
STAGES = [(name, stage) for name, stages in PUBLISHED.items() for stage in stages]


def published_teacher(name: str) -> tuple[str, str]:
    """§3.1: the big one for the ResNets, and what became of ResNet50_vd for the MobileNets; with its top-1."""
    return ("ResNet50_vd", "0.8239") if "mobilenet" in name else ("ResNeXt101_32x16d_wsl", "0.8424")


@pytest.mark.parametrize(("name", "stage"), STAGES)
def test_a_published_stage_has_the_published_numbers(name: str, stage: str) -> None:
    network, epochs, batch_size, learning_rate, l2, top1 = PUBLISHED[name][stage]
    path = RECIPES / f"{name}.yaml"
    recipe = read_recipe(path)
    settings: Any = recipe.stages[stage]
    student = settings.student or recipe.stages[settings.start].student
    assert student.name == network
    assert (settings.epochs, settings.batch_size, settings.learning_rate) == (epochs, batch_size, learning_rate)
    assert (settings.weight_decay, settings.momentum, settings.warmup_epochs) == (l2, 0.9, 5)
    assert f"{top1} after {stage}" in path.read_text("utf-8")


@pytest.mark.parametrize("name", LADDERS)
def test_a_published_ladder_has_the_published_teacher_loss_and_data(name: str) -> None:
    stages: dict[str, Any] = dict(read_recipe(RECIPES / f"{name}.yaml").stages)
    assert set(stages["distill"].data) == {"unlabeled", "labeled"}, "published: the mined pool and ImageNet-1k"
    assert stages["finetune"].data == ("labeled",)
    assert stages["finetune"].hard == 0, "published: no label is read before the classifier is fixed"
    for stage in ("distill", "finetune"):
        assert [term.name for term in stages[stage].loss] == ["js"]
        assert [teacher.network for teacher in stages[stage].taught_by] == [published_teacher(name)[0]]


@pytest.mark.parametrize("name", LADDERS)
def test_the_note_names_the_teacher_and_how_good_it_is(name: str) -> None:
    text = (RECIPES / f"{name}.yaml").read_text("utf-8")
    [line] = [line for line in text.splitlines() if line.startswith("# teacher:")]
    assert all(fact in line for fact in published_teacher(name))


def test_the_second_version_adds_autoaugment_half_the_decay_and_a_fixed_classifier() -> None:
    """§3.4: weight decay falls to 2e-5, and at 320 px the classifier alone is trained, on the labels."""
    first, second = (read_recipe(RECIPES / f"imagenet/resnet50_vd_ssld{which}.yaml") for which in ("", "_v2"))
    assert {"weight_decay": 7e-5}.items() <= dict(first.stages["distill"]).items()
    for stage in ("distill", "finetune"):
        assert second.stages[stage] == first.stages[stage].model_copy(update={"weight_decay": 2e-5})
    operators = [[type(operator).__name__ for operator in recipe.images.train] for recipe in (first, second)]
    assert operators[1] == [*operators[0][:-1], "AutoAugment", "NormalizeImage"]
    fixres: Any = second.stages["fixres"]
    assert (fixres.start, fixres.data, fixres.resolution) == ("finetune", ("labeled",), 320)


@pytest.mark.parametrize("name", LADDERS)
def test_a_published_ladder_is_planned_where_its_data_and_teacher_are(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thirty-second of the pool is held out; of the rest whole batches are shown, no more than all epochs need."""
    monkeypatch.chdir(tmp_path)
    recipe = read_recipe(RECIPES / f"{name}.yaml")
    for teacher in recipe.stages["distill"].taught_by:
        assert teacher.file is not None
        write_weights(Path(teacher.file), {"weight": np.zeros(1, np.float32)})
    sources = {"unlabeled": 320, "labeled": 40, "validation": 4}
    overrides = [f"data.{key}=builtin:shapes?size=8&count={count}" for key, count in sources.items()]
    planned = ssld.plan(RECIPES / f"{name}.yaml", overrides=overrides).stages
    assert [node.name for node, _ in planned] == list(recipe.stages)
    for node, status in planned:
        assert status.kind == "new"
        assert node.samples == (310 + 40 if node.name == "distill" else 40)
        assert (
            0 <= node.steps * node.settings.batch_size - node.settings.epochs * node.samples < node.settings.batch_size
        )
