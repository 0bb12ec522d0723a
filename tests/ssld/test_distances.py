"""dkd, dist and wsl against a float64 reckoning in numpy, and the relations of all distances, at their limits too.

Those that are sums over classes alone are reckoned in tests/train/test_losses.py, with all kinds of soft labels.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import paddle
import pytest

from ssld import distances
from ssld.errors import DataError


def softmax(x):
    x = np.exp(x - x.real.max(axis=1, keepdims=True))
    return x / x.sum(axis=1, keepdims=True)


def divergence(p, q):
    return (p * np.log(p / q)).sum(axis=1)


def split(p, column):
    """Probabilities [B, 2] of one class and all others, and [B, C - 1] of the others among themselves."""
    own = np.arange(p.shape[1]) == column[:, None]
    others = p[~own].reshape(len(p), -1)
    rest = others.sum(axis=1, keepdims=True)
    return np.column_stack([p[own], rest]), others / rest


def dkd(s, t, column, temperature=1.0, alpha=1.0, beta=1.0):
    (pair_q, others_q), (pair_p, others_p) = (split(softmax(x / temperature), column) for x in (s, t))
    return temperature**2 * (alpha * divergence(pair_p, pair_q) + beta * divergence(others_p, others_q))


def wsl(s, t, column, temperature=2.0):
    """The weight is no function of the student: it is taken from its real part, which a derivative leaves alone."""
    rows = np.arange(len(s))
    hard = [-np.log(softmax(x.real))[rows, column] for x in (s, t)]
    soft = -(softmax(t / temperature) * np.log(softmax(s / temperature))).sum(axis=1)
    return (1 - np.exp(-hard[0] / hard[1])) * temperature**2 * soft


def unlike(x, y):
    """1 - Pearson's coefficient of each row."""
    x, y = (values - values.mean(axis=1, keepdims=True) for values in (x, y))
    most = np.sqrt((x * x).sum(axis=1)) * np.sqrt((y * y).sum(axis=1))
    return (most - (x * y).sum(axis=1)) / (most + 1e-8)


def dist(s, t, beta=1.0, gamma=1.0):
    q, p = softmax(s), softmax(t)
    return beta * unlike(q, p) + gamma * unlike(q.T, p.T).mean()


def best(s, t):
    return t.argmax(axis=1)


RECKONED = {
    "dkd": (distances.dkd, lambda s, t: dkd(s, t, best(s, t))),
    "dkd, warm and weighted": (
        partial(distances.dkd, temperature=4.0, alpha=0.5, beta=8.0),
        lambda s, t: dkd(s, t, best(s, t), 4.0, 0.5, 8.0),
    ),
    "dist": (distances.dist, dist),
    "dist between classes": (partial(distances.dist, beta=2.0, gamma=0.0), partial(dist, beta=2.0, gamma=0.0)),
    "dist within classes": (partial(distances.dist, beta=0.0, gamma=3.0), partial(dist, beta=0.0, gamma=3.0)),
    "wsl": (distances.wsl, lambda s, t: wsl(s, t, best(s, t))),
    "wsl at 1": (partial(distances.wsl, temperature=1.0), lambda s, t: wsl(s, t, best(s, t), 1.0)),
}
reckonings = pytest.mark.parametrize(("loss", "reckoned"), RECKONED.values(), ids=RECKONED)
LOSSES = {name: loss for name, (loss, _) in RECKONED.items()}
PLAIN = {loss.__name__: loss for loss in (distances.js, distances.true_js, distances.kl, distances.ce)}
every = pytest.mark.parametrize("loss", (LOSSES | PLAIN).values(), ids=LOSSES | PLAIN)
BY_LABELS = {"dkd": (distances.dkd, dkd), "wsl": (distances.wsl, wsl)}


@pytest.fixture(params=[(2, 2, 1.0), (7, 10, 3.0), (4, 1000, 2.0)], ids=str)
def pair(request):
    batch, classes, scale = request.param
    draws = np.random.default_rng(classes).normal(0, scale, (2, batch, classes))
    return draws[0], draws[1]


def value(loss, s, t, **options):
    result = loss(paddle.to_tensor(s), paddle.to_tensor(t), **options)
    assert list(result.shape) == [len(s)]
    assert result.dtype == paddle.to_tensor(s).dtype
    return result.numpy()


def gradient(loss, s, t, **options):
    student = paddle.to_tensor(s, stop_gradient=False)
    loss(student, paddle.to_tensor(t), **options).sum().backward()
    return student.grad.numpy()


@reckonings
def test_equals_the_float64_reckoning(loss, reckoned, pair):
    s, t = pair
    np.testing.assert_allclose(value(loss, s, t), reckoned(s, t), rtol=1e-9, atol=1e-12)
    single = value(loss, s.astype(np.float32), t.astype(np.float32))
    np.testing.assert_allclose(single, reckoned(s, t), rtol=5e-5, atol=5e-6)


@reckonings
def test_the_gradient_is_that_of_the_reckoning(loss, reckoned):
    """By the imaginary part of a step in imaginary direction, in which nothing is subtracted."""
    s, t = np.random.default_rng(3).normal(0, 2, (2, 3, 5))
    slope = np.zeros_like(s)
    for index in np.ndindex(s.shape):
        step = np.zeros(s.shape, complex)
        step[index] = 1e-30j
        slope[index] = reckoned(s + step, t).sum().imag / 1e-30
    np.testing.assert_allclose(gradient(loss, s, t), slope, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("loss", "reckoned"), BY_LABELS.values(), ids=BY_LABELS)
def test_labels_may_say_the_class(loss, reckoned, pair):
    s, t = pair
    labels = np.arange(len(s)) % s.shape[1]
    found = value(loss, s, t, labels=paddle.to_tensor(labels), target="labels", temperature=3.0)
    np.testing.assert_allclose(found, reckoned(s, t, labels, 3.0), rtol=1e-9)
    with pytest.raises(DataError, match="true classes for target: labels, got none"):
        loss(paddle.to_tensor(s), paddle.to_tensor(t), target="labels")
    agreeing = {"labels": paddle.to_tensor(best(s, t)), "target": "labels"}
    np.testing.assert_array_equal(value(loss, s, t, **agreeing), value(loss, s, t))


def test_dist_is_one_minus_the_correlation_of_numpy():
    s, t = np.random.default_rng(1).normal(0, 2, (2, 6, 4))
    q, p = softmax(s), softmax(t)
    between = [1 - np.corrcoef(x, y)[0, 1] for x, y in zip(q, p, strict=True)]
    within = np.mean([1 - np.corrcoef(x, y)[0, 1] for x, y in zip(q.T, p.T, strict=True)])
    np.testing.assert_allclose(value(distances.dist, s, t), np.array(between) + within, rtol=1e-5)


def test_dkd_is_kl_where_beta_is_the_teachers_mass_of_all_others(pair):
    """Zhao et al. 2022, section 3.1: the weight that hides what is said of the other classes."""
    for s, t in zip(*pair, strict=True):
        s, t = s[None], t[None]
        for temperature in (1.0, 3.0):
            beta = 1 - softmax(t / temperature).max()
            found = value(distances.dkd, s, t, temperature=temperature, beta=beta)
            np.testing.assert_allclose(found, value(distances.kl, s, t, temperature=temperature), rtol=1e-8)


def test_dkd_is_what_paddleclas_computes(pair):
    """-1000 at the target before the softmax of the others: the same as leaving it out."""
    s, t = pair
    mask = 1000.0 * (np.arange(s.shape[1]) == best(s, t)[:, None])
    expected = divergence(*(split(softmax(x), best(s, t))[0] for x in (t, s)))
    p, q = softmax(t - mask), softmax(s - mask)
    expected += np.where(p > 0, p * np.log(np.maximum(p, 1e-300) / np.maximum(q, 1e-300)), 0).sum(axis=1)
    np.testing.assert_allclose(value(distances.dkd, s, t), expected, rtol=1e-9)


def test_far_above_the_logits_kl_and_dkd_are_squares_of_differences(pair):
    """Hinton et al. 2015, section 2.1: half the variance of the differences, over all classes or over the others."""
    s, t = pair
    gap, classes, hot = s - t, s.shape[1], 1e4
    np.testing.assert_allclose(value(distances.kl, s, t, temperature=hot), gap.var(axis=1) / 2, rtol=1e-3)
    own = np.arange(classes) == best(s, t)[:, None]
    others = gap[~own].reshape(len(s), -1)
    odds = gap[own] - others.mean(axis=1)
    expected = (odds**2 * (classes - 1) / classes**2 + others.var(axis=1)) / 2
    np.testing.assert_allclose(value(distances.dkd, s, t, temperature=hot), expected, rtol=1e-3)


@every
def test_equal_logits_push_nowhere(loss, pair):
    _, t = pair
    np.testing.assert_allclose(gradient(loss, t, t), 0, atol=1e-10)
    if loss not in (distances.ce, distances.wsl, LOSSES["wsl at 1"]):
        np.testing.assert_allclose(value(loss, t, t), 0, atol=1e-12)


@every
@pytest.mark.parametrize("shift", [-300.0, 7.5])
def test_shifted_logits_are_the_same_classes(loss, pair, shift):
    s, t = pair
    np.testing.assert_allclose(value(loss, s + shift, t - 2 * shift), value(loss, s, t), rtol=1e-8)


@every
def test_the_order_of_the_classes_and_of_the_images_means_nothing(loss, pair):
    s, t = pair
    classes, rows = (np.random.default_rng(n).permutation(size) for n, size in enumerate(reversed(s.shape)))
    found = value(loss, s[rows][:, classes], t[rows][:, classes])
    np.testing.assert_allclose(found, value(loss, s, t)[rows], rtol=1e-8)


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_dist_asks_for_proportions_only(pair, share):
    """A teacher mixed with the even answer has other probabilities, and the same correlations."""
    s, t = pair
    mixed = np.log((1 - share) * softmax(t) + share / t.shape[1])
    for loss, tolerance in ((LOSSES["dist between classes"], 1e-4), (distances.kl, None)):
        found, unmixed = value(loss, s, mixed), value(loss, s, t)
        if tolerance is None:
            assert not np.allclose(found, unmixed, rtol=1e-2)
        else:
            np.testing.assert_allclose(found, unmixed, rtol=tolerance)


def test_dist_of_the_opposite_is_two():
    s = np.float64([[3.0, 0.0], [0.5, 0.0], [0.0, 1.0]])
    np.testing.assert_allclose(value(distances.dist, s, s[:, ::-1].copy()), 4, atol=1e-5)


def test_dist_within_classes_relates_the_images_of_a_batch():
    """Each image alone is its teacher's likeness in nothing else than the order of two classes."""
    s, t = np.random.default_rng(5).normal(0, 2, (2, 6, 4))
    within = LOSSES["dist within classes"]
    halves = [value(within, s[part], t[part])[0] for part in (slice(3), slice(3, 6))]
    assert abs(value(within, s, t)[0] - np.mean(halves)) > 0.05
    between = LOSSES["dist between classes"]
    alone = [value(between, s[[i]], t[[i]])[0] for i in range(6)]
    np.testing.assert_allclose(value(between, s, t), alone, rtol=1e-12)


@pytest.mark.parametrize("rows", [1, 2])
def test_dist_relates_nothing_to_what_does_not_vary(rows):
    even, t = np.zeros((rows, 3)), np.float64([[2.0, 0.0, 1.0]] * rows)
    np.testing.assert_allclose(value(distances.dist, even, t), 0, atol=1e-3)
    assert np.isfinite(gradient(distances.dist, even, t)).all()
    np.testing.assert_allclose(gradient(distances.dist, t, even), 0, atol=1e-3)


def test_wsl_asks_little_where_the_student_does_better_than_its_teacher():
    teacher = np.float64([[2.0, 0.0, 0.0]])
    for lead, least, most in ((-20.0, 1.0, 1.0), (2.0, 1 - np.exp(-1), 1 - np.exp(-1)), (30.0, 0.0, 1e-10)):
        student = np.float64([[lead, 0.0, 0.0]])
        weight = value(distances.wsl, student, teacher) / (4 * value(distances.ce, student / 2, teacher / 2))
        assert least - 1e-9 <= weight[0] <= most + 1e-9


def test_wsl_of_a_certain_teacher_is_the_cross_entropy():
    """Both hard losses are 0 in float32, then the teacher's alone."""
    certain, unsure = np.float32([[200.0, 0.0]]), np.float32([[1.0, 0.0]])
    np.testing.assert_array_equal(value(distances.wsl, certain, certain), 0)
    expected = value(distances.kl, unsure, certain, temperature=2.0)
    np.testing.assert_allclose(value(distances.wsl, unsure, certain), expected, rtol=1e-6)


@every
def test_finite_at_the_ends_of_the_scale(loss):
    corners = np.float32([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], [0.0, 0.0, 0.0], [1e4, 1e4, -1e4]])
    s, t = np.repeat(corners, 4, axis=0), np.tile(corners, (4, 1))
    assert np.isfinite(value(loss, s, t)).all()
    slope = gradient(loss, s, t)
    assert np.isfinite(slope).all()
    np.testing.assert_allclose(slope.sum(axis=1), 0, atol=0.2)


@every
def test_only_the_student_gets_a_gradient(loss, pair):
    s, t = (paddle.to_tensor(logits, stop_gradient=False) for logits in pair)
    loss(s, t).sum().backward()
    assert s.grad is not None
    assert t.grad is None


@every
@pytest.mark.parametrize("teacher", [[4, 6], [1, 5], [5], [4, 5, 1]], ids=str)
def test_other_shapes_are_refused(loss, teacher):
    with pytest.raises(DataError, match=r"got \[4, 5\] from the student"):
        loss(paddle.zeros([4, 5]), paddle.zeros(teacher))


# The bucket -----------------------------------------------------------------------------------------------------------


def coarse(logits, ids):
    """Logits of the classes of `ids` [B, K] and, in the last column, of all others together."""
    p = softmax(logits)
    kept = np.take_along_axis(p, ids, axis=1)
    np.put_along_axis(p, ids, 0, axis=1)
    return np.log(np.column_stack([kept, p.sum(axis=1)]))


@pytest.fixture(params=[1, 3, 8])
def kept(request):
    """Logits of student and teacher, and both of the teacher's K best classes, in no order, and the rest."""
    draw = np.random.default_rng(request.param)
    s, t = draw.normal(0, 0.5, (2, 5, 30))
    ids = draw.permuted(np.argsort(-t, axis=1)[:, : request.param], axis=1)
    assert (coarse(t, ids)[:, -1] > coarse(t, ids)[:, :-1].max(axis=1)).any(), "a bucket is above every class"
    return s, t, coarse(s, ids), coarse(t, ids)


@pytest.mark.parametrize("loss", [distances.js, distances.true_js, distances.kl])
def test_a_bucket_makes_a_divergence_no_larger(loss, kept):
    s, t, coarse_s, coarse_t = kept
    assert (value(loss, coarse_s, coarse_t) < value(loss, s, t)).all()


def test_of_a_bucket_the_target_against_all_others_is_exact(kept):
    s, t, coarse_s, coarse_t = kept
    exact = value(distances.dkd, s, t, beta=0.0)
    np.testing.assert_allclose(value(distances.dkd, coarse_s, coarse_t, bucket=True, beta=0.0), exact, rtol=1e-9)


def test_of_a_bucket_the_other_classes_say_less(kept):
    s, t, coarse_s, coarse_t = kept
    found = value(distances.dkd, coarse_s, coarse_t, bucket=True, alpha=0.0)
    assert (found < value(distances.dkd, s, t, alpha=0.0)).all()
    if coarse_s.shape[1] == 2:
        np.testing.assert_allclose(found, 0, atol=1e-12)
    else:
        assert (found > 0).all()


def test_of_a_bucket_the_weight_of_wsl_is_exact(kept):
    s, t, coarse_s, coarse_t = kept
    weights = [
        value(distances.wsl, x, y, temperature=1.0, bucket=x is coarse_s) / value(distances.ce, x, y)
        for x, y in ((s, t), (coarse_s, coarse_t))
    ]
    np.testing.assert_allclose(weights[1], weights[0], rtol=1e-9)


@pytest.mark.parametrize("loss", [distances.js, distances.true_js, distances.kl, distances.dkd])
def test_a_bucket_hides_nothing_where_both_agree_on_the_shares_within(loss):
    t = np.random.default_rng(1).normal(0, 1, (4, 9))
    ids = np.argsort(-t, axis=1)[:, :3]
    s = t + 0.7
    np.put_along_axis(s, ids, np.random.default_rng(2).normal(0, 1, (4, 3)), axis=1)
    options = {"bucket": True} if loss is distances.dkd else {}
    np.testing.assert_allclose(value(loss, coarse(s, ids), coarse(t, ids), **options), value(loss, s, t), rtol=1e-9)
