"""What a stranger installs: the wheel holds the name `ssld` alone, and works far from the checkout."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import ssld

ROOT = Path(__file__).parents[1]
TINY = """
name: tiny
images:
  resolution: 16
  train: [RandCropImage, NormalizeImage]
  eval: [ResizeImage: {resize_short: 16}, CropImage, NormalizeImage]
data:
  unlabeled: builtin:shapes?count=16&size=16&classes=2&seed=2
  labeled: builtin:shapes?count=16&size=16&classes=2
  validation: builtin:shapes?count=16&size=16&classes=2&seed=1
stages:
  teach: {kind: pretrain, network: MobileNetV3_small_x0_35, data: labeled, epochs: 1, batch_size: 8}
  distill: {kind: distill, teacher: {stage: teach}, student: MobileNetV3_small_x0_35, data: unlabeled, epochs: 1}
"""
Python = Callable[..., str]


def pip(*arguments: str | Path) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr


def build(source: Path, out: Path) -> Path:
    """The wheel of a source tree or archive, made with what is installed here."""
    options = ("--no-build-isolation", "--no-deps", "--no-index", "--quiet")
    pip("wheel", *options, "--wheel-dir", out, source)
    [wheel] = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, since a build leaves its own folders beside the sources and reads them the next time."""
    generated = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "__pycache__")
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("source") / "copy", ignore=generated))


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def names(wheel: Path) -> list[str]:
    return zipfile.ZipFile(wheel).namelist()


def test_the_wheel_claims_one_name(names: list[str]) -> None:
    assert {name.split("/")[0] for name in names} == {"ssld", f"ssld-{ssld.__version__}.dist-info"}


def test_the_wheel_holds_every_file_of_the_packages_and_no_other(names: list[str]) -> None:
    expected = {
        (Path(parent) / path.relative_to(ROOT)).as_posix()
        for folder, parent in (
            ("ssld", ""),
            *((room, "ssld") for room in ("stages", "teachers", "students", "recipes")),
        )
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in names if name.startswith("ssld/")} == expected


def test_a_source_distribution_builds_the_same_wheel(source: Path, names: list[str], tmp_path: Path) -> None:
    program = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", program], cwd=source, check=True, capture_output=True, timeout=100)
    [packed] = tmp_path.glob("*.tar.gz")
    assert sorted(zipfile.ZipFile(build(packed, tmp_path)).namelist()) == sorted(names)


def test_the_wheel_is_typed_and_licensed(wheel: Path, names: list[str]) -> None:
    info = f"ssld-{ssld.__version__}.dist-info"
    assert {"ssld/py.typed", f"{info}/licenses/LICENSE"} <= set(names)
    metadata = email.message_from_bytes(zipfile.ZipFile(wheel).read(f"{info}/METADATA"))
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Version"] == ssld.__version__
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata.get_payload(decode=True) == (ROOT / "README.md").read_bytes()


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Python:
    """A python that has the wheel and its requirements, works elsewhere, and cannot see the checkout.

    -S leaves out the .pth files, and with them the finder of an editable install; -P the working directory.
    """
    target, cwd = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("elsewhere")
    pip("install", "--no-deps", "--no-index", "--quiet", "--target", target, wheel)
    requirements = [entry for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment |= {"PYTHONPATH": os.pathsep.join([str(target), *requirements]), "XDG_CACHE_HOME": str(cwd / "cache")}
    (cwd / "tiny.yaml").write_text(TINY)

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-P", "-S", *arguments],
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    places = run(
        "-c", "import ssld, ssld.stages, ssld.recipes as r; print(ssld.__file__, ssld.stages.__file__, r.__file__)"
    )
    assert all(Path(place).is_relative_to(target) for place in places.split()), places
    return run


def test_it_lists_the_shipped_recipes(python: Python) -> None:
    listed = {line.split()[0] for line in python("-m", "ssld", "list", "recipes").splitlines()[1:]}
    files = (ROOT / "recipes").rglob("*.yaml")
    assert listed == {path.relative_to(ROOT / "recipes").with_suffix("").as_posix() for path in files}


def test_it_plans_a_shipped_recipe_by_name(python: Python) -> None:
    rows = python("-m", "ssld", "plan", "mobilenetv3_ssld").splitlines()[1:]
    stages = [row.split()[:2] for row in rows]
    assert stages == [["0", "teach"], ["1", "distill"], ["1", "distill"], ["2", "finetune"], ["3", "fixres"]]
    assert [row.split()[2] for row in rows[1:3]] == ["label", "distill"]


def test_it_runs_and_then_has_nothing_left_to_do(python: Python) -> None:
    arguments = ("-m", "ssld", "run", "tiny.yaml", "--trust-teacher")
    first = python(*arguments)
    assert [row.split()[:3] for row in first.splitlines()[1:]] == [
        ["0", "teach", "finished"],
        ["1", "distill", "finished"],
    ]
    assert python(*arguments) == first
