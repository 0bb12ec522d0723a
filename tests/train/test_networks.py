"""Students as layers: built by name, loaded strictly, frozen all but the head."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import paddle
import pytest
from paddle import nn
from paddle.base import core
from threadpoolctl import threadpool_info, threadpool_limits

from ssld.contracts import State
from ssld.errors import CheckpointError, PluginError, RecipeError
from ssld.train import networks

SMALL = "MobileNetV3_small_x0_35"


class Normed(nn.Layer):
    """A network whose classifier holds a batch norm of its own."""

    head = "top"
    features = "flatten"

    def __init__(self, num_classes):
        super().__init__()
        self.conv = nn.Conv2D(3, 4, 3)
        self.norm = nn.BatchNorm2D(4)
        self.flatten = nn.Flatten()
        self.top = nn.Sequential(nn.Linear(4 * 36, 8), nn.BatchNorm(8), nn.Linear(8, num_classes))
        self.topless = nn.Linear(2, 2)

    def forward(self, x):
        return self.top(self.flatten(self.norm(self.conv(x))))


def built(seed=0):
    return networks.build(SMALL, {}, 4, seed)


def equal(first, second):
    return all(np.array_equal(first[name], second[name]) for name in first)


def statistics(network):
    return {name: tensor for name, tensor in network.state_dict().items() if name.endswith(("._mean", "._variance"))}


def test_weights_are_drawn_from_the_seed_alone():
    first, again, other = (networks.arrays(built(seed)) for seed in (1, 1, 2))
    assert equal(first, again)
    assert not np.array_equal(first["fc.weight"], other["fc.weight"])


def test_an_unknown_network_and_a_wrong_option_are_named():
    with pytest.raises(RecipeError, match=r"unknown student 'MobileNetV3_smal_x0_35', did you mean MobileNetV3_small"):
        networks.build("MobileNetV3_smal_x0_35", {}, 4)
    with pytest.raises(RecipeError, match=r"drop_out: unknown option, did you mean dropout"):
        networks.build(SMALL, {"drop_out": 0.1}, 4)


@pytest.mark.parametrize("part", ["head", "features"])
@pytest.mark.parametrize("value", [None, "fcc"])
def test_a_student_must_name_its_head_and_features(monkeypatch, part, value):
    def factory(num_classes: int):
        network = Normed(num_classes)
        setattr(network, part, value)
        return network

    monkeypatch.setattr(networks.plugins, "load", lambda kind, name: factory)
    message = rf"student '{SMALL}' of ssld .*: expected an attribute '{part}' that names .* layers, got {value!r}"
    with pytest.raises(PluginError, match=message):
        built()


def test_arrays_are_copies():
    network = built()
    before = networks.arrays(network)
    kept = before["fc.bias"].copy()
    network.fc.bias.set_value(np.full(4, 7, np.float32))
    assert np.array_equal(before["fc.bias"], kept)


def test_load_puts_in_every_array():
    source, target = networks.arrays(built(1)), built(2)
    networks.load(target, source, "weights")
    assert equal(networks.arrays(target), source)


def test_load_is_strict_and_shows_both_sides():
    network = built()
    before = networks.arrays(network)
    weights = networks.arrays(built(1))
    weights["classifier.weight"] = weights.pop("fc.weight")
    weights["fc.bias"] = np.zeros(1000, np.float32)
    with pytest.raises(CheckpointError) as caught:
        networks.load(network, weights, "weights.safetensors")
    text = str(caught.value)
    assert text.startswith("weights.safetensors: expected the")
    assert "- fc.weight [1280, 4]" in text
    assert "+ classifier.weight [1280, 4]" in text
    assert "~ fc.bias [4] in the network, [1000] in the file" in text
    assert equal(networks.arrays(network), before)


def test_restored_is_the_network_of_the_model(make_task):
    model = replace(make_task().model, options={"dropout": 0.0})
    weights = networks.arrays(built(5))
    network = networks.restored(model, weights, "weights")
    assert equal(networks.arrays(network), weights)
    assert network.dropout.p == 0.0


def test_a_stage_goes_on_from_its_own_state_before_what_it_starts_from(make_task):
    initial, stopped = (networks.arrays(built(seed)) for seed in (1, 2))
    new = networks.arrays(networks.student(make_task()))
    assert equal(networks.arrays(networks.student(make_task(initial=initial))), initial)
    resumed = networks.student(make_task(initial=initial, resume=State(3, stopped)))
    assert equal(networks.arrays(resumed), stopped)
    assert equal(networks.arrays(networks.student(make_task())), new)
    assert not np.array_equal(networks.arrays(networks.student(make_task(seed=9)))["fc.weight"], new["fc.weight"])


def test_a_stage_names_the_weights_that_do_not_fit(make_task):
    message = r"(?s)distill \(MobileNetV3_small_x0_35\), which tune starts from: expected .* conv\.conv\.weight"
    with pytest.raises(CheckpointError, match=message):
        networks.student(make_task("finetune", {"from": "distill", "hard": 1}, name="tune", initial={}))


@pytest.mark.parametrize("adapt_bn", [False, True])
def test_only_the_head_learns(adapt_bn):
    network = built()
    prepare = networks.freeze_all_but_head(network, adapt_bn=adapt_bn)
    learns = [name for name, parameter in network.named_parameters() if not parameter.stop_gradient]
    assert learns == ["fc.weight", "fc.bias"]
    network.train()
    prepare(network)
    in_training = [name for name, layer in network.named_sublayers() if layer.training]
    assert in_training == (["last_second_conv.bn"] if adapt_bn else [])


def test_the_head_is_told_by_its_whole_name():
    network = Normed(2)
    networks.freeze_all_but_head(network, adapt_bn=False)
    assert network.topless.weight.stop_gradient
    assert not network.top[2].weight.stop_gradient


def test_statistics_of_a_norm_in_the_head_never_become_trainable():
    network = Normed(2)
    networks.freeze_all_but_head(network, adapt_bn=True)
    assert [name for name, tensor in statistics(network).items() if not tensor.stop_gradient] == []


def test_statistics_are_never_trainable():
    network = built()
    assert len(statistics(network)) > 40
    assert all(tensor.stop_gradient for tensor in statistics(network).values())


def test_gpu_needs_a_paddle_that_has_one(monkeypatch):
    monkeypatch.setattr(paddle.device, "is_compiled_with_cuda", lambda: False)
    with pytest.raises(RecipeError, match=r"--device gpu: expected a paddle built with CUDA, got the CPU build"):
        networks.use_device("gpu")


def test_a_step_computes_in_its_own_number_of_threads(monkeypatch):
    """Seen from a product large enough that its bits depend on them."""
    paddle.seed(0)
    left, right = paddle.randn([300, 2000]), paddle.randn([2000, 300])
    products = {}
    for threads in (2, 1):
        monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
        core.set_num_threads(threads)
        products[threads] = paddle.matmul(left, right).numpy()
    assert not np.array_equal(products[1], products[2])
    core.set_num_threads(2)
    with threadpool_limits(2, user_api="blas"):
        networks.use_device("cpu")
        assert {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"} == {1}
    np.testing.assert_array_equal(paddle.matmul(left, right).numpy(), products[1])
