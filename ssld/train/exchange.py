"""What the ranks of a stage tell each other in a step: one sum, after which each goes on with the same numbers."""

from __future__ import annotations

import hashlib

import numpy as np
import paddle
from paddle import nn
from paddle.nn.layer.norm import _BatchNormBase

from ssld.contracts import Ranks
from ssld.errors import RankError
from ssld.train.ranks import WORD


class Exchange:
    """Sums the gradients of a network over ranks, and takes the mean of the batch statistics that each has collected.

    A batch norm normalizes by the statistics of its own rank's images. What it keeps for test time is averaged in
    every step, so that all ranks, and with them every checkpoint, always hold the same network; the variance is the
    mean of the ranks' own, without what their means differ by. Of anything else that a layer keeps, rank 0's counts.
    """

    def __init__(self, network: nn.Layer, ranks: Ranks) -> None:
        """Raises RankError unless all ranks begin with the same weights."""
        self._ranks = ranks
        self._weights = [weight for weight in network.parameters() if not weight.stop_gradient]
        kinds = (_BatchNormBase, nn.BatchNorm)
        self._norms = [layer for layer in network.sublayers(include_self=True) if isinstance(layer, kinds)]
        self._rows: np.ndarray | None = None
        if ranks.meeting and not ranks.meeting.agree(_mark(network)):
            raise RankError(
                f"expected the same first weights on all {ranks.count} ranks, got different ones; draw them by paddle "
                f"alone, whose seed is set before a network is built"
            )

    def __call__(self, loss: float, stop: int | None) -> tuple[float, int | None]:
        """To be called after `backward`, with this rank's share of the loss and the signal that rank 0 may have met.

        Returns the sum of the losses, and the signal. Raises RankError when another rank is gone.
        """
        if self._ranks.meeting is None:
            return loss, stop
        there = np.array([weight.grad is not None for weight in self._weights], np.float32)
        gradients = [
            np.zeros(weight.shape, np.float32) if weight.grad is None else _memory(weight.grad)
            for weight in self._weights
        ]
        # the others do not change, and a mean of three equal numbers may not be equal to them
        learning = [layer for layer in self._norms if layer.training]
        statistics = [_memory(tensor) for layer in learning for tensor in (layer._mean, layer._variance)]
        facts = np.array([loss, stop or 0], np.float32)
        self._add_up([*gradients, *statistics, there, facts])
        for weight, gradient, ranks in zip(self._weights, gradients, there, strict=True):
            # a weight that no rank has used stays without: the optimizer leaves it alone
            if ranks and weight.grad is None:
                weight.grad = paddle.to_tensor(gradient)
        for array in statistics:
            array /= self._ranks.count
        return float(facts[0]), int(facts[1]) or None

    def _add_up(self, arrays: list[np.ndarray]) -> None:
        """Replace each array by its sum over all ranks, in their order: the same bits on each."""
        number, count, meeting = self._ranks.number, self._ranks.count, self._ranks.meeting
        assert meeting is not None, "there is more than one rank"
        ends = np.cumsum([array.size for array in arrays])
        size = int(ends[-1])
        if self._rows is None or self._rows.shape[1] != size:
            self._rows = meeting.share(count + 1, size)
        own, total = self._rows[number], self._rows[count]
        for part, array in zip(np.split(own, ends[:-1]), arrays, strict=True):
            part[:] = array.ravel()
        meeting.agree()
        # each rank adds up a part of all
        mine = self._ranks.part(size)
        np.add(self._rows[0, mine], self._rows[1, mine], out=total[mine])
        for other in self._rows[2:count, mine]:
            total[mine] += other
        meeting.agree()
        for part, array in zip(np.split(total, ends[:-1]), arrays, strict=True):
            array[...] = part.reshape(array.shape)


def _mark(network: nn.Layer) -> bytes:
    """A hash of all weights."""
    found = hashlib.blake2b(digest_size=WORD)
    for tensor in network.state_dict().values():
        found.update(tensor.numpy().tobytes())
    return found.digest()


def _memory(tensor: paddle.Tensor) -> np.ndarray:
    """The numbers of a tensor on the CPU, to be read and written in place."""
    memory = np.from_dlpack(tensor.detach())
    assert memory.flags.c_contiguous, "paddle keeps weights, gradients and statistics row by row"
    return memory
