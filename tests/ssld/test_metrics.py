import doctest
import math
from itertools import pairwise

import numpy as np
import pytest

from ssld import metrics
from ssld.contracts import Soft
from ssld.errors import DataError
from ssld.metrics import agreement, best_class, compared, means, places, top_k, wilson


def sorted_top_k(logits, labels, k):
    """The definition, by sorting: largest first, and of equal ones the smaller class."""
    hits = 0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        hits += label in sorted(range(len(row)), key=lambda c: (-row[c], c))[:k]
    return hits / len(labels)


@pytest.mark.parametrize("k", [1, 2, 5, 10])
@pytest.mark.parametrize("levels", [2, 5, 10**6])
def test_equals_sorting_also_with_ties(k, levels):
    draw = np.random.default_rng(levels)
    logits = draw.integers(0, levels, (200, 10)).astype(np.float32)
    labels = draw.integers(0, 10, 200)
    assert top_k(logits, labels, k) == pytest.approx(sorted_top_k(logits, labels, k), abs=1e-12)


@pytest.mark.parametrize("levels", [2, 10**6])
def test_the_place_of_a_label_is_that_of_sorting(levels):
    draw = np.random.default_rng(levels)
    logits, labels = draw.integers(0, levels, (60, 10)).astype(np.float32), draw.integers(0, 10, 60)
    orders = [sorted(range(10), key=lambda c, row=row: (-row[c], c)) for row in logits.tolist()]
    assert places(logits, labels).tolist() == [
        order.index(label) for order, label in zip(orders, labels.tolist(), strict=True)
    ]


def test_equal_logits_count_as_the_answer_zero():
    assert top_k(np.zeros((10, 10)), np.arange(10), 1) == 0.1
    assert top_k(np.zeros((10, 10)), np.arange(10), 3) == 0.3


def test_all_classes_hold_every_label():
    draw = np.random.default_rng(0)
    assert top_k(draw.normal(size=(50, 7)), draw.integers(0, 7, 50), 7) == 1.0


def test_grows_with_k_and_ignores_the_order_of_samples():
    draw = np.random.default_rng(1)
    logits, labels = draw.normal(size=(300, 20)), draw.integers(0, 20, 300)
    shares = [top_k(logits, labels, k) for k in range(1, 21)]
    assert shares == sorted(shares)
    order = draw.permutation(300)
    assert shares == [top_k(logits[order], labels[order], k) for k in range(1, 21)]


def test_infinite_logits_are_numbers():
    logits = np.array([[-np.inf, 0.0, np.inf], [-np.inf, -np.inf, 0.0]])
    assert top_k(logits, np.array([2, 1]), 1) == 0.5
    assert top_k(logits, np.array([1, 0]), 2) == 1.0


def test_nan_is_refused_with_the_sample():
    logits = np.zeros((5, 3), np.float32)
    logits[[2, 4], 1] = np.nan
    with pytest.raises(DataError, match="2 of 5 samples, first for sample 2"):
        top_k(logits, np.zeros(5, np.int64), 1)


@pytest.mark.parametrize("label", [-100, -1, 3])
def test_a_label_outside_the_classes_is_refused(label):
    with pytest.raises(DataError, match=f"from 0 to 2, got {label};"):
        top_k(np.zeros((2, 3)), np.array([0, label]), 1)


@pytest.mark.parametrize(("logits", "labels"), [((0, 3), 0), ((2, 3), 3), ((6,), 6), ((2, 3, 1), 2)])
def test_other_shapes_are_refused(logits, labels):
    with pytest.raises(DataError, match="at least one sample"):
        top_k(np.zeros(logits), np.zeros(labels, np.int64), 1)


@pytest.mark.parametrize("z", [1.0, 1.96, 3.0])
@pytest.mark.parametrize(("correct", "total"), [(0, 1), (1, 1), (0, 50), (50, 50), (7, 10), (400, 1000)])
def test_the_bounds_solve_wilsons_equation(correct, total, z):
    """A bound is a p from which the observed share lies z standard errors away: (share - p)^2 = z^2 p (1 - p) / n."""
    share = correct / total
    low, high = wilson(correct, total, z)
    assert 0 <= low <= share <= high <= 1
    for bound in (low, high):
        assert (share - bound) ** 2 == pytest.approx(z * z * bound * (1 - bound) / total, abs=1e-12)
    assert low < high


def test_hits_and_misses_mirror_each_other():
    low, high = wilson(30, 100)
    assert (1 - high, 1 - low) == pytest.approx(wilson(70, 100), rel=1e-12)


def test_nears_the_normal_interval_as_samples_grow():
    low, high = wilson(300_000, 1_000_000)
    half = 1.96 * math.sqrt(0.3 * 0.7 / 1_000_000)
    assert (low, high) == pytest.approx((0.3 - half, 0.3 + half), abs=1e-5)
    assert high - low < wilson(300, 1000)[1] - wilson(300, 1000)[0]


@pytest.mark.parametrize(("correct", "total"), [(0, 0), (-1, 5), (6, 5)])
def test_impossible_counts_are_refused(correct, total):
    with pytest.raises(DataError, match=f"got {correct} of {total}"):
        wilson(correct, total)


# Student and teacher --------------------------------------------------------------------------------------------------


def kept_of(probabilities, kept, temperature=1.0):
    """Soft labels of the most probable classes [N, C], in float64, and the rest in one."""
    ids = np.argsort(-probabilities, axis=1, kind="stable")[:, :kept]
    part = np.take_along_axis(probabilities, ids, axis=1)
    return Soft(ids, temperature * np.log(np.column_stack([part, 1 - part.sum(axis=1)])), temperature)


def drawn(seed, samples=40, classes=7):
    draw = np.random.default_rng(seed)
    return draw.normal(scale=2, size=(samples, classes)), draw.dirichlet(np.ones(classes) / 2, samples)


def test_the_best_class_is_the_first_of_the_largest():
    soft = Soft(None, np.array([[0.0, 2.0, 2.0], [1.0, 1.0, 1.0], [-3.0, -2.0, -1.0]]))
    assert best_class(soft).tolist() == [1, 0, 2]


@pytest.mark.parametrize("kept", [1, 2, 6])
def test_of_kept_classes_the_best_is_that_of_all(kept):
    """Also where it is less probable than all others together."""
    _, taught = drawn(3)
    assert kept == 6 or (taught.max(axis=1) < 0.5).any()
    assert np.array_equal(best_class(kept_of(taught, kept)), taught.argmax(axis=1))


def by_hand(student, taught, kept, temperature):
    """(agreement, KL) sample after sample, class after class."""
    same, divergence = 0, 0.0
    for logits, q in zip(student.tolist(), taught.tolist(), strict=True):
        powers = [math.exp(value / temperature) for value in logits]
        p = [power / sum(powers) for power in powers]
        order = sorted(range(len(q)), key=lambda label: -q[label])[: kept or None]
        pairs = [(q[label], p[label]) for label in order]
        if kept:
            others = [label for label in range(len(q)) if label not in order]
            pairs.append((sum(q[label] for label in others), sum(p[label] for label in others)))
        divergence += sum(a * math.log(a / b) for a, b in pairs)
        same += max(range(len(q)), key=q.__getitem__) == max(range(len(p)), key=p.__getitem__)
    return same / len(student), divergence / len(student)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("kept", [None, 1, 3, 6])
def test_agreement_and_divergence_by_hand(kept, temperature):
    student, taught = drawn(5)
    soft = kept_of(taught, kept, temperature) if kept else Soft(None, temperature * np.log(taught), temperature)
    assert agreement(student, soft) == pytest.approx(by_hand(student, taught, kept, temperature), rel=1e-9)


def test_a_student_that_says_what_its_teacher_says_is_at_no_distance():
    """However sure both are: in float32, the others' share of a sure student is lost beside 1."""
    logits = np.array([[40.0, 0.0, -5.0, 0.0], [0.0, 300.0, 10.0, 20.0]], np.float32)
    for temperature in (1.0, 3.0):
        assert agreement(logits, Soft(None, logits, temperature)) == (1.0, pytest.approx(0, abs=1e-12))
        others = np.logaddexp.reduce(np.delete(logits[0] / temperature, 0).astype(float)) * temperature
        sparse = Soft(np.array([[0]]), np.array([[40.0, others]]), temperature)
        assert agreement(logits[:1], sparse) == (1.0, pytest.approx(0, abs=1e-9))


def test_what_is_summed_up_hides_divergence_and_adds_none():
    student, taught = drawn(7)
    found = [agreement(student, kept_of(taught, kept))[1] for kept in range(1, 7)]
    assert all(0 <= few <= more + 1e-12 for few, more in pairwise(found))
    assert found[-1] == pytest.approx(agreement(student, Soft(None, np.log(taught)))[1])


# Batch by batch -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 40, 64])
def test_a_mean_of_batches_is_that_of_all_samples_and_not_of_the_batches(size):
    student, taught = drawn(11)
    soft, labels = kept_of(taught, 3), taught.argmax(axis=1)
    batches = [slice(start, start + size) for start in range(0, 40, size)]
    found = means(
        (places(student[part], labels[part]) < 2, *compared(student[part], Soft(soft.ids[part], soft.logits[part])))
        for part in batches
    )
    assert found[:2] == [top_k(student, labels, 2), agreement(student, soft)[0]]
    assert found[2] == pytest.approx(agreement(student, soft)[1], rel=1e-12)


def test_sums_are_taken_in_float64():
    """In float32 the sum stands still at 2 ** 24."""
    ones = np.ones(2**22, np.float32)
    assert means([(ones,)] * 5 + [(np.zeros(1, np.float32),)]) == [5 * 2**22 / (5 * 2**22 + 1)]


@pytest.mark.parametrize("batches", [[], [(np.zeros(0), np.zeros(0))]])
def test_a_mean_of_nothing_is_refused(batches):
    with pytest.raises(DataError, match="at least one sample"):
        means(batches)


def test_examples():
    assert doctest.testmod(metrics) == (0, 4)
