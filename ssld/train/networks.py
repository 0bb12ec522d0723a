"""Students as paddle layers: build by name, load strictly, freeze."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import paddle
from paddle import nn
from paddle.base import core

from ssld import memory, plugins, threads
from ssld.checkpoint import fit_weights
from ssld.contracts import Arrays, Headless, Model, Task
from ssld.errors import PluginError, RecipeError
from ssld.seeds import derive
from ssld.settings import TrainingSettings


def build(name: str, options: Mapping[str, Any], classes: int, seed: int = 0) -> nn.Layer:
    """A new network with weights drawn from the seed; its logits are [B, classes].

    Raises RecipeError for an unknown name or option, PluginError for a network without `head` and `features`.
    """
    paddle.seed(seed)
    network = plugins.call("students", name, options, {"num_classes": classes})
    named = dict(network.named_sublayers())
    for part in ("head", "features"):
        if getattr(network, part, None) not in named:
            raise PluginError(
                f"student {name!r} of {plugins.origin('students', name)}: expected an attribute {part!r} that names "
                f"one of its layers, got {getattr(network, part, None)!r}"
            )
    return network


def use_device(device: str) -> str:
    """Let paddle compute there, a step in its own number of threads and memory; returns paddle's name for the device.

    Raises RecipeError where this paddle cannot.
    """
    if device == "gpu" and not paddle.device.is_compiled_with_cuda():
        raise RecipeError(
            "--device gpu: expected a paddle built with CUDA, got the CPU build; install paddlepaddle-gpu, or leave "
            "--device out"
        )
    if device == "gpu":
        # the same bits from run to run
        paddle.set_flags({"FLAGS_cudnn_deterministic": True})
    paddle.device.set_device(device)
    core.set_num_threads(threads.of_step())
    threads.one()
    memory.keep()
    return str(paddle.device.get_device())


def arrays(network: nn.Layer) -> dict[str, np.ndarray]:
    """All weights and batch-norm statistics by name, copied to numpy."""
    return {name: tensor.numpy().copy() for name, tensor in network.state_dict().items()}


def load(network: nn.Layer, weights: Arrays, what: str) -> None:
    """Put the weights in; CheckpointError, with both sides, unless every key and shape matches."""
    own = network.state_dict()
    fit_weights(weights, {name: tuple(tensor.shape) for name, tensor in own.items()}, what)
    for name, tensor in own.items():
        tensor.set_value(np.ascontiguousarray(weights[name], dtype=tensor.numpy().dtype))


def restored(model: Model, weights: Arrays, what: str) -> nn.Layer:
    """The network of a model with the given weights in it."""
    network = build(model.network, model.options, len(model.classes))
    load(network, weights, what)
    return network


def student(task: Task[Any]) -> nn.Layer:
    """The network a task trains: new, from what `from` names, or as a stopped run of the task left it."""
    model = task.model
    network = build(model.network, model.options, len(model.classes), derive(task.seed, "weights"))
    if task.resume is not None:
        load(network, task.resume.weights, f"the checkpoint of {task.name} at step {task.resume.step}")
    elif task.initial is not None:
        start = start_of(task.name, task.settings)
        load(network, completed(task.initial, network), start)
        if isinstance(task.initial, Headless):
            new = f"{network.head} for {len(model.classes)} classes"
            task.journal.note(f"{start}, was imported without its classifier; it begins with a new one, {new}")
    return network


def completed(weights: Arrays, network: nn.Layer) -> Arrays:
    """The weights to start from: with the network's own classifier where theirs was left out on purpose."""
    if not isinstance(weights, Headless):
        return weights
    own = {name: array for name, array in arrays(network).items() if name.startswith(f"{network.head}.")}
    return {**own, **weights}


def start_of(stage: str, settings: TrainingSettings) -> str:
    """The weights that a stage starts from, in words."""
    return f"{settings.start} ({settings.student.name}), which {stage} starts from"


def freeze_all_but_head(network: nn.Layer, *, adapt_bn: bool) -> Callable[[nn.Layer], None]:
    """Let gradients reach the classifier only; returns what sets the mode before each step.

    The whole network is in test mode, so that the classifier sees the features that it will see when it is used; with
    adapt_bn the last batch norm, in the order of construction, uses and updates batch statistics.
    """
    head = network.head + "."
    for name, parameter in network.named_parameters():
        # paddle counts the statistics of a batch norm as parameters, which never take a gradient
        parameter.stop_gradient = parameter.stop_gradient or not name.startswith(head)
    norms = [layer for layer in network.sublayers() if isinstance(layer, nn.BatchNorm2D | nn.BatchNorm)]

    def prepare(layer: nn.Layer) -> None:
        layer.eval()
        if adapt_bn and norms:
            norms[-1].train()

    return prepare
