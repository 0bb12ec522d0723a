"""The endless order of samples: a pure function of the seed, so that a position in the data is one number."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from ssld.errors import DataError
from ssld.seeds import generator


def epoch_order(shard_sizes: np.ndarray, seed: int, epoch: int, window: int | None = None) -> np.ndarray:
    """The order of one epoch: shards permuted, samples shuffled inside windows of `window` shards.

    shard_sizes: int64 [S], samples per shard; window: shards that are open at the same time, None for all.
    Returns int64 [N], a permutation of range(N); N is the sum of the sizes. Samples are numbered shard after shard.

    >>> sorted(epoch_order(np.array([3, 2]), seed=0, epoch=0, window=1).tolist())
    [0, 1, 2, 3, 4]
    """
    if window is not None and window < 1:
        raise ValueError(f"expected a window of at least 1 shard, got {window}")
    rng = generator("order", seed, epoch)
    shards = rng.permutation(len(shard_sizes))
    sizes = np.asarray(shard_sizes, np.int64)[shards]
    ends = np.cumsum(sizes)
    first = (np.cumsum(shard_sizes) - shard_sizes)[shards]
    order: np.ndarray = np.arange(sizes.sum(), dtype=np.int64) + np.repeat(first - (ends - sizes), sizes)
    borders = np.append(0, ends)[:: window or max(1, len(sizes))]
    for start, end in zip(borders, np.append(borders[1:], len(order)), strict=True):
        rng.shuffle(order[start:end])
    return order


class Order:
    """One endless order over a set of N samples: the n-th sample drawn belongs to epoch n // N.

    Every batch is full, also across the border of two epochs, and each epoch holds every sample exactly once.
    At most two epochs' permutations are kept, 8 bytes per sample each.
    """

    def __init__(self, shard_sizes: np.ndarray, seed: int, window: int | None = None) -> None:
        """Raises DataError where there is no sample."""
        self.samples = int(np.sum(shard_sizes))
        if self.samples < 1:
            raise DataError(f"expected at least one sample, got none in {len(shard_sizes)} shards")
        self._epoch = lru_cache(maxsize=2)(lambda epoch: epoch_order(shard_sizes, seed, epoch, window))

    def batch(self, step: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices, and the epoch that each belongs to; both int64 [batch_size]. A pure function of the step."""
        epochs, places = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64), self.samples)
        indices = np.empty(batch_size, np.int64)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            inside = epochs == epoch
            indices[inside] = self._epoch(epoch)[places[inside]]
        return indices, epochs
