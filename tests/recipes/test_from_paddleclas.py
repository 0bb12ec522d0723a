"""The page for users of PaddleClas says the same thing twice, names what there is, and nothing that there is not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from ssld import plugins
from ssld.data.transforms import MIXING, OPERATORS, Pipeline
from ssld.needs import defaults
from ssld.recipe import Recipe, read_recipe
from ssld.recipe.model import Keyed
from ssld.settings import TrainingSettings

PAGE = (Path(__file__).parents[2] / "docs" / "from_paddleclas.md").read_text("utf-8")
THEIRS, OURS = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
CARDS = 8
IGNORED = {"DecodeImage": None, "NormalizeImage": {"order"}}
"""Operators and arguments of theirs that the page says are left out here."""


@pytest.fixture(scope="module")
def theirs() -> dict[str, Any]:
    return yaml.safe_load(THEIRS)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    file = tmp_path_factory.mktemp("page") / "pplcnet.yaml"
    file.write_text(OURS, "utf-8")
    return read_recipe(file)


def test_both_train_the_same_network_by_the_same_teacher(theirs, ours):
    teacher, student = (next(iter(model.values())) for model in theirs["Arch"]["models"])
    stage = ours.stages["distill"]
    assert [setting.network for setting in stage.taught_by] == [teacher["name"]]
    assert (stage.student.name, stage.student.options) == (student["name"], {"dropout": student["dropout_prob"]})


def test_both_take_the_same_steps(theirs, ours):
    optimizer, stage = theirs["Optimizer"], ours.stages["distill"]
    assert stage.momentum == optimizer["momentum"]
    assert stage.weight_decay == optimizer["regularizer"]["coeff"]
    assert (stage.learning_rate, stage.warmup_epochs) == (
        optimizer["lr"]["learning_rate"],
        optimizer["lr"]["warmup_epoch"],
    )
    assert stage.batch_size == CARDS * theirs["DataLoader"]["Train"]["sampler"]["batch_size"]
    assert (stage.epochs, stage.save_interval) == (theirs["Global"]["epochs"], theirs["Global"]["save_interval"])
    assert f"on {CARDS} cards" in PAGE


@pytest.mark.parametrize(("part", "key"), [("Train", "train"), ("Eval", "eval")])
def test_both_prepare_images_alike(theirs, ours, part, key):
    operators = []
    for item in theirs["DataLoader"][part]["dataset"]["transform_ops"]:
        [(name, arguments)] = item.items()
        if (ignored := IGNORED.get(name, set())) is not None:
            operators.append({name: {word: value for word, value in arguments.items() if word not in ignored}})
    side = ours.images.resolution
    there, here = Pipeline.read(operators, side), Pipeline(getattr(ours.images, key), side, side)
    assert (here.steps, here.mean, here.std) == (there.steps, there.mean, there.std)


def test_both_read_the_same_lists(theirs, ours):
    loaders, data = theirs["DataLoader"], ours.data
    root = Path(loaders["Train"]["dataset"]["image_root"])
    assert Path(data.validation) == Path(loaders["Eval"]["dataset"]["cls_label_path"])
    assert {Path(data.labeled).parent, Path(data.unlabeled).parent} == {root}, "a list's root is its folder"
    # `cat` of the two is their one list
    whole = Path(loaders["Train"]["dataset"]["cls_label_path"]).name
    assert f"cat {Path(data.labeled).name} {Path(data.unlabeled).name} > {whole}" in PAGE


def test_the_same_number_stands_at_what_belongs_together():
    marks = [set(re.findall(r"\[(\d+)\]", "".join(re.findall(r"#.*", block)))) for block in (THEIRS, OURS)]
    # [2] is an option of the command line
    assert marks[0] - marks[1] == {"2"}
    assert marks[1] <= marks[0]


def test_every_loss_and_operator_that_there_is_has_its_place():
    missing = [found.name for found in plugins.find("losses") if not re.search(rf"[`:] ?{found.name}[`,]", PAGE)]
    missing += [name for name in OPERATORS if f"`{name}`" not in PAGE]
    assert not missing


def test_every_loss_is_given_options_that_it_has():
    for text in re.findall(r"`(\{name: .*?\})`", PAGE):
        if "…" in text:
            continue
        setting = yaml.safe_load(text)
        known = defaults(plugins.load("losses", setting.pop("name")))
        assert setting.keys() <= {"weight", *known}, text


def test_what_mixes_images_is_named_and_refused():
    [row] = [line for line in PAGE.splitlines() if "`batch_transform_ops`" in line]
    named = [name for name in re.findall(r"`(\w+)`", row) if name.lower().removesuffix("operator") in MIXING]
    assert len(named) == len(MIXING)
    for name in named:
        with pytest.raises(ValueError, match=f"got {name}"):
            Pipeline.read([name], 32)


def test_keys_of_a_recipe_that_are_named_exist():
    """In the table of options: what stands right and looks like a key is one, of a recipe, a stage or the labels."""
    table = PAGE[PAGE.index("\n## Options") :]
    right = [line.split(" | ", 1)[1] for line in table.splitlines() if line.startswith("| `")]
    keys = {key for cell in right for key in re.findall(r"`([a-z]+_[a-z_]+)`", cell)}
    known = {*Keyed.model_fields, *TrainingSettings.model_fields}
    assert keys
    assert keys <= known
