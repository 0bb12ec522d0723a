"""The picture that `ssld augment` draws: the image, and the views that training would show of it."""

from __future__ import annotations

import json
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from ssld.cli import main
from ssld.data.transforms import OPERATORS as KNOWN
from ssld.data.transforms import Pipeline, view
from ssld.errors import DataError, OutputError, RecipeError
from ssld.preview.augment import views_of
from ssld.seeds import derive

OPERATORS = ["RandCropImage", "RandFlipImage", {"RandAugment": {"magnitude": 7}}, "NormalizeImage", "Cutout"]
SOURCE = "builtin:shapes?count=4&size=16"
SIDE, GAP = 32, 4


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    stage = {"kind": "pretrain", "network": "MobileNetV3_small_x0_35", "data": "labeled", "epochs": 1}
    data = {"labeled": SOURCE, "validation": SOURCE}
    images = {"resolution": SIDE, "train": OPERATORS}
    file = tmp_path / "some.yaml"
    file.write_text(json.dumps({"name": "some", "images": images, "data": data, "stages": {"train": stage}}))
    return file


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    file = tmp_path / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((120, 80)).save(file)
    return file


def picture(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image)


def cell(page: np.ndarray, row: int, column: int) -> np.ndarray:
    top, left = (GAP + place * (SIDE + GAP) for place in (row, column))
    return page[top : top + SIDE, left : left + SIDE]


def test_the_picture_holds_the_image_and_the_views_of_labels_of_seed_0(recipe: Path, photo: Path) -> None:
    out = photo.with_name("views.png")
    told = views_of(recipe, photo, out, views=6)
    assert told == f"{out}: photo.png and 6 views of it by RandCropImage, RandFlipImage, RandAugment, Cutout"
    page, source = picture(out), Image.fromarray(picture(photo))
    assert page.shape == (GAP + 3 * (SIDE + GAP),) * 2 + (3,)
    first = cell(page, 0, 0)
    whole = np.asarray(source.resize((32, 21), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(first[5:26], whole)
    assert (first[:5] == 255).all()
    assert (first[26:] == 255).all()
    pipeline = Pipeline.read(OPERATORS, SIDE)
    for number in range(6):
        expected = view(source, pipeline, derive(0, "photo.png", number))
        np.testing.assert_array_equal(cell(page, *divmod(number + 1, 3)), expected)
    assert (page[-SIDE:, -SIDE:] == 255).all()


def test_the_same_call_gives_the_same_picture_and_an_override_another(recipe: Path, photo: Path) -> None:
    made = []
    for overrides in ((), (), ("images.train=[RandCropImage]",)):
        views_of(recipe, photo, photo.with_name("out.png"), overrides=overrides)
        made.append(photo.with_name("out.png").read_bytes())
    assert made[0] == made[1] != made[2]


def test_a_view_of_a_large_resolution_is_shown_small(recipe: Path, photo: Path) -> None:
    out = photo.with_name("large.png")
    views_of(recipe, photo, out, overrides=("images.resolution=2048",), views=1)
    assert picture(out).shape == (388 + 4, 2 * 388 + 4, 3)


def test_what_is_no_image_no_picture_and_no_recipe_is_told(recipe: Path, photo: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"some\.yaml: expected a whole JPEG, PNG or WebP image"):
        views_of(recipe, recipe, tmp_path / "out.png")
    with pytest.raises(DataError, match="none: expected an image file, got: No such file"):
        views_of(recipe, tmp_path / "none", tmp_path / "out.png")
    with pytest.raises(OutputError, match=r"cannot write .*out\.jpg: expected a name that ends with \.png"):
        views_of(recipe, photo, tmp_path / "out.jpg")
    with pytest.raises(RecipeError, match=r"images\.train: expected a view of 32 x 32 pixels"):
        views_of(recipe, photo, tmp_path / "out.png", overrides=("images.train=[Cutout]",))
    assert not (tmp_path / "out.png").exists()


def test_the_command_says_what_it_has_drawn(recipe: Path, photo: Path, tmp_path: Path) -> None:
    out = tmp_path / "views.png"
    words = ["augment", str(recipe), str(photo), str(out), "--views", "3", "-o", "images.train=[RandCropImage]"]
    result = CliRunner().invoke(main, words)
    assert (result.exit_code, result.output) == (0, f"{out}: photo.png and 3 views of it by RandCropImage\n")
    assert picture(out).shape == (GAP + 2 * (SIDE + GAP),) * 2 + (3,)


# --- docs/augmentations.md

DOCS = Path(__file__).parents[2] / "docs"


def written_commands() -> dict[str, list[str]]:
    """The commands of the document by the name of the operator that each shows."""
    text = (DOCS / "augmentations.md").read_text("utf-8").replace("\\\n", " ")
    found = re.findall(r"^### (\w+)\n.*?^ssld (augment \S+ china\.jpg .*?)$", text, re.MULTILINE | re.DOTALL)
    return {name: shlex.split(line) for name, line in found}


def test_the_document_shows_every_augmentation() -> None:
    assert list(written_commands()) == list(KNOWN)[5:]
    text = (DOCS / "augmentations.md").read_text("utf-8")
    shown = re.findall(r"!\[[^]]+\]\((images/\w+\.png)\)", text)
    assert shown == [f"images/{name}.png" for name in written_commands()]


@pytest.mark.parametrize("name", written_commands())
def test_the_pictures_of_the_document_are_what_its_commands_draw(name: str, tmp_path: Path) -> None:
    library = find_spec("sklearn")
    assert library is not None
    assert library.origin is not None
    photo = Path(library.origin).with_name("datasets") / "images" / "china.jpg"
    command, recipe, _, out, *options = written_commands()[name]
    assert out == f"docs/images/{name}.png"
    words = [command, recipe, str(photo), str(tmp_path / "out.png"), *options]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    kept, drawn = (picture(file).astype(int) for file in (DOCS / "images" / f"{name}.png", tmp_path / "out.png"))
    # another build of Pillow may decode and resize to other last bits
    assert np.abs(kept - drawn).mean() < 3
