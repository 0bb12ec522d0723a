"""A stranger's package, as the example has it: installed, tested and named in a recipe."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "custom_teacher"
RECIPE = """\
# Digits from a teacher that was never trained.
name: borrowed
images:
  resolution: 32
  train: [RandCropImage: {scale: [0.7, 1.0]}, NormalizeImage]
  eval: [ResizeImage: {resize_short: 32}, CropImage, NormalizeImage]
data:
  unlabeled: builtin:digits?part=pool
  validation: builtin:digits?part=validation
stages:
  distill:
    kind: distill
    teacher: {plugin: templates, source: "builtin:digits?part=labeled"}
    student: MobileNetV3_small_x0_35
    data: unlabeled
    epochs: 1
    batch_size: 16
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The example, installed by pip into a folder of its own, from a copy, since a build writes beside the sources."""
    folder = tmp_path_factory.mktemp("example")
    shutil.copytree(EXAMPLE, folder / "source", ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    options = ("--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check", "--quiet")
    pip = [sys.executable, "-m", "pip", "install", *options, "--target", folder / "site", folder / "source"]
    subprocess.run(pip, check=True, capture_output=True, text=True)
    return folder / "site"


def test_its_own_test_passes(ssld, site):
    ssld.extra["PYTHONPATH"] = str(site)
    own = shutil.copy(EXAMPLE / "test_template_teacher.py", ssld.folder)
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", own)
    assert "1 passed" in ssld.wait(ssld.start(program=command)).out


def test_it_is_listed_with_its_distribution_and_version(ssld, site):
    assert "templates" not in ssld("list", "teachers").out
    ssld.extra["PYTHONPATH"] = str(site)
    row = {"teacher": "templates", "distribution": "ssld-template-teacher", "version": "1.0"}
    assert row in ssld("list", "teachers").table()


def test_a_student_learns_from_it(ssld, site):
    ssld.extra["PYTHONPATH"] = str(site)
    (ssld.folder / "borrowed.yaml").write_text(RECIPE)
    done = ssld("run", "borrowed.yaml", "--limit", "80")
    assert [row["state"] for row in done.table()] == ["finished"]
    lines = (ssld.folder / "runs" / "borrowed" / "metrics.jsonl").read_text().splitlines()
    told = [event for event in map(json.loads, lines) if event["event"] == "teacher"]
    assert told
    assert all(event["accuracy"] > 0.9 for event in told), "the nearest of 400 labeled digits is nearly always right"
    assert all(0.1 < event["low"] < event["accuracy"] for event in told)


def test_its_keys_are_checked_by_the_types_that_it_declares(ssld, site):
    ssld.extra["PYTHONPATH"] = str(site)
    (ssld.folder / "borrowed.yaml").write_text(RECIPE.replace("source: ", "sharpness: high, sauce: "))
    refused = ssld("run", "borrowed.yaml", code=2)
    assert "teacher 'templates' of package ssld-template-teacher 1.0: " in refused.err
    assert "sharpness: expected a number, got 'high'" in refused.err
    assert "sauce: unknown option, did you mean source?" in refused.err
    assert "source: required option is missing" in refused.err
