"""Seeds: equal for equal parts, different for different ones, and the same in every process."""

from __future__ import annotations

import doctest
import os
import subprocess
import sys

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ssld import seeds
from ssld.seeds import derive, generator

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"))
PARTS = st.lists(st.one_of(st.integers(-(2**70), 2**70), TEXT), min_size=1)


@given(PARTS)
def test_a_seed_fits_63_bits_and_is_repeatable(parts):
    assert 0 <= derive(*parts) < 2**63
    assert derive(*parts) == derive(*parts)


@given(PARTS, PARTS)
def test_different_parts_give_different_seeds(one, other):
    typed = [[(type(part), part) for part in parts] for parts in (one, other)]
    assert (derive(*one) == derive(*other)) == (typed[0] == typed[1])


def test_where_a_part_ends_and_its_type_count():
    seen = {derive("a", 1), derive("a1"), derive("a", "1"), derive(1, "a"), derive("a", 1, ""), derive("a", True)}
    assert len(seen) == 6


def test_bits_are_evenly_spread():
    drawn = np.array([derive("x", i) for i in range(4000)], dtype=np.uint64)
    for bit in range(63):
        share = ((drawn >> np.uint64(bit)) & np.uint64(1)).mean()
        assert abs(share - 0.5) < 0.05  # six standard errors


def test_streams_are_given_by_the_parts():
    first, again, other = (generator("order", epoch).random(1000) for epoch in (0, 0, 1))
    assert np.array_equal(first, again)
    assert abs(np.corrcoef(first, other)[0, 1]) < 0.2


def test_a_seed_is_the_same_in_every_process():
    """Checkpoints are resumed by other processes, where Python hashes strings in another way."""
    program = "from ssld.seeds import derive, generator; print(derive('a', 1), generator('a').integers(2**60))"
    outputs = [
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
            timeout=60,
            text=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs == [f"{derive('a', 1)} {generator('a').integers(2**60)}\n"] * 2


def test_examples_run():
    assert doctest.testmod(seeds).attempted == 1
    assert doctest.testmod(seeds).failed == 0
