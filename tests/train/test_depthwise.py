"""The kernels against paddle's own convolution, and everything that must not notice them."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paddle import nn
from paddle.base import core
from paddle.nn import functional as F

from ssld import environment
from ssld.train import depthwise, networks
from ssld.train.depthwise import DepthwiseConv2D
from ssld.train.momentum import Momentum

pytestmark = pytest.mark.skipif(not depthwise.COMPILED, reason="numba is not installed, or switched off")


@pytest.fixture
def calls(monkeypatch):
    """The names of the kernels that ran."""
    ran = []
    for name in ("convolve", "differentiate"):
        kernel = getattr(depthwise, name)
        monkeypatch.setattr(
            depthwise, name, lambda *args, kernel=kernel, name=name: (ran.append(name), kernel(*args))[1]
        )
    return ran


def layer(channels, side=3, stride=1, padding=0, **options):
    return DepthwiseConv2D(channels, channels, side, stride, padding=padding, groups=channels, **options)


def tensor(values):
    made = paddle.to_tensor(np.asarray(values, np.float32))
    made.stop_gradient = False
    return made


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def whole(*shape, seed=0):
    """Small whole numbers, whose sums of products are exact in every order."""
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(np.float32)


def trained(conv, images, coming):
    """Output of the layer and its gradients for images, weight and bias, when `coming` arrives from behind."""
    x = tensor(images)
    conv.clear_gradients()
    out = conv(x)
    out.backward(paddle.to_tensor(coming))
    return [value.numpy() for value in (out, x.grad, *(parameter.grad for parameter in conv.parameters()))]


def by_paddle(conv, images, coming):
    """The same, computed by paddle's function from the layer's parameters."""
    inputs = [tensor(images), *(tensor(parameter.numpy()) for parameter in conv.parameters())]
    out = F.conv2d(*inputs, stride=conv._stride, padding=conv._padding, groups=conv._groups)
    out.backward(paddle.to_tensor(coming))
    return [value.numpy() for value in (out, *(value.grad for value in inputs))]


def fill(conv, numbers):
    for parameter in conv.parameters():
        parameter.set_value(numbers(*parameter.shape, seed=parameter.ndim))


def out_shape(images, side, stride, padding):
    above, below, left, right = padding
    height, width = images.shape[2] + above + below, images.shape[3] + left + right
    return (*images.shape[:2], (height - side) // stride + 1, (width - side) // stride + 1)


# Equal to paddle -----------------------------------------------------------------------------------------------------

PADS = st.integers(0, 6)


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 40),
    channels=st.integers(1, 4),
    height=st.integers(1, 20),
    width=st.integers(1, 20) | st.sampled_from([31, 64, 65, 129, 150]),
    side=st.sampled_from([3, 5]),
    stride=st.sampled_from([1, 2]),
    padding=st.tuples(PADS, PADS, PADS, PADS),
    bias=st.booleans(),
)
def test_whole_numbers_come_out_exactly(count, channels, height, width, side, stride, padding, bias):
    images = whole(count, channels, height, width)
    shape = out_shape(images, side, stride, padding)
    if min(shape) < 1:
        return
    conv = layer(channels, side, stride, list(padding), bias_attr=None if bias else False)
    fill(conv, whole)
    found, wanted = (ask(conv, images, whole(*shape, seed=9)) for ask in (trained, by_paddle))
    assert len(found) == 4 if bias else 3
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("side", [3, 5])
@pytest.mark.parametrize("size", [2, 7, 56, 130])
def test_rounding_stays_within_a_hundred_thousandth_of_the_largest_value(calls, size, side, stride):
    images = noise(24, 3, size, size)
    conv = layer(3, side, stride, side // 2)
    fill(conv, noise)
    coming = noise(*out_shape(images, side, stride, [side // 2] * 4), seed=9)
    for ours, theirs in zip(trained(conv, images, coming), by_paddle(conv, images, coming), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
    assert calls == ["convolve", "differentiate"]


@pytest.mark.parametrize(
    "padding", [2, [1, 3], [0, 1, 2, 3], [[0, 0], [0, 0], [3, 0], [1, 2]], "VALID"], ids=lambda padding: str(padding)
)
def test_padding_is_taken_in_all_of_paddles_forms(calls, padding):
    images, conv = whole(3, 2, 9, 9), layer(2, 5, 2, padding)
    fill(conv, whole)
    out = F.conv2d(tensor(images), conv.weight, conv.bias, 2, padding, groups=2)
    coming = whole(*out.shape, seed=9)
    for ours, theirs in zip(trained(conv, images, coming), by_paddle(conv, images, coming), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert calls == ["convolve", "differentiate"]


def test_any_memory_layout_is_taken(calls):
    images, coming = whole(2, 3, 6, 6), whole(2, 3, 6, 6, seed=9)
    conv = layer(3, padding=1)
    fill(conv, whole)
    wanted = trained(conv, images, coming)
    x = tensor(images.transpose(2, 3, 0, 1))
    conv.clear_gradients()
    out = conv(x.transpose([2, 3, 0, 1]))
    # what arrives in backward is a view as well
    (out.transpose([3, 2, 1, 0]) * paddle.to_tensor(coming.transpose(3, 2, 1, 0))).sum().backward()
    found = [out, x.grad.transpose([2, 3, 0, 1]), conv.weight.grad, conv.bias.grad]
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs)
    assert len(calls) == 4


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_only_what_is_trained_has_a_gradient(calls, frozen):
    images, coming = whole(2, 3, 6, 6), whole(2, 3, 6, 6, seed=9)
    conv = layer(3, padding=1)
    fill(conv, whole)
    wanted = by_paddle(conv, images, coming)[1:]
    inputs = [tensor(images), conv.weight, conv.bias]
    for place in frozen:
        inputs[place].stop_gradient = True
    conv(inputs[0]).backward(paddle.to_tensor(coming))
    for place, (value, gradient) in enumerate(zip(inputs, wanted, strict=True)):
        if place in frozen:
            assert value.grad is None
        else:
            np.testing.assert_array_equal(value.grad.numpy(), gradient)
    assert calls == ["convolve", "differentiate"]


def test_gradients_add_up_where_a_layer_is_used_twice():
    conv, images = layer(2, padding=1), whole(2, 2, 5, 5)
    fill(conv, whole)
    x = tensor(images)
    conv(conv(x)).sum().backward()
    ours = [x.grad.numpy(), conv.weight.grad.numpy()]
    y, weight, bias = tensor(images), tensor(conv.weight.numpy()), tensor(conv.bias.numpy())
    F.conv2d(F.conv2d(y, weight, bias, 1, 1, groups=2), weight, bias, 1, 1, groups=2).sum().backward()
    np.testing.assert_array_equal(ours[0], y.grad.numpy())
    np.testing.assert_array_equal(ours[1], weight.grad.numpy())


# The same bits -------------------------------------------------------------------------------------------------------


def bits(seed=0):
    images = noise(20, 6, 13, 13, seed=seed)
    conv = layer(6, 5, 2, 2)
    fill(conv, noise)
    return b"".join(value.tobytes() for value in trained(conv, images, noise(20, 6, 7, 7, seed=9)))


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_the_bits_depend_neither_on_paddles_threads_nor_on_the_thread_that_asks(threads):
    wanted = bits()
    core.set_num_threads(threads)
    try:
        assert bits() == wanted
        with ThreadPoolExecutor(threads) as pool:
            assert set(pool.map(bits, [0] * 4 * threads)) == {wanted}
    finally:
        core.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def digest(network):
    return hashlib.sha256(b"".join(array.tobytes() for array in networks.arrays(network).values())).hexdigest()


def steps(network, optimizer, numbers):
    for number in numbers:
        paddle.seed(number)
        network.train()
        network(tensor(noise(8, 3, 32, 32, seed=number))).square().mean().backward()
        optimizer.step(0.05)


def test_training_is_the_same_bit_by_bit_when_it_is_repeated_or_resumed(calls):
    def new():
        network = networks.build("MobileNetV3_small_x0_35", {"stem_stride": 1}, 4, 7)
        return network, Momentum(network)

    found = []
    for stops in ((4,), (4,), (2, 4)):
        network, optimizer = new()
        done = 0
        for stop in stops:
            weights, state = networks.arrays(network), optimizer.state()
            network, optimizer = new()
            networks.load(network, weights, "what was saved")
            if done:
                optimizer.restore(state)
            steps(network, optimizer, range(done, stop))
            done = stop
        found.append(digest(network))
    assert found[0] == found[1] == found[2]
    assert found[0] != digest(new()[0])
    assert len(calls) == 3 * 4 * 11 * 2


# Left to paddle ------------------------------------------------------------------------------------------------------

OTHERS = {
    "dilation": (4, 4, 3, {"dilation": 2, "groups": 4}),
    "a kernel of 7": (4, 4, 7, {"groups": 4}),
    "a kernel of 3 by 5": (4, 4, (3, 5), {"groups": 4}),
    "stride 3": (4, 4, 3, {"stride": 3, "groups": 4}),
    "unequal strides": (4, 4, 3, {"stride": (1, 2), "groups": 4}),
    "two outputs per channel": (4, 8, 3, {"groups": 4}),
    "two channels per group": (4, 4, 3, {"groups": 2}),
    "padding by name": (4, 4, 3, {"padding": "SAME", "groups": 4}),
    "padding by reflection": (4, 4, 3, {"padding": 1, "padding_mode": "reflect", "groups": 4}),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_geometry_is_left_to_paddle(calls, other):
    channels, out, side, options = OTHERS[other]
    paddle.seed(1)
    plain = nn.Conv2D(channels, out, side, **options)
    paddle.seed(1)
    conv = DepthwiseConv2D(channels, out, side, **options)
    images = noise(2, channels, 12, 12)
    np.testing.assert_array_equal(conv(tensor(images)).numpy(), plain(tensor(images)).numpy())
    assert calls == []


def without_gradients(conv, x):
    with paddle.no_grad():
        return conv(x)


def in_evaluation(conv, x):
    conv.eval()
    return conv(x)


def frozen(conv, x):
    for value in (x, *conv.parameters()):
        value.stop_gradient = True
    return conv(x)


@pytest.mark.parametrize("use", [without_gradients, in_evaluation, frozen])
def test_an_answer_without_training_is_paddles_own(calls, use):
    conv, images = layer(3, padding=1), noise(2, 3, 8, 8)
    wanted = F.conv2d(tensor(images), conv.weight, conv.bias, 1, 1, groups=3).numpy()
    np.testing.assert_array_equal(use(conv, tensor(images)).numpy(), wanted)
    assert calls == []


def test_other_numbers_than_float32_are_left_to_paddle(calls):
    conv = layer(3).to(dtype="float64")
    assert conv(paddle.ones([1, 3, 4, 4], "float64")).dtype == paddle.float64
    assert calls == []


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (3, 8, 8)])
def test_input_that_does_not_fit_is_refused_by_paddle(calls, shape):
    with pytest.raises(ValueError):
        layer(3)(tensor(noise(*shape)))
    assert calls == []


def test_the_switch_turns_it_off_and_the_environment_says_so(calls, monkeypatch):
    monkeypatch.setenv("SSLD_FAST_CONV", "0")
    assert environment.environment()["depthwise"] == "paddle"
    layer(3)(tensor(noise(1, 3, 8, 8))).sum().backward()
    assert calls == []
    monkeypatch.delenv("SSLD_FAST_CONV")
    assert environment.environment()["depthwise"].startswith(f"numba {environment.installed('numba')} ")
    layer(3)(tensor(noise(1, 3, 8, 8))).sum().backward()
    assert calls == ["convolve", "differentiate"]


def test_without_numba_paddle_computes(calls, monkeypatch):
    monkeypatch.setattr(depthwise, "COMPILED", False)
    assert depthwise.compiled(bits) is bits
    layer(3)(tensor(noise(1, 3, 8, 8))).sum().backward()
    assert calls == []


# What must not notice ------------------------------------------------------------------------------------------------


def test_weights_and_keys_are_those_of_paddles_layer():
    made = []
    for kind in (nn.Conv2D, DepthwiseConv2D):
        paddle.seed(5)
        made.append({name: value.numpy() for name, value in kind(6, 6, 5, groups=6).state_dict().items()})
    assert list(made[0]) == list(made[1]) == ["weight", "bias"]
    for plain, ours in zip(*(weights.values() for weights in made), strict=True):
        np.testing.assert_array_equal(plain, ours)


def test_a_copy_trains_by_itself(calls):
    conv = layer(3, padding=1)
    twin = copy.deepcopy(conv)
    twin(tensor(noise(1, 3, 8, 8))).sum().backward()
    assert conv.weight.grad is None
    assert twin.weight.grad is not None
    assert calls == ["convolve", "differentiate"]


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_an_export_holds_paddles_operator(calls, mode, tmp_path):
    conv = layer(3, padding=1)
    getattr(conv, mode)()
    path = str(tmp_path / "exported")
    paddle.jit.save(conv, path, input_spec=[paddle.static.InputSpec([None, 3, 8, 8], "float32")])
    program = json.dumps(json.loads((tmp_path / "exported.json").read_text()))
    assert "depthwise_conv2d" in program
    images = paddle.to_tensor(noise(2, 3, 8, 8))
    np.testing.assert_allclose(
        paddle.jit.load(path)(images).numpy(), without_gradients(conv, images).numpy(), atol=1e-5
    )
    assert calls == []


@pytest.mark.parametrize(("name", "layers"), [("MobileNetV3_small_x0_35", 11), ("MobileNetV3_large_x0_35", 15)])
def test_a_student_trains_with_it_in_every_block(calls, name, layers):
    networks.build(name, {}, 4)(tensor(noise(2, 3, 32, 32))).sum().backward()
    assert calls == ["convolve"] * layers + ["differentiate"] * layers


# Compiling -----------------------------------------------------------------------------------------------------------


def test_a_function_is_compiled_where_no_cache_can_be_written():
    names = {}
    # a source that lies nowhere has no place for its cache
    exec(compile("def double(x):\n    return 2 * x\n", "/nowhere/double.py", "exec"), names)  # noqa: S102
    assert depthwise.compiled(names["double"])(3) == 6


@pytest.mark.parametrize(("misses", "seconds", "said"), [(1, 0.0, True), (1, 60.0, False), (0, 0.0, False)])
def test_what_took_long_to_compile_is_said_and_not_what_was_in_the_cache(monkeypatch, misses, seconds, said):
    kernel = Mock(stats=SimpleNamespace(cache_misses={"signature": 1} if misses else {}))
    for name in ("convolve", "differentiate"):
        monkeypatch.setattr(depthwise, name, kernel)
    monkeypatch.setattr(depthwise, "NOTED", seconds)
    lines = []
    depthwise.prepare(nn.Sequential(layer(3)), lines.append)
    assert kernel.call_count == 2
    assert ["compiled for this processor" in line for line in lines] == [True] * said


@pytest.mark.parametrize("network", [nn.Conv2D(3, 3, 3, groups=3), layer(3, 7)])
def test_nothing_is_compiled_for_a_network_that_paddle_computes(calls, network, monkeypatch):
    monkeypatch.setattr(depthwise, "NOTED", 0.0)
    lines = []
    depthwise.prepare(network, lines.append)
    assert calls == lines == []
