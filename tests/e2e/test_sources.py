"""Images as they lie on a disk: folders, lists and shards, as a run, a pack and an evaluation take them."""

from __future__ import annotations

import re
import shutil

import pytest

NAMES = ("unlabeled", "labeled", "validation")
POOL = "builtin:shapes?count=40&size=32&seed=1"
LABELED = "builtin:shapes?count=40&size=32&seed=2"
VALIDATION = "builtin:shapes?count=48&size=32&seed=3"


@pytest.fixture
def spoiled(photos):
    """A folder of JPEG images of which one was cut off in the middle; returns the folder and that file."""
    folder = photos("photos", POOL, suffix="jpg", layout="{third}/{number:03d}")
    victim = sorted(folder.rglob("*.jpg"))[7]
    victim.write_bytes(victim.read_bytes()[:200])
    return folder, victim


@pytest.mark.parametrize("kinds", ["folder, folder, shards", "shards, list, list"])
def test_a_run_takes_every_kind_of_source(ssld, photos, listed, kinds):
    photos("pool", POOL, suffix="jpg", layout="deep/{third}/deeper/{number:03d}")
    if kinds.startswith("shards"):
        ssld("pack", "pool", "pool-shards", "--unlabeled", "--shard-size", "15")
        sources = ("'pool-shards/shard-{000000..000002}.tar'", listed("train", LABELED), listed("val", VALIDATION))
    else:
        photos("train", LABELED)
        photos("val", VALIDATION, suffix="jpeg")
        ssld("pack", "val", "val-shards")
        sources = ("pool", "train", "val-shards")
    values = {f"data.{name}": source for name, source in zip(NAMES, sources, strict=True)}
    values |= {"stages.teach.epochs": 1, "stages.distill.epochs": 1}
    overrides = [word for key, value in values.items() for word in ("-o", f"{key}={value}")]
    done = ssld("run", ssld.recipe("teach", "distill"), *overrides, "--limit", "40", "--trust-teacher")
    assert [row["state"] for row in done.table()] == ["finished", "finished"]
    labeled, pool = re.findall(r" stages\), (\d+) images, 5 steps", done.err)
    # a 32nd of the pool is held out, shard by shard, so that small shards may give nothing
    assert int(labeled) == 40
    assert 36 <= int(pool) <= 40
    assert "the teacher stage teach, run by " in done.err
    assert "on 40 validation images" in done.err


@pytest.mark.parametrize("kind", ["list", "shards"])
def test_the_same_pixels_score_the_same_from_every_kind_of_source(ssld, reference, listed, kind):
    told = reference.result.table()[-1]
    if kind == "shards":
        packed = ssld("pack", VALIDATION, "val", "--shard-size", "20")
        assert packed.out == "48 images in 3 shards in val, 0 skipped\n"
        data = "val"
    else:
        # the command takes a list without a root, so the paths start from the list's own folder
        listed("val", VALIDATION)
        data = shutil.move(ssld.folder / "val.txt", ssld.folder / "val" / "val.txt")
    (row,) = ssld("eval", reference.directory / "fixres" / "best", data).table()
    assert row == {"images": "48", "top1": told["top-1"], "top5": told["top-5"]}


def test_pack_names_a_damaged_image_and_leaves_nothing_behind(ssld, spoiled):
    folder, victim = spoiled
    refused = ssld("pack", folder.name, "shards", "--unlabeled", code=65)
    assert f"{victim.relative_to(ssld.folder)}: expected a whole image" in refused.err
    assert "expected at most 0 damaged images, got 1" in refused.err
    assert not (ssld.folder / "shards").exists()


def test_pack_skips_as_many_damaged_images_as_it_may(ssld, spoiled):
    folder, victim = spoiled
    done = ssld("pack", folder.name, "shards", "--unlabeled", "--max-damaged", "1")
    assert done.out == "39 images in 1 shards in shards, 1 skipped\n"
    assert f"skipped, damaged: {victim.relative_to(ssld.folder)}: " in done.err
    before = ssld.snapshot(ssld.folder / "shards")
    assert "expected an empty or a new directory" in ssld("pack", folder.name, "shards", code=73).err
    assert ssld.snapshot(ssld.folder / "shards") == before
