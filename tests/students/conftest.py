"""The networks by name, as an installed recipe finds them, and what PaddleClas calls their weights."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

import pytest

KEYS = Path(__file__).with_name("paddleclas_keys.json.gz")


@pytest.fixture(scope="session")
def reference() -> dict[str, dict[str, list[int]]]:
    """Name, key and shape of every array in the state dict of PaddleClas's own class, for 1,000 classes."""
    return json.loads(gzip.decompress(KEYS.read_bytes()))


@pytest.fixture(scope="session")
def build() -> Callable:
    """Build a network by its entry-point name."""

    def call(name: str, num_classes: int, **options: object):
        (found,) = entry_points(group="ssld.students", name=name)
        return found.load()(num_classes, **options)

    return call
