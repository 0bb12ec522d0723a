"""The depthwise kernels against paddle's own convolution."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paddle.nn import functional as F

from ssld.train import compiling, depthwise

pytestmark = pytest.mark.skipif(not compiling.COMPILED, reason="numba is not installed, or switched off")


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def whole(*shape, seed=0):
    """Small whole numbers, whose sums of products are exact in every order."""
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(np.float32)


def out_shape(images, side, stride, padding):
    above, below, left, right = padding
    height, width = images.shape[2] + above + below, images.shape[3] + left + right
    return (*images.shape[:2], (height - side) // stride + 1, (width - side) // stride + 1)


def ours(images, weight, bias, coming, stride, padding):
    """The convolution, and the gradients of images and weight when `coming` arrives."""
    found = [np.full_like(array, np.nan) for array in (coming, images, weight)]
    depthwise.convolve(images, weight, bias, stride, padding[0], padding[2], found[0])
    depthwise.differentiate(images, weight, coming, stride, padding[0], padding[2], found[1], found[2])
    return found


def by_paddle(images, weight, bias, coming, stride, padding):
    x, w = (paddle.to_tensor(array, stop_gradient=False) for array in (images, weight))
    out = F.conv2d(x, w, paddle.to_tensor(bias), stride, list(padding), groups=len(weight))
    out.backward(paddle.to_tensor(coming))
    return [value.numpy() for value in (out, x.grad, w.grad)]


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
)
def test_whole_numbers_come_out_exactly(count, channels, height, width, side, stride, padding):
    images = whole(count, channels, height, width)
    shape = out_shape(images, side, stride, padding)
    if min(shape) < 1:
        return
    problem = images, whole(channels, 1, side, side, seed=1), whole(channels), whole(*shape, seed=9), stride, padding
    for found, wanted in zip(ours(*problem), by_paddle(*problem), strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("side", [3, 5])
@pytest.mark.parametrize("size", [2, 7, 56, 130])
def test_rounding_stays_within_a_hundred_thousandth_of_the_largest_value(size, side, stride):
    images, padding = noise(24, 3, size, size), [side // 2] * 4
    coming = noise(*out_shape(images, side, stride, padding), seed=9)
    problem = images, noise(3, 1, side, side, seed=1), noise(3), coming, stride, padding
    for found, wanted in zip(ours(*problem), by_paddle(*problem), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_a_gradient_that_is_not_wanted_is_left_alone():
    images, weight, coming = whole(2, 3, 6, 6), whole(3, 1, 3, 3, seed=1), whole(2, 3, 6, 6, seed=9)
    _, to_images, to_weight = ours(images, weight, whole(3), coming, 1, [1] * 4)
    nothing, alone = np.empty((0, 0, 0, 0), np.float32), [np.empty_like(images), np.empty_like(weight)]
    depthwise.differentiate(images, weight, coming, 1, 1, 1, alone[0], nothing)
    depthwise.differentiate(images, weight, coming, 1, 1, 1, nothing, alone[1])
    for found, wanted in zip(alone, (to_images, to_weight), strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("threads", [2, 4])
def test_the_bits_are_those_of_any_thread_that_asks(threads):
    def bits(_=None):
        problem = noise(20, 6, 13, 13), noise(6, 1, 5, 5, seed=1), noise(6), noise(20, 6, 7, 7, seed=9), 2, [2] * 4
        return b"".join(array.tobytes() for array in ours(*problem))

    with ThreadPoolExecutor(threads) as pool:
        assert set(pool.map(bits, range(4 * threads))) == {bits()}
