"""The mean of several teachers, against all classes written out and added up, one sample at a time."""

from __future__ import annotations

from fractions import Fraction
from math import exp, log

import numpy as np
import pytest

from ssld.contracts import Soft
from ssld.teaching.ensemble import average


def dense(logits, temperature=1.0):
    return Soft(None, np.asarray(logits, np.float32), temperature)


def sparse(ids, probabilities, temperature=1.0):
    """K classes with their probabilities, and what is missing to 1 as the rest."""
    kept = np.asarray(probabilities, float)
    logs = np.log(np.column_stack([kept, 1 - kept.sum(axis=1)]))
    return Soft(np.asarray(ids, np.int64), (temperature * logs).astype(np.float32), temperature)


def random_sparse(rng, rows, classes, top_k, temperature=1.0):
    logits = rng.normal(0, 3, (rows, classes))
    ids = np.argsort(-logits, axis=1)[:, :top_k]
    powers = np.exp(logits)
    probabilities = powers / powers.sum(axis=1, keepdims=True)
    return sparse(ids, np.take_along_axis(probabilities, ids, axis=1), temperature)


def probabilities(soft):
    powers = np.exp(soft.logits.astype(np.float64) / soft.temperature)
    return powers / powers.sum(axis=1, keepdims=True)


def written_out(soft, row, classes):
    """One sample's distribution over all classes: the rest in even shares to the classes that are not named."""
    powers = [exp(value / soft.temperature) for value in soft.logits[row].tolist()]
    named = dict(zip(soft.ids[row].tolist(), powers[:-1], strict=True))
    share = powers[-1] / (classes - len(named))
    return [named.get(number, share) / sum(powers) for number in range(classes)]


def by_hand(parts, row, classes, top_k):
    """(ids, probabilities and that of the rest) of the mean, in pure Python; the rest is added up class by class."""
    total = sum(weight for _, weight in parts)
    columns = [[weight / total * value for value in written_out(soft, row, classes)] for soft, weight in parts]
    mean = [sum(values) for values in zip(*columns, strict=True)]
    order = sorted(range(classes), key=lambda number: (-mean[number], number))
    return order[:top_k], [*(mean[n] for n in order[:top_k]), sum(sorted(mean[n] for n in order[top_k:]))]


def test_one_teacher_is_itself():
    soft = dense([[1, 2, 3]])
    assert average([(soft, 0.3)], 3) is soft


@pytest.mark.parametrize("weights", [(1, 1), (1, 3), (0.2, 0.3, 0.5), (10, 20, 30)])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_of_all_classes_the_mean_is_that_of_the_softmaxes(weights, temperature):
    rng = np.random.default_rng(0)
    parts = [(dense(rng.normal(0, 4, (7, 5)), temperature), weight) for weight in weights]
    mean = average(parts, 5)
    assert (mean.ids, mean.temperature, mean.logits.dtype) == (None, temperature, np.float32)
    for row in range(7):
        wanted = np.zeros(5)
        for soft, weight in parts:
            powers = [exp(value / temperature) for value in soft.logits[row].tolist()]
            wanted += [float(Fraction(weight) / sum(map(Fraction, weights))) * p / sum(powers) for p in powers]
        np.testing.assert_allclose(probabilities(mean)[row], wanted, rtol=1e-5)


@pytest.mark.parametrize(("classes", "top_k"), [(5, 1), (5, 2), (5, 4), (40, 3), (40, 20)])
@pytest.mark.parametrize("weights", [(1, 1), (1, 4), (1, 2, 3)])
def test_of_some_classes_the_mean_is_by_the_stated_rule(classes, top_k, weights):
    rng = np.random.default_rng(classes + top_k)
    parts = [(random_sparse(rng, 9, classes, top_k), weight) for weight in weights]
    mean = average(parts, classes)
    assert (mean.ids.shape, mean.logits.shape, mean.logits.dtype) == ((9, top_k), (9, top_k + 1), np.float32)
    for row in range(9):
        ids, wanted = by_hand(parts, row, classes, top_k)
        assert mean.ids[row].tolist() == ids
        np.testing.assert_allclose(probabilities(mean)[row], wanted, rtol=2e-5)


def test_at_another_temperature_the_probabilities_are_averaged_at_that_temperature():
    rng = np.random.default_rng(3)
    parts = [(random_sparse(rng, 5, 8, 3, temperature=4.0), weight) for weight in (1, 2)]
    mean = average(parts, 8)
    assert mean.temperature == 4.0
    for row in range(5):
        np.testing.assert_allclose(probabilities(mean)[row], by_hand(parts, row, 8, 3)[1], rtol=2e-5)


def test_teachers_that_name_other_classes():
    """0.5 (0.6, 0.2 / 2, 0.2, 0.2 / 2) + 0.5 (0.1 / 2, 0.7, 0.1 / 2, 0.2), over the classes 0 to 3."""
    parts = [(sparse([[0, 2]], [[0.6, 0.2]]), 1.0), (sparse([[1, 3]], [[0.7, 0.2]]), 1.0)]
    mean = average(parts, 4)
    assert mean.ids.tolist() == [[1, 0]]
    np.testing.assert_allclose(probabilities(mean), [[0.4, 0.325, 0.275]], rtol=1e-5)


def test_a_class_that_only_the_second_names_may_come_first():
    parts = [(sparse([[0]], [[0.4]]), 1.0), (sparse([[4]], [[0.99]]), 1.0)]
    assert average(parts, 5).ids.tolist() == [[4]]


def test_equal_classes_come_in_their_order():
    parts = [(sparse([[3, 1]], [[0.4, 0.4]]), 1.0), (sparse([[1, 3]], [[0.4, 0.4]]), 1.0)]
    assert average(parts, 5).ids.tolist() == [[1, 3]]


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("rest", [1e-8, 1e-12, 1e-20, 1e-30])
def test_the_rest_of_teachers_that_are_certain_keeps_its_size(rest, top_k):
    """Near p = 1, the difference to 1 would be rounding alone, which the reverse KL sees by its log."""
    kept = [[0.0, log(rest) - 1][:top_k]]
    soft = Soft(np.array([[2, 0][:top_k]]), np.float32(np.column_stack([kept, [[log(rest)]]])))
    parts = [(soft, 1.0), (soft, 2.0)]
    mean = average(parts, 6)
    wanted = by_hand(parts, 0, 6, top_k)[1]
    np.testing.assert_allclose(np.log(probabilities(mean)[0]), np.log(wanted), atol=1e-4)


def test_each_row_is_its_own():
    rng = np.random.default_rng(5)
    parts = [(random_sparse(rng, 6, 9, 3), weight) for weight in (1, 2)]
    together = average(parts, 9)
    for row in range(6):
        alone = average([(Soft(s.ids[row : row + 1], s.logits[row : row + 1]), w) for s, w in parts], 9)
        assert np.array_equal(alone.ids[0], together.ids[row])
        assert np.array_equal(alone.logits[0], together.logits[row])
