from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssld.data.samples import Samples, concatenate, digest, same_classes, spread, virtual_shards
from ssld.errors import DataError, RecipeError


class Numbers:
    """A store whose sample is its own row number."""

    def key(self, row: int) -> str:
        return f"key-{row}"

    def where(self, row: int) -> str:
        return f"place {row}"

    def read(self, row: int) -> bytes:
        return b"%d" % row

    def stamp(self, rows: np.ndarray) -> str:
        return f"rows {rows.tolist()}"


def numbers(
    labels: list[int] | None, *, count: int = 0, shards: list[int] | None = None, classes: tuple[str, ...] | None = None
) -> Samples:
    count = count if labels is None else len(labels)
    sizes = np.array(shards or [count])
    marks = None if labels is None else np.array(labels)
    return Samples("set", classes, digest(labels, count), sizes, marks, Numbers(), np.arange(count))


def read_all(samples: Samples) -> list[int]:
    return [int(bytes(samples.read(i))) for i in range(len(samples))]


def test_a_subset_in_order_keeps_its_shards_and_drops_empty_ones() -> None:
    chosen = numbers([0, 1, 0, 1, 0, 1], shards=[2, 1, 3]).subset(np.array([1, 3, 5]))
    assert read_all(chosen) == [1, 3, 5]
    assert chosen.shard_sizes.tolist() == [1, 2]
    assert chosen.labels is not None
    assert chosen.labels.tolist() == [1, 1, 1]
    assert (chosen.key(1), chosen.where(1)) == ("key-3", "place 3")


def test_a_subset_out_of_order_keeps_the_order_given() -> None:
    chosen = numbers(None, count=2500, shards=[1500, 1000]).subset(np.arange(2500)[::-1])
    assert read_all(chosen)[:2] == [2499, 2498]
    assert chosen.shard_sizes.tolist() == [1000, 1000, 500]


def test_the_identity_mixes_the_choice() -> None:
    samples = numbers([0, 1, 2])
    identities = {samples.identity, *(samples.subset(np.array(rows)).identity for rows in ([0, 1], [1, 0], [0, 1, 2]))}
    assert len(identities) == 4
    assert samples.subset(np.array([0, 1])).identity == samples.subset(np.array([0, 1])).identity


@pytest.mark.parametrize(("rows", "fault"), [([3], IndexError), ([-1], IndexError), ([1, 1], ValueError)])
def test_a_subset_refuses_positions_outside_and_repeated(rows: list[int], fault: type[Exception]) -> None:
    with pytest.raises(fault):
        numbers([0, 1, 2]).subset(np.array(rows))


def test_samples_cannot_be_changed() -> None:
    samples = numbers([0, 1])
    assert samples.labels is not None
    with pytest.raises(ValueError, match="read-only"):
        samples.labels[0] = 1


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(1, 70))
def test_a_limit_goes_round_the_classes_and_holds_smaller_limits(labels: list[int], count: int) -> None:
    chosen = read_all(numbers(labels).limited(count))
    assert len(chosen) == min(count, len(labels))
    assert chosen == sorted(set(chosen))
    taken = np.bincount(np.array(labels)[chosen], minlength=5)
    unfinished = taken[taken < np.bincount(labels, minlength=5)]
    # a class that has samples left was never passed over
    assert not unfinished.size or taken.max() - unfinished.min() <= 1
    assert set(read_all(numbers(labels).limited(max(count - 1, 1)))) <= set(chosen)


def test_a_limit_needs_no_labels_and_at_least_one_image() -> None:
    assert len(numbers(None, count=30).limited(7)) == 7
    with pytest.raises(RecipeError, match="at least 1"):
        numbers([0, 1]).limited(0)


@given(st.lists(st.integers(0, 3), min_size=10, max_size=80), st.floats(0.1, 0.9), st.integers(0, 5))
def test_a_split_parts_every_class_by_the_fraction(labels: list[int], fraction: float, seed: int) -> None:
    rest, held = numbers(labels).split(fraction, seed)
    assert sorted(read_all(rest) + read_all(held)) == list(range(len(labels)))
    assert len(held) == round(fraction * len(labels))
    assert held.labels is not None
    share = len(held) / len(labels)
    for label, count in enumerate(np.bincount(labels)):
        assert abs(int((held.labels == label).sum()) - share * count) <= 1


def test_a_split_depends_on_its_seed_only() -> None:
    samples = numbers([0, 1] * 20)
    assert read_all(samples.split(0.3, 1)[1]) == read_all(samples.split(0.3, 1)[1])
    assert read_all(samples.split(0.3, 1)[1]) != read_all(samples.split(0.3, 2)[1])


@pytest.mark.parametrize("fraction", [0.0, 0.01, 1.0])
def test_a_split_leaves_images_on_both_sides(fraction: float) -> None:
    with pytest.raises(DataError, match="both sides"):
        numbers([0, 1] * 5).split(fraction, 0)


def test_concatenated_sets_read_through_and_keep_their_keys() -> None:
    both = concatenate([numbers([0, 1], shards=[1, 1]), numbers([1, 0, 1])])
    assert read_all(both) == [0, 1, 0, 1, 2]
    assert [both.key(i) for i in range(len(both))] == ["key-0", "key-1", "key-0", "key-1", "key-2"]
    assert both.where(4) == "place 2"
    assert both.shard_sizes.tolist() == [1, 1, 3]
    assert both.labels is not None
    assert both.labels.tolist() == [0, 1, 1, 0, 1]


def test_a_subset_of_a_concatenation_reads_the_right_part() -> None:
    both = concatenate([numbers([0, 1]), numbers([1, 0, 1])])
    assert read_all(both.subset(np.array([1, 4]))) == [1, 2]


def test_a_shard_is_known_by_what_it_holds_whatever_set_it_is_part_of() -> None:
    whole = numbers(None, count=9, shards=[2, 4, 3])
    assert whole.borders.tolist() == [0, 2, 6, 9]
    assert whole.shard_ids == ("rows [0, 1]", "rows [2, 3, 4, 5]", "rows [6, 7, 8]")
    other = numbers([0, 1], shards=[2])
    assert concatenate([whole, other]).shard_ids == (*whole.shard_ids, *other.shard_ids)
    assert whole.subset(np.arange(2, 9)).shard_ids == whole.shard_ids[1:]
    assert whole.subset(np.array([0, 1, 2, 6, 7, 8])).shard_ids == ("rows [0, 1]", "rows [2]", "rows [6, 7, 8]")


def test_a_shard_of_a_subset_of_a_joined_set_is_known_too() -> None:
    both = concatenate([numbers(None, count=5, shards=[2, 3]), numbers(None, count=4, shards=[4])])
    part = both.subset(np.arange(2, 9))
    assert part.shard_ids == both.shard_ids[1:]
    again = concatenate([part, numbers(None, count=3)])
    assert again.shard_ids == (*both.shard_ids[1:], "rows [0, 1, 2]")


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.floats(0.01, 0.9))
def test_about_a_share_of_every_shard_is_held_out(sizes: list[int], share: float) -> None:
    samples = numbers(None, count=sum(sizes), shards=sizes)
    rest, held = samples.hold_out(share)
    assert sorted(read_all(rest) + read_all(held)) == list(range(sum(sizes)))
    assert read_all(held) == sorted(read_all(held))
    for start, stop in pairwise(samples.borders):
        count = sum(start <= row < stop for row in read_all(held))
        assert abs(count - share * (stop - start)) < 1


def test_of_many_small_shards_the_share_is_right_on_average() -> None:
    samples = numbers(None, count=3000, shards=[3] * 1000)
    held = len(samples.hold_out(0.1)[1])
    # 1000 draws of 0 or 1 with a probability of 0.3: five standard deviations
    assert abs(held - 300) < 5 * (1000 * 0.3 * 0.7) ** 0.5


def test_a_pool_that_grows_keeps_what_it_held_out() -> None:
    small, grown = (numbers(None, count=sum(sizes), shards=sizes) for sizes in ([50, 70], [50, 70, 90]))
    (rest, held), (more_rest, more_held) = small.hold_out(0.2), grown.hold_out(0.2)
    assert read_all(held) == [row for row in read_all(more_held) if row < 120]
    assert more_rest.shard_ids[:2] == rest.shard_ids
    assert read_all(small.hold_out(0.2)[1]) == read_all(held)


def test_labels_and_classes_of_a_mixture() -> None:
    mixed = concatenate([numbers(None, count=2), numbers([0, 1], classes=("cat", "dog"))])
    assert mixed.labels is None
    assert mixed.classes == ("cat", "dog")
    only = numbers([0, 1])
    assert concatenate([only]) is only


def test_concatenation_refuses_classes_that_differ() -> None:
    named = numbers([0, 1], classes=("cat", "dog"))
    with pytest.raises(DataError, match="other: expected the 2 classes of set"):
        concatenate([named, replace(named, name="other", classes=("cat", "cow"))])
    with pytest.raises(DataError, match=r"labels below 2.*got 2 at place 1"):
        concatenate([named, numbers([0, 2])])


@pytest.mark.parametrize(
    ("got", "parts"),
    [
        (("cat", "cow", "dog"), ["label 1", "expected 'dog', got 'cow'"]),
        (("cat", "dog"), ["3 classes of A, got 2", "label 2", "got no more classes"]),
        (("dog", "cat", "owl"), ["label 0", "same names in another order"]),
    ],
)
def test_classes_that_differ_are_told_by_the_first_difference(got: tuple[str, ...], parts: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        same_classes(("cat", "dog", "owl"), got, "A", "B")
    assert all(part in str(caught.value) for part in parts)
    assert ("another order" in str(caught.value)) == (sorted(got) == ["cat", "dog", "owl"])


def test_equal_classes_pass() -> None:
    same_classes(("cat",), ("cat",), "A", "B")


@pytest.mark.parametrize(("count", "sizes"), [(0, []), (1, [1]), (1000, [1000]), (2001, [1000, 1000, 1])])
def test_virtual_shards(count: int, sizes: list[int]) -> None:
    assert virtual_shards(count).tolist() == sizes


def test_spread_is_a_permutation_whose_prefixes_are_balanced() -> None:
    labels = np.repeat([0, 1, 2], [50, 30, 40])
    order = spread(labels, "test")
    assert sorted(order.tolist()) == list(range(120))
    for stop in range(1, 91):
        counts = np.bincount(labels[order[:stop]], minlength=3)
        assert counts.max() - counts.min() <= 1
    assert order.tolist() != spread(labels, "other").tolist()


def test_a_digest_tells_parts_types_and_shapes_apart() -> None:
    variants = [
        ("ab",),
        ("a", "b"),
        (b"ab",),
        (1,),
        ("1",),
        (None,),
        (np.zeros(2),),
        (np.zeros((1, 2)),),
        (np.zeros(2, "f4"),),
    ]
    assert len({digest(*variant) for variant in variants}) == len(variants)
