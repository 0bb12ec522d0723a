"""What tensors a network has, without drawing its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import paddle

from ssld.contracts import Arrays
from ssld.train import networks

USUAL = 1000
"""The classes of published weights."""


@dataclass(frozen=True)
class Outline:
    """The shape of each weight and batch-norm statistic of a network, by name.

    head: the name of its classifier; count: of its classes.
    """

    shapes: Mapping[str, tuple[int, ...]]
    head: str
    count: int

    def classes(self, weights: Arrays) -> int:
        """How many classes the weights of such a network are for; the usual number where they have no classifier."""
        found = [weights[key] for key in (f"{self.head}.bias", f"{self.head}.weight") if key in weights]
        return found[0].shape[-1] if found and found[0].ndim else USUAL


def outline(name: str, classes: int = USUAL) -> Outline:
    """The outline of a network of that name. Raises like `networks.build`."""
    # nothing is allocated, however large the network
    with paddle.LazyGuard():
        network = networks.build(name, {}, classes)
    return Outline({key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}, network.head, classes)
