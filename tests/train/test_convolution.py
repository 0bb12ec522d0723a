"""The layer of the students: what it leaves to paddle, and everything that must not notice the kernels."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import numpy as np
import paddle
import pytest
from paddle import nn
from paddle.base import core
from paddle.nn import functional as F

from ssld import environment
from ssld.train import compiling, dense, depthwise, networks
from ssld.train.convolution import Conv2D
from ssld.train.momentum import Momentum

pytestmark = pytest.mark.skipif(not compiling.COMPILED, reason="numba is not installed, or switched off")


@pytest.fixture
def calls(monkeypatch):
    """The names of the kernels that ran."""
    ran = []

    def record(module, name):
        kernel, label = getattr(module, name), f"{module.__name__.rpartition('.')[2]}.{name}"
        monkeypatch.setattr(module, name, lambda *args: (ran.append(label), kernel(*args))[1])

    for module, name in product((depthwise, dense), ("convolve", "differentiate")):
        record(module, name)
    return ran


@pytest.fixture(params=["dense", "depthwise"])
def kind(request):
    return request.param


def layer(kind, channels, side=3, stride=1, padding=0, **options):
    groups = {"dense": 1, "depthwise": channels}[kind]
    return Conv2D(channels, channels, side, stride, padding=padding, groups=groups, **options)


def step_of(*kinds):
    """The calls of a step through layers of these kinds."""
    return [f"{kind}.convolve" for kind in kinds] + [f"{kind}.differentiate" for kind in reversed(kinds)]


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


# Equal to paddle -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "padding", [2, [1, 3], [0, 1, 2, 3], [[0, 0], [0, 0], [3, 0], [1, 2]], "VALID"], ids=lambda padding: str(padding)
)
def test_padding_is_taken_in_all_of_paddles_forms(kind, calls, padding):
    images, conv = whole(3, 2, 9, 9), layer(kind, 2, 5, 2, padding)
    fill(conv, whole)
    out = F.conv2d(tensor(images), conv.weight, conv.bias, 2, padding, groups=conv._groups)
    coming = whole(*out.shape, seed=9)
    for ours, theirs in zip(trained(conv, images, coming), by_paddle(conv, images, coming), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert calls == step_of(kind)


def test_any_memory_layout_is_taken(kind, calls):
    images, coming = whole(2, 3, 6, 6), whole(2, 3, 6, 6, seed=9)
    conv = layer(kind, 3, padding=1)
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
def test_only_what_is_trained_has_a_gradient(kind, calls, frozen):
    images, coming = whole(2, 3, 6, 6), whole(2, 3, 6, 6, seed=9)
    conv = layer(kind, 3, padding=1)
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
    assert calls == step_of(kind)


def test_gradients_add_up_where_a_layer_is_used_twice(kind):
    conv, images = layer(kind, 2, padding=1), whole(2, 2, 5, 5)
    fill(conv, whole)
    x = tensor(images)
    conv(conv(x)).sum().backward()
    ours = [x.grad.numpy(), conv.weight.grad.numpy()]
    y, weight, bias = tensor(images), tensor(conv.weight.numpy()), tensor(conv.bias.numpy())
    once = F.conv2d(y, weight, bias, 1, 1, groups=conv._groups)
    F.conv2d(once, weight, bias, 1, 1, groups=conv._groups).sum().backward()
    np.testing.assert_array_equal(ours[0], y.grad.numpy())
    np.testing.assert_array_equal(ours[1], weight.grad.numpy())


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("side", [1, 3])
def test_what_is_not_finite_passes_through_without_a_warning(side, value, calls):
    """Warnings are errors in tests."""
    conv, images, coming = layer("dense", 2, side, padding=side // 2), noise(2, 2, 5, 5), noise(2, 2, 5, 5, seed=1)
    images[0, :, 2, 2] = coming[1, :, 2, 2] = value, -value
    out, to_images, *others = trained(conv, images, coming)
    assert not np.isfinite(out[0, :, 2, 2]).any()
    assert not np.isfinite(to_images[1, :, 2, 2]).any()
    assert np.isfinite(out[1]).all()
    assert np.isfinite(to_images[0]).all()
    assert not any(np.isfinite(value).all() for value in others)
    assert calls == step_of("dense")


# The same bits -------------------------------------------------------------------------------------------------------


def bits(kind, seed=0):
    images = noise(20, 6, 13, 13, seed=seed)
    conv = layer(kind, 6, 5, 2, 2)
    fill(conv, noise)
    return b"".join(value.tobytes() for value in trained(conv, images, noise(20, 6, 7, 7, seed=9)))


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_the_bits_depend_neither_on_paddles_threads_nor_on_the_thread_that_asks(kind, threads):
    wanted = bits(kind)
    core.set_num_threads(threads)
    try:
        assert bits(kind) == wanted
        with ThreadPoolExecutor(threads) as pool:
            assert set(pool.map(bits, [kind] * 4 * threads)) == {wanted}
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
    assert len([call for call in calls if call.startswith("depthwise")]) == 3 * 4 * 11 * 2
    assert len([call for call in calls if call.startswith("dense")]) == 3 * 4 * 43 * 2


STEPS = """
import hashlib, sys
import numpy as np, paddle
from ssld.train import networks
networks.use_device("cpu")
for name in sys.argv[1:]:
    network = networks.build(name, {}, 4, 7)
    images = np.random.default_rng(0).normal(size=(8, 3, 64, 64)).astype(np.float32)
    network(paddle.to_tensor(images)).square().mean().backward()
    gradients = [parameter.grad.numpy().tobytes() for parameter in network.parameters() if not parameter.stop_gradient]
    print(hashlib.sha256(b"".join(gradients)).hexdigest())
"""


def test_the_bits_of_a_step_do_not_depend_on_the_threads_that_the_environment_offers():
    said = set()
    for threads in ("1", "4"):
        names = ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        command = [sys.executable, "-c", STEPS, "MobileNetV3_small_x1_0", "ResNet18_vd"]
        answer = subprocess.run(
            command, env={**os.environ, **dict.fromkeys(names, threads)}, capture_output=True, text=True
        )
        assert answer.returncode == 0, answer.stderr
        said.add(answer.stdout)
    assert len(said) == 1
    assert len(said.pop().split()) == 2


# Left to paddle ------------------------------------------------------------------------------------------------------

OTHERS = {
    "dilation": (4, 4, 3, {"dilation": 2, "groups": 4}),
    "a kernel of 7": (4, 4, 7, {"groups": 4}),
    "a kernel of 3 by 5": (4, 4, (3, 5), {"groups": 4}),
    "stride 3": (4, 4, 3, {"stride": 3, "groups": 4}),
    "unequal strides": (4, 4, 3, {"stride": (1, 2), "groups": 4}),
    "two outputs per channel": (4, 8, 3, {"groups": 4}),
    "padding by name": (4, 4, 3, {"padding": "SAME", "groups": 4}),
    "padding by reflection": (4, 4, 3, {"padding": 1, "padding_mode": "reflect", "groups": 4}),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_geometry_is_left_to_paddle(calls, other):
    channels, out, side, options = OTHERS[other]
    paddle.seed(1)
    plain = nn.Conv2D(channels, out, side, **options)
    paddle.seed(1)
    conv = Conv2D(channels, out, side, **options)
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
def test_an_answer_without_training_is_paddles_own(kind, calls, use):
    conv, images = layer(kind, 3, padding=1), noise(2, 3, 8, 8)
    wanted = F.conv2d(tensor(images), conv.weight, conv.bias, 1, 1, groups=conv._groups).numpy()
    np.testing.assert_array_equal(use(conv, tensor(images)).numpy(), wanted)
    assert calls == []


def test_other_numbers_than_float32_are_left_to_paddle(kind, calls):
    conv = layer(kind, 3).to(dtype="float64")
    assert conv(paddle.ones([1, 3, 4, 4], "float64")).dtype == paddle.float64
    assert calls == []


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (3, 8, 8)])
def test_input_that_does_not_fit_is_refused_by_paddle(kind, calls, shape):
    with pytest.raises(ValueError):
        layer(kind, 3)(tensor(noise(*shape)))
    assert calls == []


def test_the_switch_turns_it_off_and_the_environment_says_so(kind, calls, monkeypatch):
    monkeypatch.setenv("SSLD_FAST_CONV", "0")
    assert environment.environment()["kernels"] == "paddle"
    layer(kind, 3)(tensor(noise(1, 3, 8, 8))).sum().backward()
    assert calls == []
    monkeypatch.delenv("SSLD_FAST_CONV")
    assert environment.environment()["kernels"].startswith(f"numba {environment.installed('numba')} ")
    layer(kind, 3)(tensor(noise(1, 3, 8, 8))).sum().backward()
    assert calls == step_of(kind)


def test_without_numba_paddle_computes(kind, calls, monkeypatch):
    monkeypatch.setattr(compiling, "COMPILED", False)
    assert compiling.compiled(bits) is bits
    layer(kind, 3)(tensor(noise(1, 3, 8, 8))).sum().backward()
    assert calls == []


# What must not notice ------------------------------------------------------------------------------------------------


def test_weights_and_keys_are_those_of_paddles_layer(kind):
    made = []
    for made_by in (nn.Conv2D, Conv2D):
        paddle.seed(5)
        made.append({name: value.numpy() for name, value in made_by(6, 6, 5, groups=3).state_dict().items()})
    assert list(made[0]) == list(made[1]) == ["weight", "bias"]
    for plain, ours in zip(*(weights.values() for weights in made), strict=True):
        np.testing.assert_array_equal(plain, ours)


def test_a_copy_trains_by_itself(kind, calls):
    conv = layer(kind, 3, padding=1)
    twin = copy.deepcopy(conv)
    twin(tensor(noise(1, 3, 8, 8))).sum().backward()
    assert conv.weight.grad is None
    assert twin.weight.grad is not None
    assert calls == step_of(kind)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_an_export_holds_paddles_operator(kind, calls, mode, tmp_path):
    conv = layer(kind, 3, padding=1)
    getattr(conv, mode)()
    path = str(tmp_path / "exported")
    paddle.jit.save(conv, path, input_spec=[paddle.static.InputSpec([None, 3, 8, 8], "float32")])
    program = json.dumps(json.loads((tmp_path / "exported.json").read_text()))
    assert ("depthwise_conv2d" in program) == (kind == "depthwise")
    assert "conv2d" in program
    images = paddle.to_tensor(noise(2, 3, 8, 8))
    np.testing.assert_allclose(
        paddle.jit.load(path)(images).numpy(), without_gradients(conv, images).numpy(), atol=1e-5
    )
    assert calls == []


@pytest.mark.parametrize(
    ("name", "dense", "depthwise"),
    [("MobileNetV3_small_x0_35", 43, 11), ("MobileNetV3_large_x0_35", 49, 15), ("ResNet18_vd", 23, 0)],
)
def test_a_student_trains_with_it_in_every_convolution(calls, name, dense, depthwise):
    network = networks.build(name, {}, 4)
    assert not any(type(layer) is nn.Conv2D for layer in network.sublayers())
    network(tensor(noise(2, 3, 32, 32))).sum().backward()
    assert Counter(calls) == {
        f"{kind}.{call}": count
        for kind, count in (("dense", dense), ("depthwise", depthwise))
        for call in ("convolve", "differentiate")
        if count
    }


# Compiling -----------------------------------------------------------------------------------------------------------


def test_a_function_is_compiled_where_no_cache_can_be_written():
    names = {}
    # a source that lies nowhere has no place for its cache
    exec(compile("def double(x):\n    return 2 * x\n", "/nowhere/double.py", "exec"), names)  # noqa: S102
    before = compiling.compilations()
    assert compiling.compiled(names["double"])(3) == 6
    assert compiling.compilations() == before + 1


@pytest.mark.parametrize(("misses", "seconds", "said"), [(1, 0.0, True), (1, 60.0, False), (0, 0.0, False)])
def test_what_took_long_to_compile_is_said_and_not_what_was_in_the_cache(
    calls, kind, monkeypatch, misses, seconds, said
):
    found = iter([7, 7 + misses])
    monkeypatch.setattr(compiling, "compilations", lambda: next(found))
    monkeypatch.setattr(compiling, "NOTED", seconds)
    lines = []
    compiling.prepare(nn.Sequential(layer(kind, 3), layer(kind, 3)), lines.append)
    assert calls == step_of(kind)
    assert ["compiled for this processor" in line for line in lines] == [True] * said


def test_after_preparing_nothing_is_left_to_compile(kind):
    conv = layer(kind, 3, padding=1)
    compiling.prepare(conv, lambda line: None)
    before = compiling.compilations()
    conv(tensor(noise(2, 3, 8, 8))).sum().backward()
    assert compiling.compilations() == before


@pytest.mark.parametrize("network", [nn.Conv2D(3, 3, 3, groups=3), layer("depthwise", 3, 7)])
def test_nothing_is_compiled_for_a_network_that_paddle_computes(calls, network, monkeypatch):
    monkeypatch.setattr(compiling, "NOTED", 0.0)
    lines = []
    compiling.prepare(network, lines.append)
    assert calls == lines == []
