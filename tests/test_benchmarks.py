"""The benchmarks run: each in the smallest size, two processes at a time, and what comes out holds what a row must."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
DOCUMENT = BENCHMARKS.parent / "docs" / "performance.md"
SHARED = {"material", "measuring", "speed"}
"""What is no benchmark: what the benchmarks share, and the command that runs those of speed and memory."""
NAMES = sorted({file.stem for file in BENCHMARKS.glob("*.py")} - SHARED)
TABLES = {"bucket_error", "label_size", "labeled_part", "views"}
"""Benchmarks with a table, or files, of their own, each with a test of its own below."""
ROWS = [name for name in NAMES if name not in TABLES]

# Runs some benchmarks and writes what each has found, or the error, into a file. Networks are the cheapest there are,
# and what a benchmark repeats for several cases is done for one.
CHILD = """\
import contextlib, dataclasses, importlib, io, json, sys, traceback
from unittest.mock import patch

folder, out, *names = sys.argv[1:]
sys.path.insert(0, folder)
import evaluation
import material
from safetensors.numpy import save_file
from ssld.cli import main
from ssld.train import networks

material.STUDENT = CHEAP = "PPLCNet_x0_25"
SMALLER = {
    "bucket_error": {"BATCH": 16},
    "epoch": {"BATCH": 16},
    "evaluation": {"CASES": (None, dataclasses.replace(evaluation.CASES[1], network=CHEAP, size=32))},
    "label_size": {"IMAGES": 300},
    # of the fewest classes all may find room in what the process has
    "memory": {"LOSSES": ("js, K = 10",), "CLASSES": (21_841,)},
    "stored": {"TEACHER": CHEAP, "BATCH": 16},
    # the teacher is drawn, which a run refuses unless it is told to trust it
    "views": {"command": lambda *words: main([*map(str, words), "--trust-teacher"], standalone_mode=False) or 1.0},
}
COMMANDS = {
    "bucket_error": [],
    "label_size": [],
    "labeled_part": ["cifar10/train", "--labeled", "4", "--pool", "12"],
    "views": ["--teacher", "teacher.safetensors", "--seeds", "1", "--epochs", "1", "--only", "V=1"],
}

if "views" in names:
    save_file(networks.arrays(networks.build("ResNet18_vd", {"stem_stride": 1}, 2)), "teacher.safetensors")

def found(name):
    module = importlib.import_module(name)
    with contextlib.ExitStack() as stack:
        for key, value in SMALLER.get(name, {}).items():
            stack.enter_context(patch.object(module, key, value))
        if name not in COMMANDS:
            return [dataclasses.asdict(row) for row in module.rows(True)]
        shown = stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        module.main(COMMANDS[name], standalone_mode=False)
        return shown.getvalue()

results = {}
for name in names:
    try:
        results[name] = found(name)
    except BaseException:
        results[name] = {"error": traceback.format_exc()}
with open(out, "w") as file:
    json.dump(results, file)
"""
FIRST = {"labeled_part", "memory", "startup", "views"}
"""About half of the time; the others run beside them. `views` reads what `labeled_part` writes."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the benchmarks run: a folder with images in folders of their classes."""
    folder, draw = tmp_path_factory.mktemp("benchmarks"), np.random.default_rng(0)
    for part, count in (("train", 10), ("test", 4)):
        for name in ("cat", "ship"):
            place = folder / "cifar10" / part / name
            place.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(place / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    """What each benchmark has found: its rows, or what it printed, or its error."""
    # what a user has switched off would leave nothing to compare
    environment = {name: value for name, value in os.environ.items() if name != "SSLD_FAST_CONV"}
    started = []
    for first in (True, False):
        out, names = folder / f"{first}.json", [name for name in NAMES if (name in FIRST) == first]
        with out.with_suffix(".log").open("w") as log:
            words = [sys.executable, "-c", CHILD, str(BENCHMARKS), str(out), *names]
            process = subprocess.Popen(words, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
        started.append((process, out))
    try:
        codes = [process.wait(300) for process, _ in started]
    finally:
        for process, _ in started:
            process.kill()
    assert codes == [0, 0], "".join(out.with_suffix(".log").read_text() for _, out in started)
    return {name: found for _, out in started for name, found in json.loads(out.read_text()).items()}


@pytest.fixture
def found(results: dict[str, Any], name: str) -> Any:
    assert not isinstance(results[name], dict), results[name]["error"]
    return results[name]


def cells(text: str) -> list[list[str]]:
    """The cells of each line of a Markdown table; every line has the same number of them."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert len({len(line) for line in lines}) == 1, text
    return lines


def tables(text: str) -> Iterator[list[list[str]]]:
    """The tables of a text, each without the line below its head."""
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        head, rule, *lines = cells(block)
        assert set(rule) == {"---"}, block
        yield [head, *lines]


HEAD = ["measured", "figure", "ratio", "asked", "how"]


def kind(words: str) -> str:
    """The name of a row, or another cell of it, without the sizes and networks that it has been measured for."""
    return re.sub(r"\d[\d.,]*", "0", re.sub(r"\b[A-Z]\w*_\w+", "NETWORK", words))


def documented() -> set[tuple[str, ...]]:
    """Of each row in the document: its name, its unit, what its ratio is to, and what is asked of it, as kinds."""
    (measured,) = (table for table in tables(DOCUMENT.read_text("utf-8")) if table[0] == HEAD)
    return {
        tuple(map(kind, (name, figure.split(" ", 1)[1], ratio.partition(" × ")[2], asked)))
        for name, figure, ratio, asked, _ in measured[1:]
    }


@pytest.mark.parametrize("name", ROWS)
def test_a_row_holds_a_positive_figure_with_its_unit_and_a_ratio_to_something(found):
    assert found
    for row in found:
        assert row["name"]
        assert row["unit"]
        # what the smallest size takes longer than a single step may be lost in noise
        least = -math.inf if row["name"].startswith("ten epochs") else 0
        assert least < row["figure"] < math.inf, row
        assert (row["ratio"] is None) == (not row["to"]), row
        assert row["ratio"] is None or least < row["ratio"] < math.inf, row
    assert len({row["name"] for row in found}) == len(found)


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_named_as_the_document_has_it(found):
    rows = {tuple(kind(row[key]) for key in ("name", "unit", "to", "asked")) for row in found}
    assert rows - documented() == set()


def test_one_command_runs_all_that_have_rows() -> None:
    ran = speed("--only", "decodign")
    assert ran.returncode == 2
    known = re.search(r"expected a part of (.*), got decodign", " ".join(ran.stderr.split()))
    assert known, ran.stderr
    assert sorted(known[1].split(", ")) == ROWS
    assert re.findall(r"^\| `(\w+)` \|", DOCUMENT.read_text("utf-8"), re.MULTILINE) == known[1].split(", ")


def test_one_command_prints_one_table_below_where_it_comes_from() -> None:
    ran = speed("--quick", "--only", "opening")
    assert ran.returncode == 0, ran.stderr
    ((head, *rows),) = tables(ran.stdout)
    assert head == HEAD
    assert [kind(name) for name, *_ in rows] == [
        "index of 0 samples, cold",
        "index of 0 samples, warm",
        "store of 0 label files opened, first batch read",
    ]
    conditions = ran.stdout.splitlines()[0]
    assert re.match(r"\d{4}-\d\d-\d\d, commit \w+", conditions)
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in conditions


def speed(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "speed.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


def numbers(cell: str) -> list[float]:
    return [float(number) for number in cell.replace(",", "").split()]


@pytest.mark.parametrize("name", ["bucket_error"])
def test_the_bucket_is_compared_with_the_exact_loss(found):
    ((head, *rows),) = tables(found)
    assert head[-3:] == ["bucket", "stored", "spread"]
    assert {row[0] for row in rows} == {"js", "kl"}
    for row in rows:
        for cell in row[-3:]:
            loss, size, cosine = numbers(cell)
            assert 0 < loss < math.inf, row
            assert 0 < size < math.inf, row
            assert -1 <= cosine <= 1, row


@pytest.mark.parametrize("name", ["label_size"])
def test_a_view_takes_bytes_and_loses_little(found):
    sizes, quantizers = tables(found)
    for classes, kept, one, eight, budget, once, mean, most in sizes[1:]:
        # of each class kept a byte and its number, in as few bits as tell all classes apart; two bytes for the rest
        number = (int(classes.replace(",", "")) - 1).bit_length()
        least, alone = (int(kept) * (8 + number) + 16) / 8, float(one.split()[0])
        assert least <= float(eight) < alone, "a header is shared by more views"
        assert ("over" in one) == (alone > float(budget))
        assert int(once.replace(",", "")) > 0
        assert 0 < float(mean) < float(most)
    assert len({row[0] for row in quantizers[1:]}) == 6


@pytest.mark.parametrize("name", ["views"])
def test_views_are_trained_on_the_parts_that_were_cut_and_counted(found):
    ((_, row),) = tables(found.replace("|---|---|---|---|---|---|---|", "| --- " * 7 + "|"))
    assert row[0] == "V=1"
    top1, mean, agreement, labelling, training = map(float, row[1:6])
    assert 0 <= mean == top1 <= 1
    assert 0 <= agreement <= 1
    assert labelling >= 0
    assert training >= 0
    assert int(row[6].replace(",", "")) > 0


@pytest.mark.parametrize("name", ["labeled_part"])
def test_a_part_is_cut_that_has_all_classes_and_nothing_of_the_pool(found, folder):
    assert found == ""
    labeled, pool = (
        [line.split() for line in (folder / "cifar10" / f"{part}.txt").read_text().splitlines()]
        for part in ("labeled", "pool")
    )
    assert [label for _, label in labeled] == ["0", "0", "1", "1"]
    assert len({path for path, _ in (*labeled, *pool)}) == 4 + 12
    for path, label in (*labeled, *pool):
        assert path.startswith(("cat/", "ship/")[int(label)])
        assert (folder / "cifar10" / "train" / path).is_file()
    assert (folder / "cifar10" / "classes.txt").read_text() == "cat\nship\n"


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("measuring")


def test_a_ratio_is_the_median_of_the_turns_and_not_of_the_figures(measuring: ModuleType) -> None:
    """A machine that was slow in one turn was so for both measures."""
    found = iter([10.0, 5.0, 1.0, 1.0, 8.0, 2.0, 9.0, 3.0, 20.0, 10.0])
    turns = measuring.interleaved({"one": lambda: next(found), "other": lambda: next(found)}, False)
    assert [(turn["one"], turn["other"]) for turn in turns.found] == [(10, 5), (1, 1), (8, 2), (9, 3), (20, 10)]
    assert turns.median("one") == 9.0
    assert turns.median("other") == 3.0
    assert turns.ratio("one", "other") == 2.0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read where Linux keeps it")
def test_memory_is_that_of_the_child_alone(measuring: ModuleType) -> None:
    filler = np.ones(200 * 2**20, np.uint8)
    own = measuring.peak()
    seen, child = measuring.in_child(measuring.peak)
    assert own > filler.nbytes / 2**20
    assert 0 < seen <= child < own - 150
