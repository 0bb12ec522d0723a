"""Soft labels through the format, against dense reckoning in float64; and damage of every bit of a file."""

from __future__ import annotations

import doctest
import json
import mmap
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from ssld.errors import LabelError
from ssld.labels import format
from ssld.labels.format import Packed, damaged, decode, encode, pack, unpack

WHERE = Path("store/shard-7.safetensors")
HEADER = {"teacher": {"name": "größer\n", "sha256": "ab" * 32}, "views": 3, "temperature": 1.5, "classes": None}
HALF_A_STEP = 0.5 / 255
LOGITS = st.floats(-60, 60, width=32)


def drawn(count: int, classes: int, seed: int = 0, spread: float = 3.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, spread, (count, classes)).astype(np.float32)


def by_the_book(row: np.ndarray, top_k: int, temperature: float) -> tuple[list[int], list[float], float]:
    """Classes, their log-probabilities and the log of the rest: one row in float64, a class at a time."""
    scaled = [float(value) / temperature for value in row]
    largest = max(scaled)
    total = largest + float(np.log(sum(np.exp(np.float64(value - largest)) for value in scaled)))
    order = sorted(range(len(row)), key=lambda index: (-float(row[index]), index))
    cut = [scaled[index] - total for index in order[top_k:]]
    rest = float(np.logaddexp.reduce(np.array(cut, np.float64))) if cut else -np.inf
    return order[:top_k], [scaled[index] - total for index in order[:top_k]], rest


def unpacked_ids(packed: Packed, classes: int, top_k: int) -> list[list[int]]:
    """The ids of [B, bytes], read as the digits of one long binary number."""
    width = max(1, len(f"{classes - 1:b}")) if classes > 1 else 1
    rows = []
    for row in packed.ids:
        digits = "".join(f"{byte:08b}" for byte in row)
        assert set(digits[top_k * width :]) <= {"0"}
        rows.append([int(digits[i * width : (i + 1) * width], 2) for i in range(top_k)])
    return rows


def most_lost(logs: np.ndarray, rest: float) -> float:
    """Upper bound of KL(exact || stored): half of the mean square of the errors of log p, each as large as can be.

    With x = -log p, half a step h of sqrt(x / L) is 2 * sqrt(x * L) * h + L * h**2 of x; a float16 is off by x / 2**11.
    A fifth more is for the terms of higher order; beyond the limit of the codes the classes have no mass.
    """
    x = np.minimum(-logs, format.LIMIT)
    errors = 2 * np.sqrt(x.clip(0) * format.LIMIT) * HALF_A_STEP + format.LIMIT * HALF_A_STEP**2
    of_rest = np.exp(rest) * (rest / 2**11) ** 2 if np.isfinite(rest) else 0.0
    return float(1.2 * (np.sum(np.exp(logs) * errors**2) + of_rest) / 2 + 1e-6)


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, int, float]:
    """Logits of up to 40 classes, often with ties; top_k; temperature."""
    classes = draw(st.integers(1, 40))
    elements = draw(st.sampled_from([LOGITS, st.sampled_from([-1.0, -0.0, 0.0, 2.0])]))
    logits = draw(arrays.arrays(np.float32, (draw(st.integers(0, 4)), classes), elements=elements))
    return logits, draw(st.integers(1, classes)), draw(st.sampled_from([0.5, 1.0, 4.0]))


@settings(deadline=None)
@given(cases())
def test_pack_keeps_the_most_probable_classes_and_the_mass_of_the_others(case: tuple[np.ndarray, int, float]) -> None:
    logits, top_k, temperature = case
    packed = pack(logits, top_k, temperature)
    found = unpacked_ids(packed, logits.shape[1], top_k)
    for row, ids, codes, rest in zip(logits, found, packed.codes, packed.rest, strict=True):
        wanted_ids, wanted_logs, wanted_rest = by_the_book(row, top_k, temperature)
        assert ids == wanted_ids
        roots = np.sqrt(np.minimum(-np.array(wanted_logs), format.LIMIT).clip(0) / format.LIMIT)
        assert np.abs(codes / 255 - roots).max() <= HALF_A_STEP + 1e-5
        if top_k == len(row):
            assert rest == -np.inf
        else:
            # the first log-probability is that of the largest logit, beside which a float32 can hold no less
            least = np.log(np.finfo(np.float32).tiny) + wanted_logs[0]
            assert float(rest) == pytest.approx(max(wanted_rest, least), rel=1e-3, abs=1e-5)
            assert -105 < rest <= 0


@settings(deadline=None)
@given(cases())
def test_unpack_gives_back_distributions_near_those_that_were_packed(case: tuple[np.ndarray, int, float]) -> None:
    logits, top_k, temperature = case
    classes = logits.shape[1]
    soft = unpack(pack(logits, top_k, temperature), classes, top_k, temperature)
    assert soft.temperature == temperature
    assert soft.logits.dtype == np.float32
    assert np.isfinite(soft.logits).all()
    stored = soft.logits.astype(np.float64) / temperature
    assert np.abs(np.exp(stored).sum(axis=1) - 1).max(initial=0) < 1e-4
    for index, row in enumerate(logits):
        ids, logs, rest = by_the_book(row, top_k, temperature)
        if top_k == classes:
            assert soft.ids is None
            exact, got = np.array(logs), stored[index][ids]
        else:
            assert soft.ids is not None
            assert soft.ids.dtype == np.int64
            assert soft.ids[index].tolist() == ids
            exact, got = np.array([*logs, rest]), stored[index]
        assert -1e-6 < np.sum(np.exp(exact) * (exact - got)) < most_lost(np.array(logs), rest)


@pytest.mark.parametrize("spread", [0.5, 3.0, 8.0], ids=["flat", "medium", "peaked"])
@pytest.mark.parametrize("top_k", [1, 10, 20])
def test_quantizing_loses_what_its_steps_explain(spread: float, top_k: int) -> None:
    logits = drawn(300, 200, spread=spread)
    soft = unpack(pack(logits, top_k), 200, top_k)
    for row, stored in zip(logits, soft.logits, strict=True):
        _, top, rest = by_the_book(row, top_k, 1.0)
        exact = np.array([*top, rest])
        assert -1e-6 < np.sum(np.exp(exact) * (exact - stored)) < most_lost(np.array(top), rest) < 1e-3


@pytest.mark.parametrize(
    ("classes", "top_k"), [(1, 1), (2, 1), (2, 2), (3, 2), (10, 10), (256, 5), (257, 5), (1000, 10), (65_536, 3)]
)
def test_ids_of_any_width_come_back(classes: int, top_k: int) -> None:
    logits = drawn(5, classes)
    logits[0, -1] = 90
    packed = pack(logits, top_k)
    assert packed.ids.shape == (5, -(-top_k * max(1, int(np.ceil(np.log2(classes)))) // 8))
    soft = unpack(packed, classes, top_k)
    wanted = np.argsort(-logits.astype(np.float64), axis=1, kind="stable")[:, :top_k]
    got = soft.ids if soft.ids is not None else np.argsort(-soft.logits, axis=1, kind="stable")
    assert got[0, 0] == classes - 1
    if top_k < classes:
        assert np.array_equal(got, wanted)
    else:
        assert np.array_equal(unpacked_ids(packed, classes, top_k), wanted)


def test_ties_go_to_the_smaller_class_wherever_the_cut_is() -> None:
    row = np.zeros(50, np.float32)
    row[[7, 30]] = 1
    row[[9]] = -0.0
    for top_k, wanted in ((1, [7]), (2, [7, 30]), (4, [7, 30, 0, 1]), (12, [7, 30, *range(7), 8, 9, 10])):
        assert unpack(pack(row[None], top_k), 50, top_k).ids.tolist() == [wanted]
    everything = [7, 30, *range(7), 8, 9, *range(10, 30), *range(31, 50)]
    assert unpacked_ids(pack(row[None], 50), 50, 50) == [everything]


@pytest.mark.parametrize("classes", [3, 40, 65_536])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 20.0])
def test_the_most_probable_class_stays_so_beside_others_of_the_same_code(classes: int, temperature: float) -> None:
    row = np.zeros(classes, np.float32)
    row[2] = 1e-6
    for top_k in {2, 3, min(classes, 40)}:
        packed = pack(row, top_k, temperature)
        assert len(set(packed.codes.tolist())) == 1
        soft = unpack(packed, classes, top_k, temperature)
        named = soft.logits if soft.ids is None else soft.logits[:-1]
        first = named.argmax() if soft.ids is None else soft.ids[named.argmax()]
        assert first == 2
        assert (named == named.max()).sum() == 1


def test_logits_decide_ties_even_where_the_temperature_makes_them_equal() -> None:
    row = np.float32([1.0, np.nextafter(np.float32(1), np.float32(2)), 0.0])
    assert unpack(pack(row[None], 2, 1e6), 3, 2, 1e6).ids.tolist() == [[1, 0]]


@pytest.mark.parametrize("temperature", [1e-6, 1.0, 1e6])
def test_logits_of_any_finite_size_give_finite_labels(temperature: float) -> None:
    largest = np.finfo(np.float32).max
    rows = np.float32([[largest, -largest, 0, 1], [0, -largest, -largest, -largest], [1e-45, 0, 0, 0]])
    packed = pack(rows, 2, temperature)
    assert np.isfinite(packed.rest).all()
    assert np.isfinite(unpack(packed, 4, 2, temperature).logits).all()


def test_a_small_rest_is_not_lost_beside_a_probable_class() -> None:
    row = np.zeros((1, 1000), np.float32)
    row[0, 3] = 30
    packed = pack(row, 1)
    assert float(packed.rest[0]) == pytest.approx(np.log(999) - 30, rel=1e-3)


def test_a_row_is_packed_alike_alone_and_among_others_and_in_any_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = drawn(30, 77).reshape(5, 6, 77)
    whole = pack(logits, 10, 2.0)
    assert whole.codes.shape == (5, 6, 10)
    assert whole.rest.shape == (5, 6)
    monkeypatch.setattr(format, "_BLOCK", 200)
    assert encode({}, pack(logits, 10, 2.0)) == encode({}, whole)
    for index in np.ndindex(5, 6):
        alone = pack(logits[index], 10, 2.0)
        assert encode({}, alone) == encode({}, whole[index])


def test_memory_of_packing_does_not_grow_with_the_rows() -> None:
    peaks = []
    for rows in (4000, 8000):
        logits = np.zeros((rows, 1000), np.float32) + drawn(1, 1000)
        tracemalloc.start()
        pack(logits, 10)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0] < logits.nbytes


def test_an_index_picks_samples_and_views() -> None:
    logits = drawn(12, 30).reshape(4, 3, 30)
    samples, views = np.array([3, 0, 3]), np.array([1, 2, 0])
    picked = unpack(pack(logits, 5)[samples, views], 30, 5)
    alone = unpack(pack(logits[samples, views], 5), 30, 5)
    assert np.array_equal(picked.logits, alone.logits)
    assert np.array_equal(picked.ids, alone.ids)


@pytest.mark.parametrize(("classes", "top_k"), [(1000, 10), (10, 10)])
def test_a_damaged_sample_has_a_rest_of_nan_and_comes_back_as_nan(classes: int, top_k: int) -> None:
    packed = damaged((2, 3), classes, top_k)
    like = pack(drawn(6, classes).reshape(2, 3, classes), top_k)
    assert [array.shape for array in (packed.ids, packed.codes, packed.rest)] == [
        array.shape for array in (like.ids, like.codes, like.rest)
    ]
    assert np.isnan(packed.rest).all()
    assert not packed.ids.any()
    assert not packed.codes.any()
    assert np.isnan(unpack(packed[:, 0], classes, top_k).logits).all()
    assert not np.isnan(like.rest).any()
    _, again = decode(encode({}, packed), WHERE)
    assert np.isnan(again.rest).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_refused(bad: float) -> None:
    logits = drawn(3, 4)
    logits[1, 2] = bad
    with pytest.raises(ValueError, match="expected finite logits"):
        pack(logits, 2)


@pytest.mark.parametrize(
    ("top_k", "temperature", "message"),
    [(0, 1.0, "top_k from 1 to 4"), (5, 1.0, "top_k from 1 to 4"), (2, 0.0, "1e-6 to 1e6"), (2, np.nan, "1e-6 to 1e6")],
)
def test_what_cannot_be_packed_is_refused(top_k: int, temperature: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(drawn(3, 4), top_k, temperature)


def test_labels_are_not_unpacked_with_another_number_of_classes() -> None:
    packed = pack(drawn(3, 1000), 10)
    for classes, top_k in ((10, 10), (1000, 9), (21_841, 10)):
        with pytest.raises(ValueError, match=r"for each label, got \(13, 10\)"):
            unpack(packed, classes, top_k)


def test_arrays_that_do_not_belong_together_are_refused() -> None:
    packed = pack(drawn(3, 20), 4)
    for ids, codes, rest in (
        (packed.ids[:2], packed.codes, packed.rest),
        (packed.ids, packed.codes, packed.rest[:, None]),
        (packed.ids.astype(np.int64), packed.codes, packed.rest),
        (packed.ids, packed.codes, packed.rest.astype(np.float32)),
    ):
        with pytest.raises(ValueError, match=r"expected uint8 \[\.\.\., bytes\]"):
            Packed(ids, codes, rest)


def test_every_code_means_what_is_quantized_to_it_and_they_fall() -> None:
    codes = np.arange(256, dtype=np.uint8)
    logs = format.restore(codes)
    assert np.array_equal(format.quantize(logs), codes)
    assert (np.diff(logs) < 0).all()
    assert (logs[0], logs[-1]) == (0, -format.LIMIT)
    assert f"to {format.LIMIT} nats" in format.QUANTIZER


def test_the_example_in_the_docstring_is_true() -> None:
    assert doctest.testmod(format) == (0, 2)


# Files ---------------------------------------------------------------------------------------------------------------


def small() -> bytes:
    """A whole file of three samples in two views."""
    return encode(HEADER, pack(drawn(6, 20).reshape(3, 2, 20), 3))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(st.dictionaries(st.text(), JSON, max_size=4), cases())
def test_a_file_gives_back_header_and_arrays_and_the_same_bytes(
    header: dict[str, Any], case: tuple[np.ndarray, int, float]
) -> None:
    packed = pack(*case)
    data = encode(header, packed)
    found, again = decode(data, WHERE)
    assert found == header
    for name in ("ids", "codes", "rest"):
        one, other = getattr(packed, name), getattr(again, name)
        assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
    assert encode(found, again) == data


def test_a_label_of_a_single_sample_can_be_kept() -> None:
    packed = pack(drawn(1, 20)[0], 3)
    _, again = decode(encode({}, packed), WHERE)
    assert again.rest.shape == ()
    assert again.rest == packed.rest


def test_safetensors_reads_the_file(tmp_path: Path) -> None:
    path = tmp_path / "labels.safetensors"
    path.write_bytes(small())
    header, packed = decode(small(), path)
    with safetensors.safe_open(path, "numpy") as opened:
        assert sorted(opened.keys()) == ["codes", "ids", "rest"]
        assert json.loads(opened.metadata()["ssld"]) == header == HEADER
        assert len(opened.metadata()["sha256"]) == 64
        for name in opened.keys():  # noqa: SIM118 (it is not a mapping)
            assert np.array_equal(opened.get_tensor(name), getattr(packed, name))


def test_the_layout_is_that_of_safetensors_itself() -> None:
    data = small()
    theirs = safetensors.numpy.save(safetensors.numpy.load(data), header_of(data)["__metadata__"])
    assert header_of(theirs) == header_of(data)
    # only the order of the metadata may differ: theirs is random
    assert (len(theirs), theirs[:8]) == (len(data), data[:8])
    arrays_start = 8 + int.from_bytes(data[:8], "little")
    assert theirs[arrays_start:] == data[arrays_start:]


def header_of(data: bytes) -> dict[str, Any]:
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def test_equal_labels_give_equal_bytes_in_every_process() -> None:
    program = """
import hashlib, numpy as np
from ssld.labels.format import encode, pack
logits = np.arange(60, dtype=np.float32).reshape(3, 20) % 7
print(hashlib.sha256(encode({"b": 1, "a": [2]}, pack(logits, 3))).hexdigest())
"""
    said = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
            timeout=60,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(said) == 1


def test_the_order_of_the_keys_does_not_matter() -> None:
    packed = pack(drawn(3, 20), 3)
    assert encode({"a": 1, "b": {"c": 2, "d": 3}}, packed) == encode({"b": {"d": 3, "c": 2}, "a": 1}, packed)


def test_arrays_are_views_of_the_file_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "labels"
    path.write_bytes(small())
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    content = np.frombuffer(mapped, np.uint8)
    for data in (mapped, memoryview(mapped)):
        _, packed = decode(data, path)
        for array in (packed.ids, packed.codes, packed.rest):
            assert np.shares_memory(array, content)
            assert not array.flags.writeable
        assert packed.rest.flags.aligned
        assert np.isfinite(unpack(packed[:, 1], 20, 3).logits).all()


def test_every_flipped_bit_is_found() -> None:
    data = small()
    for position in range(len(data)):
        for bit in range(8):
            spoilt = bytearray(data)
            spoilt[position] ^= 1 << bit
            with pytest.raises(LabelError, match=r"store/shard-7\.safetensors is damaged: expected .*label again"):
                decode(bytes(spoilt), WHERE)


def test_a_file_cut_at_any_length_or_longer_is_found() -> None:
    data = small()
    for length in range(len(data)):
        with pytest.raises(LabelError, match="is damaged"):
            decode(data[:length], WHERE)
    for more in (b"\0", b"x" * 1000, data):
        with pytest.raises(LabelError, match=r"expected [\d,]+ bytes after the header"):
            decode(data + more, WHERE)


def forged(document: Any, body: bytes = b"") -> bytes:
    front = document if isinstance(document, bytes) else json.dumps(document).encode()
    return len(front).to_bytes(8, "little") + front + body


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(8),
        (2**63).to_bytes(8, "little") + b"{}",
        forged(b"[" * 200_000),
        forged(b"\xff\xfe"),
        forged(b"9" * 10_000),
        forged([]),
        forged({"__metadata__": []}),
        forged({"__metadata__": {"ssld": 1}}),
        forged({"__metadata__": {"ssld": "[]"}}),
        *(
            forged({"__metadata__": {"ssld": "{}"}, **{name: {"shape": shape} for name in ("rest", "codes", "ids")}})
            for shape in ([0, 10**30], [2**63, 0], [-1, 0], ["0"], {}, 0, None, [0.0], [True, 0], "", [[0]])
        ),
    ],
)
def test_a_hostile_file_is_refused_by_name(data: bytes) -> None:
    with pytest.raises(LabelError, match=r"shard-7\.safetensors is damaged"):
        decode(data, WHERE)


def test_a_header_that_announces_much_is_refused_before_it_is_read() -> None:
    data = (format.HEADER_LIMIT - 7).to_bytes(8, "little") + bytes(100)
    with pytest.raises(LabelError, match="a header of at most 1,048,576 bytes, got one that announces 1,048,569 bytes"):
        decode(data, WHERE)


def test_the_longest_header_that_is_written_can_be_read() -> None:
    none = damaged((0,), 20, 3)
    room = format.HEADER_LIMIT - len(encode({"a": ""}, none).rstrip())
    header = {"a": "x" * room}
    data = encode(header, none)
    assert len(data) == format.HEADER_LIMIT
    assert decode(data, WHERE)[0] == header
    with pytest.raises(ValueError, match="expected a header of at most 1,048,576 bytes"):
        encode({"a": "x" * (room + 1)}, none)


def test_a_whole_file_whose_header_is_no_object_is_refused() -> None:
    with pytest.raises(LabelError, match="is damaged"):
        decode(encode([1], damaged((2,), 20, 3)), WHERE)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [np.nan, np.inf, {1, 2}, np.float32(1)])
def test_a_header_that_is_not_json_is_refused(value: object) -> None:
    with pytest.raises((ValueError, TypeError)):
        encode({"a": value}, pack(drawn(3, 20), 3))
