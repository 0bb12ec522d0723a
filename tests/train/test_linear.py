"""That the students' fully connected layer is paddle's, and computes as paddle's does."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from paddle import nn

from ssld.train import linear
from ssld.train.linear import Linear

SHAPES = [(1, 1, 1), (3, 5, 2), (64, 96, 10), (16, 200, 1000)]


def both(features: int, classes: int, bias: bool = True) -> tuple[nn.Linear, Linear]:
    """paddle's layer and ours, from one seed."""
    made = []
    for kind in (nn.Linear, Linear):
        paddle.seed(1)
        made.append(kind(features, classes, bias_attr=None if bias else False))
    return made[0], made[1]


def pass_through(layer: nn.Linear, x: np.ndarray, gradient: np.ndarray) -> list[np.ndarray]:
    """The output, and the gradients of input, weight and bias."""
    images = paddle.to_tensor(x, stop_gradient=False)
    out = layer(images)
    out.backward(paddle.to_tensor(gradient))
    return [out.numpy(), images.grad.numpy(), *(weight.grad.numpy() for weight in layer.parameters())]


@pytest.fixture
def products(monkeypatch):
    """How often our product was taken."""
    taken = []
    known = np.matmul
    monkeypatch.setattr(linear.np, "matmul", lambda *parts, **wishes: taken.append(1) or known(*parts, **wishes))
    return taken


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("count", "features", "classes"), SHAPES)
def test_outputs_and_gradients_are_those_of_the_definition(count, features, classes, bias, products):
    random = np.random.default_rng(0)
    x, gradient = random.normal(size=(count, features)), random.normal(size=(count, classes))
    paddles, ours = both(features, classes, bias)
    assert all(np.array_equal(own, other) for own, other in zip(paddles.parameters(), ours.parameters(), strict=True))
    found = pass_through(ours, x.astype(np.float32), gradient.astype(np.float32))
    assert len(products) == 3
    weight = ours.weight.numpy().astype(np.float64)
    expected = [x @ weight, gradient @ weight.T, x.T @ gradient, *([gradient.sum(0)] if bias else [])]
    if bias:
        # drawn as 0
        ours.bias.set_value(np.arange(classes, dtype=np.float32))
        again = ours(paddle.to_tensor(x.astype(np.float32))).numpy()
        np.testing.assert_allclose(again - found[0], np.broadcast_to(np.arange(classes), again.shape), atol=1e-3)
    for got, wanted in zip(found, expected, strict=True):
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, wanted, atol=1e-5 * max(1, np.abs(wanted).max()))


def test_nothing_is_computed_for_what_wants_no_gradient(products):
    _, ours = both(5, 2)
    ours.bias.stop_gradient = True
    ours(paddle.ones([3, 5])).sum().backward()
    assert len(products) == 2
    assert ours.bias.grad is None
    np.testing.assert_array_equal(ours.weight.grad.numpy(), np.full((5, 2), 3, np.float32))


def in_evaluation(layer: Linear, x: paddle.Tensor) -> None:
    layer.eval()
    layer(x)


def without_gradients(layer: Linear, x: paddle.Tensor) -> None:
    with paddle.no_grad():
        layer(x)


def of_three_axes(layer: Linear, x: paddle.Tensor) -> None:
    layer(x.unsqueeze(0))


@pytest.mark.parametrize("use", [in_evaluation, without_gradients, of_three_axes])
def test_everything_else_is_paddles(use, products):
    _, ours = both(5, 2)
    use(ours, paddle.ones([3, 5]))
    assert products == []


def test_one_variable_switches_it_off(monkeypatch, products):
    monkeypatch.setenv("SSLD_FAST_CONV", "0")
    _, ours = both(5, 2)
    ours(paddle.ones([3, 5])).sum().backward()
    assert products == []
    assert ours.weight.grad is not None
