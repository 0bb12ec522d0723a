"""The dense convolution against paddle's own, and against its definition in double precision."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paddle import nn
from paddle.nn import functional as F

from ssld.students.resnext_wsl import ResNeXtWsl
from ssld.train import compiling, dense, networks

pytestmark = pytest.mark.skipif(not compiling.COMPILED, reason="numba is not installed, or switched off")


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def whole(*shape, seed=0):
    """Small whole numbers, whose sums of products are exact in every order."""
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(np.float32)


def out_shape(images, weight, stride, padding):
    above, below, left, right = padding
    height, width = images[2] + above + below, images[3] + left + right
    return images[0], weight[0], (height - weight[2]) // stride + 1, (width - weight[3]) // stride + 1


def ours(images, weight, bias, coming, stride, padding):
    """The convolution, and the gradients of images and weight when `coming` arrives."""
    found = [np.full_like(array, np.nan) for array in (coming, images, weight)]
    dense.convolve(images, weight, bias, stride, padding[0], padding[2], found[0])
    dense.differentiate(images, weight, coming, stride, padding[0], padding[2], found[1], found[2])
    return found


def by_paddle(images, weight, bias, coming, stride, padding):
    x, w = (paddle.to_tensor(array, stop_gradient=False) for array in (images, weight))
    groups = images.shape[1] // weight.shape[1]
    out = F.conv2d(x, w, paddle.to_tensor(bias), stride, list(padding), groups=groups)
    out.backward(paddle.to_tensor(coming))
    return [value.numpy() for value in (out, x.grad, w.grad)]


def by_definition(images, weight, bias, coming, stride, padding):
    """Every place of the kernel adds a product of matrices; all in double precision."""
    above, below, left, right = padding
    groups, (outs, depth, tall, wide) = images.shape[1] // weight.shape[1], weight.shape
    padded = np.pad(images.astype(np.float64), ((0, 0), (0, 0), (above, below), (left, right)))
    out = np.zeros(coming.shape) + bias[:, None, None]
    to_padded, to_weight = np.zeros_like(padded), np.zeros(weight.shape)
    for group in range(groups):
        ins, own = (
            np.s_[group * depth : (group + 1) * depth],
            np.s_[group * outs // groups : (group + 1) * outs // groups],
        )
        for y in range(tall):
            for x in range(wide):
                rows = np.s_[y : y + (out.shape[2] - 1) * stride + 1 : stride]
                columns = np.s_[x : x + (out.shape[3] - 1) * stride + 1 : stride]
                met, tap = padded[:, ins, rows, columns], weight[own, :, y, x].astype(np.float64)
                out[:, own] += np.einsum("mc,bcyx->bmyx", tap, met, optimize=True)
                to_padded[:, ins, rows, columns] += np.einsum("mc,bmyx->bcyx", tap, coming[:, own], optimize=True)
                to_weight[own, :, y, x] = np.einsum("bmyx,bcyx->mc", coming[:, own], met, optimize=True)
    height, width = images.shape[2:]
    return out, to_padded[:, :, above : above + height, left : left + width], to_weight


def check(problem, wanted):
    for found, right in zip(ours(*problem), wanted, strict=True):
        np.testing.assert_allclose(found, right, rtol=0, atol=1e-5 * np.abs(right).max())


# Equal ---------------------------------------------------------------------------------------------------------------

PADS = st.integers(0, 4)


@settings(max_examples=120, deadline=None)
@given(
    count=st.integers(1, 9),
    groups=st.sampled_from([1, 1, 2, 3]),
    depths=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)) | st.just((1, 1)),
    stride=st.integers(1, 3),
    padding=st.tuples(PADS, PADS, PADS, PADS) | st.just((0, 0, 0, 0)),
    block=st.sampled_from([1, 100, 1000, dense.BLOCK]),
    pixels=st.sampled_from([1, 20, dense.PIXELS]),
)
def test_whole_numbers_come_out_exactly(count, groups, depths, size, kernel, stride, padding, block, pixels):
    ins, outs = depths
    images, weight = whole(count, groups * ins, *size), whole(groups * outs, ins, *kernel, seed=1)
    shape = out_shape(images.shape, weight.shape, stride, padding)
    if min(shape) < 1:
        return
    problem = images, weight, whole(groups * outs), whole(*shape, seed=9), stride, padding
    with pytest.MonkeyPatch.context() as patch:
        # blocks of one row up to all images
        patch.setattr(dense, "BLOCK", block)
        patch.setattr(dense, "PIXELS", pixels)
        found = ours(*problem)
    for array, wanted in zip(found, by_paddle(*problem), strict=True):
        np.testing.assert_array_equal(array, wanted)


def shapes(network, size, batch=2):
    """The convolutions of a network that the dense kernels know: shapes of images and weight, stride, padding."""
    found = {}
    network.eval()
    for layer in network.sublayers():
        if isinstance(layer, nn.Conv2D) and layer.kernels() is dense:
            layer.register_forward_pre_hook(
                lambda layer, args: found.update(
                    {(tuple(args[0].shape), tuple(layer.weight.shape), layer._stride[0], layer._padding): None}
                )
            )
    with paddle.no_grad():
        network(paddle.zeros([batch, 3, size, size]))
    return list(found)


STUDENTS = {
    "MobileNetV3_small_x0_35 at 32 px": lambda: shapes(
        networks.build("MobileNetV3_small_x0_35", {"stem_stride": 1}, 4), 32, 5
    ),
    "MobileNetV3_small_x1_25 at 64 px": lambda: shapes(networks.build("MobileNetV3_small_x1_25", {}, 4), 64),
    "MobileNetV3_large_x1_0 at 96 px": lambda: shapes(networks.build("MobileNetV3_large_x1_0", {}, 4), 96),
    "ResNet18_vd at 32 px": lambda: shapes(networks.build("ResNet18_vd", {}, 4), 32, 5),
    "ResNet50_vd at 64 px": lambda: shapes(networks.build("ResNet50_vd", {}, 4), 64),
    "ResNeXt_32x8d at 64 px": lambda: shapes(ResNeXtWsl(8, 4, (1, 1, 1, 1)), 64),
}


@pytest.mark.parametrize("student", STUDENTS)
def test_rounding_stays_within_a_hundred_thousandth_of_the_largest_value(student):
    found = STUDENTS[student]()
    assert len(found) > 10
    for images, weight, stride, padding in found:
        pads = [padding] * 4
        coming = noise(*out_shape(images, weight, stride, pads), seed=9)
        problem = noise(*images), noise(*weight, seed=1), noise(weight[0]), coming, stride, pads
        check(problem, by_definition(*problem))


def test_a_sum_over_a_million_pixels_is_still_exact_enough():
    images, coming = noise(40, 4, 160, 160), noise(40, 4, 160, 160, seed=9)
    for side in (1, 3):
        problem = images, noise(4, 4, side, side, seed=1), noise(4), coming, 1, [side // 2] * 4
        check(problem, by_definition(*problem))


def test_a_gradient_that_is_not_wanted_is_left_alone():
    nothing = np.empty((0, 0, 0, 0), np.float32)
    for side in (1, 3):
        images, weight = whole(2, 3, 6, 6), whole(4, 3, side, side, seed=1)
        coming, pad = whole(2, 4, 6, 6, seed=9), side // 2
        _, to_images, to_weight = ours(images, weight, whole(4), coming, 1, [pad] * 4)
        alone = np.empty_like(images), np.empty_like(weight)
        dense.differentiate(images, weight, coming, 1, pad, pad, alone[0], nothing)
        dense.differentiate(images, weight, coming, 1, pad, pad, nothing, alone[1])
        for found, wanted in zip(alone, (to_images, to_weight), strict=True):
            np.testing.assert_array_equal(found, wanted)


# What is computed ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 6, 5, 7), (8, 6, 1, 1)])
def test_a_kernel_of_one_pixel_moves_nothing(shape, monkeypatch):
    for name in ("gather", "scatter"):
        monkeypatch.setattr(dense, name, None)
    matrices = dense.matrices(images := whole(*shape), 2)
    assert np.shares_memory(matrices, images)
    ours(images, whole(4, 3, 1, 1), whole(4), whole(8, 4, *shape[2:]), 1, [0] * 4)


@pytest.mark.parametrize(("size", "stride", "places"), [(1, 1, 1), (1, 2, 1), (2, 2, 4), (2, 1, 9)])
def test_places_of_the_kernel_that_meet_padding_alone_are_left_out(size, stride, places):
    images, weight = np.empty((1, 2, size, size)), np.empty((2, 2, 3, 3))
    met = dense.Met.by(images, weight, np.empty(out_shape(images.shape, weight.shape, stride, [1] * 4)), stride, 1, 1)
    assert weight[0, 0, met.rows, met.columns].size == places


@pytest.mark.parametrize(
    ("shape", "most"), [((7, 1, 4, 4), 50), ((2, 1, 10, 3), 7), ((3, 1, 5, 9), 1), ((2, 1, 3, 3), 99)]
)
def test_blocks_are_every_row_once_and_no_more_at_once_than_asked(shape, most):
    met = np.zeros((shape[0], shape[2]), int)
    for images, rows in dense.blocks(shape, most):
        met[images, rows] += 1
        pixels = met[images, rows].size * shape[3]
        assert pixels <= max(most, shape[3])
    assert (met == 1).all()


@pytest.mark.parametrize("threads", [2, 4])
def test_the_bits_are_those_of_any_thread_that_asks(threads):
    def bits(_=None):
        problem = noise(20, 6, 13, 13), noise(8, 3, 5, 5, seed=1), noise(8), noise(20, 8, 7, 7, seed=9), 2, [2] * 4
        return b"".join(array.tobytes() for array in ours(*problem))

    with ThreadPoolExecutor(threads) as pool:
        assert set(pool.map(bits, range(4 * threads))) == {bits()}
