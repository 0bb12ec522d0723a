"""The benchmarks run: what `python benchmarks/speed.py` measures, in tiny sizes, comes out as one table of numbers."""

from __future__ import annotations

import importlib
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SPEED = BENCHMARKS / "speed.py"
CHEAP = ("step", "ranks", "labelling", "decoding", "opening")


def call(*arguments: str, file: Path = SPEED) -> subprocess.CompletedProcess[str]:
    # what a user has switched off would leave nothing to compare
    environment = {name: value for name, value in os.environ.items() if name != "SSLD_FAST_CONV"}
    command = [sys.executable, str(file), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)


def cells(text: str) -> list[list[str]]:
    """The cells of each line of a Markdown table; every line has the same number of them."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert len({len(line) for line in lines}) == 1, text
    return lines


def test_cheap_benchmarks_print_one_table_of_finite_numbers() -> None:
    ran = call("--quick", *(word for name in CHEAP for word in ("--only", name)))
    assert ran.returncode == 0, ran.stderr
    head, rule, *rows = cells(ran.stdout)
    assert head == ["measured", "figure", "ratio", "asked", "how"]
    assert set(rule) == {"---"}
    for name, figure, ratio, *_ in rows:
        number, unit = figure.split(" ", 1)
        assert 0 < float(number.replace(",", "")) < math.inf, name
        assert unit, name
        assert not ratio or 0 < float(ratio.split(" × ")[0]) < math.inf, name
    names = " ".join(name for name, *_ in rows)
    for word in ("step: ", "two processes", "labelling", "JPEG of 500", "index of 2,000 samples", "label files"):
        assert word in names
    # a line above says where the numbers come from
    conditions = ran.stdout.splitlines()[0]
    assert re.match(r"\d{4}-\d\d-\d\d, commit \w+", conditions)
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in conditions


def test_a_name_that_no_benchmark_has_is_refused_with_the_names_that_the_document_explains() -> None:
    ran = call("--only", "decodign")
    assert ran.returncode == 2
    known = re.search(r"expected a part of (.*), got decodign", " ".join(ran.stderr.split()))
    assert known, ran.stderr
    document = (BENCHMARKS.parent / "docs" / "performance.md").read_text("utf-8")
    assert re.findall(r"^\| `(\w+)` \|", document, re.MULTILINE) == known[1].split(", ")


def test_a_benchmark_is_a_command_of_its_own() -> None:
    ran = call("--quick", file=BENCHMARKS / "opening.py")
    assert ran.returncode == 0, ran.stderr
    assert len(cells(ran.stdout)) == 2 + 3


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
