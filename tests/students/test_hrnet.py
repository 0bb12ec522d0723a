"""HRNet-W18-C: its numbers in float64 by name alone, also at sides that do not halve evenly, and its first values."""

from __future__ import annotations

import runpy
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from paddle import nn

from ssld.errors import RecipeError
from ssld.students.hrnet import HRNet
from ssld.train.frozen import Frozen
from ssld.train.momentum import Momentum

NAME = "HRNet_W18_C"
EXACT = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("test_numerics.py"))))
conv_bn, relu = EXACT.conv_bn, EXACT.relu


def block(weights, name, x):
    """A basic block or a bottleneck, as its convolutions tell."""
    last = 3 if f"{name}.conv3.conv.weight" in weights else 2
    y = x
    for index in range(1, last + 1):
        y = conv_bn(weights, f"{name}.conv{index}", y)
        y = relu(y) if index < last else y
    return relu(y + (conv_bn(weights, f"{name}.conv_down", x) if f"{name}.conv_down.conv.weight" in weights else x))


def exchange(weights, name, maps):
    """The paper's section 3.2: finer maps come by strided 3x3 convolutions, coarser ones by 1x1, enlarged.

    As in PaddleClas, a map is enlarged by repeating pixels.
    """
    names = (f"{name}.residual_func_list.{index}" for index in count())
    outs = []
    for to, total in enumerate(maps):
        rows, columns = (np.arange(side) for side in total.shape[2:])
        for scale, x in enumerate(maps):
            for left in range(to - scale, 0, -1):
                x = conv_bn(weights, next(names), x, 2)
                x = relu(x) if left > 1 else x
            if scale > to:
                factor = 2 ** (scale - to)
                x = conv_bn(weights, next(names), x)[:, :, rows // factor][..., columns // factor]
            total = total + x if scale != to else total
        outs.append(relu(total))
    return outs


def stage(weights, name, maps, modules):
    for module in range(modules):
        prefix = f"{name}.stage_func_list.{module}"
        for scale, index in np.ndindex(len(maps), 4):
            maps[scale] = block(weights, f"{prefix}.basic_block_list.{scale}.{index}", maps[scale])
        maps = exchange(weights, f"{prefix}.fuse_func", maps)
    return maps


def features(weights, x, stem_stride):
    x = relu(conv_bn(weights, "conv_layer1_1", x, stem_stride))
    x = relu(conv_bn(weights, "conv_layer1_2", x, 2))
    for index in range(4):
        x = block(weights, f"layer1.{index}", x)
    maps = [relu(conv_bn(weights, f"conv_tr1_{index}", x, index)) for index in (1, 2)]
    maps = stage(weights, "st2", maps, 1)
    maps = stage(weights, "st3", [*maps, relu(conv_bn(weights, "conv_tr2", maps[-1], 2))], 4)
    maps = stage(weights, "st4", [*maps, relu(conv_bn(weights, "conv_tr3", maps[-1], 2))], 3)
    first, *coarser = (block(weights, f"last_cls.func_list.{index}", x) for index, x in enumerate(maps))
    for index, x in enumerate(coarser):
        first = x + relu(conv_bn(weights, f"cls_head_conv_list.{index}", first, 2))
    return relu(conv_bn(weights, "conv_last", first)).mean((2, 3))


@pytest.fixture(scope="module")
def network(build):
    return build(NAME, 3)


@pytest.mark.parametrize(("size", "stem_stride"), [((64, 32), 2), ((33, 75), 2), ((32, 20), 1)])
def test_features_and_logits(build, network, size, stem_stride):
    layer = network if stem_stride == 2 else build(NAME, 3, stem_stride=stem_stride)
    weights, images = EXACT.randomize(layer), EXACT.drawn(2, 3, *size)
    seen = []
    hook = getattr(layer, layer.features).register_forward_post_hook(lambda _layer, _in, out: seen.append(out.numpy()))
    logits = EXACT.evaluated(layer, images)
    hook.remove()
    expected = features(weights, images.astype("float64"), stem_stride)
    EXACT.assert_equal_logits(seen[0], expected)
    EXACT.assert_equal_logits(logits, expected @ weights["fc.weight"] + weights["fc.bias"])


def test_exported_a_small_one_answers_as_it_does():
    """At a side of which maps are cut as well."""
    layer = HRNet(4, 3, modules=(1, 1, 1))
    EXACT.randomize(layer)
    images = EXACT.drawn(3, 3, 40, 40)
    EXACT.assert_equal_logits(Frozen(layer, 40, threads=1)(images), EXACT.evaluated(layer, images))


def test_total_is_the_published_one(network):
    """21.35 million for 1,000 classes with the statistics of batch norm, says PaddleClas's model list."""
    assert isinstance(getattr(network, network.head), nn.Linear)
    total = sum(value.size for value in network.state_dict().values()) + (1000 - 3) * (2048 + 1)
    assert round(total / 1e6, 2) == 21.35


def test_every_layer_trains_by_our_kernels(network):
    layers = [layer for layer in network.sublayers() if isinstance(layer, nn.Conv2D | nn.BatchNorm)]
    assert len(layers) == 2 * 325
    assert all(layer.trial() for layer in layers)
    assert {(layer._momentum, layer._epsilon) for layer in layers if isinstance(layer, nn.BatchNorm)} == {(0.9, 1e-5)}


def test_first_values(build):
    first = {key: value.numpy() for key, value in build(NAME, 50).state_dict().items()}
    for key in ("conv_layer1_2", "layer1.0.conv2", "st4.stage_func_list.0.fuse_func.residual_func_list.15"):
        weight = first[f"{key}.conv.weight"]
        assert weight.std() == pytest.approx((2 / np.prod(weight.shape[1:])) ** 0.5, rel=0.03), key
    bound = 2048**-0.5
    assert 0.99 * bound < np.abs(first["fc.weight"]).max() <= bound * (1 + 1e-6)
    assert first["fc.weight"].std() == pytest.approx(bound / 3**0.5, rel=0.02)


def test_everything_is_decayed(network):
    """With a gradient of zero, a step of rate 0.5 and decay 0.1 shrinks what is decayed by a twentieth."""
    EXACT.randomize(network)
    learned = {key: weight for key, weight in network.named_parameters() if not weight.stop_gradient}
    before = {key: weight.numpy().copy() for key, weight in learned.items()}
    optimizer = Momentum(network, weight_decay=0.1)
    for weight in learned.values():
        (weight.sum() * 0).backward()
    optimizer.step(0.5)
    for key, weight in learned.items():
        np.testing.assert_allclose(weight.numpy(), 0.95 * before[key], rtol=1e-6, atol=1e-12, err_msg=key)


@pytest.mark.parametrize(
    ("num_classes", "options", "got"),
    [
        (0, {}, "HRNet: expected num_classes of at least 1, got 0"),
        (2, {"stem_stride": 4}, "HRNet: expected stem_stride 2, or 1 .* got 4"),
    ],
)
def test_wrong_values_are_named(build, num_classes, options, got):
    with pytest.raises(RecipeError, match=got):
        build(NAME, num_classes, **options)
