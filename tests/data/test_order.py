"""The order of samples: every sample once per epoch, every batch full, and one number to resume by."""

from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssld.data.order import Order, epoch_order
from ssld.errors import DataError

sizes = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any).map(lambda value: np.array(value, np.int64))
windows = st.none() | st.integers(1, 15)


def stream(order: Order, batch_size: int, start: int, steps: int) -> list[tuple[int, int]]:
    """(index, epoch) of each sample drawn in these steps."""
    batches = (order.batch(step, batch_size) for step in range(start, start + steps))
    return [pair for indices, epochs in batches for pair in zip(indices.tolist(), epochs.tolist(), strict=True)]


@given(sizes, st.integers(0, 5), st.integers(0, 5), windows)
def test_an_epoch_holds_every_sample_once(shards: np.ndarray, seed: int, epoch: int, window: int | None) -> None:
    order = epoch_order(shards, seed, epoch, window)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(shards.sum()))


@given(sizes, st.integers(0, 5), st.integers(1, 15))
def test_no_more_shards_than_the_window_are_open_at_once(shards: np.ndarray, seed: int, window: int) -> None:
    shard_of = np.repeat(np.arange(len(shards)), shards)
    visited = shard_of[epoch_order(shards, seed, 0, window)].tolist()
    first = {shard: visited.index(shard) for shard in visited}
    last = {shard: place for place, shard in enumerate(visited)}
    for place in range(len(visited)):
        assert sum(first[shard] <= place <= last[shard] for shard in first) <= window


def test_a_window_mixes_its_shards_and_shards_change_places() -> None:
    shards = np.full(8, 50)
    orders = [epoch_order(shards, 0, epoch, window=2) // 50 for epoch in range(4)]
    assert all(len(set(order[:100].tolist())) == 2 and len(set(order[:20].tolist())) == 2 for order in orders)
    assert len({tuple(sorted(set(order[:100].tolist()))) for order in orders}) > 1


def test_every_place_is_equally_likely() -> None:
    places = np.zeros((6, 6))
    for seed in range(600):
        places[np.arange(6), epoch_order(np.array([2, 4]), seed, 0)] += 1
    # 600 draws, expected 100 each; 5 standard deviations of the binomial.
    assert np.abs(places - 100).max() < 5 * np.sqrt(600 * (1 / 6) * (5 / 6))


@given(sizes, st.integers(1, 40), st.integers(0, 6), windows)
def test_any_start_gives_the_same_continuation(
    shards: np.ndarray, batch_size: int, start: int, window: int | None
) -> None:
    whole = stream(Order(shards, 0, window), batch_size, 0, 8)
    assert stream(Order(shards, 0, window), batch_size, start, 8 - start) == whole[start * batch_size :]


@given(sizes, st.integers(1, 40))
def test_batches_are_full_and_epochs_follow_one_another(shards: np.ndarray, batch_size: int) -> None:
    total = int(shards.sum())
    drawn = stream(Order(shards, 3), batch_size, 0, -(-3 * total // batch_size))[: 3 * total]
    assert [epoch for _, epoch in drawn] == [n // total for n in range(3 * total)]
    for epoch in range(3):
        indices = iter(index for index, of in drawn if of == epoch)
        assert list(islice(indices, total)) == epoch_order(shards, 3, epoch).tolist()


def test_epochs_and_seeds_differ() -> None:
    shards = np.array([20, 20])
    orders = {tuple(epoch_order(shards, seed, epoch).tolist()) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_the_size_of_the_batch_does_not_change_the_order() -> None:
    order = Order(np.array([7, 6]), 0)
    assert stream(order, 3, 0, 20) == stream(order, 5, 0, 12)


def test_nothing_to_draw_from_and_an_empty_window_are_errors() -> None:
    with pytest.raises(DataError, match="at least one sample"):
        Order(np.array([0, 0]), 0)
    with pytest.raises(ValueError, match="at least 1 shard, got 0"):
        epoch_order(np.array([3]), 0, 0, window=0)
