"""The optimizer of SSLD: gradient descent with momentum, whose state belongs to parameters by their names."""

from __future__ import annotations

import numpy as np
import paddle
from paddle import nn

from ssld.contracts import Arrays
from ssld.errors import CheckpointError, SsldError


class Momentum:
    """v = momentum * v + g + decay * w;  w = w - rate * v, for every trainable parameter w with gradient g.

    weight_decay: L2 coefficient; a parameter made with a regularizer of its own (`ParamAttr`) keeps that instead.
    clip_norm: all g are scaled down together to this global norm, before the decay is added; None for no clipping.
    The velocity v starts at 0. A parameter whose `stop_gradient` is set when this is made is left out; one that got
    no gradient in a step keeps its value and its velocity. Raises SsldError when no parameter is trainable.

    Source: paddle.optimizer.Momentum. Sutskever et al. 2013 have the rate inside v; the two differ when it changes.
    """

    def __init__(
        self, layer: nn.Layer, momentum: float = 0.9, weight_decay: float = 0.0, clip_norm: float | None = None
    ) -> None:
        trainable = {name: weight for name, weight in layer.named_parameters() if not weight.stop_gradient}
        if not trainable:
            raise SsldError(
                f"expected a trainable parameter in {type(layer).__name__}, got none; every one has stop_gradient set"
            )
        self._optimizer = paddle.optimizer.Momentum(
            momentum=momentum,
            parameters=list(trainable.values()),
            weight_decay=float(weight_decay),
            grad_clip=None if clip_norm is None else nn.ClipGradByGlobalNorm(clip_norm),
        )
        # paddle makes a velocity at the first step, under a name that counts the networks of the process; made here,
        # it is there to be restored, and found by its parameter
        self._velocities = {
            name: self._optimizer._add_accumulator("velocity", weight) for name, weight in trainable.items()
        }

    def step(self, rate: float) -> None:
        """Move every parameter by its gradient at this learning rate, and clear the gradients."""
        self._optimizer.set_lr(rate)
        self._optimizer.step()
        # a gradient set to zero would move its parameter on in the next step, one that is gone does not: the same
        # as after a resume
        self._optimizer.clear_grad(set_to_zero=False)

    def state(self) -> dict[str, np.ndarray]:
        """The velocities, copied, by the name of the parameter in the layer ("blocks.0.conv0.conv.weight")."""
        return {name: velocity.numpy().copy() for name, velocity in self._velocities.items()}

    def restore(self, arrays: Arrays) -> None:
        """Go on from what `state` returned.

        Raises CheckpointError, and changes nothing, unless names, shapes and types are the trainable parameters'.
        """
        own = self.state()
        faults = [f"{name} is missing" for name in own.keys() - arrays.keys()]
        faults += [f"{name} is unknown" for name in arrays.keys() - own.keys()]
        for name in own.keys() & arrays.keys():
            wanted, got = _form(own[name]), _form(arrays[name])
            faults += [f"{name} is {got}, not {wanted}"] if got != wanted else []
        if faults:
            raise CheckpointError(
                f"expected the optimizer state of {len(own)} trainable parameters, got {len(arrays)} arrays that do "
                f"not fit: {'; '.join(sorted(faults)[:8])}{' …' * (len(faults) > 8)}; "
                f"go on with the network and the trainable layers that the checkpoint was made with"
            )
        for name, velocity in self._velocities.items():
            velocity.set_value(np.ascontiguousarray(arrays[name]))


def _form(array: np.ndarray) -> str:
    return f"{array.dtype} {list(array.shape)}"
