"""What the ranks of a stage tell each other in a step: one sum, after which each goes on with the same numbers."""

from __future__ import annotations

import zlib

import numpy as np
import paddle
from paddle import nn
from paddle.nn.layer.norm import _BatchNormBase

from ssld.contracts import Ranks
from ssld.errors import RankError
from ssld.train.ranks import add_up


class Exchange:
    """Sums the gradients of a network over ranks, and takes the mean of the batch statistics that each has collected.

    A batch norm normalizes by the statistics of its own rank's images. What it keeps for test time is averaged in
    every step, so that all ranks, and with them every checkpoint, always hold the same network; the variance is the
    mean of the ranks' own, without what their means differ by.
    """

    def __init__(self, network: nn.Layer, ranks: Ranks) -> None:
        """Raises RankError unless all ranks begin with the same weights."""
        self._ranks = ranks
        self._weights = [weight for weight in network.parameters() if not weight.stop_gradient]
        kinds = (_BatchNormBase, nn.BatchNorm)
        self._norms = [layer for layer in network.sublayers(include_self=True) if isinstance(layer, kinds)]
        self._sums: paddle.Tensor | None = None
        if ranks.count > 1:
            self._expect_same([_memory(tensor) for tensor in network.state_dict().values()])

    def _expect_same(self, weights: list[np.ndarray]) -> None:
        mark = 0
        for array in weights:
            mark = zlib.crc32(array, mark)
        # halves, for a float32 holds 24 bits
        own = np.array([mark >> 16, mark & 0xFFFF], np.float32)
        total = paddle.to_tensor(own)
        add_up(total, self._ranks)
        if not np.array_equal(total.numpy(), own * self._ranks.count):
            raise RankError(
                f"expected the same first weights on all {self._ranks.count} ranks, got others on rank "
                f"{self._ranks.number}; draw them by paddle alone, whose seed is set before a network is built"
            )

    def __call__(self, loss: float, stop: int | None) -> tuple[float, int | None]:
        """To be called after `backward`, with this rank's share of the loss and the signal that rank 0 may have met.

        Returns the sum of the losses, and the signal. Raises RankError when another rank is gone.
        """
        if self._ranks.count == 1:
            return loss, stop
        gradients = [_memory(weight.grad) for weight in self._weights if weight.grad is not None]
        # the others do not change, and a mean of three equal numbers may not be equal to them
        learning = [layer for layer in self._norms if layer.training]
        statistics = [_memory(tensor) for layer in learning for tensor in (layer._mean, layer._variance)]
        facts = np.array([loss, stop or 0], np.float32)
        arrays = [*gradients, *statistics, facts]
        ends = np.cumsum([array.size for array in arrays])
        if self._sums is None:
            self._sums = paddle.empty([int(ends[-1])])
        parts = np.split(_memory(self._sums), ends[:-1])
        for part, array in zip(parts, arrays, strict=True):
            part[:] = array.ravel()
        add_up(self._sums, self._ranks)
        for part, array in zip(parts, arrays, strict=True):
            array[...] = part.reshape(array.shape)
        for array in statistics:
            array /= self._ranks.count
        return float(facts[0]), int(facts[1]) or None


def _memory(tensor: paddle.Tensor) -> np.ndarray:
    """The numbers of a tensor on the CPU, to be read and written in place."""
    memory = np.from_dlpack(tensor.detach())
    assert memory.flags.c_contiguous, "paddle keeps weights, gradients and statistics row by row"
    return memory
