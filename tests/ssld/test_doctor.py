"""What `ssld doctor` finds, beside what an installation decides."""

import os

import pytest

from ssld import doctor


@pytest.fixture
def user(monkeypatch):
    """A user with 6 of 64 cores, three ranks, and two threads for a step."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr("ssld.threads.cores", lambda: 6)
    monkeypatch.setenv("SSLD_RANKS", "3")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)


def test_threads_are_told_as_they_are_shared(user):
    assert doctor.threads("cpu") == "6 of 64 cores, ranks: 3; a training step takes 2, a frozen network 2"


def test_a_check_that_fails_is_a_finding():
    def broken(device):
        raise ZeroDivisionError(device)

    found = doctor.attempt("a check", broken, "cpu")
    assert (found.name, found.ok, found.detail) == ("a check", False, "ZeroDivisionError: cpu")
