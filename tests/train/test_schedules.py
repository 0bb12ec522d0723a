import doctest
import math
from itertools import pairwise

import pytest

from ssld.errors import RecipeError, SsldError
from ssld.train import schedules
from ssld.train.schedules import cosine_warmup

CASES = [(1, 0), (2, 1), (10, 0), (100, 10), (7, 7), (11, 4)]


@pytest.mark.parametrize(("total", "warmup"), CASES)
def test_every_step_is_on_the_line_or_on_the_cosine(total, warmup):
    for step in range(total):
        if step < warmup:
            expected = 0.4 * step / warmup
        else:
            # a cosine by its half angle: (1 + cos x) / 2 = cos^2(x / 2)
            expected = 0.4 * math.cos(math.pi / 2 * (step - warmup) / (total - warmup)) ** 2
        assert cosine_warmup(step, total, warmup, 0.4) == pytest.approx(expected, rel=1e-12, abs=1e-17)


def test_rises_to_the_peak_then_falls_towards_zero():
    rates = [cosine_warmup(step, 1000, 100, 0.4) for step in range(1000)]
    assert rates[0] == 0
    assert rates[100] == max(rates) == 0.4
    assert all(before < after for before, after in pairwise(rates[:101]))
    assert all(before > after for before, after in pairwise(rates[100:]))
    assert 0 < rates[-1] < 1e-5


def test_the_cosine_is_symmetric_about_half_the_peak():
    for step in range(1, 50):
        sides = cosine_warmup(10 + step, 110, 10, 1.0), cosine_warmup(110 - step, 110, 10, 1.0)
        assert sum(sides) == pytest.approx(1.0, rel=1e-12)


def test_scales_with_the_peak():
    rates = [[cosine_warmup(step, 30, 5, peak) for step in range(30)] for peak in (0.5, 2.0)]
    assert [4 * rate for rate in rates[0]] == rates[1]


@pytest.mark.parametrize("warmup", [-1, 11])
def test_a_warmup_longer_than_the_stage_is_refused(warmup):
    with pytest.raises(RecipeError, match=f"stage's 10 steps, got {warmup};"):
        cosine_warmup(0, 10, warmup, 0.1)


@pytest.mark.parametrize("step", [-1, 10, 11])
def test_a_step_outside_the_stage_is_refused(step):
    with pytest.raises(SsldError, match=f"from 0 to 9, got {step};"):
        cosine_warmup(step, 10, 2, 0.1)


def test_examples():
    assert doctest.testmod(schedules) == (0, 1)
