"""The tables for people: a row for each stage in every state, and one for the test set."""

from __future__ import annotations

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


def overview(*kinds, **fields):
    metrics = {"top1": 0.98765, "top5": 1.0}
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
    assert done == ("0 s0", "finished", "0.9877", "1.0000", "2:05", "runs/a/step-00000008")
    assert stopped[2:] == ("", "", "2:05", "runs/a/step-00000008")
    assert new[2:] == ("", "", "", "")


def test_the_test_set_has_a_row_of_its_own():
    header, rows = overview("done", "done", test={"top1": 0.5, "top5": 0.75}).table()
    assert rows[-1] == ("s1 on test", "", "0.5000", "0.7500", "", "")
    assert {len(row) for row in rows} == {len(header)}
    assert len(overview("done").table()[1]) == 1


@pytest.mark.parametrize("below", [True, False])
def test_a_path_is_shown_as_it_would_be_typed(tmp_path, monkeypatch, below):
    monkeypatch.chdir(tmp_path if below else Path("/"))
    path = tmp_path / "run" if below else Path("elsewhere")
    assert shown(path) == ("run" if below else "elsewhere")
