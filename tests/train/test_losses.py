"""Losses against a float64 reckoning in numpy, and by the relations that hold between them.

What is of one row of logits alone, or of dkd, dist and wsl, is tested in tests/ssld/test_distances.py.
"""

from dataclasses import replace
from functools import cache

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssld import distances
from ssld.contracts import Soft
from ssld.errors import DataError, PluginError, RecipeError
from ssld.settings import Named, Term
from ssld.train import losses
from ssld.train.feed import Target


def softmax(x):
    x = np.exp(x - x.real.max(axis=1, keepdims=True))
    return x / x.sum(axis=1, keepdims=True)


def divergence(p, q):
    return (p * np.log(p / q)).sum(axis=1)


def js(s, t):
    p, q = softmax(s), softmax(t)
    return (divergence(p, q) + divergence(q, p)) / 2


def true_js(s, t):
    p, q = softmax(s), softmax(t)
    return (divergence(p, (p + q) / 2) + divergence(q, (p + q) / 2)) / 2


def kl(s, t, temperature=1.0):
    return temperature**2 * divergence(softmax(t / temperature), softmax(s / temperature))


def ce(s, t):
    return -(softmax(t) * np.log(softmax(s))).sum(axis=1)


RECKONED = [(distances.js, js), (distances.true_js, true_js), (distances.kl, kl), (distances.ce, ce)]
DISTANCES = [loss for loss, _ in RECKONED]
names = pytest.mark.parametrize("loss", DISTANCES, ids=lambda loss: loss.__name__)
both = pytest.mark.parametrize(("loss", "reckoned"), RECKONED, ids=[loss.__name__ for loss in DISTANCES])


@pytest.fixture(params=[(1, 2, 1.0), (7, 10, 3.0), (4, 1000, 2.0)], ids=str)
def pair(request):
    batch, classes, scale = request.param
    draws = np.random.default_rng(classes).normal(0, scale, (2, batch, classes))
    return draws[0], draws[1]


def value(loss, s, t, **options):
    result = loss(paddle.to_tensor(s), paddle.to_tensor(t), **options)
    assert list(result.shape) == [len(s)]
    return result.numpy()


def gradient(loss, s, t, **options):
    student = paddle.to_tensor(s, stop_gradient=False)
    loss(student, paddle.to_tensor(t), **options).sum().backward()
    return student.grad.numpy()


@both
def test_equals_the_float64_reckoning(loss, reckoned, pair):
    s, t = pair
    np.testing.assert_allclose(value(loss, s, t), reckoned(s, t), rtol=1e-10)
    single = value(loss, s.astype(np.float32), t.astype(np.float32))
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, reckoned(s, t), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1, 4.0, 100.0])
def test_kl_at_a_temperature(pair, temperature):
    np.testing.assert_allclose(value(distances.kl, *pair, temperature=temperature), kl(*pair, temperature), rtol=1e-8)


def test_js_is_what_paddleclas_computes(pair):
    """The mean over batch and classes, times the number of classes, of both directions with 1e-12 in the logarithms."""
    s, t = pair
    p, q, eps = softmax(s), softmax(t), 1e-12
    there = (p * np.log((p + eps) / (q + eps)) + q * np.log((q + eps) / (p + eps))) * s.shape[1] / 2
    np.testing.assert_allclose(value(distances.js, s, t).mean(), there.mean(), rtol=1e-6)


def test_js_is_not_jensen_shannon(pair):
    assert (value(distances.js, *pair) > value(distances.true_js, *pair)).all()


@pytest.mark.parametrize("loss", [distances.js, distances.true_js])
def test_symmetry(loss, pair):
    s, t = pair
    np.testing.assert_allclose(value(loss, s, t), value(loss, t, s), rtol=1e-12)


def test_kl_is_not_symmetric(pair):
    s, t = pair
    assert not np.allclose(value(distances.kl, s, t), value(distances.kl, t, s), rtol=1e-3)


@names
def test_the_teachers_probabilities_are_the_minimum(loss, pair):
    _, t = pair
    np.testing.assert_allclose(gradient(loss, t, t), 0, atol=1e-12)
    least = value(loss, t, t)
    if loss is not distances.ce:
        np.testing.assert_allclose(least, 0, atol=1e-12)
    for seed in range(5):
        assert (value(loss, t + np.random.default_rng(seed).normal(0, 1, t.shape), t) > least).all()


def test_true_js_is_bounded_by_log_2():
    s, t = np.diag([50.0, 50.0, 0.0])[:2], np.diag([50.0, 50.0, 0.0])[1::-1]
    np.testing.assert_allclose(value(distances.true_js, s, t), np.log(2), rtol=1e-12)
    apart = np.float32([[1e4, -1e4]]), np.float32([[-1e4, 1e4]])
    np.testing.assert_allclose(value(distances.true_js, *apart), np.log(2), rtol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_ce_minus_kl_is_the_teachers_entropy(pair, temperature):
    s, t = (logits / temperature for logits in pair)
    entropy = -(softmax(t) * np.log(softmax(t))).sum(axis=1)
    distance = value(distances.kl, *pair, temperature=temperature) / temperature**2
    np.testing.assert_allclose(value(distances.ce, s, t) - distance, entropy, rtol=1e-8)


@names
def test_a_batch_is_its_samples_one_by_one(loss, pair):
    s, t = (logits.astype(np.float32) for logits in pair)
    alone = [value(loss, s[i : i + 1], t[i : i + 1]) for i in range(len(s))]
    np.testing.assert_allclose(value(loss, s, t), np.concatenate(alone), rtol=1e-6, atol=1e-7)


@both
def test_gradient_by_central_differences(loss, reckoned):
    s, t = np.random.default_rng(3).normal(0, 2, (2, 3, 5))
    expected, step = np.zeros_like(s), 1e-5
    for index in np.ndindex(s.shape):
        shifted = np.zeros_like(s)
        shifted[index] = step
        expected[index] = (reckoned(s + shifted, t) - reckoned(s - shifted, t)).sum() / (2 * step)
    np.testing.assert_allclose(gradient(loss, s, t), expected, rtol=1e-6, atol=1e-8)


def test_closed_form_of_the_kl_and_ce_gradient(pair):
    s, t = pair
    for loss in (distances.kl, distances.ce):
        np.testing.assert_allclose(gradient(loss, s, t), softmax(s) - softmax(t), atol=1e-12)
    warm = gradient(distances.kl, s, t, temperature=4.0)
    np.testing.assert_allclose(warm, 4 * (softmax(s / 4) - softmax(t / 4)), atol=1e-12)


def test_hard_ce_is_ce_with_a_certain_teacher(pair):
    s, _ = pair
    labels = np.arange(len(s)) % s.shape[1]
    result = value(losses.hard_ce, s, labels)
    np.testing.assert_allclose(result, -np.log(softmax(s))[np.arange(len(s)), labels], rtol=1e-10)
    certain = np.where(np.eye(s.shape[1])[labels] > 0, 1e4, -1e4)
    np.testing.assert_allclose(result, value(distances.ce, s, certain), rtol=1e-10)


def test_hard_ce_gradient(pair):
    s, _ = pair
    labels = np.arange(len(s)) % s.shape[1]
    expected = softmax(s) - np.eye(s.shape[1])[labels]
    np.testing.assert_allclose(gradient(losses.hard_ce, s, labels), expected, atol=1e-12)


@pytest.mark.parametrize("smoothing", [0.1, 0.9])
def test_smoothed_labels_are_a_teacher_of_these_probabilities(pair, smoothing):
    s, _ = pair
    labels = np.arange(len(s)) % s.shape[1]
    target = (1 - smoothing) * np.eye(s.shape[1])[labels] + smoothing / s.shape[1]
    expected = -(target * np.log(softmax(s))).sum(axis=1)
    np.testing.assert_allclose(value(losses.hard_ce, s, labels, smoothing=smoothing), expected, rtol=1e-10)
    np.testing.assert_allclose(value(distances.ce, s, np.log(target)), expected, rtol=1e-10)
    slope = gradient(losses.hard_ce, s, labels, smoothing=smoothing)
    np.testing.assert_allclose(slope, softmax(s) - target, atol=1e-12)


@pytest.mark.parametrize("label", [-100, -1, 3])
def test_hard_ce_refuses_a_label_outside_the_classes(label):
    with pytest.raises(DataError, match=f"from 0 to 2, got {label} in"):
        losses.hard_ce(paddle.zeros([2, 3]), paddle.to_tensor([0, label]))


@pytest.mark.parametrize("labels", [[0, 1, 2], [[0], [1]]], ids=str)
def test_hard_ce_refuses_labels_of_another_shape(labels):
    with pytest.raises(DataError, match="one label for each of 2 samples"):
        losses.hard_ce(paddle.zeros([2, 3]), paddle.to_tensor(labels))


def coarse(logits, ids, temperature=1.0):
    """Logits of the coarser classification at the temperature: the classes of `ids`, and all others as one."""
    p = softmax(logits / temperature)
    others = np.ones(p.shape, bool)
    np.put_along_axis(others, ids, False, axis=1)
    return temperature * np.log(np.column_stack([np.take_along_axis(p, ids, axis=1), (p * others).sum(axis=1)]))


def derivative(function, x):
    """Of the sum of what a function of rows returns, by x: the imaginary part of a step in imaginary direction.

    Exact to rounding, since nothing is subtracted (Squire and Trapp 1998).
    """
    columns = np.eye(x.shape[1]) * 1e-30j
    return np.column_stack([function(x + column).imag / 1e-30 for column in columns])


def sparse(teacher, k, temperature=1.0, seed=0):
    """Soft labels of any k classes of each sample, in no order."""
    order = np.random.default_rng(seed).permuted(np.tile(np.arange(teacher.shape[1]), (len(teacher), 1)), axis=1)
    ids = order[:, :k].copy()
    return Soft(ids, coarse(teacher, ids, temperature).astype(np.float32), temperature)


@cache
def bound(name, **options):
    """The loss of that name; to look for it anew in every example would take most of the time of a test."""
    return losses.named(Named(name=name, **options))


def dense(teacher):
    return Soft(None, teacher.astype(np.float32))


def evaluated(loss, s, soft):
    """Losses and their gradient by the student's logits."""
    student = paddle.to_tensor(s, stop_gradient=False)
    result = loss(student, soft)
    result.sum().backward()
    return result.numpy(), student.grad.numpy()


@st.composite
def batches(draw):
    """Students, teachers, and how many classes the labels hold at which temperature."""
    classes = draw(st.integers(2, 12))
    scale = draw(st.sampled_from([0.1, 2.0, 8.0]))
    draws = np.random.default_rng(draw(st.integers(0, 2**32))).normal(0, scale, (2, draw(st.integers(1, 4)), classes))
    soft = sparse(draws[1], draw(st.integers(1, classes - 1)), draw(st.sampled_from([0.5, 1.0, 4.0])))
    return draws[0], soft


@given(batches())
@settings(max_examples=60, deadline=None)
def test_bucketed_logits_and_their_gradient(batch):
    s, soft = batch
    weight = np.random.default_rng(0).normal(0, 1, soft.logits.shape)
    student = paddle.to_tensor(s, stop_gradient=False)
    result = losses.bucketed(student, soft)
    (result * paddle.to_tensor(weight)).sum().backward()
    t = soft.temperature
    np.testing.assert_allclose(softmax(result.numpy() / t), softmax(coarse(s, soft.ids, t) / t), rtol=1e-9)
    # coarse() gives logits less a constant of each row, the student's own normalizer
    slope = derivative(
        lambda x: ((coarse(x, soft.ids, t) + t * np.log(np.exp(x / t).sum(axis=1, keepdims=True))) * weight).sum(
            axis=1
        ),
        s,
    )
    np.testing.assert_allclose(student.grad.numpy(), slope, rtol=1e-9, atol=1e-12)


@both
@given(batch=batches())
@settings(max_examples=30, deadline=None)
def test_sparse_labels_equal_the_float64_reckoning(loss, reckoned, batch):
    s, soft = batch
    options = {"temperature": soft.temperature} if loss is distances.kl else {}
    # a loss without a temperature of its own reads the labels at 1
    soft = soft if options else replace(soft, temperature=1.0)

    def expected(x):
        return reckoned(coarse(x, soft.ids, soft.temperature), soft.logits.astype(np.float64), **options)

    found, slope = evaluated(bound(loss.__name__, **options), s, soft)
    np.testing.assert_allclose(found, expected(s), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(slope, derivative(expected, s), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale", [0.1, 3.0])
@both
def test_sparse_labels_in_single_precision(loss, reckoned, scale):
    s, t = np.random.default_rng(5).normal(0, scale, (2, 4, 1000)).astype(np.float32)
    soft = sparse(t.astype(np.float64), 10)

    def expected(x):
        return reckoned(coarse(x, soft.ids), soft.logits.astype(np.float64))

    found, slope = evaluated(bound(loss.__name__), s, soft)
    assert found.dtype == slope.dtype == np.float32
    np.testing.assert_allclose(found, expected(s.astype(np.float64)), rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(slope, derivative(expected, s.astype(np.float64)), atol=1e-6)


@names
def test_labels_of_all_classes_but_one_are_dense_labels(loss, pair):
    s, t = pair
    soft = sparse(t, t.shape[1] - 1)
    found, slope = evaluated(bound(loss.__name__), s, soft)
    np.testing.assert_allclose(found, value(loss, s, t), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(slope, gradient(loss, s, t), rtol=1e-5, atol=1e-6)


@names
def test_dense_labels_are_not_bucketed(loss, pair):
    s, t = (logits.astype(np.float32) for logits in pair)
    found, slope = evaluated(bound(loss.__name__), s, Soft(None, t))
    np.testing.assert_array_equal(found, value(loss, s, t))
    np.testing.assert_array_equal(slope, gradient(loss, s, t))


@names
@given(batch=batches(), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_the_order_of_the_kept_classes_means_nothing(loss, batch, seed):
    s, soft = batch
    soft = replace(soft, temperature=1.0)
    k = soft.ids.shape[1]
    order = np.random.default_rng(seed).permutation(k)
    turned = replace(soft, ids=soft.ids[:, order], logits=soft.logits[:, [*order, k]])
    found, again = (evaluated(bound(loss.__name__), s, labels) for labels in (soft, turned))
    for one, other in zip(found, again, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("odds", [-700.0, -69.0, -1.0, 3.0, 69.0, 700.0])
def test_one_class_and_a_rest_of_any_mass(odds):
    """Closed form: KL's gradient is the student's mass less the teacher's, of which each other class has its share.

    odds: log of the student's mass of the one class over that of the three others, 1e-30 at ± 69.
    """
    s, soft = np.float64([[0.0, odds + np.log(3), 0.0, 0.0]]), Soft(np.int64([[1]]), np.float32([[0.0, 0.0]]))
    log_kept, log_rest = -np.logaddexp(0, -odds), -np.logaddexp(0, odds)
    push = np.exp(log_kept) - 0.5
    for logits in (s, s.astype(np.float32)):
        found, slope = evaluated(losses.named(Named(name="kl")), logits, soft)
        np.testing.assert_allclose(found, -np.log(2) - (log_kept + log_rest) / 2, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(slope, [[-push / 3, push, -push / 3, -push / 3]], atol=1e-6)


@names
@pytest.mark.parametrize("gap", [-3e4, -200.0, 200.0, 3e4])
def test_sparse_labels_stay_finite_at_the_ends_of_the_scale(loss, gap):
    """A student whose whole mass, or none of it, is outside the K; a teacher that leaves nothing to the others."""
    s = np.float32([[gap, gap - 1, 0.0, -1.0, -gap], [0.0, gap, gap, gap, 0.0], [-gap, gap, 0.0, gap, gap]])
    for rest in (-104.0, 0.0, 50.0):
        soft = Soft(np.int64([[0, 1], [4, 1], [2, 0]]), np.float32([[0.0, -1.0, rest]] * 3))
        found, slope = evaluated(bound(loss.__name__), s, soft)
        assert np.isfinite(found).all()
        assert np.isfinite(slope).all()
        np.testing.assert_allclose(slope.sum(axis=1), 0, atol=2e-2)


def test_a_tiny_rest_of_the_teacher_pushes_the_students_rest_down():
    s = np.float64([[1.0, 0.5, 0.0, 2.0]])
    for reckoned_loss in (distances.js, distances.kl, distances.ce):
        soft = Soft(np.int64([[0, 3]]), np.float32([[0.0, 0.0, -104.0]]))
        _, slope = evaluated(losses.named(Named(name=reckoned_loss.__name__)), s, soft)
        share = np.exp(s[0, 1:3]) / np.exp(s[0, 1:3]).sum()
        assert (slope[0, 1:3] > 0).all()
        np.testing.assert_allclose(slope[0, 1:3] / slope[0, 1:3].sum(), share, rtol=1e-12)


def test_bucketing_changes_neither_logits_nor_labels_and_gives_the_same_bits_again():
    s, t = np.random.default_rng(2).normal(0, 3, (2, 8, 100)).astype(np.float32)
    soft, js = sparse(t, 5), bound("js")
    ids, student = soft.ids.copy(), paddle.to_tensor(s, stop_gradient=False)
    js(student, soft).sum().backward()
    first = student.grad.numpy().copy()
    student.clear_gradient(set_to_zero=False)
    js(student, soft).sum().backward()
    np.testing.assert_array_equal(student.grad.numpy(), first)
    np.testing.assert_array_equal(student.numpy(), s)
    np.testing.assert_array_equal(soft.ids, ids)


def test_a_bucketed_batch_is_its_samples_one_by_one():
    s, t = np.random.default_rng(2).normal(0, 3, (2, 8, 100)).astype(np.float32)
    soft, js = sparse(t, 5), bound("js")
    whole = evaluated(js, s, soft)
    alone = [evaluated(js, s[[i]], Soft(soft.ids[[i]], soft.logits[[i]])) for i in range(len(s))]
    for one, many in zip(whole, zip(*alone, strict=True), strict=True):
        np.testing.assert_allclose(one, np.concatenate(many), rtol=1e-6, atol=1e-7)


def test_gradients_of_soft_and_hard_labels_add_up():
    s, t = np.random.default_rng(2).normal(0, 3, (2, 8, 100))
    soft, hard, js = sparse(t, 5), paddle.arange(8), bound("js")
    _, both_slopes = evaluated(lambda logits, soft: js(logits, soft) + losses.hard_ce(logits, hard), s, soft)
    _, soft_slope = evaluated(js, s, soft)
    _, hard_slope = evaluated(lambda logits, _: losses.hard_ce(logits, hard), s, soft)
    np.testing.assert_allclose(both_slopes, soft_slope + hard_slope, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    "ids",
    [[[0, 1]], [[0, 5], [0, 1]], [[0, -1], [0, 1]], [[0, 1], [3, 3]], [[0, 1, 2, 3, 4]] * 2, [[], []]],
    ids=["one sample", "class 5", "class -1", "twice", "all classes", "none"],
)
def test_labels_of_other_classes_are_refused(ids):
    ids = np.array(ids, np.int64)
    soft = Soft(ids, np.zeros((len(ids), ids.shape[1] + 1), np.float32))
    with pytest.raises(DataError, match="classes 0 to 4, each once, for 2 samples"):
        losses.bucketed(paddle.zeros([2, 5]), soft)


def test_named_binds_the_options(pair):
    s, t = (logits.astype(np.float32) for logits in pair)
    loss = losses.named(Named(name="kl", temperature=4.0))
    found, _ = evaluated(loss, s, Soft(None, t))
    np.testing.assert_array_equal(found, value(distances.kl, s, t, temperature=4.0))


@pytest.mark.parametrize(
    ("name", "options", "stored"), [("kl", {"temperature": 4.0}, 1.0), ("kl", {}, 4.0), ("js", {}, 4.0)], ids=str
)
def test_sparse_labels_of_another_temperature_are_refused(name, options, stored):
    loss = losses.named(Named(name=name, **options))
    s, t = np.random.default_rng(2).normal(0, 3, (2, 3, 7))
    wanted = (
        rf"made at its temperature, {options.get('temperature', 1.0)}, got {stored}, and 2 of 7 classes; .*top_k: 7"
    )
    with pytest.raises(RecipeError, match=wanted):
        loss(paddle.to_tensor(s), sparse(t, 2, stored))


def test_labels_of_all_classes_serve_every_temperature(pair):
    s, t = (logits.astype(np.float32) for logits in pair)
    loss = losses.named(Named(name="kl", temperature=4.0))
    warm, _ = evaluated(loss, s, Soft(None, t, temperature=2.0))
    np.testing.assert_array_equal(warm, evaluated(loss, s, Soft(None, t))[0])


@pytest.mark.parametrize(("options", "wanted"), [({}, 2.0), ({"temperature": 3.0}, 3.0)], ids=["default", "option"])
@pytest.mark.parametrize("named_parameter", [True, False])
def test_a_strangers_temperature_counts(options, wanted, named_parameter, monkeypatch):
    def warm(student, teacher, temperature: float = 2.0):
        return distances.kl(student, teacher, temperature)

    def any_options(student, teacher, **more):
        return distances.kl(student, teacher, **more)

    wanted = wanted if named_parameter or options else 1.0
    monkeypatch.setattr(distances, "js", warm if named_parameter else any_options)
    loss = losses.named(Named(name="js", **options))
    s, t = np.random.default_rng(2).normal(0, 3, (2, 3, 7))
    found, _ = evaluated(loss, s, sparse(t, 2, wanted))
    assert (found > 0).all()
    with pytest.raises(RecipeError, match=f"its temperature, {wanted}, got 0.5"):
        loss(paddle.to_tensor(s), sparse(t, 2, 0.5))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"temperatur": 4.0}, "temperatur"), ({"temperature": "warm"}, "temperature"), ({"temperature": 0}, "> 0")],
    ids=str,
)
def test_named_refuses_wrong_options(options, message):
    with pytest.raises(RecipeError, match=message):
        losses.named(Named(name="kl", **options))


@pytest.mark.parametrize("given", ["student", "teacher", "labels", "bucket"])
def test_what_the_stage_gives_is_no_option(given):
    with pytest.raises(RecipeError, match=f"loss dkd: expected options of its own, got {given}, which the stage gives"):
        losses.weighted(terms({"name": "dkd", given: True}))


def test_named_refuses_an_unknown_loss():
    with pytest.raises(RecipeError, match="jss"):
        losses.named(Named(name="jss"))


@pytest.mark.parametrize("result", [lambda s: s.sum(), lambda s: s, lambda s: 0.0], ids=["sum", "matrix", "number"])
def test_named_refuses_what_is_not_one_value_per_sample(result, monkeypatch):
    monkeypatch.setattr(distances, "js", lambda student, teacher: result(student))
    with pytest.raises(PluginError, match="one value per sample"):
        losses.named(Named(name="js"))


def test_named_tries_a_loss_in_the_sparse_form_too(monkeypatch):
    monkeypatch.setattr(
        distances, "js", lambda student, teacher: student.sum() if student.shape[1] < 3 else student[:, 0]
    )
    with pytest.raises(PluginError, match=r"for logits \[2, 2\]"):
        losses.named(Named(name="js"))


# Sums -----------------------------------------------------------------------------------------------------------------


def terms(*settings):
    return [Term.model_validate({"name": s} if isinstance(s, str) else s) for s in settings]


def test_a_sum_is_weighted(pair):
    s, t = pair
    whole = evaluated(
        losses.weighted(terms("js", {"name": "dist", "weight": 2, "beta": 3}, {"name": "wsl"})), s, dense(t)
    )
    parts = [evaluated(losses.named(term), s, dense(t)) for term in terms("js", {"name": "dist", "beta": 3}, "wsl")]
    for found, (first, second, third) in zip(whole, zip(*parts, strict=True), strict=True):
        np.testing.assert_allclose(found, first + 2 * second + third, rtol=1e-9, atol=1e-12)


def test_kept_labels_are_bucketed_for_every_term():
    s, t = np.random.default_rng(2).normal(0, 1, (2, 6, 40))
    ids = np.argsort(-t, axis=1)[:, :3]
    soft = Soft(ids, coarse(t, ids).astype(np.float32))
    assert (soft.logits.argmax(axis=1) == 3).any(), "of some images the rest has more than any class"
    found, _ = evaluated(losses.weighted(terms("kl", {"name": "dkd", "weight": 3, "beta": 0})), s, soft)
    exact = value(distances.dkd, s, t, beta=0.0)
    np.testing.assert_allclose(found, kl(coarse(s, ids), coarse(t, ids)) + 3 * exact, rtol=1e-5)


def test_the_objective_gives_true_classes_to_a_loss_that_needs_them_and_asks_for_them_only_then(pair):
    s, t = pair
    hard = np.arange(len(s)) % s.shape[1]
    target = Target(0, np.zeros(0), ("a",) * len(s), hard, dense(t))
    told = losses.objective(terms({"name": "dkd", "target": "labels"}, "kl"))(paddle.to_tensor(s), target)
    expected = value(distances.dkd, s, t, labels=paddle.to_tensor(hard), target="labels") + kl(s, t)
    np.testing.assert_allclose(told.numpy(), expected, rtol=1e-6)
    unlabeled = replace(target, hard=None)
    with pytest.raises(DataError, match="expected labeled images"):
        losses.objective(terms({"name": "dkd", "target": "labels"}))(paddle.to_tensor(s), unlabeled)
    found = losses.objective(terms("dkd"))(paddle.to_tensor(s), unlabeled)
    np.testing.assert_allclose(found.numpy(), value(distances.dkd, s, t), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["dist", "wsl"])
def test_labels_of_some_classes_are_refused_where_all_are_needed(name):
    s, t = np.random.default_rng(2).normal(0, 3, (2, 3, 7))
    with pytest.raises(RecipeError, match=f"loss {name}: expected soft labels of all classes, got 2 of 7 classes"):
        losses.weighted(terms("js", name))(paddle.to_tensor(s), sparse(t, 2))


def test_every_term_of_a_sum_is_tried():
    with pytest.raises(RecipeError, match=r"loss 'dist' .*gama: unknown option, did you mean gamma"):
        losses.weighted(terms("js", {"name": "dist", "gama": 2}))
    with pytest.raises(RecipeError, match=r"target: expected teacher or labels, got 'student'"):
        losses.weighted(terms({"name": "dkd", "target": "student"}))
