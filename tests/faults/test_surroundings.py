"""Clocks, hash seeds, the order of directories and odd names change no weight; one image is enough."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssld.data.pack import pack
from ssld.data.sources import open_source
from ssld.errors import DataError, RecipeError

RECIPE = """\
name: tiny
images: {resolution: 16, train: [RandCropImage, RandFlipImage, NormalizeImage]}
data: {labeled: {folder: "%s"}, validation: {folder: "%s"}}
stages:
  teach:
    {kind: pretrain, network: MobileNetV3_small_x0_35, data: labeled, epochs: 2, batch_size: %d, learning_rate: 0.05,
     save_steps: 1}
"""

UNUSUAL = """\
import os, time

started = time.monotonic()
time.time = lambda: 1000.0 - 50 * (time.monotonic() - started)  # 1970, and backwards
time.time_ns = lambda: int(time.time() * 1e9)
listdir, scandir = os.listdir, os.scandir
os.listdir = lambda *path: sorted(listdir(*path), reverse=True)


class Reversed:
    def __init__(self, *path):
        self.entries = iter(sorted(scandir(*path), key=lambda entry: entry.name, reverse=True))

    def __iter__(self):
        return self.entries

    def __next__(self):
        return next(self.entries)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    close = __exit__


os.scandir = Reversed
"""
ODD = "ü 日 #?%41 '$x' -o"
ODD_NAMES = [
    "plain",
    "with space",
    "ü-日本",
    "#?&=",
    "%41%",
    'it\'s "so"',
    "$HOME ~",
    "-o",
    "a:b",
    "tab\there",
    "two\nlines",
]
MEANT = ["{a,b}", "a{0..2}", "{", "}", "a\\b"]
"""In a pattern of shards, braces stand for several names, and a backslash for the character behind it."""


def photos(folder: Path, count: int) -> Path:
    """Images of two classes, as folders."""
    rng = np.random.default_rng(count)
    for number in range(count):
        file = folder / "cd"[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (18, 20, 3), dtype=np.uint8)).save(file)
        os.utime(file, (10**9, 10**9))
    return folder


def train(
    folder: Path, name: str, environment: dict[str, str], count: int = 12, batch: int = 4
) -> subprocess.CompletedProcess:
    """Train on photographs in a folder of that name, from a recipe beside it."""
    folder.mkdir()
    photos(folder / name, count)
    recipe = RECIPE % (name, name, batch)
    (folder / f"{name}.yaml").write_text(recipe)
    return subprocess.run(
        [sys.executable, "-m", "ssld", "run", f"./{name}.yaml", "--out", f"run {name}", "--trust-teacher"],
        cwd=folder,
        env={**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def weights(run: Path) -> str:
    return hashlib.sha256((run / "teach" / "latest" / "student.safetensors").read_bytes()).hexdigest()


def test_neither_clock_nor_hash_seed_nor_order_of_files_nor_names_change_a_weight(tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(UNUSUAL)
    usual = train(tmp_path / "a", "usual", {"PYTHONHASHSEED": "0", "TZ": "UTC"})
    assert usual.returncode == 0, usual.stderr
    strange = {
        "PYTHONHASHSEED": "4242",
        "TZ": "Asia/Kathmandu",
        "PYTHONPATH": f"{site}:{os.environ.get('PYTHONPATH', '')}",
    }
    unusual = train(tmp_path / ODD, ODD, strange)
    assert unusual.returncode == 0, unusual.stderr
    run = tmp_path / ODD / f"run {ODD}"
    times = [json.loads(line)["time"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert times == sorted(times, reverse=True), "the clock went back"
    assert max(times) < 2000
    assert weights(run) == weights(tmp_path / "a" / "run usual")


def test_one_image_is_a_set(tmp_path: Path) -> None:
    """It comes as often as a batch has rows."""
    done = train(tmp_path / "few", "few", {}, 1, batch=8)
    assert done.returncode == 0, done.stderr
    assert weights(tmp_path / "few" / "run few")


@pytest.mark.parametrize("name", ODD_NAMES + MEANT)
def test_every_kind_of_source_takes_odd_names_or_refuses_them_by_name(tmp_path: Path, name: str) -> None:
    root = photos(tmp_path / name, 4)
    (tmp_path / f"{name}.txt").write_text("".join(f"{(n % 2 and 'd') or 'c'}/{n}.png {n % 2}\n" for n in range(4)))
    pack(open_source({"folder": str(root)}, labeled=True), tmp_path / f"{name} shards", shard_size=2)
    expected = sorted(file.read_bytes() for file in root.rglob("*.png"))

    def content(spec: object) -> list[bytes]:
        samples = open_source(spec, labeled=True, cache=tmp_path / "cache")
        return sorted(bytes(samples.read(i)) for i in range(len(samples)))

    assert content({"folder": str(root)}) == expected
    assert content({"list": str(tmp_path / f"{name}.txt"), "root": str(root)}) == expected
    shards = tmp_path / f"{name} shards"
    assert content({"shards": str(shards)}) == expected
    pattern = {"shards": f"{shards}/shard-{{000000..000001}}.tar"}
    if name in MEANT:
        with pytest.raises((DataError, RecipeError), match=re.escape(str(shards))):
            content(pattern)
    else:
        assert content(pattern) == expected
