"""The tables for people: a row for each stage in every state, and one for the test set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from ssld.overview import Overview, shown
from ssld.rundir import Status

SETTINGS = SimpleNamespace(
    kind="pretrain",
    student=SimpleNamespace(name="ResNet18_vd"),
    resolution=32,
    epochs=3,
    batch_size=8,
    learning_rate=0.012345,
    warmup_epochs=0.5,
)


def node(number, name):
    return SimpleNamespace(number=number, name=name, settings=SETTINGS, samples=20, steps=8)


def status(kind, **state):
    complete = {"metrics": {}, "facts": {"seconds": 125.0}, **state}
    found = SimpleNamespace(path=Path("runs/a/step-00000008"), state=complete)
    return Status(kind, "since it is so", None if kind == "new" else found)


def overview(*kinds, metrics=None, **fields):
    metrics = metrics or {"top1": 0.98765, "top5": 1.0}
    stages = [
        (node(i, f"s{i}"), status(kind, **({"metrics": metrics} if kind == "done" else {})))
        for i, kind in enumerate(kinds)
    ]
    return Overview(Path("runs/a"), tuple(stages), **fields)


def test_each_state_has_its_word_and_its_action():
    made = overview("done", "resume", "changed", "new")
    header, rows = made.table()
    assert [row[header.index("state")] for row in rows] == ["finished", "stopped", "changed", "to do"]
    header, rows = made.forecast()
    assert [row[header.index("what and why")] for row in rows] == [
        f"{action}: since it is so" for action in ("skip", "go on", "run again", "run")
    ]
    assert rows[2][:-1] == ("2 s2", "pretrain", "ResNet18_vd", "32", "20", "3", "8", "8", "0.0123", "0.5")


def test_what_a_stage_has_not_reached_is_left_empty():
    _, (done, stopped, new) = overview("done", "resume", "new").table()
    assert done == ("0 s0", "finished", "0.9877", "1.0000", "", "2:05", "runs/a/step-00000008")
    assert stopped[2:] == ("", "", "", "2:05", "runs/a/step-00000008")
    assert new[2:] == ("", "", "", "", "")


def test_agreement_has_a_column_and_the_divergence_none():
    header, (row,) = overview("done", metrics={"top1": 0.5, "top5": 1.0, "agreement": 0.12345, "kl": 2.0}).table()
    assert dict(zip(header, row, strict=True))["agreement"] == "0.1235"
    assert "2.0000" not in row


def test_the_test_set_has_a_row_of_its_own():
    header, rows = overview("done", "done", test={"top1": 0.5, "top5": 0.75}).table()
    assert rows[-1] == ("s1 on test", "", "0.5000", "0.7500", "", "", "")
    assert {len(row) for row in rows} == {len(header)}
    assert len(overview("done").table()[1]) == 1


@dataclass
class Forecast:
    """What a labelling takes, as far as the table asks."""

    teacher: str
    size: int | None
    images: int = 20
    views: int = 8

    def what(self):
        return f"what {self.teacher} would do"


def test_labels_come_before_their_stage_with_a_row_for_each_teacher():
    forecasts = {"s1": (Forecast("stage a", 32), Forecast("onnx b", None))}
    header, rows = overview("new", "new", labels=forecasts).forecast()
    assert {len(row) for row in rows} == {len(header)}
    assert [row[:2] for row in rows] == [("0 s0", "pretrain"), *[("1 s1", "label")] * 2, ("1 s1", "pretrain")]
    first, second = (dict(zip(header, row, strict=True)) for row in rows[1:3])
    assert (first["network"], first["px"], first["images"], first["epochs"]) == ("stage a", "32", "20", "8 views")
    assert (second["px"], second["what and why"]) == ("", "what onnx b would do")


@pytest.mark.parametrize("below", [True, False])
def test_a_path_is_shown_as_it_would_be_typed(tmp_path, monkeypatch, below):
    monkeypatch.chdir(tmp_path if below else Path("/"))
    path = tmp_path / "run" if below else Path("elsewhere")
    assert shown(path) == ("run" if below else "elsewhere")
