"""Checkpoints with damage of any byte, and which one a run goes on from; faults of the disk are in tests/faults."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from ssld import checkpoint
from ssld.errors import CheckpointError

STEP = 7
DIRECTORY = "step-00000007"


def content(value: float) -> dict[str, Any]:
    """A small checkpoint in which every file depends on the value."""
    return {
        "tensors": {
            "student": {"fc.weight": np.full((2, 3), value, np.float32), "bn._mean": np.float32(value).reshape(())},
            "optimizer": {"fc.weight.velocity": np.full(3, -value)},
        },
        "state": {"loss": value, "position": [1, 2]},
    }


OLDER, OLD, NEW = content(1.0), content(2.0), content(3.0)


def same(found: checkpoint.Checkpoint, wanted: dict[str, Any]) -> bool:
    groups = [(found.tensors(name), group) for name, group in wanted["tensors"].items()]
    return found.state == wanted["state"] and all(
        a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in b) for a, b in groups
    )


def newest(root: Path) -> checkpoint.Checkpoint:
    found = checkpoint.latest(root, pytest.fail)
    assert found is not None
    return found


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("file", ["student.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_every_changed_byte_every_cut_and_a_missing_file_are_noticed(tmp_path: Path, file: str) -> None:
    saved = checkpoint.save(tmp_path, STEP, **OLD)
    path = saved.path / file
    whole = path.read_bytes()
    flips = (whole[:i] + bytes([byte ^ (1 << i % 8)]) + whole[i + 1 :] for i, byte in enumerate(whole))
    cuts = (whole[:i] for i in range(0, len(whole), 7))
    for damaged in itertools.chain(flips, cuts, [whole + b"\n"]):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=file):
            checkpoint.load(saved.path)
    path.unlink()
    with pytest.raises(CheckpointError, match=f"expected .*{file}, found no such file"):
        checkpoint.load(saved.path)


def test_damage_after_opening_is_noticed_when_the_tensors_are_read(tmp_path: Path) -> None:
    found = checkpoint.save(tmp_path, STEP, **OLD)
    path = found.path / "student.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(CheckpointError, match=r"student.safetensors is damaged: expected \d+ bytes with sha256"):
        found.tensors("student")
    assert found.tensors("optimizer")


ARRAYS = [
    *(np.arange(6).reshape(2, 3).astype(kind) for kind in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u8", "?")),
    np.arange(6.0).reshape(2, 3).T,
    np.arange(12.0)[::3],
    np.arange(3, dtype=">f4"),
    np.float32(1.5).reshape(()),
    np.empty((0, 3), np.float32),
    np.array([np.nan, np.inf, -0.0, 1e-45], np.float32),
    np.array([1 + 2j], np.complex64),
]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: f"{array.dtype.str}{array.shape}{array.strides}")
def test_arrays_come_back_bit_for_bit(tmp_path: Path, array: np.ndarray) -> None:
    found = checkpoint.save(tmp_path, 0, {"student": {"x": array}}, {}).tensors("student")["x"]
    assert found.shape == array.shape
    assert found.dtype == array.dtype.newbyteorder("=")
    assert found.tobytes() == array.astype(found.dtype).tobytes()


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    backward = {
        "tensors": {name: dict(reversed(group.items())) for name, group in reversed(OLD["tensors"].items())},
        "state": dict(reversed(OLD["state"].items())),
    }
    one, two = checkpoint.save(tmp_path / "one", STEP, **OLD), checkpoint.save(tmp_path / "two", STEP, **backward)
    assert names(one.path) == names(two.path)
    assert all((one.path / name).read_bytes() == (two.path / name).read_bytes() for name in names(one.path))


def test_a_group_may_be_empty_and_one_that_is_not_there_is_named(tmp_path: Path) -> None:
    saved = checkpoint.save(tmp_path, STEP, {"student": {}, "optimizer": {}}, {})
    assert saved.tensors("optimizer") == {}
    with pytest.raises(CheckpointError, match=r"expected ema.safetensors .*student.safetensors"):
        saved.tensors("ema")


def test_save_answers_what_load_finds(tmp_path: Path) -> None:
    state = {"tuple": (1, 2), "nested": {"b": 0.1 + 0.2, "a": None}}
    saved = checkpoint.save(tmp_path, 123_456_789, {"student": {}}, state)
    assert saved == checkpoint.load(saved.path)
    assert saved.path.name == "step-123456789"
    assert saved.state == {"tuple": [1, 2], "nested": {"a": None, "b": 0.1 + 0.2}}


@pytest.mark.parametrize("state", [{"loss": float("nan")}, {"loss": np.float32(1)}, {"path": Path()}])
def test_a_state_that_is_not_json_is_refused_before_anything_is_written(tmp_path: Path, state: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        checkpoint.save(tmp_path / "root", STEP, {}, state)
    assert not (tmp_path / "root").exists()


def test_a_type_that_cannot_be_stored_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="tensors of numbers in student"):
        checkpoint.save(tmp_path, STEP, {"student": {"x": np.array(["text"])}}, {})


def test_a_newer_format_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as newer:
        newer.setattr(checkpoint, "FORMAT", checkpoint.FORMAT + 1)
        saved = checkpoint.save(tmp_path, STEP, **OLD)
    with pytest.raises(CheckpointError, match=f"expected format {checkpoint.FORMAT}, got {checkpoint.FORMAT + 1}"):
        checkpoint.load(saved.path)


def test_latest_falls_back_and_says_so(tmp_path: Path) -> None:
    for step, what in ((5, OLDER), (900, OLD), (1000, NEW)):
        checkpoint.save(tmp_path, step, **what)
    assert newest(tmp_path).step == 1000
    (tmp_path / "step-00001000" / "manifest.json").unlink()
    reports: list[str] = []
    found = checkpoint.latest(tmp_path, reports.append)
    assert found is not None
    assert (found.step, same(found, OLD)) == (900, True)
    assert len(reports) == 1
    assert "step 1,000" in reports[0]
    assert "manifest.json" in reports[0]


def test_what_a_newer_version_wrote_is_neither_damaged_nor_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(tmp_path, STEP, **OLD)
    with monkeypatch.context() as newer:
        newer.setattr(checkpoint, "FORMAT", checkpoint.FORMAT + 1)
        checkpoint.save(tmp_path, STEP + 1, **NEW)
    with pytest.raises(CheckpointError, match=r"step-00000008.*use the version of ssld that wrote it"):
        checkpoint.latest(tmp_path, pytest.fail)


def test_another_file_in_a_checkpoint_is_no_damage(tmp_path: Path) -> None:
    (checkpoint.save(tmp_path, STEP, **OLD).path / "notes.txt").write_text("mine")
    assert same(newest(tmp_path), OLD)


def test_latest_goes_by_number_not_by_time(tmp_path: Path) -> None:
    for step in (100_000_000, 99_999_999, 3):
        checkpoint.save(tmp_path, step, **OLD)
    os.utime(tmp_path / "step-100000000", (0, 0))
    assert newest(tmp_path).step == 100_000_000


def test_latest_stops_when_all_are_damaged_and_is_none_when_there_is_none(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "nowhere", pytest.fail) is None
    assert checkpoint.latest(tmp_path, pytest.fail) is None
    for step in (1, 2):
        (checkpoint.save(tmp_path, step, **OLD).path / "state.json").write_bytes(b"")
    reports: list[str] = []
    with pytest.raises(CheckpointError, match=r"2 that are all damaged \(step 1, 2\)"):
        checkpoint.latest(tmp_path, reports.append)
    assert len(reports) == 2


def test_steps_and_retain(tmp_path: Path) -> None:
    for step in (30, 4, 200):
        checkpoint.save(tmp_path, step, **OLD)
    (tmp_path / "step-00000009").write_bytes(b"a file")
    (tmp_path / ".tmp-step-00000010-aa").mkdir()
    (tmp_path / "step-final").mkdir()
    assert checkpoint.steps(tmp_path) == [4, 30, 200]
    checkpoint.retain(tmp_path, {200, 4, 999})
    assert checkpoint.steps(tmp_path) == [4, 200]
    checkpoint.retain(tmp_path, [])
    assert names(tmp_path) == [".tmp-step-00000010-aa", "step-00000009", "step-final"]


def test_point_links_relatively_so_that_a_run_can_be_moved(tmp_path: Path) -> None:
    for step, what in ((1, OLD), (2, NEW)):
        checkpoint.save(tmp_path / "run", step, **what)
        checkpoint.point(tmp_path / "run", "best", step)
    assert checkpoint.steps(tmp_path / "run") == [1, 2]
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    assert same(checkpoint.load(moved / "best"), NEW)


def test_a_link_leads_to_a_checkpoint_that_waits_for_its_name(tmp_path: Path) -> None:
    saved = checkpoint.save(tmp_path, STEP, **NEW)
    checkpoint.point(tmp_path, "best", STEP)
    saved.path.rename(tmp_path / f".new-{DIRECTORY}")
    assert same(checkpoint.load(tmp_path / "best"), NEW)


def test_weights_are_read_from_a_file_a_checkpoint_a_link_and_a_stage(tmp_path: Path) -> None:
    root = tmp_path / "stage"
    saved = checkpoint.save(root, STEP, **OLD)
    checkpoint.save(root, STEP + 1, **NEW)
    checkpoint.point(root, "best", STEP)
    assert checkpoint.read_weights(root)["bn._mean"] == 3.0
    for path in (saved.path, root / "best", saved.path / "student.safetensors"):
        assert checkpoint.read_weights(path)["bn._mean"] == 2.0


def test_a_stage_with_a_damaged_newest_checkpoint_gives_no_older_weights(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, STEP, **OLD)
    (checkpoint.save(tmp_path, STEP + 1, **NEW).path / "student.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"student\.safetensors is damaged"):
        checkpoint.read_weights(tmp_path)


BFLOAT = json.dumps({"x": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}}).encode()
HUGE = 8 * 2**20 + 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "got 0 bytes"),
        (b"\x80\x04\x95", "got 3 bytes"),
        (b"\x80\x04\x95" + b"pickled " * 9, "announces a header of"),
        (HUGE.to_bytes(8, "little") + b" " * HUGE, "announces a header of 8,388,609 bytes"),
        ((4).to_bytes(8, "little") + b"oops", "damaged one"),
        (safetensors.numpy.save({"x": np.ones(4)})[:-1], "damaged one"),
        (len(BFLOAT).to_bytes(8, "little") + BFLOAT + b"\0\0", "convert them to float32"),
    ],
    ids=["empty", "short", "pickle", "header", "garbage", "cut", "bfloat16"],
)
def test_a_file_that_is_no_weights_file_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.read_weights(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("kind", ["missing", "empty directory"])
def test_weights_that_are_not_there(tmp_path: Path, kind: str) -> None:
    path = tmp_path if kind == "empty directory" else tmp_path / "absent.safetensors"
    with pytest.raises(CheckpointError, match=str(path)):
        checkpoint.read_weights(path)


def test_weights_that_fit_pass() -> None:
    weights = {"a": np.zeros((2, 3)), "b": np.zeros(())}
    checkpoint.fit_weights(weights, {"b": (), "a": (2, 3)}, "teacher.safetensors for ResNet50_vd")


def test_weights_that_do_not_fit_show_both_sides() -> None:
    wanted = {f"layer{i}.weight": (i, 3) for i in range(9)}
    weights = {"layer8.weight": np.zeros((8, 4)), **{f"old{i}": np.zeros(i) for i in range(2)}}
    with pytest.raises(CheckpointError) as caught:
        checkpoint.fit_weights(weights, wanted, "w.safetensors for NET")
    lines = str(caught.value).splitlines()
    assert lines[0] == "w.safetensors for NET: expected the 9 tensors of the network, got 3 that do not match"
    assert lines[1] == "8 in the network, not in the file:"
    assert lines[2:7] == [f"  - layer{i}.weight [{i}, 3]" for i in range(5)]
    assert lines[7] == "  - … and 3 more"
    assert lines[8:11] == ["2 in the file, not in the network:", "  + old0 [0]", "  + old1 [1]"]
    assert lines[11:13] == ["1 of another shape:", "  ~ layer8.weight [8, 3] in the network, [8, 4] in the file"]
