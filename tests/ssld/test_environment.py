"""What the bits of a result depend on: plain text, the same at every call, threads included."""

from __future__ import annotations

import json

from ssld.environment import environment, installed


def test_the_environment_is_plain_text_that_json_keeps():
    found = environment()
    assert json.loads(json.dumps(found)) == found
    assert all(isinstance(value, str) for value in found.values())
    assert {"machine", "cpu", "python", "paddlepaddle", "numpy", "OMP_NUM_THREADS"} <= found.keys()
    assert found == environment()


def test_threads_are_part_of_the_environment(monkeypatch):
    before = environment()
    monkeypatch.setenv("OMP_NUM_THREADS", "73")
    assert {key for key in before if environment()[key] != before[key]} == {"OMP_NUM_THREADS"}


def test_what_is_not_installed_has_no_version():
    assert installed("no-such-distribution") == ""
    assert environment()["numpy"] == installed("numpy") != ""
