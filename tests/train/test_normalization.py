"""The batch norm of the students with its activation: against paddle's and its definition, and what it leaves alone."""

from __future__ import annotations

import copy
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

from ssld.train import compiling, networks, normalization
from ssld.train.convolution import Conv2D
from ssld.train.normalization import HARDSWISH, NONE, RELU, BatchNorm, ConvNorm

pytestmark = pytest.mark.skipif(not compiling.COMPILED, reason="numba is not installed, or switched off")

ACTS = {"none": None, "ReLU": nn.ReLU, "Hardswish": nn.Hardswish}
SHAPES = [(2, 3, 5, 7), (5, 4, 1, 1), (3, 20, 2, 2), (33, 6, 4, 4), (4, 2, 40, 40), (1, 3, 6, 6), (3, 1, 1, 1)]


@pytest.fixture(params=ACTS)
def act(request):
    kind = ACTS[request.param]
    return kind and kind()


@pytest.fixture
def calls(monkeypatch):
    """The kernels that ran, and with which activation."""
    ran = []

    def record(name, place):
        kernel = getattr(normalization, name)
        monkeypatch.setattr(normalization, name, lambda *args: (ran.append((name, args[place])), kernel(*args))[1])

    record("normalize", 4)
    record("differentiate", 3)
    return ran


def step_of(act):
    return [
        ("normalize", normalization.ACTIVATIONS[type(act)]),
        ("differentiate", normalization.ACTIVATIONS[type(act)]),
    ]


def tensor(values, stop_gradient=False):
    made = paddle.to_tensor(np.asarray(values, np.float32))
    made.stop_gradient = stop_gradient
    return made


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def filled(kind, channels, **options):
    """A norm with weights and statistics that all matter."""
    norm = kind(channels, **options)
    for seed, parameter in enumerate((norm.weight, norm.bias, norm._mean, norm._variance)):
        parameter.set_value(noise(channels, seed=seed) ** (2 if parameter is norm._variance else 1))
    return norm


def by_paddle(norm, x, act):
    return norm(x) if act is None else act(norm(x))


def trained(norm, images, coming, act):
    """Output, gradients of images, weight and bias, mean and variance for evaluation."""
    x = tensor(images)
    out = norm(x, act) if isinstance(norm, BatchNorm) else by_paddle(norm, x, act)
    out.backward(paddle.to_tensor(coming))
    return [value.numpy() for value in (out, x.grad, norm.weight.grad, norm.bias.grad, norm._mean, norm._variance)]


def defined(norm, images, coming, act):
    """The same by the definition, in double precision, with the statistics that the norm has before the step."""
    x, g = images.astype(np.float64), coming.astype(np.float64)
    weight, bias, old_mean, old_variance = (
        value.numpy().astype(np.float64)[:, None, None]
        for value in (norm.weight, norm.bias, norm._mean, norm._variance)
    )
    axes, count = {"axis": (0, 2, 3), "keepdims": True}, x[:, 0].size
    mean, variance = x.mean(**axes)[0], x.var(**axes)[0]
    deviation = np.sqrt(variance + norm._epsilon)
    normal = (x - mean) / deviation
    z = normal * weight + bias
    if isinstance(act, nn.ReLU):
        out, arriving = np.maximum(z, 0), g * (z > 0)
    elif isinstance(act, nn.Hardswish):
        out, arriving = z * np.clip(z + 3, 0, 6) / 6, g * np.where(abs(z) < 3, z / 3 + 0.5, z > 0)
    else:
        out, arriving = z, g
    to_bias, to_weight = arriving.sum(**axes)[0], (arriving * normal).sum(**axes)[0]
    to_images = weight / deviation * (arriving - to_bias / count - normal * to_weight / count)
    kept = norm._momentum
    moved = kept * old_mean + (1 - kept) * mean, kept * old_variance + (1 - kept) * variance
    return [out, to_images, *(value.ravel() for value in (to_weight, to_bias, *moved))]


def off(found, wanted):
    """The largest difference, in parts of the largest value."""
    return abs(found - wanted).max() / max(abs(wanted).max(), 1e-30)


# Equal to paddle and to the definition -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_step_is_that_of_the_definition_and_of_paddle(shape, act, calls):
    images, coming = 3 * noise(*shape, seed=5) + 1, noise(*shape, seed=6)
    wanted = defined(filled(BatchNorm, shape[1], momentum=0.7), images, coming, act)
    ours = trained(filled(BatchNorm, shape[1], momentum=0.7), images, coming, act)
    theirs = trained(filled(nn.BatchNorm, shape[1], momentum=0.7), images, coming, act)
    for found, right, other in zip(ours, wanted, theirs, strict=True):
        assert off(found, right) < 1e-5
        assert off(found, other) < 1e-5
    assert calls == step_of(act)


def test_the_corners_of_an_activation_are_paddles():
    """Weight 0 makes every number the bias: exactly at the corners, and just beside them."""
    corners = np.float32([-3, 0, 3])
    points = np.concatenate([corners, np.nextafter(corners, np.float32(-9)), np.nextafter(corners, np.float32(9)), [1]])
    images, coming = noise(2, len(points), 3, 3), noise(2, len(points), 3, 3, seed=1)
    for act in (nn.ReLU(), nn.Hardswish()):
        found = []
        for kind in (nn.BatchNorm, BatchNorm):
            norm = kind(len(points))
            norm.weight.set_value(np.zeros(len(points), np.float32))
            norm.bias.set_value(np.float32(points))
            found.append(trained(norm, images, coming, act))
        for theirs, ours in zip(*found, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_what_is_kept_for_evaluation_is_paddles_after_many_steps(act):
    found = []
    for kind in (nn.BatchNorm, BatchNorm):
        norm = filled(kind, 3)
        for seed in range(20):
            trained(norm, noise(2, 3, 4, 4, seed=seed) + seed, noise(2, 3, 4, 4), act)
        norm.eval()
        x = tensor(noise(2, 3, 4, 4))
        found.append((norm(x, act) if kind is BatchNorm else by_paddle(norm, x, act)).numpy())
    assert off(*found) < 1e-5


def test_a_channel_that_is_constant_is_0_before_bias_and_activation(act, calls):
    images, coming = np.full((4, 2, 3, 3), np.float32(3.3)), noise(4, 2, 3, 3)
    ours = trained(filled(BatchNorm, 2), images, coming, act)
    theirs = trained(filled(nn.BatchNorm, 2), images, coming, act)
    bias = filled(BatchNorm, 2).bias
    wanted = bias if act is None else act(bias)
    np.testing.assert_allclose(ours[0], np.broadcast_to(wanted.numpy()[:, None, None], images.shape), rtol=1e-5)
    for place in (1, 3, 4, 5):
        assert off(ours[place], theirs[place]) < 1e-5
    # paddle's mean of equal numbers may be off in its last place
    assert abs(ours[2]).max() < 1e-2
    assert len(calls) == 2


@pytest.mark.parametrize("shape", [(16, 4, 8, 8), (4, 4, 1, 2), (4, 3, 33, 33)], ids=str)
def test_a_large_mean_does_not_hide_a_small_variance(shape, act):
    """paddle is off by a hundredth here: its mean is, by a part of the deviation."""
    images = np.float32(1e3 + 1e-2 * noise(*shape))
    # a gradient that the norm takes away, but for a tenth of it
    coming = np.float32(100 * (images - 1e3)) + noise(*shape, seed=1) / 10
    wanted = defined(filled(BatchNorm, shape[1]), images, coming, act)
    for found, right in zip(trained(filled(BatchNorm, shape[1]), images, coming, act), wanted, strict=True):
        assert off(found, right) < 1e-5


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_seen_in_its_channel_and_there_alone(value, act, calls):
    images, coming = noise(3, 2, 4, 4), noise(3, 2, 4, 4, seed=1)
    clean = trained(filled(BatchNorm, 2), images, coming, act)
    images[1, 0, 2, 3] = value
    broken = trained(filled(BatchNorm, 2), images, coming, act)
    for name, before, after in zip(("out", "images", "weight", "bias", "mean", "variance"), clean, broken, strict=True):
        channel = (slice(None), 1) if before.ndim == 4 else 1
        np.testing.assert_array_equal(after[channel], before[channel])
        if name in ("out", "images"):
            assert np.isnan(after[:, 0]).all()
        elif name in ("mean", "variance"):
            assert not np.isfinite(after[0])
    assert len(calls) == 4


def test_any_memory_layout_is_taken(act, calls):
    images, coming = noise(2, 3, 4, 5), noise(2, 3, 4, 5, seed=1)
    wanted = trained(filled(BatchNorm, 3), images, coming, act)
    norm, x = filled(BatchNorm, 3), tensor(images.transpose(2, 3, 0, 1))
    out = norm(x.transpose([2, 3, 0, 1]), act)
    # what arrives in backward is a view as well
    (out.transpose([3, 2, 1, 0]) * paddle.to_tensor(coming.transpose(3, 2, 1, 0))).sum().backward()
    found = [out, x.grad.transpose([2, 3, 0, 1]), norm.weight.grad, norm.bias.grad, norm._mean, norm._variance]
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs)
    assert len(calls) == 4


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_only_what_is_trained_has_a_gradient(act, calls, frozen):
    images, coming = noise(2, 3, 6, 6), noise(2, 3, 6, 6, seed=1)
    wanted = trained(filled(BatchNorm, 3), images, coming, act)[1:4]
    norm = filled(BatchNorm, 3)
    inputs = [tensor(images), norm.weight, norm.bias]
    for place in frozen:
        inputs[place].stop_gradient = True
    norm(inputs[0], act).backward(paddle.to_tensor(coming))
    for place, (value, gradient) in enumerate(zip(inputs, wanted, strict=True)):
        if place in frozen:
            assert value.grad is None
        else:
            np.testing.assert_array_equal(value.grad.numpy(), gradient)
    assert calls == step_of(act) * 2


def test_a_norm_that_alone_is_in_training_moves_its_statistics_and_passes_no_gradient_on(act, calls):
    images = noise(2, 3, 6, 6)
    wanted = trained(filled(BatchNorm, 3), images, images, act)
    norm = filled(BatchNorm, 3)
    for parameter in norm.parameters():
        parameter.stop_gradient = True
    out = norm(tensor(images, stop_gradient=True), act)
    assert out.stop_gradient
    for found, right in zip((out, norm._mean, norm._variance), (wanted[0], *wanted[4:]), strict=True):
        np.testing.assert_array_equal(found.numpy(), right)
    assert calls == step_of(act) + step_of(act)[:1]


def test_fixres_adapts_the_last_norm_of_a_student_as_paddle_does(monkeypatch, calls):
    found = []
    for fast in ("1", "0"):
        monkeypatch.setenv("SSLD_FAST_CONV", fast)
        network = networks.build("MobileNetV3_small_x0_35", {}, 4, 7)
        networks.freeze_all_but_head(network, adapt_bn=True)(network)
        before = networks.arrays(network)
        network(tensor(noise(8, 3, 64, 64), stop_gradient=True)).sum().backward()
        after = networks.arrays(network)
        changed = [name for name in after if not np.array_equal(before[name], after[name])]
        assert changed == ["last_second_conv.bn._mean", "last_second_conv.bn._variance"]
        found.append([*(after[name] for name in changed), network.fc.weight.grad.numpy()])
    for ours, theirs in zip(*found, strict=True):
        assert off(ours, theirs) < 1e-5
    assert calls == [("normalize", HARDSWISH)]


def test_gradients_add_up_where_a_layer_is_used_twice(act):
    found = []
    for kind in (nn.BatchNorm, BatchNorm):
        norm, x = filled(kind, 2), tensor(noise(4, 2, 5, 5))
        once = norm(x, act) if kind is BatchNorm else by_paddle(norm, x, act)
        twice = norm(once, act) if kind is BatchNorm else by_paddle(norm, once, act)
        twice.backward(paddle.to_tensor(noise(4, 2, 5, 5, seed=1)))
        found.append([value.numpy() for value in (x.grad, norm.weight.grad, norm.bias.grad, norm._mean)])
    for theirs, ours in zip(*found, strict=True):
        assert off(ours, theirs) < 1e-4


# The same bits -------------------------------------------------------------------------------------------------------


def bits(seed=0):
    found = []
    for shape, act in product([(9, 5, 13, 13), (20, 30, 2, 2)], (None, nn.ReLU(), nn.Hardswish())):
        found += trained(filled(BatchNorm, shape[1]), noise(*shape, seed=seed), noise(*shape, seed=9), act)
    return b"".join(value.tobytes() for value in found)


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_the_bits_depend_neither_on_paddles_threads_nor_on_the_thread_that_asks(threads):
    wanted = bits()
    core.set_num_threads(threads)
    try:
        assert bits() == wanted
        with ThreadPoolExecutor(threads) as pool:
            assert set(pool.map(bits, [0] * 2 * threads)) == {wanted}
    finally:
        core.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


STEPS = """
import hashlib
import numpy as np, paddle
from ssld.train import networks
networks.use_device("cpu")
network = networks.build("MobileNetV3_small_x0_35", {}, 4, 7)
for seed in range(2):
    images = np.random.default_rng(seed).normal(size=(8, 3, 64, 64)).astype(np.float32)
    network(paddle.to_tensor(images)).square().mean().backward()
values = [*networks.arrays(network).values(), *(p.grad.numpy() for p in network.parameters() if not p.stop_gradient)]
print(hashlib.sha256(b"".join(value.tobytes() for value in values)).hexdigest())
"""


def test_statistics_and_gradients_do_not_depend_on_the_threads_that_the_environment_offers():
    said = set()
    for threads in ("1", "2", "4"):
        names = ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        answer = subprocess.run(
            [sys.executable, "-c", STEPS],
            env={**os.environ, **dict.fromkeys(names, threads)},
            capture_output=True,
            text=True,
        )
        assert answer.returncode == 0, answer.stderr
        said.add(answer.stdout)
    assert len(said) == 1
    assert said.pop().strip()


# Left to paddle ------------------------------------------------------------------------------------------------------


def in_evaluation(norm):
    norm.eval()


def with_kept_statistics(norm):
    norm._use_global_stats = True


def switched_off(norm):
    os.environ["SSLD_FAST_CONV"] = "0"


@pytest.mark.parametrize("change", [in_evaluation, with_kept_statistics, switched_off])
def test_an_answer_of_paddles_is_left_to_paddle(change, act, calls, monkeypatch):
    monkeypatch.setenv("SSLD_FAST_CONV", "1")
    found = []
    for kind in (nn.BatchNorm, BatchNorm):
        norm = filled(kind, 3)
        change(norm)
        found.append(trained(norm, noise(2, 3, 4, 4), noise(2, 3, 4, 4, seed=1), act))
    for theirs, ours in zip(*found, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert calls == []


def test_without_numba_paddle_computes(act, calls, monkeypatch):
    monkeypatch.setattr(compiling, "COMPILED", False)
    trained(BatchNorm(3), noise(2, 3, 4, 4), noise(2, 3, 4, 4), act)
    assert calls == []


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (2, 3, 2, 2, 2), (1, 3, 1, 1)], ids=str)
def test_other_shapes_and_a_single_number_for_each_channel_are_left_to_paddle(shape, act, calls):
    ours = trained(filled(BatchNorm, 3), noise(*shape), noise(*shape, seed=1), act)
    theirs = trained(filled(nn.BatchNorm, 3), noise(*shape), noise(*shape, seed=1), act)
    for found, wanted in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert calls == []


@pytest.mark.parametrize(
    "options", [{"param_attr": False}, {"bias_attr": False}, {"act": "relu"}, {"data_layout": "NHWC"}], ids=str
)
def test_other_kinds_of_norms_are_left_to_paddle(options, calls):
    images = noise(2, 4, 4, 4)
    wanted = nn.BatchNorm(4, **options)(tensor(images))
    np.testing.assert_array_equal(BatchNorm(4, **options)(tensor(images)).numpy(), wanted.numpy())
    assert calls == []


def test_other_numbers_than_float32_are_left_to_paddle(calls):
    norm = BatchNorm(3).to(dtype="float64")
    assert norm(paddle.ones([2, 3, 4, 4], "float64"), nn.ReLU()).dtype == paddle.float64
    assert calls == []


class Doubled(nn.ReLU):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("other", [nn.Sigmoid(), Doubled(), nn.LeakyReLU()], ids=lambda other: type(other).__name__)
def test_another_activation_is_applied_by_itself(other, calls):
    norm, images = filled(BatchNorm, 3), noise(2, 3, 4, 4)
    wanted = other(filled(nn.BatchNorm, 3)(tensor(images)))
    np.testing.assert_array_equal(norm(tensor(images), other).numpy(), wanted.numpy())
    assert calls == []


def test_a_hook_at_an_activation_sees_what_it_gives(calls):
    block = ConvNorm(("conv", Conv2D(3, 4, 1)), ("bn", BatchNorm(4)), ("act", nn.ReLU()))
    seen = []
    block.act.register_forward_post_hook(lambda layer, given, out: seen.append(out))
    out = block(tensor(noise(2, 3, 4, 4)))
    assert len(seen) == 1
    np.testing.assert_array_equal(seen[0].numpy(), out.numpy())
    assert calls == []


# What must not notice ------------------------------------------------------------------------------------------------


def test_weights_and_keys_are_those_of_paddles_layer():
    made = [norm(6, momentum=0.8).state_dict() for norm in (nn.BatchNorm, BatchNorm)]
    assert list(made[0]) == list(made[1]) == ["weight", "bias", "_mean", "_variance"]
    for plain, ours in zip(*(weights.values() for weights in made), strict=True):
        np.testing.assert_array_equal(plain.numpy(), ours.numpy())


def test_a_copy_trains_by_itself(act, calls):
    norm = filled(BatchNorm, 3)
    before = norm._mean.numpy().copy()
    twin = copy.deepcopy(norm)
    trained(twin, noise(2, 3, 4, 4), noise(2, 3, 4, 4), act)
    assert norm.weight.grad is None
    np.testing.assert_array_equal(norm._mean.numpy(), before)
    assert not np.array_equal(twin._mean.numpy(), before)
    assert calls == step_of(act)


@pytest.mark.parametrize(("rewritten", "mode"), [(False, "train"), (False, "eval"), (True, "eval")])
def test_an_export_holds_paddles_operators(rewritten, mode, calls, tmp_path):
    block = ConvNorm(("conv", Conv2D(3, 4, 1)), ("bn", filled(BatchNorm, 4)), ("act", nn.Hardswish()))
    images = paddle.to_tensor(noise(2, 3, 8, 8))
    block.eval()
    wanted = block(images).numpy()
    getattr(block, mode)()
    path, spec = str(tmp_path / "exported"), [paddle.static.InputSpec([None, 3, 8, 8], "float32")]
    if rewritten:
        paddle.jit.save(paddle.jit.to_static(block, input_spec=spec, full_graph=True), path)
    else:
        paddle.jit.save(block, path, input_spec=spec)
    program = json.dumps(json.loads((tmp_path / "exported.json").read_text()))
    assert "batch_norm" in program
    assert "hardswish" in program
    if mode == "eval":
        np.testing.assert_allclose(paddle.jit.load(path)(images).numpy(), wanted, atol=1e-5)
    assert calls == []


@pytest.mark.parametrize(
    ("name", "fused"),
    [
        ("MobileNetV3_small_x0_35", {NONE: 11, RELU: 6, HARDSWISH: 18}),
        ("MobileNetV3_large_x0_35", {NONE: 15, RELU: 12, HARDSWISH: 20}),
        ("ResNet18_vd", {NONE: 12, RELU: 11}),
    ],
)
def test_a_student_trains_with_it_after_every_convolution(calls, name, fused):
    network = networks.build(name, {}, 4)
    assert not any(type(layer) is nn.BatchNorm for layer in network.sublayers())
    network(tensor(noise(2, 3, 64, 64))).sum().backward()
    assert Counter(calls) == {
        (kernel, act): count for kernel, (act, count) in product(("normalize", "differentiate"), fused.items())
    }


@pytest.mark.parametrize("name", ["MobileNetV3_small_x0_35", "ResNet18_vd"])
def test_the_gradients_of_a_student_are_those_by_paddles_norms(name, monkeypatch):
    """With our convolutions both times."""
    found = []
    for fused in (True, False):
        if not fused:
            monkeypatch.setattr(BatchNorm, "trial", lambda self: None)
        network = networks.build(name, {}, 4, 7)
        network(tensor(noise(8, 3, 64, 64))).square().mean().backward()
        found.append([weight.grad.numpy() for weight in network.parameters() if not weight.stop_gradient])
    largest = max(abs(theirs).max() for theirs in found[1])
    for ours, theirs in zip(*found, strict=True):
        assert abs(ours - theirs).max() < 1e-3 * largest


def test_after_preparing_nothing_is_left_to_compile(act):
    block = ConvNorm(("conv", Conv2D(3, 3, 3)), ("bn", BatchNorm(3)), *([("act", act)] if act else []))
    compiling.prepare(block, lambda line: None)
    before = compiling.compilations()
    block(tensor(noise(2, 3, 8, 8))).sum().backward()
    assert compiling.compilations() == before


def test_preparing_calls_the_kernels_once(calls):
    compiling.prepare(nn.Sequential(BatchNorm(3), BatchNorm(3), nn.BatchNorm(3)), lambda line: None)
    assert [name for name, _ in calls] == ["normalize", "differentiate"]
