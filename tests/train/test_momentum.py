"""The optimizer against its formula in float64, and the promise that a restored one goes on bit for bit."""

import hashlib

import numpy as np
import paddle
import pytest
from paddle import nn

from ssld.errors import CheckpointError, SsldError
from ssld.train.momentum import Momentum

RATES = [0.1, 0.1, 0.05, 0.2, 0.01]


class Net(nn.Layer):
    """Two layers, one of which decays by its own rule, or not at all."""

    def __init__(self, decay=None):
        super().__init__()
        own = None if decay is None else paddle.ParamAttr(regularizer=paddle.regularizer.L2Decay(decay))
        self.first = nn.Linear(4, 5, weight_attr=own)
        self.norm = nn.LayerNorm(5)
        self.last = nn.Linear(5, 3)

    def forward(self, x):
        return self.last(self.norm(self.first(x)))


def net(decay=None):
    paddle.seed(5)
    return Net(decay)


def gradients(layer, step):
    """Set a made-up gradient on every parameter, and return them in float64."""
    draw, made = np.random.default_rng(step), {}
    for name, weight in layer.named_parameters():
        made[name] = draw.normal(size=weight.shape).astype(np.float32)
        (weight * paddle.to_tensor(made[name])).sum().backward()
    return {name: array.astype(np.float64) for name, array in made.items()}


def weights(layer):
    return {name: weight.numpy().astype(np.float64) for name, weight in layer.named_parameters()}


def train(layer, optimizer, steps):
    for step in steps:
        gradients(layer, step)
        optimizer.step(RATES[step])


def sha256(layer):
    return hashlib.sha256(b"".join(weight.numpy().tobytes() for weight in layer.parameters())).hexdigest()


def clipped(g, clip_norm):
    norm = np.sqrt(sum((array**2).sum() for array in g.values()))
    return {name: array * min(1.0, clip_norm / norm) for name, array in g.items()} if clip_norm else g


@pytest.mark.parametrize("clip_norm", [None, 0.5, 1e6])
@pytest.mark.parametrize("own", [None, 0.0, 0.3])
@pytest.mark.parametrize(("momentum", "decay"), [(0.9, 0.0), (0.9, 0.1), (0.0, 0.1)])
def test_follows_the_formula(momentum, decay, own, clip_norm):
    layer = net(own)
    optimizer = Momentum(layer, momentum, decay, clip_norm)
    w = weights(layer)
    v = {name: np.zeros_like(array) for name, array in w.items()}
    for step, rate in enumerate(RATES):
        g = clipped(gradients(layer, step), clip_norm)
        optimizer.step(rate)
        for name in w:
            coefficient = own if own is not None and name == "first.weight" else decay
            v[name] = momentum * v[name] + g[name] + coefficient * w[name]
            w[name] = w[name] - rate * v[name]
    for name, array in weights(layer).items():
        np.testing.assert_allclose(array, w[name], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(optimizer.state()[name], v[name], rtol=1e-4, atol=1e-5)


def outside(rates, gradient):
    """v = m v + g;  w = w - rate v."""
    w = v = 0.0
    for rate, g in zip(rates, gradient, strict=True):
        v = 0.9 * v + g
        w -= rate * v
    return w


def inside(rates, gradient):
    """The older form: v = m v + rate g;  w = w - v."""
    w = v = 0.0
    for rate, g in zip(rates, gradient, strict=True):
        v = 0.9 * v + rate * g
        w -= v
    return w


@pytest.mark.parametrize(("rates", "same"), [([0.1] * 5, True), (RATES, False)])
def test_the_rate_is_outside_the_velocity(rates, same):
    """With a constant rate both forms agree; where it changes, this is the form with the rate outside."""
    layer = nn.Linear(1, 1, bias_attr=False)
    layer.weight.set_value(np.zeros((1, 1), np.float32))
    optimizer, gradient = Momentum(layer, 0.9), [1.0, -2.0, 3.0, 0.5, 1.5]
    for rate, g in zip(rates, gradient, strict=True):
        (layer.weight * g).sum().backward()
        optimizer.step(rate)
    assert layer.weight.item() == pytest.approx(outside(rates, gradient), rel=1e-5)
    assert (inside(rates, gradient) == pytest.approx(outside(rates, gradient), rel=1e-9)) is same


@pytest.mark.parametrize("at", [0, 1, 3, 5])
def test_a_restored_optimizer_goes_on_bit_for_bit(at):
    """In a process that built other networks before, so that paddle's own names of parameters are others."""
    straight = net()
    train(straight, Momentum(straight, 0.9, 0.01, 1.0), range(5))
    begun = net()
    optimizer = Momentum(begun, 0.9, 0.01, 1.0)
    train(begun, optimizer, range(at))
    kept, state = {name: tensor.numpy() for name, tensor in begun.state_dict().items()}, optimizer.state()
    nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.LayerNorm(2))
    resumed = net()
    assert resumed.first.weight.name != begun.first.weight.name
    resumed.set_state_dict(kept)
    optimizer = Momentum(resumed, 0.9, 0.01, 1.0)
    optimizer.restore(state)
    train(resumed, optimizer, range(at, 5))
    assert sha256(resumed) == sha256(straight)


def test_without_its_state_it_goes_elsewhere():
    straight, resumed = net(), net()
    train(straight, Momentum(straight), range(5))
    train(resumed, Momentum(resumed), range(3))
    train(resumed, Momentum(resumed), range(3, 5))
    assert sha256(resumed) != sha256(straight)


def test_the_state_has_the_names_and_shapes_of_the_parameters():
    layer = net()
    state = Momentum(layer).state()
    assert {name: array.shape for name, array in state.items()} == {
        name: tuple(weight.shape) for name, weight in layer.named_parameters()
    }
    assert all((array == 0).all() for array in state.values())


def test_the_state_is_a_copy():
    layer = net()
    optimizer = Momentum(layer)
    train(layer, optimizer, range(1))
    state = optimizer.state()
    kept = {name: array.copy() for name, array in state.items()}
    train(layer, optimizer, range(1, 3))
    assert all((state[name] == kept[name]).all() for name in state)
    optimizer.restore(kept)
    train(layer, optimizer, range(3, 4))
    assert all((state[name] == kept[name]).all() for name in state)


def test_a_frozen_parameter_is_left_out():
    layer = net()
    layer.first.weight.stop_gradient = True
    before = layer.first.weight.numpy()
    optimizer = Momentum(layer, 0.9, 0.1)
    layer(paddle.ones([2, 4])).sum().backward()
    optimizer.step(0.1)
    assert "first.weight" not in optimizer.state()
    np.testing.assert_array_equal(layer.first.weight.numpy(), before)


def test_a_parameter_without_a_gradient_stays():
    """Also after it had one: the step after a resume, when no gradient is there yet, must do the same."""
    layer = net()
    optimizer = Momentum(layer, 0.9, 0.1)
    train(layer, optimizer, range(1))
    before, velocity = layer.first.weight.numpy(), optimizer.state()["first.weight"]
    (layer.last.weight * 2).sum().backward()
    optimizer.step(0.1)
    np.testing.assert_array_equal(layer.first.weight.numpy(), before)
    np.testing.assert_array_equal(optimizer.state()["first.weight"], velocity)


def test_a_layer_without_trainable_parameters_is_refused():
    layer = net()
    for weight in layer.parameters():
        weight.stop_gradient = True
    with pytest.raises(SsldError, match="trainable parameter in Net, got none"):
        Momentum(layer)


def fault(change):
    state = Momentum(net()).state()
    change(state)
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("last.bias"), "last.bias is missing"),
        (lambda state: state.update(other=np.zeros(3, np.float32)), "other is unknown"),
        (
            lambda state: state.update({"last.bias": np.zeros(1, np.float32)}),
            r"is float32 \[1\], not float32 \[3\]",
        ),
        (lambda state: state.update({"last.bias": np.zeros(3)}), r"is float64 \[3\], not float32 \[3\]"),
        (lambda state: state.clear(), "got 0 arrays"),
    ],
    ids=["missing", "unknown", "shape", "type", "empty"],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(change, message):
    layer = net()
    optimizer = Momentum(layer)
    train(layer, optimizer, range(2))
    before = optimizer.state()
    with pytest.raises(CheckpointError, match=message):
        optimizer.restore(fault(change))
    after = optimizer.state()
    assert all((before[name] == after[name]).all() for name in before)
