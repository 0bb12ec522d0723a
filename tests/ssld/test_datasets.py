"""Classes that no source names are numbers, and a number that no image has is a slip."""

from __future__ import annotations

import pytest
from PIL import Image

from ssld.datasets import open_datasets
from ssld.errors import DataError, RecipeError
from ssld.recipe import read_recipe

RECIPE = """
name: numbers
data:
  labeled: labeled.txt
  validation: validation.txt
stages:
  teach: {kind: pretrain, network: ResNet18_vd, data: labeled, epochs: 1}
"""


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """The datasets of two list files with these labels."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE)

    def open_lists(labeled: list[int], validation: list[int], limit: int | None = None):
        for name, labels in (("labeled", labeled), ("validation", validation)):
            for number in range(len(labels)):
                Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{name}{number}.png")
            lines = [f"{name}{number}.png {label}" for number, label in enumerate(labels)]
            (tmp_path / f"{name}.txt").write_text("\n".join(lines) + "\n")
        return open_datasets(read_recipe("recipe.yaml"), limit, tmp_path / "cache")

    return open_lists


def test_numbers_without_gaps_are_the_classes(opened):
    assert opened([0, 2, 1, 1], [1, 0]).classes == ("0", "1", "2")
    assert opened([0, 1], [2, 0]).classes == ("0", "1", "2"), "a class may be seen in one of the sources alone"


def test_a_number_far_off_is_named_with_its_image(opened):
    message = (
        r"data\.labeled: expected labels without gaps, got 99 for .*labeled1\.png and none for 3; correct the label"
    )
    with pytest.raises(DataError, match=message):
        opened([0, 99, 1, 2], [1, 0])


def test_a_limit_is_no_gap(opened):
    datasets = opened([0, 1, 2, 3], [0, 1, 2, 3], limit=2)
    assert (len(datasets.sources["labeled"]), len(datasets.classes)) == (2, 4)


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("builtin:digits?part=pol", r"'builtin:digits\?part=pol': expected a part, .*did you mean pool\?"),
        ("{builtin: shape}", "'builtin:shape': expected a built-in source, .*did you mean shapes?"),
        ("s3://bucket/train", "'s3://bucket/train': expected a folder, .*copy the data to a local disk"),
        (f"s3://{'x/' * 2000}", "'s3://(x/){20,30}x?…: expected a folder, "),
    ],
)
def test_a_source_that_is_none_is_placed_in_the_recipe(source, fault, tmp_path):
    recipe = RECIPE.replace("labeled.txt", "builtin:shapes?count=8").replace("validation.txt", source)
    (tmp_path / "recipe.yaml").write_text(recipe)
    with pytest.raises(RecipeError, match=rf"recipe\.yaml:5:3: data\.validation: {fault}"):
        open_datasets(read_recipe(tmp_path / "recipe.yaml"), None, tmp_path / "cache")
