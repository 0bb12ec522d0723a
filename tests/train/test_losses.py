"""Losses against a float64 reckoning in numpy, and by the relations that hold between them."""

import numpy as np
import paddle
import pytest

from ssld.errors import DataError, PluginError, RecipeError
from ssld.settings import Named
from ssld.train import losses


def softmax(x):
    x = np.exp(x - x.max(axis=1, keepdims=True))
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


RECKONED = [(losses.js, js), (losses.true_js, true_js), (losses.kl, kl), (losses.ce, ce)]
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
    np.testing.assert_allclose(value(losses.kl, *pair, temperature=temperature), kl(*pair, temperature), rtol=1e-8)


def test_js_is_what_paddleclas_computes(pair):
    """The mean over batch and classes, times the number of classes, of both directions with 1e-12 in the logarithms."""
    s, t = pair
    p, q, eps = softmax(s), softmax(t), 1e-12
    there = (p * np.log((p + eps) / (q + eps)) + q * np.log((q + eps) / (p + eps))) * s.shape[1] / 2
    np.testing.assert_allclose(value(losses.js, s, t).mean(), there.mean(), rtol=1e-6)


def test_js_is_not_jensen_shannon(pair):
    assert (value(losses.js, *pair) > value(losses.true_js, *pair)).all()


@pytest.mark.parametrize("loss", [losses.js, losses.true_js])
def test_symmetry(loss, pair):
    s, t = pair
    np.testing.assert_allclose(value(loss, s, t), value(loss, t, s), rtol=1e-12)


def test_kl_is_not_symmetric(pair):
    s, t = pair
    assert not np.allclose(value(losses.kl, s, t), value(losses.kl, t, s), rtol=1e-3)


@names
def test_the_teachers_probabilities_are_the_minimum(loss, pair):
    _, t = pair
    np.testing.assert_allclose(gradient(loss, t, t), 0, atol=1e-12)
    least = value(loss, t, t)
    if loss is not losses.ce:
        np.testing.assert_allclose(least, 0, atol=1e-12)
    for seed in range(5):
        assert (value(loss, t + np.random.default_rng(seed).normal(0, 1, t.shape), t) > least).all()


def test_true_js_is_bounded_by_log_2():
    s, t = np.diag([50.0, 50.0, 0.0])[:2], np.diag([50.0, 50.0, 0.0])[1::-1]
    np.testing.assert_allclose(value(losses.true_js, s, t), np.log(2), rtol=1e-12)
    apart = np.float32([[1e4, -1e4]]), np.float32([[-1e4, 1e4]])
    np.testing.assert_allclose(value(losses.true_js, *apart), np.log(2), rtol=1e-6)


@names
@pytest.mark.parametrize("shift", [-300.0, 7.5])
def test_shifted_logits_are_the_same_classes(loss, pair, shift):
    s, t = pair
    np.testing.assert_allclose(value(loss, s + shift, t - 2 * shift), value(loss, s, t), rtol=1e-8)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_ce_minus_kl_is_the_teachers_entropy(pair, temperature):
    s, t = (logits / temperature for logits in pair)
    entropy = -(softmax(t) * np.log(softmax(t))).sum(axis=1)
    distance = value(losses.kl, *pair, temperature=temperature) / temperature**2
    np.testing.assert_allclose(value(losses.ce, s, t) - distance, entropy, rtol=1e-8)


@names
def test_a_batch_is_its_samples_one_by_one(loss, pair):
    s, t = (logits.astype(np.float32) for logits in pair)
    alone = [value(loss, s[i : i + 1], t[i : i + 1]) for i in range(len(s))]
    np.testing.assert_array_equal(value(loss, s, t), np.concatenate(alone))


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
    for loss in (losses.kl, losses.ce):
        np.testing.assert_allclose(gradient(loss, s, t), softmax(s) - softmax(t), atol=1e-12)
    warm = gradient(losses.kl, s, t, temperature=4.0)
    np.testing.assert_allclose(warm, 4 * (softmax(s / 4) - softmax(t / 4)), atol=1e-12)


@names
def test_finite_at_the_ends_of_the_scale(loss):
    corners = np.float32([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], [0.0, 0.0, 0.0], [1e4, 1e4, -1e4]])
    s, t = np.repeat(corners, 4, axis=0), np.tile(corners, (4, 1))
    assert np.isfinite(value(loss, s, t)).all()
    slope = gradient(loss, s, t)
    assert np.isfinite(slope).all()
    np.testing.assert_allclose(slope.sum(axis=1), 0, atol=2e-2)


@names
def test_only_the_student_gets_a_gradient(loss, pair):
    s, t = (paddle.to_tensor(logits, stop_gradient=False) for logits in pair)
    loss(s, t).sum().backward()
    assert s.grad is not None
    assert t.grad is None


@names
@pytest.mark.parametrize("teacher", [[4, 6], [1, 5], [5], [4, 5, 1]], ids=str)
def test_other_shapes_are_refused(loss, teacher):
    with pytest.raises(DataError, match=r"got \[4, 5\] from the student"):
        loss(paddle.zeros([4, 5]), paddle.zeros(teacher))


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan"), float("inf")])
def test_kl_refuses_a_temperature(temperature):
    with pytest.raises(RecipeError, match="above 0"):
        losses.kl(paddle.zeros([1, 2]), paddle.zeros([1, 2]), temperature=temperature)


def test_hard_ce_is_ce_with_a_certain_teacher(pair):
    s, _ = pair
    labels = np.arange(len(s)) % s.shape[1]
    result = value(losses.hard_ce, s, labels)
    np.testing.assert_allclose(result, -np.log(softmax(s))[np.arange(len(s)), labels], rtol=1e-10)
    certain = np.where(np.eye(s.shape[1])[labels] > 0, 1e4, -1e4)
    np.testing.assert_allclose(result, value(losses.ce, s, certain), rtol=1e-10)


def test_hard_ce_gradient(pair):
    s, _ = pair
    labels = np.arange(len(s)) % s.shape[1]
    expected = softmax(s) - np.eye(s.shape[1])[labels]
    np.testing.assert_allclose(gradient(losses.hard_ce, s, labels), expected, atol=1e-12)


@pytest.mark.parametrize("label", [-100, -1, 3])
def test_hard_ce_refuses_a_label_outside_the_classes(label):
    with pytest.raises(DataError, match=f"from 0 to 2, got {label} in"):
        losses.hard_ce(paddle.zeros([2, 3]), paddle.to_tensor([0, label]))


@pytest.mark.parametrize("labels", [[0, 1, 2], [[0], [1]]], ids=str)
def test_hard_ce_refuses_labels_of_another_shape(labels):
    with pytest.raises(DataError, match="one label for each of 2 samples"):
        losses.hard_ce(paddle.zeros([2, 3]), paddle.to_tensor(labels))


def test_named_binds_the_options(pair):
    loss = losses.named(Named(name="kl", temperature=4.0))
    np.testing.assert_array_equal(value(loss, *pair), value(losses.kl, *pair, temperature=4.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"temperatur": 4.0}, "temperatur"), ({"temperature": "warm"}, "temperature"), ({"temperature": 0}, "above 0")],
    ids=str,
)
def test_named_refuses_wrong_options(options, message):
    with pytest.raises(RecipeError, match=message):
        losses.named(Named(name="kl", **options))


def test_named_refuses_an_unknown_loss():
    with pytest.raises(RecipeError, match="jss"):
        losses.named(Named(name="jss"))


@pytest.mark.parametrize("result", [lambda s: s.sum(), lambda s: s, lambda s: 0.0], ids=["sum", "matrix", "number"])
def test_named_refuses_what_is_not_one_value_per_sample(result, monkeypatch):
    monkeypatch.setattr(losses, "js", lambda student, teacher: result(student))
    with pytest.raises(PluginError, match="one value per sample"):
        losses.named(Named(name="js"))
